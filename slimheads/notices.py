"""Notices: what a user has to know of a command that goes well, a setting that was repaired, say.

Whoever finds such a thing calls `tell`. The command line shows every notice once, and a run's report keeps them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

log = logging.getLogger(__name__)

_Open = tuple[tuple[list[str], Callable[[str], None] | None], ...]
_open: ContextVar[_Open] = ContextVar("open", default=())


def tell(text: str) -> None:
    """Tells the user one thing: into every collection that is open, once each; logged as a warning if none shows it.

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
    """Gives a list that grows with what is told inside, each text once; `show` is called with each as it comes."""
    texts: list[str] = []
    mark = _open.set((*_open.get(), (texts, show)))
    try:
        yield texts
    finally:
        _open.reset(mark)
