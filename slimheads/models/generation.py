"""Generation settings: what `generate` does when nothing is asked for. They ship as they were.

transformers refuses to write settings that have no effect (a temperature without sampling, a length penalty without
beams, a padding token of -1), as many published checkpoints have them. No such setting stops a run here:
1. What transformers reads is kept, whether or not it would write it again.
2. A value that it does not even read is left out, and told; what cannot be told apart is refused.
3. A key that names code or another repository is left out, and told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel

from slimheads.errors import ModelRefusedError, first_line
from slimheads.intake.config_keys import allowed
from slimheads.notices import tell
from slimheads.runtime.quiet import quiet_transformers

FILE = "generation_config.json"

_LOADS_MORE = {"auto_map", "trust_remote_code", "custom_generate", "assistant_model"}
# What transformers raises for a value of a type that it does not expect.
_UNREADABLE = (TypeError, AttributeError, KeyError)


def settings_of(folder: Path, config: PretrainedConfig) -> GenerationConfig:
    """The settings of a checkpoint that generates text: of its generation_config.json, else of its config.json.

    Raises:
        ModelRefusedError: naming the file, and the key where one is to blame.
    """
    kept = kept_settings(folder)
    with quiet_transformers():
        try:
            fallback = GenerationConfig.from_model_config(config)  # every model makes it, whatever the file says
        except (ValueError, *_UNREADABLE) as error:
            raise ModelRefusedError(
                f"a generation setting that transformers does not take ({first_line(error)})",
                where=str(folder / "config.json"),
                hint="correct it, or remove it to generate with the default",
            ) from error
        if kept is None:
            return fallback
        settings = GenerationConfig.from_dict(dict(kept))
        settings._original_object_hash = hash(settings)  # as from_pretrained does: `generate` asks for it
        return settings


def kept_settings(folder: Path) -> dict[str, Any] | None:
    """What generation_config.json holds and is kept; None where there is no such file.

    Raises:
        ModelRefusedError: the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    hint = "correct the file, or remove it to generate with the defaults"
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelRefusedError(f"not readable as JSON ({error})", where=str(path), hint=hint) from error
    if not isinstance(data, dict):
        raise ModelRefusedError(f"holds {json.dumps(data)[:40]}, not settings by name", where=str(path), hint=hint)
    for key in sorted(_LOADS_MORE & data.keys()):
        del data[key]
        if key not in allowed().name_code:  # of those every JSON file is judged, and the user told
            tell(f"{FILE}: '{key}' is left out, for it can name code or another model to load")
    while (problem := _problem(data)) is not None:
        named = [key for key in re.findall(r"`(\w+)`", str(problem)) if key in data]
        if not (named and isinstance(problem, ValueError)):
            to_blame = [key for key, value in data.items() if isinstance(_problem({key: value}), type(problem))]
            what = f"'{to_blame[0]}' has a value" if to_blame else "holds values"
            raise ModelRefusedError(
                f"{what} that transformers cannot read ({first_line(problem)})", where=str(path), hint=hint
            ) from problem
        value = json.dumps(data.pop(named[0]))[:40]
        tell(
            f"{FILE}: '{named[0]}: {value}' is left out, for transformers refuses it: {first_line(problem).rstrip('.')}"
        )
    return data


def write_settings(model: PreTrainedModel, source: Path | None, folder: Path) -> None:
    """Writes the settings of a model that generates text: as its source has them, where they are still those."""
    if not model.can_generate() or model.generation_config is None:
        return
    kept = kept_settings(source) if source else None
    with quiet_transformers():
        same = (
            kept is not None and GenerationConfig.from_dict(dict(kept)).to_dict() == model.generation_config.to_dict()
        )
    text = json.dumps(kept, indent=2) + "\n" if same else model.generation_config.to_json_string()
    (folder / FILE).write_text(text, encoding="utf-8")


@contextmanager
def settings_left_alone(model: PreTrainedModel) -> Iterator[None]:
    """Lets `save_pretrained` write no generation settings, nor move those of config.json elsewhere."""
    model.__dict__["can_generate"] = lambda: False
    try:
        yield
    finally:
        del model.__dict__["can_generate"]


def _problem(data: dict[str, Any]) -> Exception | None:
    """Why transformers cannot read settings."""
    try:
        with quiet_transformers():
            GenerationConfig.from_dict(dict(data))
    except (ValueError, *_UNREADABLE) as error:
        return error
    return None


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def seq2seq_generate(model: Any, inputs: Mapping[str, torch.Tensor], start: int, new_tokens: int) -> torch.Tensor:
    """Plain greedy search of an encoder-decoder, in torch or in ONNX Runtime; int64 [batch, 1 + new_tokens]."""
    options = greedy_options(new_tokens)
    options["generation_config"].decoder_start_token_id = start
    # Whisper's own `generate` adds languages, timestamps and windows to this, from a config it may not have.
    made: torch.Tensor = GenerationMixin.generate(model, **inputs, **options)
    return made


def greedy_options(new_tokens: int) -> dict[str, Any]:
    """What makes `generate` plain greedy search of a fixed length, whatever generation_config.json says."""
    return {
        "generation_config": GenerationConfig(max_new_tokens=new_tokens, do_sample=False, num_beams=1, pad_token_id=0),
        "use_model_defaults": False,
        "eos_token_id": None,  # taken from the model unless it is given here
        "use_cache": True,
    }
