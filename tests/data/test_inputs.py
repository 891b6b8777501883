"""What models are fed: of the size they take, and read from files that hold just that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import ASTConfig, BertConfig, CLIPConfig, PreTrainedModel, ViTConfig, Wav2Vec2Config

from slimheads.data import inputs
from slimheads.data.inputs import make_inputs, read_inputs
from slimheads.errors import UsageError
from slimheads.families.config_facts import has_length, measured_shapes
from slimheads.verification.parity import cases

RNG = np.random.default_rng


def shapes_of(config: Any, batch: int, length: int) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in make_inputs(config, batch, length, RNG(0)).items()}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (BertConfig(), {"input_ids": (2, 7), "attention_mask": (2, 7)}),
        (ViTConfig(), {"pixel_values": (2, 3, 224, 224)}),
        (ViTConfig(image_size=(512, 864), num_channels=1), {"pixel_values": (2, 1, 512, 864)}),
        (ASTConfig(), {"input_values": (2, 1024, 128)}),
        (Wav2Vec2Config(), {"input_values": (2, 400 + 6 * 320)}),  # 25 ms, and 20 ms more a frame, at 16 kHz
    ],
    ids=["text", "square", "oblong", "spectrogram", "waveform"],
)
def test_inputs_have_the_size_that_published_models_take(config: Any, expected: dict[str, tuple[int, ...]]) -> None:
    assert shapes_of(config, 2, 7) == expected


def test_a_model_of_texts_and_images_gets_as_many_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "inputs_kind", lambda _: "text and image")
    config = CLIPConfig()
    text = (3, 5)
    assert shapes_of(config, *text) == {"input_ids": text, "attention_mask": text, "pixel_values": (3, 3, 224, 224)}
    assert {str(case) for case in cases(config, "feature-extraction")} >= {"batch 4, length 77, left padding"}


def test_a_waveform_of_so_many_frames_becomes_so_many_states(
    wordless_type: str, tiny: Callable[..., PreTrainedModel]
) -> None:
    model = tiny(wordless_type)
    widths = set()
    for length in (1, 2, 8):
        feed = inputs.to_torch(make_inputs(model.config, 1, length, RNG(0)), model)
        with torch.no_grad():
            widths.add(model(**feed).last_hidden_state.shape[1])
    assert widths == {1, 2, 8} if has_length(model.config) else len(widths) == 1


def test_the_same_seed_gives_the_same_inputs_and_another_does_not() -> None:
    one, same, other = (make_inputs(ViTConfig(), 1, 1, RNG(seed))["pixel_values"] for seed in (0, 0, 1))
    assert (one == same).all() and not (one == other).any()


def test_shapes_that_differ_only_in_a_length_that_inputs_lack_are_one() -> None:
    shapes = [(1, 16), (1, 128), (4, 16)]
    assert measured_shapes(ViTConfig(), shapes) == ((1,), (4,))
    assert measured_shapes(Wav2Vec2Config(), shapes) == measured_shapes(BertConfig(), shapes) == tuple(shapes)


def test_cases_of_images_and_sound_are_alone_and_in_batches_and_never_padded() -> None:
    assert [str(case) for case in cases(ViTConfig(), "image-classification")] == ["batch 1", "batch 4"]
    sound = cases(Wav2Vec2Config(), "automatic-speech-recognition")
    assert [str(case) for case in sound] == [f"batch {b}, length {n}" for b in (1, 4) for n in (1, 8, 128)]
    assert all(case.inputs.keys() == {"input_values"} for case in sound)


# ------------------------------------------------------------------------------------------------ inputs of one's own

SMALL = ViTConfig(image_size=8)
GOOD = np.ones((5, 3, 8, 8), np.float32)


def written(folder: Path, **arrays: np.ndarray) -> Path:
    save_file(arrays, folder / "in.safetensors")
    return folder / "in.safetensors"


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_file_with_a_models_inputs_is_read_as_it_is(tmp_path: Path, dtype: Any) -> None:
    found = read_inputs(written(tmp_path, pixel_values=GOOD.astype(dtype)), SMALL)
    assert found.keys() == {"pixel_values"} and torch.equal(found["pixel_values"], torch.from_numpy(GOOD))


def test_recordings_may_be_of_any_length(tmp_path: Path) -> None:
    path = written(tmp_path, input_values=np.ones((2, 12345), np.float32))
    assert read_inputs(path, Wav2Vec2Config())["input_values"].shape == (2, 12345)


BAD = {
    "another name": ({"images": GOOD}, "has images, but the model takes pixel_values"),
    "one too many": ({"pixel_values": GOOD, "mask": GOOD}, "has mask, pixel_values, but the model takes pixel_values"),
    "another number of channels": (
        {"pixel_values": GOOD[:, :1]},
        r"\[5, 1, 8, 8\], but the model takes \['n', 3, 8, 8\]",
    ),
    "no batch": ({"pixel_values": GOOD[0]}, r"\[3, 8, 8\]"),
    "nothing": ({"pixel_values": GOOD[:0]}, r"\[0, 3, 8, 8\]"),
    "bytes": ({"pixel_values": GOOD.astype(np.uint8)}, "is uint8, but the model takes float32"),
    "NaN": ({"pixel_values": GOOD * np.nan}, "NaN or infinite"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_file_with_anything_else_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    arrays, said = BAD[kind]
    with pytest.raises(UsageError, match=said) as error:
        read_inputs(written(tmp_path, **arrays), SMALL)
    assert "in.safetensors: " in error.value.what and "pixel_values" in error.value.hint
    assert error.value.keys == ("verify.inputs",)


@pytest.mark.parametrize("damage", ["missing", "empty", "text"])
def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "in.safetensors"
    if damage != "missing":
        path.write_text("" if damage == "empty" else "no tensors here", encoding="utf-8")
    with pytest.raises(UsageError, match="cannot be read"):
        read_inputs(path, SMALL)


def test_as_many_texts_as_images_are_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "inputs_kind", lambda _: "text and image")
    ids = np.ones((4, 6), np.int64)
    images = np.ones((5, 3, 224, 224), np.float32)
    with pytest.raises(UsageError, match="different numbers"):
        read_inputs(written(tmp_path, input_ids=ids, attention_mask=ids, pixel_values=images), CLIPConfig())
    found = read_inputs(written(tmp_path, input_ids=ids, attention_mask=ids, pixel_values=images[:4]), CLIPConfig())
    assert found["input_ids"].shape == (4, 6)
