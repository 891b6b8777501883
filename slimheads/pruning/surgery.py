"""Surgery: deletes the rows and columns of the units that a plan does not keep. Modules keep their identity.

Rules:
1. Nothing is changed until the whole plan has been matched against the whole model.
2. Input projections lose output features (and bias entries); the output projection loses input features, never bias.
3. head_dim and the attention scale stay; counting attributes that forwards and other tools read are updated.
4. What has one entry a head (a table of position biases, say) loses the same heads; a family's adapter does the rest.
5. The configuration records the plan relative to the dense model (plans of repeated prunings are composed).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from slimheads.families.adapters import ADAPTERS
from slimheads.families.family import family_of
from slimheads.families.sites import Projection, Site, Table, find_sites
from slimheads.pruning.plan import Plan, match_plan
from slimheads.pruning.plan_record import record_plan


def prune(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Deletes in place what the plan does not keep, and returns the model. Dtype, device and `requires_grad` stay.

    Raises:
        ModelRefusedError: the model's family is not covered.
        UsageError: the plan is not one for this model (a site is missing, unknown, or has another number of units).
    """
    _, family = family_of(model.config)
    sites = find_sites(model)
    shrink(model, sites, plan)
    record_plan(model.config, family, sites, plan)
    return model


def shrink(model: torch.nn.Module, sites: Sequence[Site], plan: Plan) -> None:
    """The deletion itself, on real or meta tensors; the configuration is left alone."""
    pairs = match_plan(sites, plan)
    for site, kept in pairs:
        if len(kept) == site.total:
            continue
        for projection in site.projections:
            _keep_features(model.get_submodule(projection.module), projection, kept)
        for table in site.tables:
            _keep_entries(model.get_submodule(table.module), table, site.kept_heads(kept))
        for module, attribute, what in site.attributes:
            setattr(model.get_submodule(module), attribute, site.counted(what, kept))
    if plan.removed:
        for name in dict.fromkeys(site.adapter for site in sites if site.adapter):
            ADAPTERS[name](model, [pair for pair in pairs if pair[0].adapter == name])


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
        setattr(module, table.name, _chosen(getattr(module, table.name), table.axis, entries))
    else:
        _keep(module, table.name, table.axis, entries)


def _keep(module: torch.nn.Module, name: str, dim: int, features: np.ndarray) -> None:
    old = module.get_parameter(name)
    new = torch.nn.Parameter(_chosen(old.detach(), dim, features), requires_grad=old.requires_grad)
    setattr(module, name, new)


def _chosen(tensor: torch.Tensor, dim: int, features: np.ndarray) -> torch.Tensor:
    """A new contiguous tensor with some of an axis' features (int64, ascending), as many at a time as lie together.

    Copied one by one, features of the last axis take up to ten times as long.
    """
    begins = np.flatnonzero(np.diff(features, prepend=-2) != 1)
    run = int(np.gcd.reduce([tensor.shape[dim], len(features), *begins, *features[begins]]))
    # From numpy, for torch's default device is the meta device where a model is built there.
    runs = torch.from_numpy(features[::run] // run).to(tensor.device)
    before, after = tensor.shape[:dim], tensor.shape[dim + 1 :]
    return tensor.reshape(*before, -1, run, *after).index_select(dim, runs).reshape(*before, len(features), *after)
