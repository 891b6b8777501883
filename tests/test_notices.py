"""Notices: shown once, kept in the report, and told again where a stage's result is reused."""

from __future__ import annotations

import logging

import pytest

from slimheads.notices import collected, notify


def test_a_notice_is_shown_once_however_often_it_is_told() -> None:
    shown: list[str] = []
    with collected(shown.append), collected() as kept:
        notify("a file\n was left out")
        notify("a file was left out")
        notify("another one was")
    assert shown == kept == ["a file was left out", "another one was"]


def test_a_collection_that_has_ended_gets_nothing_more() -> None:
    with collected() as first:
        notify("one")
    with collected() as second:
        notify("two")
    assert (first, second) == (["one"], ["two"])


def test_what_nobody_shows_is_logged_as_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "slimheads"):
        notify("outside")
        with collected():
            notify("within a run from Python")
        with collected(lambda text: None):
            notify("shown")
    assert [record.message for record in caplog.records] == ["outside", "within a run from Python"]
