"""Peak resident memory of this process over a stretch of work."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path


class PeakMemory:
    """Starts a new peak where the system can (Linux); elsewhere the peak is the process's since it began."""

    def __init__(self) -> None:
        with suppress(OSError):  # not Linux, or not allowed here: the peak so far is then what is reported
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def megabytes(self) -> float:
        """The peak since the start, in MiB."""
        status = Path("/proc/self/status")
        if status.exists():
            for line in status.read_text(encoding="ascii").splitlines():
                if line.startswith("VmHWM:"):
                    return round(int(line.split()[1]) / 1024, 1)
        usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return round(usage / (2**20 if sys.platform == "darwin" else 2**10), 1)
