"""ONNX Runtime sessions on a named provider, with a check that they really run there."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from slimheads.errors import EnvironmentLackError, UsageError, one_line, require_known
from slimheads.runtime.onnx_runtime import onnxruntime

PROVIDERS = MappingProxyType({"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"})
_DEVICES = MappingProxyType({"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "cuda"})  # for IO binding

# ONNX Runtime's exceptions share no base class but Exception.
ORT_ERRORS: tuple[type[Exception], ...] = (
    ort_errors.EPFail,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    RuntimeError,
)

# Measurements and checks keep several sessions in one process. By default the worker threads of a session spin after
# its run and take the cores from the session that runs next: on 4 cores with three sessions of 2 threads, a 3.5 ms
# model measured 5.5 ms with twice the spread. With this option workers spin only within a run.
_CONFIG_ENTRIES = MappingProxyType({"session.force_spinning_stop": "1"})
_PLACEMENT = "session.record_ep_graph_assignment_info"
_FATAL_ONLY = 4  # other problems are raised as errors


def open_session(
    path: str | Path, provider: str = "cpu", threads: int = 2, *, optimize: bool = True, placement: bool = False
) -> onnxruntime.InferenceSession:
    """Open an ONNX file for sequential execution.

    Args:
        path: the ONNX file; its external data, if any, is beside it.
        provider: `cpu` or `cuda`.
        threads: threads within an operator (at least 1). Operators run one after the other.
        optimize: all of ONNX Runtime's graph optimizations, or none.
        placement: record which operator runs on which provider, for `placement_of`.

    Raises:
        UsageError: the provider's name is unknown, or the file is missing, damaged or not a model ONNX Runtime can run.
        EnvironmentLackError: this onnxruntime does not have the provider, or could not start it.
    """
    path, wanted = Path(path), _provider_name(provider)
    if threads < 1:
        raise UsageError(f"threads is {threads}", keys=("bench.threads",), hint="use 1 or more")
    require_provider(provider)
    if not path.is_file():
        raise UsageError("the ONNX file does not exist", where=str(path), hint="check the path")
    _load_libraries(wanted)
    options = _options(threads, optimize)
    if placement:
        options.add_session_config_entry(_PLACEMENT, "1")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=_with_cpu(wanted))
    except ORT_ERRORS as error:
        raise UsageError(
            f"ONNX Runtime cannot open the file ({one_line(error)})", where=str(path), hint="export it again"
        ) from error
    session.disable_fallback()
    if (real := session.get_providers()[0]) != wanted:
        raise EnvironmentLackError(
            f"{wanted} could not be started: the session runs on {real}",
            where=str(path),
            keys=("bench.providers",),
            hint="check the driver and the libraries that this provider needs",
        )
    return session


def require_provider(provider: str) -> None:
    """Refuse a provider that the installed onnxruntime lacks. onnxruntime itself would fall back to the CPU.

    Raises:
        UsageError: the provider's name is unknown.
        EnvironmentLackError: this onnxruntime does not have it; the message lists those it has.
    """
    wanted, available = _provider_name(provider), onnxruntime.get_available_providers()
    if wanted not in available:
        raise EnvironmentLackError(
            f"this onnxruntime ({onnxruntime.__version__}) has no {wanted}, only {', '.join(available)}",
            keys=("bench.providers",),
            hint="install the onnxruntime package that has it, or name another provider",
        )


def device_of(session: onnxruntime.InferenceSession) -> str:
    """The device of a session's tensors, by the name that ONNX Runtime's IO binding uses: `cpu` or `cuda`."""
    return _DEVICES[session.get_providers()[0]]


def placement_of(session: onnxruntime.InferenceSession) -> dict[str, int]:
    """How many operators of a session run on each provider; open the session with `placement`.

    Operators that CUDA lacks run on the CPU, which can be all of them.
    """
    found: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        found[part.ep_name] += len(part.get_nodes())
    return dict(found)


def session_options_record(provider: str = "cpu", threads: int = 2) -> dict[str, Any]:
    """The options `open_session` sets and those that the provider has, as JSON data for the environment record.

    `provider_options` come from a session with one operator; null, with `provider_reason`, if it cannot be opened.
    """
    options = _options(threads, optimize=True)
    found, reason = _provider_options(provider, options)
    return {
        "onnxruntime": onnxruntime.__version__,
        "provider": _provider_name(provider),
        "provider_options": found,
        "provider_reason": reason,
        "intra_op_num_threads": options.intra_op_num_threads,
        "inter_op_num_threads": options.inter_op_num_threads,
        "execution_mode": options.execution_mode.name,
        "graph_optimization_level": options.graph_optimization_level.name,
        "config_entries": {key: options.get_session_config_entry(key) for key in _CONFIG_ENTRIES},
    }


def _provider_options(provider: str, options: onnxruntime.SessionOptions) -> tuple[dict[str, str] | None, str | None]:
    wanted = _provider_name(provider)
    try:
        require_provider(provider)
    except EnvironmentLackError as error:
        return None, error.what
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    other = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "one", [value], [other])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    _load_libraries(wanted)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=_with_cpu(wanted))
    if wanted not in (found := session.get_provider_options()):
        return None, f"{wanted} could not be started"
    return found[wanted], None


def _options(threads: int, optimize: bool) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    options.log_severity_level = _FATAL_ONLY
    for key, value in _CONFIG_ENTRIES.items():
        options.add_session_config_entry(key, value)
    return options


@cache
def _load_libraries(provider: str) -> None:
    """Loads CUDA's and cuDNN's libraries from their Python packages, which are on no library search path."""
    if provider == PROVIDERS["cuda"]:
        with redirect_stdout(sys.stderr):  # it prints what it does not find, and stdout is only for data
            onnxruntime.preload_dlls()


def _with_cpu(provider: str) -> list[str]:
    """The provider, then the CPU for operators that it lacks."""
    return list(dict.fromkeys([provider, PROVIDERS["cpu"]]))


def _provider_name(provider: str) -> str:
    require_known("bench.providers", provider, PROVIDERS)
    return PROVIDERS[provider]
