"""The report of a run: its figures as data (`report.json`, format 1), and the pages made from them.

The pipeline fills a `Report`; everything a person reads (report.md, report.html, the model card, the terminal's
summary) is rendered from that one object and from nothing else, so no page can say what the data does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, JsonValue, computed_field, model_validator

from slimheads.families.family import Inputs
from slimheads.latency.attribution import Treatment
from slimheads.latency.counts import Selection
from slimheads.latency.graph_choice import GraphChoice
from slimheads.latency.records import Latency
from slimheads.names import SiteKind, Unit
from slimheads.pruning.plan import Plan
from slimheads.pruning.scores import ScoreTable
from slimheads.runtime.environment import Environment
from slimheads.verification.certificate import LeftOut, Link, SkippedLink
from slimheads.verification.drift import Drift
from slimheads.verification.lengths import Lengths

Reload = Literal["stock", "slimheads", "onnx only"]


class _Part(BaseModel):
    """Frozen, refuses unknown keys, and refuses NaN and infinity, which JSON cannot carry."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Verdict(_Part):
    """What a CI acts on. `reasons` says why in words: never empty when `ok` is false."""

    ok: bool
    exit_code: int
    reasons: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.ok != (self.exit_code == 0):
            raise ValueError(f"ok is {self.ok} but the exit code is {self.exit_code}")
        if not self.ok and not self.reasons:
            raise ValueError("a failed verdict needs a reason")
        return self


class Size(_Part):
    """One model: `bytes` are those of its float32 graph, `flops` those of one run at `ModelFacts.flops_shape`.

    Of an encoder-decoder, `bytes` are those of the two graphs that clients load, the encoder and the merged decoder.
    """

    parameters: int | None
    bytes: int | None
    flops: int | None
    reason: str | None = None  # why a figure is null

    @model_validator(mode="after")
    def _nulls_have_reasons(self) -> Self:
        _need_reason(self, ("parameters", "bytes", "flops"))
        return self


class KindCount(_Part):
    """The units at the sites of one kind that the plan names. It names none inside a layer that it drops."""

    unit: Unit  # of the first site
    sites: int
    total: int
    kept: int
    removed: int

    @classmethod
    def of(cls, plan: Plan) -> KindCount:
        """Of a plan of one kind."""
        total, removed = plan.total, plan.removed
        return cls(unit=plan.sites[0].unit, sites=len(plan.sites), total=total, kept=total - removed, removed=removed)

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if self.kept + self.removed != self.total:
            raise ValueError(f"{self.kept} kept and {self.removed} removed are not {self.total}")
        return self


class ModelFacts(_Part):
    """What went in and what came out."""

    source: str  # as the recipe names it
    hub_id: str | None = None  # where the source is a Hub repository: becomes base_model of the card
    type: str  # config.model_type
    family: str
    task: str
    dense: Size
    slim: Size
    inputs: Inputs  # what it is fed
    flops_shape: tuple[int, ...] | None  # [batch], [batch, length] or [batch, length, past]; null with dense.reason
    kinds: dict[SiteKind, KindCount]  # the kinds that the plan names
    reload: Reload
    reload_note: str  # one sentence: why it is that
    sentence_transformers: bool = False  # slim/ embeds, and holds modules.json
    terms: dict[str, str] = {}  # the licence as the source's card states it: license, license_name, license_link
    encoder_decoder: bool = False  # ships as an encoder's graph and a decoder's

    @computed_field  # type: ignore[prop-decorator]
    @property
    def heads(self) -> KindCount:
        """The attention sites' units: heads, or KV groups."""
        return self.kinds["attention"]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def unit(self) -> Unit:
        """What is deleted alone at attention sites."""
        return self.heads.unit

    @model_validator(mode="before")
    @classmethod
    def _computed_again(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if key not in cls.model_computed_fields}

    @model_validator(mode="after")
    def _has_heads(self) -> Self:
        if "attention" not in self.kinds:
            raise ValueError("kinds has no attention: a plan names every attention site")
        return self


class GateResult(_Part):
    """One gate of the recipe. Not met where it could not be measured."""

    gate: str
    limit: float
    measured: float | None
    met: bool
    reason: str | None = None  # why it was not measured, or which measurement decided

    @model_validator(mode="after")
    def _nulls_have_reasons(self) -> Self:
        _need_reason(self, ("measured",))
        return self


class Prediction(_Part):
    """What the plan alone predicts for one row of `latency`, of a plain float32 graph, beside what was measured."""

    provider: str
    threads: int
    graph: str | None = None
    shape: tuple[int, ...]
    source: Literal["table", "flops"]  # the latency table, or the ratio of FLOPs where there is none
    speedup: float | None  # predicted
    low: float | None = None  # the table's own 95% margin
    high: float | None = None
    measured: float | None  # speedup
    error: float | None  # predicted slim latency / measured slim latency - 1, for the same dense latency
    reason: str | None = None

    @model_validator(mode="after")
    def _nulls_have_reasons(self) -> Self:
        _need_reason(self, ("speedup", "measured", "error"))
        return self


