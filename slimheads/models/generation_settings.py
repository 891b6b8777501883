"""Generation settings: the defaults of `generate`, as the checkpoint states them.

transformers refuses to write settings that have no effect (a temperature without sampling, a length penalty without
beams, a padding token of -1), and many published checkpoints have such settings. They do not stop a run:
1. What transformers reads is kept, even if it would refuse to write it.
2. A value that it cannot read is left out, with a notice. If the key at fault is not known, the file is refused.
3. A key that names code or another repository is left out, with a notice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from slimheads.errors import ModelRefusedError, first_line
from slimheads.intake.config_keys import allowed
from slimheads.intake.json_files import read_json_as
from slimheads.notices import notify
from slimheads.runtime.quiet import quiet_transformers

FILE = "generation_config.json"
_LOADS_MORE = {"auto_map", "trust_remote_code", "custom_generate", "assistant_model"}
# What transformers raises for a value of an unexpected type.
_UNREADABLE = (TypeError, AttributeError, KeyError)


def generation_settings(folder: Path, config: PretrainedConfig) -> GenerationConfig:
    """The settings of a checkpoint that generates text, from its generation_config.json or else its config.json.

    Raises:
        ModelRefusedError: naming the file, and the key if it is known.
    """
    kept = kept_settings(folder)
    with quiet_transformers():
        try:
            fallback = GenerationConfig.from_model_config(config)  # transformers builds it for every model
        except (ValueError, *_UNREADABLE) as error:
            raise ModelRefusedError(
                f"a generation setting that transformers does not take ({first_line(error)})",
                where=str(folder / "config.json"),
                hint="correct it, or remove it to generate with the default",
            ) from error
        if kept is None:
            return fallback
        settings = GenerationConfig.from_dict(dict(kept))
        settings._original_object_hash = hash(settings)  # as from_pretrained does: `generate` reads it
        return settings


def kept_settings(folder: Path) -> dict[str, Any] | None:
    """The contents of generation_config.json that are kept; None if there is no such file.

    Raises:
        ModelRefusedError: the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    hint = "correct the file, or remove it to generate with the defaults"
    data: dict[str, Any] = read_json_as(path, dict, hint)
    for key in sorted(_LOADS_MORE & data.keys()):
        del data[key]
        if key not in allowed().name_code:  # `examine` has a notice for those, in every JSON file
            notify(f"{FILE}: '{key}' is left out because it can name code or another model to load")
    while (problem := _problem(data)) is not None:
        named = [key for key in re.findall(r"`(\w+)`", str(problem)) if key in data]
        if not (named and isinstance(problem, ValueError)):
            to_blame = [key for key, value in data.items() if isinstance(_problem({key: value}), type(problem))]
            what = f"'{to_blame[0]}' has a value" if to_blame else "holds values"
            raise ModelRefusedError(
                f"{what} that transformers cannot read ({first_line(problem)})", where=str(path), hint=hint
            ) from problem
        value, reason = json.dumps(data.pop(named[0]))[:40], first_line(problem).rstrip(".")
        notify(f"{FILE}: '{named[0]}: {value}' is left out because transformers refuses it: {reason}")
    return data


def write_settings(model: PreTrainedModel, source: Path | None, folder: Path) -> None:
    """Writes the settings of a model that generates text: the source's own file if they have not changed."""
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
    """Stops `save_pretrained` from writing generation settings and from moving those in config.json elsewhere."""
    model.__dict__["can_generate"] = lambda: False
    try:
        yield
    finally:
        del model.__dict__["can_generate"]


def _problem(data: dict[str, Any]) -> Exception | None:
    """The error with which transformers refuses the settings, if it does."""
    try:
        with quiet_transformers():
            GenerationConfig.from_dict(dict(data))
    except (ValueError, *_UNREADABLE) as error:
        return error
    return None
