"""torch to ONNX through optimum, and optimum's own runtime as a client. Nothing else in slimheads imports optimum."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optimum.onnx
import torch
from optimum.exporters.onnx import onnx_export_from_model
from optimum.exporters.tasks import TasksManager
from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForSeq2SeqLM, ORTModelForSpeechSeq2Seq
from optimum.utils.input_generators import Dinov2DummyInputGenerator, DummyVisionInputGenerator
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel

import slimheads.onnx_runtime  # noqa: F401 - telemetry off
from slimheads.errors import ModelRefusedError
from slimheads.export.graph_files import graph_files, remove_graph, share_data
from slimheads.export.kv_cache import KvAxes, kv_shapes, label_cache, seq2seq_kv_shapes, true_cache_config
from slimheads.export.metadata import label_axes
from slimheads.export.quiet import quiet
from slimheads.inputs import float_axes


def to_onnx(model: PreTrainedModel, folder: Path, task: str, axes: KvAxes) -> None:
    """Writes float32 ONNX files: one, or the four of an encoder-decoder. What generates text has a KV cache.

    Args:
        model: in float32, on the CPU; its configuration is left as it was.
        folder: an existing folder; weights past 2 GB go beside each file as `<name>_data`.

    Raises:
        ModelRefusedError: optimum has no export for this model type and task.
    """
    two_halves = model.config.is_encoder_decoder
    with_cache = two_halves or task == "text-generation"
    full_task = f"{task}-with-past" if with_cache else task
    try:
        constructor = TasksManager.get_exporter_config_constructor(
            model=model, exporter="onnx", task=full_task, library_name="transformers"
        )
    except (KeyError, ValueError) as error:
        raise ModelRefusedError(
            f"optimum cannot export '{model.config.model_type}' for {task}", hint="choose another task"
        ) from error
    own, cross = seq2seq_kv_shapes(model) if two_halves else (kv_shapes(model) if with_cache else (), ())
    custom: dict[str, Any] = {}
    if Dinov2DummyInputGenerator in constructor.func.DUMMY_INPUT_GENERATOR_CLASSES:
        custom["model"] = _of_configured_size(constructor.func)(model.config, **constructor.keywords)
    elif task == "feature-extraction" and "position_ids" in constructor(model.config).inputs:
        custom["model"] = _without_positions(constructor.func)(model.config, **constructor.keywords)
    if with_cache:
        config_class = true_cache_config(constructor.func, own, cross)
        options = constructor.keywords | {"task": task, "use_past": True, "use_past_in_inputs": not two_halves}
        whole = config_class(model.config, **options)
        custom = _halves(whole) if two_halves else {"model": whole}
    sizes = float_axes(model.config)
    # The export's own file names are kept, for the external data are named after them.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as scratch, quiet(), _restored(model):
        onnx_export_from_model(
            model,
            Path(scratch),
            task=full_task,
            custom_onnx_configs=custom or None,
            do_validation=False,
            **_fixed_shapes(model.config),
        )
        for made in sorted(Path(scratch).glob("*.onnx")):
            path = folder / made.name
            remove_graph(path)
            for file in graph_files(made):
                file.rename(folder / file.name)
            share_data(path)
            if with_cache and made.stem != "encoder_model":
                label_cache(path, own, axes, cross)
            if sizes and "decoder" not in made.stem:
                label_axes(path, sizes)


def _fixed_shapes(config: PretrainedConfig) -> dict[str, int]:
    """Sizes of dummy inputs that the model fixes: Whisper takes spectrograms of one length."""
    positions = getattr(config, "max_source_positions", None)
    return {} if positions is None else {"nb_max_frames": 2 * positions}


def _halves(config: Any) -> dict[str, Any]:
    """What optimum makes of an encoder-decoder's config by itself, but of the given class."""
    return {
        "encoder_model": config.with_behavior("encoder"),
        "decoder_model": config.with_behavior("decoder", use_past=True, use_past_in_inputs=False),
        "decoder_with_past_model": config.with_behavior("decoder", use_past=True, use_past_in_inputs=True),
    }


