"""Surgery: deletes the rows and columns of the units that a plan does not keep. Modules keep their identity.

Rules:
1. Nothing is changed until the whole plan has been matched against the whole model.
2. Input projections lose output features (and bias entries); the output projection loses input features, never bias.
3. head_dim and the attention scale stay; counting attributes that forwards and other tools read are updated.
4. The configuration records the plan relative to the dense model (plans of repeated prunings are composed).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from slimheads.attention import PLAN_KEY, Family, Projection, Site, dense_value, family_of, find_sites
from slimheads.errors import ModelRefusedError, UsageError
from slimheads.selection import Plan


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
    """Pairs every site with its kept units.

    Raises:
        UsageError: the plan and the model name different sites, or a site has another number of units.
    """
    planned = {s.site: s for s in plan.sites}
    unknown = planned.keys() ^ {site.name for site in sites}
    if unknown:
        raise UsageError(
            "the plan and the model do not have the same sites",
            where=min(unknown),
            hint="make the plan from this model",
        )
    for site in sites:
        own = planned[site.name]
        if (own.total, own.unit) != (site.total, site.unit):
            raise UsageError(
                f"the plan counts {own.total} units ({own.unit}), the model has {site.total} ({site.unit})",
                where=site.name,
                hint="make the plan from this model",
            )
    return [(site, planned[site.name].kept) for site in sites]


def shrink(model: torch.nn.Module, sites: Sequence[Site], plan: Plan) -> None:
    """The deletion itself, on real or meta tensors; the configuration is left alone."""
    for site, kept in match_plan(sites, plan):
        if len(kept) == site.total:
            continue
        for projection in site.projections:
            _keep_features(model.get_submodule(projection.module), projection, kept)
        for module, attribute, what in site.attributes:
            setattr(model.get_submodule(module), attribute, site.counted(what, len(kept)))


def record_plan(config: PretrainedConfig, family: Family, sites: Sequence[Site], plan: Plan) -> None:
    """Writes into the configuration the plan, relative to the dense model, and what lets the stock library reload."""
    before = {s["site"]: s for s in (getattr(config, PLAN_KEY, None) or {}).get("sites", [])}
    records = []
    for site, kept in match_plan(sites, plan):
        origin = before.get(site.name, {"total": site.total, "kept": list(range(site.total))})
        dense_kept = [origin["kept"][unit] for unit in kept]
        records.append({"site": site.name, "unit": site.unit, "total": origin["total"], "kept": dense_kept})
    dense = {key: dense_value(config, key) for key in sorted({family.units, family.heads or family.units})}
    setattr(config, PLAN_KEY, {"format": 1, "dense": dense, "sites": records})
    if family.reload == "pruned_heads":
        gone = [sorted(set(range(r["total"])) - set(r["kept"])) for r in records]
        config.pruned_heads = {site.layer: heads for site, heads in zip(sites, gone, strict=True) if heads}
    elif family.reload == "head_counts":
        for key, value in (dense | _equal_head_counts(family, sites, records)).items():
            setattr(config, key, value)


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
        keys = {family.units, family.heads or family.units}
        if record["dense"].keys() != keys or any(type(value) is not int for value in record["dense"].values()):
            raise ValueError(f"dense counts {record['dense']!r}")
    except (UsageError, KeyError, AttributeError, ValueError) as error:
        raise ModelRefusedError(
            f"'{PLAN_KEY}' does not hold a plan ({error})", where="config.json", hint="fetch the model again"
        ) from error
    return plan


def _equal_head_counts(family: Family, sites: Sequence[Site], records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Equal counts and an explicit head_dim let plain `from_pretrained` build the slim shapes by itself."""
    counts = {len(r["kept"]) for r in records}
    if len(counts) > 1 or counts == {records[0]["total"]}:
        return {}
    units = counts.pop()
    heads = units * sites[0].heads_per_unit
    return {"head_dim": sites[0].head_dim, family.units: units, family.heads or family.units: heads}


def _keep_features(module: torch.nn.Module, projection: Projection, kept: tuple[int, ...]) -> None:
    features = torch.from_numpy(projection.kept_features(kept))
    along = 0 if isinstance(module, Conv1D) == projection.divides_inputs else 1
    _keep(module, "weight", along, features)
    if not projection.divides_inputs and module.bias is not None:
        _keep(module, "bias", 0, features)
    names = ("nx", "nf") if isinstance(module, Conv1D) else ("in_features", "out_features")
    setattr(module, names[0 if projection.divides_inputs else 1], len(features))


def _keep(module: torch.nn.Module, name: str, dim: int, features: torch.Tensor) -> None:
    old = module.get_parameter(name)
    new = old.detach().index_select(dim, features.to(old.device)).contiguous()
    setattr(module, name, torch.nn.Parameter(new, requires_grad=old.requires_grad))
