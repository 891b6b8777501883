"""What a file says about itself: hand-made graphs of one block, right and wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from slimheads.errors import UsageError
from slimheads.families.family import families
from slimheads.families.projections import Projection
from slimheads.families.sites import Site, Table
from slimheads.names import Unit
from slimheads.pruning.plan import Plan, SitePlan
from slimheads.verification import quantized_weights
from slimheads.verification.quantized_weights import quantized_faults
from slimheads.verification.structure import fused_faults, graph_faults

UNITS, DIM, HIDDEN = 4, 2, 6
ROW = families()["bert"].sites[0]  # any: a graph's tensors are known by the projections
PLAN = Plan((SitePlan("m.attn", "head", UNITS, (0, 2, 3)),))


def site(name: str = "m.attn", heads_per_unit: int = 1) -> Site:
    """Four heads of two features."""
    labels, one = np.repeat(np.arange(UNITS), DIM), np.ones(8, np.int64)
    query = Projection(f"{name}.q", labels, 0 * one, np.array(["query"] * 8), one)
    output = Projection(f"{name}.o", labels, 0 * one, np.array(["output"] * 8), one)
    unit: Unit = "head" if heads_per_unit == 1 else "kv_group"
    return Site(name, "attention", ROW, unit, UNITS, (query, output), members=heads_per_unit, head_dim=DIM)


def write(path: Path, tensors: Mapping[str, np.ndarray], nodes: Sequence[onnx.NodeProto] = ()) -> Path:
    """A file with these tensors; names are `module/operator/tensor`, each read by a node of that module."""
    readers = [helper.make_node("Relu", [n], [f"{n} out"], f"/{n.rpartition('/')[0]}") for n in tensors]
    initializers = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph([*readers, *nodes], "g", [], [], initializers)
    onnx.save(helper.make_model(graph), str(path))
    return path


def block(width: int) -> dict[str, np.ndarray]:
    """The tensors of one block, as the exporter lays them out: [in, out]."""
    return {
        "m/attn/q/MatMul/w": np.zeros((HIDDEN, width), np.float32),
        "m/attn/q/Add/bias": np.zeros(width, np.float32),
        "m/attn/o/MatMul/w": np.zeros((width, HIDDEN), np.float32),
        "m/attn/o/Add/bias": np.zeros(HIDDEN, np.float32),
        "m/ffn/MatMul/w": np.zeros((HIDDEN, 12), np.float32),
    }


def faults(folder: Path, slim: Mapping[str, np.ndarray], plan: Plan = PLAN) -> list[str]:
    dense, small = write(folder / "dense.onnx", block(8)), write(folder / "slim.onnx", slim)
    return list(graph_faults(dense, small, [site()], plan))


def test_the_dense_graph_less_the_plan_has_no_faults(tmp_path: Path) -> None:
    assert faults(tmp_path, block(6)) == []


def test_a_plan_that_keeps_everything_asks_for_the_dense_graph(tmp_path: Path) -> None:
    whole = Plan((SitePlan("m.attn", "head", UNITS, (0, 1, 2, 3)),))
    assert faults(tmp_path, block(8), whole) == []
    assert faults(tmp_path, block(6), whole)


def tables(entries: int) -> dict[str, np.ndarray]:
    """A table of biases [5, heads], and one that the exporter folded to [1, heads, 1, DIM]."""
    folded = np.zeros((1, entries, 1, DIM), np.float32)
    return {"m/attn/Gather/table": np.zeros((5, entries), np.float32), "m/attn/Add/folded": folded}


@pytest.mark.parametrize(
    "slim,fault",
    [
        (tables(3), None),
        (tables(4), "0 of at least 2 tables shrank"),
        (tables(3) | {"m/attn/Add/folded": np.zeros((1, 2, 1, DIM), np.float32)}, "no 1x4x1x2 with 3 of 4 heads, but "),
        (tables(3) | {"m/attn/Gather/table": np.zeros((4, 4), np.float32)}, "no 5x4 with 3 of 4 heads, but "),
        (tables(3) | {"m/attn/Mul/more": np.zeros((7,), np.float32)}, "and 7 is new"),
    ],
    ids=["as planned", "all whole", "another count", "cut along another axis", "one too many"],
)
def test_tables_lose_the_entries_of_the_heads_that_go(
    tmp_path: Path, slim: dict[str, np.ndarray], fault: str | None
) -> None:
    whole = replace(site(), tables=(Table("m.attn", "table", 1, 1), Table("m.attn", "bias", 0, DIM)))
    dense = write(tmp_path / "dense.onnx", block(8) | tables(4))
    found = list(graph_faults(dense, write(tmp_path / "slim.onnx", block(6) | slim), [whole], PLAN))
    assert not found if fault is None else fault in "\n".join(found)
    kept = Plan((SitePlan("m.attn", "head", UNITS, (0, 1, 2, 3)),))
    assert list(graph_faults(dense, dense, [whole], kept)) == []


def test_a_module_that_is_called_again_is_one_module(tmp_path: Path) -> None:
    def shared(width: int) -> Path:
        again = {name.replace("/q/", "/q_1/"): array for name, array in block(width).items() if "/q/" in name}
        return write(tmp_path / f"{width}.onnx", block(width) | again)

    assert list(graph_faults(shared(8), shared(6), [site()], PLAN)) == []


def test_weights_stored_transposed_are_read_by_their_sizes(tmp_path: Path) -> None:
    def transposed(width: int) -> dict[str, np.ndarray]:
        return {name: array.T.copy() for name, array in block(width).items()}

    dense = write(tmp_path / "dense.onnx", transposed(8))
    assert list(graph_faults(dense, write(tmp_path / "a.onnx", transposed(6)), [site()], PLAN)) == []
    assert list(graph_faults(dense, write(tmp_path / "b.onnx", transposed(4)), [site()], PLAN))


@pytest.mark.parametrize(
    ("tensor", "shape", "said"),
    [
        ("m/attn/q/MatMul/w", (HIDDEN, 8), "m.attn.q: tensors 6, 6x8 where the plan says 6, 6x6"),
        ("m/attn/q/MatMul/w", (HIDDEN, 4), "m.attn.q: tensors 6, 6x4 where the plan says 6, 6x6"),
        ("m/attn/q/Add/bias", (8,), "m.attn.q: tensors 6x6, 8 where the plan says 6, 6x6"),
        ("m/attn/o/MatMul/w", (8, HIDDEN), "m.attn.o: tensors 6, 8x6 where the plan says 6, 6x6"),
        ("m/attn/o/Add/bias", (5,), "m.attn.o: tensors 5, 6x6 where the plan says 6, 6x6"),
        ("m/ffn/MatMul/w", (HIDDEN, 11), "tensors outside the plan changed: 6x12 became 6x11"),
    ],
)
def test_one_tensor_of_another_size_is_named(tmp_path: Path, tensor: str, shape: tuple[int, ...], said: str) -> None:
    assert faults(tmp_path, block(6) | {tensor: np.zeros(shape, np.float32)}) == [said]


@pytest.mark.parametrize("gone", sorted(block(6)))
def test_a_missing_or_added_tensor_is_a_fault(tmp_path: Path, gone: str) -> None:
    slim = block(6)
    del slim[gone]
    assert len(faults(tmp_path, slim)) == 1
    assert len(faults(tmp_path, block(6) | {f"{gone}2": np.zeros(3, np.float32)})) == 1


def test_a_dense_graph_that_does_not_name_the_projections_proves_nothing(tmp_path: Path) -> None:
    unnamed = {name.replace("attn", "other"): array for name, array in block(8).items()}
    dense = write(tmp_path / "dense.onnx", unnamed)
    found = list(graph_faults(dense, dense, [site()], PLAN))
    assert found == [f"m.attn.{p}: the dense graph has no weight under this name" for p in "qo"]


def test_a_module_is_not_mistaken_for_one_whose_name_begins_with_its_own(tmp_path: Path) -> None:
    tenth = {f"m/attn/q0/MatMul/w{i}": np.zeros((HIDDEN, 8), np.float32) for i in range(2)}
    dense = write(tmp_path / "dense.onnx", block(8) | tenth)
    assert list(graph_faults(dense, write(tmp_path / "slim.onnx", block(6) | tenth), [site()], PLAN)) == []


# --------------------------------------------------------------------------------------------- neurons and layers

NEURONS = 7


def gated_block(name: str = "m.mlp") -> Site:
    """Gates and values of seven neurons in one matrix, one after the other, and their columns."""
    once, one = np.arange(NEURONS), np.ones(NEURONS, np.int64)
    roles = np.array(["gate"] * NEURONS + ["expand"] * NEURONS)
    twice = np.concatenate([once, once])
    fused = Projection(f"{name}.up", twice, 0 * twice, roles, np.concatenate([one, one]))
    down = Projection(f"{name}.down", once, 0 * once, np.array(["contract"] * NEURONS), one)
    return Site(name, "feed_forward", ROW, "neuron", NEURONS, (fused, down))


def mlp(width: int, scope: str = "m/mlp") -> dict[str, np.ndarray]:
    return {
        f"{scope}/up/MatMul/w": np.zeros((HIDDEN, 2 * width), np.float32),
        f"{scope}/up/Add/bias": np.zeros(2 * width, np.float32),
        f"{scope}/down/MatMul/w": np.zeros((width, HIDDEN), np.float32),
        f"{scope}/down/Add/bias": np.zeros(HIDDEN, np.float32),
    }


@pytest.mark.parametrize(
    "changes,fault",
    [
        ({}, None),
        ({"m/mlp/up/MatMul/w": (HIDDEN, 9)}, "m.mlp.up: tensors 6x9, 10 where the plan says 6x10, 10"),
        ({"m/mlp/up/Add/bias": (14,)}, "m.mlp.up: tensors 6x10, 14 where the plan says 6x10, 10"),
        ({"m/mlp/down/MatMul/w": (6, HIDDEN)}, "m.mlp.down: tensors 6, 6x6 where the plan says 5x6, 6"),
        ({"m/mlp/down/Add/bias": (5,)}, "m.mlp.down: tensors 5, 5x6 where the plan says 5x6, 6"),
    ],
    ids=["as planned", "one row short", "bias left whole", "one column too many", "a bias of the output cut"],
)
def test_a_gated_block_loses_two_rows_and_a_column_for_each_neuron(
    tmp_path: Path, changes: dict[str, tuple[int, ...]], fault: str | None
) -> None:
    plan = Plan((SitePlan("m.mlp", "neuron", NEURONS, (0, 1, 3, 4, 6), "feed_forward"),))
    made = mlp(5) | {name: np.zeros(shape, np.float32) for name, shape in changes.items()}
    dense, slim = write(tmp_path / "dense.onnx", mlp(NEURONS)), write(tmp_path / "slim.onnx", made)
    assert list(graph_faults(dense, slim, [gated_block()], plan)) == ([fault] if fault else [])


def stack(*widths: int, first: int = 0) -> dict[str, np.ndarray]:
    """Layers of a feed-forward block and a norm."""
    tensors: dict[str, np.ndarray] = {}
    for index, width in enumerate(widths, first):
        tensors |= mlp(width, f"h/{index}/mlp") | {f"h/{index}/norm/Mul/w": np.zeros(HIDDEN, np.float32)}
    return tensors


def three_layers() -> tuple[list[Site], Plan]:
    """The second goes, and neurons of the third."""
    sites = [gated_block(f"h.{i}.mlp") for i in range(3)]
    sites += [Site(f"h.{i}", "layer", ROW, "layer", 1) for i in range(3)]
    kept = SitePlan("h.2.mlp", "neuron", NEURONS, (0, 1, 2), "feed_forward")
    return sites, Plan((kept, SitePlan("h.1", "layer", 1, (), "layer")))


def test_a_dropped_layer_is_gone_and_those_after_it_move_up(tmp_path: Path) -> None:
    sites, plan = three_layers()
    dense = write(tmp_path / "dense.onnx", stack(7, 7, 7))

    def found(tensors: dict[str, np.ndarray]) -> list[str]:
        return list(graph_faults(dense, write(tmp_path / "slim.onnx", tensors), sites, plan))

    assert found(stack(7, 3)) == []
    assert found(stack(7, 3, 7)), "the layer is still there"
    assert found(stack(3, 7)), "the neurons of another layer went"
    assert found(stack(7)), "one layer more went"
    norm = stack(7, 3)
    del norm["h/1/norm/Mul/w"]
    assert found(norm) == ["tensors outside the plan changed: 6 became none"]


def test_a_module_outside_the_layers_that_each_of_them_calls_is_called_once_less(tmp_path: Path) -> None:
    """As BEiT's table of positions that all layers share."""
    shared = {"table": np.zeros((5, 5), np.float32)}

    def written(widths: tuple[int, ...]) -> Path:
        names = ["bias", "bias_1", "bias_2"][: len(widths)]
        calls = [helper.make_node("Relu", ["table"], [f"{name} out"], f"/{name}/Gather") for name in names]
        return write(tmp_path / f"{len(widths)}.onnx", stack(*widths) | shared, calls)

    assert list(graph_faults(written((7, 7, 7)), written((7, 3)), *three_layers())) == []


