"""What has to hold before a run does any work: what a recipe asks for is there, and is of a kind the model can use."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from slimheads.checkpoint import Source, read_config
from slimheads.errors import UsageError
from slimheads.inputs import NOUNS, inputs_kind, read_inputs
from slimheads.limits import require_fit
from slimheads.recipe import Recipe
from slimheads.sessions import require_provider
from slimheads.texts import read_texts


def require_providers(recipe: Recipe) -> None:
    """Fails before any work where a provider of the recipe is missing and may not be skipped.

    Raises:
        EnvironmentLackError: about the recipe's key.
    """
    for provider in recipe.bench.providers:
        if recipe.bench.on_missing == "fail":
            require_provider(provider)


def require_usable(recipe: Recipe, source: Source) -> None:
    """Fails before any work where the recipe's own sample cannot be read or is of another kind than what the model is
    fed, a shape is too long for the model, or a latency table is asked for that cannot be.

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
    if recipe.select.multiple_of == "auto" and config.is_encoder_decoder:
        raise UsageError(
            f"multiple_of: auto takes a latency table, and there is none of an encoder-decoder ({source.model_type})",
            keys=("select.multiple_of",),
            hint="give a number, say that of bench.threads",
        )
    if recipe.verify.text:
        read_texts(Path(recipe.verify.text))
    if recipe.verify.inputs:
        read_inputs(Path(recipe.verify.inputs), config)
    for shape in recipe.bench.shapes:
        _require_cache(source, config, shape)
    require_fit(config, recipe.bench.shapes)


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
