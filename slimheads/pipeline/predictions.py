"""What the plan alone predicts of each measured latency, beside what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from slimheads.errors import UsageError
from slimheads.latency.profile import command, table_shapes
from slimheads.latency.records import Latency
from slimheads.latency.table import Predicted, predict
from slimheads.latency.table_store import stored
from slimheads.names import PLAIN
from slimheads.pipeline.finished import Finished
from slimheads.pipeline.latency_tables import setting_of
from slimheads.report.model import Prediction


def predict_rows(run: Finished, latency: Sequence[Latency]) -> tuple[tuple[Prediction, ...], str | None]:
    """Every row of the plain float32 graphs predicted from the plan, and why a row is predicted by FLOPs.

    With the tables that are stored now: a table is of the dense model, so none was made with this plan's latency known.
    """
    found, reason = [], None
    for row in latency:
        if row.precision == "fp32" and row.candidate == PLAIN:  # tables are made of plain graphs
            by_table, lacking = _by_table(run, row)
            reason = reason or lacking
            found.append(_prediction(row, by_table))
    return tuple(found), reason


def _by_table(run: Finished, row: Latency) -> tuple[Predicted | None, str | None]:
    if row.graph is not None:
        return None, "there are no latency tables of models with several graphs"
    setting = setting_of(run.recipe, row.provider, row.threads)
    tables = stored(run.source, [row.shape], setting)
    if row.shape not in tables:
        shapes = table_shapes(run.source, run.recipe.bench.shapes)
        return None, f"there is no latency table yet; make one with: {command(run.source, shapes, setting)}"
    try:
        return predict(tables[row.shape], run.selected.plan), None
    except UsageError as error:
        return None, error.what


def _prediction(row: Latency, by_table: Predicted | None) -> Prediction:
    interval = by_table.speedup if by_table else None
    speedup = interval.estimate if interval else row.flop_speedup
    measured = row.speedup.estimate if row.speedup and row.verdict != "inconclusive" else None
    return Prediction(
        provider=row.provider,
        threads=row.threads,
        graph=row.graph,
        shape=row.shape,
        source="table" if interval else "flops",
        speedup=speedup,
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        measured=measured,
        error=measured / speedup - 1 if measured and speedup else None,
        reason="the FLOPs were not counted" if speedup is None else row.reason if measured is None else None,
    )
