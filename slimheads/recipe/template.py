"""A recipe to start from, as `slimheads init` writes it."""

from __future__ import annotations

from collections.abc import Sequence

from ruamel.yaml.comments import CommentedMap

from slimheads.recipe.dump import dump_yaml
from slimheads.recipe.recipe import Recipe
from slimheads.recipe.sections import DEFAULT_SHAPES
from slimheads.strict_yaml import printable

_DECODERS_ONLY = frozenset({"export.kv_axes", "gates.max_perplexity_ratio", "gates.min_top1_agreement"})
_ALL_BUT_DECODERS = frozenset({"gates.min_cosine"})


def commented_recipe(
    model: str,
    task: str = "auto",
    is_decoder: bool = False,
    facts: Sequence[str] = (),
    *,
    fed_texts: bool = True,
    shapes: Sequence[tuple[int, ...]] = DEFAULT_SHAPES,
) -> str:
    """A recipe to start from: every section and key with its default and its meaning.

    Args:
        model: where the model is, as `Recipe.model` takes it.
        task: as `Recipe.task` takes it.
        is_decoder: whether the model is a decoder; keys that do not apply to the model are left out.
        facts: about the model, one line each, for the comment at the top.
        fed_texts: whether the model takes text only.
        shapes: to measure, [batch, tokens or frames].

    Returns:
        YAML text that `Recipe.read` reads as `Recipe(model=model, task=task)` with these shapes.
    """
    left_out = _ALL_BUT_DECODERS if is_decoder else _DECODERS_ONLY
    if task == "text2text-generation":
        left_out = _ALL_BUT_DECODERS | {"gates.max_perplexity_ratio"}
    left_out |= {"verify.inputs" if fed_texts else "verify.text"}
    recipe = CommentedMap()
    for name, info in Recipe.model_fields.items():
        keys = {} if name in ("model", "task") else type(info.default).model_fields
        recipe[name] = section = CommentedMap()
        for key, field in keys.items():
            if f"{name}.{key}" not in left_out:
                section[key] = shapes if key == "shapes" else field.default
                section.yaml_add_eol_comment(field.description, key, column=32)
        about = info.description or ""
        recipe.yaml_set_comment_before_after_key(name, before=f"\n{about[:1].upper()}{about[1:]}")
    recipe |= {"model": model, "task": task}
    top = ["A recipe for slimheads; run it with: slimheads run THIS-FILE", *(printable(fact, 116) for fact in facts)]
    recipe.yaml_set_start_comment("\n".join(top))
    return dump_yaml(recipe)
