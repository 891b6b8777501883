"""From token states to one embedding per text: by the folder's sentence-transformers modules, or as the mean."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn import functional as F

from slimheads.errors import ModelRefusedError, first_line, one_line
from slimheads.intake.json_files import read_json_as
from slimheads.side_files.sentence_modules import (
    MODULES,
    SentenceModule,
    activation_name,
    module_settings,
    sentence_modules,
    transformer_settings,
)

# Pooling modes in the order in which they are concatenated, and the older config keys for them.
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
_OLD_KEYS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
Step = Callable[[torch.Tensor], torch.Tensor]  # [.., width] -> [.., width]


@dataclass(frozen=True)
class Embedding:
    """How texts are prepared and token states become one embedding per text.

    The pooling `modes` are concatenated along the width, then the steps in `after` follow in order. `prompt` is put
    before each text; unless `prompt_pooled`, its tokens are left out of the pooling.
    """

    modes: tuple[str, ...] = ("mean",)
    prompt: str = ""
    prompt_pooled: bool = True
    lower: bool = False
    max_tokens: int | None = None
    before: tuple[Step, ...] = ()  # on token states
    after: tuple[Step, ...] = ()
    names: tuple[str, ...] = ()  # of the steps, by their folders

    def __str__(self) -> str:
        return ", then ".join([" and ".join(self.modes), *self.names])

    def texts(self, texts: Sequence[str]) -> list[str]:
        """The texts as the tokenizer gets them."""
        return [self.prompt + (text.lower() if self.lower else text) for text in texts]

    def pool(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Embeddings [texts, width], not normalised.

        Args:
            states: [texts, positions, width], of any float dtype.
            mask: int64 [texts, positions], right-padded: 1 for tokens to pool.
        """
        for step in self.before:
            states = step(states)
        pooled = torch.cat([_POOL[mode](states, mask) for mode in self.modes], dim=-1)
        for step in self.after:
            pooled = step(pooled)
        return pooled


MEAN = Embedding()


def embedding_of(folder: Path) -> Embedding:
    """The embedding of a sentence-transformers folder; the mean of the token states if it defines none.

    Raises:
        ModelRefusedError: as `sentence_modules`, or a module's settings or weights are damaged.
    """
    modules = sentence_modules(folder)
    pooling = next((module for module in modules if module.kind == "Pooling"), None)
    if pooling is None:
        return MEAN
    settings = module_settings(folder, pooling)
    before, after, names = list[Step](), list[Step](), list[str]()
    for module in modules[1:]:
        step = _step(folder, module)
        if step is not None:
            (after if modules.index(module) > modules.index(pooling) else before).append(step)
            names.append(module.path)
    limits = transformer_settings(folder)
    longest = limits.get("max_seq_length")
    return Embedding(
        modes=_modes(folder, pooling, settings),
        prompt=_prompt(folder),
        prompt_pooled=settings.get("include_prompt") is not False,
        lower=limits.get("do_lower_case") is True,
        max_tokens=longest if isinstance(longest, int) and longest > 0 else None,
        before=tuple(before),
        after=tuple(after),
        names=tuple(names),
    )


def require_embedding(folder: Path, width: int) -> None:
    """Checks that a folder's modules accept token states of this width.

    Raises:
        ModelRefusedError: as `embedding_of`, or the width does not fit.
    """
    try:
        embedding_of(folder).pool(torch.zeros((1, 1, width)), torch.ones((1, 1), dtype=torch.long))
    except RuntimeError as error:
        raise ModelRefusedError(
            f"the modules do not fit a model of width {width} ({first_line(error)})",
            where=str(folder / MODULES),
            hint="fetch the model folder again",
        ) from error


def _modes(folder: Path, pooling: SentenceModule, settings: dict[str, Any]) -> tuple[str, ...]:
    named = settings.get("pooling_mode")
    if named is None:
        return tuple(mode for mode in MODES if settings.get(_OLD_KEYS[mode]) is True) or ("mean",)
    modes = (named,) if isinstance(named, str) else tuple(named) if isinstance(named, list) else ()
    if not modes or not set(modes) <= set(MODES):
        raise ModelRefusedError(
            f"unknown pooling_mode {json.dumps(named)}",
            where=str(folder / pooling.path / "config.json"),
            hint=f"use one of {', '.join(MODES)}",
        )
    return modes


def _prompt(folder: Path) -> str:
    """The prompt that a client puts before each text by default."""
    path = folder / "config_sentence_transformers.json"
    settings = read_json_as(path, dict) or {}
    prompts, name = settings.get("prompts") or {}, settings.get("default_prompt_name")
    if name is None:
        return ""
    if not isinstance(prompts, dict) or not isinstance(prompts.get(name), str):
        raise ModelRefusedError(
            "default_prompt_name names no prompt", where=str(path), hint="fetch the model folder again"
        )
    return str(prompts[name])


def _step(folder: Path, module: SentenceModule) -> Step | None:
    if module.kind not in ("Dense", "LayerNorm"):
        return None  # normalisation and dropout do not change a cosine
    path = folder / module.path / "model.safetensors"
    try:
        weights = {name: tensor.float() for name, tensor in load_file(path).items()}
        if module.kind == "LayerNorm":
            scale, shift = weights["norm.weight"], weights["norm.bias"]
            return partial(F.layer_norm, normalized_shape=tuple(scale.shape), weight=scale, bias=shift)
        activation = getattr(torch.nn, activation_name(folder, module))()
        return partial(_dense, weight=weights["linear.weight"], bias=weights.get("linear.bias"), activation=activation)
    except (SafetensorError, OSError, KeyError, AttributeError, TypeError) as error:
        raise ModelRefusedError(
            f"damaged module ({one_line(error)})",
            where=str(path),
            hint="fetch the model folder again",
        ) from error


def _dense(x: torch.Tensor, *, weight: torch.Tensor, bias: torch.Tensor | None, activation: Step) -> torch.Tensor:
    return activation(F.linear(x, weight, bias))


def _weights(mask: torch.Tensor) -> torch.Tensor:
    return mask[:, :, None].float()


def _last(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(mask.shape[1], device=mask.device)
    return states[torch.arange(len(states)), (positions * mask).argmax(1)]


def _mean(states: torch.Tensor, mask: torch.Tensor, *, by_position: bool = False, root: bool = False) -> torch.Tensor:
    weights = _weights(mask)
    if by_position:
        weights = weights * torch.arange(1, mask.shape[1] + 1, device=mask.device)[None, :, None]
    total = weights.sum(1).clamp(min=1e-9)
    return (states * weights).sum(1) / (total.sqrt() if root else total)


_POOL: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cls": lambda states, mask: states[torch.arange(len(states)), mask.int().argmax(1)],
    "max": lambda states, mask: states.masked_fill(mask[:, :, None] == 0, -torch.inf).amax(1),
    "mean": _mean,
    "mean_sqrt_len_tokens": partial(_mean, root=True),
    "weightedmean": partial(_mean, by_position=True),
    "lasttoken": _last,
}
