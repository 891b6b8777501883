"""An error about a key of the recipe points at that key, whatever finds it out; at no line where nobody wrote it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from whole_runs import checkpoint, slimheads

import slimheads as library
from slimheads.errors import SlimheadsError, UsageError, about_keys
from slimheads.exporting.quantize import to_q4
from slimheads.models import flops
from slimheads.models.loading import load
from slimheads.pruning.scores import Scores, SiteScores
from slimheads.recipe.recipe import Recipe

# The key, a value with which the recipe can be read and the run cannot go on, other lines, and the kind of the model.
LATE: list[tuple[str, str, dict[str, str], str]] = [
    ("model", "nowhere/at/all", {}, "bert"),
    ("model", "pkg://no_such_package/model", {}, "bert"),
    ("model", "pkg://slimheads/nowhere", {}, "bert"),
    ("model", "nobody/has-this", {}, "bert"),
    ("task", "image-classification", {}, "bert"),
    ("select.ratio", "0.9", {"select.scope": "global"}, "bert"),
    ("select.ratio", "0.01", {}, "bert"),
    ("select.ratio", "0.75", {"select.keep_at_least": "2"}, "bert"),
    ("select.keep_at_least", "4", {}, "bert"),
    ("select.keep_at_least", "4", {"select.ratio": "0.5"}, "bert"),
    ("select.multiple_of", "64", {}, "bert"),
    ("select.multiple_of", "64", {"select.keep_at_least": "2"}, "bert"),
    ("select.multiple_of", "auto", {}, "t5"),
    ("select.counts", "equal", {}, "swin-windows"),
    ("select.within_groups", "true", {}, "bert"),
    ("select.sites", "nothing.*", {}, "bert"),
    ("select.sites", '"*attention"', {"select.ffn_ratio": "0.2"}, "bert"),
    ("select.ffn_ratio", "0.9", {}, "bert"),
    ("select.ffn_ratio", "0.01", {"select.scope": "layer"}, "bert"),
    ("select.ffn_multiple_of", "64", {"select.ffn_ratio": "0.5"}, "bert"),
    ("select.ffn_multiple_of", "auto", {"select.ffn_ratio": "0.5"}, "t5"),
    ("select.drop_layers", "1", {}, "bert"),
    ("verify.text", "nowhere.txt", {}, "bert"),
    ("verify.text", "sample.txt", {}, "vit"),
    ("verify.inputs", "nowhere.safetensors", {}, "vit"),
    ("verify.inputs", "sample.safetensors", {}, "bert"),
    ("bench.providers", "[cuda]", {}, "bert"),
    ("bench.shapes", "[[1, 8], [1, 161]]", {}, "bert"),
    ("bench.shapes", "[[1, 159]]", {}, "roberta"),
    ("bench.shapes", "[[1, 1, 8]]", {}, "bert"),
    ("bench.shapes", "[[1, 1, 160]]", {}, "gpt2"),
    ("gates.min_cosine", "0.5", {}, "vit"),
]


def written(path: Path, keys: dict[str, str]) -> Path:
    """A recipe with each key on a line of its own."""
    sections: dict[str, list[str]] = {}
    for key, value in keys.items():
        section, _, name = key.rpartition(".")
        sections.setdefault(section, []).append(f"{'  ' if section else ''}{name}: {value}")
    lines = [line for section, own in sections.items() for line in ([f"{section}:"] if section else []) + own]
    path.write_text("\n".join(lines) + "\n")
    return path


def place_of(path: Path, key: str) -> tuple[int, int]:
    """Line and column of a key's value, by ruamel's own reader."""
    data: Any = YAML().load(path)
    *sections, name = key.split(".")
    for section in sections:
        data = data[section]
    line, column = data.lc.value(name)
    return line + 1, column + 1


@pytest.mark.parametrize(("key", "value", "others", "kind"), LATE)
def test_an_error_points_at_its_key(key: str, value: str, others: dict[str, str], kind: str, tmp_path: Path) -> None:
    keys = {"model": str(checkpoint(kind)), "bench.shapes": "[[1, 8]]"} | others | {key: value}
    path = written(tmp_path / "r.yaml", keys)
    line, column = place_of(path, key)
    ended = slimheads("plan", path) if not key.startswith("bench.providers") else slimheads("run", path, "--dry-run")
    assert ended.code in (2, 5), ended
    assert f"{path}:{line}:{column}: " in ended.complaints[-1]


def test_the_table_has_every_key_that_can_fail_late() -> None:
    """The others are names, switches and numbers that are judged when the recipe is read."""
    judged_at_once = {
        *("score.method", "select.scope", "select.normalize", "recover.method", "bench.threads", "bench.min_seconds"),
        *("bench.on_missing", "verify.atol", "verify.rtol", "export.candidates", "export.int8_for", "export.kv_axes"),
        *("gates.latency_ratio", "gates.size_ratio", "gates.max_perplexity_ratio", "gates.min_top1_agreement"),
        *("export.on_weak_precision", "gates.min_precision_cosine"),
        "export.precisions",  # below: it takes an export to find out
    }
    keys = {
        f"{name}.{key}" if key else name
        for name, info in Recipe.model_fields.items()
        for key in getattr(info.annotation, "model_fields", {"": None})
    }
    assert keys == judged_at_once | {key for key, *_ in LATE}


@pytest.mark.parametrize("bench", ["", "bench: {threads: 1}\n"])
def test_a_default_is_named_and_points_at_no_line(bench: str, tmp_path: Path) -> None:
    from tiny import tiny_model

    tiny_model("bert", max_position_embeddings=64).save_pretrained(tmp_path / "short")
    (tmp_path / "r.yaml").write_text(f"model: short\n{bench}")
    line = slimheads("plan", tmp_path / "r.yaml").complaints[-1]
    assert f"{tmp_path}/r.yaml: bench.shapes (default): the shape [1, 128] is longer than the 64 positions" in line
    assert "[[1, 16], [1, 64]]" in line and not re.search(r"yaml:\d", line)


def test_init_writes_shapes_that_the_model_takes_and_a_path_from_the_recipes_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny import tiny_model

    tiny_model("bert", max_position_embeddings=64).save_pretrained(tmp_path / "short")
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)
    assert slimheads("init", "short", "-o", "recipes/r.yaml").code == 0
    assert Recipe.read("recipes/r.yaml").bench.shapes == ((1, 16), (1, 64))
    assert slimheads("plan", "recipes/r.yaml").code == 0


def test_an_error_below_the_recipe_says_which_key_it_is_about(tmp_path: Path) -> None:
    model = load(checkpoint())
    with pytest.raises(UsageError) as caught, about_keys("bench.shapes"):
        flops.flops(model, 1, 161)
    assert caught.value.keys == ("bench.shapes",)
    import onnx

    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])), tmp_path / "model.onnx")
    with pytest.raises(SlimheadsError) as refused:
        to_q4(tmp_path / "model.onnx", tmp_path / "q4.onnx")
    path = written(tmp_path / "r.yaml", {"model": "m", "export.precisions": "[fp32, q4]"})
    with pytest.raises(SlimheadsError) as placed, Recipe.read(path).located():
        raise refused.value
    assert placed.value.where == f"{path}:3:15"


SCORES = Scores("magnitude", (SiteScores("a", "head", (1.0, 2.0, 3.0, 4.0)),))


@pytest.mark.parametrize(
    ("call", "known"),
    [
        (lambda: library.score(load(checkpoint()), "magnitudes"), "magnitude"),
        (lambda: library.select(SCORES, 0.5, scope="layers"), "global, layer"),  # type: ignore[arg-type]
        (lambda: library.select(SCORES, 0.5, normalize="mean"), "none, layer"),  # type: ignore[arg-type]
        (lambda: library.select(SCORES, 0.5, counts="same"), "any, equal"),  # type: ignore[arg-type]
        (lambda: library.load(checkpoint(), "embedding"), "feature-extraction"),
        (lambda: library.bench("a.onnx", "b.onnx", shapes=[(1, 8)], provider="gpu"), "cpu, cuda"),
        (lambda: library.bench("a.onnx", "b.onnx", shapes=[(1, 8)], on_missing="pass"), "fail, skip"),  # type: ignore[arg-type]
        (lambda: library.export(load(checkpoint()), "x", task="fill", precisions=["int4"]), "fp32, fp16, int8, q4"),  # type: ignore[list-item]
        (lambda: library.export(load(checkpoint()), "x", task="fill", kv_axes="free"), "symbolic, static"),  # type: ignore[arg-type]
        (lambda: library.export(load(checkpoint()), "x", task="fill", int8_for="amx"), "avx2, arm64"),  # type: ignore[arg-type]
        (lambda: library.export(load(checkpoint()), "x", task="embedding"), "feature-extraction"),
    ],
)
def test_a_name_that_is_not_known_is_refused_with_those_that_are(
    call: Any, known: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        call()
    assert known in caught.value.hint
    assert not list(tmp_path.iterdir()), "nothing is written before the names are checked"
