"""docs/architecture.md and the paths that pages name, checked against the tree, docstrings and pyproject.toml."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

from slimheads.pipeline.run import STAGE_NAMES

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "slimheads"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PAGES = ("README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/add-a-family.md")
# The lists of the section on packages: those of Python, data files, folders beside the package.
CODE, DATA, BESIDE = (
    re.findall(r"^- .*$", part, re.M)
    for part in re.split(
        r"^(?:Data files of|Beside) `slimheads/`.*:$",
        PAGE.partition("\n## The packages\n")[2].partition("\n## ")[0],
        flags=re.M,
    )
)


def test_the_page_lists_every_package_and_module_with_its_docstring_in_the_order_of_the_import_contract() -> None:
    expected = [f"- `{name}`: {_first_line(file)}" for name, file in _packages_and_modules()]
    assert expected == CODE, "\n".join(["the list in docs/architecture.md has to be:", *expected])


def test_the_page_lists_every_data_file_of_the_package() -> None:
    listed = [_files(PACKAGE, line.split("`")[1]) for line in DATA]
    assert all(listed)
    assert {file for file in _files(PACKAGE, "./") if file.suffix not in (".py", ".pyc")} == set().union(*listed)


def test_the_page_lists_folders_beside_the_package_that_exist() -> None:
    assert BESIDE and all((ROOT / line.split("`")[1]).is_dir() for line in BESIDE)


def test_the_picture_shows_the_stages_in_the_order_in_which_they_run() -> None:
    arrows = re.findall(r'^ +(\w+)\[".*?"\] -- ".*?" --> (\w+)', PAGE, re.M)
    assert arrows == list(zip(STAGE_NAMES, [*STAGE_NAMES[1:], "out"], strict=True))


def test_the_picture_names_the_result_of_each_stage() -> None:
    results = re.findall(r'^ +(\w+)\[".*?"\] -- "(\w+)', PAGE, re.M)
    assert len(results) == len(STAGE_NAMES)
    for stage, result in results:
        file = "report/model.py" if stage == "report" else f"pipeline/stages/{stage}.py"
        assert f"class {result}(" in (PACKAGE / file).read_text(encoding="utf-8"), stage


def test_the_picture_names_packages_that_exist() -> None:
    for packages in re.findall(r'\w+\["\w+<br/>(.*?)"\]', PAGE):
        assert all((PACKAGE / name / "__init__.py").is_file() for name in packages.split(", ")), packages


@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_a_page_names_exists(page: str) -> None:
    """A word in capitals stands for a name to choose: then its folder has to exist."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for path in re.findall(r"(?:slimheads|tests|docs|benchmarks|pipelines|examples)/[\w./*-]*", text):
        real = re.sub(r"[^/]*\b[A-Z_]{3,}\b.*$", "", path).rstrip(".")
        assert list(ROOT.glob(real)), f"{page} names {path}"


def _packages_and_modules() -> list[tuple[str, Path]]:
    """Each one's name on the page, and the file with its docstring; an inner package follows the outer one."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    order = next(one["layers"] for one in tools["importlinter"]["contracts"] if one["type"] == "layers")
    packages = {f"{file.parent.relative_to(PACKAGE).as_posix()}/": file for file in PACKAGE.glob("*/**/__init__.py")}
    modules = {file.name: file for file in PACKAGE.glob("*.py") if file.name != "__init__.py"}
    return sorted((packages | modules).items(), key=lambda one: (order.index(re.split(r"[/.]", one[0])[0]), one[0]))


def _first_line(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    assert docstring, file
    return docstring.partition("\n")[0]


def _files(folder: Path, pattern: str) -> set[Path]:
    """The files that a pattern names; a folder stands for all files below it."""
    below = f"{pattern}**/*" if pattern.endswith("/") else pattern
    return {file for file in folder.glob(below) if file.is_file()}
