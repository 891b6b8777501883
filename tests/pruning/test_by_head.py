"""Query heads that share keys and values, deleted by themselves: as many from each group, or in multi-query blocks."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import kv_heads, unit_tensors
from plans import renamed
from shipped import ship
from tiny import DECODERS, config_of, spread, type_of
from transformers import AutoModelForCausalLM, PreTrainedModel
from whole_runs import report_of, slimheads, steady, write_recipe

from slimheads.errors import UsageError
from slimheads.families.family import families
from slimheads.families.sites import find_sites, of_kind
from slimheads.models.loading import load, save
from slimheads.models.reload import reload_tier
from slimheads.pruning.gates import gated
from slimheads.pruning.plan import Plan, SitePlan
from slimheads.pruning.scores import Scores, SiteScores
from slimheads.pruning.scoring.score import score
from slimheads.pruning.select import select
from slimheads.pruning.surgery import prune

Tiny = Callable[..., PreTrainedModel]
GROUPED = sorted(v for v in DECODERS if 1 < kv_heads(config := config_of(v)) < config.num_attention_heads)
ONE_A_FAMILY = [name for f in families().values() if (name := next((m for m in f.model_types if m in GROUPED), None))]


def within(model: PreTrainedModel, seed: int = 0) -> Plan:
    """Another number of query heads in each site, as many in each of its groups, not the same ones."""
    draw = random.Random(seed)
    plans = []
    for index, site in enumerate(of_kind(find_sites(model), "attention")):
        by_head, keep = site.by_head(), 1 + index % max(1, site.members - 1)
        starts = range(0, by_head.total, site.members)
        kept = [head for s in starts for head in sorted(draw.sample(range(s, s + site.members), keep))]
        plans.append(SitePlan(site.name, "head", by_head.total, tuple(kept)))
    return Plan(tuple(plans))


def scattered(model: PreTrainedModel) -> Plan:
    """Another number of heads in each block of a multi-query model."""
    draw = random.Random(3)
    sites = of_kind(find_sites(model), "attention")
    return Plan(
        tuple(
            SitePlan(s.name, "head", s.total, tuple(sorted(draw.sample(range(s.total), 1 + 2 * i))))
            for i, s in enumerate(sites)
        )
    )


@pytest.fixture
def wide(tiny: Tiny) -> Tiny:
    """Two KV heads, each read by four query heads."""

    def made(variety: str, **options: Any) -> PreTrainedModel:
        key = "num_kv_heads" if type_of(variety) == "falcon" else "num_key_value_heads"
        return tiny(variety, **{key: 2} | options)

    return made


def assert_deleted_equals_gated(
    model: PreTrainedModel, plan: Plan, fed: Mapping[str, Any], answers: Callable[..., Any], atol: float
) -> None:
    with gated(model, plan):
        expected = {name: answers(model, batch) for name, batch in fed.items()}
    prune(model, plan)
    for name, batch in fed.items():
        for key, value in answers(model, batch).items():
            torch.testing.assert_close(value, expected[name][key], rtol=0, atol=atol)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", GROUPED)
def test_deleted_equals_gated_within_groups(
    wide: Tiny, ragged: Any, batches: Any, answers: Any, model_type: str, implementation: str
) -> None:
    """With neurons and a layer deleted beside them."""
    model = wide(model_type, attn_implementation=implementation)
    others = ragged(model, kinds=("feed_forward", "layer"))
    heads = (site for site in within(model).sites if renamed(site.site, others))
    assert_deleted_equals_gated(model, Plan((*heads, *others.sites)), batches(model), answers, 1e-5)
    if implementation == "sdpa":
        model = wide(model_type, attn_implementation=implementation).double()
        assert_deleted_equals_gated(model, within(model, 1), batches(model), answers, 1e-12)


def keys_and_values(block: torch.nn.Module) -> list[torch.Tensor]:
    """What two KV heads are made of, wherever it stands."""
    if hasattr(block, "k_proj"):
        return [tensor for part in (block.k_proj, block.v_proj) for tensor in part.state_dict().values()]
    if hasattr(block, "qkv_proj"):  # Phi-3's rows, behind all queries
        return [block.qkv_proj.weight[-4 * block.head_dim :]]
    fused = block.query_key_value  # Falcon's, behind the queries of each group
    return [tensor.view(2, -1, block.head_dim, *tensor.shape[1:])[:, -2:] for tensor in (fused.weight, fused.bias)]


@pytest.mark.parametrize("model_type", GROUPED)
def test_keys_and_values_stay_and_it_reloads(wide: Tiny, tmp_path: Path, model_type: str) -> None:
    model = wide(model_type)
    dense, plan = copy.deepcopy(model), within(model)
    prune(model, plan)
    for site in of_kind(find_sites(dense), "attention"):
        pair = [keys_and_values(m.get_submodule(site.name)) for m in (dense, model)]
        assert all(torch.equal(*tensors) for tensors in zip(*pair, strict=True))
    save(model, tmp_path / "slim")
    loaded = load(tmp_path / "slim")
    assert [(s.total, s.members) for s in of_kind(find_sites(loaded), "attention")] == [
        (2, len(s.kept) // 2) for s in plan.sites
    ]
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("model_type", spread(*ONE_A_FAMILY))
def test_the_certificate_holds_within_groups(wide: Tiny, tmp_path: Path, model_type: str) -> None:
    dense = wide(model_type)
    found = ship(dense, within(dense), tmp_path, task="text-generation").certificate()
    assert found.passed, found.error()


@pytest.mark.parametrize("model_type", spread("gemma", "llama"))
def test_the_certificate_holds_for_a_multi_query_model(tiny: Tiny, tmp_path: Path, model_type: str) -> None:
    dense = tiny(model_type, num_key_value_heads=1)
    made = ship(dense, scattered(dense), tmp_path, task="text-generation")
    found = made.certificate()
    assert found.passed, found.error()
    assert {p.shape for n, p in made.slim.named_parameters() if "k_proj.weight" in n} == {
        p.shape for n, p in dense.named_parameters() if "k_proj.weight" in n
    }


def heads_of(scores: Scores) -> list[SiteScores]:
    return [site for site in scores.sites if site.kind == "attention"]


def frobenius(matrix: torch.Tensor) -> float:
    return math.sqrt(math.fsum(x * x for x in matrix.double().flatten().tolist()))


@pytest.mark.parametrize("model_type", ["llama", "phi", "qwen3"])
def test_a_query_heads_score_is_its_own_slices_and_the_keys_and_values_it_reads(wide: Tiny, model_type: str) -> None:
    model = wide(model_type)
    for site, groups in zip(heads_of(score(model)), unit_tensors(model), strict=True):
        expected = [
            [
                frobenius(q) + frobenius(group.key) + frobenius(group.value) + frobenius(o)
                for q, o in zip(group.query.chunk(4, dim=0), group.output.chunk(4, dim=1), strict=True)
            ]
            for group in groups
        ]
        assert [list(row) for row in site.query_heads] == [pytest.approx(row, rel=1e-6) for row in expected]
        assert site.by_head().scores == tuple(value for row in site.query_heads for value in row)


@pytest.mark.parametrize("order", ["groups first", "heads first"])
def test_prunings_of_both_kinds_compose(
    wide: Tiny, batches: Any, answers: Any, equal: Any, tmp_path: Path, order: str
) -> None:
    model = wide("llama", num_key_value_heads=4, num_attention_heads=16, hidden_size=64)
    dense = copy.deepcopy(model)
    first, second = (lambda m: equal(m, 3), within) if order == "groups first" else (within, lambda m: equal(m, 3))
    prune(model, first(model))
    assert_deleted_equals_gated(model, second(model), batches(model), answers, 1e-5)
    save(model, tmp_path / "slim")
    again = load(tmp_path / "slim")
    record = again.config.slimheads["sites"]
    assert {site["unit"] for site in record} == {"head"} and {site["total"] for site in record} == {16}
    assert len({len(site["kept"]) for site in record}) > 1
    for name, batch in batches(model).items():
        assert all(torch.equal(v, answers(model, batch)[k]) for k, v in answers(again, batch).items()), name
    # The record alone, applied to the dense model at once, gives the same model.
    at_once = prune(dense, Plan.from_json(model.config.slimheads))
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in at_once.state_dict().items())


def test_plain_transformers_reloads_equal_counts_within_groups(wide: Tiny, tmp_path: Path) -> None:
    model = wide("llama")
    plan = select(score(model), 0.5, counts="equal", within_groups=True)
    save(prune(model, plan), tmp_path / "slim")
    config = json.loads((tmp_path / "slim" / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 4)
    assert reload_tier(tmp_path / "slim", model, "text-generation")[0] == "stock"
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "slim").eval()
        assert torch.equal(stock(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kept", [(0, 1, 4), (0, 4, 5, 6)])
def test_groups_that_would_keep_different_numbers_are_refused(wide: Tiny, kept: tuple[int, ...]) -> None:
    model = wide("llama")
    first, *others = of_kind(find_sites(model), "attention")
    whole = [SitePlan(s.name, "head", 8, tuple(range(8))) for s in others]
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(UsageError, match="not as many in each KV group") as error:
        prune(model, Plan((SitePlan(first.name, "head", 8, kept), *whole)))
    assert error.value.where == first.name and model.config.to_dict() == before


# ------------------------------------------------------------------------------------------------------ selection


def grouped_scores(*sites: list[list[float]]) -> Scores:
    rows = (
        SiteScores(f"layer.{i}", "kv_group", tuple(map(sum, groups)), tuple(tuple(g) for g in groups))
        for i, groups in enumerate(sites)
    )
    return Scores("magnitude", tuple(rows))


TWO_SITES = grouped_scores([[4, 1, 2, 3], [8, 7, 6, 5]], [[10, 20, 30, 40], [11, 12, 13, 14]])


@pytest.mark.parametrize(
    "ratio,options,kept",
    [
        (0.25, {"scope": "global", "normalize": "none"}, [(0, 3, 4, 5), tuple(range(8))]),  # 1 and 5, then 2 and 6
        (0.25, {"scope": "layer"}, [(0, 2, 3, 4, 5, 6), (1, 2, 3, 5, 6, 7)]),
        (0.5, {"scope": "global", "normalize": "layer"}, [(0, 3, 4, 5), (2, 3, 6, 7)]),
        (0.5, {"multiple_of": 4}, [(0, 3, 4, 5), (2, 3, 6, 7)]),
        (0.75, {"counts": "equal"}, [(0, 4), (3, 7)]),
        (0.2, {"sites": "layer.1", "scope": "layer", "ratio": 0.3}, [tuple(range(8)), (1, 2, 3, 5, 6, 7)]),
    ],
)
def test_the_weakest_head_of_each_group_goes_first(
    ratio: float, options: Mapping[str, Any], kept: list[tuple[int, ...]]
) -> None:
    plan = select(TWO_SITES, **{"ratio": ratio, "within_groups": True} | options)
    assert [(site.unit, site.total) for site in plan.sites] == [("head", 8), ("head", 8)]
    assert [site.kept for site in plan.sites] == kept


def test_each_group_keeps_a_head() -> None:
    plan = select(TWO_SITES, 0.75, "global", within_groups=True)
    assert [len(site.kept) for site in plan.sites] == [2, 2]
    with pytest.raises(UsageError, match=r"the removal of only 12; use a ratio of at most 0\.75"):
        select(TWO_SITES, 0.9, "global", within_groups=True)


def test_within_groups_is_refused_where_there_are_none(tiny: Tiny) -> None:
    with pytest.raises(UsageError, match="within_groups has no effect"):
        select(score(tiny("bert")), 0.25, within_groups=True)


def test_sites_that_do_not_match_keep_all_and_are_not_counted(tiny: Tiny) -> None:
    scores = score(tiny("bert"))
    plan = select(scores, 0.5, sites="*.[01].attention")
    assert plan.kinds == ("attention",) and not plan.sites[2].removed and plan.removed == 4
    with pytest.raises(
        UsageError, match=r"no attention site matches 'decoder\.\*'; the first site is encoder\.layer\.0\.attention"
    ):
        select(scores, 0.5, sites="decoder.*")


# ------------------------------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize("changes", [{"within_groups": True, "ratio": 0.5}, {"sites": "*.layers.1.*", "ratio": 0.5}])
def test_a_recipe_prunes_as_it_says(
    wide: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    steady(monkeypatch)
    save(wide("llama"), tmp_path / "model")
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "model", select=changes)
    ended = slimheads("run", recipe, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    report, plan = report_of(tmp_path / "out"), json.loads((tmp_path / "out" / "plan.json").read_text())
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert [len(s["scores"]) for s in scores["sites"]] == [s["total"] for s in plan["sites"]]
    if "sites" in changes:
        assert [len(s["kept"]) for s in plan["sites"]] == [2, 1, 2]
    else:
        assert {s["unit"] for s in plan["sites"]} == {"head"} and report["model"]["unit"] == "head"
        assert sum(len(s["kept"]) for s in plan["sites"]) == 12
