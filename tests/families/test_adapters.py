"""Adapters: what a slim model's forward does in code of its own stays right when the model is used further."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from slimheads.errors import ModelRefusedError
from slimheads.families.adapters import ADAPTERS
from slimheads.families.family import families, family_of
from slimheads.families.sites import find_sites, of_kind
from slimheads.pruning.gates import gated
from slimheads.pruning.plan import Plan
from slimheads.pruning.surgery import prune
from slimheads.verification.parity import cases, torch_runner

Tiny = Callable[..., PreTrainedModel]
Ragged = Callable[..., Plan]
Batches = Callable[[PreTrainedModel], dict[str, dict[str, torch.Tensor]]]
Answers = Callable[..., dict[str, torch.Tensor]]


def test_family_files_name_the_adapters_that_there_are() -> None:
    assert {row.adapter for family in families().values() for row in family.sites} - {None} == ADAPTERS.keys()


def test_phi3_follows_a_later_choice_of_attention(
    tiny: Tiny, ragged: Ragged, batches: Batches, answers: Answers
) -> None:
    model = tiny("phi3", attn_implementation="sdpa")
    plan, batch = ragged(model), batches(model)["padded right"]
    with gated(model, plan):
        expected = answers(model, batch)["logits"]
    prune(model, plan)
    model.set_attn_implementation("eager")
    blocks = [model.get_submodule(site.name) for site in of_kind(find_sites(model), "attention")]
    assert {block.config._attn_implementation for block in blocks} == {"eager"}
    assert [block.config.num_attention_heads for block in blocks] == [
        2 * len(site.kept) for site in plan.of_kind("attention").sites
    ]
    torch.testing.assert_close(answers(model, batch)["logits"], expected, rtol=0, atol=1e-5)


def test_a_copy_of_a_slim_phi3_has_a_configuration_of_its_own(tiny: Tiny, ragged: Ragged) -> None:
    model = tiny("phi3")
    prune(model, ragged(model))
    other = copy.deepcopy(model)
    other.get_submodule(find_sites(other)[0].name).config.use_cache = False
    assert (other.config.use_cache, model.config.use_cache) == (False, True)


def test_codegen_with_heads_that_cannot_be_cut_in_four_is_refused(tiny: Tiny, ragged: Ragged) -> None:
    model = tiny("codegen", n_embd=48)
    with pytest.raises(ModelRefusedError, match="head_dim 6 is not a multiple of 4"):
        prune(model, ragged(model))


def test_a_bloom_that_cuts_its_output_projection_is_refused(tiny: Tiny) -> None:
    config = tiny("bloom").config
    config.slow_but_exact = True
    with pytest.raises(ModelRefusedError, match="slow_but_exact: True is refused because the output projection"):
        family_of(config)


def test_positions_are_given_only_to_a_model_that_takes_them(tiny: Tiny) -> None:
    """BLOOM warns of them; MPT would take them and do nothing."""
    model = tiny("bloom")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch_runner(model)(cases(model.config, "text-generation")[0])
