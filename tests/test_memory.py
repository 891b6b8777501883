"""The peak memory of a stretch of work."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from slimheads.memory import PeakMemory

TAKEN = 96  # MiB


def take() -> None:
    """Uses memory and gives it back: a block of this size goes straight to and from the system."""
    block = bytearray(TAKEN * 2**20)
    block[::4096] = b"x" * len(block[::4096])


def test_what_was_taken_and_given_back_is_in_the_peak() -> None:
    memory = PeakMemory()
    before = memory.megabytes()
    take()
    assert memory.megabytes() >= before + TAKEN - 8
    assert PeakMemory().megabytes() > 10  # MiB, not KiB or bytes: an interpreter with pytest
    assert memory.megabytes() < 100_000


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is the process's since it began")
def test_a_new_stretch_starts_without_the_last_ones_peak() -> None:
    take()
    first = PeakMemory()
    low = first.megabytes()
    take()
    high = first.megabytes()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        pytest.skip("this system does not let a process start a new peak")
    assert PeakMemory().megabytes() <= high - TAKEN + 8
    assert low <= high - TAKEN + 8