# -------------------------------------------------------------------------------------------------- fused nodes


def fused(path: Path, kind: str, counts: Sequence[Mapping[str, int]], readers: str = "ab") -> Path:
    """Fused nodes, each read by the output projection of one of the sites, behind a Reshape."""
    nodes = []
    for i, (count, reader) in enumerate(zip(counts, readers, strict=True)):
        nodes += [
            helper.make_node(kind, ["x"], [f"y{i}"], f"Fused_{i}", **count),
            helper.make_node("Reshape", [f"y{i}", "shape"], [f"z{i}"], f"Reshape_{i}"),
            helper.make_node("MatMul", [f"z{i}", "w"], [f"o{i}"], f"/{reader}/o/MatMul"),
        ]
    return write(path, {}, nodes)


def two_sites(heads_per_unit: int = 1) -> tuple[list[Site], Plan]:
    sites = [site("a", heads_per_unit), site("b", heads_per_unit)]
    unit = sites[0].unit
    return sites, Plan((SitePlan("a", unit, UNITS, (0, 2, 3)), SitePlan("b", unit, UNITS, (1,))))


@pytest.mark.parametrize("kind", ["Attention", "MultiHeadAttention", "QAttention"])
def test_every_fused_node_carries_its_own_layers_count(tmp_path: Path, kind: str) -> None:
    sites, plan = two_sites()
    right = fused(tmp_path / "right.onnx", kind, [{"num_heads": 3}, {"num_heads": 1}])
    assert list(fused_faults(right, sites, plan)) == []
    stamped = fused(tmp_path / "stamped.onnx", kind, [{"num_heads": 3}, {"num_heads": 3}])
    assert list(fused_faults(stamped, sites, plan)) == ["stamped.onnx: Fused_1 of b says num_heads 3, the plan 1"]
    crossed = fused(tmp_path / "crossed.onnx", kind, [{"num_heads": 1}, {"num_heads": 3}])
    assert len(list(fused_faults(crossed, sites, plan))) == 2


