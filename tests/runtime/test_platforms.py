"""Systems that lack what Linux has: the modules `resource` and `fcntl`, and flushing a folder to the disk."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from whole_runs import write_recipe

from slimheads import files as disk
from slimheads.runtime import memory

# Commands one after the other in a Python that has neither module: importing a name that is None fails.
WITHOUT = """
import json, sys
sys.modules.update(dict.fromkeys(("resource", "fcntl")))
from slimheads.cli import main
for command in json.loads(sys.argv[1]):
    try:
        main(command)
    except SystemExit as end:
        assert end.code == 0, command
"""


def test_a_plan_a_run_and_a_bench_do_without_resource_and_fcntl(tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path / "r.yaml"), tmp_path / "out"
    graphs = [out / side / "onnx" / "model.onnx" for side in ("dense", "slim")]
    commands = [
        ("plan", recipe),
        ("run", recipe, "--out", out),
        ("bench", *graphs, "--shape", "1x8", "--min-seconds", "0.05", "--threads", "1"),
    ]
    asked = json.dumps([[str(argument) for argument in command] for command in commands])
    ended = subprocess.run([sys.executable, "-c", WITHOUT, asked], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert (out / "report.json").is_file()


def test_memory_is_told_without_resource_and_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    total = memory.total_bytes()
    monkeypatch.setattr(memory, "resource", None)
    assert memory.PeakMemory().megabytes() > 10
    monkeypatch.setattr(memory, "psutil", None)
    assert memory.total_bytes() == total
    assert memory.available_bytes() <= total


def test_a_folder_that_cannot_be_flushed_is_passed_over_and_a_file_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    file = tmp_path / "file"
    file.write_bytes(b"x")
    for name in ("open", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, refused)
            disk.sync(tmp_path)
            with pytest.raises(OSError, match="Invalid argument"):
                disk.sync(file)
