"""Adapters: what a family needs in code because its data file cannot describe it. The file names the function.

An adapter is called after the sites of its row have been pruned, with all of them, changed or not, and their kept
units, numbered as before that pruning. It must work on real and meta tensors (it stores lists and creates no tensors)
and on a model that is already slim. Its changes must survive a copy of the model and tracing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import eager_attention_forward

from slimheads.errors import ModelRefusedError
from slimheads.families.sites import Site

Blocks = Sequence[tuple[Site, tuple[int, ...]]]
Adapter = Callable[[torch.nn.Module, Blocks], None]


def pick_position_bias(model: torch.nn.Module, blocks: Blocks) -> None:
    """MPNet and BEiT share a bias [.., dense heads, .., ..] among all layers: each layer selects that of its heads."""
    _select_heads(model, blocks, _SelectsPositionBias)


class _SelectsPositionBias(torch.nn.Module):
    kept_heads: list[int]

    def forward(self, hidden_states: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        before, position_bias, after = arguments[:2], arguments[2], arguments[3:]  # the fourth is the bias in both
        if position_bias is not None:
            position_bias = position_bias[:, self.kept_heads]
        return super().forward(hidden_states, *before, position_bias, *after, **options)


def pass_position_bias_on(model: torch.nn.Module, blocks: Blocks) -> None:
    """T5's first layer computes the bias of all heads: each layer uses that of its own heads and returns all of it."""
    _select_heads(model, blocks, _PassesPositionBiasOn)


class _PassesPositionBiasOn(torch.nn.Module):
    kept_heads: list[int]
    compute_bias: Callable[..., torch.Tensor]  # T5Attention's

    def forward(
        self, hidden_states: torch.Tensor, *, mask: Any = None, position_bias: Any = None, **options: Any
    ) -> tuple[Any, ...]:
        if position_bias is None:
            position_bias = self._whole_bias(hidden_states, mask, **options)
        own = position_bias[:, self.kept_heads]
        states, _, *weights = super().forward(hidden_states, mask=mask, position_bias=own, **options)
        return (states, position_bias, *weights)

    def _whole_bias(self, hidden_states: torch.Tensor, mask: Any, **options: Any) -> torch.Tensor:
        """As T5Attention computes it from its table, but for all dense heads."""
        new, cache = hidden_states.shape[1], options.get("past_key_values")
        seen = mask.shape[-1] if mask is not None else new + (0 if cache is None else cache.get_seq_length())
        bias = self.compute_bias(seen, seen, hidden_states.device, options.get("cache_position"))[:, :, -new:]
        return bias if mask is None else bias + mask


def pass_mask_on(model: torch.nn.Module, blocks: Blocks) -> None:
    """T5's first cross-attention returns a bias (zeros and the mask) for its heads: each layer uses one head of it."""
    for site, _ in blocks:
        _mix_in(_attention(model, site), _PassesMaskOn)


class _PassesMaskOn(torch.nn.Module):
    def forward(self, hidden_states: torch.Tensor, *, position_bias: Any = None, **options: Any) -> Any:
        same_for_all = None if position_bias is None else position_bias[:, :1]
        return super().forward(hidden_states, position_bias=same_for_all, **options)


def join_fewer_heads(model: torch.nn.Module, blocks: Blocks) -> None:
    """CLIP's forward joins the heads to the width of the hidden states, but fewer heads are narrower."""
    for site, _ in blocks:
        _mix_in(_attention(model, site), _JoinsFewerHeads)


class _JoinsFewerHeads(torch.nn.Module):
    """The same arithmetic as CLIPAttention and SiglipAttention, except for the last reshape."""

    q_proj: torch.nn.Linear
    k_proj: torch.nn.Linear
    v_proj: torch.nn.Linear
    out_proj: torch.nn.Linear
    config: PretrainedConfig
    head_dim: int
    scale: float
    dropout: float
    is_causal: bool

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        causal_attention_mask: torch.Tensor | None = None,
        output_attentions: bool | None = False,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        implementation = self.config._attn_implementation
        if implementation == "flash_attention_2":
            self.is_causal = causal_attention_mask is not None
        elif attention_mask is not None and causal_attention_mask is not None:
            attention_mask = attention_mask + causal_attention_mask
        elif causal_attention_mask is not None:
            attention_mask = causal_attention_mask
        attend = ALL_ATTENTION_FUNCTIONS.get(implementation, eager_attention_forward)
        joined, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            is_causal=self.is_causal,
            scaling=self.scale,
            dropout=self.dropout if self.training else 0.0,
        )
        return self.out_proj(joined.flatten(2)), weights


