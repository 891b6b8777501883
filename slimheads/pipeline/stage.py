"""What a stage is, and how it is run: an earlier run's result is reused where it still holds."""

from __future__ import annotations

import hashlib
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import slimheads
from slimheads.errors import SlimheadsError
from slimheads.notices import collected, notify
from slimheads.output.store import Record, Store, stage_key
from slimheads.pipeline.progress import Progress
from slimheads.report.model import StageRecord
from slimheads.runtime.environment import installed
from slimheads.runtime.memory import PeakMemory

_VERSIONED = (
    "torch",
    "transformers",
    "optimum",
    "optimum-onnx",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxscript",
    "scipy",
)


class Result(BaseModel):
    """What a stage leaves: frozen, stored as JSON; its files are in `folder`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    folder: Path = Field(default=Path(), exclude=True)
    content: str = Field(default="", exclude=True)  # hash of the result, its files, and the results it was made of

    @property
    def reusable(self) -> bool:
        """Whether a later run may take this result instead of working again."""
        return True

    @property
    def ends_run(self) -> bool:
        """Whether nothing but the report may follow."""
        return False


R = TypeVar("R", bound=Result)


@dataclass(frozen=True)
class Stage(Generic[R]):
    """A stage with its inputs bound: `work(folder)` writes files into `folder` and gives the result.

    Args:
        depends: what of the recipe, the model's files and the machine the result depends on, as JSON types. It is read
            before the work to look for a stored result, and after it to store one; it does no work itself.
        reads: the results of earlier stages that it depends on as a whole.
        about: what the work is, and how long it takes if that is known; shown when it begins.
        presumed: what a dry run goes on with where the stage would have to work; None where it cannot go on.
    """

    name: str
    result: type[R]
    work: Callable[[Path], R]
    depends: Callable[[], Mapping[str, Any]]
    reads: tuple[Result, ...] = ()
    presumed: R | None = None
    about: str = ""

    def key(self) -> str:
        """What the result depends on, as one hash."""
        return stage_key(self.name, self.depends(), [result.content for result in self.reads], versions())


class StoppedError(Exception):
    """Control flow: the stage that `--until` names has ended."""


class MissingError(Exception):
    """Control flow of a dry run: the stage would have to work."""


@dataclass
class Runner:
    """Runs stages one after another in an output folder.

    Args:
        from_stage: stages from this one on work even where a stored result holds.
        until: the stage after which `StoppedError` is raised.
        dry: raise `MissingError` where a stage would have to work.
    """

    store: Store
    progress: Progress
    from_stage: str | None = None
    until: str | None = None
    dry: bool = False
    done: dict[str, Result] = field(default_factory=dict)
    timings: list[StageRecord] = field(default_factory=list)
    _forced: bool = False  # `from_stage` was reached

    def do(self, stage: Stage[R]) -> R:
        """The stage's result, stored or new.

        Raises:
            StoppedError: `until` names this stage, and its result does not end the run anyway.
            MissingError: in a dry run, there is no stored result.
        """
        started, memory = time.perf_counter(), PeakMemory()
        self.progress.start(stage.name)
        found = self._stored(stage)
        reused = found is not None
        if found is None:
            if self.dry:
                return _presumed(stage)
            self.progress.work(stage.about)
            found = self._work(stage, started, memory)
        record, result = found
        for notice in record.notices:
            notify(notice)
        self.progress.finish(stage.name, record.seconds, reused)
        peak = record.peak_rss_mb or 0.0
        self.timings.append(StageRecord(stage=stage.name, seconds=record.seconds, peak_rss_mb=peak, reused=reused))
        self.done[stage.name] = result
        if stage.name == self.until and not result.ends_run:
            raise StoppedError(stage.name)
        return result

    @property
    def peak_rss_mb(self) -> float:
        """The largest peak memory of the stages that worked; 0 where all were reused."""
        return max((timing.peak_rss_mb for timing in self.timings if not timing.reused), default=0.0)

    def _stored(self, stage: Stage[R]) -> tuple[Record, R] | None:
        self._forced = self._forced or stage.name == self.from_stage
        record = None if self._forced else self.store.find(stage.name, stage.key())
        if record is None:
            return None
        try:
            return record, _placed(stage.result.model_validate(record.result), record, stage)
        except ValidationError:  # damaged: the key covers the version
            return None

    def _work(self, stage: Stage[R], started: float, memory: PeakMemory) -> tuple[Record, R]:
        with self.store.begin(stage.name) as work:
            with collected() as notices, _inner_files_not_named(stage.name, self.store):
                result = stage.work(work.path)
            data, key = result.model_dump(mode="json"), stage.key()
            seconds, peak = time.perf_counter() - started, memory.megabytes()
            if result.reusable:
                record = work.publish(key, data, seconds, peak, notices)
                return record, _placed(result, record, stage)
        self.store.discard(stage.name, key)
        path = self.store.out
        record = Record(path=path, stage=stage.name, key=key, seconds=seconds, peak_rss_mb=peak, result=data, files={})
        return record, _placed(result, record, stage)


def _presumed(stage: Stage[R]) -> R:
    if stage.presumed is None:
        raise MissingError(stage.name)
    return stage.presumed


def _placed(result: R, record: Record, stage: Stage[R]) -> R:
    """The result with the folder of its files and the hash of its content.

    The stage's key would not do as the hash: where a stage works again and leaves other bytes than before, what
    later stages found out about the earlier bytes, a certificate above all, must not be taken for these.
    """
    files = {name: stamp.sha256 for name, stamp in record.files.items()}
    content = stage_key(stage.name, {"result": record.result, "files": files}, [r.content for r in stage.reads], {})
    return result.model_copy(update={"folder": record.path, "content": content})


@contextmanager
def _inner_files_not_named(stage: str, store: Store) -> Iterator[None]:
    """An error names what a stage made by its place in slim/ or dense/: no user looks below .slimheads."""
    inside = re.compile(re.escape(str(store.inside)) + r"[/\\](stages[/\\][^/\\]+[/\\])?[^/\\]+[/\\]")
    try:
        yield
    except SlimheadsError as error:
        error.what = inside.sub("", error.what)
        if error.where and inside.match(error.where):
            error.where = f"{inside.sub('', error.where)}, as the {stage} stage has it"
        raise


@cache
def versions() -> dict[str, str]:
    """What a stored result depends on besides its inputs: our own code, byte for byte, and the libraries below it."""
    own = hashlib.sha256()
    package = Path(slimheads.__file__).parent
    for path in sorted([*package.rglob("*.py"), *package.rglob("*.yaml"), *package.rglob("*.txt")]):
        own.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return {"slimheads": own.hexdigest(), "python": platform.python_version()} | {
        n: installed(n) or "none" for n in _VERSIONED
    }
