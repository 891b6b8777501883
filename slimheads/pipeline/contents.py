"""What a run publishes: name in the output folder -> content."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimheads.names import Side
from slimheads.output.publishing import Source
from slimheads.pipeline.finished import Finished
from slimheads.pipeline.stages.score import Scored
from slimheads.pipeline.stages.select import Selected
from slimheads.recipe.recipe import Recipe
from slimheads.report.card import short_name
from slimheads.report.model import Report
from slimheads.report.render import render_html, render_markdown, render_model_card


def contents(recipe: Recipe, scored: Scored | None, selected: Selected | None) -> dict[str, Source]:
    """The recipe as resolved, and the scores and the plan so far."""
    wanted: dict[str, Source] = {"recipe.yaml": recipe.resolved_yaml().encode()}
    if scored:
        scores = scored.scores.behind(selected.plan) if selected else scored.scores.of_kinds(*recipe.select.kinds)
        wanted["scores.json"] = _json(scores.table().model_dump(mode="json"))
    if selected:
        wanted["plan.json"] = _json(selected.plan.to_json())
    return wanted


def all_contents(run: Finished, report: Report) -> dict[str, Source]:
    """Everything of a run that reached its report; without slim/ where the certificate failed."""
    wanted = contents(run.recipe, run.scored, run.selected)
    wanted["dense"] = {"config.json": run.exported.folder / "dense" / "config.json"} | published_graphs(run, "dense")
    if run.verified.certificate.passed:
        torch_half = {f.name: f for f in run.pruned.slim.iterdir() if f.name != "README.md"}
        card = render_model_card(_shareable(report)).encode()
        wanted["slim"] = {**torch_half, **published_graphs(run, "slim"), "README.md": card}
    wanted["report.json"] = report.to_json().encode()
    wanted["report.md"] = render_markdown(report).encode()
    wanted["report.html"] = render_html(report).encode()
    return wanted


def published_graphs(run: Finished, side: Side) -> dict[str, Path]:
    """The graphs of one side by their place in its folder."""
    return {f"onnx/{name}": path for name, path in run.published_graphs(side).items()}


def _shareable(report: Report) -> Report:
    """The card leaves this machine with the model, so it calls a folder of this machine by its name alone."""
    model = report.model
    if model.hub_id or model.source.startswith("pkg://"):
        return report
    return report.model_copy(update={"model": model.model_copy(update={"source": short_name(model.source)})})


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=1, allow_nan=False) + "\n").encode()
