"""What a person sees: plain lines in a file or pipe, and on a terminal a live line that goes when its stage is done."""

from __future__ import annotations

import io
import os
import pty
import re

import pytest
from rich.console import Console

from slimheads.console import Display
from slimheads.pipeline.progress import Progress, Silent

_SEQUENCE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])")


@pytest.fixture(autouse=True)
def plain_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def a_run(progress: Progress) -> None:
    progress.finish("load", 0.04, True)
    progress.start("export")
    progress.note("dense to ONNX [fp32]")
    progress.finish("export", 1.26, False)
    progress.start("verify")
    progress.note("link 1 [/] of [bold]")
    progress.finish("verify", 12.0, False)


def screen(data: str) -> tuple[list[str], bool]:
    """What is left on a terminal after these bytes, and whether its cursor shows: the sequences that rich writes."""
    lines, row, column, cursor = [""], 0, 0, True
    position = 0
    while position < len(data):
        if sequence := _SEQUENCE.match(data, position):
            number, kind = sequence.groups()
            if kind == "A":
                row -= int(number or 1)
            elif kind == "K":
                lines[row] = "" if number == "2" else lines[row][:column]
            elif kind in "hl" and number == "?25":
                cursor = kind == "h"
            else:
                assert kind == "m", f"unexpected sequence {sequence.group()!r}"
            position = sequence.end()
            continue
        letter = data[position]
        position += 1
        if letter == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif letter == "\r":
            column = 0
        else:
            lines[row] = lines[row][:column].ljust(column) + letter + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines if line.strip()], cursor


def on_a_terminal(act: object) -> str:
    """All that a pseudo-terminal received."""
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as file:
        assert callable(act)
        act(Console(file=file))
    received = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # Linux: the other side is closed and all was read
            break
        if not part:
            break
        received += part
    os.close(leader)
    return received.decode()


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    file = io.StringIO()
    with Display(Console(file=file)) as display:
        a_run(display)
    assert file.getvalue().splitlines() == [
        "load     reused (took 0.0 s)",
        "  export: dense to ONNX [fp32]",
        "export   1.3 s",
        "  verify: link 1 [/] of [bold]",
        "verify   12.0 s",
    ]
    assert "\x1b" not in file.getvalue()
    assert capsys.readouterr() == ("", "")


def test_a_long_note_stays_one_line_in_a_file() -> None:
    file = io.StringIO()
    with Display(Console(file=file)) as display:
        display.start("bench")
        display.note("word " * 100)
    assert len(file.getvalue().splitlines()) == 1


def test_a_terminal_keeps_only_the_finished_lines(capsys: pytest.CaptureFixture[str]) -> None:
    def act(console: Console) -> None:
        assert console.is_terminal
        with Display(console) as display:
            a_run(display)

    received = on_a_terminal(act)
    assert "dense to ONNX [fp32]" in _SEQUENCE.sub("", received)  # it was shown while it went on, brackets and all
    assert "link 1 [/] of [bold]" in _SEQUENCE.sub("", received)
    left, cursor = screen(received)
    assert left == ["load     reused (took 0.0 s)", "export   1.3 s", "verify   12.0 s"]
    assert cursor
    assert capsys.readouterr() == ("", "")


def test_a_failure_leaves_a_clean_line_and_a_visible_cursor() -> None:
    def act(console: Console) -> None:
        with pytest.raises(KeyError), Display(console) as display:
            display.finish("load", 0.1, False)
            display.start("export")
            display.note("dense to ONNX")
            raise KeyError
        console.print("slimheads: what went wrong", markup=False)

    left, cursor = screen(on_a_terminal(act))
    assert left == ["load     0.1 s", "slimheads: what went wrong"]
    assert cursor


def test_callers_from_python_hear_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    a_run(Silent())
    assert capfd.readouterr() == ("", "")
