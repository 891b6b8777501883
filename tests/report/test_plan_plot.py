"""The picture of a plan shows what the plan says: every deleted head, every kept width, every dropped layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from made_reports import make_joint, make_tables

from slimheads.names import Unit
from slimheads.pruning.plan import Plan, SitePlan
from slimheads.pruning.scores import Scores, SiteScores
from slimheads.report.plan_plot import plan_picture
from slimheads.report.plan_rows import plan_rows

WIDTHS = [960, 342]  # px, of a desktop and of a phone


def words(drawing: str) -> list[tuple[float, str]]:
    """The texts of a drawing with their heights."""
    texts = ElementTree.fromstring(drawing).iter("text")
    return [(float(text.attrib["y"]), text.text or "") for text in texts]


def bars(drawing: str) -> list[tuple[float, float]]:
    """Each bar's middle, and its length as a share of the track that it lies on."""
    found = []
    rects = [rect.attrib for rect in ElementTree.fromstring(drawing).iter("rect")]
    for track, bar in pairwise(rects):
        if bar["fill"] == "var(--slim)" and (track["x"], track["y"]) == (bar["x"], bar["y"]):
            middle = float(bar["y"]) + float(bar["height"]) / 2
            found.append((middle, float(bar["width"]) / float(track["width"])))
    return found


def joint_plan(heads: Sequence[str], blocks: Sequence[str], layers: Sequence[SitePlan] = ()) -> tuple[Scores, Plan]:
    """A plan over sites of these names, with two heads and eight neurons each."""
    sites = [SitePlan(name, "head", 2, (0,)) for name in heads]
    sites += [SitePlan(name, "neuron", 8, tuple(range(1 + at % 8)), "feed_forward") for at, name in enumerate(blocks)]
    scores = Scores("magnitude", tuple(SiteScores(name, "head", (1.0, 2.0)) for name in heads))
    return scores, Plan((*sites, *layers))


@pytest.mark.parametrize(
    ("layers", "units", "removed", "unit"),
    [(2, 4, 0, "head"), (2, 4, 3, "head"), (6, 12, 18, "kv_group"), (48, 64, 900, "head")],
)
def test_heat_map_marks_exactly_the_deleted_units(layers: int, units: int, removed: int, unit: Unit) -> None:
    scores, plan = make_tables(layers, units, removed, unit)
    drawing = plan_picture(scores, plan, width=960, name="h")
    ElementTree.fromstring(drawing.replace("xlink:href", "href"))
    marked = re.findall(r'id="h-deleted-(\d+)-(\d+)"', drawing)
    wanted = {(i, unit) for i, site in enumerate(plan.sites) for unit in range(units) if unit not in site.kept}
    assert len(marked) == removed
    assert {(int(site), int(unit)) for site, unit in marked} == wanted


def test_heat_map_takes_sites_of_different_sizes_and_equal_scores() -> None:
    scores = Scores("magnitude", (SiteScores("a.$x$", "head", (1.0, 1.0)), SiteScores("b", "head", (1.0,)))).table()
    plan = Plan((SitePlan("a.$x$", "head", 2, (1,)), SitePlan("b", "head", 1, (0,))))
    drawing = plan_picture(scores, plan, width=342, name="h")
    assert re.findall(r'id="h-deleted-([\d-]+)"', drawing) == ["0-0"]
    assert "a.$x$" in drawing


@pytest.mark.parametrize("width", WIDTHS)
def test_each_feed_forward_block_has_its_number_and_a_bar_of_that_share(width: int) -> None:
    kept = [928, 512, 1024, 1536, 32]
    drawing = plan_picture(*make_joint(kept), width=width, name="p")
    numbers = [(y, text) for y, text in words(drawing) if text.endswith(" of 1,536")]
    assert [text for _, text in numbers] == [f"{count:,} of 1,536" for count in kept]
    assert [share for _, share in bars(drawing)] == pytest.approx([count / 1536 for count in kept], rel=1e-3)
    assert [middle for middle, _ in bars(drawing)] == pytest.approx([y for y, _ in numbers], abs=0.01)
    assert "4,032 of 7,680 neurons" in drawing  # in its description


