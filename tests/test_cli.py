"""The command: clean data on stdout, one line for a failure on stderr, and the contract's exit codes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import onnxruntime
import pytest
from jsonschema import Draft202012Validator
from ruamel.yaml import YAML
from whole_runs import (
    BERT_SITES,
    Ended,
    checkpoint,
    finished,
    measured,
    report_of,
    slimheads,
    steady,
    tree,
    visible,
    write_recipe,
)

from slimheads import __version__
from slimheads.cli import app
from slimheads.errors import EnvironmentLackError
from slimheads.latency import bench as measuring
from slimheads.models.loading import load
from slimheads.pipeline.stages import bench as bench_stage
from slimheads.pruning.scoring.score import score
from slimheads.recipe.recipe import Recipe

COMMANDS = ("run", "plan", "score", "profile", "bench", "init", "families", "schema", "doctor")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    steady(monkeypatch)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "r.yaml")


def failed(ended: Ended, code: int) -> str:
    """The one line of a command that ended with this code."""
    assert ended.code == code, ended
    assert ended.out == ""
    (line,) = ended.complaints
    assert line.startswith("slimheads: ")
    assert "; " in line  # what to do follows what went wrong
    return line.removeprefix("slimheads: ")


# Help and usage


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, **options)


def test_help_is_quick_to_load() -> None:
    """`--help` must not wait for torch, nor for anything else that takes seconds to import."""
    heavy = ("torch", "transformers", "onnx", "onnxruntime", "optimum", "scipy", "matplotlib", "numpy")
    code = f"""
import sys
from slimheads.cli import main
try:
    main(sys.argv[1:])
finally:
    print(sorted(set({heavy!r}) & set(sys.modules)), file=sys.stderr)
