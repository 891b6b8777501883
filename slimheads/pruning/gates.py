"""Gates: the reversible form of a plan, and the reference that deletion is compared with.

Deleting a head or neuron equals multiplying its slice of the output projection's input by zero. Dropping a layer equals
giving its input back as its output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from slimheads.families.adapters import opened
from slimheads.families.sites import Site, SiteKey, find_sites
from slimheads.pruning.plan import Plan, match_plan


class Gates(Mapping[SiteKey, torch.Tensor]):
    """One gate per unit by site. A site is (kind, name), or its name alone where no other kind has the same."""

    def __init__(self) -> None:
        self._gates: dict[SiteKey, torch.Tensor] = {}

    def add(self, site: Site, gate: torch.Tensor) -> torch.Tensor:
        """Keeps a gate, which from then on requires a gradient."""
        self._gates[site.key] = gate.requires_grad_()
        return gate

    def __getitem__(self, site: SiteKey | str) -> torch.Tensor:
        found = [key for key in self._gates if site in (key, key[1])]
        if len(found) != 1:
            raise KeyError(site)
        return self._gates[found[0]]

    def __iter__(self) -> Iterator[SiteKey]:
        return iter(self._gates)

    def __len__(self) -> int:
        return len(self._gates)


@contextmanager
def gated(model: PreTrainedModel, plan: Plan) -> Iterator[Gates]:
    """Multiplies every unit's contribution by a gate inside the context: 1 if the plan keeps the unit, else 0.

    The gate of a layer is between its input (0) and its output (1).

    Yields:
        The gates of the plan's sites, each a leaf tensor [units] in the model's dtype that requires a gradient and may
        be written to in place. Gradients flow through the gates and the kept weights. No weight changes, so leaving
        the context restores the model bit for bit.

    Raises:
        UsageError: the plan was not made for this model.
    """
    sites = find_sites(model)
    matched = match_plan(sites, plan)
    planned, dropped = {site.key: site for site in plan.sites}, {site.key for site in matched.dropped}
    gates = Gates()
    hooks = []
    with opened(model, sites):
        try:
            for site, kept in matched.pairs:
                if site.key in planned:
                    projection = model.get_submodule(site.output.module)
                    gate = gates.add(site, _gate(projection.get_parameter("weight"), site.total, kept))
                    hooks.append(projection.register_forward_pre_hook(_multiplier(site, gate)))
            for site in (s for s in sites if s.kind == "layer" and s.key in planned):
                layer = model.get_submodule(site.name)
                gate = gates.add(site, _gate(next(layer.parameters()), 1, () if site.key in dropped else (0,)))
                hooks.append(layer.register_forward_hook(_bypass(gate), with_kwargs=True))
            yield gates
        finally:
            for hook in hooks:
                hook.remove()


def _gate(like: torch.Tensor, total: int, kept: tuple[int, ...]) -> torch.Tensor:
    gate = torch.zeros(total, dtype=like.dtype, device=like.device)
    gate[list(kept)] = 1
    return gate


def _multiplier(site: Site, gate: torch.Tensor) -> Any:
    unit_of = torch.tensor(site.output.unit_of, device=gate.device)

    def multiply(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0] * gate[unit_of], *inputs[1:])

    return multiply


def _bypass(gate: torch.Tensor) -> Any:
    def mix(_module: torch.nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], outputs: Any) -> Any:
        entered: torch.Tensor = inputs[0] if inputs else options["hidden_states"]
        several = isinstance(outputs, tuple)
        parts = list(outputs) if several else [outputs]
        # DistilBERT's layers may return attention weights before the states.
        at = next(i for i, part in enumerate(parts) if isinstance(part, torch.Tensor) and part.shape == entered.shape)
        # The input plus a share of the change would round where the share is 1.
        parts[at] = gate * parts[at] + (1 - gate) * entered
        return tuple(parts) if several else parts[0]

    return mix
