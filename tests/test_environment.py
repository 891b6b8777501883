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

from slimheads import environment as module
from slimheads.environment import Environment, doctor, environment


def test_record_is_what_the_packages_and_the_system_say() -> None:
    found = environment({"intra_op_num_threads": 2})
    assert found.python == platform.python_version()
    for package in ("torch", "transformers", "optimum", "optimum-onnx", "onnx", "onnxruntime"):
        assert found.packages[package] == metadata.version(package)
    assert "CPUExecutionProvider" in found.providers
    assert 0 < found.cores_usable <= (found.cores_logical or 1)
    assert 0 < found.memory_available_bytes <= found.memory_bytes
    assert found.session_options == {"intra_op_num_threads": 2}
    assert Environment.model_validate_json(found.model_dump_json()) == found


def test_record_names_no_person_host_or_path() -> None:
    text = environment().model_dump_json()
    assert str(Path.home()) not in text and str(Path.cwd()) not in text
    for private in (socket.gethostname(), getpass.getuser()):
        if len(private) > 4:  # "root" or "x" may well be part of an honest word
            assert private not in text


def test_record_does_not_wait_for_torch() -> None:
    code = "import sys; from slimheads.environment import environment; environment(); print('torch' in sys.modules)"
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
    monkeypatch.setattr(module, "installed", lambda name: versions.get(name, "1.0"))
    monkeypatch.setattr(metadata, "requires", lambda _: ["torch>=2.6", "onnx>=1.21", "pytest>=8; extra == 'dev'"])
    monkeypatch.setattr(module, "_providers", lambda: ())
    monkeypatch.setattr(module, "usable_cores", lambda: 0.5)
    monkeypatch.setattr(module, "MIN_DISK", 2**70)
    monkeypatch.setattr(module.tempfile, "TemporaryFile", _refuse)
    monkeypatch.setattr(module, "_draw_once", _refuse)
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
