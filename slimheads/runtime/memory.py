"""Memory: the machine's, what of this process is resident now, its peak over some work, and what of it is mapped files.

Windows has no `resource`. Where a Python on Linux has none either, psutil cannot be imported, and /proc says the same.
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
    """Starts a new peak where the system can (Linux); elsewhere the peak is the process's since it began."""

    def __init__(self) -> None:
        with suppress(OSError):  # not Linux, or not allowed here: the peak so far is then what is reported
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
    """What of it could be taken now without swapping."""
    return int(psutil.virtual_memory().available) if psutil else _proc("meminfo", "MemAvailable") or 0


def resident_megabytes() -> float:
    """What is resident now, in MiB."""
    resident = psutil.Process().memory_info().rss if psutil else _proc("self/status", "VmRSS") or 0
    return round(resident / 2**20, 1)


def physical_cores() -> int | None:
    """The machine's cores, each counted once; None where the system does not tell."""
    return psutil.cpu_count(logical=False) if psutil else None


def _proc(file: str, name: str) -> int | None:
    """A line `name: 123 kB` of a file below /proc, in bytes; None where there is none."""
    path = Path("/proc", file)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


class MappedFiles:
    """Where files are mapped into this process's memory; nowhere, as far as can be told, where there is no /proc."""

    def __init__(self, files: Iterable[Path]) -> None:
        names, maps = {str(file.resolve()) for file in files}, Path("/proc/self/maps")
        lines = (
            (line.split(maxsplit=5) for line in os.fsdecode(maps.read_bytes()).splitlines()) if maps.exists() else ()
        )
        spans = [parts[0].split("-") for parts in lines if len(parts) == 6 and parts[5] in names]
        self._spans = [(int(begin, 16), int(end, 16)) for begin, end in spans]

    def hold(self, address: int) -> bool:
        """Whether this address lies in one of the files."""
        return any(begin <= address < end for begin, end in self._spans)

    def give_back(self, address: int, size: int) -> None:
        """Gives the pages that lie wholly in these bytes of a file back to the system; read again, they are the file's.

        Raises:
            ValueError: the bytes are not a file's.
        """
        if not self.hold(address) or not self.hold(address + size - 1):
            raise ValueError("these bytes lie in none of the files")
        begin, end = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE, (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            libc = ctypes.CDLL(None)
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)
