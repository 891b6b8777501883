"""What the README and the shipped recipes say, held against the code."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import get_args

import pytest
import typer

from slimheads import cli, errors
from slimheads.exporting.precisions import PRECISIONS
from slimheads.models.tasks import SEQ2SEQ_TASKS, TASKS
from slimheads.names import Precision, Provider, Task
from slimheads.pruning.select import select
from slimheads.recipe.recipe import Recipe, recipe_schema
from slimheads.recipe.sections import Select
from slimheads.runtime.sessions import PROVIDERS
from slimheads.strict_yaml import parse_yaml

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = sorted((ROOT / "pipelines").glob("*.yaml"))


def test_the_readme_shows_every_key_of_the_recipe_with_its_default() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.S)
    shown, _ = parse_yaml(block, "README.md")
    defaults = Recipe(model=shown["model"]).model_dump(mode="json")
    assert shown == defaults


def test_the_readme_lists_every_command_and_every_option() -> None:
    for name, command in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        (row,) = re.findall(rf"^\| `slimheads {name}\b.*$", README, flags=re.M)
        for parameter in command.params:
            for option in parameter.opts:
                if option.startswith("--") and option != "--help":
                    assert option in row, f"{name} {option}"


def test_the_readme_lists_every_exit_code() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    codes = {kind.exit_code for kind in kinds}
    listed = {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", README, flags=re.M) for code in row.split(",")}
    assert listed == codes | {0, 130, 143}


def test_the_recipe_offers_exactly_what_the_library_does() -> None:
    assert set(get_args(Task)) == {"auto", *TASKS, *SEQ2SEQ_TASKS}
    assert get_args(Precision) == tuple(PRECISIONS)
    assert set(get_args(Provider)) == set(PROVIDERS)
    parameters = inspect.signature(select).parameters
    for key, field in Select.model_fields.items():
        assert key == "ratio" or field.default == parameters[key].default


def test_local_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_reads_and_names_the_schema_for_editors(path: Path) -> None:
    recipe = Recipe.read(path)
    first = path.read_text(encoding="utf-8").splitlines()[0]
    schema = path.parent / first.removeprefix("# yaml-language-server: $schema=")
    assert json.loads(schema.read_text(encoding="utf-8")) == recipe_schema(), "run `make schema`"
    assert recipe.model


def test_the_five_promised_recipes_are_there() -> None:
    assert {path.stem for path in RECIPES} >= {"minilm", "tiny-gpt2", "ci", "bert-base", "llama"}


def test_the_lock_pins_every_dependency_exactly() -> None:
    import tomllib

    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines)
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *project["optional-dependencies"]["dev"],
        *project["optional-dependencies"]["demo"],
    ]
    names = {re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", spec)[0]).lower() for spec in wanted}  # type: ignore[index]
    assert names - {"slimheads"} <= pinned
