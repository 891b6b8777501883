"""Encoder-decoders: their certificate fails where it should, and what is fed and counted for their decoders."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from shipped import Shipped, edit_tensor
from tiny import spread, task_of
from transformers import PreTrainedModel

from slimheads.errors import ModelRefusedError, UsageError
from slimheads.exporting.export import export
from slimheads.families.sites import find_sites, of_kind
from slimheads.models.checkpoint import find
from slimheads.models.flops import encoder_flops, flops, step_flops
from slimheads.pruning.plan import Plan
from slimheads.pruning.surgery import prune
from slimheads.runtime.graph_inputs import inputs_for
from slimheads.runtime.onnx_signature import read_interface
from slimheads.runtime.sessions import open_session
from slimheads.verification.certificate import Certificate
from slimheads.verification.structure import merged_faults

Tiny = Callable[..., PreTrainedModel]
Ragged = Callable[..., Plan]
ENCODER, FIRST, NEXT, MERGED = (
    f"onnx/{part}.onnx"
    for part in ("encoder_model", "decoder_model", "decoder_with_past_model", "decoder_model_merged")
)


@pytest.fixture
def bart(shipped: Callable[..., Shipped]) -> Shipped:
    return shipped("bart", kinds=("attention", "feed_forward"))


def failed(found: Certificate) -> set[tuple[int, str]]:
    return {(link.link, link.subject) for link in found.links if not link.passed}


# -------------------------------------------------------------------------------------------------------- certificate


@pytest.mark.parametrize("model_type", spread("bart", "t5", "whisper"))
def test_all_links_hold_for_files_with_fixed_cache_axes(model_type: str, shipped: Callable[..., Shipped]) -> None:
    made = shipped(model_type, precisions=("fp32",), kv_axes="static")
    interface = read_interface(made.folder / MERGED)
    axes = {i.name: i.dims[1] for i in interface.inputs if i.name.startswith("past_key_values.")}
    for side, shapes in (("decoder", interface.kv_shapes), ("encoder", interface.cross_kv_shapes)):
        assert [axes[f"past_key_values.{layer}.{side}.key"] for layer in range(len(shapes))] == [s[0] for s in shapes]
    found = made.certificate()
    assert found.passed, found.error()


def test_a_file_says_the_true_shapes_of_both_caches_of_every_layer(bart: Shipped) -> None:
    sites = {s.name.removeprefix("model."): s for s in of_kind(find_sites(bart.slim), "attention")}
    for name in (MERGED, NEXT, MERGED.replace(".onnx", "_fp16.onnx"), NEXT.replace(".onnx", "_int8.onnx")):
        interface = read_interface(bart.folder / name)
        for kind, shapes in (("self_attn", interface.kv_shapes), ("encoder_attn", interface.cross_kv_shapes)):
            own = [sites[f"decoder.layers.{layer}.{kind}"] for layer in range(3)]
            assert shapes == tuple((site.total, site.head_dim, site.head_dim) for site in own)
    assert {len(set(read_interface(bart.folder / MERGED).kv_shapes))} == {3}


def changed(weight: np.ndarray) -> np.ndarray:
    weight[1, 1] += 1.0
    return weight


def test_a_changed_weight_of_one_file_fails_the_links_of_that_file(bart: Shipped, tmp_path: Path) -> None:
    made = bart.copied(tmp_path)
    edit_tensor(made.folder / NEXT, "", changed, of_module="/model/decoder/layers.1/encoder_attn/q_proj/")
    found = failed(made.certificate())
    assert {(2, NEXT), (4, MERGED)} <= found <= {(2, NEXT), (4, MERGED), (5, NEXT)}


def test_a_changed_weight_of_the_encoder_is_found_in_the_encoder_first(bart: Shipped, tmp_path: Path) -> None:
    made = bart.copied(tmp_path)
    edit_tensor(made.folder / ENCODER, "", changed, of_module="/layers.1/self_attn/v_proj/")
    error = made.certificate().error()
    assert error is not None and str(error).startswith(f"link 2 ({ENCODER})")


def test_caches_handed_on_for_one_another_fail_the_step_and_the_tokens(bart: Shipped, tmp_path: Path) -> None:
    made = bart.copied(tmp_path)
    proto = onnx.load(str(made.folder / FIRST))
    swap = {"present.1.decoder.key": "present.1.decoder.value", "present.1.decoder.value": "present.1.decoder.key"}
    for node in proto.graph.node:
        for names in (node.input, node.output):
            names[:] = [swap.get(name, name) for name in names]
    onnx.save(proto, str(made.folder / FIRST))
    found = failed(made.certificate())
    assert (2, NEXT) in found and (2, MERGED) not in found


@pytest.mark.parametrize("kind,files", [("encoder.layers.1.self_attn", {ENCODER}), ("encoder_attn", {FIRST, NEXT})])
def test_a_head_that_was_masked_instead_of_deleted_fails_link_4_of_its_files(
    bart: Shipped, kind: str, files: set[str], tmp_path: Path
) -> None:
    """Numbers cannot tell: the head is there and adds nothing."""
    made = bart.copied(tmp_path)
    index = next(i for i, site in enumerate(made.plan.sites) if kind in site.site and site.removed)
    planned = made.plan.sites[index]
    wide = tuple(sorted((*planned.kept, planned.removed[0])))
    sites = [*made.plan.sites[:index], replace(planned, kept=wide), *made.plan.sites[index + 1 :]]
    masked = prune(copy.deepcopy(made.dense), Plan(tuple(sites)))
    block: Any = masked.get_submodule(planned.site)
    start = wide.index(planned.removed[0]) * block.head_dim
    with torch.no_grad():
        block.out_proj.weight[:, start : start + block.head_dim] = 0
    export(masked, made.folder / "onnx", task=made.task)
    assert failed(made.certificate()) == {(4, file) for file in files}


@pytest.mark.parametrize("site", ["encoder.block.2.layer.0.SelfAttention", "decoder.block.0.layer.0.SelfAttention"])
def test_biases_of_other_heads_fail_link_1_on_t5(site: str, shipped: Callable[..., Shipped], tmp_path: Path) -> None:
    made = shipped("t5", kinds=("attention",)).copied(tmp_path)
    attention: Any = made.slim.get_submodule(site)
    attention.kept_heads = [(head + 1) % 5 for head in attention.kept_heads]
    export(made.slim, made.folder / "onnx", task=made.task)
    assert failed(made.certificate()) == {(1, "model.safetensors")}


def test_a_merged_decoder_of_another_model_is_named(bart: Shipped, tmp_path: Path) -> None:
    first, following, merged = (bart.folder / name for name in (FIRST, NEXT, MERGED))
    assert list(merged_faults(first, following, merged)) == []
    dense = bart.dense_onnx.parent / merged.name
    said = " ".join(merged_faults(first, following, dense))
    assert "decoder_model_merged.onnx lacks" in said and "has from neither decoder" in said


# ---------------------------------------------------------------------------------------------------- feeds and counts


def test_a_decoder_is_fed_as_many_positions_as_its_encoder_saw(bart: Shipped) -> None:
    feed = inputs_for(bart.folder / MERGED, 2, 1, past=5, encoder_length=9)
    assert feed["encoder_attention_mask"].shape == (2, 9) and feed["encoder_hidden_states"].shape == (2, 9, 24)
    interface = read_interface(bart.folder / MERGED)
    for layer in range(3):
        (own, dim, _), (cross, cross_dim, _) = interface.kv_shapes[layer], interface.cross_kv_shapes[layer]
        assert feed[f"past_key_values.{layer}.decoder.key"].shape == (2, own, 5, dim)
        assert feed[f"past_key_values.{layer}.encoder.value"].shape == (2, cross, 9, cross_dim)
    assert feed["use_cache_branch"].tolist() == [True]
    many = inputs_for(bart.folder / MERGED, 8, 64, past=1)["input_ids"]
    assert 100 < many.max() < 120  # the table is found inside the branches
    logits = open_session(bart.folder / MERGED).run(["logits"], feed)[0]
    assert logits.shape == (2, 1, 120)


def test_flops_are_those_of_the_formula_dense_and_slim(tiny: Tiny, ragged: Ragged) -> None:
    hidden, words, batch, length, past = 24, 120, 2, 9, 5
    model = tiny("bart")
    plan = ragged(model, kinds=("attention",))
    for kept in ([site.total for site in plan.sites], [len(site.kept) for site in plan.sites]):
        widths = [heads * dim for heads, dim in zip(kept, [6] * 2 + [4] * 6, strict=True)]
        encoder, own, cross = widths[:2], widths[2:5], widths[5:]

        def products(*pairs: tuple[int, int]) -> int:
            """Of so many rows with so many weights each."""
            return sum(2 * rows * weights for rows, weights in pairs)

        rows, states = batch * length, batch * length
        expected = sum(
            products((rows, 4 * hidden * w), (rows, 2 * length * w), (rows, 2 * hidden * 48)) for w in encoder
        )
        assert encoder_flops(model, batch, length) == expected
        step = products((batch, hidden * words))
        for w, c in zip(own, cross, strict=True):
            step += products((batch, 4 * hidden * w), (batch, 2 * (past + 1) * w), (batch, 2 * hidden * 40))
            step += products((batch, 2 * hidden * c), (batch, 2 * length * c))  # keys and values are cached
        assert step_flops(model, batch, 1, past, length) == step
        whole = expected + products((rows, hidden * words))
        for w, c in zip(own, cross, strict=True):
            whole += products((rows, 4 * hidden * w), (rows, 2 * length * w), (rows, 2 * hidden * 40))
            whole += products((rows, 2 * hidden * c), (rows, 2 * length * c), (states, 2 * hidden * c))
        assert flops(model, batch, length) == whole
        if kept == [site.total for site in plan.sites]:
            prune(model, plan)


# ------------------------------------------------------------------------------------------------------------- loading


def test_a_task_follows_from_what_an_encoder_decoder_is(seq2seq_type: str, tiny: Tiny, tmp_path: Path) -> None:
    tiny(seq2seq_type).save_pretrained(tmp_path)
    assert find(str(tmp_path)).task == task_of(seq2seq_type)
    for other in ("feature-extraction", "text-generation"):
        with pytest.raises(UsageError, match=other):
            find(str(tmp_path), other)


def test_an_encoder_decoder_that_does_not_write_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("bart")
    model.config.architectures = ["BartForSequenceClassification"]
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ModelRefusedError, match="BartForSequenceClassification"):
        find(str(tmp_path))
    model.config.architectures = ["BartModel"]
    model.config.save_pretrained(tmp_path)
    assert find(str(tmp_path)).architecture == "BartForConditionalGeneration"
