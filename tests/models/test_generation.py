"""Generation settings ship as they were, whatever transformers thinks of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig, PreTrainedModel

from slimheads.errors import ModelRefusedError
from slimheads.models.generation_settings import FILE, kept_settings
from slimheads.models.loading import load, save
from slimheads.notices import collected
from slimheads.pruning.plan import Plan
from slimheads.pruning.surgery import prune

Tiny = Callable[..., PreTrainedModel]
Ragged = Callable[..., Plan]


def decoder(tiny: Tiny, folder: Path, settings: Any = None, **config: Any) -> Path:
    """A saved llama with these generation settings and additions to its config.json."""
    tiny("llama").save_pretrained(folder)
    (folder / FILE).unlink()
    if settings is not None:
        (folder / FILE).write_text(settings if isinstance(settings, str) else json.dumps(settings))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def slim_of(source: Path, plan: Ragged, out: Path) -> Path:
    model = load(source)
    save(prune(model, plan(model)), out)
    return out


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "top_k": 3},
        {"num_beams": 1, "early_stopping": True, "length_penalty": 0.8},
        {"pad_token_id": -1, "eos_token_id": [3, 4], "temperature": None},
        {"output_scores": True, "chat_format": "chatml", "max_window_size": 6144},
        {"suppress_tokens": [1, 2], "forced_decoder_ids": [[1, None]], "lang_to_id": {"<|en|>": 5}},
    ],
    ids=["sampling", "beams", "padding", "unknown keys", "speech"],
)
def test_settings_come_through_unchanged(tiny: Tiny, ragged: Ragged, tmp_path: Path, settings: dict[str, Any]) -> None:
    source = decoder(tiny, tmp_path / "model", settings)
    with collected() as told:
        slim = slim_of(source, ragged, tmp_path / "slim")
        assert load(slim).generation_config.to_dict() == load(source).generation_config.to_dict()
    assert json.loads((slim / FILE).read_text()) == settings
    assert GenerationConfig.from_pretrained(slim).to_dict() == GenerationConfig.from_pretrained(source).to_dict()
    assert told == []


def test_settings_in_config_json_stay_there(tiny: Tiny, ragged: Ragged, tmp_path: Path) -> None:
    own = {"temperature": 0.4, "num_beams": 3, "task_specific_params": {"summary": {"max_length": 9}}}
    slim = slim_of(decoder(tiny, tmp_path / "model", {"max_length": 31}, **own), ragged, tmp_path / "slim")
    written = json.loads((slim / "config.json").read_text())
    assert {key: written[key] for key in own} == own
    assert json.loads((slim / FILE).read_text()) == {"max_length": 31}


def test_what_a_caller_changed_is_what_is_saved(tiny: Tiny, tmp_path: Path) -> None:
    model = load(decoder(tiny, tmp_path / "model", {"max_length": 31}))
    model.generation_config.max_length = 32
    save(model, tmp_path / "slim")
    assert json.loads((tmp_path / "slim" / FILE).read_text())["max_length"] == 32
    assert model.can_generate()


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"num_return_sequences": 3, "max_length": 31}, "num_return_sequences"),
        ({"early_stopping": "soon", "max_length": 31}, "early_stopping"),
        ({"max_new_tokens": -4, "max_length": 31}, "max_new_tokens"),
        ({"streamer": 1, "max_length": 31}, "streamer"),
        ({"assistant_model": "org/other", "max_length": 31}, "assistant_model"),
        ({"auto_map": {"GenerationConfig": "code.Made"}, "max_length": 31}, "auto_map"),
    ],
)
def test_what_transformers_does_not_take_is_left_out_and_told(
    tiny: Tiny, ragged: Ragged, tmp_path: Path, settings: dict[str, Any], key: str
) -> None:
    with collected() as told:
        slim = slim_of(decoder(tiny, tmp_path / "model", settings), ragged, tmp_path / "slim")
    assert len(told) == 1 and key in told[0] and FILE in told[0]
    assert json.loads((slim / FILE).read_text()) == {"max_length": 31}
    GenerationConfig.from_pretrained(slim)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "JSON"),
        ("null", "not a JSON object"),
        ("[]", "not a JSON object"),
        ('{"temperature": NaN}', "NaN"),
        ('{"max_new_tokens": "5"}', "'max_new_tokens'"),
        ('{"max_length": 9, "watermarking_config": {"bad": 1}}', "'watermarking_config'"),
    ],
)
def test_a_damaged_file_is_refused_by_its_name(tiny: Tiny, tmp_path: Path, text: str, word: str) -> None:
    with pytest.raises(ModelRefusedError) as refused:
        load(decoder(tiny, tmp_path / "model", text))
    assert refused.value.where == str(tmp_path / "model" / FILE)
    assert word in refused.value.what and "remove it" in refused.value.hint


def test_a_setting_that_no_model_can_be_built_with_is_refused_by_name(tiny: Tiny, tmp_path: Path) -> None:
    source = decoder(tiny, tmp_path / "model", {"max_length": 31}, num_return_sequences=3)
    with pytest.raises(ModelRefusedError, match="num_return_sequences") as refused:
        load(source)
    assert refused.value.where == str(source / "config.json")


def test_there_may_be_no_file(tmp_path: Path) -> None:
    assert kept_settings(tmp_path) is None
