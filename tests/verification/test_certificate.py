"""The certificate holds for every covered model type, and each link fails for the damage that it is there to find."""

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
from onnxruntime.transformers.fusion_options import FusionOptions
from onnxruntime.transformers.optimizer import optimize_model
from safetensors.torch import load_file, save_file
from shipped import ALL_PRECISIONS, Shipped, edit_tensor, ship
from tiny import DECODERS, SEQ2SEQ, task_of, variant_of
from transformers import PreTrainedModel

from slimheads.errors import CertificateError
from slimheads.exporting.export import export
from slimheads.families.evidence import LinkProof
from slimheads.families.sites import find_sites
from slimheads.models.loading import load
from slimheads.pruning.plan import Plan
from slimheads.pruning.surgery import prune
from slimheads.verification import subjects as chain
from slimheads.verification.certificate import Certificate
from slimheads.verification.prove import verify

HEADS = (
    *(("bert", task) for task in ("fill-mask", "text-classification", "token-classification", "question-answering")),
    ("vit", "image-classification"),
    ("yolos", "object-detection"),
    ("audio-spectrogram-transformer", "audio-classification"),
    ("wav2vec2", "audio-classification"),
    ("wav2vec2", "automatic-speech-recognition"),
)


@pytest.fixture
def bert(shipped: Callable[..., Shipped]) -> Shipped:
    return shipped("bert", kinds=("attention", "feed_forward"))


@pytest.fixture
def gpt2(shipped: Callable[..., Shipped]) -> Shipped:
    return shipped("gpt2", kinds=("attention", "feed_forward"))


def failed(found: Certificate) -> list[int]:
    """Numbers of the links that did not hold."""
    return [link.link for link in found.links if not link.passed]


def report(found: Certificate) -> str:
    """The one line that a user reads."""
    error = found.error()
    assert isinstance(error, CertificateError) and error.exit_code == 4
    return str(error)


def with_plan(plan: Plan, index: int, kept: tuple[int, ...]) -> Plan:
    """The plan with other units kept in one site."""
    sites = list(plan.sites)
    sites[index] = replace(sites[index], kept=kept)
    return Plan(tuple(sites))


def site_of(plan: Plan, count: int) -> int:
    """The index of the attention site that keeps so many units."""
    return next(i for i, site in enumerate(plan.of_kind("attention").sites) if len(site.kept) == count)


# ------------------------------------------------------------------------------------------------------ it holds


def links_of(found: Certificate) -> list[dict[str, Any]]:
    return [{key: getattr(link, key) for key in LinkProof.model_fields} for link in found.links]


def units_of(made: Shipped) -> list[str]:
    return sorted({site.unit for site in made.plan.sites if site.removed})


def test_all_links_hold_with_another_count_in_every_site(
    exported_type: str, shipped: Callable[..., Shipped], prove: Callable[..., None]
) -> None:
    told: list[str] = []
    made = shipped(exported_type)
    found = verify(
        made.dense, made.slim, made.plan, made.folder, made.dense_onnx.parent,
        task=made.task, precisions=ALL_PRECISIONS, on_progress=told.append,
    )  # fmt: skip
    assert found.passed and found.error() is None, report(found)
    files, clients = (4, 2) if exported_type in SEQ2SEQ else (1, int(exported_type in DECODERS))
    sums = 3 if exported_type in SEQ2SEQ else 1  # of int8; the merged decoder has those of its parts
    numbers = [1, *[2] * files, *[3] * 2 * files, *[4] * (files + sums), *[5] * clients]
    assert [link.link for link in found.links] == numbers
    assert len({(link.link, link.subject) for link in found.links}) == len(numbers)
    assert all(link.cases for link in found.links)
    assert [s.link for s in found.skipped] == ([] if clients else [5])
    assert len(told) == 5 + (clients > 0)
    prove("certificate", task=made.task, units=units_of(made), links=links_of(found))


def test_all_links_hold_in_variants(
    exported_variant: str, shipped: Callable[..., Shipped], prove: Callable[..., None]
) -> None:
    made = shipped(exported_variant, precisions=("fp32",))
    found = made.certificate()
    assert found.passed, report(found)
    said = variant_of(exported_variant)
    prove("certificate", variant=said, task=made.task, units=units_of(made), links=links_of(found))


def test_all_links_hold_for_a_file_with_fixed_cache_axes(
    exported_decoder: str, shipped: Callable[..., Shipped]
) -> None:
    found = shipped(exported_decoder, precisions=("fp32",), kv_axes="static").certificate()
    assert found.passed, report(found)
    assert [link.link for link in found.links] == [1, 2, 4, 5]
    assert [s.link for s in found.skipped] == [3]


