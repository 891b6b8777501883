"""`slimheads doctor`: checks whether this machine has what a run needs."""

from __future__ import annotations

import io
import math
import platform
import shutil
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from pydantic import BaseModel, ConfigDict

from slimheads.errors import one_line
from slimheads.names import GIB
from slimheads.runtime.environment import PACKAGES, available_memory, installed, runtime_providers, usable_cores

MIN_PYTHON = ">=3.11"
MIN_CORES = 2  # bench.threads unless the recipe says otherwise
MIN_MEMORY = 2.5 * GIB  # what the MiniLM recipe may take at most
MIN_DISK = 2 * GIB  # both exports and the stage records of a BERT-base-sized model


class Check(BaseModel):
    """One line of `slimheads doctor`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    ok: bool
    found: str
    expected: str
    hint: str | None  # what to do; null if the check passed


def doctor(folder: Path | None = None) -> list[Check]:
    """Whether this machine can run slimheads, one check per requirement.

    Args:
        folder: where the output would go (the free space of its disk is checked); the working directory by default.
    """
    memory, free = available_memory(), shutil.disk_usage(folder or Path.cwd()).free
    cores = usable_cores()
    return [
        _check_python(),
        *_check_packages(),
        _check_absent("kernels"),
        _check_providers(),
        Check(
            name="cores",
            ok=cores >= MIN_CORES,
            found=f"{cores:g} usable",
            expected=f"at least {MIN_CORES}",
            hint=None if cores >= MIN_CORES else "set bench.threads to 1 in the recipe, or give the process more cores",
        ),
        _check_room("memory", memory, MIN_MEMORY, "close other programs, or raise the container's memory limit"),
        _check_room("disk", free, MIN_DISK, "free some space, or choose another output folder"),
        _check_temp(),
        _check_plots(),
    ]


def requirements() -> list[Requirement]:
    """The requirements in slimheads' package metadata; names without versions if it is not installed."""
    try:
        lines = metadata.requires("slimheads") or []
    except metadata.PackageNotFoundError:
        return [Requirement(name) for name in PACKAGES]
    wanted = [Requirement(line) for line in lines]
    return [item for item in wanted if item.marker is None or item.marker.evaluate({"extra": ""})]


def _check_python() -> Check:
    found = platform.python_version()
    try:
        wanted = str(metadata.metadata("slimheads").json.get("requires_python", MIN_PYTHON))
    except metadata.PackageNotFoundError:  # not installed
        wanted = MIN_PYTHON
    ok = SpecifierSet(wanted).contains(found, prereleases=True)
    hint = None if ok else f"make a virtual environment with Python {wanted}"
    return Check(name="python", ok=ok, found=found, expected=wanted, hint=hint)


def _check_packages() -> list[Check]:
    checks = []
    for wanted in requirements():
        found = installed(wanted.name)
        ok = found is not None and wanted.specifier.contains(found, prereleases=True)
        checks.append(
            Check(
                name=wanted.name,
                ok=ok,
                found=found or "not installed",
                expected=str(wanted.specifier) or "any version",
                hint=None if ok else f"pip install '{wanted.name}{wanted.specifier}'",
            )
        )
    return checks


def _check_absent(package: str) -> Check:
    """With `kernels` installed, transformers runs code from the hub that a config.json names (CVE-2026-4372)."""
    found = installed(package)
    hint = None if found is None else f"pip uninstall {package}: with it a config.json can make transformers run code"
    return Check(
        name=f"no {package}", ok=found is None, found=found or "not installed", expected="not installed", hint=hint
    )


def _check_providers() -> Check:
    found, _ = runtime_providers()
    ok = "CPUExecutionProvider" in found
    hint = None if ok else "reinstall onnxruntime; for a GPU onnxruntime-gpu, and never both together"
    return Check(
        name="providers", ok=ok, found=", ".join(found) or "none", expected="CPUExecutionProvider among them", hint=hint
    )


def _check_room(name: str, found: float, wanted: float, hint: str) -> Check:
    ok = found >= wanted
    return Check(
        name=name,
        ok=ok,
        found=f"{math.floor(found / GIB * 10) / 10:.1f} GiB free",
        expected=f"at least {wanted / GIB:.1f} GiB",
        hint=None if ok else hint,
    )


def _check_temp() -> Check:
    try:
        with tempfile.TemporaryFile() as file:
            file.write(b"slimheads")
    except OSError as error:
        found, hint = error.strerror or type(error).__name__, "set TMPDIR to a writable folder"
        return Check(name="temporary folder", ok=False, found=found, expected="writable", hint=hint)
    return Check(name="temporary folder", ok=True, found="writable", expected="writable", hint=None)


def _check_plots(draw: Callable[[], None] | None = None) -> Check:
    try:
        (draw or _draw_once)()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        found = f"{type(error).__name__}: {one_line(error)}"
        hint = "reinstall matplotlib, and set MPLCONFIGDIR to a writable folder"
        return Check(name="plots", ok=False, found=found, expected="matplotlib draws without a display", hint=hint)
    return Check(name="plots", ok=True, found="drawn to SVG", expected="matplotlib draws without a display", hint=None)


def _draw_once() -> None:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1, 1))
    figure.add_subplot().plot([0, 1])
    FigureCanvasSVG(figure).print_svg(io.StringIO())