class StageRecord(_Part):
    """What one stage cost; a reused stage shows what it cost when it ran."""

    stage: str
    seconds: float
    peak_rss_mb: float
    reused: bool


class Report(_Part):
    """Everything a run found, format 1.

    A section that was not measured is null (or empty) and has its reason in the `..._reason` field beside it; the
    model refuses to be built otherwise. It refuses NaN and infinity anywhere, naming the field.
    """

    format: Literal[1] = 1
    verdict: Verdict
    recipe: dict[str, JsonValue]
    model: ModelFacts
    files: dict[str, int]  # path inside the output folder -> bytes
    scores: ScoreTable
    plan: Plan
    certificate: tuple[Link, ...]
    certificate_skipped: tuple[SkippedLink, ...] = ()
    certificate_reason: str | None = None  # why there are no links
    lengths: Lengths | None = None  # that the certificate tried; null where inputs have no length
    left_out: tuple[LeftOut, ...] = ()  # precisions of the recipe that do not ship
    drift: Drift | None
    drift_reason: str | None = None
    drift_text: Drift | None = None
    drift_text_reason: str | None = None
    latency: tuple[Latency, ...]
    latency_reason: str | None = None
    candidates: tuple[GraphChoice, ...] = ()  # the float32 graphs that could ship; one of them does
    treatments: tuple[Treatment, ...] = ()  # speedup attribution of each further graph and precision
    selection: Selection
    predictions: tuple[Prediction, ...]
    predictions_reason: str | None = None  # why there are none, or why they are by FLOPs
    gates: tuple[GateResult, ...] = ()
    notices: tuple[str, ...] = ()  # shown during the run: what was repaired or left out
    stages: tuple[StageRecord, ...]
    environment: Environment
    command: str
    seconds: float
    peak_rss_mb: float

    @model_validator(mode="after")
    def _nulls_have_reasons(self) -> Self:
        for section in ("certificate", "drift", "drift_text", "latency", "predictions"):
            if not getattr(self, section) and not getattr(self, f"{section}_reason"):
                raise ValueError(f"{section} is empty and {section}_reason does not say why")
        for row in self.latency:
            if row.speedup is None and not row.reason:
                raise ValueError(f"latency at {row.shape} was not measured and has no reason")
        for treated in self.treatments:
            if treated.on_slim is None and not treated.reason:
                raise ValueError(f"{treated.treatment} at {treated.shape} was not measured and has no reason")
        for name, drift in (("drift", self.drift), ("drift_text", self.drift_text)):
            if drift is not None and drift.slim is None and not drift.reason:
                raise ValueError(f"{name} has no figures and no reason")
        return self

    @model_validator(mode="after")
    def _plan_fits_scores(self) -> Self:
        scored = [((site.kind, site.site), len(site.scores)) for site in self.scores.sites if site.kind != "layer"]
        planned = [(site.key, site.total) for site in self.plan.sites if site.kind != "layer"]
        if scored != planned:
            raise ValueError("scores and plan do not have the same sites and units")
        if self.model.kinds != count_kinds(self.plan):
            raise ValueError("model.kinds does not count what the plan says")
        return self

    @model_validator(mode="after")
    def _all_finite(self) -> Self:
        for path, number in _floats(self.model_dump(), ""):
            if not math.isfinite(number):
                raise ValueError(f"{path} is {number}: give null and a reason")
        return self

    @property
    def shipped_latency(self) -> tuple[Latency, ...]:
        """The measurements of the files that ship; the plain graph is measured beside another form that does."""
        return tuple(row for row in self.latency if row.ships is not False)

    @property
    def proven(self) -> bool:
        """Whether every link held."""
        return all(link.passed for link in self.certificate)

    def to_json(self) -> str:
        """`report.json`, indented, with a final newline; `Report.model_validate_json` reads it back equal."""
        return self.model_dump_json(indent=2) + "\n"


def count_kinds(plan: Plan) -> dict[SiteKind, KindCount]:
    """The units of each kind that the plan names."""
    return {kind: KindCount.of(plan.of_kind(kind)) for kind in plan.kinds}


def _need_reason(part: Size | GateResult | Prediction, figures: tuple[str, ...]) -> None:
    missing = [name for name in figures if getattr(part, name) is None]
    if missing and not part.reason:
        raise ValueError(f"{', '.join(missing)} null without a reason")


def _floats(value: object, path: str) -> Iterator[tuple[str, float]]:
    """Every float inside, with the dotted path to it."""
    if isinstance(value, float):
        yield path.lstrip("."), value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _floats(inner, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _floats(inner, f"{path}[{index}]")
