"""torch to ONNX through optimum, and optimum's own runtime as a client. Nothing else in slimheads imports optimum."""

from __future__ import annotations

import contextlib
import copy
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from optimum.exporters.onnx import onnx_export_from_model
from optimum.exporters.tasks import TasksManager
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import GenerationConfig, PreTrainedModel

from slimheads.errors import ModelRefusedError
from slimheads.export.kv_cache import KvAxes, kv_shapes, label_cache, true_cache_config
from slimheads.export.metadata import label_axes
from slimheads.inputs import float_axes


def to_onnx(model: PreTrainedModel, path: Path, task: str, axes: KvAxes) -> None:
    """Writes one float32 ONNX file; text generation gets a KV cache as inputs and outputs.

    Args:
        model: in float32, on the CPU; its configuration is left as it was.
        path: the file to write, in an existing folder; weights past 2 GB go beside it as `<name>_data`.

    Raises:
        ModelRefusedError: optimum has no export for this model type and task.
    """
    with_cache = task == "text-generation"
    full_task = "text-generation-with-past" if with_cache else task
    try:
        constructor = TasksManager.get_exporter_config_constructor(
            model=model, exporter="onnx", task=full_task, library_name="transformers"
        )
    except (KeyError, ValueError) as error:
        raise ModelRefusedError(
            f"optimum cannot export '{model.config.model_type}' for {task}", hint="choose another task"
        ) from error
    custom: dict[str, Any] = {}
    if with_cache:
        shapes = kv_shapes(model)
        config_class = true_cache_config(constructor.func, shapes)
        options = constructor.keywords | {"task": "text-generation", "use_past": True, "use_past_in_inputs": True}
        custom["model"] = config_class(model.config, **options)
    # The export's own file name is model.onnx, and its external data are named after it.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as scratch, _quiet(), _restored(model):
        onnx_export_from_model(
            model, Path(scratch), task=full_task, custom_onnx_configs=custom or None, do_validation=False
        )
        for made in Path(scratch).glob("model.onnx*"):
            made.rename(path.parent / made.name)
    if with_cache:
        label_cache(path, shapes, axes)
    if sizes := float_axes(model.config):
        label_axes(path, sizes)


def greedy_tokens(folder: Path, input_ids: torch.Tensor, attention_mask: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Greedy continuation through optimum's unmodified `ORTModelForCausalLM`, with its cache.

    Args:
        folder: a folder with config.json and onnx/model.onnx.
        input_ids, attention_mask: int64 [batch, length].

    Returns:
        int64 [batch, length + new_tokens].
    """
    with _quiet():
        model = ORTModelForCausalLM.from_pretrained(folder, subfolder="onnx", file_name="model.onnx", use_cache=True)
        made = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            **greedy_options(new_tokens),
        )
    return torch.as_tensor(made)


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
    config = copy.deepcopy(model.config.__dict__)
    generation = copy.deepcopy(getattr(model, "generation_config", None))
    own_forward = {name: value for name, value in model.__dict__.items() if name == "forward"}
    try:
        yield
    finally:
        model.config.__dict__.clear()
        model.config.__dict__.update(config)
        model.__dict__.pop("forward", None)
        model.__dict__.update(own_forward)
        if generation is not None:
            model.generation_config = generation


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's warnings are about tracing in general; the certificate tells whether the graph is right."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
