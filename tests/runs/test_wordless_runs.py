"""Whole runs on models that are fed images or sound: what is measured, and what the report says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file
from tiny import spread
from whole_runs import CLASSIFIERS, Ended, checkpoint, report_of, reused, slimheads, steady, write_recipe

from slimheads.data.inputs import make_inputs
from slimheads.models.loading import load
from slimheads.models.tasks import TASKS
from slimheads.recipe.recipe import Recipe

NOUNS = {"vit": "image", "wav2vec2": "recording", "audio-spectrogram-transformer": "recording"}


@pytest.fixture(autouse=True)
def _quick_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    steady(monkeypatch)


def write_inputs(path: Path, model_type: str, count: int = 5, seed: int = 0) -> dict[str, np.ndarray]:
    made = make_inputs(load(checkpoint(model_type)).config, count, 7, np.random.default_rng(seed))
    save_file(made, path)
    return made


def run(recipe: Path, out: Path, *options: str) -> Ended:
    return slimheads("run", recipe, "--out", out, *options)


@pytest.mark.parametrize("model_type", spread(*CLASSIFIERS))
def test_without_a_sample_drift_is_null_with_a_reason_and_all_else_is_measured(model_type: str, tmp_path: Path) -> None:
    ended = run(write_recipe(tmp_path / "r.yaml", checkpoint(model_type)), tmp_path / "out")
    assert ended.code == 0, ended.err
    report, noun = report_of(tmp_path / "out"), NOUNS[model_type]
    assert report["model"]["task"] == CLASSIFIERS[model_type]
    assert report["drift"] is None and f"no built-in sample of {noun}s" in report["drift_reason"]
    assert "verify.inputs" in report["drift_reason"]
    assert [link["link"] for link in report["certificate"] if link["passed"]] == [1, 2, 4]
    shape = [1, 8] if model_type == "wav2vec2" else [1]
    assert [row["shape"] for row in report["latency"]] == [shape] == [report["model"]["flops_shape"]]
    said = [(tmp_path / "out" / name).read_text() for name in ("report.md", "report.html", "slim/README.md")]
    for page in said:
        assert " texts" not in page and report["drift_reason"] in page
    assert ("batch 1" in said[0]) == (model_type != "wav2vec2")


@pytest.mark.parametrize("model_type", spread(*CLASSIFIERS))
def test_the_card_loads_what_ships_beside_the_model(model_type: str, tmp_path: Path) -> None:
    """The card's two lines, with what prepares the inputs, on the published folder."""
    assert run(write_recipe(tmp_path / "r.yaml", checkpoint(model_type)), tmp_path / "out").code == 0
    slim = tmp_path / "out" / "slim"
    for beside in {path.name for path in checkpoint(model_type).iterdir()} - {"config.json", "model.safetensors"}:
        assert (slim / beside).read_bytes() == (checkpoint(model_type) / beside).read_bytes()
    card = (slim / "README.md").read_text()
    (line,) = {line for line in card.splitlines() if line.startswith("processor = ")}
    preparer = getattr(transformers, line.removeprefix("processor = ").partition(".")[0])
    processor = preparer.from_pretrained(slim)
    raw: Any = np.zeros((40, 30, 3), np.uint8) if model_type == "vit" else np.zeros(16000, np.float32)
    options = {} if model_type == "vit" else {"sampling_rate": 16000}
    with torch.no_grad():
        logits = load(slim)(**processor(raw, return_tensors="pt", **options)).logits
    assert torch.isfinite(logits).all()
    assert TASKS[CLASSIFIERS[model_type]] in card or "slimheads.load" in card


