"""Export: the files say what they are, and the model that was exported is as it was."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from shipped import ALL_PRECISIONS, Shipped
from tiny import SEQ2SEQ, task_of
from transformers import GenerationConfig, PreTrainedModel

import slimheads
from slimheads.data.inputs import make_inputs
from slimheads.errors import ModelRefusedError
from slimheads.exporting.artifacts import file_name
from slimheads.exporting.export import export
from slimheads.families.config_facts import has_length
from slimheads.families.sites import find_sites, of_kind
from slimheads.models.generation import greedy_options
from slimheads.names import KvAxes
from slimheads.pruning.plan import Plan
from slimheads.pruning.surgery import prune
from slimheads.runtime.graph_inputs import inputs_for
from slimheads.runtime.onnx_signature import KV_SHAPES_KEY, read_interface
from slimheads.runtime.sessions import open_session
from slimheads.verification.parity import cases, compare_all, onnx_greedy, onnx_runner, torch_runner

# What `shipped` has of a decoder for other tests too.
PLAIN: dict[str, dict[str, Any]] = {"symbolic": {}, "static": {"precisions": ("fp32",), "kv_axes": "static"}}


@pytest.fixture(scope="module")
def slim(tiny: Callable[..., PreTrainedModel], ragged: Callable[..., Plan]) -> Callable[..., PreTrainedModel]:
    """`slim(model_type)`: a fresh model with another head count in every site."""

    def made(model_type: str, **options: Any) -> PreTrainedModel:
        model = tiny(model_type, **options)
        return prune(model, ragged(model))

    return made


def initializer_types(path: Path) -> set[int]:
    """Element types of the weights; counters and shapes are integers of 64 bits and left out."""
    graph = onnx.load(str(path)).graph
    return {tensor.data_type for tensor in graph.initializer} - {TensorProto.INT64, TensorProto.BOOL}


def io_types(path: Path) -> set[int]:
    graph = onnx.load(str(path)).graph
    return {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}


def past_axes(path: Path) -> list[tuple[Any, Any]]:
    """Axes 1 and 3 of the keys and values that a decoder takes, layer by layer."""
    inputs = [i for i in read_interface(path).inputs if i.name.startswith("past_key_values.")]
    return [(i.dims[1], i.dims[3]) for i in inputs]


def test_the_exported_model_is_left_as_it_was_and_nothing_else_is_written(
    exported_type: str, slim: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = slim(exported_type)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, inner = copy.deepcopy(model.config.__dict__), model.config
    parts = ("model",)
    if exported_type in SEQ2SEQ:
        parts = ("encoder_model", "decoder_model", "decoder_with_past_model", "decoder_model_merged")
        encoder, decoder = (copy.deepcopy(half.config.__dict__) for half in (model.get_encoder(), model.get_decoder()))
    generation = copy.deepcopy(model.generation_config.to_dict()) if model.can_generate() else None
    forward, attributes = model.forward, set(model.__dict__)
    trained = [p.requires_grad for p in model.parameters()]

    graphs = export(model, tmp_path, task=task_of(exported_type), precisions=("fp32", "int8"))

    assert [(graph.precision, graph.path) for graph in graphs] == [
        (precision, tmp_path / file_name(part, precision)) for precision in ("fp32", "int8") for part in parts
    ]
    assert set(tmp_path.iterdir()) == {graph.path for graph in graphs}
    after = model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[name], state[name]) for name in state)
    assert model.config is inner and model.config.__dict__ == config
    if exported_type in SEQ2SEQ:  # T5's have configurations of their own
        assert (model.get_encoder().config.__dict__, model.get_decoder().config.__dict__) == (encoder, decoder)
    assert generation is None or model.generation_config.to_dict() == generation
    assert model.forward == forward and model.__dict__.keys() == attributes and not model.training
    assert [p.requires_grad for p in model.parameters()] == trained


def test_the_file_says_what_size_of_images_or_sound_to_feed_it_in_every_precision(
    exported_wordless: str, shipped: Callable[..., Shipped]
) -> None:
    graphs = shipped(exported_wordless)
    config = graphs.slim.config
    for path in (graphs.onnx(file_name("model", precision)) for precision in ALL_PRECISIONS):
        session = open_session(path)
        assert read_interface(path).has_length == has_length(config)
        for batch, length in ((1, 1), (2, 9)):
            wanted = make_inputs(config, batch, length, np.random.default_rng(0))
            for source in (path, session):
                made = inputs_for(source, batch, length)
                assert {name: array.shape for name, array in made.items()} == {n: a.shape for n, a in wanted.items()}
            session.run(None, made)


@pytest.mark.parametrize("model_type", ["dinov2", "yolos"])
def test_models_that_take_images_of_any_size_still_do_as_a_file(
    model_type: str, slim: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    """Their processors make images of other sizes than the configuration names: they move positions to fit."""
    model = slim(model_type)
    export(model, tmp_path, task="feature-extraction")
    session = open_session(tmp_path / "model.onnx")
    for height, width in ((30, 30), (24, 48), (60, 54)):
        images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height))
        with torch.no_grad():
            expected = model(images).last_hidden_state.numpy()
        (found,) = session.run(["last_hidden_state"], {"pixel_values": images.numpy()})
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kv_axes", ["symbolic", "static"])
def test_a_decoders_file_says_the_true_shape_of_every_layers_cache(
    exported_decoder: str, kv_axes: KvAxes, shipped: Callable[..., Shipped]
) -> None:
    made = shipped(exported_decoder, **PLAIN[kv_axes])
    sites = of_kind(find_sites(made.slim), "attention")
    per_query = exported_decoder == "falcon"  # it keeps a group's keys once for every query head
    copies = sites[0].members if per_query else 1
    shapes = [[site.total * copies, site.head_dim, site.head_dim] for site in sites]
    assert len({heads for heads, *_ in shapes}) == len(shapes)
    path = made.onnx()
    metadata = {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}
    assert json.loads(metadata[KV_SHAPES_KEY]) == shapes
    axes = past_axes(path)
    assert len(axes) == 2 * len(sites)
    if kv_axes == "static":
        assert axes == [(heads, dim) for heads, dim, _ in shapes for _ in range(2)]
    else:
        assert all(isinstance(axis, str) and axis for pair in axes for axis in pair)
        assert len(set(axes)) == len(axes), "no axis may be tied to another layer's"


def test_further_graphs_of_a_decoder_keep_what_the_file_says_of_its_cache(shipped: Callable[..., Shipped]) -> None:
    made = shipped("llama")
    for path in (made.onnx("model_fp16.onnx"), made.onnx("model_int8.onnx")):
        assert read_interface(path).kv_shapes == read_interface(made.onnx()).kv_shapes != ()
        assert past_axes(path) == past_axes(made.onnx())


def test_the_order_that_codegen_wants_its_rows_in_costs_nothing_at_run_time(
    slim: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    export(slim("codegen"), tmp_path, task="text-generation")
    nodes = onnx.load(str(tmp_path / "model.onnx")).graph.node
    assert [node.op_type for node in nodes if "/attn/qkv_proj/" in node.name] == ["MatMul"] * 2  # layers


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_static_and_symbolic_files_give_the_tokens_of_a_plain_argmax_loop(
    model_type: str, shipped: Callable[..., Shipped]
) -> None:
    """The oracle reads the whole sequence again for every token, in torch and without a cache."""
    model = shipped(model_type).slim
    case = next(c for c in cases(model.config, "text-generation") if c.length == 8 and c.padding == "left")
    ids, mask = torch.from_numpy(case.ids), torch.from_numpy(case.mask)
    for _ in range(6):
        with torch.no_grad():
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    for options in PLAIN.values():
        path = shipped(model_type, **options).onnx()
        made = onnx_greedy(open_session(path), read_interface(path).kv_shapes, case.ids, case.mask, 6)
        assert made.dtype == np.int64 and (made == ids.numpy()).all()


def test_a_half_precision_model_is_exported_from_a_float32_copy(
    slim: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = slim("bert").to(torch.bfloat16)
    export(model, tmp_path, task="feature-extraction")
    assert model.dtype == torch.bfloat16 and model.config.dtype == slim("bert").config.dtype
    path = tmp_path / "model.onnx"
    assert initializer_types(path) == {TensorProto.FLOAT} and TensorProto.FLOAT in io_types(path)
    same = copy.deepcopy(model).float()
    over = cases(model.config, "feature-extraction")
    found = compare_all(torch_runner(same), onnx_runner(open_session(path), ()), over, 1e-4, 1e-4)
    assert all(outcome.passed for outcome in found)


def test_each_precision_is_what_its_name_says_and_takes_the_same_inputs(shipped: Callable[..., Shipped]) -> None:
    plain, half, eighth = (shipped("bert").onnx(file_name("model", precision)) for precision in ALL_PRECISIONS)
    assert initializer_types(plain) == {TensorProto.FLOAT}
    assert TensorProto.FLOAT16 in initializer_types(half) and TensorProto.INT8 in initializer_types(eighth)
    assert io_types(plain) == io_types(half) == io_types(eighth) == {TensorProto.FLOAT, TensorProto.INT64}
    assert max(eighth.stat().st_size, half.stat().st_size) < plain.stat().st_size
    inputs = [{(i.name, i.dtype) for i in read_interface(path).inputs} for path in (plain, half, eighth)]
    assert inputs[0] == inputs[1] == inputs[2]


def test_exporting_again_replaces_the_file(slim: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"old")
    export(slim("distilbert"), tmp_path, task="feature-extraction")
    open_session(tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_task_that_optimum_has_no_export_for_is_refused(slim: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    with pytest.raises(ModelRefusedError, match=r"llama.*fill-mask"):
        export(slim("llama"), tmp_path, task="fill-mask")
    assert list(tmp_path.iterdir()) == []


def test_greedy_search_ignores_what_the_model_says_about_generation(tiny: Callable[..., PreTrainedModel]) -> None:
    model = tiny("gpt2")
    ids = torch.tensor([[5, 9, 11, 40]])
    mask = torch.ones_like(ids)
    plain = model.generate(input_ids=ids, attention_mask=mask, **greedy_options(8))
    assert plain.shape == (1, 12)
    model.generation_config = GenerationConfig(
        do_sample=True, num_beams=3, repetition_penalty=9.0, suppress_tokens=[int(plain[0, 5])], max_length=5,
        eos_token_id=int(plain[0, 6]), forced_eos_token_id=3,
    )  # fmt: skip
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **greedy_options(8)), plain)


def test_optimum_is_imported_in_one_place_for_export_and_one_for_its_client() -> None:
    """Another exporter, or another version of this one, concerns these modules and no others."""
    package = Path(slimheads.__file__).parent
    importing = re.compile(r"^\s*(import|from) optimum\b", re.MULTILINE)
    found = {path.relative_to(package) for path in package.rglob("*.py") if importing.search(path.read_text("utf-8"))}
    assert found == {Path("exporting/backends/optimum.py"), Path("exporting/clients.py")}
