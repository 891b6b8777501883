"""What single stages do that a look at a whole run would not show."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel
from whole_runs import checkpoint, report_of, slimheads, steady, write_recipe

from slimheads.errors import UsageError
from slimheads.families.sites import find_sites, of_kind
from slimheads.latency import bench as measuring
from slimheads.latency.bench import bench
from slimheads.models.checkpoint import find
from slimheads.models.loading import load
from slimheads.pipeline.run_models import RunModels
from slimheads.pipeline.stage import versions
from slimheads.pipeline.stages import bench as bench_stage
from slimheads.pipeline.stages import verify as verify_stage
from slimheads.pipeline.stages.score import Scored
from slimheads.pipeline.stages.select import Selected, choose
from slimheads.pruning.plan import Plan
from slimheads.pruning.scoring.score import score
from slimheads.recipe.recipe import Recipe


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    steady(monkeypatch)


def ended_well(recipe: Path, out: Path) -> Any:
    ended = slimheads("run", recipe, "--out", out)
    assert ended.code == 0, ended.err
    return report_of(out)


def test_versions_name_every_library_that_a_result_comes_from() -> None:
    found = versions()
    assert {"slimheads", "python", "torch", "transformers", "optimum-onnx", "onnx", "onnxruntime"} <= found.keys()
    assert all(found.values())


def test_a_ratio_that_cannot_be_met_names_the_place_of_the_ratio_or_of_the_floor(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"model: {checkpoint()}\nselect: {{keep_at_least: 3}}\n")
    scores = score(load(checkpoint()))
    for overrides, where in (
        (["select.ratio=0.9"], "--set select.ratio=0.9"),
        (["select.keep_at_least=4"], "--set select.keep_at_least=4"),
        (["select.ratio=0.9", "select.multiple_of=8"], "--set select.multiple_of=8"),
    ):
        recipe = Recipe.read(path, overrides)
        with pytest.raises(UsageError) as caught, recipe.located():
            choose(scores, recipe.select)
        assert caught.value.where == where


def test_the_controls_lose_as_many_heads_at_random_and_leave_the_model_as_it_was(tmp_path: Path) -> None:
    recipe = Recipe.read(write_recipe(tmp_path / "r.yaml"))
    models = RunModels(find(recipe.model))
    dense = models.dense()
    scores = score(dense)
    plan, selection = choose(scores, recipe.select)
    scored, selected = Scored(scores=scores), Selected(plan=plan, selection=selection)
    controls = verify_stage._controls(recipe, models, scored, selected)
    assert [seed for seed, _ in controls] == list(verify_stage.CONTROL_SEEDS)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    ids = torch.tensor([[2, 3, 4, 5]])
    with torch.no_grad():
        answers = [dense(input_ids=ids).last_hidden_state]
        for _, pruned in controls:
            with pruned():
                answers.append(dense(input_ids=ids).last_hidden_state)
    assert all(not torch.equal(a, b) for n, a in enumerate(answers) for b in answers[:n])
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


def test_a_sharded_source_is_shipped_shard_by_shard_at_ratio_zero(tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(checkpoint(), source)
    (source / "model.safetensors").unlink()
    AutoModel.from_pretrained(checkpoint()).save_pretrained(source, max_shard_size="40KB")
    shards = sorted(source.glob("model-*.safetensors"))
    assert len(shards) > 1
    ended_well(write_recipe(tmp_path / "r.yaml", source, select={"ratio": 0}), tmp_path / "out")
    slim = tmp_path / "out" / "slim"
    for file in [*shards, source / "model.safetensors.index.json"]:
        assert (slim / file.name).read_bytes() == file.read_bytes()
    assert not (slim / "model.safetensors").exists()
    assert all(torch.equal(a, b) for a, b in zip(load(slim).parameters(), load(source).parameters(), strict=True))


def test_a_half_precision_source_ships_in_its_own_dtype(tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(checkpoint(), source)
    AutoModel.from_pretrained(checkpoint()).to(torch.bfloat16).save_pretrained(source)
    report = ended_well(write_recipe(tmp_path / "r.yaml", source), tmp_path / "out")
    with safe_open(tmp_path / "out" / "slim" / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert report["model"]["slim"]["bytes"] > report["files"]["slim/model.safetensors"]  # the graph is float32


def test_without_a_tokenizer_drift_is_null_with_a_reason(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint() / name, source / name)
    report = ended_well(write_recipe(tmp_path / "r.yaml", source), tmp_path / "out")
    assert report["drift"]["slim"] is None
    assert "no tokenizer" in report["drift"]["reason"]
    assert all(link["passed"] for link in report["certificate"])  # the proof needs no text


def test_the_recipe_s_own_text_is_measured_besides_the_built_in_one(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("the a of to\n\nis that it for\n")
    report = ended_well(write_recipe(tmp_path / "r.yaml", verify={"text": "own.txt"}), tmp_path / "out")
    assert (report["drift_text"]["sample"], report["drift_text"]["texts"]) == ("own.txt", 2)
    assert report["drift"]["sample"] == "built-in"
    assert report["drift_text"]["slim"]["cosine"] != report["drift"]["slim"]["cosine"]


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_a_decoder_s_generation_settings_ship_and_both_folders_hold_a_config(model_type: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended_well(write_recipe(tmp_path / "r.yaml", checkpoint(model_type)), out)
    assert (out / "slim" / "generation_config.json").is_file()
    slim, dense = (json.loads((out / side / "config.json").read_text()) for side in ("slim", "dense"))
    assert "slimheads" in slim and "slimheads" not in dense
    source = json.loads((checkpoint(model_type) / "config.json").read_text())
    assert dense == source


def test_a_decoder_is_measured_at_prefill_and_at_decode_and_the_report_tells_them_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_stage, "bench", partial(bench, min_pairs=10))
    monkeypatch.setattr(measuring, "EXTENSION", 1)
    shapes = {"shapes": [[1, 8], [1, 1, 16]], "min_seconds": 0.05, "threads": 1}
    report = ended_well(write_recipe(tmp_path / "r.yaml", checkpoint("llama"), bench=shapes), tmp_path / "out")
    prefill, decode = report["latency"]
    assert (prefill["shape"], decode["shape"], report["model"]["flops_shape"]) == ([1, 8], [1, 1, 16], [1, 1, 16])
    for row, tokens in ((prefill, 8), (decode, 1)):
        assert row["dense"]["tokens_per_second"] == pytest.approx(1e3 * tokens / row["dense"]["median_ms"])
        assert row["flop_speedup"] > 1 and row["realised"]
        # Three layers of four KV heads, keys and values of four float32 each.
        assert row["cache_bytes_per_token"] == {"dense": 3 * 4 * 2 * 4 * 4, "slim": 6 * 2 * 4 * 4}
    page = (tmp_path / "out" / "report.md").read_text()
    assert "prefill 1x8" in page and "decode 1x1 after 16" in page
    assert "Tokens/s" in page and "384 bytes to 192 bytes" in page


def test_slim_reloads_as_the_plan_says(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended_well(write_recipe(tmp_path / "r.yaml", checkpoint("gpt2")), out)
    plan = Plan.from_json(json.loads((out / "plan.json").read_text()))
    sites = of_kind(find_sites(load(out / "slim")), "attention")
    assert [(site.name, site.total) for site in sites] == [(site.site, len(site.kept)) for site in plan.sites]