def test_grouped_nodes_carry_both_counts(tmp_path: Path) -> None:
    sites, plan = two_sites(heads_per_unit=2)
    kind, right = "GroupQueryAttention", [{"num_heads": 6, "kv_num_heads": 3}, {"num_heads": 2, "kv_num_heads": 1}]
    assert list(fused_faults(fused(tmp_path / "right.onnx", kind, right), sites, plan)) == []
    wrong = [right[0], {"num_heads": 2, "kv_num_heads": 2}]
    assert list(fused_faults(fused(tmp_path / "wrong.onnx", kind, wrong), sites, plan)) == [
        "wrong.onnx: Fused_1 of b says kv_num_heads 2, the plan 1"
    ]


def test_layers_that_were_not_fused_and_layers_called_twice_are_no_fault(tmp_path: Path) -> None:
    sites, plan = two_sites()
    one = {"num_heads": 1}
    assert list(fused_faults(fused(tmp_path / "last.onnx", "Attention", [one], "b"), sites, plan)) == []
    assert list(fused_faults(fused(tmp_path / "twice.onnx", "Attention", [one, one], "bb"), sites, plan)) == []
    assert list(fused_faults(fused(tmp_path / "first.onnx", "Attention", [one], "a"), sites, plan)) == [
        "first.onnx: Fused_0 of a says num_heads 1, the plan 3"
    ]


