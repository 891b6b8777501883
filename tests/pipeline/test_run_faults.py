"""Runs that go wrong: refused models, a broken proof, a busy folder, signals. Nothing half-made may pass for whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from whole_runs import (
    STAGES,
    Ended,
    checkpoint,
    corrupting,
    report_of,
    reused,
    slimheads,
    steady,
    tree,
    visible,
    write_recipe,
)

from slimheads.pipeline.stages import export as export_stage
from slimheads.pipeline.stages import prune as prune_stage
from slimheads.pipeline.stages import score as score_stage
from slimheads.recipe.sections import Export

AS_SHIPPED = {"candidates": list(Export().candidates)}
WEIGHT = "encoder.layer.1.attention.self.key.weight"
HOLDER = """
import sys, time
from pathlib import Path
from slimheads.output.store import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    steady(monkeypatch)


def failed(ended: Ended, code: int) -> str:
    """The one line of a run that ended with this code."""
    assert ended.code == code, ended
    (line,) = ended.complaints
    return line


# Exit code 3: the model


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def set_weight(value: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[WEIGHT][3, 3] = value
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


def without_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[WEIGHT]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def set_config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return damage


def no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (only_pickles, "pytorch_model.bin: pickled weights are refused"),
        (no_weights, "there is no model.safetensors"),
        (truncated, "model.safetensors: damaged weights"),
        (set_weight(torch.nan), f"{WEIGHT}: the tensor holds NaN or infinity"),
        (set_weight(-torch.inf), f"{WEIGHT}: the tensor holds NaN or infinity"),
        (without_a_weight, WEIGHT),
        (set_config(model_type="perceiver"), "perceiver"),
        (set_config(model_type="no-such-model"), "no-such-model"),
        (set_config(model_type=None), "no model_type"),
        (set_config(num_attention_heads=0), "config.json"),
        (set_config(num_attention_heads=5), "config.json"),
        (set_config(_attn_implementation_internal="someone/kernel"), "_attn_implementation_internal"),
        (no_json, "config.json: not readable as JSON"),
    ],
)
def test_a_model_that_is_refused(damage: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    shutil.copytree(checkpoint(), tmp_path / "model")
    damage(tmp_path / "model")
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "model")
    ended = slimheads("run", recipe, "--out", tmp_path / "out", "--json")
    assert said in failed(ended, 3)
    assert ended.out == ""
    assert not (tmp_path / "out").exists() or visible(tmp_path / "out") == set()
    assert said in failed(slimheads("score", tmp_path / "model"), 3)


def test_a_model_that_is_refused_leaves_an_earlier_result_alone(tmp_path: Path) -> None:
    shutil.copytree(checkpoint(), tmp_path / "model")
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "model")
    assert slimheads("run", recipe, "--out", tmp_path / "out").code == 0
    before = {name: content for name, content in tree(tmp_path / "out").items() if not name.startswith(".")}
    truncated(tmp_path / "model")
    failed(slimheads("run", recipe, "--out", tmp_path / "out"), 3)
    assert {name: content for name, content in tree(tmp_path / "out").items() if not name.startswith(".")} == before


# Exit code 4: the certificate


def test_a_corrupted_slim_model_is_never_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, out = write_recipe(tmp_path / "r.yaml", export=AS_SHIPPED), tmp_path / "out"
    assert slimheads("run", recipe, "--out", out).code == 0
    assert (out / "slim").is_dir()
    with monkeypatch.context() as patch:
        patch.setattr(prune_stage, "save", corrupting)
        ended = slimheads("run", recipe, "--out", out, "--from", "prune", "--json")
    line = failed(ended, 4)
    assert line.startswith("slimheads: link 1 (model.safetensors): gated dense torch == slim torch failed at batch")
    assert "differs beyond" in line
    assert ended.json["verdict"]["exit_code"] == report_of(out)["verdict"]["exit_code"] == 4
    assert not (out / "slim").exists()
    # Without the corruption's cause the stored stage is as corrupt as before, and is not taken for proven.
    assert failed(slimheads("run", recipe, "--out", out), 4) == line
    assert not (out / "slim").exists()
    assert slimheads("run", recipe, "--out", out, "--from", "prune").code == 0


