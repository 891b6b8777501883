"""The strict YAML 1.2 reader behind recipes and the package's data files: plain data, and where each value was written.

ruamel.yaml scans, parses, resolves anchors and converts scalars. On top of that:

1. Plain scalars follow the YAML 1.2 core schema (https://yaml.org/spec/1.2.2/#103-core-schema): `1e-4` is a number,
   `no` and `12:30` are text, whatever a %YAML directive says.
2. Keys are text and unique within their mapping.
3. Tags are refused; anchors and aliases are fine, merge keys are not special.
4. One document, UTF-8, at most MAX_BYTES long, MAX_DEPTH deep and MAX_VALUES values with aliases expanded.

Every failure is a `UsageError` with line and column.

The values are built from ruamel's nodes, because its round-trip loader cannot do all of this: `.lc` gives an alias the
place of its anchor, and a document of one scalar none; `!!float 5` leaves no trace of its tag; dates and `1_000` are
converted; deep nesting exhausts the stack. It also takes longer: 95 ms for the package's 39 data files, against 76 ms.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, StreamMark
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.resolver import BaseResolver
from ruamel.yaml.scanner import Scanner

from slimheads.errors import UsageError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_VALUES = 10_000

KeyPath = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)

_SYNTAX_HINT = "mind the indentation (spaces, no tabs), and quote text that holds ': ' or ' #'"
_TOO_DEEP = f"is nested deeper than {MAX_DEPTH} levels"


@dataclass(frozen=True, order=True)
class Place:
    """Where something was written: `text` for people, `order` to tell which of two comes first."""

    order: tuple[int, int, int]
    text: str = field(compare=False)


@dataclass
class Positions:
    """Where each key and value of one document was written; paths are tuples of keys and list indices."""

    source: str
    keys: dict[KeyPath, Place] = field(default_factory=dict)
    values: dict[KeyPath, Place] = field(default_factory=dict)

    def nearest(self, path: KeyPath) -> Place | None:
        """The place of the value at `path`, else of the closest section or list around it, else None."""
        if path in self.values:
            return self.values[path]
        for end in range(len(path) - 1, 0, -1):
            place = self.keys.get(path[:end]) or self.values.get(path[:end])
            if place:
                return place
        return None

    def put(self, path: KeyPath, place: Place) -> None:
        """Record that `path` and everything below it was written at `place`."""
        for known in (self.keys, self.values):
            for old in [p for p in known if p[: len(path)] == path]:
                del known[old]
        self.keys[path] = self.values[path] = place


def read_yaml(path: Path | str) -> tuple[Any, Positions]:
    """Read one YAML file into plain data (dict, list, str, int, float, bool, None) and the place of each value.

    Raises:
        UsageError: the file cannot be read, is empty, or breaks a rule of this module; located `path:line:column`.
    """
    where = str(path)
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"cannot be read: {reason}", where=printable(where, 1000), hint="check the path") from None
    if len(raw) > MAX_BYTES:
        raise UsageError(f"is over {MAX_BYTES} bytes", where=f"{where}:1:1", hint="check that this is the right file")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, column = _line_column(raw[: error.start].decode("utf-8", "replace"), len(raw))
        what = f"is not UTF-8: byte 0x{raw[error.start]:02x} cannot be read"
        raise UsageError(what, where=f"{where}:{line}:{column}", hint="save the file as UTF-8") from None
    return parse_yaml(text, where)


def parse_yaml(text: str, source: str) -> tuple[Any, Positions]:
    """Like `read_yaml`, for text that is already in memory; `source` is what errors call it."""
    document = _Document(text, source, lambda line, column: Place((0, line, column), f"{source}:{line}:{column}"))
    if document.root is None:
        raise UsageError("the file is empty", where=f"{source}:1:1", hint="write at least one `key: value` line")
    return document.data, document.positions


def parse_value(text: str, source: str) -> Any:
    """Read one value given on the command line by the same rules; errors are located by `source` alone."""
    return _Document(text, source, lambda line, column: Place((1, line, column), source)).data


def dotted(path: KeyPath) -> str:
    """A path as people write it: `bench.shapes[0][1]`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{printable(part)}" for part in path)
    return text.removeprefix(".")


def printable(text: str, width: int = 60) -> str:
    """Text from a file, safe to put in a one-line message: escaped where it is not printable, cut where it is long."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: width + 20])
    return shown if len(shown) <= width else shown[: width - 3] + "..."


def _line_column(text: str, offset: int) -> tuple[int, int]:
    before = text[:offset]
    return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1


class CoreSchema(BaseResolver):
    """What a plain scalar means in the YAML 1.2 core schema. ruamel's own resolver adds dates, `1_000`, `0b1`, `<<`."""

    processing_version = (1, 2)

    def __init__(self, version: object = None, loader: object = None) -> None:
        super().__init__(loader)


