"""Reading ONNX files for the checks that run no graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from slimheads.errors import UsageError

TensorShape = tuple[int, ...]


def read_graph(path: Path, *, weights: bool = False) -> onnx.GraphProto:
    """A file's graph.

    Args:
        weights: whether to read external data as well.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        return onnx.load(str(path), load_external_data=weights).graph
    except (OSError, DecodeError, onnx.checker.ValidationError) as error:
        raise UsageError(f"the ONNX file cannot be read ({error})", where=str(path), hint="export it again") from error


def sizes_text(shapes: Counter[TensorShape] | Sequence[TensorShape]) -> str:
    """For messages: "384x384, 384"."""
    return ", ".join("x".join(map(str, shape)) or "scalar" for shape in sorted(Counter(shapes).elements())) or "none"