def test_a_graph_of_another_model_fails_its_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = export_stage.export

    def swapping(model: Any, folder: Path, **options: Any) -> None:
        whole(model, folder, **options)
        if folder.parent.name == "slim":
            shutil.copy(folder.parent.parent / "dense" / "onnx" / "model.onnx", folder / "model.onnx")

    monkeypatch.setattr(export_stage, "export", swapping)
    ended = slimheads("run", write_recipe(tmp_path / "r.yaml", export=AS_SHIPPED), "--out", tmp_path / "out")
    assert failed(ended, 4).startswith("slimheads: link 2 (onnx/model.onnx)")
    failing = [link["link"] for link in report_of(tmp_path / "out")["certificate"] if not link["passed"]]
    assert failing == [2, 4]
    assert not (tmp_path / "out" / "slim").exists()


# Exit code 6: another run


def test_a_busy_folder_is_left_to_its_run(tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path / "r.yaml"), tmp_path / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        before = tree(out)
        line = failed(slimheads("run", recipe, "--out", out, "--json"), 6)
        assert str(out) in line and f"process {holder.pid}" in line and "--out" in line
        assert holder.poll() is None
        assert tree(out) == before
        assert slimheads("run", recipe, "--out", out, "--dry-run").code == 0  # reads only
    finally:
        holder.kill()
        holder.communicate()
    assert slimheads("run", recipe, "--out", out, "--until", "score").code == 0


# Exit codes 130 and 143: signals


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "stage", "code"),
    [(signal.SIGINT, "export", 130), (signal.SIGTERM, "verify", 143), (signal.SIGKILL, "export", -signal.SIGKILL)],
)
def test_an_interrupted_run_publishes_nothing_and_is_taken_up_again(
    number: signal.Signals, stage: str, code: int, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    older = write_recipe(tmp_path / "older.yaml", select={"ratio": 0.25})
    assert slimheads("run", older, "--out", out).code == 0
    before = {name: content for name, content in tree(out).items() if not name.startswith(".")}
    recipe = write_recipe(tmp_path / "r.yaml")
    process = subprocess.Popen(
        [sys.executable, "-m", "slimheads", "run", str(recipe), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        seen = []
        for line in process.stderr:
            seen.append(line)
            if line.startswith(f"{stage:<8} starts"):
                break
        else:
            pytest.fail(f"the run ended before the stage {stage}: {seen}")
        while not list((out / ".slimheads").glob("tmp-*")):  # the stage's folder comes right after its line
            time.sleep(0.01)
        process.send_signal(number)
        told, rest = process.communicate()
    finally:
        process.kill()
    assert (process.returncode, told) == (code, "")
    left_over = list((out / ".slimheads").glob("tmp-*"))
    if number == signal.SIGKILL:
        assert left_over
    else:
        assert not left_over
        ended = Ended(code, told, rest)
        assert ended.complaints == [
            "slimheads: interrupted; nothing half-made was left, and finished stages will be reused"
        ]
    assert {name: content for name, content in tree(out).items() if not name.startswith(".")} == before
    assert slimheads("run", recipe, "--out", out).code == 0
    stored = reused(report_of(out))
    finished = STAGES[: STAGES.index(stage)]
    assert {name for name, again in stored.items() if again} == set(finished)
    assert not list((out / ".slimheads").glob("tmp-*"))


def test_a_signal_that_a_library_swallows_still_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = score_stage.score

    def swallowing(*given: Any) -> Any:
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(*given)

    recipe = write_recipe(tmp_path / "r.yaml")
    with monkeypatch.context() as patch:
        patch.setattr(score_stage, "score", swallowing)
        ended = slimheads("run", recipe, "--out", tmp_path / "out")
    assert "interrupted" in failed(ended, 143)
    assert visible(tmp_path / "out") == set()
    assert slimheads("run", recipe, "--out", tmp_path / "out").code == 0


@pytest.mark.slow
def test_a_whole_run_in_a_process_of_its_own_says_nothing_but_its_progress(tmp_path: Path) -> None:
    """No warning of a library, no progress bar: what is on stderr is ours, and stdout is one JSON document."""
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint("gpt2"), export={"precisions": ["fp32", "int8"]})
    command = [sys.executable, "-m", "slimheads", "run", str(recipe), "--out", str(tmp_path / "out"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    ended = Ended(done.returncode, done.stdout, done.stderr)
    assert (ended.code, ended.complaints) == (0, [])
    assert ended.json == report_of(tmp_path / "out")