@pytest.mark.parametrize("model_type", spread(*CLASSIFIERS))
def test_drift_on_the_recipes_own_inputs_is_that_of_a_loop_over_single_ones(model_type: str, tmp_path: Path) -> None:
    made = write_inputs(tmp_path / "own.safetensors", model_type)
    gates = {"min_cosine": 0.01}
    recipe = write_recipe(
        tmp_path / "r.yaml", checkpoint(model_type), verify={"inputs": "own.safetensors"}, gates=gates
    )
    ended = run(recipe, tmp_path / "out")
    report = report_of(tmp_path / "out")
    drift = report["drift"]
    (name,) = made
    dense, slim = load(checkpoint(model_type)), load(tmp_path / "out" / "slim")
    cosines = []
    for one in made[name]:
        with torch.no_grad():
            states = [
                model.base_model(**{name: torch.from_numpy(one[None])}).last_hidden_state for model in (dense, slim)
            ]
        a, b = (state[0].double().mean(0).numpy() for state in states)
        cosines.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert drift["slim"]["cosine"] == pytest.approx(np.mean(cosines), abs=1e-6)
    assert drift["slim"]["cosine_min"] == pytest.approx(min(cosines), abs=1e-6)
    assert (drift["sample"], drift["texts"], drift["tokens"]) == ("own.safetensors", 5, None)
    assert len(drift["random_control"]["figures"]) == 3 and drift["beats_random"] is not None
    assert len({figures["cosine"] for figures in drift["random_control"]["figures"]}) == 3
    assert [gate["measured"] for gate in report["gates"]] == [drift["slim"]["cosine"]] and ended.code == 0
    for name in ("report.md", "report.html", "slim/README.md"):
        page = (tmp_path / "out" / name).read_text()
        assert f"5 {NOUNS[model_type]}s" in page and " texts" not in page and "tokens" not in page.split("Drift")[-1]
    assert f"own.safetensors (5 {NOUNS[model_type]}s)" in ended.out + ended.err


def test_other_inputs_are_measured_again_and_the_same_are_not(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint("vit"), verify={"inputs": "own.safetensors"})
    found = []
    for seed in (0, 0, 1):
        write_inputs(tmp_path / "own.safetensors", "vit", seed=seed)
        assert run(recipe, tmp_path / "out").code == 0
        found.append((reused(report_of(tmp_path / "out"))["verify"], report_of(tmp_path / "out")["drift"]["slim"]))
    assert [again for again, _ in found] == [False, True, False]
    assert found[0][1] == found[1][1] != found[2][1]


@pytest.mark.parametrize(
    "model_type,sections,said",
    [
        ("vit", {"verify": {"text": "own.txt"}}, "it is fed images"),
        ("wav2vec2", {"verify": {"text": "own.txt"}}, "it is fed recordings"),
        ("bert", {"verify": {"inputs": "own.safetensors"}}, "it is fed texts"),
        ("vit", {"gates": {"min_cosine": 0.9}}, "no built-in sample of images"),
        ("vit", {"verify": {"inputs": "none.safetensors"}}, "cannot be read"),
    ],
    ids=["text to images", "text to sound", "inputs to texts", "a gate on nothing", "no file"],
)
def test_a_sample_of_another_kind_and_a_gate_without_one_end_before_any_work(
    model_type: str, sections: dict[str, Any], said: str, tmp_path: Path
) -> None:
    (tmp_path / "own.txt").write_text("the a of\n")
    write_inputs(tmp_path / "own.safetensors", "vit")
    ended = run(write_recipe(tmp_path / "r.yaml", checkpoint(model_type), **sections), tmp_path / "out")
    assert ended.code == 2 and said in ended.err
    assert "r.yaml:" in ended.err or "none.safetensors" in ended.err
    assert not (tmp_path / "out").exists()


def test_images_that_the_model_does_not_take_are_named_with_its_own_words(tmp_path: Path) -> None:
    save_file({"pixel_values": np.zeros((2, 3, 12, 12), np.float32)}, tmp_path / "own.safetensors")
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint("vit"), verify={"inputs": "own.safetensors"})
    ended = run(recipe, tmp_path / "out")
    assert ended.code == 2 and "own.safetensors" in ended.err and "30*30" in ended.err


def test_plan_init_and_bench_know_that_images_have_no_length(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint("vit"), bench={"shapes": [[1, 8], [1, 64], [2, 8]]})
    planned = slimheads("plan", recipe)
    assert planned.code == 0 and "FLOPs at batch 2" in planned.out
    assert slimheads("plan", recipe, "--json").json["shape"] == [2]
    started = slimheads("init", checkpoint("vit"))
    assert "inputs:" in started.out and "text:" not in started.out and "min_cosine" in started.out
    (tmp_path / "new.yaml").write_text(started.out)
    assert Recipe.read(tmp_path / "new.yaml") == Recipe(model=str(checkpoint("vit")), task="image-classification")
    assert "inputs: null" not in slimheads("init", checkpoint()).out
    assert run(recipe, tmp_path / "out").code == 0
    graphs = [tmp_path / "out" / side / "onnx" / "model.onnx" for side in ("dense", "slim")]
    ended = slimheads("bench", *graphs, "--shape", "1x8", "--shape", "1x64", "--min-seconds", "0.05", "--json")
    assert ended.code == 0, ended.err
    assert [row["shape"] for row in json.loads(ended.out)] == [[1]]