def test_a_fused_node_that_no_site_reads_is_a_fault(tmp_path: Path) -> None:
    sites, plan = two_sites()
    found = list(fused_faults(fused(tmp_path / "one.onnx", "Attention", [{"num_heads": 3}], "c"), sites, plan))
    assert found == ["one.onnx: no site's output projection reads Fused_0"]


# ------------------------------------------------------------------------------------------------------ int8

BLOCKS = (1, 6, 2**20)  # elements compared at once: a row, two rows and one left over, all
WEIGHT = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)


def rounded(weight: np.ndarray, name: str = "w") -> dict[str, np.ndarray]:
    """Symmetric int8 with one scale an output column."""
    scale = (np.abs(weight).max(axis=0) / 127).astype(np.float32)
    steps = np.rint(weight / scale).astype(np.int8)
    return {f"{name}_quantized": steps, f"{name}_scale": scale, f"{name}_zero_point": np.zeros(len(scale), np.int8)}


def int8_faults(folder: Path, made: Mapping[str, np.ndarray]) -> list[str]:
    source = write(folder / "model.onnx", {"w": WEIGHT, "b": WEIGHT[0]})
    return list(quantized_faults(source, write(folder / "model_int8.onnx", made)))


@pytest.mark.parametrize(
    "made",
    [
        {"w": WEIGHT},
        rounded(WEIGHT),
        rounded(WEIGHT.T.copy(), "w_Transposed"),
        {  # one unsigned scale for all, as embeddings have it
            "w_quantized": np.rint(WEIGHT / np.float32(0.02) + 128).astype(np.uint8),
            "w_scale": np.float32(0.02),
            "w_zero_point": np.uint8(128),
        },
    ],
    ids=["left alone", "by column", "transposed", "by tensor"],
)
@pytest.mark.parametrize("block", BLOCKS)
def test_rounded_weights_are_the_float32_ones(
    tmp_path: Path, made: dict[str, np.ndarray], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_weights, "_BLOCK", block)
    arrays = {name: np.asarray(array) for name, array in made.items()}
    assert int8_faults(tmp_path, arrays | {"b": WEIGHT[0]}) == []


