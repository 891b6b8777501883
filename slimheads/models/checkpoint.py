"""A checkpoint on disk: where it comes from, which of its files count, and what is refused before it is loaded."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from slimheads.errors import EnvironmentLackError, ModelRefusedError, UsageError
from slimheads.families.family import check_head_counts, dense_value, family_of, site_count
from slimheads.intake.examine import examine, judged_config
from slimheads.intake.model_files import check_shards
from slimheads.intake.switches import without_switches
from slimheads.models.generation import settings_of
from slimheads.pruning.plan_record import recorded_plan
from slimheads.side_files.files import HUB_PATTERNS
from slimheads.side_files.sentence_modules import MODULES, task_of_modules

# The tasks slimheads proves, by optimum's names, with the Auto class that loads each. An architecture that several Auto
# classes list has the first of their tasks.
TASKS: dict[str, str] = {
    "text-generation": "AutoModelForCausalLM",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
    "zero-shot-image-classification": "AutoModelForZeroShotImageClassification",
    "object-detection": "AutoModelForObjectDetection",
    "audio-classification": "AutoModelForAudioClassification",
    "automatic-speech-recognition": "AutoModelForCTC",
    "feature-extraction": "AutoModel",
}
# The same for encoder-decoders, in the order of preference: nothing else of them is proven.
SEQ2SEQ_TASKS: dict[str, str] = {
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "automatic-speech-recognition": "AutoModelForSpeechSeq2Seq",
}
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk and what it will be loaded as."""

    given: str  # as the recipe or the user named it
    folder: Path
    task: str
    model_type: str
    family: str
    architecture: str  # the transformers class that is built
    from_hub: bool = False
    task_named: bool = False  # by the user, or by modules.json, rather than guessed

    @property
    def asked(self) -> str:
        """The task as it was asked for: "auto" where it was guessed."""
        return self.task if self.task_named else "auto"


def find(source: str, task: str = "auto") -> Source:
    """Finds a checkpoint and reads its config, without reading weights.

    Args:
        source: a folder, `pkg://package/folder` (a folder in an installed package) or a hub id.
        task: "auto" (from the checkpoint's architecture; of a sentence-transformers folder, what its modules take) or
            a key of `TASKS` or `SEQ2SEQ_TASKS`.

    Raises:
        UsageError: there is no such folder, package or hub id, or the task is unknown.
        EnvironmentLackError: a hub id that is not in the local cache, and the hub cannot be reached.
        ModelRefusedError: the checkpoint is not one that slimheads reads, or its family is not covered.
    """
    folder = _folder(source)
    refuse_adapter(folder)
    examine(folder)
    of_modules = task_of_modules(folder)
    config = read_config(folder)
    family, rules = family_of(config)
    if of_modules and config.is_encoder_decoder:
        raise ModelRefusedError(
            "sentence-transformers takes the encoder alone of an encoder-decoder, which is not covered",
            where=str(folder / MODULES),
            hint=f"remove {MODULES} to slim the whole model",
        )
    if task == "auto" and of_modules and rules.inputs == "text":
        task = of_modules
    named = task != "auto"
    task = task if named else _task_of(config)
    if task not in TASKS | SEQ2SEQ_TASKS:
        known = ", ".join(TASKS | SEQ2SEQ_TASKS)
        raise UsageError(f"unknown task '{task}'", keys=("task",), hint=f"use auto or one of {known}")
    architecture = _architecture(config, task)
    require_padding(architecture, config, folder)
    if architecture.can_generate():
        settings_of(folder, config)
    from_hub = not source.startswith("pkg://") and folder != Path(source).expanduser()
    return Source(source, folder, task, str(config.model_type), family, architecture.__name__, from_hub, named)


def describe(source: Source) -> list[str]:
    """What is known of a checkpoint from its config alone, a line each."""
    config = read_config(source.folder)
    _, family = family_of(config)
    blocks: dict[str, int] = {}
    for row in family.rows(config):
        units, heads = (dense_value(config, key) for key in family.keys(row))
        words = f"{heads} heads" if isinstance(heads, int) else f"{', '.join(map(str, heads))} heads by stage"
        if units == 1 and heads != 1:
            words += ", one KV head for all, which stays"
        elif heads != units:
            words += f", {units} KV heads: {heads // units} query heads go together"
        blocks[words] = blocks.get(words, 0) + site_count(config, row)
    lines = [f"{count} attention blocks of {words}" for words, count in blocks.items()]
    return [f"{source.architecture} of the {family.title} family, used for {source.task}", *lines]


def auto_classes(config: PretrainedConfig) -> Mapping[str, str]:
    """The tasks that are proven of models of a kind, with the Auto class that loads each."""
    return SEQ2SEQ_TASKS if config.is_encoder_decoder else TASKS


