"""The plan inside config.json: surgery writes it, loading a slim model reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from slimheads.errors import ModelRefusedError, UsageError
from slimheads.families.family import PLAN_KEY, Family, dense_value
from slimheads.families.sites import Site
from slimheads.pruning.plan import Plan, match_plan


def record_plan(config: PretrainedConfig, family: Family, sites: Sequence[Site], plan: Plan) -> None:
    """Writes the plan, relative to the dense model, and what plain transformers needs to reload."""
    before = {s["site"]: s for s in (getattr(config, PLAN_KEY, None) or {}).get("sites", [])}
    pairs = match_plan(sites, plan)
    records = [_composed(before.get(site.name), site, kept) for site, kept in pairs]
    dense = {key: dense_value(config, key) for key in family.recorded_keys}
    setattr(config, PLAN_KEY, {"format": 1, "dense": dense, "sites": records})
    if family.reload == "pruned_heads":
        deleted = [sorted(set(range(r["total"])) - set(r["kept"])) for r in records]
        config.pruned_heads = {site.layer: heads for site, heads in zip(sites, deleted, strict=True) if heads}
    elif family.reload == "head_counts":
        counts = dense | _equal_head_counts(family, dense, pairs)
        for key, value in (counts if _accepts(config, counts) else dense).items():
            setattr(config, key, value)


def recorded_plan(config: PretrainedConfig, family: Family) -> Plan | None:
    """The plan that `record_plan` wrote, or None for a dense model.

    Raises:
        ModelRefusedError: the key holds something else.
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


def _accepts(config: PretrainedConfig, counts: Mapping[str, int]) -> bool:
    """Whether the class accepts these counts. Phi-3's derives the length of longrope's factor lists from them, and so
    refuses the lists of the dense model.
    """
    try:
        type(config).from_dict(config.to_dict() | counts)
    except ValueError:
        return False
    return True


def _composed(before: Mapping[str, Any] | None, site: Site, kept: tuple[int, ...]) -> dict[str, Any]:
    """A site's record after one more pruning; in heads as soon as one of the prunings was in heads."""
    record = before or {"unit": site.unit, "total": site.total, "kept": list(range(site.total))}
    if record["unit"] == "kv_group" and site.unit == "head":
        members = site.members  # unchanged, since no earlier pruning was by head
        heads = [group * members + member for group in record["kept"] for member in range(members)]
        record = {"unit": "head", "total": record["total"] * members, "kept": heads}
    now = site.kept_heads(kept) if record["unit"] == "head" else kept
    return {"site": site.name} | dict(record) | {"kept": [record["kept"][unit] for unit in now]}


def _equal_head_counts(
    family: Family, dense: Mapping[str, int], pairs: Sequence[tuple[Site, tuple[int, ...]]]
) -> dict[str, int]:
    """With equal counts and an explicit head_dim, plain `from_pretrained` builds the slim shapes."""
    units_key, heads_key = map(str, family.keys(family.sites[0]))
    found = [{units_key: s.counted("units", kept), heads_key: s.counted("heads", kept)} for s, kept in pairs]
    if found[0] == dense or any(counts != found[0] for counts in found):
        return {}
    return {"head_dim": pairs[0][0].head_dim} | found[0]