def off_by_one(made: dict[str, np.ndarray]) -> None:
    made["w_quantized"][2, 1] -= np.sign(made["w_quantized"][2, 1])


def rows_swapped(made: dict[str, np.ndarray]) -> None:
    made["w_quantized"] = made["w_quantized"][::-1].copy()


def scale_of_another_column(made: dict[str, np.ndarray]) -> None:
    made["w_scale"] = np.roll(made["w_scale"], 1)


def scale_is_nan(made: dict[str, np.ndarray]) -> None:
    made["w_scale"][0] = np.nan


def scale_is_negative(made: dict[str, np.ndarray]) -> None:
    made["w_scale"] = -made["w_scale"]


def zero_point_moved(made: dict[str, np.ndarray]) -> None:
    made["w_zero_point"][0] = 3


@pytest.mark.parametrize(
    "damage",
    [off_by_one, rows_swapped, scale_of_another_column, scale_is_nan, scale_is_negative, zero_point_moved],
)
@pytest.mark.parametrize("block", BLOCKS)
def test_weights_that_are_not_the_float32_ones_rounded_are_named(
    tmp_path: Path, damage: object, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_weights, "_BLOCK", block)
    made = rounded(WEIGHT)
    damage(made)  # type: ignore[operator]
    assert int8_faults(tmp_path, made | {"b": WEIGHT[0]}) == ["model_int8.onnx: w is not the float32 graph's, rounded"]


def test_other_tensors_stay_bit_for_bit(tmp_path: Path) -> None:
    assert int8_faults(tmp_path, rounded(WEIGHT) | {"b": np.nextafter(WEIGHT[0], np.float32(9))}) == [
        "model_int8.onnx: b is not what the float32 graph has"
    ]
    assert int8_faults(tmp_path, rounded(WEIGHT)) == ["model_int8.onnx: b is missing"]
    assert int8_faults(tmp_path, rounded(WEIGHT[:, :2]) | {"b": WEIGHT[0]}) == [
        "model_int8.onnx: w is 5x2 where the float32 graph has 5x3"
    ]


@pytest.mark.parametrize("content", [None, b"no protobuf"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "broken.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        list(fused_faults(path, [site()], PLAN))
    assert caught.value.where == str(path)


def test_external_weights_are_not_needed_to_look_at_shapes(tmp_path: Path) -> None:
    dense = write(tmp_path / "dense.onnx", block(8))
    slim = onnx.load(str(write(tmp_path / "slim.onnx", block(6))))
    big = tmp_path / "big.onnx"
    onnx.save(slim, str(big), save_as_external_data=True, location="big.onnx_data", size_threshold=0)
    (tmp_path / "big.onnx_data").unlink()
    assert all(
        t.data_location == TensorProto.EXTERNAL for t in onnx.load(str(big), load_external_data=False).graph.initializer
    )
    assert list(graph_faults(dense, big, [site()], PLAN)) == []
