"""The peak memory of a stretch of work, and the memory that is a file's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from slimheads.runtime.memory import MappedFiles, PeakMemory

TAKEN = 96  # MiB


def take() -> None:
    """Uses memory and gives it back: a block of this size goes straight to and from the system."""
    block = bytearray(TAKEN * 2**20)
    block[::4096] = b"x" * len(block[::4096])


def resident() -> float:
    return psutil.Process().memory_info().rss / 2**20


def test_what_was_taken_and_given_back_is_in_the_peak() -> None:
    memory = PeakMemory()
    before = memory.megabytes()
    take()
    assert memory.megabytes() >= before + TAKEN - 8
    assert PeakMemory().megabytes() > 10  # MiB, not KiB or bytes: an interpreter with pytest
    assert memory.megabytes() < 100_000


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is the process's since it began")
def test_a_new_stretch_starts_without_the_last_ones_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        pytest.skip("this system does not let a process start a new peak")
    # In a process of its own: what other tests left to be cleared away would count too.
    code = (
        "from slimheads.runtime.memory import PeakMemory\n"
        f"def take():\n    block = bytearray({TAKEN} * 2**20)\n    block[::4096] = b'x' * len(block[::4096])\n"
        "take(); first = PeakMemory(); low = first.megabytes(); take(); high = first.megabytes()\n"
        "print(low, high, PeakMemory().megabytes())"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    low, high, again = map(float, ended.stdout.split())
    assert again <= high - TAKEN + 8
    assert low <= high - TAKEN + 8


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it cannot be told where a file is mapped")
def test_what_was_read_of_a_file_can_be_given_back_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    written = torch.randn(TAKEN, 2**18)  # so many MiB
    save_file({"weight": written}, path)
    with safe_open(path, framework="pt") as file:
        weight = file.get_tensor("weight")
    size, files = weight.numel() * weight.element_size(), MappedFiles([path])
    assert files.hold(weight.data_ptr()) and not files.hold(written.data_ptr())
    assert torch.equal(weight, written)
    before = resident()
    files.release(weight.data_ptr(), size)
    assert resident() <= before - TAKEN + 8
    assert torch.equal(weight, written)
    with pytest.raises(ValueError, match="not inside one of the files"):  # that memory would be lost
        files.release(written.data_ptr(), size)
    with pytest.raises(ValueError, match="not inside one of the files"):
        files.release(weight.data_ptr(), size + 2**30)
