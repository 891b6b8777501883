"""Link 4: whether every targeted tensor shrank by what the plan says, and nothing else changed. No graph is run.

The exporter names each node after the module it came from (`/encoder/layer.0/attention/self/query/MatMul`), and that
ties tensors to sites even where it renamed the weights (`onnx::MatMul_185`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from itertools import chain
from pathlib import Path

import onnx

from slimheads.families.projections import Projection
from slimheads.families.sites import Site
from slimheads.pruning.plan import Plan, match_plan
from slimheads.runtime.onnx_signature import nodes_of
from slimheads.verification.onnx_files import TensorShape, read_graph, sizes_text

_AGAIN = re.compile(r"_\d+(?=\.)")  # what the exporter adds to the name of a module that is called again
_HEAD_COUNTS = ("num_heads", "kv_num_heads")
# Operators between a fused node and the projection that reads it.
_MOVES = {"Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
_FUSED = {"Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention", "PackedMultiHeadAttention"}


def graph_faults(dense: Path, slim: Path, sites: Sequence[Site], plan: Plan, *, cached: bool = False) -> Iterator[str]:
    """All differences between the slim graph and the dense one less the plan, in words; nothing if there is none.

    Args:
        dense, slim: ONNX files exported the same way, unfused.
        sites: the dense model's, or those that are in the graph.
        cached: whether keys and values may come from the cache alone, without projections in either graph.
    """
    before, after, matched = _Graph(dense), _Graph(slim), match_plan(sites, plan)
    new_name = matched.renumbering.new_name
    for site, kept in matched.pairs:
        for projection in site.projections:
            features, module = len(projection.kept_features(kept)), new_name(projection.module)
            old, new = before.shapes_in(projection.module), after.shapes_in(module)
            expected = Counter(_shrunk(shape, projection, features) for shape in old)
            if cached and not old and not new and set(projection.role_of) <= {"key", "value"}:
                continue
            if not old or not any(len(shape) == 2 for shape in old):
                yield f"{projection.module}: the dense graph has no weight under this name"
            elif Counter(new) != expected:
                yield f"{module}: tensors {sizes_text(new)} where the plan says {sizes_text(expected)}"
        if site.tables:
            yield from _table_faults(before, after, site, kept, new_name)
    targeted = [projection.module for site, _ in matched.pairs for projection in site.projections]
    targeted += [site.name for site, _ in matched.pairs if site.tables]  # these were compared site by site
    gone = [site.name for site in matched.dropped]
    others = before.shapes_outside([*targeted, *gone]), after.shapes_outside([new_name(name) for name in targeted])
    if others[0] != others[1]:
        lost, new_ones = others[0] - others[1], others[1] - others[0]
        yield f"tensors outside the plan changed: {sizes_text(lost)} became {sizes_text(new_ones)}"
    yield from fused_faults(slim, sites, plan)


def _table_faults(
    before: _Graph, after: _Graph, site: Site, kept: tuple[int, ...], new_name: Callable[[str], str]
) -> Iterator[str]:
    """A site's tables, which may be folded into other shapes: each must lose the same heads as the projections."""
    dense, slim = (len(site.kept_heads(units)) for units in (tuple(range(site.total)), kept))
    modules = [projection.module for projection in site.projections]
    old = before.shapes_outside(modules, within=site.name)
    new = after.shapes_outside([new_name(module) for module in modules], within=new_name(site.name))
    changed, unmatched = list((old - new).elements()), list((new - old).elements())
    for shape in changed:
        divided = (
            (*shape[:axis], size // dense * slim, *shape[axis + 1 :])
            for axis, size in enumerate(shape)
            if size % dense == 0
        )
        found = next((other for other in divided if other in unmatched), None)
        if found is None:
            yield f"{site.name}: no {sizes_text([shape])} with {slim} of {dense} heads, but {sizes_text(unmatched)}"
            return
        unmatched.remove(found)
    fewest = len(site.tables) if slim < dense else 0
    if unmatched or len(changed) < fewest:
        yield f"{site.name}: {len(changed)} of at least {fewest} tables shrank, and {sizes_text(unmatched)} is new"


def fused_faults(path: Path, sites: Sequence[Site], plan: Plan) -> Iterator[str]:
    """Fused attention nodes that do not carry their own layer's head count; nothing if there are none or all do.

    A node's layer is the one whose output projection reads it, because fusing renames everything before that. This
    also holds where only some layers were fused, or one layer is called several times.
    """
    graph = _Graph(path)
    nodes = [node for node in graph.nodes if node.op_type in _FUSED]
    if not nodes:
        return
    matched = match_plan(sites, plan)
    new_name, pairs = matched.renumbering.new_name, matched.of_attention()
    for node in nodes:
        name = node.name or node.op_type
        owner = next((pair for pair in pairs if graph.feeds(node, new_name(pair[0].output.module))), None)
        if owner is None:
            yield f"{path.name}: no site's output projection reads {name}"
            continue
        site, kept = owner
        counts = {a.name: a.i for a in node.attribute if a.name in _HEAD_COUNTS}
        expected = {"num_heads": site.counted("heads", kept), "kv_num_heads": site.counted("units", kept)}
        for attribute, count in counts.items():
            if count != expected[attribute]:
                said = f"{name} of {site.name} says {attribute} {count}"
                yield f"{path.name}: {said}, the plan {expected[attribute]}"


def merged_faults(first: Path, following: Path, merged: Path) -> Iterator[str]:
    """Tensors of two decoders' files that the file merged from them lacks, and tensors that it has from neither."""
    parts, whole = _contents(first) | _contents(following), _contents(merged)
    for fault, tensors in (("lacks", parts - whole), ("has from neither decoder", whole - parts)):
        if tensors:
            yield f"{merged.name} {fault} {len(tensors)} tensors: {sizes_text([shape for _, shape, _ in tensors])}"


def _contents(path: Path) -> set[tuple[int, TensorShape, bytes]]:
    """Every tensor of a file by its type, shape and bytes, without its name. Scalars are left out."""
    graph = read_graph(path, weights=True)
    branches = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return {
        (t.data_type, tuple(t.dims), sha256(onnx.numpy_helper.to_array(t).tobytes()).digest())
        for t in chain(graph.initializer, *(branch.initializer for branch in branches))
        if len(t.dims)
    }


class _Graph:
    def __init__(self, path: Path) -> None:
        graph = read_graph(path)
        self.nodes = list(nodes_of(graph))
        self.shapes: dict[str, TensorShape] = {i.name: tuple(i.dims) for i in graph.initializer}
        self.users: dict[str, set[str]] = {name: set() for name in self.shapes}
        # Tensors of equal content (biases that are all zero, say) are stored once and reach their nodes by Identity.
        stored = {name: name for name in self.shapes}
        for node in graph.node:
            if node.op_type == "Identity" and node.input[0] in stored:
                stored[node.output[0]] = stored[node.input[0]]
                continue
            scope = _scope_of(node)
            for name in node.input:
                if name in stored:
                    self.users[stored[name]].add(scope)

    def shapes_in(self, module: str) -> list[TensorShape]:
        """Shapes of the tensors that the module's own nodes read."""
        own = self._scope(module)
        return [self.shapes[n] for n, users in self.users.items() if any(own.match(u) for u in users)]

    def shapes_outside(self, modules: Sequence[str], within: str | None = None) -> Counter[TensorShape]:
        """Shapes of the tensors that some node outside these modules reads, each once a reader.

        A module that is called again reads once: BEiT's shared table is read for every layer that there is.

        Args:
            within: count only the readers inside this module.
        """
        scopes = [self._scope(module) for module in modules]
        around = self._scope(within) if within else re.compile("")
        found = {
            (name, _AGAIN.sub("", user))
            for name, users in self.users.items()
            for user in users
            if around.match(user) and not any(scope.match(user) for scope in scopes)
        }
        return Counter(self.shapes[name] for name, _ in found)

    def feeds(self, node: onnx.NodeProto, module: str) -> bool:
        """Whether a node of the module reads this node's first output, perhaps through reshapes and the like."""
        scope = self._scope(module)
        readers = [reader for reader in self.nodes if node.output[0] in reader.input]
        return any(
            scope.match(_scope_of(reader)) or (reader.op_type in _MOVES and self.feeds(reader, module))
            for reader in readers
        )

    def _scope(self, module: str) -> re.Pattern[str]:
        """The prefix of a module's node names. A module that is called again has a number after its name."""
        # The exporter names only modules that were called: OPT's head class calls `model.decoder` without `model`, and
        # an encoder's own file begins below `model.encoder`.
        path = module.split(".")
        called = (".".join(path[start:]) for start in range(min(len(path), 3)))
        name = next((name for name in called if self._has(f"{name}.")), module)
        return re.compile(re.escape(name) + r"(_\d+)?\.")

    def _has(self, prefix: str) -> bool:
        return any(scope.startswith(prefix) for users in self.users.values() for scope in users)


def _scope_of(node: onnx.NodeProto) -> str:
    """The module that a node came from, and the node's own name."""
    path: str = node.name
    return path.removeprefix("/").replace("/", ".")


def _shrunk(shape: TensorShape, projection: Projection, features: int) -> TensorShape:
    before = len(projection.unit_of)
    if len(shape) == 1:
        return shape if projection.divides_inputs or shape[0] != before else (features,)
    # Both Linear's and Conv1D's weights end as [in, out] of a MatMul or Gemm; transB keeps [out, in].
    return shape if len(shape) != 2 else _shrink_axis(shape, 0 if projection.divides_inputs else 1, before, features)


def _shrink_axis(shape: TensorShape, axis: int, before: int, after: int) -> TensorShape:
    axis = axis if shape[axis] == before else 1 - axis
    return tuple(after if i == axis else size for i, size in enumerate(shape))
