"""torch to ONNX through optimum, and optimum's own runtime as a client. Nothing else in slimheads imports optimum."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optimum.onnx
from optimum.exporters.onnx import onnx_export_from_model
from optimum.exporters.tasks import TasksManager
from optimum.utils.input_generators import Dinov2DummyInputGenerator, DummyVisionInputGenerator
from transformers import PretrainedConfig, PreTrainedModel

import slimheads.runtime.onnx_runtime  # noqa: F401 - telemetry off
from slimheads.data.inputs import float_axes
from slimheads.errors import ModelRefusedError
from slimheads.exporting.graph_files import graph_files, remove_graph, share_data
from slimheads.exporting.kv_cache import label_cache, true_cache_config
from slimheads.exporting.metadata import label_axes
from slimheads.models.kv_shapes import kv_shapes, seq2seq_kv_shapes
from slimheads.names import KvAxes
from slimheads.runtime.quiet import quiet


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
