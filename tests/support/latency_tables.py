"""Latency tables made up from a formula, for tests that must not depend on a clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from slimheads.latency.kinds import Kind, kinds_of
from slimheads.latency.records import Interval
from slimheads.latency.table import LatencyTable, Measurement
from slimheads.latency.table_store import Setting, made_for, store
from slimheads.models.checkpoint import find
from slimheads.models.loading import load

STEADY = Interval(estimate=1.0, low=0.99, high=1.01)


def kind_of(layers: int = 3, total: int = 4, name: str = "layer", **more: Any) -> Kind:
    """`layers` sites of one kind: layer.0, layer.1, ..."""
    names = tuple(f"{name}.{layer}" for layer in range(layers))
    fields = {"kind": "attention", "name": f"{name}.*", "unit": "head", "total": total, "step": 1, "least": 1}
    return Kind(**fields | {"sites": names} | more)


def neurons_of(layers: int, total: int, name: str = "mlp") -> Kind:
    """`layers` feed-forward blocks of one kind: mlp.0, mlp.1, ..."""
    return kind_of(layers, total, name, kind="feed_forward", unit="neuron")


def layers_of(total: int, name: str = "layer", least: int = 1) -> Kind:
    """`total` layers of one stack that are alike: layer.0, layer.1, ..."""
    return kind_of(total, total, name, kind="layer", unit="layer", least=least)


def table_of(
    kinds: Sequence[Kind],
    share: Callable[[int, int], float],
    *,
    margin: float = 0.0,
    threads: int = 2,
    shape: tuple[int, ...] = (1, 8),
    control: Interval = STEADY,
    **more: Any,
) -> LatencyTable:
    """`share(kind, kept)` of the dense latency is left when the kind at that index has the count `kept`."""
    points = []
    for index, kind in enumerate(kinds):
        for kept in kind.counts(threads):
            estimate = share(index, kept)
            interval = Interval(estimate=estimate, low=estimate - margin, high=estimate + margin)
            points.append(Measurement(kind=index, kept=kept, share=interval, control=control))
    fields: dict[str, Any] = {"made_for": {}, "provider": "cpu", "min_seconds": 1.0, "dense_ms": 10.0} | more
    return LatencyTable(threads=threads, shape=shape, kinds=tuple(kinds), points=tuple(points), **fields)


def stairs(total: int, threads: int, each: float) -> Callable[[int, int], float]:
    """Latency in steps of `threads` heads: 7 heads on 2 threads cost as much as 8. `each` is what a head saves."""
    return lambda _, kept: 1 - each * (total - -(-kept // threads) * threads)


def keep_table(
    model: Path, share: Callable[[int, int], float], shape: tuple[int, ...], setting: Setting, **more: Any
) -> Path:
    """Stores a made-up table as if it had been measured of this model; where it is."""
    source, kinds = find(str(model)), kinds_of(load(model), setting.within_groups, setting.kinds)
    about = made_for(source, shape, setting)
    return store(table_of(kinds, share, threads=setting.threads, shape=shape, made_for=about, **more))
