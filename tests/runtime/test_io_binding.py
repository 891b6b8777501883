"""A bound run computes what it should, from a cache that the file itself has filled and that nobody copies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_files import VOCABULARY, WIDTH, write_decoder, write_encoder
from transformers import PreTrainedModel

from slimheads.errors import UsageError
from slimheads.exporting.export import export
from slimheads.pruning.plan import Plan
from slimheads.pruning.surgery import prune
from slimheads.runtime import io_binding as binding
from slimheads.runtime.io_binding import BoundRun, bind, feed_for
from slimheads.runtime.onnx_signature import Input, Interface, read_interface
from slimheads.runtime.sessions import open_session

PAST = 9


def outputs(path: Path, shape: tuple[int, ...], ids: Any = None) -> tuple[Any, dict[str, Any]]:
    """The feed, and what the second run with it left."""
    feed, session = feed_for(read_interface(path), shape, 0), open_session(path, threads=1)
    if ids is not None:
        feed.inputs["input_ids"][:] = ids
    run = bind(session, feed)
    run()
    run()
    return feed, {name: value.numpy() for name, value in run.outputs().items()}


def test_without_a_past_a_bound_run_gives_what_a_plain_one_gives(tmp_path: Path) -> None:
    path = write_encoder(tmp_path / "m.onnx")
    feed, bound = outputs(path, (2, 8))
    (plain,) = open_session(path).run(None, feed.inputs)
    assert np.array_equal(bound["y"], plain)


def test_the_cache_holds_what_the_file_itself_made_of_the_tokens_before(tmp_path: Path) -> None:
    heads = 3
    feed, found = outputs(write_decoder(tmp_path / "m.onnx", heads), (2, 4, PAST))
    ids = np.concatenate([feed.prefill["input_ids"], feed.inputs["input_ids"]], axis=1)
    assert ids.shape == (2, PAST + 4)
    rows = np.arange(VOCABULARY * heads * WIDTH, dtype=np.float32).reshape(VOCABULARY, heads, WIDTH)
    assert np.array_equal(found["present.0.key"], rows[ids].transpose(0, 2, 1, 3))


def test_the_cache_is_bound_where_the_prefill_left_it_and_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[BoundRun] = []

    class Spy(BoundRun):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(binding, "BoundRun", Spy)
    path = write_decoder(tmp_path / "m.onnx", 3)
    run = bind(open_session(path), feed_for(read_interface(path), (1, 1, PAST), 0))
    prefill, step = made
    assert step is run and "past_key_values.0.key" not in feed_for(read_interface(path), (1, 1, PAST), 0).inputs
    cache, left = step._inputs["past_key_values.0.key"], prefill.outputs()["present.0.key"]
    assert cache.data_ptr() == left.data_ptr() and cache.shape() == [1, 3, PAST, WIDTH]
    before = cache.numpy().copy()
    run()
    (first,) = (value.data_ptr() for name, value in run.outputs().items() if name == "present.0.key")
    run()
    (second,) = (value.data_ptr() for name, value in run.outputs().items() if name == "present.0.key")
    assert np.array_equal(cache.numpy(), before)
    assert first == second != cache.data_ptr()


def strip_metadata(path: Path) -> None:
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, path)


@pytest.mark.parametrize("axes", ["symbolic", "static"])
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_decoding_after_a_prefill_gives_the_logits_of_reading_it_all_at_once(
    model_type: str, axes: Any, tmp_path: Path, tiny: Callable[..., PreTrainedModel], ragged: Callable[..., Plan]
) -> None:
    """Of slim decoders whose layers differ, static ones without any metadata of ours, as optimum exports them."""
    model = tiny(model_type)
    export(prune(model, ragged(model)), tmp_path, task="text-generation", kv_axes=axes)
    path = tmp_path / "model.onnx"
    if axes == "static":
        strip_metadata(path)
    feed, step = outputs(path, (2, 1, PAST))
    ids = np.concatenate([feed.prefill["input_ids"], feed.inputs["input_ids"]], axis=1)
    _, whole = outputs(path, (2, PAST + 1), ids)
    np.testing.assert_allclose(step["logits"][:, -1], whole["logits"][:, -1], atol=1e-5)
    assert not np.allclose(step["logits"][:, -1], outputs(path, (2, 1), ids[:, -1:])[1]["logits"][:, -1], atol=1e-5)


def test_a_past_is_refused_where_no_cache_can_hold_it(tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "encoder.onnx")
    with pytest.raises(UsageError, match="takes no cache") as refused:
        feed_for(read_interface(encoder), (1, 1, 4), 0)
    assert str(encoder) in str(refused.value)
    dead_end = write_decoder(tmp_path / "decoder.onnx", 2, carries=False)
    with pytest.raises(UsageError, match=r"no output of the file fills the cache past_key_values\.0\.key"):
        feed_for(read_interface(dead_end), (1, 1, 4), 0)
    feed_for(read_interface(dead_end), (1, 4), 0)
    with pytest.raises(UsageError, match="not possible"):
        feed_for(read_interface(encoder), (1, 4, -1), 0)


def test_cache_bytes_are_null_where_the_file_does_not_give_its_sizes(tmp_path: Path) -> None:
    assert read_interface(write_decoder(tmp_path / "a.onnx", 3)).cache_bytes_per_token == 3 * WIDTH * 4
    assert read_interface(write_decoder(tmp_path / "b.onnx", 3, dim="head_dim")).cache_bytes_per_token is None
    assert read_interface(write_encoder(tmp_path / "c.onnx")).cache_bytes_per_token is None


def test_what_is_kept_of_an_encoder_does_not_count_as_growing_with_each_token() -> None:
    dims = ("batch_size", 3, "past", 8)
    names = ("past_key_values.0.decoder.key", "past_key_values.0.decoder.value", "past_key_values.0.encoder.key")
    inputs = tuple(Input(name, np.dtype(np.float16), dims) for name in names)
    assert Interface("m.onnx", inputs).cache_bytes_per_token == 2 * 3 * 8 * 2
    assert Interface("m.onnx", inputs[2:]).cache_bytes_per_token is None
