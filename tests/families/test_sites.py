"""Family files describe real models: every feature of every block belongs to the unit that transformers uses it for."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import kv_heads, unit_tensors
from plans import renamed
from pydantic import ValidationError
from tiny import SEQ2SEQ, TWO_TOWERS
from transformers import AutoConfig, BertConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from slimheads.errors import ModelRefusedError, UsageError
from slimheads.families import family as family_files
from slimheads.families.family import Family, ProjectionRow, SiteRow, families, family_of, refused_types
from slimheads.families.layout import blocks_of
from slimheads.families.projections import Projection
from slimheads.families.sites import Site, find_sites, linear_features, of_kind
from slimheads.pruning.plan import Plan
from slimheads.pruning.scoring.score import score
from slimheads.pruning.select import select
from slimheads.pruning.surgery import prune

Tiny = Callable[..., PreTrainedModel]
SIZES = {"unit": 4, "member": 2, "dim": 1}


def bert_family(**changes: object) -> Family:
    return families()["bert"].model_copy(update=changes)


def with_site(**changes: object) -> Family:
    first, *others = families()["bert"].sites
    return bert_family(sites=(first.model_copy(update=changes), *others))


def attention_of(model: PreTrainedModel) -> tuple[Site, ...]:
    return of_kind(find_sites(model), "attention")


def test_each_model_type_belongs_to_one_family() -> None:
    named = [model_type for family in families().values() for model_type in family.model_types]
    assert len(named) == len(set(named))


def test_sites_come_in_layer_order_with_the_models_own_counts(tiny: Tiny, variety: str) -> None:
    model = tiny(variety)
    sites = attention_of(model)
    expected = unit_tensors(model)
    kinds: dict[str, list[list[int]]] = {}
    for site in sites:
        kinds.setdefault(re.sub(r"\d+", "*", site.name), []).append([int(i) for i in re.findall(r"\d+", site.name)])
    assert all(places == sorted(places) for places in kinds.values())
    assert len(kinds) == (3 if variety in SEQ2SEQ else 2 if variety in TWO_TOWERS else 1)
    assert [site.total for site in sites] == [len(units) for units in expected]
    config = getattr(model.config, "text_config", model.config)
    heads = config.num_attention_heads
    grouped = isinstance(heads, int) and 1 < kv_heads(config) < heads
    assert {site.unit for site in sites} == {"kv_group" if grouped else "head"}
    for site in sites:
        assert site.name in dict(model.named_modules())


def test_labels_pick_the_slices_that_transformers_reads(tiny: Tiny, variety: str) -> None:
    model = tiny(variety)
    for site, units in zip(attention_of(model), unit_tensors(model), strict=True):
        for index, unit in enumerate(units):

            def whose(p: Projection, index: int = index) -> np.ndarray:
                return (p.unit_of <= index) & (index < p.unit_of + p.span)

            for role in ("query", "key", "value", "output"):
                [(projection, features)] = [
                    (model.get_submodule(p.module), features)
                    for p in site.projections
                    if len(features := np.flatnonzero(whose(p) & (p.role_of == role)))
                ]
                rows = isinstance(projection, torch.nn.Linear) != (role == "output")
                weight = projection.weight
                assert torch.equal(weight[features, :] if rows else weight[:, features], getattr(unit, role))


def test_every_feature_is_labelled_once(tiny: Tiny, variety: str) -> None:
    model = tiny(variety)
    for site in find_sites(model):
        for projection in site.projections:
            width = linear_features(model.get_submodule(projection.module))[0 if projection.divides_inputs else 1]
            assert len(projection.unit_of) == len(projection.role_of) == width
            ends = projection.unit_of + projection.span
            owners = {u for own in zip(projection.unit_of, ends, strict=True) for u in range(*own)}
            assert owners == set(range(site.total))


@pytest.mark.parametrize("groups,heads", [(4, 8), (8, 8), (2, 8)])
def test_group_sizes_of_llama(tiny: Tiny, groups: int, heads: int) -> None:
    sites = attention_of(tiny("llama", num_key_value_heads=groups, num_attention_heads=heads))
    assert {(s.total, s.heads_per_unit, s.unit) for s in sites} == {
        (groups, heads // groups, "head" if groups == heads else "kv_group")
    }


def test_an_explicit_head_dim_is_read_from_the_weights(tiny: Tiny) -> None:
    assert {site.head_dim for site in attention_of(tiny("llama", head_dim=6))} == {6}


def test_a_slim_model_is_found_as_it_is_now(tiny: Tiny, ragged: Callable[..., Plan], variety: str) -> None:
    model = tiny(variety)
    plan = ragged(model)
    before = attention_of(model)
    prune(model, plan)
    after = attention_of(model)
    assert [site.total for site in after] == [len(site.kept) for site in plan.of_kind("attention").sites]
    assert [(s.name, s.head_dim, s.heads_per_unit) for s in after] == [
        (name, s.head_dim, s.heads_per_unit) for s in before if (name := renamed(s.name, plan))
    ]


def test_an_unknown_model_type_names_the_nearest() -> None:
    config = BertConfig()
    config.model_type = "robarta"
    with pytest.raises(ModelRefusedError, match=r"'robarta'.*'roberta'"):
        family_of(config)


@pytest.mark.parametrize(
    "model_type,reason",
    [
        ("olmo2", "normalized over all heads together"),
        ("gpt_oss", "its own sink"),
        ("qwen3_next", "a gate beside each query"),
        ("deepseek_v3", "a latent vector"),
    ],
)
def test_an_architecture_that_cannot_be_covered_is_refused_with_the_reason(model_type: str, reason: str) -> None:
    config = AutoConfig.for_model(model_type)
    with pytest.raises(ModelRefusedError, match=f"'{model_type}' is refused: .*{reason}"):
        family_of(config)


def test_refused_model_types_are_real_ones_and_none_is_covered() -> None:
    covered = {model_type for family in families().values() for model_type in family.model_types}
    assert refused_types().keys() <= set(CONFIG_MAPPING) - covered


@pytest.mark.parametrize(
    "model_type,key,reason",
    [
        ("cohere", "use_qk_norm", "every head has a norm of its own"),
        ("stablelm", "qk_layernorm", "every head has a norm of its own"),
        ("deberta", "talking_head", "heads are mixed"),
    ],
)
def test_a_variant_whose_heads_do_not_stand_alone_is_refused(
    tiny: Tiny, model_type: str, key: str, reason: str
) -> None:
    config = tiny(model_type).config
    setattr(config, key, True)
    with pytest.raises(ModelRefusedError, match=f"{key}: True is refused because {reason}"):
        family_of(config)


@pytest.mark.parametrize("model_type", ["clip", "siglip"])
def test_a_class_with_one_tower_of_two_is_refused(tiny: Tiny, model_type: str) -> None:
    model = tiny(model_type, task="image-classification")
    with pytest.raises(ModelRefusedError, match="0 modules match 'text_model"):
        find_sites(model)


def test_a_multi_query_model_gives_up_query_heads(tiny: Tiny) -> None:
    """All queries share one KV head, which stays."""
    model = tiny("gemma", num_key_value_heads=1)
    assert {(site.total, site.unit, site.heads_per_unit) for site in attention_of(model)} == {(8, "head", 1)}
    values = [model.get_submodule(f"{site.name}.v_proj").weight.clone() for site in attention_of(model)]
    prune(model, select(score(model), 0.25, "layer"))
    after = attention_of(model)
    assert {(site.total, site.members) for site in after} == {(6, 6)}
    for site, before in zip(after, values, strict=True):
        assert torch.equal(model.get_submodule(f"{site.name}.v_proj").weight, before)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "gpt2"])
def test_cross_attention_is_refused(tiny: Tiny, model_type: str) -> None:
    config = tiny(model_type).config
    config.add_cross_attention = True
    with pytest.raises(ModelRefusedError, match=r"add_cross_attention.*cross-attention is not covered"):
        family_of(config)


@pytest.mark.parametrize(
    "family,where,what",
    [
        (with_site(match=r"encoder.layers.*.attention"), "bert", "0 modules match 'encoder.layers"),
        (with_site(match=r"encoder.layer.*.attention.self.query"), "bert|query", "linear layer|nothing"),
        (with_site(keep=()), "encoder.layer.0.attention.output.LayerNorm.weight", "the family file does not describe"),
        (
            with_site(projections=families()["bert"].sites[0].projections[1:]),
            "encoder.layer.0.attention.self.query.weight",
            "the family file does not describe",
        ),
        (
            with_site(projections=(ProjectionRow(module="self.quarry", layout="query(unit dim)"),)),
            "encoder.layer.0.attention.self.quarry",
            "expected a linear layer, found nothing",
        ),
        (
            with_site(projections=(ProjectionRow(module="output.LayerNorm", layout="query(unit dim)"),)),
            "encoder.layer.0.attention.output.LayerNorm",
            "expected a linear layer, found LayerNorm",
        ),
        (
            with_site(
                projections=(
                    *families()["bert"].sites[0].projections[:2],
                    ProjectionRow(module="self.value", layout="query(unit dim) | key(unit dim) | value(unit dim)"),
                )
            ),
            "encoder.layer.0.attention.self.value.weight",
            "32 features cannot be",
        ),
    ],
)
def test_a_family_file_that_does_not_describe_the_model_is_an_error(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, family: Family, where: str, what: str
) -> None:
    model = tiny("bert")
    monkeypatch.setattr(family_files, "families", lambda: {"bert": family})
    with pytest.raises(ModelRefusedError, match=what) as refused:
        find_sites(model)
    assert any(refused.value.where.startswith(w) or refused.value.where.endswith(w) for w in where.split("|"))


@pytest.mark.parametrize(
    "layout,labels",
    [
        ("query(unit member dim) | key(unit dim)", "0q0 0q1 1q0 1q1 2q0 2q1 3q0 3q1 0k 1k 2k 3k"),
        ("unit [query*member key value] dim", "0q0 0q1 0k 0v 1q0 1q1 1k 1v 2q0 2q1 2k 2v 3q0 3q1 3k 3v"),
        ("2 [query value key] unit dim", "0q 1q 0v 1v 0k 1k 2q 3q 2v 3v 2k 3k"),
    ],
)
def test_a_layout_names_every_feature_from_the_outside_in(layout: str, labels: str) -> None:
    """Four units of two query heads, one feature each: unit, role, and the query head in its group."""
    columns = [np.concatenate(c) for c in zip(*(b.labels(SIZES) for b in blocks_of(layout)), strict=True)]
    read = [f"{unit}{role[0]}{member if member >= 0 else ''}" for unit, member, role in zip(*columns, strict=True)]
    assert " ".join(read) == labels


@pytest.mark.parametrize(
    "changes,layout,unit",
    [
        ({"new_decoder_architecture": True}, "unit [query*member key value] dim", ("kv_group", 4)),
        ({"new_decoder_architecture": True, "num_kv_heads": 1}, "unit [query*member key value] dim", ("head", 8)),
        ({"multi_query": True}, "query(unit member dim) | key(unit dim) | value(unit dim)", ("head", 8)),
        ({"multi_query": False, "num_kv_heads": 8}, "unit [query key value] dim", ("head", 8)),
    ],
    ids=["grouped", "one group", "multi-query", "old"],
)
def test_a_row_applies_when_the_configuration_says_so(
    tiny: Tiny, changes: dict[str, object], layout: str, unit: tuple[str, int]
) -> None:
    model = tiny("falcon", **{"new_decoder_architecture": False} | changes)
    [row] = families()["falcon"].rows(model.config, "attention")
    assert row.projections[0].layout == layout
    assert {(site.unit, site.total) for site in attention_of(model)} == {unit}


def test_a_configuration_that_no_row_is_for_is_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    family = families()["gpt_bigcode"]
    only = family.model_copy(update={"sites": family.sites[:1]})
    monkeypatch.setattr(family_files, "families", lambda: {"gpt_bigcode": only})
    with pytest.raises(ModelRefusedError) as refused:
        find_sites(tiny("gpt_bigcode"))
    assert refused.value.where.endswith("h.0.attn")


@pytest.mark.parametrize(
    "layout",
    [
        "query(dim)",
        "query(unit)dim",
        "query(unit dim), key(unit dim)",
        "queries(unit dim)",
        "",
        "query(unit head)",
        "[query key value] dim",
        "[query key value] unit dim",
        "unit [query key value]",
        "unit [query keys] dim",
        "unit [query key value] unit dim",
        "unit [query output] dim",
        "unit [query*member key] dim",
        "unit [query key*member value] dim",
        "0 [query value key] unit dim",
        "4 [query value key] dim",
        "4 unit [query value key] dim",
    ],
)
def test_a_layout_that_cannot_be_read_is_refused(layout: str) -> None:
    with pytest.raises(ValidationError, match="expected blocks like"):
        ProjectionRow(module="q", layout=layout)


def test_a_typo_in_a_family_file_is_refused() -> None:
    with pytest.raises(ValidationError, match="atributes"):
        SiteRow.model_validate({"match": "h.*", "count": "n", "projections": (), "atributes": {}})


def test_a_damaged_family_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    lines = (Path(family_files.__file__).parent / "bert.yaml").read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines, "unitz: heads"]), encoding="utf-8")
    with pytest.raises(UsageError, match="unitz") as error:
        family_files.validate(Family, *family_files.read_yaml(path))
    assert f"odd.yaml:{len(lines) + 1}:" in str(error.value)


def test_an_attention_block_that_no_row_describes_is_an_error(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole blocks are claimed as single tensors are: nothing keeps its heads without a word."""
    model = tiny("bert")
    model.pooler.attention = torch.nn.MultiheadAttention(32, 4)
    with pytest.raises(ModelRefusedError, match="the family file does not describe") as refused:
        find_sites(model)
    assert refused.value.where == "pooler.attention"
    monkeypatch.setattr(family_files, "families", lambda: {"bert": bert_family(untouched=("pooler.attention",))})
    assert len(attention_of(model)) == 3
