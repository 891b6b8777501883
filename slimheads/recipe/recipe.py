"""The recipe: how it is read, where its keys were given, and its JSON Schema."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr

from slimheads.errors import SlimheadsError, UsageError
from slimheads.names import Task
from slimheads.recipe.dump import dump_yaml
from slimheads.recipe.sections import Bench, Export, Gates, PathText, Recover, Score, Section, Select, Verify
from slimheads.strict_yaml import KeyPath, Place, Positions, dotted, parse_value, read_yaml, validate


class Recipe(Section):
    """One run: the model, and the settings of each stage. Immutable; two recipes are equal if their values are."""

    model: PathText = Field(description="a folder, pkg://package/folder for one in an installed package, or a hub id")
    task: Task = Field("auto", description="what the model is used for; auto reads it from the model")
    score: Score = Field(Score(), description=Score.__doc__)
    select: Select = Field(Select(), description=Select.__doc__)
    recover: Recover = Field(Recover(), description=Recover.__doc__)
    export: Export = Field(Export(), description=Export.__doc__)
    verify: Verify = Field(Verify(), description=Verify.__doc__)
    bench: Bench = Field(Bench(), description=Bench.__doc__)
    gates: Gates = Field(Gates(), description=Gates.__doc__)

    _positions: Positions | None = PrivateAttr(None)

    @classmethod
    def read(cls, path: Path | str, overrides: Iterable[str] = ()) -> Recipe:
        """Read a recipe file.

        Args:
            path: a YAML 1.2 file.
            overrides: `key=value` strings, the key dotted (`select.ratio=0.5`), the value YAML; a later one wins.

        A relative `verify.text`, `verify.inputs` or folder in `model` is taken from the recipe's folder, or from the
        working directory when an override gives it.

        Raises:
            UsageError: the first thing wrong, located `path:line:column` or `--set key=value`.
        """
        data, positions = read_yaml(path)
        for number, override in enumerate(overrides):
            if isinstance(data, dict):
                _override(data, positions, override, number)
        recipe = validate(cls, data, positions)
        recipe._positions = positions
        found: dict[str, str] = {}
        for key in ("text", "inputs"):
            given = getattr(recipe.verify, key)
            if given is not None and not Path(given).is_absolute():
                found[key] = str(recipe._base(f"verify.{key}", path) / given)
        verify, model = recipe.verify.model_copy(update=found), recipe._model_folder(path)
        return recipe.model_copy(update={"verify": verify, "model": model})

    def _base(self, key: str, path: Path | str) -> Path:
        """The folder a relative path starts at: the recipe's, or the working directory if an override gives it."""
        return (Path() if self.where(key).startswith("--set ") else Path(path).parent).absolute()

    def _model_folder(self, path: Path | str) -> str:
        """`model`, as an absolute path if it is a folder; a hub id, pkg:// and ~ stay as written."""
        given, base = self.model, self._base("model", path)
        if given.startswith(("pkg://", "~")) or Path(given).is_absolute():
            return given
        if (base / given).is_dir():
            return str(base / given)
        if Path(given).is_dir():
            beside = os.path.relpath(given, base)
            raise UsageError(
                f"'{given}' is in the working directory, but a recipe's paths start at the recipe's folder",
                where=self.where("model"),
                hint=f"write {beside}, or give it as --set model={given}",
            )
        return given

    def where(self, *keys: str) -> str:
        """Where the first of these dotted keys that the recipe gives was written: `a.yaml:4:10` or `--set task=auto`.

        If all are defaults, the name of the first: `a.yaml: select.ratio (default)`. For a recipe made in Python,
        the key.
        """
        key = next(filter(self._gives, keys), None)
        if key is None:
            named = f"{keys[0]} (default)"
            return f"{self._positions.source}: {named}" if self._positions else named
        place = self._positions.nearest(tuple(key.split("."))) if self._positions else None
        return place.text if place else key

    def _gives(self, key: str) -> bool:
        section, _, name = key.rpartition(".")
        return name in (getattr(self, section) if section else self).model_fields_set

    @contextmanager
    def located(self) -> Iterator[None]:
        """Give errors about keys of the recipe the place where the key was written."""
        try:
            yield
        except SlimheadsError as error:
            if error.keys:
                error.where, error.keys = self.where(*error.keys), ()
            raise

    def resolved_yaml(self) -> str:
        """Every key with its value, as YAML that `Recipe.read` reads back equal."""
        return dump_yaml(self.model_dump(mode="json"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    def __hash__(self) -> int:
        return hash(self.model_dump_json())


def _override(data: dict[str, Any], positions: Positions, override: str, number: int) -> None:
    """Apply one `key=value` to `data`, in place."""
    source = f"--set {override}"
    key, equals, text = override.partition("=")
    path: KeyPath = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise UsageError("expected key=value", where=source, hint="write it as --set select.ratio=0.5")
    value = parse_value(text, source)
    place = Place((1, number, 0), source)
    section = data
    for end in range(1, len(path)):
        if path[end - 1] not in section:
            positions.put(path[:end], place)
        section = section.setdefault(str(path[end - 1]), {})
        if not isinstance(section, dict):
            name = dotted(path[:end])
            raise UsageError(f"{name} holds no keys of its own", where=source, hint=f"give {name} as a whole")
    section[str(path[-1])] = value
    positions.put(path, place)


def recipe_schema() -> dict[str, Any]:
    """The recipe as JSON Schema, draft 2020-12, for editors and other tools.

    It accepts what `Recipe.read` accepts, with one difference: JSON Schema takes 2.0 for a whole number, the reader
    does not.
    """
    schema = Recipe.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:slimheads:recipe:1",
        **schema,
        "title": "slimheads recipe",
    }
