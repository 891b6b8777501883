"""The peak memory of a stretch of work, and the memory that is a file's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from slimheads.runtime.memory import MappedFiles

TAKEN = 96  # MiB


# In a process of its own: what other tests left to be cleared away would count too, and a busy machine takes pages of
# libraries away meanwhile. `take` uses memory and gives it back: such a block goes straight to and from the system.
PEAKS = f"""
from slimheads.runtime.memory import PeakMemory
def take():
    block = bytearray({TAKEN} * 2**20)
    block[::4096] = b"x" * len(block[::4096])
"""


def peaks(code: str) -> list[float]:
    ended = subprocess.run([sys.executable, "-c", PEAKS + code], capture_output=True, text=True, check=True)
    return [float(figure) for figure in ended.stdout.split()]


def test_what_was_taken_and_given_back_is_in_the_peak() -> None:
    before, after = peaks("memory = PeakMemory(); print(memory.megabytes()); take(); print(memory.megabytes())")
    assert 1 < before < TAKEN <= after < 3 * TAKEN  # MiB, not KiB or bytes


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is the process's since it began")
def test_a_new_stretch_starts_without_the_last_ones_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        pytest.skip("this system does not let a process start a new peak")
    low, high, again = peaks(
        "take(); first = PeakMemory(); low = first.megabytes(); take(); high = first.megabytes()\n"
        "print(low, high, PeakMemory().megabytes())"
    )
    assert max(low, again) < TAKEN <= high


def resident_kib(path: Path) -> int:
    """What of the file's bytes is resident in this process, by the kernel's own account."""
    lines = Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines()
    starts = [at for at, line in enumerate(lines) if line.endswith(str(path))]
    return sum(int(next(line for line in lines[at:] if line.startswith("Rss:")).split()[1]) for at in starts)


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
    assert resident_kib(path) > 0
    files.release(weight.data_ptr(), size)
    assert resident_kib(path) < 64  # what shares its first and last page with other bytes of the file
    assert torch.equal(weight, written)
    with pytest.raises(ValueError, match="not inside one of the files"):  # that memory would be lost
        files.release(written.data_ptr(), size)
    with pytest.raises(ValueError, match="not inside one of the files"):
        files.release(weight.data_ptr(), size + 2**30)
