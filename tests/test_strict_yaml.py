"""The YAML reader: YAML 1.2 values, one line of complaint with the place of the mistake, and nothing that gets past."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from slimheads.errors import UsageError
from slimheads.strict_yaml import MAX_BYTES, MAX_DEPTH, MAX_VALUES, parse_value, parse_yaml, read_yaml, validate


class Slice(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    tensor: str
    axis: int


class Family(BaseModel):
    """Stands for any other YAML file of the project: lists and mappings of models."""

    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    slices: tuple[Slice, ...] = ()
    by_role: dict[str, Slice] = {}


def complaint(text: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse_yaml(text, "f.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("1e-4", 1e-4),
        ("1.0e-4", 1e-4),
        (".5", 0.5),
        ("-3.", -3.0),
        ("1E+3", 1000.0),
        ("12", 12),
        ("012", 12),
        ("0o17", 15),
        ("0xff", 255),
        ("-7", -7),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("yes", "yes"),
        ("off", "off"),
        ("y", "y"),
        ("12:30:00", "12:30:00"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("'1e-4'", "1e-4"),
        ('"true"', "true"),
        ("none", "none"),
        ("-.inf", -math.inf),
    ],
)
def test_values_are_those_of_yaml_1_2(written: str, meant: object) -> None:
    data, _ = parse_yaml(f"%YAML 1.1\n---\nkey: {written}\n", "f.yaml")
    assert data == {"key": meant}
    assert type(data["key"]) is type(meant)
    assert parse_value(written, "--set") == meant


def test_nan_is_read() -> None:
    assert math.isnan(parse_value(".nan", "--set"))


@pytest.mark.parametrize(
    ("text", "place", "says"),
    [
        ("a: 1\nb: [1, 2", "f.yaml:2:", "expected ',' or ']'"),
        ("a: b: c", "f.yaml:1:5:", "mapping values are not allowed here"),
        ("a: 1\n\tb: 2", "f.yaml:2:1:", "cannot start any token"),
        ("a: 1\nb: 2\na: 3", "f.yaml:3:1:", "duplicate key a; it is already given at f.yaml:1:1"),
        ("s: {x: 1, 'x': 2}", "f.yaml:1:11:", "duplicate key s.x"),
        ("a: !!str 5", "f.yaml:1:4:", "a tag"),
        ("a: ! b", "f.yaml:1:4:", "a tag"),
        ("- !python/object:os.system x", "f.yaml:1:3:", "a tag"),
        ("a: *b", "f.yaml:1:4:", "undefined alias 'b'"),
        ("a: &b [*b]", "f.yaml:1:8:", f"deeper than {MAX_DEPTH} levels"),
        ("a: " + "[" * 10_000, "f.yaml:1:", f"deeper than {MAX_DEPTH} levels"),
        ("x: 1\n[1, 2]: 3", "f.yaml:2:1:", "a key must be plain text"),
        ("5: 3", "f.yaml:1:1:", "a key must be plain text"),
        ("a: 1\n---\nb: 2", "f.yaml:2:1:", "another document"),
        ("", "f.yaml:1:1:", "the file is empty"),
        ("# only this\n", "f.yaml:1:1:", "the file is empty"),
        ("a: 1\nb: \x07", "f.yaml:2:4:", "U+0007 is not allowed"),
        ('a: "\\uD800"', "f.yaml:1:4:", "not a Unicode character"),
        ('a: "\\UFFFFFFFF"', "f.yaml:1:", "not valid YAML"),
        ("a: " + "9" * 5000, "f.yaml:1:4:", "too many digits"),
        ("a: " + "[" * 40 + "]" * 40, "f.yaml:1:", f"deeper than {MAX_DEPTH} levels"),
        ("a: [" + "1," * MAX_VALUES + "]", "f.yaml:1:", f"more than {MAX_VALUES} values"),
    ],
)
def test_what_is_wrong_is_said_with_line_and_column(text: str, place: str, says: str) -> None:
    message = complaint(text)
    assert message.startswith(place), message
    assert says in message


def test_nested_aliases_cannot_blow_up() -> None:
    rows = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in zip("abcd", "bcde", strict=True)]
    assert "more than" in complaint("\n".join(rows))
    assert "more than" in complaint(f"a: &a {'x' * 100_000}\nb: [{', '.join(['*a'] * 2000)}]")
    assert "deeper" in complaint(f"a: &a {'[' * 20}{']' * 20}\nb: {'[' * 20}*a{']' * 20}")


def test_aliases_give_equal_but_separate_values() -> None:
    data, positions = parse_yaml("a: &one {x: [1]}\nb: *one\n", "f.yaml")
    assert data == {"a": {"x": [1]}, "b": {"x": [1]}}
    data["a"]["x"].append(2)
    assert data["b"] == {"x": [1]}
    assert positions.values["b",].text == "f.yaml:2:4"


def test_files_that_are_no_yaml_file(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_bytes(b"a: 1\nb: caf\xe9\n")
    for path, says in [
        (tmp_path / "none.yaml", "No such file"),
        (tmp_path, "Is a directory"),
        (bad, "bad.yaml:2:7: is not UTF-8: byte 0xe9"),
        (tmp_path / "nul\0.yaml", "cannot be read"),
        (bad / "below.yaml", "cannot be read"),
    ]:
        with pytest.raises(UsageError, match=says):
            read_yaml(path)
    bad.write_bytes(b"a: " + b"x" * MAX_BYTES)
    with pytest.raises(UsageError, match="bytes"):
        read_yaml(bad)
    bad.write_bytes("\ufeffa: é\r\n".encode())
    assert read_yaml(bad)[0] == {"a": "é"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name: x\nslices:\n- {tensor: q, axis: 0}\n- {tensor: k, axes: 1}",
            "f.yaml:4:3: the key slices[1].axis is missing",
        ),
        (
            "name: x\nslices:\n- {tensor: q, axis: 0, axes: 1}",
            "f.yaml:3:24: unknown key slices[0].axes; did you mean axis?",
        ),
        (
            "name: x\nby_role: {q: {tensor: q, axis: one}}",
            'f.yaml:2:32: by_role.q.axis should be a whole number, got "one"',
        ),
        ("name: x\nzzz: 1", "f.yaml:2:1: unknown key zzz; known keys here: name, slices, by_role"),
        ("name: x\naxis: 1", "f.yaml:2:1: unknown key axis; did you mean slices.axis?"),
        ("- name", "f.yaml:1:1: the file should be a mapping of keys"),
        ("name: [x]\nslices: 5", 'f.yaml:1:7: name should be text, got ["x"] (and 1 more problem)'),
    ],
)
def test_any_model_is_validated_with_places(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        validate(Family, *parse_yaml(text, "f.yaml"))
    assert str(caught.value).startswith(message)


def test_a_good_file_becomes_the_model() -> None:
    family = validate(Family, *parse_yaml("name: x\nslices: [{tensor: q, axis: 0}]", "f.yaml"))
    assert family.slices == (Slice(tensor="q", axis=0),)


_BITS = [
    ": ",
    "\n",
    "  ",
    "- ",
    "[",
    "]",
    "{",
    "}",
    ",",
    "&a ",
    "*a",
    "!x ",
    "!<",
    "%YAML 1.1\n",
    "---",
    "'",
    '"',
    "\\U",
    "|2-",
]
_BITS += [
    "\\x",
    "FFFFFFFF",
    "> ",
    "#",
    "? ",
    "\t",
    "1e-4",
    "\\\n",
    "\x85",
    "\u2028",
    "\r",
    "\ufeff",
    "é",
    "😀",
    "@",
    "<<",
    "0x",
]


@settings(max_examples=300, deadline=None)
@given(st.text() | st.lists(st.sampled_from(_BITS) | st.text(max_size=3), max_size=15).map("".join))
def test_any_text_is_read_or_refused(text: str) -> None:
    for read in (parse_yaml, parse_value):
        try:
            read(text, "f.yaml")
        except UsageError as error:
            assert str(error).startswith("f.yaml")
