"""Surgery: deletes the rows and columns of the units that a plan does not keep. Modules keep their identity.

Rules:
1. Nothing is changed until the whole plan has been matched against the whole model.
2. Input projections lose output features (and bias entries); the output projection loses input features, never bias.
3. head_dim and the attention scale stay; counting attributes that forwards and other tools read are updated.
4. What has one entry a head (a table of position biases, say) loses the same heads; a family's adapter does the rest.
5. The configuration records the plan relative to the dense model (plans of repeated prunings are composed).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from slimheads.errors import ModelRefusedError, UsageError
from slimheads.families.adapters import ADAPTERS
from slimheads.families.family import PLAN_KEY, Family, dense_value, family_of
from slimheads.families.sites import Projection, Site, Table, find_sites
from slimheads.pruning.select import Plan


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


def match_plan(sites: Sequence[Site], plan: Plan) -> list[tuple[Site, tuple[int, ...]]]:
    """Pairs every site with its kept units. A site of KV groups that is planned by head is given by head.

    Raises:
        UsageError: the plan and the model name different sites, a site has another number of units, or its KV groups
            would keep different numbers of query heads.
    """
    planned = {s.site: s for s in plan.sites}
    unknown = planned.keys() ^ {site.name for site in sites}
    if unknown:
        raise UsageError(
            "the plan and the model do not have the same sites",
            where=min(unknown),
            hint="make the plan from this model",
        )
    pairs = []
    for site in sites:
        own = planned[site.name]
        seen = site.by_head() if own.unit == "head" else site
        if (own.total, own.unit) != (seen.total, seen.unit):
            raise UsageError(
                f"the plan counts {own.total} units ({own.unit}), the model has {seen.total} ({seen.unit})",
                where=site.name,
                hint="make the plan from this model",
            )
        if len(set(seen.kept_per_group(own.kept).values())) > 1:
            raise UsageError(
                f"the plan keeps heads {list(own.kept)}: not as many in each KV group",
                where=site.name,
                hint="keep the same number of query heads for every KV head",
            )
        pairs.append((seen, own.kept))
    return pairs


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


def record_plan(config: PretrainedConfig, family: Family, sites: Sequence[Site], plan: Plan) -> None:
    """Writes into the configuration the plan, relative to the dense model, and what lets the stock library reload."""
    before = {s["site"]: s for s in (getattr(config, PLAN_KEY, None) or {}).get("sites", [])}
    pairs = match_plan(sites, plan)
    records = [_composed(before.get(site.name), site, kept) for site, kept in pairs]
    dense = {key: dense_value(config, key) for key in family.recorded_keys}
    setattr(config, PLAN_KEY, {"format": 1, "dense": dense, "sites": records})
    if family.reload == "pruned_heads":
        gone = [sorted(set(range(r["total"])) - set(r["kept"])) for r in records]
        config.pruned_heads = {site.layer: heads for site, heads in zip(sites, gone, strict=True) if heads}
    elif family.reload == "head_counts":
        counts = dense | _equal_head_counts(family, dense, pairs)
        for key, value in (counts if _takes(config, counts) else dense).items():
            setattr(config, key, value)


def _takes(config: PretrainedConfig, counts: Mapping[str, int]) -> bool:
    """Whether the class builds a configuration with these counts: Phi-3's derives from them how long longrope's lists
    of factors have to be, and refuses those of the dense model.
    """
    try:
        type(config).from_dict(config.to_dict() | counts)
    except ValueError:
        return False
    return True


def _composed(before: Mapping[str, Any] | None, site: Site, kept: tuple[int, ...]) -> dict[str, Any]:
    """A site's record after one more pruning; by head as soon as one of the prunings was."""
    record = before or {"unit": site.unit, "total": site.total, "kept": list(range(site.total))}
    if record["unit"] == "kv_group" and site.unit == "head":
        members = site.members  # no pruning by head has changed it yet
        heads = [group * members + member for group in record["kept"] for member in range(members)]
        record = {"unit": "head", "total": record["total"] * members, "kept": heads}
    now = site.kept_heads(kept) if record["unit"] == "head" else kept
    return {"site": site.name} | dict(record) | {"kept": [record["kept"][unit] for unit in now]}


def recorded_plan(config: PretrainedConfig, family: Family) -> Plan | None:
    """The plan that `record_plan` wrote, or None where there is none (a dense model).

    Raises:
        ModelRefusedError: something else stands there.
    """
    if not hasattr(config, PLAN_KEY):
        return None
    record = getattr(config, PLAN_KEY)
    try:
        plan = Plan.from_json(record)
        if record["dense"].keys() != set(family.recorded_keys) or any(
            type(value) is not int for value in record["dense"].values()
        ):
            raise ValueError(f"dense counts {record['dense']!r}")
    except (UsageError, KeyError, AttributeError, ValueError) as error:
        raise ModelRefusedError(
            f"'{PLAN_KEY}' does not hold a plan ({error})", where="config.json", hint="fetch the model again"
        ) from error
    return plan


def _equal_head_counts(
    family: Family, dense: Mapping[str, int], pairs: Sequence[tuple[Site, tuple[int, ...]]]
) -> dict[str, int]:
    """Equal counts and an explicit head_dim let plain `from_pretrained` build the slim shapes by itself."""
    units_key, heads_key = map(str, family.keys(family.sites[0]))
    found = [{units_key: s.counted("units", kept), heads_key: s.counted("heads", kept)} for s, kept in pairs]
    if found[0] == dense or any(counts != found[0] for counts in found):
        return {}
    return {"head_dim": pairs[0][0].head_dim} | found[0]


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
