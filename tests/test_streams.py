"""Readers that leave (`| head`) and streams that are closed, with real processes and pipes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import Forks, Stdout
from whole_runs import checkpoint, write_recipe

from slimheads.exporting.export import export
from slimheads.models.loading import load

COMMAND = [sys.executable, "-m", "slimheads"]
CHEAP = (("help of a command", "| true"), ("schema", "| head -1"), *((n, ">&-") for n in ("version", "help", "schema")))


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """A line for bash; `slimheads` is this environment's, and the exit code is the first command's."""
    script = f'slimheads() {{ {shlex.join(COMMAND)} "$@"; }}; {line}; exit ${{PIPESTATUS[0]}}'
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("streams")
    export(load(checkpoint()), home / "onnx", task="feature-extraction")
    recipe, graph = write_recipe(home / "r.yaml"), home / "onnx" / "model.onnx"
    bench = f"bench {graph} {graph} --shape 1x8 --min-seconds 0.05 --threads 1"
    gate = json.dumps({"size_ratio": 0.01})
    return {
        "families": "families",
        "families as JSON": "families --json",
        "families as Markdown": "families --markdown",
        "schema": "schema",
        "version": "--version",
        "help": "--help",
        "help of a command": "run -h",
        "score": f"score {checkpoint()}",
        "plan": f"plan {recipe} --json",
        "doctor": "doctor",
        "init": f"init {checkpoint()}",
        "bench": f"{bench} --json",
        "run": f"run {recipe} --out {home / 'out'} --set {shlex.quote('gates=' + gate)}",
    }


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with Forks(tmp_path_factory.mktemp("forks")) as made:
        yield made


def test_a_command_whose_reader_leaves_ends_quietly(subjects: dict[str, str], forks: Forks) -> None:
    leaves: dict[Stdout, tuple[str, ...]] = {
        "gone": ("doctor", "families", "score", "plan", "init", "bench"),
        "after a line": ("families as JSON", "families as Markdown"),
        "closed": ("families",),
    }
    for stdout, names in leaves.items():
        for name in names:
            ended = forks.run(*shlex.split(subjects[name]), stdout=stdout)
            assert ended.returncode == 0, f"{name}, {stdout}: {ended.stderr}"
            left = [line for line in ended.stderr.splitlines() if not line.startswith("bench    ")]
            assert left == [], f"{name}, {stdout}"


@pytest.mark.parametrize("name,away", CHEAP)
def test_a_command_whose_reader_leaves_ends_quietly_in_a_shell(name: str, away: str, subjects: dict[str, str]) -> None:
    ended = shell(f"slimheads {subjects[name]} {away}")
    assert ended.returncode == 0, ended.stderr
    assert [line for line in ended.stderr.splitlines() if not line.startswith("bench    ")] == []


def test_the_verdict_of_a_run_stays_its_exit_code(subjects: dict[str, str], forks: Forks) -> None:
    ways: tuple[tuple[Stdout, bool], ...] = (("gone", False), ("gone", True), ("closed", False))
    for stdout, merged in ways:
        ended = forks.run(*shlex.split(subjects["run"]), stdout=stdout, merged=merged)
        assert ended.returncode == 7, f"{stdout}: {ended.stderr}"
        assert "Traceback" not in ended.stderr and "BrokenPipe" not in ended.stderr, stdout


def test_an_output_that_cannot_be_written_is_told(subjects: dict[str, str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    ended = shell(f"slimheads {subjects['schema']} > /dev/full")
    assert ended.returncode == 5
    assert (
        ended.stderr
        == f"slimheads: stdout: cannot be written ({os.strerror(28)}); free some space, or send it elsewhere\n"
    )