def merge_decoders(first: Path, following: Path, target: Path) -> None:
    """Writes both decoders of an encoder-decoder as one graph; its input `use_cache_branch` chooses."""
    with quiet():
        # The second hands no cross-attention cache on, for that does not change: strict=False fills the gap.
        remove_graph(target)
        optimum.onnx.merge_decoders(first, following, save_path=target, strict=False)
        share_data(target)


def _of_configured_size(config_class: type[Any]) -> type[Any]:
    """DINOv2's dummy images have the size that the source's preprocessor crops to: a model in memory has none."""
    return type(config_class.__name__, (config_class,), {"DUMMY_INPUT_GENERATOR_CLASSES": (DummyVisionInputGenerator,)})


def _without_positions(config_class: type[Any]) -> type[Any]:
    """A decoder that embeds counts its own positions, as in torch: clients of embeddings pass none."""

    class OwnPositions(config_class):  # type: ignore[misc]
        @property
        def inputs(self) -> dict[str, dict[int, str]]:
            return {name: axes for name, axes in super().inputs.items() if name != "position_ids"}

    return OwnPositions


def greedy_tokens(folder: Path, input_ids: torch.Tensor, attention_mask: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Greedy continuation through optimum's unmodified `ORTModelForCausalLM`, with its cache.

    Args:
        folder: a folder with config.json and onnx/model.onnx.
        input_ids, attention_mask: int64 [batch, length].

    Returns:
        int64 [batch, length + new_tokens].
    """
    with quiet():
        model = ORTModelForCausalLM.from_pretrained(folder, subfolder="onnx", file_name="model.onnx", use_cache=True)
        made = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            **greedy_options(new_tokens),
        )
    return torch.as_tensor(made)


def seq2seq_greedy_tokens(
    folder: Path, inputs: Mapping[str, torch.Tensor], start: int, new_tokens: int, *, merged: bool
) -> torch.Tensor:
    """The same through `ORTModelForSeq2SeqLM` or `ORTModelForSpeechSeq2Seq`, of an encoder-decoder.

    Args:
        folder: a folder with config.json and onnx/.
        inputs: what the encoder takes: ids and mask, or features.
        start: the decoder's first token.
        merged: through the merged decoder, or through the other two.

    Returns:
        int64 [batch, 1 + new_tokens].
    """
    client = ORTModelForSpeechSeq2Seq if "input_features" in inputs else ORTModelForSeq2SeqLM
    with quiet():
        model = client.from_pretrained(folder, subfolder="onnx", use_cache=True, use_merged=merged)
        return torch.as_tensor(seq2seq_generate(model, inputs, start, new_tokens))


def seq2seq_generate(model: Any, inputs: Mapping[str, torch.Tensor], start: int, new_tokens: int) -> torch.Tensor:
    """Plain greedy search of an encoder-decoder, in torch or in ONNX Runtime; int64 [batch, 1 + new_tokens]."""
    options = greedy_options(new_tokens)
    options["generation_config"].decoder_start_token_id = start
    # Whisper's own `generate` adds languages, timestamps and windows to this, from a config it may not have.
    made: torch.Tensor = GenerationMixin.generate(model, **inputs, **options)
    return made


def greedy_options(new_tokens: int) -> dict[str, Any]:
    """What makes `generate` plain greedy search of a fixed length, whatever generation_config.json says."""
    return {
        "generation_config": GenerationConfig(max_new_tokens=new_tokens, do_sample=False, num_beams=1, pad_token_id=0),
        "use_model_defaults": False,
        "eos_token_id": None,  # taken from the model unless it is given here
        "use_cache": True,
    }


@contextlib.contextmanager
def _restored(model: PreTrainedModel) -> Iterator[None]:
    """optimum writes into the model's configurations and leaves a forward of its own on Llama's kind; all put back."""
    # T5's encoder and decoder have configurations of their own.
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values()
    before = [copy.deepcopy(config.__dict__) for config in configs]
    generation = copy.deepcopy(getattr(model, "generation_config", None))
    own_forward = {name: value for name, value in model.__dict__.items() if name == "forward"}
    try:
        yield
    finally:
        for config, values in zip(configs, before, strict=True):
            config.__dict__.clear()
            config.__dict__.update(values)
        model.__dict__.pop("forward", None)
        model.__dict__.update(own_forward)
        if generation is not None:
            model.generation_config = generation
