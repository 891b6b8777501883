"""What the report's Markdown pages need: escaping, tables, code, and a model card's front matter."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from slimheads.names import SiteKind
from slimheads.report.model import Report
from slimheads.report.wording import removed_kinds

_TAGS: dict[SiteKind, str] = {
    "attention": "attention-head-pruning",
    "feed_forward": "feed-forward-pruning",
    "layer": "layer-pruning",
}


class Verbatim(str):
    """Text that a Markdown template puts out as it is, for code blocks and front matter."""

    __slots__ = ()


class Cell(str):
    """A figure with a note, which HTML sets on a line of its own. As text: the note in brackets behind the figure."""

    __slots__ = ("figure", "note")
    figure: str
    note: str

    def __new__(cls, figure: str, note: str) -> Cell:
        made = super().__new__(cls, f"{figure} ({note})")
        made.figure, made.note = figure, note
        return made


@dataclass(frozen=True)
class Table:
    """A table of text: as many cells in every row as there are headings. Columns in `numeric` align right."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[int] = frozenset()

    @classmethod
    def of(cls, head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Iterable[int] = ()) -> Table:
        """From any sequences."""
        return cls(tuple(head), tuple(tuple(row) for row in rows), frozenset(numeric))

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.head):
                raise ValueError(f"{len(row)} cells under {len(self.head)} headings: {row}")


def figure_and_note(cell: str) -> tuple[str, str]:
    """The two parts of a cell."""
    return (cell.figure, cell.note) if isinstance(cell, Cell) else (cell, "")


def markdown_safe(value: object) -> object:
    """Escape what Markdown or the HTML in it would act on, and keep the text on one line."""
    if isinstance(value, Verbatim) or not isinstance(value, str):
        return value
    text = " ".join(value.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # An underscore inside a word is no emphasis: left alone, so that names stay readable in the source.
    return re.sub(r"([\\|*`\[\]]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", text)


def markdown_table(table: Table) -> Verbatim:
    """The table in GitHub's Markdown, every cell escaped."""
    rule = ["---:" if index in table.numeric else "---" for index in range(len(table.head))]
    lines = [[str(markdown_safe(cell)) for cell in row] for row in (table.head, *table.rows)]
    return Verbatim("\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], rule, *lines[1:])))


def fenced(value: str) -> Verbatim:
    """Code between fences longer than any inside it."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`+", value))])
    return Verbatim(f"{fence}bash\n{value.strip()}\n{fence}")


def front_matter(report: Report) -> Verbatim:
    """The model card's YAML: only keys with known values. JSON strings are YAML strings: none can break out."""
    model = report.model
    keys: dict[str, object] = {**model.terms}
    if model.hub_id:
        keys["base_model"] = model.hub_id
    tags = ["slimheads", *(_TAGS[kind] for kind in removed_kinds(model.kinds)), "onnx"]
    if model.sentence_transformers:
        keys["library_name"] = "sentence-transformers"
        keys["pipeline_tag"] = "sentence-similarity"
        tags.append("sentence-transformers")
    else:
        if model.reload == "stock":
            keys["library_name"] = "transformers"
        keys["pipeline_tag"] = model.task
    keys["tags"] = tags
    return Verbatim("\n".join(f"{key}: {json.dumps(value)}" for key, value in keys.items()))
