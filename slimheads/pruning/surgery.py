"""Surgery: deletes the rows and columns of the units that a plan does not keep, and whole layers. Module objects that
stay are the same.

Rules:
1. Nothing changes until the whole plan has been matched with the whole model.
2. Input projections lose output features (and bias entries); the output projection loses input features, never bias.
3. head_dim and the attention scale do not change. Attributes that count heads are updated.
4. Tensors with one entry per head (e.g. position biases) lose the same heads; a family's adapter does the rest.
5. Layers that stay are renumbered, as stock transformers would number them.
6. The configuration records the plan relative to the dense model; the plans of repeated prunings are combined.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from slimheads.families.adapters import ADAPTERS
from slimheads.families.family import family_of
from slimheads.families.projections import Projection
from slimheads.families.sites import Site, Table, find_sites
from slimheads.pruning.layers import drop_layers, require_same_layers
from slimheads.pruning.plan import Plan, match_plan
from slimheads.pruning.plan_record import record_plan


def prune(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Deletes in place what the plan does not keep, and returns the model. Dtype, device and `requires_grad` are kept.

    Raises:
        ModelRefusedError: the model's family is not covered.
        UsageError: the plan was not made for this model (a site is missing, unknown, or has another number of units).
    """
    _, family = family_of(model.config)
    sites = find_sites(model)
    require_same_layers(model, family, match_plan(sites, plan).dropped)
    shrink(model, sites, plan)
    record_plan(model.config, family, sites, plan)
    return model


def shrink(model: torch.nn.Module, sites: Sequence[Site], plan: Plan) -> None:
    """The deletion itself, on real or meta tensors; the configuration does not change."""
    matched = match_plan(sites, plan)
    for site, kept in matched.pairs:
        if len(kept) == site.total:
            continue
        for projection in site.projections:
            _keep_features(model.get_submodule(projection.module), projection, kept)
        for table in site.tables:
            _keep_entries(model.get_submodule(table.module), table, site.kept_heads(kept))
        for module, attribute, what in site.attributes:
            setattr(model.get_submodule(module), attribute, site.counted(what, kept))
    attention = matched.of_attention()
    if any(len(kept) < site.total for site, kept in attention):
        for name in dict.fromkeys(site.row.adapter for site, _ in attention if site.row.adapter):
            ADAPTERS[name](model, [pair for pair in attention if pair[0].row.adapter == name])
    drop_layers(model, matched.dropped)


def _keep_features(module: torch.nn.Module, projection: Projection, kept: tuple[int, ...]) -> None:
    features = projection.kept_features(kept)
    along = 0 if isinstance(module, Conv1D) == projection.divides_inputs else 1
    _keep(module, "weight", along, features)
    if not projection.divides_inputs and module.bias is not None:
        _keep(module, "bias", 0, features)
    names = ("nx", "nf") if isinstance(module, Conv1D) else ("in_features", "out_features")
    setattr(module, names[0 if projection.divides_inputs else 1], len(features))


def _keep_entries(module: torch.nn.Module, table: Table, heads: tuple[int, ...]) -> None:
    entries = np.array(table.kept_entries(heads))
    if table.name in module._buffers:
        setattr(module, table.name, _with_features(getattr(module, table.name), table.axis, entries))
    else:
        _keep(module, table.name, table.axis, entries)


def _keep(module: torch.nn.Module, name: str, dim: int, features: np.ndarray) -> None:
    old = module.get_parameter(name)
    new = torch.nn.Parameter(_with_features(old.detach(), dim, features), requires_grad=old.requires_grad)
    setattr(module, name, new)


def _with_features(tensor: torch.Tensor, dim: int, features: np.ndarray) -> torch.Tensor:
    """A new contiguous tensor with the given features (int64, ascending) of one axis, copied in runs of adjacent ones.

    Copying features of the last axis one by one takes up to ten times as long.
    """
    begins = np.flatnonzero(np.diff(features, prepend=-2) != 1)
    run = int(np.gcd.reduce([tensor.shape[dim], len(features), *begins, *features[begins]]))
    # From numpy, because torch's default device is the meta device while a model is built there.
    runs = torch.from_numpy(features[::run] // run).to(tensor.device)
    before, after = tensor.shape[:dim], tensor.shape[dim + 1 :]
    return tensor.reshape(*before, -1, run, *after).index_select(dim, runs).reshape(*before, len(features), *after)
