"""Latency tables from ONNX Runtime: measured, or taken from where they are stored."""

from __future__ import annotations

import copy
import shlex
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from slimheads.errors import UsageError
from slimheads.exporting.artifacts import file_name
from slimheads.exporting.export import export
from slimheads.families.config_facts import measured_shapes
from slimheads.families.limits import require_fit
from slimheads.formatting import shape_text
from slimheads.latency.bench import bench
from slimheads.latency.kinds import Kind, kinds_of
from slimheads.latency.records import Interval, Latency
from slimheads.latency.table import LatencyTable, Measurement
from slimheads.latency.table_store import Setting, folder, made_for, path_of, store, stored, writable
from slimheads.models.checkpoint import Source, read_config
from slimheads.models.loading import load
from slimheads.names import ALL_KINDS, Shape
from slimheads.pruning.surgery import prune

MIN_SECONDS = 1.0  # per point
_TRIES = 2  # for a point with a noisy control; `bench` has by then measured each three times as long


@dataclass(frozen=True)
class Profile:
    """A table, where it is stored, and whether it was there already."""

    table: LatencyTable
    path: Path
    reused: bool


def profile(
    source: Source,
    shapes: Sequence[Shape],
    setting: Setting,
    *,
    min_seconds: float = MIN_SECONDS,
    again: bool = False,
    tell: Callable[[str], None] = lambda line: None,
    on_share: Callable[[float], None] = lambda share: None,
) -> tuple[Profile, ...]:
    """The model's latency tables, one per shape. Those that are not stored yet are measured together, and stored.

    Args:
        source: a model of one graph.
        shapes: as for `bench`.
        min_seconds: least time in timed runs per point and shape.
        again: whether to measure what is stored already.
        tell: called with a line of text for each point.
        on_share: called with the share of the work that is done, 0 to 1.

    Raises:
        UsageError: an encoder-decoder, a model that can lose no unit of these kinds, or a shape that the model does
            not run at.
        EnvironmentLackError: the provider is missing, or the folder of the tables cannot be written.
    """
    shapes = table_shapes(source, shapes)
    require_fit(read_config(source.folder), shapes)
    found = {} if again else stored(source, shapes, setting)
    lacking = [shape for shape in shapes if shape not in found]
    if lacking:
        with writable(folder()):
            pass  # found out before hours of measuring
        for table in _measure(source, lacking, setting, min_seconds, tell, on_share):
            store(table)
            found[table.shape] = table
    return tuple(Profile(found[s], path_of(found[s].made_for), s not in lacking) for s in shapes)


def table_shapes(source: Source, shapes: Sequence[Shape]) -> tuple[Shape, ...]:
    """The shapes that differ for this model, each one once.

    Raises:
        UsageError: the model is an encoder-decoder, whose latency is that of several graphs.
    """
    config = read_config(source.folder)
    if config.is_encoder_decoder:
        raise UsageError(
            f"a latency table is for a model with one graph, and {source.model_type} is an encoder-decoder",
            where=source.given,
            hint="use the ratio of FLOPs, which every run reports",
        )
    return tuple(dict.fromkeys(measured_shapes(config, shapes)))


