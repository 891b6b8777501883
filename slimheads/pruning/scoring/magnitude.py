"""Magnitude: one score per unit, from the weights alone.

M(l, h) = ||W_Q||_F + ||W_K||_F + ||W_V||_F + ||W_O||_F over the slices of head h in layer l, without biases.
For a KV group: the norms of its K and V slices, of all its query slices together and of all its output slices together.
Each query head of a group has a score as well: its own query and output slices, and the K and V slices that it reads.
For a neuron: the norms of its input row, its gate row if there is one, and its output column. A layer has no magnitude.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from slimheads.errors import ModelRefusedError
from slimheads.families.projections import Projection
from slimheads.families.sites import Site, find_sites
from slimheads.pruning.scores import SiteScores

ROLES = ("query", "key", "value", "output", "expand", "gate", "contract")
CACHED = 2**17  # elements that each thread converts to float32 at a time: 512 KiB


def magnitude(model: PreTrainedModel) -> tuple[SiteScores, ...]:
    """The scores of every attention and feed-forward site, in the model's order.

    Reads each weight once; works in any dtype, accumulating in float32 and float64.

    Raises:
        ModelRefusedError: the model's family is not covered, or a weight holds NaN or infinity (the tensor is named).
    """
    modules, sites = dict(model.named_modules()), [site for site in find_sites(model) if site.kind != "layer"]
    alike: dict[tuple[Any, ...], list[Site]] = {}
    for site in sites:  # sites with the same labels are scored together
        key = (site.unit, site.total, site.members, *(id(p.unit_of) for p in site.projections))
        alike.setdefault(key, []).append(site)
    scored = {scores.key: scores for group in alike.values() for scores in _score_alike(modules, group)}
    return tuple(scored[site.key] for site in sites)


def _score_alike(modules: Mapping[str, torch.nn.Module], sites: Sequence[Site]) -> Iterator[SiteScores]:
    """The scores of sites whose projections have the same labels."""
    runs = replace(sites[0], projections=tuple(_in_runs(p) for p in sites[0].projections))
    sums = [
        np.stack(
            [_squared_norms(modules[site.projections[index].module], site.projections[index], run) for site in sites]
        )
        for index, run in enumerate(len(p.unit_of) for p in runs.projections)
    ]
    by_head = _magnitudes(runs.by_head(), sums) if runs.unit == "kv_group" else [()] * len(sites)
    for site, scores, heads in zip(sites, _magnitudes(runs, sums), by_head, strict=True):
        groups = tuple(heads[start : start + site.members] for start in range(0, len(heads), site.members))
        yield SiteScores(site.name, site.unit, scores, groups, site.kind)


def _in_runs(projection: Projection) -> Projection:
    """The projection with one label per run: the largest block size that divides every head's features evenly.

    With heads of 64 features a run is 64, or a multiple if all features of the projection belong to one head.
    """
    unit, member, role = projection.unit_of, projection.member_of, projection.role_of
    changes = (unit[1:] != unit[:-1]) | (member[1:] != member[:-1]) | (role[1:] != role[:-1])
    run = int(np.gcd.reduce(np.append(np.flatnonzero(changes) + 1, len(unit))))
    return Projection(projection.module, unit[::run], member[::run], role[::run], projection.span[::run])


def _magnitudes(runs: Site, sums: Sequence[np.ndarray]) -> list[tuple[float, ...]]:
    """One score per unit for each site.

    Args:
        runs: a site with one label per run, the same for all sites.
        sums: the squared norms of each projection's runs, [sites, runs].
    """
    squares = np.zeros((len(ROLES), runs.total, len(sums[0])))
    for projection, per_run in zip(runs.projections, sums, strict=True):
        for role in set(projection.role_of.tolist()).intersection(ROLES):
            row, in_role = squares[ROLES.index(role)], projection.role_of == role
            for offset in range(int(projection.span[in_role].max())):
                chosen = in_role & (projection.span > offset)
                np.add.at(row, projection.unit_of[chosen] + offset, per_run.T[chosen])
    return [tuple(scores) for scores in np.sqrt(squares).sum(axis=0).T.tolist()]


def _squared_norms(module: torch.nn.Module, projection: Projection, runs: int) -> np.ndarray:
    """Squared Euclidean norm of each run of features of the divided axis, float64 [runs].

    torch computes norms fastest along the last axis and into the tensor's own dtype; across rows, or into a wider
    dtype, it is 10 to 20 times slower. So divided columns are reshaped to runs within each row, those of single
    neurons are added up row by row, and half precision is converted in blocks that fit the processor's cache.
    """
    weight = cast(torch.Tensor, module.weight).detach()
    if isinstance(module, Conv1D) == projection.divides_inputs:  # [features, others]
        squares = _last_axis_norms(weight).double().square().reshape(runs, -1).sum(1)
    elif runs == weight.shape[1]:  # [others, neurons]
        squares = _column_squares(weight)
    else:  # [others, features]
        squares = _last_axis_norms(weight.reshape(len(weight), runs, -1)).double().square().sum(0)
    per_run: np.ndarray = squares.cpu().numpy()
    if not np.isfinite(per_run).all():
        raise ModelRefusedError(
            "the tensor holds NaN or infinity, or is too large for its norm",
            where=f"{projection.module}.weight",
            hint="the checkpoint is damaged: fetch or train it again",
        )
    return per_run


def _column_squares(weight: torch.Tensor) -> torch.Tensor:
    """The squared norm of each column, float64 [columns]: a block of rows is added up in float32, blocks in float64."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rows = max(1, CACHED * torch.get_num_threads() // weight.shape[1])
    widened = torch.empty((rows, weight.shape[1]), dtype=wide, device=weight.device)
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for start in range(0, len(weight), rows):
        block = weight[start : start + rows]
        total += widened[: len(block)].copy_(block).square_().sum(0)
    return total


def _last_axis_norms(weight: torch.Tensor) -> torch.Tensor:
    """Euclidean norms along the last axis, in float32; in float64 for float64 weights."""
    if weight.dtype in (torch.float32, torch.float64):
        return cast(torch.Tensor, torch.linalg.vector_norm(weight, dim=-1))
    norms = torch.empty(weight.shape[:-1], dtype=torch.float32, device=weight.device)
    rows = max(1, CACHED * torch.get_num_threads() // weight[0].numel())
    widened = torch.empty((rows, *weight.shape[1:]), dtype=torch.float32, device=weight.device)
    for start in range(0, len(weight), rows):
        block = weight[start : start + rows]
        torch.linalg.vector_norm(widened[: len(block)].copy_(block), dim=-1, out=norms[start : start + rows])
    return norms
