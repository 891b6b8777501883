"""A pruned model and its files, laid out as a run publishes them, for tests that look at or damage them."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from transformers import PreTrainedModel

from slimheads.exporting.export import export
from slimheads.models.loading import load, save
from slimheads.names import GraphForm, Int8For, KvAxes, Precision
from slimheads.pruning.plan import Plan
from slimheads.pruning.surgery import prune
from slimheads.verification.certificate import Certificate
from slimheads.verification.prove import verify

ALL_PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")


@dataclass(frozen=True)
class Shipped:
    """`root` holds slim/ (checkpoint and onnx/) and dense/onnx/; `slim` is the model as reloaded from slim/."""

    root: Path
    dense: PreTrainedModel
    slim: PreTrainedModel
    plan: Plan
    task: str

    @property
    def folder(self) -> Path:
        """What ships."""
        return self.root / "slim"

    def onnx(self, name: str = "model.onnx") -> Path:
        """A graph of the slim model."""
        return self.folder / "onnx" / name

    @property
    def dense_onnx(self) -> Path:
        """The dense model's graph."""
        return self.root / "dense" / "onnx" / "model.onnx"

    def copied(self, root: Path) -> Shipped:
        """The same in another place, free to be damaged."""
        shutil.copytree(self.root, root, dirs_exist_ok=True)
        return replace(self, root=root, slim=copy.deepcopy(self.slim))

    def certificate(
        self, *precisions: Precision, candidates: Mapping[GraphForm, Path] | None = None, int8_for: Int8For = "any"
    ) -> Certificate:
        """The certificate over fp32, these precisions and these candidates."""
        return verify(
            self.dense,
            self.slim,
            self.plan,
            self.folder,
            self.dense_onnx.parent,
            task=self.task,
            precisions=("fp32", *precisions),
            int8_for=int8_for,
            candidates=candidates or {},
        )


def ship(
    dense: PreTrainedModel,
    plan: Plan,
    root: Path,
    *,
    task: str,
    precisions: Sequence[Precision] = ("fp32",),
    kv_axes: KvAxes = "symbolic",
) -> Shipped:
    """Prunes a copy by the plan, saves, reloads and exports it, beside the dense graph."""
    save(prune(copy.deepcopy(dense), plan), root / "slim")
    slim = load(root / "slim", task)
    export(dense, root / "dense" / "onnx", task=task, kv_axes=kv_axes)
    export(slim, root / "slim" / "onnx", task=task, precisions=precisions, kv_axes=kv_axes)
    return Shipped(root, dense, slim, plan, task)


def edit_tensor(path: Path, name_ends: str, change: Callable[[np.ndarray], np.ndarray], of_module: str = "") -> None:
    """Rewrites one tensor of an ONNX file: the first whose name, or whose reader's name, fits."""
    proto = onnx.load(str(path))
    readers = {name: node.name for node in proto.graph.node for name in node.input}
    tensor = next(
        t
        for t in proto.graph.initializer
        if t.name.endswith(name_ends) and of_module in readers.get(t.name, "") and len(t.dims) == 2
    )
    tensor.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(tensor).copy()), tensor.name))
    onnx.save(proto, str(path))