@pytest.mark.parametrize("model_type,task", HEADS)
def test_all_links_hold_for_the_heads_of_encoders(model_type: str, task: str, shipped: Callable[..., Shipped]) -> None:
    found = shipped(model_type, task).certificate("fp16", "int8")
    assert found.passed, report(found)


def test_a_model_with_a_short_position_table_is_compared_as_far_as_it_reaches(
    tiny: Callable[..., PreTrainedModel], ragged: Callable[..., Plan], tmp_path: Path
) -> None:
    dense = tiny("gpt2", n_positions=34)
    found = ship(dense, ragged(dense), tmp_path, task="text-generation").certificate()
    assert found.passed, report(found)
    assert all(link.cases for link in found.links)


# --------------------------------------------------------------------------------------------------------- link 1


def test_one_changed_weight_of_the_checkpoint_fails_link_1(bert: Shipped, tmp_path: Path) -> None:
    made = bert.copied(tmp_path)
    weights = made.folder / "model.safetensors"
    tensors = load_file(weights)
    tensors["encoder.layer.1.attention.self.value.weight"][0, 0] += 1.0
    save_file(tensors, weights, metadata={"format": "pt"})
    made = replace(made, slim=load(made.folder, made.task))
    export(made.slim, made.folder / "onnx", task=made.task)
    found = made.certificate()
    assert failed(found) == [1]
    said = report(found)
    assert said.startswith("link 1 (model.safetensors): gated dense torch == slim torch failed at batch ")
    assert f"last_hidden_state: differs beyond the tolerance, largest difference {found.links[0].max_abs:.3g}" in said
    assert found.links[0].max_abs and found.links[0].max_abs > 1e-3


def test_another_head_kept_than_the_plan_says_fails_link_1(bert: Shipped, tmp_path: Path) -> None:
    made = bert.copied(tmp_path)
    index = site_of(bert.plan, 1)
    (kept,) = bert.plan.sites[index].kept
    slim = prune(copy.deepcopy(made.dense), with_plan(bert.plan, index, ((kept + 1) % 4,)))
    export(slim, made.folder / "onnx", task=made.task)
    assert failed(replace(made, slim=slim).certificate()) == [1]


def test_a_stale_head_count_fails_link_1(
    tiny: Callable[..., PreTrainedModel], ragged: Callable[..., Plan], tmp_path: Path
) -> None:
    """DistilBERT divides what is left by the stale count: no error, other heads."""
    dense = tiny("distilbert")
    made = ship(dense, ragged(dense, kinds=("attention",)), tmp_path, task="feature-extraction")
    block = made.slim.get_submodule(made.plan.sites[site_of(made.plan, 2)].site)
    assert block.n_heads == 2
    block.n_heads = 4
    export(made.slim, made.folder / "onnx", task=made.task)
    assert failed(made.certificate()) == [1]


def test_a_model_that_cannot_run_fails_its_links_and_raises_nothing(gpt2: Shipped, tmp_path: Path) -> None:
    """GPT-2 splits its fused projection by a stale width."""
    made = gpt2.copied(tmp_path)
    made.slim.get_submodule(made.plan.sites[0].site).split_size = 32
    found = made.certificate()
    assert failed(found) == [1, 2, 5]
    assert "does not run" in report(found)


# --------------------------------------------------------------------------------------------------------- link 2


@pytest.mark.parametrize(("bad", "reason"), [(1.0, "differs beyond"), (np.nan, "NaN or infinite")])
def test_a_changed_weight_of_the_file_fails_link_2(bert: Shipped, bad: float, reason: str, tmp_path: Path) -> None:
    made = bert.copied(tmp_path)

    def change(weight: np.ndarray) -> np.ndarray:
        weight[3, 3] += bad
        return weight

    edit_tensor(made.onnx(), "", change, of_module="/encoder/layer.2/attention/self/value/")
    found = made.certificate()
    assert failed(found) == [2]
    assert report(found).startswith("link 2 (onnx/model.onnx): ") and reason in report(found)


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_a_damaged_file_fails_every_link_that_reads_it(gpt2: Shipped, damage: str, tmp_path: Path) -> None:
    made = gpt2.copied(tmp_path)
    if damage == "missing":
        made.onnx().unlink()
    else:
        content = made.onnx().read_bytes()
        made.onnx().write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    found = made.certificate()
    assert failed(found) == [2, 4, 5]
    assert "model.onnx" in report(found)


