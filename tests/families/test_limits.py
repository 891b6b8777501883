"""How long inputs may be: what the rule says against what the models really take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CONFIGS, VARIANTS, config_of, type_of
from transformers import PreTrainedModel, RobertaConfig

from slimheads.data.inputs import make_inputs, to_torch
from slimheads.errors import UsageError
from slimheads.families.config_facts import has_length, takes_text
from slimheads.families.limits import UNLIMITED, fitting, position_limit, require_fit

FED_TOKENS = [name for name in (*CONFIGS, *VARIANTS) if takes_text(config_of(name)) or name == "whisper"]
# Rotary positions go on for ever, and so do ALiBi's slopes; M2M100 makes a longer table of sines when it needs one.
NO_TABLE = {
    *("arcee", "cohere", "falcon", "gemma", "gemma2", "gemma3_text", "glm", "gpt_neox", "granite", "helium", "llama"),
    *("m2m_100", "mistral", "modernbert", "nemotron", "olmo", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3"),
    "stablelm",
}


def runs(model: PreTrainedModel, length: int) -> bool:
    """Whether a text of this length goes through the model, for encoder-decoders through both halves."""
    feed = to_torch(make_inputs(model.config, 1, length, np.random.default_rng(0)), model)
    try:
        with torch.no_grad():
            model(**feed)
    except (IndexError, RuntimeError, ValueError):
        return False
    return True


@pytest.mark.parametrize("name", FED_TOKENS)
def test_a_model_runs_up_to_its_limit_and_where_it_has_a_table_no_further(
    name: str, tiny: Callable[..., PreTrainedModel]
) -> None:
    limit, model = position_limit(config_of(name)), tiny(name)
    if limit == UNLIMITED:
        assert type_of(name) in {"bloom", "mt5", "t5"} and runs(model, 400)
        return
    assert runs(model, limit)
    assert runs(model, limit + 1) == (type_of(name) in NO_TABLE)


def test_what_has_no_tokens_has_no_limit() -> None:
    others = [name for name in CONFIGS if name not in FED_TOKENS]
    assert others and all(position_limit(config_of(name)) == UNLIMITED for name in others)


@pytest.mark.parametrize(("name", "longest"), [("bert", 160), ("roberta", 158), ("clip", 160), ("mpt", 160)])
def test_shapes_are_refused_past_the_limit_with_shapes_that_fit(name: str, longest: int) -> None:
    config = config_of(name)
    require_fit(config, [(1, 8), (2, longest)])
    with pytest.raises(UsageError, match=rf"\[2, {longest + 1}\] is longer than the {longest} positions") as caught:
        require_fit(config, [(1, 8), (2, longest + 1)])
    assert f"[[1, 8], [2, {longest}]]" in caught.value.hint


def test_a_full_sized_roberta_takes_512_tokens() -> None:
    config = RobertaConfig(max_position_embeddings=514, pad_token_id=1)
    assert position_limit(config) == 512


@pytest.mark.parametrize(
    ("shapes", "made"),
    [
        ([(1, 16), (1, 128)], ((1, 16), (1, 64))),
        ([(1, 100), (1, 128), (2, 65)], ((1, 64), (2, 64))),
        ([(1, 1, 512), (1, 1, 60)], ((1, 1, 63), (1, 1, 60))),
        ([(1, 70, 5)], ((1, 64),)),
        ([(1, 8, 0)], ((1, 8, 0),)),
    ],
)
def test_shapes_that_are_too_long_are_cut(shapes: Any, made: Any) -> None:
    config = config_of("gpt2", n_positions=64)
    assert fitting(config, shapes) == made
    require_fit(config, made)


def test_shapes_of_images_are_left_alone() -> None:
    config = config_of("vit")
    assert not has_length(config)
    require_fit(config, [(1, 10**9)])
    assert fitting(config, [(1, 10**9)]) == ((1, 10**9),)