def test_heads_and_width_of_a_layer_stand_in_one_row_on_a_desktop() -> None:
    drawing = plan_picture(*make_joint([928, 512, 1024, 1536, 32, 64], {2}), width=960, name="p")
    heads = [y for y, text in words(drawing) if text.endswith(" of 12")]
    assert heads == pytest.approx([middle for middle, _ in bars(drawing)], abs=0.01)
    rows = sorted({*heads, *(y for y, text in words(drawing) if text == "dropped")})
    for layer, row in enumerate(rows):
        found = {text for y, text in words(drawing) if y == row}
        assert str(layer) in found and ("dropped" in found) is (layer == 2)
    assert len(rows) == 6


@pytest.mark.parametrize("width", WIDTHS)
def test_a_dropped_layer_is_an_empty_row_that_says_so(width: int) -> None:
    scores, plan = make_joint([928, 512, 1024, 1536], {1, 2})
    drawing = plan_picture(scores, plan, width=width, name="p")
    places = sorted({y for y, text in words(drawing) if text == "dropped"})
    assert len(places) == (2 if width == 960 else 4)  # below each other on a phone
    rows = {y for y, text in words(drawing) if re.fullmatch(r"[\d,]+ of (12|1,536)", text)}
    assert not rows & set(places)
    assert "1,024 of 1,536" not in drawing and "2 of 4 layers are dropped" in drawing


@pytest.mark.parametrize(
    ("heads", "blocks", "rows"),
    [
        (
            ["encoder.layer.0.attention", "encoder.layer.1.attention"],
            ["encoder.layer.0", "encoder.layer.1"],
            [("encoder.layer.0", "encoder.layer.0"), ("encoder.layer.1", "encoder.layer.1")],
        ),
        (
            ["h.0.attn", "h.1.attn"],
            ["h.1.mlp"],
            [("h.0.attn", None), ("h.1", "h.1")],
        ),
        (
            [f"decoder.block.0.layer.{at}" for at in (0, 1)],
            ["decoder.block.0.layer.2"],
            [("decoder.block.0.layer.0", "decoder.block.0"), ("decoder.block.0.layer.1", None)],
        ),
        (
            [f"layers.{stage}.blocks.{at}.attention" for stage in (0, 1) for at in (0, 1)],
            [f"layers.{stage}.blocks.{at}" for stage in (0, 1) for at in (0, 1)],
            [(name, name) for name in (f"layers.{stage}.blocks.{at}" for stage in (0, 1) for at in (0, 1))],
        ),
        (
            ["layers.0.self_attn"],
            [f"layers.0.mlp.experts.{at}" for at in (0, 1)],
            [("layers.0", "layers.0.mlp.experts.0"), (None, "layers.0.mlp.experts.1")],
        ),
    ],
    ids=["BERT", "no block in a layer", "T5", "Swin", "experts"],
)
def test_sites_of_one_layer_are_found_by_their_names(
    heads: list[str], blocks: list[str], rows: list[tuple[str | None, str | None]]
) -> None:
    scores, plan = joint_plan(heads, blocks)
    found = plan_rows(scores.table(), plan)
    assert [(row.heads and row.heads.name, row.width and row.width.name) for row in found] == rows


def test_many_blocks_of_one_layer_are_added_up() -> None:
    heads = [f"layers.{layer}.self_attn" for layer in range(3)]
    for experts in (21, 22):  # 63 blocks, and 66
        blocks = [f"layers.{layer}.mlp.experts.{expert}" for layer in range(3) for expert in range(experts)]
        scores, plan = joint_plan(heads, blocks)
        widths = [row.width for row in plan_rows(scores.table(), plan) if row.width]
        assert len(widths) == (63 if experts == 21 else 3)
        kept = [len(site.kept) for site in plan.of_kind("feed_forward").sites]
        assert sum(width.kept for width in widths) == sum(kept)
        assert sum(width.total for width in widths) == 8 * 3 * experts
        assert widths[0].kept == (kept[0] if experts == 21 else sum(kept[:22]))
