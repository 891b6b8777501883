"""torch to ONNX through optimum. Beside `slimheads.exporting.clients`, nothing else imports optimum."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import optimum.onnx
import torch
from optimum.exporters.onnx import onnx_export_from_model
from optimum.exporters.tasks import TasksManager
from optimum.utils.input_generators import Dinov2DummyInputGenerator, DummyVisionInputGenerator
from transformers import PretrainedConfig, PreTrainedModel

import slimheads.runtime.onnx_runtime  # noqa: F401 - telemetry off
from slimheads.errors import ModelRefusedError
from slimheads.exporting.graph_files import graph_files, remove_graph, share_data
from slimheads.models.kv_shapes import cache_shapes, has_cache
from slimheads.names import KvShape
from slimheads.runtime.quiet import quiet


def to_onnx(model: PreTrainedModel, folder: Path, task: str) -> None:
    """Writes float32 ONNX files, as `Backend.to_onnx` describes.

    Raises:
        ModelRefusedError: optimum has no export for this model type and task.
    """
    full_task = f"{task}-with-past" if has_cache(model.config, task) else task
    try:
        constructor = TasksManager.get_exporter_config_constructor(
            model=model, exporter="onnx", task=full_task, library_name="transformers"
        )
    except (KeyError, ValueError) as error:
        raise ModelRefusedError(
            f"optimum cannot export '{model.config.model_type}' for {task}", hint="choose another task"
        ) from error
    configs = _own_configs(constructor, model, task)
    # optimum's file names are kept, because external data are named after them.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as scratch, quiet(), _restored(model):
        onnx_export_from_model(
            model,
            Path(scratch),
            task=full_task,
            custom_onnx_configs=configs or None,
            do_validation=False,
            **_fixed_shapes(model.config),
        )
        for made in sorted(Path(scratch).glob("*.onnx")):
            path = folder / made.name
            remove_graph(path)
            for file in graph_files(made):
                file.rename(folder / file.name)
            share_data(path)


def _own_configs(constructor: Any, model: PreTrainedModel, task: str) -> dict[str, Any]:
    """optimum's export configurations by file, where its own ones do not fit; empty where they do."""
    config = model.config
    if has_cache(config, task):
        own, cross = cache_shapes(model)
        past = {"task": task, "use_past": True, "use_past_in_inputs": not config.is_encoder_decoder}
        whole = _with_true_cache(constructor.func, own, cross)(config, **constructor.keywords | past)
        return _halves(whole) if config.is_encoder_decoder else {"model": whole}
    if Dinov2DummyInputGenerator in constructor.func.DUMMY_INPUT_GENERATOR_CLASSES:
        return {"model": _of_configured_size(constructor.func)(config, **constructor.keywords)}
    if task == "feature-extraction" and "position_ids" in constructor(config).inputs:
        return {"model": _without_positions(constructor.func)(config, **constructor.keywords)}
    return {}


def _fixed_shapes(config: PretrainedConfig) -> dict[str, int]:
    """Sizes of dummy inputs that the model fixes: Whisper takes spectrograms of a single length."""
    positions = getattr(config, "max_source_positions", None)
    return {} if positions is None else {"nb_max_frames": 2 * positions}


def _halves(config: Any) -> dict[str, Any]:
    """The three configurations that optimum derives from an encoder-decoder's, here from the given one."""
    return {
        "encoder_model": config.with_behavior("encoder"),
        "decoder_model": config.with_behavior("decoder", use_past=True, use_past_in_inputs=False),
        "decoder_with_past_model": config.with_behavior("decoder", use_past=True, use_past_in_inputs=True),
    }


def merge_decoders(first: Path, following: Path, target: Path) -> None:
    """Writes both decoders of an encoder-decoder as one graph; its input `use_cache_branch` chooses."""
    with quiet():
        # The second decoder returns no cross-attention cache, because that does not change: strict=False fills the gap.
        remove_graph(target)
        optimum.onnx.merge_decoders(first, following, save_path=target, strict=False)
        share_data(target)


def _of_configured_size(config_class: type[Any]) -> type[Any]:
    """Dummy images of the configuration's size: optimum reads DINOv2's from a preprocessor, which is not here."""
    return type(config_class.__name__, (config_class,), {"DUMMY_INPUT_GENERATOR_CLASSES": (DummyVisionInputGenerator,)})


def _without_positions(config_class: type[Any]) -> type[Any]:
    """Without the input `position_ids`: a decoder that embeds counts its positions itself, and clients pass none."""

    class OwnPositions(config_class):  # type: ignore[misc]
        @property
        def inputs(self) -> dict[str, dict[int, str]]:
            return {name: axes for name, axes in super().inputs.items() if name != "position_ids"}

    return OwnPositions


def _with_true_cache(config_class: type[Any], shapes: Sequence[KvShape], cross: Sequence[KvShape] = ()) -> type[Any]:
    """A subclass of an optimum OnnxConfig whose dummy past has each layer's own shape: optimum's has one for all."""

    class TrueCacheConfig(config_class):  # type: ignore[misc]
        def overwrite_shape_and_generate_input(
            self, dummy_input_gen: Any, input_name: str, framework: str, input_shapes: dict[str, Any]
        ) -> Any:
            made = super().overwrite_shape_and_generate_input(dummy_input_gen, input_name, framework, input_shapes)
            if input_name != "past_key_values":
                return made
            batch, lengths = made[0][1].shape[0], [tensor.shape[2] for tensor in made[0][1::2]]
            by_layer = zip(shapes, cross, strict=True) if cross else zip(shapes, strict=True)
            return [
                tuple(
                    torch.rand(batch, heads, length, dim)
                    for (heads, *dims), length in zip(layer, lengths, strict=True)
                    for dim in dims
                )
                for layer in by_layer
            ]

    return TrueCacheConfig


@contextlib.contextmanager
def _restored(model: PreTrainedModel) -> Iterator[None]:
    """Undoes what optimum changes: it writes into the configurations, and replaces the forward of Llama-like models."""
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