def refuse_adapter(folder: Path) -> None:
    """Refuses a folder with an adapter (LoRA, say): alone it is no model, and beside a model loaders may apply it.

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
        hint += "; if the weights beside it are merged already, take the adapter's files away"
    raise ModelRefusedError("an adapter, which slimheads does not apply", where=str(found[0]), hint=hint)


def require_padding(architecture: type[PreTrainedModel], config: PretrainedConfig, folder: Path) -> None:
    """Refuses a classifier that reads the last token of each text and cannot tell it from padding.

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
        f"pad_token_id is {json.dumps(padding)}, and {architecture.__name__} finds the last token of a text by it",
        where=str(folder / "config.json"),
        hint=f"set pad_token_id to the tokenizer's padding token, one of 0 to {tokens - 1}",
    )


def read_config(folder: Path) -> PretrainedConfig:
    """Builds the configuration that config.json describes, from the keys that count (see `judged_config`).

    Raises:
        ModelRefusedError: the file is missing, damaged, of an unknown model type, or has a key that is refused.
    """
    path = folder / "config.json"
    try:
        data = judged_config(folder)
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
            hint="start from the model before that",
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
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()), key=str)
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
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
            "pickled weights are refused, for loading them can run code",
            where=str(folder / pickles[0]),
            hint="convert with transformers' `save_pretrained(..., safe_serialization=True)`",
        )
    raise ModelRefusedError("there is no model.safetensors", where=str(folder), hint="name a folder with weights")


def _folder(source: str) -> Path:
    if source.startswith("pkg://"):
        package, _, inside = source.removeprefix("pkg://").partition("/")
        inside_package = package.isidentifier() and not Path(inside).is_absolute() and ".." not in Path(inside).parts
        if (package or inside) and not inside_package:
            raise UsageError("no folder of a package", where=source, hint="write pkg://package/folder")
        spec = find_spec(package) if package else None
        if spec is None or not spec.submodule_search_locations:
            raise EnvironmentLackError(
                f"package '{package}' is not installed",
                where=source,
                keys=("model",),
                hint=f"pip install {package.replace('_', '-')}",
            )
        folder = Path(spec.submodule_search_locations[0], inside)
        if not folder.is_dir() or not folder.resolve().is_relative_to(
            Path(spec.submodule_search_locations[0]).resolve()
        ):
            raise UsageError(
                f"the package {package} has no folder '{inside}'",
                where=source,
                keys=("model",),
                hint="check the path after the package",
            )
        return folder
    folder = Path(os.path.expanduser(source))  # noqa: PTH111 - pathlib's raises for an unknown user
    if folder.is_dir():
        return folder
    if folder.exists() or folder.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise UsageError(
            f"there is no folder '{source}'",
            keys=("model",),
            hint="name a checkpoint folder, pkg://package/folder or a hub id",
        )
    return _from_hub(source)


def _from_hub(source: str) -> Path:
    try:
        return Path(snapshot_download(source, allow_patterns=HUB_PATTERNS))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UsageError(
            f"'{source}' is neither a folder here nor a model on the hub",
            keys=("model",),
            hint="check the name, and your access token",
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise EnvironmentLackError(
            f"there is no folder '{source}' here, and as a hub id it is not in the cache and the hub cannot be reached",
            keys=("model",),
            hint="check the path, connect, or download the model first with `hf download`",
        ) from error


def _task_of(config: PretrainedConfig) -> str:
    known = auto_classes(config)
    for name in config.architectures or ():
        for task, auto in known.items():
            if name in class_names(auto, config):
                return task
    if not config.is_encoder_decoder:
        return "feature-extraction"
    others = set(config.architectures or ()) - set(class_names("AutoModel", config))
    if others:
        raise ModelRefusedError(
            f"{min(others)} is not covered: of encoder-decoders only what generates text is",
            where="config.json",
            hint="name a task that generates text, if that is what the model is for",
        )
    return next(task for task, auto in known.items() if class_names(auto, config))


def class_names(auto: str, config: PretrainedConfig) -> tuple[str, ...]:
    """Names of the classes that an Auto class builds from such a configuration, the one it prefers first."""
    names = getattr(transformers, auto)._model_mapping._model_mapping.get(config.model_type, ())
    return (names,) if isinstance(names, str) else tuple(names)


def _architecture(config: PretrainedConfig, task: str) -> type[PreTrainedModel]:
    known = auto_classes(config)
    names = class_names(known[task], config) if task in known else ()
    if not names:
        raise UsageError(f"{config.model_type} has no model for '{task}'", keys=("task",), hint="use task: auto")
    name = next((name for name in config.architectures or () if name in names), names[0])
    return cast(type[PreTrainedModel], getattr(transformers, name))
