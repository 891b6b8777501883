"""Notices: facts that a user has to know although the command succeeds, such as a repaired setting.

Code that finds such a fact calls `notify`. The command line shows every notice once, and a run's report keeps them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

log = logging.getLogger(__name__)

_Open = tuple[tuple[list[str], Callable[[str], None] | None], ...]
_open: ContextVar[_Open] = ContextVar("open", default=())


def notify(text: str) -> None:
    """Adds a notice to every open collection, once each; logs it as a warning if no collection shows it.

    Args:
        text: one sentence without a full stop. The model card repeats it elsewhere, so it names files by their name
            inside the model's folder.
    """
    text = " ".join(text.split())
    shown = False
    for texts, show in _open.get():
        if text not in texts:
            texts.append(text)
            if show:
                show(text)
        shown = shown or show is not None
    if not shown:
        log.warning("%s", text)


@contextmanager
def collected(show: Callable[[str], None] | None = None) -> Iterator[list[str]]:
    """Yields a list of the notices given inside the block, each text once; `show` is called with each new one."""
    texts: list[str] = []
    mark = _open.set((*_open.get(), (texts, show)))
    try:
        yield texts
    finally:
        _open.reset(mark)
