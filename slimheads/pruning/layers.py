"""Dropping whole layers: the modules, and the configuration that stock transformers rebuilds them from."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, repeat
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from slimheads.errors import UsageError
from slimheads.families.family import Family, SiteRow, assign, lookup, site_pattern
from slimheads.families.record import Renumbering
from slimheads.families.sites import Site
from slimheads.runtime.quiet import quiet_transformers

POSITIONS = ("layer_idx", "layer_id")  # attributes that say which layer a module is in
_SKIPS = {"DropPath", "Identity"}  # ends of class names: by training's drop rate, which may grow with depth


def drop_layers(model: torch.nn.Module, dropped: Sequence[Site]) -> None:
    """Takes layers out of their lists, and tells those that stay their new place (they find their cache by it)."""
    layers = Renumbering.without(site.name for site in dropped)
    for stack, gone in layers.dropped.items():
        modules: Any = model.get_submodule(stack)
        kept = [index for index in range(len(modules)) if index not in gone]
        for index in sorted(gone, reverse=True):
            del modules[index]
        for new, old in enumerate(kept):
            for module in modules[new].modules():
                for name in POSITIONS:
                    if getattr(module, name, None) == old:
                        setattr(module, name, new)
        _tell_own_config(model, stack, len(kept))


def _tell_own_config(model: torch.nn.Module, stack: str, layers: int) -> None:
    """T5's encoder and decoder have copies of the configuration, by which they size the cache."""
    whole: Any = getattr(model, "config", None)
    own: Any = getattr(model.get_submodule(stack.rpartition(".")[0]), "config", None)
    if own is not whole and type(own) is type(whole):
        own.num_hidden_layers = layers


def smaller_config(config: PretrainedConfig, family: Family, dropped: Sequence[Site]) -> dict[str, Any]:
    """The config keys that change when layers go, with their new values."""
    values: dict[str, Any] = {}
    for row in family.rows(config, "layer"):
        own = [site.name for site in dropped if site.row is row]
        if own:
            gone = {int(name.rpartition(".")[2]) for name in own}
            values |= {key: _fewer(lookup(config, key), row, own) for key in row.layer_keys}
            values |= dict(_shorter_lists(config, row, gone))
    return values


def _fewer(count: Any, row: SiteRow, gone: Sequence[str]) -> Any:
    """The number of layers that are left; where there is one per stage, a list."""
    if not isinstance(count, list | tuple):
        return count - len(gone)
    stages = [int(match[1]) for name in gone if (match := site_pattern(row).fullmatch(name))]
    return [layers - stages.count(stage) for stage, layers in enumerate(count)]


def _shorter_lists(config: PretrainedConfig, row: SiteRow, gone: set[int]) -> Iterator[tuple[str, Any]]:
    for key, form in row.per_layer.items():
        value = lookup(config, key, optional=True)
        if not value:
            continue
        entries = value if form == "list" else chain(*chain(*(repeat(part, times) for part, times in value)))
        left = [entry for index, entry in enumerate(entries) if index not in gone]
        yield key, left if form == "list" else [[left, 1]]


def restage(config: PretrainedConfig) -> None:
    """Backbones name every layer a stage and give the last one's states: both follow the number of layers."""
    if hasattr(config, "stage_names"):
        layers = config.num_hidden_layers
        config.stage_names = ["stem", *(f"stage{layer}" for layer in range(1, layers + 1))]
        config._out_features, config._out_indices = [f"stage{layers}"], [layers]


def require_same_layers(model: PreTrainedModel, family: Family, dropped: Sequence[Site]) -> None:
    """Refuses a plan after which stock transformers would build a layer of another kind in the place of one that stays.

    Some architectures derive a layer's kind from its number: which ones see the whole text, which shift their windows.
    Two models are built on the meta device, without memory, as before and as after, and their layers compared.

    Raises:
        UsageError: naming the layer and what is different in it.
    """
    if not dropped:
        return
    before, after = (copy.deepcopy(model.config) for _ in range(2))
    for key, value in smaller_config(model.config, family, dropped).items():
        assign(after, key, value)
    layers = Renumbering.without(site.name for site in dropped)
    with torch.device("meta"), quiet_transformers():
        old, new = (_built(type(model), config) for config in (before, after))
    for stack, gone in layers.dropped.items():
        modules: Any = old.get_submodule(stack)
        for index in (index for index in range(len(modules)) if index not in gone):
            name = f"{stack}.{index}"
            if different := _difference(modules[index], new.get_submodule(layers.new_name(name))):
                raise UsageError(
                    f"without the layers that the plan drops, transformers would build it otherwise ({different})",
                    where=name,
                    hint="in this architecture a layer's kind depends on its number: drop layers so that each one "
                    "that stays has a number of its own kind",
                )


def _built(model_class: Any, config: PretrainedConfig) -> PreTrainedModel:
    config.pruned_heads = {}  # by layer, and of no interest here
    model: PreTrainedModel = model_class(config)
    return model


def _difference(one: torch.nn.Module, other: torch.nn.Module) -> str | None:
    """What is different in two layers besides their place and their weights; None if nothing is."""
    a, b = _facts(one), _facts(other)
    return next((key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)), None)


def _facts(layer: torch.nn.Module) -> Mapping[str, Any]:
    facts: dict[str, Any] = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    for name, module in layer.named_modules():
        if not type(module).__name__.endswith(tuple(_SKIPS)):
            for attribute, value in vars(module).items():
                if attribute not in POSITIONS and isinstance(value, bool | int | float | str | tuple | None):
                    facts[f"{name}.{attribute}"] = value
    return facts
