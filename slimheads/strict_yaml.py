"""YAML in, located values out: the strict YAML 1.2 reader behind recipes and family files.

What it reads, on top of the YAML grammar that ruamel.yaml parses:

1. Plain scalars follow the YAML 1.2 core schema (https://yaml.org/spec/1.2.2/#103-core-schema): `1e-4` is a number,
   `no` and `12:30` are text, whatever a %YAML directive says.
2. Keys are text and unique within their mapping.
3. Tags are refused; anchors and aliases are fine, merge keys are not special.
4. One document, UTF-8, at most MAX_BYTES long, MAX_DEPTH deep and MAX_VALUES values with aliases expanded.

Every value's line and column is kept, so that a later complaint can point at it. Every failure is a `UsageError`.
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
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)
from ruamel.yaml.reader import ReaderError

from slimheads.errors import UsageError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_VALUES = 10_000

KeyPath = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)

_NULL = re.compile(r"null|Null|NULL|~|")
_TRUE, _FALSE = re.compile(r"true|True|TRUE"), re.compile(r"false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF_NAN = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_SYNTAX_HINT = "mind the indentation (spaces, no tabs), and quote text that holds ': ' or ' #'"


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
        """Say that `path` and all that hangs below it was written at `place`."""
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
    except FileNotFoundError:
        raise UsageError("there is no such file", where=where, hint="check the path") from None
    except IsADirectoryError:
        raise UsageError("this is a folder, not a YAML file", where=where, hint="name the file inside it") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"cannot be read: {reason}", where=printable(where), hint="check the path") from None
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
    builder = _Builder(text, source, lambda line, column: Place((0, line, column), f"{source}:{line}:{column}"))
    data = builder.document()
    if builder.empty:
        raise UsageError("the file is empty", where=f"{source}:1:1", hint="write at least one `key: value` line")
    return data, builder.positions


def parse_value(text: str, source: str) -> Any:
    """Read one value given on the command line by the same rules; errors are located by `source` alone."""
    return _Builder(text, source, lambda line, column: Place((1, line, column), source)).document()


def scalar(text: str) -> str | int | float | bool | None:
    """What a plain (unquoted) scalar means in the YAML 1.2 core schema.

    Raises:
        ValueError: a whole number of thousands of digits, which Python refuses to read.
    """
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    if _INT.fullmatch(text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INF_NAN.fullmatch(text):
        return float(text.replace(".", ""))
    return text


def dotted(path: KeyPath) -> str:
    """A path as people write it: `bench.shapes[0][1]`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{printable(part)}" for part in path)
    return text.removeprefix(".")


