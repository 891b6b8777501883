"""What is refused before any work, and with which line of the recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
from whole_runs import checkpoint

from slimheads.errors import EnvironmentLackError, UsageError
from slimheads.models.checkpoint import find
from slimheads.pipeline.checks import require_providers, require_usable
from slimheads.recipe.recipe import Recipe


def test_a_missing_provider_is_told_with_its_line_unless_it_may_be_skipped(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: m\nbench:\n  providers: [cpu, cuda]\n")
    recipe = Recipe.read(path)
    with pytest.raises(EnvironmentLackError) as caught, recipe.located():
        require_providers(recipe)
    assert caught.value.where == f"{path}:3:14"
    require_providers(Recipe.read(path, ["bench.on_missing=skip"]))
    require_providers(Recipe.read(path, ["bench.providers=[cpu]"]))


def test_a_text_is_only_required_where_the_recipe_names_one(tmp_path: Path) -> None:
    source = find(str(checkpoint()))
    require_usable(Recipe(model="m"), source)
    with pytest.raises(UsageError, match=r"none\.txt"):
        require_usable(Recipe.model_validate({"model": "m", "verify": {"text": str(tmp_path / "none.txt")}}), source)


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_a_shape_may_be_as_long_as_the_model_and_no_longer(model_type: str) -> None:
    source = find(str(checkpoint(model_type)))
    for length in (160, 161):
        recipe = Recipe.model_validate({"model": "m", "bench": {"shapes": [[1, 8], [2, length]]}})
        if length == 160:
            require_usable(recipe, source)
        else:
            with pytest.raises(UsageError, match=r"the shape \[2, 161\] is longer than the 160 positions"):
                require_usable(recipe, source)


@pytest.mark.parametrize(
    ("kind", "shape", "said"),
    [
        ("gpt2", "[2, 1, 159]", None),
        ("gpt2", "[2, 1, 160]", "the shape [2, 1, 160] is longer than the 160 positions"),
        ("bert", "[1, 1, 8]", "a model for feature-extraction has no cache"),
        ("t5", "[1, 1, 8]", "has its decoder measured with a full cache at every [batch, length]"),
    ],
)
def test_a_past_is_for_decoders_and_as_long_as_their_positions(
    kind: str, shape: str, said: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"model: m\nbench:\n  shapes: [[1, 8], {shape}]\n")
    recipe, source = Recipe.read(path), find(str(checkpoint(kind)))
    if said is None:
        require_usable(recipe, source)
        return
    with pytest.raises(UsageError) as caught, recipe.located():
        require_usable(recipe, source)
    assert said in str(caught.value) and caught.value.where == f"{path}:3:11"
