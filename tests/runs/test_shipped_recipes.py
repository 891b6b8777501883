"""Every recipe that ships, run as it is on a small model of its kind: a proof that fails publishes nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from whole_runs import checkpoint, corrupting, report_of, slimheads

from slimheads.pipeline.stages import prune as prune_stage
from slimheads.recipe.recipe import Export

SHIPPED = sorted((Path(__file__).parents[2] / "pipelines").glob("*.yaml"))
TINY = {"bert-base": "bert", "ci": "bert", "llama": "llama", "minilm": "bert", "tiny-gpt2": "gpt2"}


@pytest.fixture(
    params=[pytest.param(path, marks=() if path.stem == "ci" else pytest.mark.slow, id=path.stem) for path in SHIPPED]
)
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Without that model's own text, and without what only trained weights, or long measurements, can promise."""
    data = yaml.safe_load(request.param.read_text(encoding="utf-8"))
    data["model"] = str(checkpoint(TINY[request.param.stem]))
    data["select"]["ratio"] = 0.5  # of so few heads
    data["bench"] |= {"min_seconds": 0.05, "threads": 1}
    data.get("verify", {}).pop("text", None)
    data.get("gates", {}).pop("min_cosine", None)
    data.get("gates", {}).pop("max_perplexity_ratio", None)
    if data.get("task") != "text-generation":
        data.pop("task", None)
    made = tmp_path / "r.yaml"
    made.write_text(yaml.safe_dump(data), encoding="utf-8")
    return made


@pytest.mark.slow
def test_a_shipped_recipe_runs_with_its_own_candidates_and_shapes(recipe: Path, tmp_path: Path) -> None:
    """Really measured, whatever the latency turns out to be."""
    out, asked = tmp_path / "out", yaml.safe_load(recipe.read_text(encoding="utf-8"))
    ended = slimheads("run", recipe, "--out", out, "--json")
    assert ended.code == 0, ended.err
    report = report_of(out)
    assert ended.json == report == json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert all(link["passed"] for link in report["certificate"])
    assert {tuple(row["shape"][:2]) for row in report["latency"]} >= {tuple(s) for s in asked["bench"]["shapes"][:1]}
    assert {graph["candidate"] for graph in report["candidates"]} == {"plain", *Export().candidates}
    assert sum(graph["ships"] for graph in report["candidates"]) == 1
    assert (out / "slim" / "onnx" / "model.onnx").is_file()


def test_a_broken_proof_under_a_shipped_recipe_is_reported(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(prune_stage, "save", corrupting)
    ended = slimheads("run", recipe, "--out", out)
    said = "link 1 (model.safetensors): gated dense torch == slim torch failed at batch"
    (line,) = ended.complaints
    assert ended.code == 4 and line.startswith(f"slimheads: {said}")
    report = report_of(out)
    assert report["verdict"]["exit_code"] == 4 and report["verdict"]["reasons"][0].startswith(said)
    assert not any(graph["ships"] for graph in report["candidates"])
    for page in ("report.md", "report.html"):
        text = (out / page).read_text(encoding="utf-8")
        assert "link 1 FAILED (gated dense torch == slim torch, model.safetensors)" in text
        assert "Shipped graph: none (the certificate failed)" in re.sub("<[^>]+>", "", text)
    assert not (out / "slim").exists()