# --------------------------------------------------------------------------------------------------------- link 3


def rolled_heads(made: Shipped) -> PreTrainedModel:
    """The slim model with the queries of one site's three heads moved on by one head."""
    wrong = copy.deepcopy(made.slim)
    query = wrong.get_submodule(made.plan.sites[site_of(made.plan, 3)].site).self.query
    with torch.no_grad():
        query.weight.copy_(query.weight.roll(8, dims=0))
        query.bias.copy_(query.bias.roll(8))
    return wrong


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_heads_in_another_order_in_one_site_fail_link_3(bert: Shipped, precision: str, tmp_path: Path) -> None:
    """Tolerances are wide enough for rounding, and still tell one site's heads apart."""
    made = bert.copied(tmp_path)
    export(rolled_heads(made), tmp_path / "wrong", task=made.task, precisions=(precision,))  # type: ignore[arg-type]
    (tmp_path / "wrong" / f"model_{precision}.onnx").rename(made.onnx(f"model_{precision}.onnx"))
    found = made.certificate("fp16", "int8")
    assert failed(found) == [3]
    assert report(found).startswith(f"link 3 (onnx/model_{precision}.onnx): ")


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_changed_weight_of_a_further_graph_fails_link_3(bert: Shipped, precision: str, tmp_path: Path) -> None:
    made = bert.copied(tmp_path)
    module = "/encoder/layer.0/intermediate/dense/"
    edit_tensor(made.onnx(f"model_{precision}.onnx"), "", lambda weight: weight[::-1].copy(), of_module=module)
    found = made.certificate("fp16", "int8")
    assert failed(found) == [3]
    assert f"model_{precision}.onnx" in report(found)


def fused(made: Shipped, *, raw_mask: bool = True) -> onnx.ModelProto:
    """The slim graph fused by ONNX Runtime's own tool, which is left to detect the head counts."""
    options = FusionOptions("bert")
    options.enable_embed_layer_norm = False  # it takes the smaller table for the positions, here that of the tokens
    if raw_mask:
        options.use_raw_attention_mask()
    proto: onnx.ModelProto = optimize_model(
        str(made.onnx()), model_type="bert", num_heads=0, hidden_size=0, optimization_options=options, opt_level=0
    ).model
    assert sum(node.op_type == "Attention" for node in proto.graph.node) == len(made.plan.of_kind("attention").sites)
    return proto


def test_a_fused_graph_with_its_own_head_counts_holds(bert: Shipped, tmp_path: Path) -> None:
    made = bert.copied(tmp_path)
    onnx.save(fused(made), str(made.onnx("model_fp16.onnx")))
    found = made.certificate("fp16")
    assert found.passed, report(found)


def test_a_fused_graph_that_counts_the_mask_fails_link_3_with_left_padding(bert: Shipped, tmp_path: Path) -> None:
    """The tool's own default: it sums the mask and takes that many positions from the left."""
    made = bert.copied(tmp_path)
    onnx.save(fused(made, raw_mask=False), str(made.onnx("model_fp16.onnx")))
    found = made.certificate("fp16")
    assert failed(found) == [3]
    assert "left padding" in report(found)


def test_a_fused_graph_with_one_head_count_stamped_on_all_layers_fails_links_3_and_4(
    bert: Shipped, tmp_path: Path
) -> None:
    made = bert.copied(tmp_path)
    proto = fused(made)
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name == "num_heads":
                attribute.i = 4  # divides every layer's width, so ONNX Runtime runs it
    onnx.save(proto, str(made.onnx("model_fp16.onnx")))
    found = made.certificate("fp16")
    assert failed(found) == [3, 4]
    assert "says num_heads 4" in str(found.links[-1].reason)


# --------------------------------------------------------------------------------------------------------- link 4


def test_the_graph_of_another_plan_with_the_same_counts_elsewhere_fails_links_2_and_4(
    bert: Shipped, tmp_path: Path
) -> None:
    made = bert.copied(tmp_path)
    heads, neurons = (made.plan.of_kind(kind).sites for kind in ("attention", "feed_forward"))
    kept = [site.kept for site in heads]
    moved = (replace(site, kept=units) for site, units in zip(heads, (*kept[1:], kept[0]), strict=True))
    other = Plan((*moved, *neurons))
    export(prune(copy.deepcopy(made.dense), other), made.folder / "onnx", task=made.task)
    assert failed(made.certificate()) == [2, 4]


