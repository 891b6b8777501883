"""The environment record of a run: software, hardware, and the conditions during a measurement."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from sys import maxsize
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, JsonValue

from slimheads import __version__
from slimheads.runtime.memory import available_bytes, physical_cores, total_bytes

PACKAGES = ("torch", "transformers", "optimum", "optimum-onnx", "onnx", "onnxruntime")
OTHER_BUILDS = {"onnxruntime": ("onnxruntime-gpu",)}  # the same package under another name
CGROUPS = Path("/sys/fs/cgroup")
CPUS = Path("/sys/devices/system/cpu")


class Gpu(BaseModel):
    """A GPU as its driver names it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    driver: str
    memory: str  # "81559 MiB"


class Environment(BaseModel):
    """Software and hardware of one run, without host name, user name or path, so that it can be published."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    slimheads: str
    python: str
    packages: dict[str, str | None]  # null: not installed
    platform: str  # "Linux 6.1 x86_64"
    cpu: str
    cpu_features: tuple[str, ...] | None = None  # instruction sets by Linux's names; null: not read
    cores_physical: int | None  # null: unknown
    cores_logical: int | None
    cores_usable: float  # by affinity and control group; may be a fraction
    memory_bytes: int  # of the machine or the control group, the smaller
    memory_available_bytes: int
    load_average: tuple[float, float, float] | None  # at the start, over 1, 5 and 15 minutes; null on Windows
    cpu_governor: str | None  # null: not readable
    cpu_frequency_mhz: float | None  # at the start, mean over the cores; null: not readable
    cpu_frequency_max_mhz: float | None = None  # null: not readable
    cpu_boost: bool | None = None  # whether clocks above the nominal one are allowed; null: not readable
    providers: tuple[str, ...]  # what this onnxruntime was built with
    onnxruntime_telemetry: Literal["off"] | None = None  # null: onnxruntime is not installed
    gpus: tuple[Gpu, ...] | None = None  # null, with a reason, if CUDA is not used or they cannot be listed
    gpu_reason: str | None = None
    session_options: dict[str, dict[str, JsonValue]]  # by provider of the run


class Conditions(BaseModel):
    """Load and clock at the start and the end of a measurement; null if unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    load_start: float | None  # processes running or waiting for a core, mean over the last minute
    load_end: float | None
    cpu_mhz_start: float | None  # mean over the cores
    cpu_mhz_end: float | None


def environment(
    session_options: Mapping[str, dict[str, Any]] | None = None, cpu_features: tuple[str, ...] | None = None
) -> Environment:
    """The environment as it is now; call it when a run starts.

    Args:
        session_options: the ONNX Runtime options of the run by provider, as JSON data (see
            `sessions.session_options_record`). GPUs are listed if `cuda` is among the providers.
        cpu_features: from `cpu.cpu_features`, which imports torch.
    """
    providers, telemetry = runtime_providers()
    gpus, gpu_reason = _gpus() if "cuda" in (session_options or {}) else (None, "the run does not use CUDA")
    return Environment(
        slimheads=__version__,
        python=platform.python_version(),
        packages={name: installed(name) for name in PACKAGES},
        platform=_platform(),
        cpu=_cpu_model(),
        cpu_features=cpu_features,
        cores_physical=physical_cores(),
        cores_logical=os.cpu_count(),
        cores_usable=usable_cores(),
        memory_bytes=min(total_bytes(), _cgroup_memory(CGROUPS) or maxsize),
        memory_available_bytes=available_memory(),
        load_average=_load_average(),
        cpu_governor=_read(CPUS / "cpu0/cpufreq/scaling_governor"),
        cpu_frequency_mhz=_frequency_mhz(),
        cpu_frequency_max_mhz=_megahertz(CPUS / "cpu0/cpufreq/cpuinfo_max_freq"),
        cpu_boost=_boost(CPUS),
        providers=providers,
        onnxruntime_telemetry=telemetry,
        gpus=gpus,
        gpu_reason=gpu_reason,
        session_options=dict(session_options or {}),
    )


class Watch:
    """Reads the conditions of a measurement: create it at the start, call `conditions` at the end."""

    def __init__(self) -> None:
        self._load, self._mhz = _load(), _frequency_mhz()

    def conditions(self) -> Conditions:
        """From the start to now."""
        return Conditions(
            load_start=self._load, load_end=_load(), cpu_mhz_start=self._mhz, cpu_mhz_end=_frequency_mhz()
        )


def usable_cores() -> float:
    """The cores that affinity and control group allow this process; a quota of half a core gives 0.5."""
    affinity = getattr(os, "sched_getaffinity", None)  # macOS and Windows have none
    cores = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    quota = _cgroup_cores(CGROUPS)
    return min(cores, quota) if quota else cores


# The machine


