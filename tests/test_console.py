"""What a person sees: few plain lines in a file or pipe, and in a terminal a live bar that goes at the end."""

from __future__ import annotations

import io
import os
import pty
import re
import sys
import threading
from collections.abc import Callable

import pytest
from rich.console import Console

from slimheads.console.progress import HEARTBEAT, LiveDisplay, LogDisplay
from slimheads.console.tables import print_preview, print_scores
from slimheads.latency.counts import Selection
from slimheads.pipeline.preview import Cost, Preview
from slimheads.pipeline.progress import Progress, Silent
from slimheads.pruning.plan import Plan, SitePlan
from slimheads.pruning.scores import Scores, SiteScores
from slimheads.report.model import count_kinds

NEVER = 1e6  # seconds
_SEQUENCE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])")


@pytest.fixture(autouse=True)
def plain_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def a_run(progress: Progress) -> None:
    progress.start("load")
    progress.finish("load", 0.04, True)
    progress.start("export")
    progress.work("dense and slim [fp32]")
    progress.note("dense to ONNX [fp32]")
    progress.finish("export", 1.26, False)
    progress.start("verify")
    progress.work("")
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


def log_of(act: Callable[[LogDisplay], None], clock: Callable[[], float] = lambda: 0.0) -> list[str]:
    """The lines that a file received. Heartbeats come only when `act` calls for them."""
    file = io.StringIO()
    with LogDisplay(Console(file=file), clock=clock, heartbeat=NEVER) as display:
        display._heartbeat = HEARTBEAT
        act(display)
    assert "\x1b" not in file.getvalue()
    return file.getvalue().splitlines()


def test_a_log_has_a_line_for_each_start_and_end_and_none_for_notes(capsys: pytest.CaptureFixture[str]) -> None:
    assert log_of(a_run) == [
        "load     reused (took 0.0 s)",
        "export   starts: dense and slim [fp32]",
        "export   1.3 s",
        "verify   starts",
        "verify   12.0 s",
    ]
    assert capsys.readouterr() == ("", "")


def test_a_long_line_stays_one_line_in_a_file() -> None:
    def act(display: LogDisplay) -> None:
        display.start("bench")
        display.work("word " * 100)

    assert len(log_of(act)) == 1


def test_a_heartbeat_says_what_is_left_only_where_that_is_known() -> None:
    now = 0.0

    def act(display: LogDisplay) -> None:
        nonlocal now
        display.beat()  # before the first stage
        display.start("bench")
        display.work("two shapes")
        now = 29.0
        display.beat()  # too early
        now = 40.0
        display.note("session set 1")
        display.beat()
        display.share(0.01)  # too little to go by
        display.beat()
        display.share(0.25)
        display.beat()
        now = 300.0
        display.beat()
        display.finish("bench", 301.0, False)
        display.beat()  # no stage is running

    assert log_of(act, lambda: now) == [
        "bench    starts: two shapes",
        "bench    40 s so far: session set 1",
        "bench    40 s so far: session set 1",
        "bench    40 s so far, about 2 min left: session set 1",
        "bench    5 min so far, about 15 min left: session set 1",
        "bench    301.0 s",
    ]


def test_heartbeats_come_by_themselves_and_end_with_the_display() -> None:
    came = threading.Event()

    class File(io.StringIO):
        def write(self, text: str) -> int:
            if "so far" in text:
                came.set()
            return super().write(text)

    file = File()
    with pytest.raises(KeyboardInterrupt), LogDisplay(Console(file=file), heartbeat=0.001) as display:
        display.start("verify")
        assert came.wait(60)
        raise KeyboardInterrupt
    left = file.getvalue()
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]
    display.beat()
    assert file.getvalue() == left


def test_a_run_is_ended_by_its_check_and_never_from_the_heartbeat() -> None:
    def end() -> None:
        assert threading.current_thread() is threading.main_thread()
        raise KeyError

    with pytest.raises(KeyError), LogDisplay(Console(file=io.StringIO()), end, heartbeat=0.001) as display:
        display.beat()
        display.note("on")


def test_a_terminal_keeps_only_the_finished_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(console: Console) -> None:
        assert console.is_terminal
        with LiveDisplay(console, stages=9) as display:
            real = display.note
            # The bar is drawn twice a second, and here after each note as well.
            monkeypatch.setattr(display, "note", lambda line: (real(line), display._bars.refresh()))
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
        with pytest.raises(KeyError), LiveDisplay(console, stages=9) as display:
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


def test_the_bar_shows_the_time_left_once_it_is_known_and_what_others_print_stays_above_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0

    def act(console: Console) -> None:
        nonlocal now
        monkeypatch.setattr(sys, "stderr", console.file)
        with LiveDisplay(console, clock=lambda: now, stages=2) as display:
            display.start("bench")
            display.work("two shapes")
            now = 20.0
            display._bars.refresh()
            display.share(0.25)
            display._bars.refresh()
            print("note: a setting was repaired", file=sys.stderr)
            display.finish("bench", 80.0, False)

    received = on_a_terminal(act)
    text = _SEQUENCE.sub("", received)
    assert text.index("20 s") < text.index("about 60 s left")
    assert screen(received) == (["note: a setting was repaired", "bench    80.0 s"], True)


# Tables


def rows_of(text: str) -> list[list[str]]:
    """The cells of each line of a table."""
    return [re.split(r"  +", line.strip()) for line in text.splitlines()]


def test_of_a_feed_forward_block_only_the_ends_of_its_scores_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    heads = SiteScores("layer.0.attention", "head", tuple(map(float, range(20, 0, -1))))
    neurons = SiteScores("layer.0", "neuron", tuple(map(float, range(1536, 0, -1))), kind="feed_forward")
    print_scores(Scores("magnitude", (heads, neurons)))
    _, head_row, neuron_row = rows_of(capsys.readouterr().out)
    assert head_row[2:] == [f"{unit} ({20 - unit})" for unit in range(19, -1, -1)]
    ends = [[f"{unit} ({1536 - unit})" for unit in units] for units in (range(1535, 1531, -1), range(3, -1, -1))]
    assert neuron_row == ["layer.0", "neuron", *ends[0], "... 1,528 more ...", *ends[1]]


def test_a_plan_is_shown_kind_by_kind(capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(
        (
            SitePlan("layer.0.attention", "head", 4, (0, 2)),
            SitePlan("layer.0", "neuron", 1536, tuple(range(928)), "feed_forward"),
            SitePlan("layer.0", "layer", 1, (0,), "layer"),
            SitePlan("layer.1", "layer", 1, (), "layer"),
        )
    )
    dense, slim = (Cost(heads=heads, parameters=9, flops=9, bytes=9) for heads in (4, 2))
    print_preview(
        Preview(
            model="m",
            task="feature-extraction",
            shape=(1, 8),
            kinds=count_kinds(plan),
            dense=dense,
            slim=slim,
            plan=plan,
            selection=Selection(asked=1, multiple_of=1),
            predicted=None,
            predicted_reason=None,
        )
    )
    rows = rows_of(capsys.readouterr().out)
    assert rows[2:5] == [
        ["heads in layers that stay", "4", "2", "\u221250.0%"],
        ["feed-forward neurons in layers that stay", "1,536", "928", "\u221239.6%"],
        ["layers", "2", "1", "\u221250.0%"],
    ]
    assert rows[-4:] == [
        ["layer.0.attention", "2 of 4", "1 3"],
        ["layer.0", "928 of 1536", "608 feed-forward neurons"],
        ["layer.0", "kept", "nothing"],
        ["layer.1", "dropped", "the layer"],
    ]