for _tag, _pattern, _first in (
    ("null", "null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("bool", "true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", "[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", [*"-+."]),
):
    CoreSchema.add_implicit_resolver_base(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


class _RefusedError(MarkedYAMLError):
    """Valid YAML that this module does not take."""

    def __init__(self, what: str, mark: StreamMark, hint: str = "check that this is the right file") -> None:
        super().__init__(problem=what, problem_mark=mark, note=hint)


class _Scanner(Scanner):
    def fetch_tag(self) -> None:
        raise _RefusedError("a tag (!) is not allowed here", self.reader.get_mark(), "write the plain value")


class _Composer(Composer):
    """Stops at MAX_DEPTH, before the stack is exhausted, and gives an alias its own place instead of its anchor's."""

    levels = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.parser.peek_event()
        if self.levels > MAX_DEPTH:
            raise _RefusedError(_TOO_DEEP, event.start_mark)
        self.levels += 1
        node = super().compose_node(parent, index)
        self.levels -= 1
        if isinstance(event, AliasEvent):
            node = copy.copy(node)
            node.start_mark = event.start_mark
        return node


class _Document:
    """One document: its root node, its values as plain data, and where each was written."""

    def __init__(self, text: str, source: str, place: Callable[[int, int], Place]) -> None:
        self.positions = Positions(source)
        self.root: Node | None = None
        self._place, self._count = place, 0
        self._yaml = YAML(typ="safe", pure=True)
        self._yaml.Resolver, self._yaml.Scanner, self._yaml.Composer = CoreSchema, _Scanner, _Composer
        self._yaml.composer.warn_double_anchors = False
        try:
            self.root = self._yaml.compose(text)
            self.data = None if self.root is None else self._value(self.root, ())
        except _RefusedError as error:
            where = self._at(error.problem_mark).text
            raise UsageError(str(error.problem), where=where, hint=str(error.note)) from None
        except ReaderError as error:
            where = self._place(*_line_column(text, error.position)).text
            what = f"not valid YAML: the character U+{ord(text[error.position]):04X} is not allowed"
            raise UsageError(what, where=where, hint="remove it, or write it as an escape in double quotes") from None
        except (MarkedYAMLError, ValueError, OverflowError) as error:  # the last two: an escape such as "\UFFFFFFFF"
            where = self._at(getattr(error, "problem_mark", None) or self._yaml.reader.get_mark()).text
            said = [getattr(error, "context", None), getattr(error, "problem", None) or str(error)]
            what = printable(", ".join(filter(None, said)), 120)
            raise UsageError(f"not valid YAML: {what}", where=where, hint=_SYNTAX_HINT) from None

    def _at(self, mark: StreamMark) -> Place:
        return self._place(mark.line + 1, mark.column + 1)

    def _value(self, node: Node, path: KeyPath) -> Any:
        """The node's value, in which each alias is a copy of its own."""
        self._grow(node, path)
        self.positions.values[path] = self._at(node.start_mark)
        if isinstance(node, SequenceNode):
            return [self._value(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, MappingNode):
            data = {}
            for key_node, value_node in node.value:
                key = self._key(key_node, path)
                data[key] = self._value(value_node, (*path, key))
            return data
        value = self._scalar(node)
        if value is None and path in self.positions.keys:  # an empty value has no place of its own
            self.positions.values[path] = self.positions.keys[path]
        return value

    def _key(self, node: Node, path: KeyPath) -> str:
        key = self._scalar(node) if isinstance(node, ScalarNode) else None
        if not isinstance(key, str):
            hint = "put the key in double quotes if text is what you mean"
            raise _RefusedError("a key must be plain text", node.start_mark, hint)
        path = (*path, key)
        if first := self.positions.keys.get(path):
            hint = f"it is already given at {first.text}; keep one"
            raise _RefusedError(f"duplicate key {dotted(path)}", node.start_mark, hint)
        self._grow(node, path)
        self.positions.keys[path] = self._at(node.start_mark)
        return key

    def _scalar(self, node: Node) -> str | int | float | bool | None:
        try:
            value: str | int | float | bool | None = self._yaml.constructor.construct_object(node)
            node.value.encode("utf-8")
        except ValueError as error:  # Python reads whole numbers of up to 4300 digits
            half = isinstance(error, UnicodeEncodeError)
            what = "an escape is not a Unicode character" if half else "this whole number has too many digits"
            raise _RefusedError(what, node.start_mark, "write another value") from None
        return value

    def _grow(self, node: Node, path: KeyPath) -> None:
        """Count a node, a long text as several: aliases must not add up to gigabytes."""
        self._count += 1 + (len(node.value) // 64 if isinstance(node, ScalarNode) else 0)
        if self._count > MAX_VALUES:
            raise _RefusedError(f"holds more than {MAX_VALUES} values", node.start_mark)
        if len(path) > MAX_DEPTH:
            raise _RefusedError(_TOO_DEEP, node.start_mark)


def validate(model: type[Model], data: object, positions: Positions) -> Model:
    """Validate plain data against a pydantic model whose config is strict and forbids extra keys.

    In JSON mode, where a list may fill a tuple although nothing else is converted.

    Raises:
        UsageError: the problem that comes first in the file, and how many there are besides it.
    """
    try:
        return model.model_validate_json(json.dumps(data))
    except ValidationError as error:
        found = error.errors(include_url=False)
    paths = [details["loc"] for details in found]
    problems = [
        _problem(model, dict(details), positions)
        for details, path in zip(found, paths, strict=True)
        # pydantic also reports a list with a wrong item as too short: only the innermost problem counts.
        if not any(other != path and other[: len(path)] == path for other in paths)
    ]
    place, what, hint = min(problems, key=lambda problem: problem[0])
    more = len(problems) - 1
    besides = f" (and {more} more problem{'s' if more > 1 else ''})" if more else ""
    raise UsageError(what + besides, where=place.text, hint=hint)


_WORDS = {
    "float_type": "should be a number",
    "int_type": "should be a whole number",
    "int_from_float": "should be a whole number",
    "string_type": "should be text",
    "bool_type": "should be true or false",
    "list_type": "should be a list",
    "tuple_type": "should be a list",
    "dict_type": "should be a mapping of keys",
    "model_type": "should be a mapping of keys",
}


def _problem(model: type[BaseModel], error: dict[str, Any], positions: Positions) -> tuple[Place, str, str]:
    """One pydantic error as (place, what, hint)."""
    path: KeyPath = tuple(error["loc"])
    kind, got = error["type"], error["input"]
    place = positions.nearest(path) or Place((0, 1, 1), f"{positions.source}:1:1")
    shown = dotted(path) or "the file"
    described, _ = _field(model, path)
    hint = (described and described.description) or "correct the value"
    if kind == "extra_forbidden":
        return positions.keys.get(path, place), f"unknown key {shown}", _nearest_key(model, path)
    if kind == "missing":
        if isinstance(path[-1], int):
            return place, f"{dotted(path[:-1])} has too few entries", hint
        return place, f"the key {shown} is missing", hint
    if kind == "literal_error" and isinstance(got, str):
        near = difflib.get_close_matches(got, re.findall(r"'([^']*)'", error["ctx"]["expected"]), n=1)
        hint = f"did you mean {near[0]}?" if near else hint
    if kind in ("model_type", "dict_type"):
        hint = "write its `key: value` lines below it, or remove it" if path else "write `key: value` lines"
    message = re.sub(r"^(Value error,|Input|String|Tuple|List) | after validation.*", "", error["msg"])
    words = _WORDS.get(kind, message)
    return place, f"{shown} {words}, got {_described(got)}", hint


def _described(value: object) -> str:
    """A value as it was written, with its type where that may be the mistake."""
    if isinstance(value, str):
        return f'"{printable(value)}" (text)'
    if isinstance(value, bool):
        return f"{str(value).lower()} (a boolean)"
    if isinstance(value, int | float):
        return f"{value!r} ({'a whole number' if isinstance(value, int) else 'a number'})"
    return "nothing (null)" if value is None else printable(json.dumps(value))


def _names(model: type[BaseModel]) -> dict[str, FieldInfo]:
    return {info.alias or name: info for name, info in model.model_fields.items()}


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _field(model: type[BaseModel], path: KeyPath) -> tuple[FieldInfo | None, list[type[BaseModel]]]:
    """The field that `path` leads to, and the models its value may be made of."""
    info, models = None, [model]
    for part in path:
        owner = next((m for m in models if part in _names(m)), None)
        if owner is not None:  # otherwise a list index or a free key of a mapping: same field, same models
            info = _names(owner)[str(part)]
            models = list(_models_in(info.annotation))
    return info, models


def _nearest_key(model: type[BaseModel], path: KeyPath) -> str:
    """The hint for an unknown key: a similar key beside it, the same key in another section, or all known keys."""
    name = str(path[-1])
    known = [key for owner in _field(model, path[:-1])[1] for key in _names(owner)]
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]}?"
    for section, info in _names(model).items():
        if any(name in _names(owner) for owner in _models_in(info.annotation)):
            return f"did you mean {section}.{name}?"
    return f"known keys here: {', '.join(known)}" if known else "remove it"
