"""Which library reloads a slim folder: what is said is what happens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from blocks import WITHOUT_WIDTH
from safetensors.torch import load_file, save_file
from tiny import task_of
from transformers import AutoModel, PreTrainedModel

from slimheads.data.inputs import make_inputs, to_torch
from slimheads.families.family import families
from slimheads.families.sites import find_sites
from slimheads.models.loading import load, save
from slimheads.models.reload import reload_tier, same_attributes, same_weights
from slimheads.models.tasks import auto_classes
from slimheads.pruning.plan import Plan
from slimheads.pruning.surgery import prune

Tiny = Callable[..., PreTrainedModel]
Plans = Callable[..., Plan]
RELOAD = {model_type: family.reload for family in families().values() for model_type in family.model_types}
CASES = {
    "any heads": ("attention", "ragged"),
    "equal heads": ("attention", "equal"),
    "any widths": ("feed_forward", "ragged"),
    "equal widths": ("feed_forward", "equal"),
    "layers": ("layer", "ragged"),
}


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(**to_torch(make_inputs(model.config, 1, 12, np.random.default_rng(0)), model))[0]


def promised(model_type: str, kind: str, counts: str) -> bool:
    """Whether stock transformers 4 can rebuild it."""
    if kind == "attention":
        return RELOAD[model_type] == "pruned_heads" or (RELOAD[model_type] == "head_counts" and counts == "equal")
    return kind == "layer" or (counts == "equal" and model_type not in WITHOUT_WIDTH)


@pytest.mark.parametrize("case", CASES)
def test_the_tier_is_what_plain_transformers_can_do(
    model_type: str, case: str, tiny: Tiny, ragged: Plans, equal: Plans, prove: Callable[..., None], tmp_path: Path
) -> None:
    dense, (kind, counts) = tiny(model_type), CASES[case]
    heads, neurons = (2, None) if kind == "attention" else (None, 20)
    plan = ragged(dense, kinds=(kind,)) if counts == "ragged" else equal(dense, heads, neurons)
    if not plan.sites:
        pytest.skip("none of its layers can go")
    slim = prune(dense, plan)
    save(slim, tmp_path / "slim")
    tier, note = reload_tier(tmp_path / "slim", slim, task_of(model_type))
    assert tier == ("stock" if promised(model_type, kind, counts) else "slimheads")
    assert note.count(".") and "\n" not in note
    assert torch.equal(logits(load(tmp_path / "slim", task_of(model_type))), logits(slim))
    if tier == "stock":
        auto = getattr(transformers, auto_classes(slim.config)[task_of(model_type)])
        # Copied, because weights that lie in the mapped file are aligned otherwise, and then sums may round otherwise.
        stock = copy.deepcopy(auto.from_pretrained(tmp_path / "slim").eval())
        assert torch.equal(logits(stock), logits(slim))
        assert transformers.__version__ in note
    else:
        assert "slimheads.load" in note
    prove("reload", kind=kind, counts=counts, tier=tier)


def stock_that(change: Callable[[PreTrainedModel], object]) -> Callable[..., PreTrainedModel]:
    """A stock loader whose model is changed before anyone sees it."""
    original = AutoModel.from_pretrained

    def from_pretrained(*args: Any, **kwargs: Any) -> PreTrainedModel:
        model = original(*args, **kwargs)
        change(model)
        return model

    return from_pretrained


def stale_count(model: PreTrainedModel) -> None:
    model.transformer.layer[1].attention.n_heads = 4


def missing_count(model: PreTrainedModel) -> None:
    del model.transformer.layer[1].attention.n_heads


def other_weight(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.transformer.layer[2].attention.k_lin.bias[0] += 1e-7


@pytest.mark.parametrize("change", [stale_count, missing_count, other_weight])
def test_a_stock_load_that_gives_another_model_is_not_called_stock(
    change: Callable[[PreTrainedModel], object],
    tiny: Callable[..., PreTrainedModel],
    ragged: Callable[..., Plan],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense = tiny("distilbert")
    slim = prune(dense, ragged(dense, kinds=("attention",)))
    save(slim, tmp_path / "slim")
    assert reload_tier(tmp_path / "slim", slim, "feature-extraction")[0] == "stock"
    monkeypatch.setattr(AutoModel, "from_pretrained", stock_that(change))
    tier, note = reload_tier(tmp_path / "slim", slim, "feature-extraction")
    assert tier == "slimheads" and "other weights, sizes or layers" in note


def test_weights_and_counts_are_compared_exactly(tiny: Callable[..., PreTrainedModel]) -> None:
    one, other = tiny("gpt2"), tiny("gpt2")
    assert same_weights(one, other) and same_attributes(one, other)
    with torch.no_grad():
        other.transformer.ln_f.bias[0] += 1e-6
    assert not same_weights(one, other)
    other = copy.deepcopy(one)
    other.get_submodule(find_sites(other)[0].name).num_heads += 1
    assert same_weights(one, other) and not same_attributes(one, other)


def test_trying_leaves_transformers_as_loud_as_it_was(
    tiny: Callable[..., PreTrainedModel], ragged: Callable[..., Plan], tmp_path: Path
) -> None:
    dense = tiny("llama")
    slim = prune(dense, ragged(dense))
    save(slim, tmp_path / "slim")
    before = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    reload_tier(tmp_path / "slim", slim, "text-generation")
    assert (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()) == before
    assert before[1]


def test_a_pooler_that_no_file_holds_is_said_to_be_made_up(
    tiny: Callable[..., PreTrainedModel], equal: Callable[..., Plan], tmp_path: Path
) -> None:
    tiny("bert", task="feature-extraction").save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("pooler.")}
    save_file(kept, file, {"format": "pt"})
    model = load(tmp_path / "dense")
    save(prune(model, equal(model, 2)), tmp_path / "slim")
    tier, note = reload_tier(tmp_path / "slim", model, "feature-extraction")
    ids = torch.arange(4, 12)[None]
    plain, info = AutoModel.from_pretrained(tmp_path / "slim", output_loading_info=True)
    assert set(info["missing_keys"]) == {"pooler.dense.weight", "pooler.dense.bias"}
    assert torch.equal(plain.eval()(ids).last_hidden_state, model(ids).last_hidden_state)
    assert tier == "stock" and "all but the pooler" in note
    assert AutoModel.from_pretrained(tmp_path / "slim", add_pooling_layer=False).pooler is None
