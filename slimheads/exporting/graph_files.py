"""The files of one ONNX graph: `model.onnx`, and beside it `model.onnx_data` with the weights of a large model."""

from __future__ import annotations

import math
from pathlib import Path

import onnx

# A protobuf message has at most 2 GiB. More bytes of weights than this are stored beside the graph.
ONE_FILE = 2**31 - 2**27


def graph_files(path: Path) -> tuple[Path, ...]:
    """The files that exist of a graph and its external data."""
    return tuple(sorted(path.parent.glob(f"{path.name}*")))


def graph_bytes(path: Path) -> int:
    """A graph's bytes on disk, external data included."""
    return sum(file.stat().st_size for file in graph_files(path))


def remove_graph(path: Path) -> None:
    """Removes a graph and its external data, because saving another would keep the old data or append to them."""
    for file in graph_files(path):
        file.unlink()


def share_data(path: Path) -> None:
    """Makes external data as readable as the graph: onnx writes them readable by their owner only."""
    for file in graph_files(path):
        file.chmod(path.stat().st_mode)


def save_graph(proto: onnx.ModelProto, path: Path) -> None:
    """Writes one file where it fits; else the weights beside it as `<name>_data`, the name that clients load."""
    remove_graph(path)
    beside = sum(_bytes(tensor) for tensor in proto.graph.initializer) > ONE_FILE
    onnx.save(proto, str(path), save_as_external_data=beside, location=f"{path.name}_data")
    share_data(path)


def _bytes(tensor: onnx.TensorProto) -> int:
    size: int = math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return size
