"""Link 4: the graph itself. Did every targeted tensor in the file shrink by what the plan says, and nothing else?

The exporter names each node by the module it came from (`/encoder/layer.0/attention/self/query/MatMul`), and that ties
tensors to sites even where it renamed the weights (`onnx::MatMul_185`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx

from slimheads.attention import Projection, Site
from slimheads.selection import Plan
from slimheads.surgery import match_plan

Shape = tuple[int, ...]
_HEAD_COUNTS = ("num_heads", "kv_num_heads")
_FUSED = {"Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention", "PackedMultiHeadAttention"}


def graph_faults(dense: Path, slim: Path, sites: Sequence[Site], plan: Plan) -> Iterator[str]:
    """Everything in which the slim graph is not the dense one less the plan, in words; nothing if it is.

    Args:
        dense, slim: ONNX files exported the same way, unfused.
        sites: the dense model's.
    """
    before, after = _Graph(dense), _Graph(slim)
    for site, kept in match_plan(sites, plan):
        for projection in site.projections:
            features = len(projection.kept_features(kept))
            old, new = before.shapes_in(projection.module), after.shapes_in(projection.module)
            expected = Counter(_shrunk(shape, projection, features) for shape in old)
            if not old or not any(len(shape) == 2 for shape in old):
                yield f"{projection.module}: the dense graph has no weight under this name"
            elif Counter(new) != expected:
                yield f"{projection.module}: tensors {_words(new)} where the plan says {_words(expected)}"
    targeted = [projection.module for site in sites for projection in site.projections]
    others = before.shapes_outside(targeted), after.shapes_outside(targeted)
    if others[0] != others[1]:
        gone, new_ones = others[0] - others[1], others[1] - others[0]
        yield f"tensors outside the plan changed: {_words(gone)} became {_words(new_ones)}"
    yield from fused_faults(slim, sites, plan)


def fused_faults(path: Path, sites: Sequence[Site], plan: Plan) -> Iterator[str]:
    """Fused attention nodes that do not carry their own layer's head count; nothing if there are none or all do."""
    nodes = [n for n in onnx.load(str(path), load_external_data=False).graph.node if n.op_type in _FUSED]
    if not nodes:
        return
    pairs = match_plan(sites, plan)
    if len(nodes) != len(pairs):
        yield f"{path.name}: {len(nodes)} fused attention nodes for {len(pairs)} sites"
        return
    for node, (site, kept) in zip(nodes, pairs, strict=True):
        counts = {a.name: a.i for a in node.attribute if a.name in _HEAD_COUNTS}
        expected = {"num_heads": site.counted("heads", len(kept)), "kv_num_heads": len(kept)}
        for name, count in counts.items():
            if count != expected[name]:
                said = f"{node.name or node.op_type} of {site.name} says {name} {count}"
                yield f"{path.name}: {said}, the plan {expected[name]}"


class _Graph:
    def __init__(self, path: Path) -> None:
        graph = onnx.load(str(path), load_external_data=False).graph
        self.shapes: dict[str, Shape] = {i.name: tuple(i.dims) for i in graph.initializer}
        self.users: dict[str, set[str]] = {name: set() for name in self.shapes}
        for node in graph.node:
            scope = node.name.removeprefix("/").replace("/", ".")
            for name in node.input:
                if name in self.users:
                    self.users[name].add(scope)

    def shapes_in(self, module: str) -> list[Shape]:
        """Shapes of the tensors that the module's own nodes read."""
        return [self.shapes[n] for n, users in self.users.items() if any(u.startswith(f"{module}.") for u in users)]

    def shapes_outside(self, modules: Sequence[str]) -> Counter[Shape]:
        """Shapes of the tensors that some node outside these modules reads, each once a reader."""
        prefixes = tuple(f"{module}." for module in modules)
        return Counter(
            self.shapes[name] for name, users in self.users.items() for user in users if not user.startswith(prefixes)
        )


def _shrunk(shape: Shape, projection: Projection, features: int) -> Shape:
    before = len(projection.unit_of)
    if len(shape) == 1:
        return shape if projection.divides_inputs or shape[0] != before else (features,)
    # Both Linear's and Conv1D's weights end as [in, out] of a MatMul or Gemm; transB keeps [out, in].
    return shape if len(shape) != 2 else _shrink_axis(shape, 0 if projection.divides_inputs else 1, before, features)


def _shrink_axis(shape: Shape, axis: int, before: int, after: int) -> Shape:
    axis = axis if shape[axis] == before else 1 - axis
    return tuple(after if i == axis else size for i, size in enumerate(shape))


def _words(shapes: Counter[Shape] | Sequence[Shape]) -> str:
    return ", ".join("x".join(map(str, shape)) or "scalar" for shape in sorted(Counter(shapes).elements())) or "none"
