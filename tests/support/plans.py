"""Random plans for a model, over heads, neurons and layers at once, and what they do to names."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from blocks import neuron_tensors
from layouts import unit_tensors
from transformers import PreTrainedModel

from slimheads.errors import UsageError
from slimheads.families.family import Family, family_of
from slimheads.families.sites import Site, find_sites, of_kind
from slimheads.names import SiteKind
from slimheads.pruning.layers import require_same_layers
from slimheads.pruning.plan import Plan, SitePlan

ALL_KINDS: tuple[SiteKind, ...] = ("attention", "feed_forward", "layer")


def ragged_plan(model: PreTrainedModel, seed: int = 0, kinds: Sequence[SiteKind] = ALL_KINDS) -> Plan:
    """Another count in every site, one site of each kind keeping a single unit, one layer less in each list of layers
    that may lose one. A plan names all sites of these kinds that are not in a layer that goes.
    """
    draw = random.Random(seed)
    sites = find_sites(model)
    gone = _some_layers(model, of_kind(sites, "layer"), draw) if "layer" in kinds else []
    planned = []
    for kind in (kind for kind in ("attention", "feed_forward") if kind in kinds):
        stay = [s for s in of_kind(sites, kind) if not any(is_in(s.name, layer) for layer in gone)]
        for site, count in zip(stay, _counts(stay, draw), strict=True):
            planned.append(_keeping(site, draw.sample(range(site.total), count)))
    if gone:
        planned += [_keeping(site, [] if site.name in gone else [0]) for site in of_kind(sites, "layer")]
    return Plan(tuple(planned))


def equal_plan(model: PreTrainedModel, heads: int | None = None, neurons: int | None = None) -> Plan:
    """The first unit and the last ones of every attention site and every feed-forward block, whichever are given."""
    counts = {"attention": heads, "feed_forward": neurons}
    return Plan(
        tuple(
            _keeping(site, [0, *range(site.total - count + 1, site.total)])
            for site in find_sites(model)
            if (count := counts.get(site.kind)) is not None
        )
    )


def is_in(module: str, layer: str) -> bool:
    """Whether a module is a layer or in it, by their names."""
    return f"{module}.".startswith(f"{layer}.")


def _keeping(site: Site, kept: Sequence[int]) -> SitePlan:
    return SitePlan(site.name, site.unit, site.total, tuple(sorted(kept)), site.kind)


def _counts(sites: Sequence[Site], draw: random.Random) -> list[int]:
    pools: dict[int, list[int]] = {}
    alone, counts = draw.randrange(len(sites)), []
    for index, site in enumerate(sites):
        pool = pools.setdefault(site.total, [])
        if not pool:
            pool += draw.sample(range(2, site.total), max(0, site.total - 2)) or [1]
        counts.append(1 if index == alone else pool.pop())
    return counts


def _some_layers(model: PreTrainedModel, layers: Sequence[Site], draw: random.Random) -> list[str]:
    """One layer of each list of at least two, if there is one that may go."""
    _, family = family_of(model.config)
    gone: list[Site] = []
    for stack in dict.fromkeys(site.stack for site in layers):
        alike = [site for site in layers if site.stack == stack]
        if len(alike) > 1:
            free = [site for site in alike if not site.stays]
            draw.shuffle(free)
            gone += next(([site] for site in free if _may_go(model, family, [*gone, site])), [])
    return [site.name for site in gone]


def _may_go(model: PreTrainedModel, family: Family, layers: Sequence[Site]) -> bool:
    try:
        require_same_layers(model, family, layers)
    except UsageError:
        return False
    return True


def renamed(name: str, plan: Plan) -> str | None:
    """What a module or tensor of a model is called once the plan's layers are gone; None if it goes with one."""
    gone = [site.site for site in plan.sites if not site.kept]
    if any(is_in(name, layer) for layer in gone):
        return None
    for stack in {layer.rpartition(".")[0] for layer in gone}:
        if name.startswith(f"{stack}."):
            index, *rest = name.removeprefix(f"{stack}.").split(".")
            before = [layer for layer in gone if layer in {f"{stack}.{i}" for i in range(int(index))}]
            return ".".join((stack, str(int(index) - len(before)), *rest))
    return name


def units_by_site(model: PreTrainedModel, plan: Plan | None = None) -> dict[tuple[str, str], list[Any]]:
    """The tensors of every head or KV group, and of every neuron, by kind and site.

    `plan` is the one that made a slim model: some layouts depend on which heads are left.
    """
    kept = plan and [site.kept for site in plan.sites if site.kind == "attention"]
    sites = [site.key for site in of_kind(find_sites(model), "attention")]
    heads = dict(zip(sites, unit_tensors(model, kept), strict=True))
    return heads | {("feed_forward", name): block for name, block in neuron_tensors(model).items()}
