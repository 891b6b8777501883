"""Memory of the machine and of this process: its peak during some work, and mapped files.

Windows has no `resource`. If a Python on Linux lacks it, psutil cannot be imported either, and /proc has the same data.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

try:
    import resource
except ImportError:
    resource = None  # type: ignore[assignment]
try:
    import psutil
except ImportError:
    psutil = None  # type: ignore[assignment]


class PeakMemory:
    """Starts a new peak measurement on Linux; elsewhere the peak is that of the whole process so far."""

    def __init__(self) -> None:
        with suppress(OSError):  # not Linux, or not allowed: the peak then includes what was before
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def megabytes(self) -> float:
        """The peak since the start, in MiB."""
        if (peak := _proc("self/status", "VmHWM")) is not None:
            return round(peak / 2**20, 1)
        if resource is not None:
            usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return round(usage / (2**20 if sys.platform == "darwin" else 2**10), 1)
        found = psutil.Process().memory_info()
        return round(getattr(found, "peak_wset", found.rss) / 2**20, 1)


def total_bytes() -> int:
    """The machine's memory."""
    return int(psutil.virtual_memory().total) if psutil else _proc("meminfo", "MemTotal") or 0


def available_bytes() -> int:
    """Memory that could be allocated now without swapping."""
    return int(psutil.virtual_memory().available) if psutil else _proc("meminfo", "MemAvailable") or 0


def physical_cores() -> int | None:
    """The machine's cores without hyper-threads; None if unknown."""
    return psutil.cpu_count(logical=False) if psutil else None


def _proc(file: str, name: str) -> int | None:
    """The value of a line `name: 123 kB` in a file of /proc, in bytes; None if there is none."""
    path = Path("/proc", file)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


class MappedFiles:
    """The address ranges at which files are mapped into this process; none if there is no /proc."""

    def __init__(self, files: Iterable[Path]) -> None:
        names, maps = {str(file.resolve()) for file in files}, Path("/proc/self/maps")
        lines = (
            (line.split(maxsplit=5) for line in os.fsdecode(maps.read_bytes()).splitlines()) if maps.exists() else ()
        )
        spans = [parts[0].split("-") for parts in lines if len(parts) == 6 and parts[5] in names]
        self._spans = [(int(begin, 16), int(end, 16)) for begin, end in spans]

    def hold(self, address: int) -> bool:
        """Whether this address is inside one of the files."""
        return any(begin <= address < end for begin, end in self._spans)

    def release(self, address: int, size: int) -> None:
        """Frees the pages that are wholly inside these bytes of a file. The system reads them again when needed.

        Raises:
            ValueError: the bytes are not inside one of the files.
        """
        if not self.hold(address) or not self.hold(address + size - 1):
            raise ValueError("these bytes are not inside one of the files")
        begin, end = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE, (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            libc = ctypes.CDLL(None)
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)