def _platform() -> str:
    """System, kernel version without the distribution's suffix, and architecture."""
    release = ".".join(platform.release().split("-")[0].split(".")[:2])
    return " ".join(part for part in (platform.system(), release, platform.machine()) if part)


def _cpu_model() -> str:
    if (info := _read(Path("/proc/cpuinfo"))) is not None:
        for line in info.splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    if platform.system() == "Darwin" and (sysctl := shutil.which("sysctl")):
        answer = subprocess.run([sysctl, "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
        if answer.stdout.strip():
            return answer.stdout.strip()
    return platform.processor() or platform.machine()


def _load_average() -> tuple[float, float, float] | None:
    return os.getloadavg() if hasattr(os, "getloadavg") else None


def _load() -> float | None:
    return average[0] if (average := _load_average()) else None


def _frequency_mhz() -> float | None:
    """The mean clock of the cores now; in virtual machines often only /proc/cpuinfo has it."""
    scaled = (_megahertz(path) for path in CPUS.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
    found = [clock for clock in scaled if clock is not None] or _cpuinfo_clocks(_read(Path("/proc/cpuinfo")) or "")
    return sum(found) / len(found) if found else None


def _cpuinfo_clocks(info: str) -> list[float]:
    return [float(clock) for clock in re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", info, flags=re.M)]


def _megahertz(path: Path) -> float | None:
    return int(khz) / 1000 if (khz := _read(path)) is not None and khz.isdigit() else None


def _boost(cpus: Path) -> bool | None:
    """Whether the CPU may exceed its nominal clock. Two drivers report it in different files, others not at all."""
    if (allowed := _read(cpus / "cpufreq/boost")) in ("0", "1"):
        return allowed == "1"
    if (forbidden := _read(cpus / "intel_pstate/no_turbo")) in ("0", "1"):
        return forbidden == "0"
    return None


def _gpus() -> tuple[tuple[Gpu, ...] | None, str | None]:
    """The GPUs that the driver lists, or the reason why there is no list."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return None, "nvidia-smi is not on the path"
    query = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"nvidia-smi failed ({type(error).__name__})"
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]
    if not rows or any(len(row) != 3 for row in rows):
        return None, "nvidia-smi lists no GPU"
    return tuple(Gpu(name=name, driver=driver, memory=memory) for name, driver, memory in rows), None


def _read(path: Path) -> str | None:
    """The file's text, or None if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _cgroup_folders(root: Path, own: str | None) -> list[Path]:
    """The control groups of this process, innermost first. Each of them can set a limit."""
    inside = next((line[3:].strip("/") for line in (own or "").splitlines() if line.startswith("0::")), "")
    parts = [*filter(None, inside.split("/"))]
    return [root.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _cgroup_cores(root: Path) -> float | None:
    """The smallest CPU quota in cores, from cgroup v2 (`cpu.max`: "150000 100000") or v1; None if there is none."""
    found: list[float] = []
    for folder in _cgroup_folders(root, _read(Path("/proc/self/cgroup"))):
        quota, _, period = (_read(folder / "cpu.max") or "max").partition(" ")
        if quota != "max":
            found.append(int(quota) / int(period or 100_000))
    quota_v1, period_v1 = _read(root / "cpu/cpu.cfs_quota_us"), _read(root / "cpu/cpu.cfs_period_us")
    if quota_v1 and period_v1 and int(quota_v1) > 0:
        found.append(int(quota_v1) / int(period_v1))
    return min(found, default=None)


def _cgroup_memory(root: Path) -> int | None:
    """The smallest memory limit in bytes, from cgroup v2 or v1; None if there is none."""
    folders = _cgroup_folders(root, _read(Path("/proc/self/cgroup")))
    texts = [_read(folder / "memory.max") for folder in folders] + [_read(root / "memory/memory.limit_in_bytes")]
    # cgroup v1 writes "no limit" as a number near 2**63.
    limits = [int(text) for text in texts if text and text.isdigit() and int(text) < 2**60]
    return min(limits, default=None)


def available_memory() -> int:
    """Bytes that this process can still use, by the machine and its control groups."""
    return min(available_bytes(), _cgroup_memory(CGROUPS) or maxsize)


# The installation


def installed(package: str) -> str | None:
    """The installed version of a package or of another build of it; None if neither is installed."""
    for name in (package, *OTHER_BUILDS.get(package, ())):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def runtime_providers() -> tuple[tuple[str, ...], Literal["off"] | None]:
    """The providers of the installed onnxruntime, and that its telemetry is off; empty if it is not installed."""
    try:
        from slimheads.runtime.onnx_runtime import TELEMETRY, onnxruntime
    except ImportError:
        return (), None
    return tuple(onnxruntime.get_available_providers()), TELEMETRY
