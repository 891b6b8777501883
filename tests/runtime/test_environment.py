"""The environment record tells what a measurement depends on and nothing private; the doctor's checks can fail."""

from __future__ import annotations

import getpass
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from slimheads.runtime import doctor as doctor_module
from slimheads.runtime import environment as module
from slimheads.runtime.doctor import doctor
from slimheads.runtime.environment import Environment, environment


def test_record_is_what_the_packages_and_the_system_say() -> None:
    found = environment({"cpu": {"intra_op_num_threads": 2}})
    assert found.python == platform.python_version()
    for package in ("torch", "transformers", "optimum", "optimum-onnx", "onnx", "onnxruntime"):
        assert found.packages[package] == metadata.version(package)
    assert "CPUExecutionProvider" in found.providers
    assert 0 < found.cores_usable <= (found.cores_logical or 1)
    assert 0 < found.memory_available_bytes <= found.memory_bytes
    assert found.session_options == {"cpu": {"intra_op_num_threads": 2}}
    assert Environment.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(
    ("file", "text", "allowed"),
    [
        ("cpufreq/boost", "1", True),
        ("cpufreq/boost", "0", False),
        ("intel_pstate/no_turbo", "1", False),
        ("intel_pstate/no_turbo", "0", True),
        ("intel_pstate/no_turbo", "", None),
        ("other", "1", None),
    ],
)
def test_boost_of_both_drivers_is_null_where_neither_tells(
    file: str, text: str, allowed: bool | None, tmp_path: Path
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text + "\n")
    assert module._boost(tmp_path) is allowed


def test_clocks_are_the_mean_over_the_cores_from_either_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module._cpuinfo_clocks("cpu MHz\t\t: 2400.000\nflags : x\ncpu MHz\t\t: 2600.5\n") == [2400.0, 2600.5]
    monkeypatch.setattr(module, "CPUS", tmp_path)
    for core, khz in enumerate(("1000000", "3000000")):
        (tmp_path / f"cpu{core}/cpufreq").mkdir(parents=True)
        (tmp_path / f"cpu{core}/cpufreq/scaling_cur_freq").write_text(khz)
    (tmp_path / "cpu0/cpufreq/cpuinfo_max_freq").write_text("3500000\n")
    found = environment()
    assert (found.cpu_frequency_mhz, found.cpu_frequency_max_mhz) == (2000.0, 3500.0)


def test_conditions_are_those_of_the_start_and_of_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    loads, clocks = iter([0.5, 3.5]), iter([2000.0, None])
    monkeypatch.setattr(module, "_load_average", lambda: (next(loads), 0.0, 0.0))
    monkeypatch.setattr(module, "_frequency_mhz", lambda: next(clocks))
    found = module.Watch().conditions()
    assert (found.load_start, found.load_end) == (0.5, 3.5)
    assert (found.cpu_mhz_start, found.cpu_mhz_end) == (2000.0, None)


@pytest.mark.parametrize(
    ("script", "gpus", "reason"),
    [
        ("echo 'NVIDIA X100, 570.1, 81559 MiB'", [("NVIDIA X100", "570.1", "81559 MiB")], None),
        ("exit 9", None, "nvidia-smi failed (CalledProcessError)"),
        ("true", None, "nvidia-smi lists no GPU"),
        (None, None, "nvidia-smi is not on the path"),
    ],
)
def test_gpus_are_what_the_driver_lists_or_null_with_a_reason(
    script: str | None, gpus: list[tuple[str, ...]] | None, reason: str | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = environment({"cuda": {}})
    assert found.gpu_reason == reason
    assert (found.gpus and [tuple(gpu.model_dump().values()) for gpu in found.gpus]) == gpus


def test_gpus_are_not_looked_for_where_the_run_does_not_use_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_gpus", _refuse)
    found = environment({"cpu": {}})
    assert found.gpus is None and found.gpu_reason == "the run does not use CUDA"


def test_record_names_no_person_host_or_path() -> None:
    text = environment().model_dump_json()
    assert str(Path.home()) not in text and str(Path.cwd()) not in text
    for private in (socket.gethostname(), getpass.getuser()):
        if len(private) > 4:  # "root" or "x" may well be part of an honest word
            assert private not in text


def test_record_does_not_wait_for_torch() -> None:
    code = "import sys; from slimheads.runtime import environment as e; e.environment(); print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_cpu_quota_of_both_cgroup_versions(tmp_path: Path, files: dict[str, str], cores: float | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert module._cgroup_cores(tmp_path) == cores


def test_memory_limit_of_both_cgroup_versions(tmp_path: Path) -> None:
    assert module._cgroup_memory(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert module._cgroup_memory(tmp_path) is None
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")  # how v1 writes "none"
    assert module._cgroup_memory(tmp_path) is None
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert module._cgroup_memory(tmp_path) == 1024**3


def test_limits_of_outer_groups_count(tmp_path: Path) -> None:
    assert module._cgroup_folders(tmp_path, "0::/outer/inner") == [
        tmp_path / "outer/inner",
        tmp_path / "outer",
        tmp_path,
    ]


def test_doctor_finds_this_installation_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = {check.name: check for check in doctor()}
    assert {"python", "torch", "no kernels", "providers", "cores", "memory", "disk", "temporary folder", "plots"} <= {
        *checks
    }
    assert checks["python"].ok and checks["torch"].ok and checks["no kernels"].ok and checks["plots"].ok
    assert all((check.hint is None) == check.ok for check in checks.values())


def test_doctor_sees_what_is_missing_old_and_dangerous(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    versions = {"kernels": "0.4.0", "torch": "2.1.0", "onnx": None}
    monkeypatch.setattr(doctor_module, "installed", lambda name: versions.get(name, "1.0"))
    monkeypatch.setattr(metadata, "requires", lambda _: ["torch>=2.6", "onnx>=1.21", "pytest>=8; extra == 'dev'"])
    monkeypatch.setattr(doctor_module, "runtime_providers", lambda: ((), None))
    monkeypatch.setattr(doctor_module, "usable_cores", lambda: 0.5)
    monkeypatch.setattr(doctor_module, "MIN_DISK", 2**70)
    monkeypatch.setattr(doctor_module.tempfile, "TemporaryFile", _refuse)
    monkeypatch.setattr(doctor_module, "_draw_once", _refuse)
    checks = {check.name: check for check in doctor(tmp_path)}
    assert "pytest" not in checks
    bad = {"torch", "onnx", "no kernels", "providers", "cores", "disk", "temporary folder", "plots"}
    assert {name for name, check in checks.items() if not check.ok} == bad
    assert checks["torch"].hint == "pip install 'torch>=2.6'"
    assert all(checks[name].hint for name in bad)


def test_the_gpu_build_of_onnxruntime_counts_as_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != "onnxruntime-gpu":
            raise metadata.PackageNotFoundError(name)
        return "1.31.1"

    monkeypatch.setattr(metadata, "version", version)
    assert module.installed("onnxruntime") == "1.31.1"
    assert module.installed("onnx") is None


def _refuse() -> None:
    raise OSError(28, "No space left on device")
