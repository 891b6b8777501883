"""Gates: the reversible form of a plan, and the reference that deletion is compared with.

Deleting a unit equals multiplying its slice of the output projection's input by zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from slimheads.families.adapters import opened
from slimheads.families.sites import Site, find_sites
from slimheads.pruning.plan import Plan, match_plan


@contextmanager
def gated(model: PreTrainedModel, plan: Plan) -> Iterator[Mapping[str, torch.Tensor]]:
    """Multiplies every unit's contribution by a gate inside the context: 1 if the plan keeps the unit, else 0.

    Yields:
        The gates by site name, each a leaf tensor [units] in the model's dtype that requires a gradient and may be
        written to in place. Gradients flow through the gates and the kept weights. No weight changes, so leaving the
        context restores the model bit for bit.

    Raises:
        UsageError: the plan was not made for this model.
    """
    sites = find_sites(model)
    pairs = match_plan(sites, plan)
    gates: dict[str, torch.Tensor] = {}
    hooks = []
    with opened(model, sites):
        try:
            for site, kept in pairs:
                projection = model.get_submodule(site.output.module)
                weight = projection.get_parameter("weight")
                gate = torch.zeros(site.total, dtype=weight.dtype, device=weight.device)
                gate[list(kept)] = 1
                gates[site.name] = gate.requires_grad_()
                hooks.append(projection.register_forward_pre_hook(_multiplier(site, gate)))
            yield gates
        finally:
            for hook in hooks:
                hook.remove()


def _multiplier(site: Site, gate: torch.Tensor) -> Any:
    unit_of = torch.tensor(site.output.unit_of, device=gate.device)

    def multiply(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0] * gate[unit_of], *inputs[1:])

    return multiply
