"""Which form of the float32 graph ships."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, log

from pydantic import BaseModel, ConfigDict

from slimheads.latency.attribution import Treatment
from slimheads.names import PLAIN, GraphForm

MIN_GAIN = 1.01  # geometric mean over the shapes; a smaller gain is not worth a graph that fewer tools know


class Choice(BaseModel):
    """Which form ships, and the result of every form but the plain one, in words."""

    model_config = ConfigDict(frozen=True)
    ships: str
    reasons: dict[str, str]

    def confirmed(self, again: Sequence[Treatment]) -> Choice:
        """The same with what the form that ships gained when it was measured again, after the choice."""
        if (gain := _gain(again)) is None:
            return self
        reason = f"{self.reasons[self.ships]} when chosen, {gain:.3f}x when measured again"
        return Choice(ships=self.ships, reasons=self.reasons | {self.ships: reason})


class GraphChoice(BaseModel):
    """One form of the float32 graph: whether it was built, proven and chosen, and why not."""

    model_config = ConfigDict(frozen=True)
    candidate: GraphForm
    built: bool
    proven: bool | None  # null: there was nothing to prove
    ships: bool
    reason: str | None = None  # why it does not ship, or why it does


def graph_choices(
    built: Mapping[GraphForm, str | None], refused: Mapping[GraphForm, str | None], choice: Choice | None
) -> tuple[GraphChoice, ...]:
    """Every form of the float32 graph and what became of it. One ships, or none where the certificate failed.

    Args:
        built: the forms besides the plain graph, each with the reason where it was not built.
        refused: the built ones, each with the reason where a link of it failed.
        choice: None where a link of the plain graph failed, because no other form is tried then.
    """
    if choice is None:
        plain = GraphChoice(candidate=PLAIN, built=True, proven=False, ships=False, reason="the certificate failed")
        untried = "not tried, because the certificate failed"
        return plain, *(
            GraphChoice(candidate=name, built=not fault, proven=None, ships=False, reason=fault or untried)
            for name, fault in built.items()
        )
    ships, reasons = choice.ships, choice.reasons
    result = f"{ships} ships, {reasons[ships]}" if ships != PLAIN else "no other graph is shown to be faster"
    found = [GraphChoice(candidate=PLAIN, built=True, proven=True, ships=ships == PLAIN, reason=result)]
    for name, fault in built.items():
        proven = None if fault else refused[name] is None
        reason = fault or refused[name] or reasons.get(name, "not measured")
        found.append(GraphChoice(candidate=name, built=not fault, proven=proven, ships=name == ships, reason=reason))
    return tuple(found)


def choose_graph(rows: Sequence[Treatment]) -> Choice:
    """The plain graph ships unless another form is conclusively faster at some shape, slower at none, and gains at
    least MIN_GAIN over all of them (geometric mean). A choice within the noise of the machine would ship another file
    on every run.

    Args:
        rows: of one provider; rows of precisions are ignored.
    """
    gains: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for name in dict.fromkeys(row.treatment for row in rows if row.kind == "candidate"):
        own = [row for row in rows if row.treatment == name]
        if (gain := _gain(own)) is None:
            reasons[name] = next(f"not measured: {row.reason}" for row in own if row.on_slim is None)
            continue
        reasons[name] = f"{gain:.3f}x vs. plain export"
        verdicts = {row.verdict for row in own}
        if "inconclusive" in verdicts:
            reasons[name] += ", inconclusive"
        elif "slower" in verdicts:
            reasons[name] += ", slower at one shape or more"
        elif "faster" not in verdicts:
            reasons[name] += ", within the noise"
        elif gain < MIN_GAIN:
            reasons[name] += f", below the required {MIN_GAIN:.2f}x"
        else:
            gains[name] = gain
    return Choice(ships=max(gains, key=lambda name: gains[name], default=PLAIN), reasons=reasons)


def _gain(rows: Sequence[Treatment]) -> float | None:
    """The geometric mean of a treatment's gains on the slim model; None where a shape was not measured."""
    measured = [row.on_slim.estimate for row in rows if row.on_slim]
    return exp(sum(map(log, measured)) / len(measured)) if measured and len(measured) == len(rows) else None
