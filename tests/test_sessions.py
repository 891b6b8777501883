"""Sessions run where they say, refuse what they cannot open, and are fed what their file asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from slimheads.errors import EnvironmentLackError, UsageError
from slimheads.sessions import KV_SHAPES_KEY, inputs_for, open_session, read_interface, session_options_record

INT64, FLOAT, BOOL = TensorProto.INT64, TensorProto.FLOAT, TensorProto.BOOL
VOCABULARY = 37


def write_model(
    path: Path,
    inputs: dict[str, tuple[int, list[Any]]],
    nodes: list[onnx.NodeProto] | None = None,
    initializers: dict[str, np.ndarray] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """A file with the given inputs; without nodes, every input is handed through to an output."""
    values = [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()]
    nodes = nodes or [helper.make_node("Identity", [name], [f"out.{name}"]) for name in inputs]
    outputs = [helper.make_empty_tensor_value_info(nodes[-1].output[0])]
    if nodes[-1].op_type == "Identity":
        outputs = [helper.make_tensor_value_info(f"out.{name}", *kind) for name, kind in inputs.items()]
    else:
        outputs = [helper.make_tensor_value_info(nodes[-1].output[0], FLOAT, None)]
    stored = [numpy_helper.from_array(array, name) for name, array in (initializers or {}).items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", values, outputs, stored),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    helper.set_model_props(model, metadata or {})
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """input_ids -> Cast -> Gather in a table of VOCABULARY rows, as an exported embedding."""
    return write_model(
        tmp_path_factory.mktemp("encoder") / "model.onnx",
        {"input_ids": (INT64, ["batch_size", "sequence_length"])},
        [
            helper.make_node("Cast", ["input_ids"], ["ids"], to=INT64),
            helper.make_node("Gather", ["table", "ids"], ["y"]),
        ],
        {"table": np.ones((VOCABULARY, 4), np.float32)},
    )


def decoder(
    path: Path, heads: Any = "num_heads", width: Any = "head_dim", metadata: dict[str, str] | None = None
) -> Path:
    caches = {
        f"past_key_values.{layer}.{part}": (FLOAT, ["batch_size", heads, "past_sequence_length", width])
        for layer in range(2)
        for part in ("key", "value")
    }
    ids = {
        "input_ids": (INT64, ["batch_size", "sequence_length"]),
        "attention_mask": (INT64, ["batch_size", "past_sequence_length + sequence_length"]),
        "position_ids": (INT64, ["batch_size", "sequence_length"]),
        "use_cache_branch": (BOOL, [1]),
    }
    return write_model(path, ids | caches, metadata=metadata)


def assert_one_line(error: Exception, *words: str) -> None:
    assert "\n" not in str(error)
    for word in words:
        assert word in str(error)


# ------------------------------------------------------------------------------------------------------------ sessions


def test_a_session_has_the_options_that_the_record_states(encoder: Path) -> None:
    options = open_session(encoder, threads=1).get_session_options()
    record = session_options_record(threads=1)
    assert options.intra_op_num_threads == record["intra_op_num_threads"] == 1
    assert options.inter_op_num_threads == record["inter_op_num_threads"] == 1
    assert options.execution_mode == onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    assert options.graph_optimization_level.name == record["graph_optimization_level"] == "ORT_ENABLE_ALL"
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    assert json.loads(json.dumps(record)) == record


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
    with pytest.raises(UsageError, match="choose one of cpu, cuda"):
        open_session(encoder, "tpu")
    with pytest.raises(UsageError, match="0 threads"):
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


# -------------------------------------------------------------------------------------------------------------- inputs


def test_ids_stay_inside_the_vocabulary_and_reach_its_upper_half(encoder: Path) -> None:
    ids = inputs_for(encoder, 8, 64)["input_ids"]
    assert ids.shape == (8, 64) and ids.dtype == np.int64
    assert ids.min() >= 0 and VOCABULARY // 2 < ids.max() < VOCABULARY
    assert open_session(encoder).run(None, {"input_ids": ids})[0].shape == (8, 64, 4)


def test_the_vocabulary_is_found_behind_a_quantized_table(tmp_path: Path) -> None:
    path = write_model(
        tmp_path / "m.onnx",
        {"input_ids": (INT64, ["b", "s"])},
        [
            helper.make_node("DequantizeLinear", ["table", "scale", "zero"], ["wide"]),
            helper.make_node("Gather", ["wide", "input_ids"], ["y"]),
        ],
        {"table": np.ones((11, 4), np.int8), "scale": np.float32(1), "zero": np.int8(0)},
    )
    assert read_interface(path).vocabulary == 11


def test_the_smallest_table_bounds_the_ids_and_other_tables_do_not(tmp_path: Path) -> None:
    path = write_model(
        tmp_path / "m.onnx",
        {"input_ids": (INT64, ["b", "s"]), "position_ids": (INT64, ["b", "s"])},
        [
            helper.make_node("Gather", ["words", "input_ids"], ["w"]),
            helper.make_node("Gather", ["positions", "position_ids"], ["p"]),
            helper.make_node("Add", ["w", "p"], ["y"]),
        ],
        {"words": np.ones((64, 4), np.float32), "positions": np.ones((8, 4), np.float32)},
    )
    assert read_interface(path).vocabulary == 64


def test_without_a_table_ids_stay_under_100(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.onnx", {"input_ids": (INT64, ["b", "s"])})
    assert inputs_for(path, 4, 100)["input_ids"].max() == 99


@pytest.mark.parametrize("past", [0, 5])
def test_a_decoder_gets_a_cache_mask_and_positions_that_agree(past: int, tmp_path: Path) -> None:
    path = decoder(tmp_path / "m.onnx", heads=3, width=8)
    feed = inputs_for(path, 2, 4, past)
    assert feed["attention_mask"].shape == (2, past + 4) and feed["attention_mask"].all()
    assert feed["position_ids"].tolist() == [list(range(past, past + 4))] * 2
    assert feed["past_key_values.1.value"].shape == (2, 3, past, 8)
    assert feed["past_key_values.1.value"].dtype == np.float32
    assert feed["use_cache_branch"].tolist() == [past > 0]
    open_session(path).run(None, feed)


def test_free_cache_axes_take_each_layers_own_shape_from_the_metadata(tmp_path: Path) -> None:
    path = decoder(tmp_path / "m.onnx", metadata={KV_SHAPES_KEY: "[[3, 8, 6], [1, 8, 6]]"})
    for source in (path, open_session(path)):
        feed = inputs_for(source, 2, 1, past=7)
        shapes = [feed[f"past_key_values.{layer}.{part}"].shape for layer in range(2) for part in ("key", "value")]
        assert shapes == [(2, 3, 7, 8), (2, 3, 7, 6), (2, 1, 7, 8), (2, 1, 7, 6)]


@pytest.mark.parametrize("shapes", [None, "[[3, 8, 6]]"])
def test_free_cache_axes_that_the_metadata_does_not_cover_are_named(shapes: str | None, tmp_path: Path) -> None:
    path = decoder(tmp_path / "m.onnx", metadata={KV_SHAPES_KEY: shapes} if shapes else None)
    with pytest.raises(UsageError, match=r"past_key_values\.[01]\.key"):
        inputs_for(path, 1, 1, past=2)


def test_damaged_cache_metadata_is_a_usage_error(tmp_path: Path) -> None:
    for text in ("[[3, 8]]", "three", "7"):
        path = decoder(tmp_path / "m.onnx", metadata={KV_SHAPES_KEY: text})
        with pytest.raises(UsageError, match=KV_SHAPES_KEY):
            inputs_for(path, 1, 1)


def test_images_and_audio_features_have_the_files_own_sizes(tmp_path: Path) -> None:
    kinds = {
        "pixel_values": (FLOAT, ["batch_size", "num_channels", 30, 30]),
        "input_features": (FLOAT, ["batch_size", 80, "encoder_sequence_length"]),
    }
    feed = inputs_for(write_model(tmp_path / "m.onnx", kinds), 2, 12)
    assert feed["pixel_values"].shape == (2, 3, 30, 30)
    assert feed["input_features"].shape == (2, 80, 12)
    assert feed["pixel_values"].std() == pytest.approx(1, abs=0.1)


def test_an_input_that_cannot_be_filled_is_named(tmp_path: Path) -> None:
    for name, kind in {"left_foot": (FLOAT, ["b", 3]), "pixel_values": (FLOAT, ["b", "left_foot"])}.items():
        path = write_model(tmp_path / "m.onnx", {name: kind})
        with pytest.raises(UsageError) as refused:
            inputs_for(path, 1, 4)
        assert_one_line(refused.value, name, "left_foot", str(path))


def test_a_shape_that_the_file_fixes_otherwise_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.onnx", {"input_ids": (INT64, [1, 16])})
    assert inputs_for(path, 1, 16)["input_ids"].shape == (1, 16)
    with pytest.raises(UsageError, match=r"\[1, 16\]"):
        inputs_for(path, 1, 128)


@pytest.mark.parametrize("shape", [(0, 4), (1, 0), (1, 4, -1)])
def test_an_impossible_shape_is_refused(shape: tuple[int, ...], encoder: Path) -> None:
    with pytest.raises(UsageError, match="not possible"):
        inputs_for(encoder, *shape)


def test_the_same_seed_gives_two_files_the_same_values_in_the_inputs_they_share(encoder: Path, tmp_path: Path) -> None:
    more = {"attention_mask": (INT64, ["b", "s"]), "input_ids": (INT64, ["b", "s"])}
    other = write_model(tmp_path / "m.onnx", more)
    ids = inputs_for(other, 2, 8, seed=3)["input_ids"]
    assert np.array_equal(ids, inputs_for(open_session(encoder), 2, 8, seed=3)["input_ids"])
    assert not np.array_equal(ids, inputs_for(other, 2, 8, seed=4)["input_ids"])


def test_external_data_is_not_needed_to_know_the_inputs(tmp_path: Path) -> None:
    path = write_model(
        tmp_path / "m.onnx",
        {"input_ids": (INT64, ["b", "s"])},
        [helper.make_node("Gather", ["table", "input_ids"], ["y"])],
        {"table": np.ones((VOCABULARY, 512), np.float32)},
    )
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights", size_threshold=0)
    (tmp_path / "weights").unlink()
    assert read_interface(path).vocabulary == VOCABULARY
    with pytest.raises(UsageError):
        open_session(path)