@pytest.mark.parametrize(
    "kind,width,module",
    [("attention", 8, "self.query"), ("feed_forward", 1, "intermediate.dense")],
    ids=["head", "neuron"],
)
def test_a_unit_that_was_masked_instead_of_deleted_fails_link_4_alone(
    bert: Shipped, kind: str, width: int, module: str, tmp_path: Path
) -> None:
    """Numbers cannot tell: the unit is there and adds nothing."""
    made = bert.copied(tmp_path)
    index, planned = next(
        (i, site) for i, site in enumerate(made.plan.sites) if site.kind == kind and 1 < len(site.kept) < site.total
    )
    extra = planned.removed[0]
    wide = tuple(sorted((*planned.kept, extra)))
    masked = prune(copy.deepcopy(made.dense), with_plan(made.plan, index, wide))
    place = wide.index(extra) * width
    with torch.no_grad():
        masked.get_submodule(planned.site).output.dense.weight[:, place : place + width] = 0
    export(masked, made.folder / "onnx", task=made.task)
    found = made.certificate()
    assert failed(found) == [4]
    one, more = (width * len(kept) for kept in (planned.kept, wide))
    said = f"{planned.site}.{module}: tensors {more}, 32x{more} where the plan says {one}, 32x{one}"
    assert said in report(found)


def test_a_layer_that_was_passed_by_instead_of_dropped_fails_link_4_alone(
    shipped: Callable[..., Shipped], tmp_path: Path
) -> None:
    """GPT-2 adds what its blocks write to what came in: blocks that write zeros are there and do nothing."""
    made = shipped("gpt2", kinds=("layer",)).copied(tmp_path)
    passed = copy.deepcopy(made.dense)
    gone = next(site.site for site in made.plan.sites if not site.kept)
    layer = passed.get_submodule(gone)
    with torch.no_grad():
        for module in (layer.attn.c_proj, layer.mlp.c_proj):
            module.weight.zero_()
            module.bias.zero_()
    export(passed, made.folder / "onnx", task=made.task)
    found = made.certificate()
    assert 4 in failed(found) and 1 not in failed(found)


# --------------------------------------------------------------------------------------------------------- link 5


def cross_wired(made: Shipped) -> Shipped:
    """The file hands keys on as values and values as keys."""
    proto = onnx.load(str(made.onnx()))
    swap = {"present.1.key": "present.1.value", "present.1.value": "present.1.key"}
    for node in proto.graph.node:
        for names in (node.input, node.output):
            names[:] = [swap.get(name, name) for name in names]
    onnx.save(proto, str(made.onnx()))
    return made


def test_a_wrongly_wired_cache_fails_link_2_where_there_is_a_past_and_link_5(gpt2: Shipped, tmp_path: Path) -> None:
    found = cross_wired(gpt2.copied(tmp_path)).certificate()
    assert failed(found) == [2, 5]
    assert "past 7" in report(found)


def test_link_5_finds_other_tokens_by_itself(gpt2: Shipped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cross_wired(gpt2.copied(tmp_path))
    every = chain.cases
    monkeypatch.setattr(chain, "cases", lambda *args: tuple(c for c in every(*args) if not c.past))
    found = made.certificate()
    assert failed(found) == [5]
    said = report(found)
    assert said.startswith("link 5 (onnx/model.onnx): ") and "differs from new token " in said


def test_plans_and_models_of_the_tests_differ_in_every_site(bert: Shipped, gpt2: Shipped) -> None:
    """What the tests above rest on: three sites of each kind, three counts, as reloaded."""
    for made in (bert, gpt2):
        assert sorted(len(site.kept) for site in made.plan.of_kind("attention").sites) == [1, 2, 3]
        widths = {len(site.kept) for site in made.plan.of_kind("feed_forward").sites}
        assert len(widths) == 3 and min(widths) == 1
        found = [site.total for site in find_sites(made.slim) if site.kind != "layer"]
        assert found == [len(site.kept) for site in made.plan.sites]


def test_equal_tensors_that_the_exporter_stores_once_are_no_fault(
    exported_layout: str, tiny: Callable[..., PreTrainedModel], ragged: Callable[..., Plan], tmp_path: Path
) -> None:
    """A model fresh from its initialisation has biases that are all zero; the dense and slim graphs share them."""
    dense = tiny(exported_layout)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    certificate = ship(dense, ragged(dense), tmp_path, task=task_of(exported_layout)).certificate()
    assert certificate.passed, certificate.error()
