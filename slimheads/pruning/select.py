"""Selection: from scores to a plan. A pure function; no model is needed.

Rules, in order:
1. Layers go first: the `drop_layers` with the lowest scores. At least one stays in every stack of layers. What is
   inside a layer that goes is neither ranked nor counted below.
2. Heads (or KV groups) and neurons are ranked apart: heads by `ratio`, `keep_at_least` and `multiple_of`, neurons by
   `ffn_ratio` and `ffn_multiple_of`, which is also the fewest neurons that a feed-forward block keeps.
3. A site may keep any number of units that is a multiple of its `multiple_of` and at least its floor (never below 1),
   or all of them.
4. So units are removed from a site in chunks: lowest score first, ties broken by the unit's index. With
   `multiple_of: 1` a chunk is one unit.
5. Each site is ranked alone (`scope: layer`), or all of a kind together (`scope: global`; `normalize: layer` first
   divides the scores of a site by their mean). Chunks go in ascending order of their mean score (ties: the site's place
   in the model), until floor(ratio x units) units are removed or the next chunk would exceed that number.
6. `counts: equal` ranks each site alone and removes the same number of units from every site.
7. `within_groups` removes query heads instead of KV groups: each step removes the lowest head of each group of a site.
8. Sites whose name does not match the glob `sites` lose nothing and are not counted.

So plans are nested: a larger ratio removes all that a smaller one removes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, get_args

from slimheads.errors import UsageError, require_known
from slimheads.families.record import Renumbering, stack_of
from slimheads.names import Counts, Normalize, Scope, SiteKind
from slimheads.pruning.plan import Plan, SitePlan
from slimheads.pruning.ranking import Removable, Rules, removed_units
from slimheads.pruning.scores import Scores, SiteScores


def select(
    scores: Scores,
    ratio: float,
    scope: Scope = "layer",
    normalize: Normalize = "layer",
    keep_at_least: int = 1,
    multiple_of: int = 1,
    counts: Counts = "any",
    within_groups: bool = False,
    sites: str = "*",
    ffn_ratio: float = 0.0,
    ffn_multiple_of: int = 32,
    drop_layers: int = 0,
    ffn_keep_at_least: int | None = None,
) -> Plan:
    """Chooses the units to keep. The plan names every attention site, and those of other kinds that it touches.

    Args:
        scores: one score per unit; the lowest are removed first.
        ratio: share of all heads (or KV groups) to remove, 0 <= ratio < 1; floor(ratio x units) are removed.
        scope: "layer" ranks the units of each site alone, "global" all units of a kind together.
        normalize: "layer" divides a site's scores by their mean before a global ranking.
        keep_at_least: the fewest heads a site keeps.
        multiple_of: every attention site that loses heads keeps a multiple of this.
        counts: "equal" removes the same number from every site of a kind (all must have equally many).
        within_groups: if query heads share KV heads, remove the same number of query heads from each group.
        sites: a glob for the names of the sites that may lose units; the ratios are shares of their units.
        ffn_ratio: share of all feed-forward neurons to remove, as `ratio`.
        ffn_multiple_of: every feed-forward block that loses neurons keeps a multiple of this, and at least this many.
        drop_layers: how many layers to remove.
        ffn_keep_at_least: the fewest neurons that a block keeps; `ffn_multiple_of` unless given.

    Raises:
        UsageError: a ratio cannot be reached with these floors, or is above 0 and would remove nothing; no site
            matches; `within_groups` is set and no site has groups; layers have no scores, or not so many can go.
    """
    _require_rules(ratio, scope, normalize, counts, drop_layers, ffn_ratio, keep_at_least, multiple_of, ffn_multiple_of)
    layers = _layer_plans(scores, drop_layers, sites)
    gone = Renumbering.without(layer.site for layer in layers if not layer.kept)
    staying = [site for site in scores.sites if not gone.drops(site.site)]
    if within_groups:
        _require_groups(scores)
    rules = partial(Rules, scope=scope, normalize=normalize, counts=counts)
    floors = ("select.keep_at_least", "select.multiple_of")
    heads = rules(ratio, "select.ratio", keep_at_least=keep_at_least, multiple_of=multiple_of, floor_keys=floors)
    plans = _plans(staying, "attention", heads, sites, within_groups)
    if ffn_ratio > 0:
        floor, floors = ffn_keep_at_least or ffn_multiple_of, ("select.ffn_multiple_of",) * 2
        neurons = rules(
            ffn_ratio, "select.ffn_ratio", keep_at_least=floor, multiple_of=ffn_multiple_of, floor_keys=floors
        )
        plans += _plans(staying, "feed_forward", neurons, sites)
    return Plan((*plans, *layers))


def _require_groups(scores: Scores) -> None:
    if not any(site.query_heads for site in scores.sites):
        hint = "remove within_groups: single heads are deleted in this model"
        what = "within_groups has no effect: no site has KV groups of several query heads"
        raise UsageError(what, keys=("select.within_groups",), hint=hint)


def _require_rules(
    ratio: float, scope: str, normalize: str, counts: str, drop_layers: int, ffn_ratio: float, *floors: int | str
) -> None:
    """Refuses rules that are wrong for any scores.

    Raises:
        UsageError: with the recipe key at fault.
    """
    for key, value, known in (("scope", scope, Scope), ("normalize", normalize, Normalize), ("counts", counts, Counts)):
        require_known(f"select.{key}", value, get_args(known))
    for key, share in (("ratio", ratio), ("ffn_ratio", ffn_ratio)):
        if not 0 <= share < 1:
            hint = "every site keeps at least one unit"
            raise UsageError(f"{key} {share} is not in [0, 1)", keys=(f"select.{key}",), hint=hint)
    if drop_layers < 0:
        what = f"drop_layers is {drop_layers}, but must be at least 0"
        raise UsageError(what, keys=("select.drop_layers",), hint="use 0 to keep every layer")
    for key, floor in zip(("keep_at_least", "multiple_of", "ffn_multiple_of"), floors, strict=True):
        if isinstance(floor, str):
            what = f"{key} {floor!r} needs a latency table"
            hint = f"give a number here; a run measures the table if the recipe says {key}: auto"
            raise UsageError(what, keys=(f"select.{key}",), hint=hint)
        if floor < 1:
            hint = "every site keeps at least one unit"
            raise UsageError(f"{key} is {floor}, but must be at least 1", keys=(f"select.{key}",), hint=hint)


def _plans(
    scored: Sequence[SiteScores], kind: SiteKind, rules: Rules, sites: str, within_groups: bool = False
) -> list[SitePlan]:
    """Every site of a kind, and what it keeps."""
    candidates = [Removable.of(site, within_groups) for site in scored if site.kind == kind]
    if not candidates and kind == "feed_forward":
        hint = f"set {rules.ratio_key}: 0, or score the model again"
        raise UsageError("no feed-forward block of this model has scores", keys=(rules.ratio_key,), hint=hint)
    removed = removed_units(_matching(candidates, sites, kind), rules)
    return [
        SitePlan(c.site, c.unit, c.total, tuple(u for u in range(c.total) if (c.site, u) not in removed), kind)
        for c in candidates
    ]


def _matching(candidates: Sequence[Any], sites: str, kind: SiteKind) -> list[Any]:
    found = [candidate for candidate in candidates if fnmatchcase(candidate.site, sites)]
    if not found:
        hint = f"the first site is {candidates[0].site}, and * stands for any text"
        raise UsageError(f"no {kind.replace('_', '-')} site matches '{sites}'", keys=("select.sites",), hint=hint)
    return found


def _layer_plans(scores: Scores, count: int, sites: str) -> list[SitePlan]:
    """Every scored layer, kept or not; none where no layer is to go."""
    layers = scores.of_kinds("layer").sites
    if not count:
        return []
    if not layers:
        raise UsageError(
            f"drop_layers: layers have no score by {scores.method}",
            keys=("select.drop_layers", "score.method"),
            hint="set drop_layers: 0; which layers go can be said in Python, with a Plan of your own",
        )
    dropped: set[str] = set()
    for layer in sorted(_matching(layers, sites, "layer"), key=lambda site: site.scores):
        alike = {other.site for other in layers if stack_of(other.site) == stack_of(layer.site)}
        if len(dropped) < count and len(alike - dropped) > 1:
            dropped.add(layer.site)
    if len(dropped) < count:
        what = f"drop_layers {count}, but only {len(dropped)} can go: one of each stack stays"
        raise UsageError(what, keys=("select.drop_layers",), hint=f"use at most {len(dropped)}")
    return [SitePlan(s.site, "layer", 1, () if s.site in dropped else (0,), "layer") for s in layers]


def random_plan(scores: Scores, seed: int, ratio: float, **rules: Any) -> Plan:
    """A plan of the same size by the same rules, from random scores: the control for a score.

    Args:
        scores: of the same sites and units; their values are not used.
        seed: for the random scores.
        ratio, rules: as for `select`.
    """
    rng = random.Random(seed)
    drawn = (
        replace(
            site,
            scores=tuple(rng.random() for _ in site.scores),
            query_heads=tuple(tuple(rng.random() for _ in group) for group in site.query_heads),
        )
        for site in scores.sites
    )
    return select(Scores("random", tuple(drawn)), ratio, **rules)
