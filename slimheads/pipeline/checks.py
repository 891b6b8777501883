"""Checks before a run does any work: what the recipe names exists, and fits the model."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from slimheads.data.inputs import read_inputs
from slimheads.data.texts import read_texts
from slimheads.errors import UsageError
from slimheads.exporting.precisions import PRECISIONS
from slimheads.families.config_facts import NOUNS, inputs_kind, text_config
from slimheads.families.limits import require_fit
from slimheads.intake.json_files import read_json_as
from slimheads.models.checkpoint import Source, read_config
from slimheads.notices import notify
from slimheads.recipe.recipe import Recipe
from slimheads.runtime.cpu import require_int8_target
from slimheads.runtime.sessions import require_provider
from slimheads.side_files.embedding import require_embedding
from slimheads.side_files.sentence_modules import task_of_modules
from slimheads.side_files.shipped_files import note_files_left_out, side_files
from slimheads.side_files.tokenizing import load_tokenizer, require_vocabulary


def require_providers(recipe: Recipe) -> None:
    """Refuses, before any work, a recipe with a provider that is missing and may not be skipped.

    Raises:
        EnvironmentLackError: about the recipe's key.
    """
    for provider in recipe.bench.providers:
        if recipe.bench.on_missing == "fail":
            require_provider(provider)


def require_target(recipe: Recipe) -> None:
    """Refuses, before any work, int8 for a CPU whose arithmetic this CPU does not have.

    Raises:
        EnvironmentLackError: with the recipe's line.
    """
    if any(PRECISIONS[precision].for_cpus for precision in recipe.export.precisions):
        require_int8_target(recipe.export.int8_for)


def require_usable(recipe: Recipe, source: Source) -> None:
    """Refuses, before any work, a sample of the recipe that cannot be read or does not fit the model, shapes that are
    too long for the model, and latency tables of an encoder-decoder.

    Raises:
        UsageError: about a key of the recipe.
    """
    config = read_config(source.folder)
    fed = inputs_kind(config)
    for key, usable, other in (("text", fed == "text", "inputs"), ("inputs", fed != "text", "text")):
        if getattr(recipe.verify, key) and not usable:
            raise UsageError(
                f"drift of this model is not measured on {key}: it is fed {NOUNS[fed]}s",
                keys=(f"verify.{key}",),
                hint=f"name your own sample as verify.{other}",
            )
    if recipe.gates.min_cosine is not None and fed != "text" and not recipe.verify.inputs:
        raise UsageError(
            f"there is no built-in sample of {NOUNS[fed]}s to measure the cosine on",
            keys=("gates.min_cosine",),
            hint="name your own sample as verify.inputs",
        )
    if recipe.select.auto_steps and config.is_encoder_decoder:
        step = recipe.select.auto_steps[0]
        raise UsageError(
            f"{step}: auto takes a latency table, and there is none of an encoder-decoder ({source.model_type})",
            keys=(f"select.{step}",),
            hint="give a number",
        )
    if recipe.verify.text:
        read_texts(Path(recipe.verify.text))
    require_side_files(recipe, source)
    if recipe.verify.inputs:
        read_inputs(Path(recipe.verify.inputs), config)
    for shape in recipe.bench.shapes:
        _require_cache(source, config, shape)
    require_fit(config, recipe.bench.shapes)


def require_side_files(recipe: Recipe, source: Source) -> None:
    """Refuses, before any work, damaged files that ship beside the weights, and a tokenizer that does not load.

    Files that will not be in slim/ are noted.

    Raises:
        ModelRefusedError: naming the file.
        EnvironmentLackError: the tokenizer needs a package that is not installed.
    """
    folder, config = source.folder, read_config(source.folder)
    for relative in side_files(folder):
        if relative.suffix == ".json":
            read_json_as(folder / relative, object)
    if inputs_kind(config) == "text":
        require_embedding(folder, config.hidden_size)
    tokenizer = load_tokenizer(folder, config)
    if tokenizer and inputs_kind(config) == "text":
        for sample in dict.fromkeys((None, recipe.verify.text)):
            texts = read_texts(Path(sample) if sample else None)
            require_vocabulary(tokenizer, texts, text_config(config).vocab_size, folder)
    wanted = task_of_modules(folder)
    if wanted not in (None, source.task) and inputs_kind(config) == "text":
        notify(f"sentence-transformers cannot use a slim/ made for {source.task}: for that, set task: {wanted}")
    note_files_left_out(folder)


def _require_cache(source: Source, config: PretrainedConfig, shape: tuple[int, ...]) -> None:
    if len(shape) < 3 or source.task == "text-generation":
        return
    why = "has no cache to hold them"
    if config.is_encoder_decoder:
        why = "has its decoder measured with a full cache at every [batch, length]"
    raise UsageError(
        f"the shape {list(shape)} asks for {shape[2]} tokens in the cache, and a model for {source.task} {why}",
        keys=("bench.shapes",),
        hint="name it as [batch, length]",
    )