def gate_picked_position_bias(model: torch.nn.Module, blocks: Blocks) -> None:
    """WavLM shares a bias as MPNet does, and computes a gate per dense head from its share of the hidden states."""
    _select_heads(model, blocks, _GatesSelectedPositionBias)


class _GatesSelectedPositionBias(torch.nn.Module):
    """The same arithmetic as WavLMAttention, but it calls the projections' modules and computes only the kept heads."""

    q_proj: torch.nn.Linear
    k_proj: torch.nn.Linear
    v_proj: torch.nn.Linear
    out_proj: torch.nn.Linear
    gru_rel_pos_linear: torch.nn.Linear
    gru_rel_pos_const: torch.Tensor
    compute_bias: Callable[[int, int], torch.Tensor]  # WavLMAttention's, of the first layer's table
    kept_heads: list[int]
    head_dim: int
    scaling: float
    dropout: float

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        output_attentions: bool = False,
        index: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        batch, length, _ = hidden_states.shape
        if position_bias is None:
            whole = self.compute_bias(length, length)
            position_bias = whole.unsqueeze(0).repeat(batch, 1, 1, 1).view(-1, length, length)
        bias = self._gates(hidden_states) * position_bias.view(batch, -1, length, length)[:, self.kept_heads]
        if attention_mask is not None:
            bias = bias.masked_fill(attention_mask.ne(1)[:, None, None], float("-inf"))
        states = hidden_states.transpose(0, 1)
        query, key, value = (
            project(states).view(length, batch, -1, self.head_dim).permute(1, 2, 0, 3)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.dropout if self.training else 0.0
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
        joined = self.out_proj(mixed.permute(2, 0, 1, 3).flatten(2)).transpose(0, 1)
        if not output_attentions:
            return joined, None, position_bias
        weights = (query * self.scaling @ key.transpose(-1, -2) + bias).softmax(-1)
        return (
            joined,
            weights.mean(1, keepdim=True).expand(weights.shape),
            position_bias,
        )  # as in transformers

    def _gates(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[batch, heads, length, 1]"""
        shares = hidden_states.view(*hidden_states.shape[:2], -1, self.head_dim).transpose(1, 2)[:, self.kept_heads]
        projected = self.gru_rel_pos_linear(shares)
        first, second = torch.sigmoid(projected.view(*shares.shape[:-1], 2, 4).sum(-1)).chunk(2, dim=-1)
        return first * (second * self.gru_rel_pos_const - 1.0) + 2.0


def pick_slopes(model: torch.nn.Module, blocks: Blocks) -> None:
    """ALiBi (BLOOM, Falcon, MPT): the model computes a slope per dense head; each layer selects those of its heads."""
    for module, site, kept in _changed(model, blocks):
        if not hasattr(module, "dense_heads"):
            module.dense_heads = site.total * site.heads_per_unit
        _compose_kept_heads(module, site.kept_heads(kept))
        _mix_in(module, _SelectsSlopes)


class _SelectsSlopes(torch.nn.Module):
    kept_heads: list[int]
    dense_heads: int

    def forward(self, *arguments: Any, **options: Any) -> Any:
        alibi, mask = options.get("alibi"), options.get("attention_mask")
        if alibi is not None:  # [batch * dense heads, 1, positions]
            by_head = alibi.view(-1, self.dense_heads, positions := alibi.shape[2])
            options["alibi"] = by_head[:, self.kept_heads].view(-1, 1, positions)
            if mask is not None and mask.shape[1] == self.dense_heads:  # Falcon's mask contains the slopes
                options["attention_mask"] = mask[:, self.kept_heads]
        if options.get("position_bias") is not None:  # MPT's, [dense heads, 1, positions]
            options["position_bias"] = options["position_bias"][self.kept_heads]
        return super().forward(*arguments, **options)


def count_in_config(model: torch.nn.Module, blocks: Blocks) -> None:
    """Phi-3 splits its fused matrix by `config.num_attention_heads`: each layer needs its own count there."""
    for module, site, kept in _changed(model, blocks):
        module.num_attention_heads = site.counted("heads", kept)
        _mix_in(module, _CountsInConfig)


class _CountsInConfig(torch.nn.Module):
    num_attention_heads: int
    __jit_unused_properties__ = ("config",)

    @property
    def config(self) -> Any:
        """Created on each access, because a copy of the configuration would become outdated."""
        return _OwnHeadCount(self.__dict__["config"], self.num_attention_heads)


class _OwnHeadCount:
    """A live view of a configuration, with another number of query heads."""

    def __init__(self, config: Any, heads: int) -> None:
        self.__dict__.update(config=config, num_attention_heads=heads)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["config"], name, value)


def cut_in_four(model: torch.nn.Module, blocks: Blocks) -> None:
    """CodeGen splits its fused projection into four equal parts, which the remaining heads may not fill evenly.

    The stored weight keeps its order. The forward uses its rows in another order, in which each of four equal parts has
    its queries, values and keys where the model expects them. An exporter folds the reordering into the weight.

    Raises:
        ModelRefusedError: head_dim is not a multiple of 4.
    """
    for module, site, kept in _changed(model, blocks):
        if site.head_dim % 4:
            raise ModelRefusedError(
                f"head_dim {site.head_dim} is not a multiple of 4",
                where=site.name,
                hint="use a checkpoint whose head_dim is a multiple of 4",
            )
        [fused] = [p for p in site.projections if not p.divides_inputs]
        role_of = fused.role_of[fused.kept_features(kept)]
        parts = [np.array_split(np.flatnonzero(role_of == role), 4) for role in ("query", "value", "key")]
        projection: Any = model.get_submodule(fused.module)
        projection.order = np.concatenate([part for quarter in zip(*parts, strict=True) for part in quarter]).tolist()
        _mix_in(projection, _Reordered)
        _mix_in(module, _SplitsAnyQuarters)


class _Reordered(torch.nn.Module):
    order: list[int]
    weight: torch.Tensor

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(inputs, self.weight[self.order])  # there is no bias


class _SplitsAnyQuarters(torch.nn.Module):
    def _split_heads(self, x: torch.Tensor, n_head: int, dim_head: int, mp_num: int) -> torch.Tensor:
        return x.reshape(*x.shape[:-2], -1, dim_head)  # a quarter need not be whole heads


ADAPTERS: Mapping[str, Adapter] = MappingProxyType(
    {
        adapter.__name__: adapter
        for adapter in (
            count_in_config,
            cut_in_four,
            gate_picked_position_bias,
            join_fewer_heads,
            pass_mask_on,
            pass_position_bias_on,
            pick_position_bias,
            pick_slopes,
        )
    }
)


@contextmanager
def opened(model: torch.nn.Module, sites: Sequence[Site]) -> Iterator[None]:
    """Inside the context, closed attention blocks call their projections' modules, so that hooks on them work."""
    closed = [site for site in sites if site.row.closed and not hasattr(_attention(model, site), "kept_heads")]
    stock = [(module, type(module)) for module in (_attention(model, site) for site in closed)]
    for site in closed:
        ADAPTERS[str(site.row.adapter)](model, [(site, tuple(range(site.total)))])
    try:
        yield
    finally:
        for module, own in stock:
            module.__class__ = own
            del module.kept_heads


def _changed(model: torch.nn.Module, blocks: Blocks) -> Iterator[tuple[Any, Site, tuple[int, ...]]]:
    return ((_attention(model, site), site, kept) for site, kept in blocks if len(kept) < site.total)


def _attention(model: torch.nn.Module, site: Site) -> torch.nn.Module:
    """The module that computes a site's attention: the owner of its first projection."""
    return model.get_submodule(site.projections[0].module.rpartition(".")[0])


def _select_heads(model: torch.nn.Module, blocks: Blocks, mixin: Any) -> None:
    """Stores in every attention module which of the dense model's heads it has, for the mixin's forward."""
    for site, kept in blocks:
        module = _attention(model, site)
        _compose_kept_heads(module, site.kept_heads(kept))
        _mix_in(module, mixin)


def _compose_kept_heads(module: torch.nn.Module, kept: Sequence[int]) -> None:
    """Stores which of the dense model's heads a module has; `kept` indexes the heads stored before."""
    former = getattr(module, "kept_heads", None)
    module.kept_heads = list(kept) if former is None else [former[head] for head in kept]  # type: ignore[assignment]


def _mix_in(module: torch.nn.Module, mixin: Any) -> None:
    """Makes the mixin's forward override the module's own, once."""
    own: Any = type(module)
    if not issubclass(own, mixin):
        module.__class__ = _mixed(mixin, own)


@cache
def _mixed(mixin: Any, own: Any) -> Any:
    return type(own.__name__, (mixin, own), {"__module__": __name__})
