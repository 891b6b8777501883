"""The plan inside config.json: surgery writes it, loading a slim model reads it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from slimheads.errors import ModelRefusedError, UsageError
from slimheads.families.family import PLAN_KEY, Family, assign, dense_value, lookup, site_pattern
from slimheads.families.record import recorded_renumbering
from slimheads.families.sites import Site, SiteKey
from slimheads.pruning.layers import restage, smaller_config
from slimheads.pruning.plan import Matched, Plan, SitePlan, match_plan

Pairs = Sequence[tuple[Site, tuple[int, ...]]]


def record_plan(config: PretrainedConfig, family: Family, sites: Sequence[Site], plan: Plan) -> None:
    """Writes the plan, relative to the dense model, and what plain transformers needs to reload."""
    before = recorded_plan(config, family) or Plan(())
    former: Mapping[str, Any] = (getattr(config, PLAN_KEY, None) or {}).get("dense", {})
    matched = match_plan(sites, plan)
    record = _composed_plan(config, before, sites, plan, matched)
    layers = smaller_config(config, family, matched.dropped)
    widths = _equal_widths(matched.pairs) if "feed_forward" in record.kinds else {}
    overwritten = {*former, *family.head_keys, *layers, *widths}
    dense = {key: dense_value(config, key) for key in sorted(overwritten)}
    heads = _equal_head_counts(family, dense, matched.of_attention())
    # The layers stay as they are; head counts and widths are the dense ones unless all sites have the same.
    fixed = {key for row in family.rows(config, "layer") for key in (*row.layer_keys, *row.per_layer)}
    values = {key: value for key, value in dense.items() if key not in fixed}
    _assign(config, layers)
    if layers:
        restage(config)  # or a backbone would not accept its other values
    for counts in (heads, widths):
        if counts and _accepts(config, values | counts):
            values |= counts
    _assign(config, values)
    setattr(config, PLAN_KEY, {**record.to_json(), "dense": dense})
    if family.reload == "pruned_heads":
        config.pruned_heads = _pruned_heads(config, record, matched)


def recorded_plan(config: PretrainedConfig, family: Family) -> Plan | None:
    """The plan that `record_plan` wrote, or None for a dense model.

    Raises:
        ModelRefusedError: the key holds something else.
    """
    if not hasattr(config, PLAN_KEY):
        return None
    record = getattr(config, PLAN_KEY)
    try:
        plan = Plan.from_json({key: value for key, value in record.items() if key != "dense"})
        dense: Mapping[str, Any] = record["dense"]
        if not dense.keys() <= family.recorded_keys or not all(map(_is_config_value, dense.values())):
            raise ValueError(f"dense values {dense!r}")
        _require_layers(config, family, plan, dense)
    except (UsageError, KeyError, AttributeError, ValueError) as error:
        raise ModelRefusedError(
            f"'{PLAN_KEY}' does not hold a plan ({error})", where="config.json", hint="fetch the model again"
        ) from error
    return plan


def _require_layers(config: PretrainedConfig, family: Family, plan: Plan, dense: Mapping[str, Any]) -> None:
    """The dense model is built layer by layer before any is dropped, so their number may not be just anything.

    Raises:
        ValueError: it is not the number of layers that are left and of those that the plan drops.
    """
    gone = [site.site for site in plan.of_kind("layer").sites if not site.kept]
    for row in family.rows(config, "layer"):
        dropped = sum(site_pattern(row).fullmatch(name) is not None for name in gone)
        for key in dense.keys() & set(row.layer_keys):
            before, left = (np.sum(value) for value in (dense[key], lookup(config, key)))
            if before != left + dropped:
                raise ValueError(f"{key} was {before}, and is {left} without {dropped} layers")


def _is_config_value(value: object) -> bool:
    return value is None or isinstance(value, list) or type(value) is int


def _accepts(config: PretrainedConfig, values: Mapping[str, Any]) -> bool:
    """Whether the class accepts these values. Phi-3's derives the length of longrope's factor lists from head counts,
    and so refuses the lists of the dense model.
    """
    changed = copy.deepcopy(config)
    try:
        _assign(changed, values)
        type(config).from_dict(changed.to_dict())
    except ValueError:
        return False
    return True


def _assign(config: PretrainedConfig, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        assign(config, key, value)


def _composed_plan(config: PretrainedConfig, before: Plan, sites: Sequence[Site], plan: Plan, matched: Matched) -> Plan:
    """The recorded plan and one more, as one plan of the dense model."""
    old_name = recorded_renumbering(config).old_name
    recorded: dict[SiteKey, SitePlan] = {site.key: site for site in before.sites}
    named = {site.key for site in plan.sites}
    for site, kept in matched.pairs:
        key = (site.kind, old_name(site.name))
        if site.key in named or key in recorded:
            recorded[key] = _composed(recorded.get(key), key, site, kept)
    for layer in (site for site in sites if site.kind == "layer" and site.key in named):
        kept = () if layer in matched.dropped else (0,)
        key = ("layer", old_name(layer.name))
        recorded[key] = SitePlan(key[1], "layer", 1, kept, "layer")
    gone = Plan(tuple(site for site in recorded.values() if site.kind == "layer")).renumbering
    return Plan(tuple(site for site in recorded.values() if site.kind == "layer" or not gone.drops(site.site)))


def _composed(before: SitePlan | None, key: SiteKey, site: Site, kept: tuple[int, ...]) -> SitePlan:
    """A site's record after one more pruning; in heads as soon as one of the prunings was in heads."""
    if before is None:
        return SitePlan(key[1], site.unit, site.total, kept, key[0])
    unit, total, units = before.unit, before.total, before.kept
    if unit == "kv_group" and site.unit == "head":
        members = site.members  # unchanged, since no earlier pruning was by head
        units = tuple(group * members + member for group in units for member in range(members))
        unit, total = "head", total * members
    now = site.kept_heads(kept) if unit == "head" else kept
    return SitePlan(key[1], unit, total, tuple(units[u] for u in now), key[0])


def _pruned_heads(config: PretrainedConfig, record: Plan, matched: Matched) -> dict[int, list[int]]:
    """What transformers 4 reads: the dense model's heads that are gone, by the present number of the layer."""
    old_name = recorded_renumbering(config).old_name
    planned = {site.site: site.removed for site in record.of_kind("attention").sites}
    now = (old_name(matched.renumbering.new_name(site.name)) for site, _ in matched.of_attention())
    return {layer: list(planned[name]) for layer, name in enumerate(now) if planned.get(name)}


def _equal_head_counts(family: Family, dense: Mapping[str, Any], pairs: Pairs) -> dict[str, int]:
    """With equal counts and an explicit head_dim, plain `from_pretrained` builds the slim shapes."""
    if not family.head_keys:
        return {}
    units_key, heads_key = map(str, family.keys(family.sites[0]))
    found = [{units_key: s.counted("units", kept), heads_key: s.counted("heads", kept)} for s, kept in pairs]
    if any(counts != found[0] for counts in found) or all(dense[key] == count for key, count in found[0].items()):
        return {}
    return {"head_dim": pairs[0][0].head_dim} | found[0]


def _equal_widths(pairs: Pairs) -> dict[str, int]:
    """The widths by config key, where all feed-forward blocks that are built from the key have the same."""
    found: dict[str, set[int]] = {}
    for site, kept in pairs:
        if site.kind == "feed_forward" and site.row.width:
            found.setdefault(site.row.width, set()).add(len(kept))
    return {key: counts.pop() for key, counts in found.items() if len(counts) == 1}