"""
    for arguments in (["--help"], ["run", "--help"], ["--version"], ["schema"], ["run", "no.yaml", "--until"]):
        ended = python("-c", code, *arguments)
        assert ended.stderr.splitlines()[-1] == "[]", arguments


def test_help_names_every_command_and_exit_code() -> None:
    for arguments in ([], ["--help"], ["--debug"]):
        ended = slimheads(*arguments)
        assert (ended.code, ended.err) == (0, "")
        assert all(command in ended.out for command in COMMANDS)
        assert all(f"{code} " in ended.out for code in range(8)) and "130/143" in ended.out
    assert {command.callback.__name__ for command in app.registered_commands if command.callback} == set(COMMANDS)
    for command in COMMANDS:
        assert slimheads(command, "--help").code == 0


def test_version() -> None:
    assert slimheads("--version") == Ended(0, f"{__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope"], "'nope'"),
        (["--nope"], "--nope"),
        (["run"], "RECIPE"),
        (["run", "r.yaml", "--nope"], "--nope"),
        (["run", "r.yaml", "--set"], "--set"),
        (["run", "r.yaml", "more"], "more"),
        (["bench", "a.onnx"], "B.onnx"),
        (["bench", "a.onnx", "b.onnx", "--threads", "0"], "--threads"),
        (["bench", "a.onnx", "b.onnx", "--threads", "two"], "--threads"),
        (["bench", "a.onnx", "b.onnx", "--shape", "1"], "'1'"),
        (["bench", "a.onnx", "b.onnx", "--shape", "1x0"], "'1x0'"),
        (["bench", "a.onnx", "b.onnx", "--shape", "1x-8"], "'1x-8'"),
        (["bench", "a.onnx", "b.onnx", "--min-seconds", "0"], "min_seconds"),
        (["bench", "a.onnx", "b.onnx", "--min-seconds", "nan"], "min_seconds"),
        (["bench", "a.onnx", "b.onnx", "--min-seconds", "inf"], "min_seconds"),
        (["bench", "a.onnx", "b.onnx"], "a.onnx"),
        (["bench", "a.onnx", "b.onnx", "--provider", "tpu"], "tpu"),
        (["score", "./nowhere"], "./nowhere"),
        (["init", "./nowhere"], "./nowhere"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in failed(slimheads(*arguments), 2)
    assert not list(tmp_path.iterdir())


# Recipes that cannot be


@pytest.mark.parametrize(
    ("text", "where", "said"),
    [
        ("model: M\nselect:\n  rato: 0.5\n", ":3:3", "did you mean ratio?"),
        ("model: M\nselct: {ratio: 0.5}\n", ":2:1", "did you mean select?"),
        ("model: M\nselect: {ratio: 1.0}\n", ":2:17", "less than 1"),
        ("model: M\nselect: {ratio: -0.1}\n", ":2:17", "greater than or equal to 0"),
        ("model: M\nselect: {ratio: half}\n", ":2:17", "should be a number"),
        ("model: M\nmodel: M\n", ":2:1", "model"),
        ("model: M\nselect:\n  ratio: 0.5\n  keep_at_least: 3\n", ":3:10", "use a ratio of at most 0.25"),
        ("model: M\nselect: {ratio: 0.01}\n", ":2:17", "removes nothing"),
        ("model: M\ntask: translation\n", ":2:7", "task"),
        ("model: M\nbench:\n  shapes: [[1, 8], [1, 1000]]\n", ":3:11", "longer than the 160 positions"),
        ("model: ./nowhere\n", "", "./nowhere"),
        ("select: {ratio: 0.5}\n", "", "model is missing"),
        ("model: [\n", ":", "r.yaml"),
        ("", "", "r.yaml"),
    ],
)
def test_a_wrong_recipe_is_one_line_with_its_place(text: str, where: str, said: str, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text.replace("model: M", f"model: {checkpoint()}"))
    line = failed(slimheads("run", recipe, "--out", tmp_path / "out"), 2)
    assert said in line
    assert f"r.yaml{where}" in line or not where
    assert failed(slimheads("plan", recipe), 2) == line
    assert failed(slimheads("run", recipe, "--out", tmp_path / "out", "--dry-run"), 2) == line
    assert not (tmp_path / "out").exists() or visible(tmp_path / "out") == set()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("select.rato=0.5", "did you mean ratio?"),
        ("select.ratio", "key=value"),
        ("=1", "key=value"),
        ("select.ratio=1", "less than 1"),
        ("select.ratio=[", "--set select.ratio=["),
        ("model.name=x", "model holds no keys"),
    ],
)
def test_a_wrong_override_is_one_line_that_repeats_it(override: str, said: str, recipe: Path) -> None:
    line = failed(slimheads("run", recipe, "--set", override), 2)
    assert line.startswith("--set ") and override in line and said in line


def test_a_missing_recipe_and_an_unknown_stage(recipe: Path) -> None:
    assert "missing.yaml: cannot be read: No such file" in failed(slimheads("run", "missing.yaml"), 2)
    for option in ("--from", "--until"):
        line = failed(slimheads("run", recipe, option, "prun"), 2)
        assert line.startswith(f"{option}: there is no stage 'prun'") and "prune" in line


def test_an_output_folder_that_holds_the_user_s_own_slim_is_left_alone(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "slim").mkdir(parents=True)
    (tmp_path / "out" / "slim" / "thesis.txt").write_text("mine")
    assert "was not made by slimheads" in failed(slimheads("run", recipe, "--out", tmp_path / "out"), 2)
    assert (tmp_path / "out" / "slim" / "thesis.txt").read_text() == "mine"


# Internal errors


@pytest.mark.parametrize("place", [0, 1, 2, 4])
def test_debug_shows_the_traceback_wherever_it_stands(
    place: int, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def buggy(*_: object) -> None:
        raise KeyError("first line\nsecond line")

    monkeypatch.setattr("slimheads.pipeline.preview.find", buggy)
    arguments = ["plan", str(recipe), "--set", "select.ratio=0.25"]
    line = failed(slimheads(*arguments), 1)
    assert line.startswith("internal error: KeyError:") and "--debug" in line
    ended = slimheads(*arguments[:place], "--debug", *arguments[place:])
    assert ended.code == 1
    assert "Traceback (most recent call last)" in ended.err and "in buggy" in ended.err
    assert ended.complaints[-1] == f"slimheads: {line}"


def test_debug_does_not_change_the_exit_code(recipe: Path) -> None:
    ended = slimheads("plan", recipe, "--set", "select.rato=1", "--debug")
    assert ended.code == 2
    assert "Traceback" in ended.err and "did you mean ratio?" in ended.complaints[-1]


def test_running_out_of_memory_is_the_environment_s_lack(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("slimheads.pipeline.preview.find", hungry)
    assert "out of memory" in failed(slimheads("plan", recipe), 5)


# run


def test_a_run_prints_its_verdict_and_keeps_progress_off_stdout(recipe: Path, tmp_path: Path) -> None:
    ended = slimheads("run", recipe, "--out", tmp_path / "out")
    assert (ended.code, ended.complaints) == (0, [])
    assert ended.out.startswith("Passed")
    assert str(tmp_path / "out" / "report.html") in ended.out
    stages = ["load", "score", "select", "prune", "recover", "export", "verify", "bench"]
    starts, ends = ended.err.splitlines()[::2], ended.err.splitlines()[1::2]
    assert [line.split()[:2] for line in starts] == [[stage, "starts:"] for stage in stages]
    assert [line.split()[0] for line in ends] == stages and not any("starts" in line for line in ends)
    second = slimheads("run", recipe, "--out", tmp_path / "out")
    assert all("reused" in line for line in second.err.splitlines()) and second.code == 0


def test_json_of_a_run_is_its_report(recipe: Path, tmp_path: Path) -> None:
    ended = slimheads("run", recipe, "--out", tmp_path / "out", "--json")
    assert ended.code == 0
    assert ended.json == report_of(tmp_path / "out")


def test_json_of_an_unmet_gate_is_on_stdout_and_the_reasons_on_stderr(recipe: Path, tmp_path: Path) -> None:
    ended = slimheads(
        "run",
        recipe,
        "--out",
        tmp_path / "out",
        "--json",
        "--set",
        "gates.size_ratio=0.1",
        "--set",
        "gates.latency_ratio=0.1",
    )
    assert ended.code == 7
    assert ended.json["verdict"]["exit_code"] == 7
    for line, gate in zip(ended.complaints, ("latency_ratio", "size_ratio"), strict=True):
        assert line.startswith(f"slimheads: --set gates.{gate}=0.1: gate {gate} was not met: ")


def test_the_report_s_command_runs_again(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "my out"
    slimheads("run", recipe, "--out", out, "--set", "select.ratio=0.25", "--set", "task=auto")
    program, *arguments = shlex.split(report_of(out)["command"])
    assert program == "slimheads"
    ended = slimheads(*arguments)
    assert ended.code == 0
    assert all("reused" in line for line in ended.err.splitlines())
    assert report_of(out)["recipe"]["select"]["ratio"] == 0.25


def test_the_output_folder_is_named_after_the_recipe(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = slimheads("run", recipe, "--until", "select")
    assert (ended.code, ended.out) == (0, "")
    assert visible(tmp_path / "runs" / "r") == {"recipe.yaml", "scores.json", "plan.json"}
    assert "stopped after select" in ended.err


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(recipe: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    people, data = (
        slimheads("run", recipe, "--out", tmp_path / "out", "--dry-run", *more) for more in ([], ["--json"])
    )
    assert tree(tmp_path) == before
    assert (people.code, data.code, people.err, data.err) == (0, 0, "", "")
    assert set(data.json["stages"].values()) == {"run"} and "bench" in data.json["stages"]
    assert data.json["slim"]["heads"] == 6
    assert "encoder.layer.0.attention" in people.out and "export" in people.out
    plan = slimheads("plan", recipe, "--json")
    assert {**plan.json, "stages": data.json["stages"]} == data.json


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="CUDA is not missing here")
def test_skipping_a_missing_provider_reports_not_measured(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_stage, "bench", measuring.bench)
    cuda = ["--set", "bench.providers=[cuda]"]
    line = failed(slimheads("run", recipe, "--out", tmp_path / "out", *cuda), 5)
    assert line.startswith("--set bench.providers=[cuda]: ") and "no CUDAExecutionProvider" in line
    assert not (tmp_path / "out").exists()
    ended = slimheads("run", recipe, "--out", tmp_path / "out", *cuda, "--set", "bench.on_missing=skip", "--json")
    assert ended.code == 0, ended.err
    (row,) = ended.json["latency"]
    assert (row["verdict"], row["provider"], row["speedup"], row["dense"]) == ("not measured", "cuda", None, None)
    assert row["reason"]
    gated = slimheads(
        "run",
        recipe,
        "--out",
        tmp_path / "out",
        *cuda,
        "--set",
        "bench.on_missing=skip",
        "--set",
        "gates.latency_ratio=0.9",
    )
    assert gated.code == 7


def test_a_package_that_is_not_installed(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", "pkg://no_such_package_here/model")
    line = failed(slimheads("run", recipe, "--out", tmp_path / "out"), 5)
    assert "no_such_package_here" in line and "pip install" in line


# The other commands


def test_plan_for_people_and_for_programs(recipe: Path) -> None:
    people, data = slimheads("plan", recipe, "--set", "select.ratio=0.25"), slimheads("plan", recipe, "--json")
    assert (people.code, data.code, people.err, data.err) == (0, 0, "", "")
    assert data.json["plan"]["format"] == 2
    assert data.json["kinds"] == {"attention": {"unit": "head", "sites": 3, "total": 12, "kept": 6, "removed": 6}}
    assert (data.json["dense"]["heads"], data.json["slim"]["heads"]) == (12, 6)
    assert "FLOPs at 1x8" in people.out and re.search(r"heads +12 +9 +.25\.0%", people.out)


def test_score_for_people_and_for_programs() -> None:
    people, data = slimheads("score", checkpoint()), slimheads("score", checkpoint(), "--json")
    assert (people.code, data.code, people.err, data.err) == (0, 0, "", "")
    assert set(data.json) == {"format", "method", "sites"} and data.json["format"] == 2
    expected = [list(site.scores) for site in score(load(checkpoint())).sites]
    blocks = [name.removesuffix(".attention") for name in BERT_SITES]
    assert [site["site"] for site in data.json["sites"]] == [*BERT_SITES, *blocks]
    assert [site["unit"] for site in data.json["sites"]] == ["head"] * 3 + ["neuron"] * 3
    assert [site["scores"] for site in data.json["sites"]] == expected
    assert data.json["sites"][:3] == json.loads((finished() / "scores.json").read_text())["sites"]
    rows = people.out.splitlines()
    assert len(rows) == 1 + 6  # a header and a line a site, however long
    weakest = min(range(4), key=expected[0].__getitem__)
    assert rows[1].split()[:3] == [BERT_SITES[0], "head", str(weakest)]


def test_score_takes_a_task() -> None:
    assert "unknown task" in failed(slimheads("score", checkpoint(), "--task", "poetry"), 2)
    data = slimheads("score", checkpoint("gpt2"), "--task", "feature-extraction", "--json")
    assert data.json["sites"][0]["site"] == "h.0.attn"


def test_bench_for_people_and_for_programs() -> None:
    graph = finished() / "slim" / "onnx" / "model.onnx"
    options = ["--shape", "1x4", "--shape", "2X8", "--threads", "1", "--min-seconds", "0.01"]
    data = slimheads("bench", graph, graph, *options, "--json")
    assert data.code == 0 and data.complaints == []
    assert [row["shape"] for row in data.json] == [[1, 4], [2, 8]]
    for row in data.json:
        assert row["control"]["low"] <= row["control"]["estimate"] <= row["control"]["high"]
        assert row["dense"]["runs"] >= 30
    people = slimheads("bench", graph, graph, "--shape", "1x4", "--min-seconds", "0.01")
    assert people.code == 0 and "1x4" in people.out and "control" in people.out


def test_bench_decodes_after_a_past() -> None:
    graph = finished("gpt2") / "slim" / "onnx" / "model.onnx"
    options = ["--shape", "1x1x32", "--shape", "1x8", "--min-seconds", "0.01"]
    decode, prefill = slimheads("bench", graph, graph, *options, "--json").json
    assert (decode["shape"], prefill["shape"]) == ([1, 1, 32], [1, 8])
    assert decode["slim"]["tokens_per_second"] and decode["cache_bytes_per_token"]["slim"]
    people = slimheads("bench", graph, graph, *options).out
    assert "decode 1x1 after 32" in people and "prefill 1x8" in people and "tokens per second" in people


@pytest.mark.parametrize("ending", ["svg", "PNG"])
def test_bench_draws_only_where_it_is_asked_to(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    graph, picture = finished() / "slim" / "onnx" / "model.onnx", tmp_path / f"samples.{ending}"
    quick = ["--shape", "1x4", "--min-seconds", "0.01"]
    assert slimheads("bench", graph, graph, *quick).code == 0 and not list(tmp_path.iterdir())
    assert slimheads("bench", graph, graph, *quick, "--plot", picture).code == 0
    assert picture.read_bytes().startswith(b"<?xml" if ending == "svg" else b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--plot", "samples.pdf"], ".svg or .png"),
        (["--plot", "missing/samples.svg"], "no such folder"),
        (["--max-ratio", "nan"], "no latency ratio"),
        (["--max-ratio", "0"], "no latency ratio"),
    ],
)
def test_bench_refuses_a_picture_or_a_gate_that_cannot_be_before_it_measures(options: list[str], said: str) -> None:
    graph = finished() / "slim" / "onnx" / "model.onnx"
    with mock.patch("slimheads.latency.sampling.measure", side_effect=AssertionError):
        assert said in failed(slimheads("bench", graph, graph, *options), 2)


@pytest.mark.parametrize(
    ("verdict", "estimate", "limit", "code"),
    [
        ("faster", 1.25, 0.85, 0),
        ("faster", 1.25, 0.75, 7),
        ("no difference shown", 1.0, 1.05, 0),
        ("no difference shown", 1.2, 0.95, 7),
        ("inconclusive", 1.25, 2.0, 7),
        ("inconclusive", 1.25, None, 0),
        ("slower", 0.5, None, 0),
    ],
)
def test_bench_ends_with_7_only_where_a_gate_was_asked_for_and_not_conclusively_met(
    verdict: str, estimate: float, limit: float | None, code: int
) -> None:
    options = [] if limit is None else ["--max-ratio", limit]
    with mock.patch.object(measuring, "bench", lambda *_, **__: (measured(verdict, estimate),)):
        ended = slimheads("bench", "a.onnx", "b.onnx", *options)
    assert ended.code == code, ended.err
    assert verdict in ended.out
    if code:
        (line,) = ended.complaints
        assert (
            f"--max-ratio {limit}" in line and "1x8" in line and ("noisy" in ended.out) == (verdict == "inconclusive")
        )


def test_bench_refuses_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no graph")
    line = failed(slimheads("bench", tmp_path / "text.onnx", tmp_path / "text.onnx"), 2)
    assert "text.onnx" in line


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_init_writes_a_recipe_that_works(model_type: str, tmp_path: Path) -> None:
    printed = slimheads("init", checkpoint(model_type))
    assert (printed.code, printed.err) == (0, "")
    path = tmp_path / "new.yaml"
    assert slimheads("init", checkpoint(model_type), "--out", path) == Ended(0, "", "")
    assert path.read_text() == printed.out
    recipe = Recipe.read(path)
    assert recipe.model == str(checkpoint(model_type))
    assert "3 attention blocks of 4 heads" in printed.out
    planned = slimheads("plan", path, "--json")
    assert planned.code == 0 and planned.json["slim"]["heads"] == 9
    path.write_text("mine")
    assert "File exists" in failed(slimheads("init", checkpoint(model_type), "--out", path), 2)
    assert path.read_text() == "mine"


def test_families_for_people_and_for_programs() -> None:
    people, data = slimheads("families"), slimheads("families", "--json")
    assert (people.code, data.code, people.err, data.err) == (0, 0, "", "")
    covered = {model_type for row in data.json for model_type in row["model_types"]}
    assert {"bert", "roberta", "distilbert", "electra", "gpt2", "llama", "mistral", "qwen2"} <= covered
    assert all(row["family"] in people.out for row in data.json)
    assert all(re.search(rf"^{re.escape(name)} ", people.out, re.M) for name in covered)
    assert max(map(len, people.out.splitlines())) <= 100


def test_schema_accepts_what_the_reader_accepts() -> None:
    ended = slimheads("schema")
    assert (ended.code, ended.err) == (0, "")
    Draft202012Validator.check_schema(ended.json)
    schema = Draft202012Validator(ended.json)
    for path in [*Path(__file__).parent.parent.joinpath("pipelines").glob("*.yaml"), finished() / "recipe.yaml"]:
        assert not list(schema.iter_errors(YAML(typ="safe").load(path.read_text()))), path
    assert list(schema.iter_errors({"model": "m", "selct": {}}))


def test_doctor_for_people_and_for_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    from slimheads.runtime import doctor

    people, data = slimheads("doctor"), slimheads("doctor", "--json")
    names = {check["name"] for check in data.json}
    assert {"python", "torch", "onnxruntime", "memory", "disk"} <= names
    assert all(set(check) == {"name", "ok", "found", "expected", "hint"} for check in data.json)
    assert all(name in people.out for name in names)
    lacking = [check for check in data.json if not check["ok"]]
    assert data.code == (5 if lacking else 0)
    monkeypatch.setattr(doctor, "MIN_DISK", 2**70)
    ended = slimheads("doctor", "--json")
    assert ended.code == EnvironmentLackError.exit_code
    assert any(check["name"] == "disk" and not check["ok"] for check in ended.json)
    assert len(ended.complaints) == 1 and "disk" in ended.complaints[0]


# stdout


@pytest.mark.parametrize("arguments", [["schema"], pytest.param(["families"], marks=pytest.mark.slow)])
def test_a_reader_that_leaves_early_is_no_failure(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "slimheads", *arguments]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, "")
