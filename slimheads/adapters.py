"""Adapters: what a family does in code that its data file cannot say, one small function each, named by the file.

An adapter is called after the sites of its row have shrunk, with every one of them, changed or not, and its kept units,
counted as the model was just before. It runs on real and on meta tensors (it keeps lists, never makes tensors), may
run again on a model that is slim already, and what it changes must survive a copy of the model and its tracing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

import torch

from slimheads.attention import Site

Blocks = Sequence[tuple[Site, tuple[int, ...]]]
Adapter = Callable[[torch.nn.Module, Blocks], None]


def pick_position_bias(model: torch.nn.Module, blocks: Blocks) -> None:
    """For biases [.., dense heads, .., ..] that all layers share (MPNet, BEiT): each layer picks those of its heads."""
    for site, kept in blocks:
        module = _attention(model, site)
        _compose_kept_heads(module, site.kept_heads(kept))
        _mix_in(module, _PicksPositionBias)


class _PicksPositionBias(torch.nn.Module):
    kept_heads: list[int]

    def forward(self, hidden_states: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        before, position_bias, after = arguments[:2], arguments[2], arguments[3:]  # the fourth is the bias in both
        if position_bias is not None:
            position_bias = position_bias[:, self.kept_heads]
        return super().forward(hidden_states, *before, position_bias, *after, **options)


ADAPTERS: Mapping[str, Adapter] = MappingProxyType({"pick_position_bias": pick_position_bias})


def _attention(model: torch.nn.Module, site: Site) -> torch.nn.Module:
    """The module that computes a site's attention: the one that its first projection belongs to."""
    return model.get_submodule(site.projections[0].module.rpartition(".")[0])


def _compose_kept_heads(module: torch.nn.Module, kept: Sequence[int]) -> None:
    """Records which of the dense model's heads a module has; `kept` is relative to those that it recorded before."""
    former = getattr(module, "kept_heads", None)
    module.kept_heads = list(kept) if former is None else [former[head] for head in kept]  # type: ignore[assignment]


def _mix_in(module: torch.nn.Module, mixin: Any) -> None:
    """Puts the mixin's forward before the module's own, once."""
    own: Any = type(module)
    if not issubclass(own, mixin):
        module.__class__ = _mixed(mixin, own)


@cache
def _mixed(mixin: Any, own: Any) -> Any:
    return type(own.__name__, (mixin, own), {"__module__": __name__})
