"""Lengths at which a model computes otherwise: both sides are tried, or the limit is stated, and it is the limit."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import config_of, tiny_model
from whole_runs import checkpoint, report_of, slimheads, steady, write_recipe

from slimheads import load, prune, save, score, select
from slimheads.exporting.export import export
from slimheads.families.limits import position_limit
from slimheads.models.kv_shapes import kv_shapes
from slimheads.pipeline.stages import export as export_stage
from slimheads.runtime.sessions import open_session
from slimheads.verification import parity
from slimheads.verification import parity_seq2seq as seq2seq
from slimheads.verification.lengths import lengths

LONGROPE = {"type": "longrope", "short_factor": [1.0] * 2, "long_factor": [40.0] * 2}


def with_tokenizer(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    for file in checkpoint("gpt2").glob("*token*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    steady(monkeypatch)


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("mistral", {"sliding_window": 140}, [(140, "sliding_window", 143)]),
        ("mistral", {"sliding_window": None}, []),
        ("mistral", {"sliding_window": 4096}, []),  # never reached: the model takes fewer
        ("mistral", {"sliding_window": 8192, "max_position_embeddings": 32768}, [(8192, "sliding_window", None)]),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 140}, []),
        ("gemma3_text", {"sliding_window": 140}, [(140, "sliding_window", 143)]),
        ("modernbert", {"local_attention": 64}, [(33, "local_attention", 36)]),
        ("gpt_neo", {"window_size": 140, "max_position_embeddings": 512}, [(140, "window_size", 143)]),
        ("phi3", {"rope_scaling": None, "sliding_window": None}, []),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, [(256, "max_position_embeddings", 256)]),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, []),
        ("t5", {"relative_attention_max_distance": 150}, [(150, "relative_attention_max_distance", 153)]),
        ("mpnet", {"max_position_embeddings": 512}, [(128, "relative_attention_num_buckets", 131)]),
    ],
)
def test_the_lengths_of_change_of_a_configuration(
    kind: str, changes: dict[str, Any], expected: list[tuple[int, str, int | None]]
) -> None:
    config = config_of(kind, **changes)
    found = lengths(config)
    assert found is not None
    ends = [one for one in found.changes if one.wrong_past == "model"]
    assert [(one.length, one.key, one.tried) for one in found.changes if one not in ends] == expected
    untried = [one for one in found.changes if one.tried is None]
    assert bool(found.limits()) == bool([one for one in found.changes if one.wrong_past == "graph"] or untried)


def test_a_position_table_is_tried_up_to_its_end() -> None:
    for kind in ("bert", "gpt2", "opt", "mpt"):
        config = config_of(kind)
        limit = position_limit(config)
        tried = parity.cases(config, "text-generation" if kind != "bert" else "feature-extraction")
        assert limit > 128 and max(case.past + case.length for case in tried) == limit
    config = config_of("whisper")
    assert max(case.decoder_ids.shape[1] for case in seq2seq.cases(config)) == position_limit(config)


def reached(tried: Sequence[parity.Case], change: int) -> set[str]:
    """How inputs come past a change: in one go, across it with a cache, or from a cache that is past it already."""
    over = [case for case in tried if case.past + case.length > change]
    ways = {"whole" if not case.past else "across" if case.past < change else "beyond" for case in over}
    return ways


def test_a_decoder_comes_past_its_window_in_every_way() -> None:
    config = config_of("mistral", sliding_window=140)
    assert reached(parity.cases(config, "text-generation"), 140) == {"whole", "across", "beyond"}
    t5 = config_of("t5", relative_attention_max_distance=150)
    assert max(case.length for case in seq2seq.cases(t5)) > 150
    assert max(case.past for case in seq2seq.cases(t5)) > 150


@pytest.mark.parametrize(("window", "code"), [(140, 4), (None, 0)])
def test_a_graph_that_ignores_a_window_past_the_usual_lengths_fails(
    window: int | None, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_tokenizer(tiny_model("mistral", sliding_window=window), tmp_path / "model")

    def without_window(model: Any, *args: Any, **options: Any) -> None:
        model.config.sliding_window = None
        export(model, *args, **options)
        model.config.sliding_window = window

    monkeypatch.setattr(export_stage, "export", without_window)
    ended = slimheads("run", write_recipe(tmp_path / "r.yaml", folder), "--out", tmp_path / "out")
    assert ended.code == code, ended.err
    failing = {link["link"]: link for link in report_of(tmp_path / "out")["certificate"] if not link["passed"]}
    assert 2 in failing if code else not failing
    if code:
        assert "length 143" in failing[2]["worst_case"] or "past 1" in failing[2]["worst_case"]


def differences(folder: Path, model: Any, sizes: Sequence[int]) -> list[float]:
    """How far the exported graph is from torch, at each length."""
    graph = parity.onnx_runner(open_session(folder / "slim" / "onnx" / "model.onnx"), kv_shapes(model))
    found = []
    for length in sizes:
        case = parity._case(np.random.default_rng(length), model.config, 1, length, "no", 0)
        found.append(float(np.abs(parity.torch_runner(model)(case)["logits"] - graph(case)["logits"]).max()))
    return found


@pytest.mark.parametrize(
    ("kind", "changes", "limit"),
    [
        ("phi3", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 150, "sliding_window": None}, 150),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 40.0}, "max_position_embeddings": 150}, 150),
    ],
)
def test_the_stated_limit_of_a_graph_is_where_it_stops_being_right(
    kind: str, changes: dict[str, Any], limit: int, tmp_path: Path
) -> None:
    model = tiny_model(kind, **changes)
    folder, out = with_tokenizer(model, tmp_path / "model"), tmp_path / "out"
    ended = slimheads("run", write_recipe(tmp_path / "r.yaml", folder), "--out", out)
    assert ended.code == 0, ended.err
    (change,) = report_of(out)["lengths"]["changes"]
    assert (change["length"], change["tried"], change["wrong_past"]) == (limit, limit, "graph")
    said = f"right up to {limit} tokens"
    for page in ("report.md", "report.html", "slim/README.md"):
        assert said in (out / page).read_text(encoding="utf-8")
    below, above = differences(out, load(out / "slim"), (limit, limit + 20))
    assert below < 1e-4 and above > 1e-3


def test_factors_whose_number_follows_from_the_head_count_survive_pruning(tmp_path: Path) -> None:
    """Phi-3 checks longrope's lists against hidden_size / num_attention_heads, which equal counts would change."""
    model = tiny_model("phi3", rope_scaling=LONGROPE, original_max_position_embeddings=64)
    slim = prune(model, select(score(model), ratio=0.5, scope="layer"))
    save(slim, tmp_path / "slim")
    ids = torch.arange(3, 80)[None]
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "slim")(input_ids=ids).logits, slim(input_ids=ids).logits)
