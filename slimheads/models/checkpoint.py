"""A checkpoint on disk: where it comes from, which of its files count, and what is refused before it is loaded."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from slimheads.errors import ModelRefusedError, UsageError
from slimheads.families.family import check_head_counts, dense_value, family_of, site_count
from slimheads.intake.examine import checked_config, examine
from slimheads.intake.json_files import read_json
from slimheads.intake.model_files import check_shards
from slimheads.intake.switches import without_switches
from slimheads.models.generation_settings import generation_settings
from slimheads.models.locate import locate
from slimheads.models.tasks import SEQ2SEQ_TASKS, TASKS, architecture_of, task_of
from slimheads.pruning.plan_record import recorded_plan
from slimheads.side_files.sentence_modules import MODULES, task_of_modules

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk and what it will be loaded as."""

    given: str  # as the recipe or the user wrote it
    folder: Path
    task: str
    model_type: str
    family: str
    architecture: str  # the transformers class that is built
    from_hub: bool = False
    task_named: bool = False  # by the user or by modules.json, not guessed

    @property
    def given_task(self) -> str:
        """The task to pass to `find` for the same result: "auto" if it was guessed."""
        return self.task if self.task_named else "auto"


def find(source: str, task: str = "auto") -> Source:
    """Finds a checkpoint and reads its config, without reading weights.

    Args:
        source: a folder, `pkg://package/folder` (a folder in an installed package) or a hub id.
        task: "auto" (from the checkpoint's architecture, or from the modules of a sentence-transformers folder) or
            a key of `TASKS` or `SEQ2SEQ_TASKS`.

    Raises:
        UsageError: there is no such folder, package or hub id, or the task is unknown.
        EnvironmentLackError: a hub id that is not in the local cache, and the hub cannot be reached.
        ModelRefusedError: slimheads does not read such a checkpoint, or its family is not covered.
    """
    folder = locate(source)
    refuse_adapter(folder)
    examine(folder)
    of_modules = task_of_modules(folder)
    config = read_config(folder)
    family, rules = family_of(config)
    if of_modules and config.is_encoder_decoder:
        raise ModelRefusedError(
            "sentence-transformers uses only the encoder of an encoder-decoder, which is not covered",
            where=str(folder / MODULES),
            hint=f"remove {MODULES} to prune the whole model",
        )
    if task == "auto" and of_modules and rules.inputs == "text":
        task = of_modules
    named = task != "auto"
    task = task if named else task_of(config)
    if task not in TASKS | SEQ2SEQ_TASKS:
        known = ", ".join(TASKS | SEQ2SEQ_TASKS)
        raise UsageError(f"unknown task '{task}'", keys=("task",), hint=f"use auto or one of {known}")
    architecture = architecture_of(config, task)
    require_padding(architecture, config, folder)
    if architecture.can_generate():
        generation_settings(folder, config)
    from_hub = not source.startswith("pkg://") and folder != Path(source).expanduser()
    return Source(source, folder, task, str(config.model_type), family, architecture.__name__, from_hub, named)


def describe(source: Source) -> list[str]:
    """What the config says about a checkpoint, one line per fact."""
    config = read_config(source.folder)
    _, family = family_of(config)
    blocks: dict[str, int] = {}
    for row in family.rows(config, "attention"):
        units, heads = (dense_value(config, key) for key in family.keys(row))
        words = f"{heads} heads" if isinstance(heads, int) else f"{', '.join(map(str, heads))} heads by stage"
        if units == 1 and heads != 1:
            words += ", one KV head for all, which is kept"
        elif heads != units:
            words += f", {units} KV heads: {heads // units} query heads are deleted together"
        blocks[words] = blocks.get(words, 0) + site_count(config, str(row.count))
    lines = [f"{count} attention blocks of {words}" for words, count in blocks.items()]
    return [f"{source.architecture} of the {family.title} family, used for {source.task}", *lines]


def refuse_adapter(folder: Path) -> None:
    """Refuses a folder with an adapter (e.g. LoRA): alone it is not a model, and loaders may apply it to a model.

    Raises:
        ModelRefusedError: naming the file.
    """
    found = sorted(folder.glob("adapter_config.json")) + sorted(folder.glob("adapter_model*"))
    if not found:
        return
    hint = (
        "merge it into its base model first, with peft's merge_and_unload() and save_pretrained, and name that folder"
    )
    if any((folder / name).is_file() for name in _WEIGHTS):
        hint += "; if the weights beside it are merged already, remove the adapter's files"
    raise ModelRefusedError("an adapter, which slimheads does not apply", where=str(found[0]), hint=hint)


def require_padding(architecture: type[PreTrainedModel], config: PretrainedConfig, folder: Path) -> None:
    """Refuses a classifier that reads the last token of each text but cannot distinguish it from padding.

    Raises:
        ModelRefusedError: naming the key.
    """
    if "pad_token_id" not in inspect.unwrap(architecture.forward).__code__.co_names:
        return
    text = config.get_text_config()
    padding, tokens = config.pad_token_id, text.vocab_size
    if isinstance(padding, int) and 0 <= padding < tokens:
        return
    raise ModelRefusedError(
        f"pad_token_id is {json.dumps(padding)}, but {architecture.__name__} needs it to find the last token of a text",
        where=str(folder / "config.json"),
        hint=f"set pad_token_id to the tokenizer's padding token, one of 0 to {tokens - 1}",
    )


def read_config(folder: Path) -> PretrainedConfig:
    """Builds the configuration from the keys of config.json that matter (see `checked_config`).

    Raises:
        ModelRefusedError: the file is missing, damaged, of an unknown model type, or has a key that is refused.
    """
    path = folder / "config.json"
    try:
        data = checked_config(folder)
    except FileNotFoundError as error:
        raise ModelRefusedError(
            "there is no config.json", where=str(folder), hint="name a transformers checkpoint folder"
        ) from error
    try:
        config = CONFIG_MAPPING[data["model_type"]].from_dict(without_switches(data))
        _, family = family_of(config)
        plan = recorded_plan(config, family)
        check_head_counts(config, family)
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise ModelRefusedError(
            f"damaged configuration ({error})", where=str(path), hint="fetch the model again"
        ) from error
    if config.pruned_heads and plan is None:
        raise ModelRefusedError(
            "heads were already deleted by transformers' own prune_heads",
            where=str(path),
            hint="start from the model before that pruning",
        )
    return cast(PretrainedConfig, config)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint, shards included.

    Raises:
        ModelRefusedError: there are none (pickled weights are named and refused), or a shard is missing.
    """
    single, index = (folder / name for name in _WEIGHTS)
    if index.is_file() and not single.is_file():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()), key=str)
        except (KeyError, AttributeError, TypeError) as error:
            raise ModelRefusedError("damaged index", where=str(index), hint="fetch the model again") from error
        check_shards(index, names)
        shards = tuple(folder / name for name in names)
        for shard in shards:
            if not shard.is_file():
                raise ModelRefusedError("a shard is missing", where=str(shard), hint="fetch the model again")
        return shards
    if single.is_file():
        return (single,)
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        raise ModelRefusedError(
            "pickled weights are refused because loading them can run code",
            where=str(folder / pickles[0]),
            hint="convert with transformers' `save_pretrained(..., safe_serialization=True)`",
        )
    raise ModelRefusedError("there is no model.safetensors", where=str(folder), hint="name a folder with weights")
