"""Files are fed what they ask for, and what cannot be filled is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_files import BOOL, FLOAT, INT64, VOCABULARY, assert_one_line, write_encoder, write_model

from slimheads.errors import UsageError
from slimheads.runtime.graph_inputs import inputs_for
from slimheads.runtime.onnx_signature import KV_SHAPES_KEY, read_interface
from slimheads.runtime.sessions import open_session


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "model.onnx")


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
