"""Sessions run where they say, and refuse what they cannot open."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import pytest
from onnx_files import assert_one_line, write_encoder

from slimheads.errors import EnvironmentLackError, UsageError
from slimheads.runtime.graph_inputs import inputs_for
from slimheads.runtime.sessions import PROVIDERS, device_of, open_session, placement_of, session_options_record


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "model.onnx")


def test_a_session_has_the_options_that_the_record_states(encoder: Path) -> None:
    options = open_session(encoder, threads=1).get_session_options()
    record = session_options_record(threads=1)
    assert options.intra_op_num_threads == record["intra_op_num_threads"] == 1
    assert options.inter_op_num_threads == record["inter_op_num_threads"] == 1
    assert options.execution_mode == onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    assert options.graph_optimization_level.name == record["graph_optimization_level"] == "ORT_ENABLE_ALL"
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    assert json.loads(json.dumps(record)) == record


def test_the_record_has_the_provider_s_own_options_or_says_why_not(
    encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = open_session(encoder).get_provider_options()["CPUExecutionProvider"]
    record = session_options_record("cpu")
    assert (record["provider_options"], record["provider_reason"]) == (real, None)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    record = session_options_record("cuda")
    assert record["provider_options"] is None and "no CUDAExecutionProvider" in record["provider_reason"]


def test_every_provider_has_a_device_and_a_session_tells_its_own(encoder: Path) -> None:
    assert device_of(open_session(encoder)) == "cpu"

    class Cuda:
        def get_providers(self) -> list[str]:
            return [PROVIDERS["cuda"], PROVIDERS["cpu"]]

    assert device_of(Cuda()) == "cuda"  # type: ignore[arg-type]


def test_placement_counts_the_operators_that_run_on_each_provider(encoder: Path) -> None:
    session = open_session(encoder, optimize=False, placement=True)
    assert placement_of(session) == {"CPUExecutionProvider": 2}  # Cast and Gather


def test_a_provider_that_is_not_there_is_refused_and_never_replaced_by_the_cpu(
    encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EnvironmentLackError) as refused:
        open_session(encoder, "cuda")
    assert refused.value.exit_code == 5
    assert_one_line(refused.value, "CUDAExecutionProvider", "only CPUExecutionProvider")


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="cuda really is here")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_is_listed_but_does_not_start_is_refused(
    encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    with pytest.raises(EnvironmentLackError, match="runs on CPUExecutionProvider"):
        open_session(encoder, "cuda")


def test_an_unknown_provider_or_thread_count_is_a_usage_error(encoder: Path) -> None:
    with pytest.raises(UsageError, match="'tpu' is not known"):
        open_session(encoder, "tpu")
    with pytest.raises(UsageError, match="threads is 0"):
        open_session(encoder, threads=0)


@pytest.mark.parametrize("damage", ["missing", "folder", "empty", "garbage", "truncated"])
def test_a_damaged_file_is_a_usage_error_of_one_line(damage: str, encoder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    whole = encoder.read_bytes()
    contents = {"empty": b"", "garbage": b"not a model" * 50, "truncated": whole[: len(whole) // 2]}
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(contents[damage])
    with pytest.raises(UsageError) as refused:
        open_session(path)
    assert refused.value.exit_code == 2
    assert_one_line(refused.value, str(path))
    with pytest.raises(UsageError):
        inputs_for(path, 1, 4)