def _measure(
    source: Source,
    shapes: Sequence[Shape],
    setting: Setting,
    min_seconds: float,
    tell: Callable[[str], None],
    on_share: Callable[[float], None],
) -> Iterator[LatencyTable]:
    """One table per shape. All shapes of a point are measured on the same two files."""
    model = load(source.folder, source.given_task).float()
    kinds = kinds_of(model, setting.within_groups, setting.kinds)
    wanted = [(index, count) for index, kind in enumerate(kinds) for count in kind.counts(setting.threads)]
    if not wanted:
        raise UsageError(
            f"no site of kind {' or '.join(setting.kinds)} can lose a unit: there is nothing to measure",
            where=source.given,
            keys=("select.multiple_of",),
            hint="take a model with several heads, or measure other kinds of sites",
        )
    found: dict[Shape, list[tuple[int, int, Latency]]] = {shape: [] for shape in shapes}
    with tempfile.TemporaryDirectory(prefix="slimheads-profile-") as home:
        dense = _exported(model, Path(home, "dense"), source.task)
        for number, (index, count) in enumerate(wanted, 1):
            kind = kinds[index]
            place = f"point {number} of {len(wanted)}: {kind.kind} {kind.name} keeps {count} of {kind.total}"
            tell(place)
            on_share((number - 1) / len(wanted))
            slim_model = prune(copy.deepcopy(model), kind.plan(count))
            slim = _exported(slim_model, Path(home, "slim"), source.task)
            for shape, row in _rows(dense, slim, shapes, setting, min_seconds, place, tell).items():
                found[shape].append((index, count, row))
            shutil.rmtree(slim.parent)
    for shape in shapes:
        yield _table(source, shape, setting, min_seconds, kinds, found[shape])


def _exported(model: PreTrainedModel, into: Path, task: str) -> Path:
    export(model, into, task=task)
    return into / file_name("model", "fp32")


def _rows(
    dense: Path,
    slim: Path,
    shapes: Sequence[Shape],
    setting: Setting,
    min_seconds: float,
    place: str,
    tell: Callable[[str], None],
) -> dict[Shape, Latency]:
    """One point at every shape. Inconclusive shapes are measured again, and the least noisy control is kept."""
    best: dict[Shape, Latency] = {}
    for attempt in range(_TRIES):
        noisy = [shape for shape in shapes if shape not in best or best[shape].verdict == "inconclusive"]
        if not noisy:
            break
        if attempt:
            tell(f"{place}, again at {', '.join(map(shape_text, noisy))}: the machine is noisy")
        rows = bench(
            dense, slim, shapes=noisy, provider=setting.provider, threads=setting.threads,
            min_seconds=min_seconds, seed=attempt,
        )  # fmt: skip
        for shape, row in zip(noisy, rows, strict=True):
            best[shape] = min(best.get(shape, row), row, key=_noise)
    return best


def _noise(row: Latency) -> float:
    """How far the control's interval reaches from 1, where the row is inconclusive."""
    _, control = _measured(row)
    return max(abs(control.low - 1), abs(control.high - 1)) if row.verdict == "inconclusive" else 0.0


def _measured(row: Latency) -> tuple[Interval, Interval]:
    """The speedup and the control of a row. Every row has both, because a missing provider is an error here."""
    assert row.speedup is not None and row.control is not None
    return row.speedup, row.control


def _table(
    source: Source,
    shape: Shape,
    setting: Setting,
    min_seconds: float,
    kinds: tuple[Kind, ...],
    rows: Sequence[tuple[int, int, Latency]],
) -> LatencyTable:
    points = []
    for index, count, row in rows:
        speedup, control = _measured(row)
        share = Interval(estimate=1 / speedup.estimate, low=1 / speedup.high, high=1 / speedup.low)
        points.append(Measurement(kind=index, kept=count, share=share, control=control))
    return LatencyTable(
        made_for=made_for(source, shape, setting),
        provider=setting.provider,
        threads=setting.threads,
        shape=shape,
        min_seconds=min_seconds,
        dense_ms=statistics.median(row.dense.median_ms for _, _, row in rows if row.dense),
        kinds=kinds,
        points=tuple(points),
    )


def command(source: Source, shapes: Sequence[Shape], setting: Setting) -> str:
    """The command line that measures these tables."""
    parts: list[str] = ["slimheads", "profile", source.given, "--task", source.task]
    for shape in shapes:  # an image has no length, but the option requires one
        parts += ["--shape", "x".join(map(str, shape if len(shape) > 1 else (*shape, 1)))]
    parts += ["--threads", str(setting.threads), "--provider", setting.provider]
    if setting.kinds != ALL_KINDS:
        parts += ["--kinds", ",".join(setting.kinds)]
    return shlex.join([*parts, *(["--within-groups"] if setting.within_groups else [])])