def printable(text: str) -> str:
    """Text from a file, safe to put in a one-line message: escaped where it is not printable, cut where it is long."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:80])
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _line_column(text: str, offset: int) -> tuple[int, int]:
    before = text[:offset]
    return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1


class _Builder:
    """Turns ruamel's parse events into data, holding them to the rules of this module.

    Events, not ruamel's constructed objects: they still know an explicit tag from an implied one, a quoted scalar from
    a plain one, and come one at a time, so the limits stop a hostile file early.
    """

    def __init__(self, text: str, source: str, place: Callable[[int, int], Place]) -> None:
        self.positions = Positions(source)
        self.empty = True
        self._text, self._place = text, place
        self._anchors: dict[str, tuple[Any, int, int]] = {}
        self._count = 0
        self._line = self._column = 1

    def document(self) -> Any:
        events = self._located_events()
        data: Any = None
        for event in events:
            if isinstance(event, DocumentStartEvent):
                if not self.empty:
                    raise self._error("a second document starts here", "keep one document a file: remove the `---`")
                self.empty = False
                data, _ = self._value(next(events), events, ())
        return data

    def _located_events(self) -> Iterator[Event]:
        """ruamel's events; remembers where the last one began and turns ruamel's failures into ours."""
        try:
            for event in YAML(typ="safe", pure=True).parse(self._text):
                self._line, self._column = event.start_mark.line + 1, event.start_mark.column + 1
                yield event
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            if mark is not None:
                self._line, self._column = mark.line + 1, mark.column + 1
            raise self._error(f"not valid YAML: {printable(str(error.problem))}", _SYNTAX_HINT) from None
        except ReaderError as error:
            self._line, self._column = _line_column(self._text, error.position)
            what = f"not valid YAML: the character U+{ord(self._text[error.position]):04X} is not allowed"
            raise self._error(what, "remove it, or write it as an escape in double quotes") from None
        except (YAMLError, ValueError, OverflowError) as error:
            raise self._error(f"not valid YAML: {printable(str(error))}", _SYNTAX_HINT) from None

    def _error(self, what: str, hint: str) -> UsageError:
        return UsageError(what, where=self._place(self._line, self._column).text, hint=hint)

    def _value(self, event: Any, events: Iterator[Any], path: KeyPath) -> tuple[Any, int]:
        """The value that starts at `event`, and how many levels it has below itself."""
        self.positions.values[path] = self._place(self._line, self._column)
        if isinstance(event, AliasEvent):
            return self._alias(event, path)
        if event.tag is not None:
            raise self._error(f"a tag ({printable(str(event.tag))}) is not allowed here", "write the plain value")
        start, levels, anchor = self._count, 0, event.anchor
        data: Any
        if isinstance(event, ScalarEvent):
            self._grow(_weight(event.value), len(path))
            data = self._scalar(event)
            if data is None and path in self.positions.keys:  # an empty value has no place of its own
                self.positions.values[path] = self.positions.keys[path]
        elif isinstance(event, SequenceStartEvent):
            self._grow(1, len(path))
            data = []
            while not isinstance(event := next(events), SequenceEndEvent):
                item, below = self._value(event, events, (*path, len(data)))
                data.append(item)
                levels = max(levels, below + 1)
        else:
            self._grow(1, len(path))
            data = {}
            while not isinstance(event := next(events), MappingEndEvent):
                key = self._key(event, data, path)
                data[key], below = self._value(next(events), events, (*path, key))
                levels = max(levels, below + 1)
        if anchor is not None:
            self._anchors[anchor] = (data, self._count - start, levels)
        return data, levels

    def _alias(self, event: AliasEvent, path: KeyPath) -> tuple[Any, int]:
        if event.anchor not in self._anchors:
            what = f"the alias *{printable(event.anchor)} has no finished anchor before it"
            raise self._error(what, f"define &{printable(event.anchor)} further up")
        data, count, levels = self._anchors[event.anchor]
        self._grow(count, len(path) + levels)
        return copy.deepcopy(data), levels  # a copy, so that changing one place does not change the other

    def _key(self, event: Any, data: dict[str, Any], path: KeyPath) -> str:
        key = self._scalar(event) if isinstance(event, ScalarEvent) and event.tag is None else None
        if not isinstance(key, str):
            raise self._error("a key must be plain text", "put the key in double quotes if text is what you mean")
        if key in data:
            first = self.positions.keys[*path, key].text
            raise self._error(f"duplicate key {dotted((*path, key))}", f"it is already given at {first}; keep one")
        self._grow(_weight(key), len(path))
        self.positions.keys[*path, key] = self._place(self._line, self._column)
        return key

    def _scalar(self, event: ScalarEvent) -> str | int | float | bool | None:
        text: str = event.value
        if not event.implicit[0]:  # quoted, or a block: text whatever it looks like
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise self._error("an escape is not a Unicode character", "write the character itself") from None
            return text
        try:
            return scalar(text)
        except ValueError:
            raise self._error("this whole number has too many digits", "write a smaller number") from None

    def _grow(self, values: int, depth: int) -> None:
        self._count += values
        if self._count > MAX_VALUES:
            raise self._error(f"holds more than {MAX_VALUES} values", "check that this is the right file")
        if depth > MAX_DEPTH:
            raise self._error(f"is nested deeper than {MAX_DEPTH} levels", "check that this is the right file")


def _weight(text: str) -> int:
    """How much a scalar counts towards MAX_VALUES: aliases to one long text must not add up to gigabytes."""
    return 1 + len(text) // 64


def validate(model: type[Model], data: object, positions: Positions) -> Model:
    """Hold plain data against a pydantic model whose config forbids extra keys and is strict.

    JSON mode, because there a list may fill a tuple although nothing else is converted.

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
        # A list whose items are wrong is also called too short: what holds another problem is not one of its own.
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
    """A value as its writer would recognise it, with its type where that may be the mistake."""
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
    """What to say about an unknown key: a similar one beside it, the same one in another section, or all there are."""
    name = str(path[-1])
    known = [key for owner in _field(model, path[:-1])[1] for key in _names(owner)]
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]}?"
    for section, info in _names(model).items():
        if any(name in _names(owner) for owner in _models_in(info.annotation)):
            return f"did you mean {section}.{name}?"
    return f"known keys here: {', '.join(known)}" if known else "remove it"
