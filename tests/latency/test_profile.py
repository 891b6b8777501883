"""Measuring a table, keeping it, and finding it again; for nothing but what it was measured for."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx
import pytest
from latency_tables import keep_table
from tiny import tiny_model
from whole_runs import checkpoint, measured, slimheads

from slimheads.errors import EnvironmentLackError, UsageError
from slimheads.latency import profile as profiling
from slimheads.latency import table_store
from slimheads.latency.profile import profile, table_shapes
from slimheads.latency.records import Interval, Latency
from slimheads.latency.table_store import Setting, stored
from slimheads.models.checkpoint import find
from slimheads.names import ALL_KINDS
from slimheads.pipeline.latency_tables import RecipeTables
from slimheads.recipe.recipe import Recipe

SHAPES: tuple[tuple[int, ...], ...] = ((1, 8), (2, 16))
ONE = Setting("cpu", 1)
ALL = Setting("cpu", 1, kinds=ALL_KINDS)
NOISY = Interval(estimate=1.1, low=1.05, high=1.15)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test."""
    monkeypatch.setenv("SLIMHEADS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "profiles"


class FakeBench:
    """In place of `bench`: counts the numbers in both files, and says that latency is in proportion to them."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.control: Callable[[int], Interval] = lambda call: Interval(estimate=1.0, low=0.99, high=1.01)

    def __call__(self, dense: Path, slim: Path, *, shapes: Sequence[Any], **options: Any) -> Sequence[Latency]:
        self.calls.append({"shapes": tuple(shapes), **options})
        ratio = self.numbers(dense) / self.numbers(slim)
        control = self.control(len(self.calls))
        verdict = "faster" if control.low <= 1 else "inconclusive"
        more = {"control": control, "reason": None if verdict == "faster" else "noisy"}
        return [measured(verdict, ratio, shape=shape, **more) for shape in shapes]

    @staticmethod
    def numbers(path: Path) -> int:
        return sum(len(t.raw_data) for t in onnx.load(path).graph.initializer)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBench]:
    bench = FakeBench()
    monkeypatch.setattr(profiling, "bench", bench)
    yield bench


def written() -> Path:
    """A made-up table, stored as one of the small BERT's."""
    return keep_table(checkpoint(), lambda _, kept: 0.9, (1, 8), ONE)


# Measuring


def test_each_point_is_that_count_in_every_layer_and_the_share_is_what_bench_found(fake: FakeBench) -> None:
    (first, second) = profile(find(str(checkpoint())), SHAPES, ONE, min_seconds=0.5)
    assert [made.table.shape for made in (first, second)] == list(SHAPES)
    assert len(fake.calls) == 3 and all(call["shapes"] == SHAPES for call in fake.calls)
    assert all((call["threads"], call["provider"], call["min_seconds"]) == (1, "cpu", 0.5) for call in fake.calls)
    shares = [point.share.estimate for point in first.table.points]
    assert [point.kept for point in first.table.points] == [1, 2, 3]
    # three layers lose the same 4 x 32 x 8 weights and 3 x 8 biases with each head
    steps = [b - a for a, b in zip(shares, [*shares[1:], 1.0], strict=True)]
    assert steps == pytest.approx([steps[0]] * 3) and steps[0] > 0
    point = first.table.points[0]
    assert point.share.low < point.share.estimate < point.share.high


def test_what_is_stored_is_not_measured_again(fake: FakeBench, cache: Path) -> None:
    source = find(str(checkpoint()))
    (first,) = profile(source, SHAPES[:1], ONE)
    assert not first.reused and first.path.parent == cache and first.path.is_file()
    both = profile(source, SHAPES, ONE)
    assert [made.reused for made in both] == [True, False]
    assert both[0].table == first.table
    assert [call["shapes"] for call in fake.calls] == [SHAPES[:1]] * 3 + [SHAPES[1:]] * 3
    assert [made.reused for made in profile(source, SHAPES, ONE)] == [True, True]
    assert [made.reused for made in profile(source, SHAPES, ONE, again=True)] == [False, False]
    assert sorted(file.suffix for file in cache.iterdir()) == [".json", ".json"]


def test_a_point_in_doubt_is_measured_again_and_the_steadier_one_counts(fake: FakeBench) -> None:
    fake.control = lambda call: NOISY if call == 2 else Interval(estimate=1.0, low=0.99, high=1.01)
    (made,) = profile(find(str(checkpoint())), SHAPES[:1], ONE)
    assert len(fake.calls) == 4 and made.table.noisy_points == 0
    assert fake.calls[1]["seed"] != fake.calls[2]["seed"]


def test_a_point_that_stays_in_doubt_is_kept_and_marked(fake: FakeBench) -> None:
    worse = Interval(estimate=1.3, low=1.2, high=1.4)
    fake.control = lambda call: NOISY if call in (1, 4, 6) else worse
    told: list[str] = []
    (made,) = profile(find(str(checkpoint())), SHAPES[:1], ONE, tell=told.append)
    assert made.table.noisy_points == 3 and len(fake.calls) == 6
    assert {point.control.estimate for point in made.table.points} == {NOISY.estimate}
    assert sum("again" in line for line in told) == 3


def test_widths_and_dropped_layers_are_measured_in_every_block_and_stack(fake: FakeBench) -> None:
    (made,) = profile(find(str(checkpoint())), SHAPES[:1], ALL)
    table = made.table
    assert [kind.kind for kind in table.kinds] == ["attention", "feed_forward", "layer"]
    assert [(point.kind, point.kept) for point in table.points] == [
        *((0, heads) for heads in (1, 2, 3)),
        *((1, neurons) for neurons in (8, 16, 24, 32, 40)),
        *((2, layers) for layers in (1, 2)),
    ]
    # one more neuron in three layers: 32 weights in, 32 out and a bias; eight of them between two points
    left = [point.share.estimate for point in table.points if point.kind == 1]
    head = table.points[1].share.estimate - table.points[0].share.estimate  # 4 x 32 x 8 weights and 3 x 8 biases
    assert [b - a for a, b in pairwise(left)] == pytest.approx([head * 8 * 65 / (4 * 32 * 8 + 24)] * 4)
    # a layer is four heads, 48 neurons, and the other weights and biases of its outputs and norms: 6 x 32
    layers = [point.share.estimate for point in table.points if point.kind == 2]
    numbers = 4 * (4 * 32 * 8 + 24) + 48 * 65 + 6 * 32
    assert layers[1] - layers[0] == pytest.approx(head / 3 * numbers / (4 * 32 * 8 + 24))


def test_a_table_of_all_kinds_serves_where_fewer_are_asked_for(fake: FakeBench) -> None:
    source = find(str(checkpoint()))
    (wide,) = profile(source, SHAPES[:1], ALL)
    calls = len(fake.calls)
    (again,) = profile(source, SHAPES[:1], ONE)
    assert again.reused and again.path == wide.path and again.table == wide.table and len(fake.calls) == calls
    (narrow,) = profile(source, SHAPES[:1], ONE, again=True)
    assert narrow.path != wide.path and [kind.kind for kind in narrow.table.kinds] == ["attention"]
    assert stored(source, SHAPES[:1], ONE) == {SHAPES[0]: narrow.table}
    wide.path.unlink()
    assert not stored(source, SHAPES[:1], ALL)  # a table of heads alone knows no widths


def test_heads_within_groups_are_a_table_of_their_own(fake: FakeBench, tmp_path: Path) -> None:
    source = find(str(checkpoint("llama")))
    (groups,) = profile(source, SHAPES[:1], ONE)
    (heads,) = profile(source, SHAPES[:1], Setting("cpu", 1, within_groups=True))
    assert [point.kept for point in groups.table.points] == [1, 2, 3]
    assert [point.kept for point in heads.table.points] == [4]
    # without half of the query heads all keys and values are there: more is left than without half of the groups
    assert heads.table.points[0].share.estimate > groups.table.points[1].share.estimate


def test_an_encoder_decoder_is_refused_by_name_and_a_model_of_single_heads_too(fake: FakeBench, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="t5 is an encoder-decoder"):
        profile(find(str(checkpoint("t5"))), SHAPES, ONE)
    tiny_model("bert", num_attention_heads=1).save_pretrained(tmp_path / "single")
    with pytest.raises(UsageError, match="nothing to measure"):
        profile(find(str(tmp_path / "single")), SHAPES, ONE)
    assert not fake.calls


def test_images_have_no_length() -> None:
    assert table_shapes(find(str(checkpoint("vit"))), [(1, 16), (1, 128), (4, 16)]) == ((1,), (4,))


# Keeping


def test_a_table_is_found_for_what_it_was_made_for_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written()
    source = find(str(checkpoint()))
    assert set(stored(source, SHAPES, ONE)) == {(1, 8)}
    for other in (Setting("cpu", 2), Setting("cuda", 1), Setting("cpu", 1, within_groups=True)):
        assert not stored(source, [(1, 8)], other)
    assert not stored(find(str(checkpoint()), "feature-extraction"), [(1, 9)], ONE)
    elsewhere = tmp_path / "model"
    shutil.copytree(checkpoint(), elsewhere)
    assert stored(find(str(elsewhere)), [(1, 8)], ONE)  # the same configuration elsewhere
    config = json.loads((elsewhere / "config.json").read_text())
    (elsewhere / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    assert not stored(find(str(elsewhere)), [(1, 8)], ONE)
    here = table_store.environment()
    changes: list[dict[str, Any]] = [{"cpu": "another CPU"}, {"cores_usable": 0.5}, {"packages": {"onnxruntime": "1"}}]
    for change in changes:
        monkeypatch.setattr(table_store, "environment", lambda change=change: here.model_copy(update=change))
        assert not stored(source, [(1, 8)], ONE)
    monkeypatch.setattr(table_store, "environment", lambda: here.model_copy(update={"load_average": (9.0, 9.0, 9.0)}))
    assert stored(source, [(1, 8)], ONE)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[" * 100_000, b"\xff\xfe", None], ids=["", "{}", "deep", "bytes", ""]
)
def test_a_damaged_table_is_told_and_measured_again(
    content: bytes | None, fake: FakeBench, caplog: pytest.LogCaptureFixture
) -> None:
    path = written()
    # None: whole, but of another model, as a file that was copied over this one would be
    other = content if content is not None else path.read_bytes().replace(b'"intermediate_size": 48', b'"inter": 48')
    assert other != path.read_bytes()
    path.write_bytes(other)
    source = find(str(checkpoint()))
    with caplog.at_level(logging.WARNING):
        assert not stored(source, [(1, 8)], ONE)
    assert str(path) in caplog.text and "damaged" in caplog.text
    (made,) = profile(source, [(1, 8)], ONE)
    assert not made.reused and made.path == path and stored(source, [(1, 8)], ONE)[1, 8] == made.table


def test_the_folder_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert table_store.folder() == tmp_path / "cache" / "profiles"
    monkeypatch.delenv("SLIMHEADS_CACHE")
    assert table_store.folder() == tmp_path / "xdg" / "slimheads" / "profiles"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert table_store.folder() == tmp_path / "home" / ".cache" / "slimheads" / "profiles"


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(
    fake: FakeBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SLIMHEADS_CACHE", str(tmp_path / "file"))
    with pytest.raises(EnvironmentLackError, match="SLIMHEADS_CACHE"):
        profile(find(str(checkpoint())), SHAPES, ONE)
    assert not fake.calls


def test_a_recipe_is_profiled_on_the_first_provider_that_is_there() -> None:
    bench = {"providers": ["cuda", "cpu"], "on_missing": "skip", "threads": 3}
    recipe = Recipe.model_validate({"model": "m", "bench": bench})
    assert RecipeTables(recipe, find(str(checkpoint()))).setting() == Setting("cpu", 3)


@pytest.mark.parametrize(
    ("select", "kinds"),
    [
        ({}, ["attention"]),
        ({"ratio": 0}, ["attention"]),
        ({"ratio": 0, "ffn_ratio": 0.4}, ["feed_forward"]),
        ({"ratio": 0.2, "ffn_ratio": 0.4}, ["attention", "feed_forward"]),
        ({"ratio": 0.2, "drop_layers": 1}, ["attention", "layer"]),
        ({"ratio": 0, "drop_layers": 1, "ffn_multiple_of": "auto"}, ["feed_forward", "layer"]),
    ],
)
def test_the_kinds_that_a_recipe_touches_are_measured_and_the_command_names_them(
    select: dict[str, Any], kinds: list[str]
) -> None:
    tables = RecipeTables(Recipe.model_validate({"model": "m", "select": select}), find(str(checkpoint())))
    assert list(tables.setting().kinds) == kinds
    assert f"--kinds {','.join(kinds)}" in str(tables.missing())


# The command


@pytest.mark.parametrize("model_type,shape,sizes", [("bert", "1x8", [1, 8]), ("gpt2", "1x1x16", [1, 1, 16])])
def test_profile_for_people_and_for_programs(model_type: str, shape: str, sizes: list[int]) -> None:
    kinds = ("--kinds", "layer,attention")
    options = ("profile", checkpoint(model_type), "--shape", shape, "--threads", 1, "--min-seconds", 0.01, *kinds)
    first, second, people = (slimheads(*options, *more) for more in (["--json"], ["--json"], []))
    assert (first.code, second.code, people.code) == (0, 0, 0), first.err
    (made,), (again,) = first.json, second.json
    assert (made["reused"], again["reused"]) == (False, True)
    assert made["table"] == again["table"] and made["path"] == again["path"]
    table = made["table"]
    assert (table["shape"], table["threads"], table["provider"], table["format"]) == (sizes, 1, "cpu", 2)
    assert [kind["kind"] for kind in table["kinds"]] == ["attention", "layer"]
    assert [point["kept"] for point in table["points"]] == [1, 2, 3, 1, 2] and table["dense_ms"] > 0
    assert "reused" in people.out and made["path"] in people.out
    rows = re.findall(r"^(attention|layer) .* (\d) of \d ", people.out, re.MULTILINE)
    assert rows == [*(("attention", kept) for kept in "123"), ("layer", "1"), ("layer", "2")]


def test_kinds_of_sites_have_names() -> None:
    ended = slimheads("profile", checkpoint(), "--kinds", "attention,heads")
    assert ended.code == 2 and "attention,heads" in ended.err and "feed_forward" in ended.err


def test_an_encoder_decoder_has_no_profile_and_the_line_names_it() -> None:
    ended = slimheads("profile", checkpoint("t5"))
    assert ended.code == 2 and "t5" in ended.err and ended.out == ""
