"""Loads and saves models, dense and slim.

Only safetensors are read, no code of a checkpoint is ever run, and a checkpoint that lacks a weight is refused rather
than completed with random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedModel

from slimheads.attention import Site, find_sites
from slimheads.checkpoint import find, read_config, weight_files
from slimheads.disk import new_folder, remove
from slimheads.errors import ModelRefusedError, UsageError
from slimheads.family import PLAN_KEY, family_of, is_projection
from slimheads.memory import MappedFiles
from slimheads.selection import Plan
from slimheads.side_files import copy_side_files, side_files
from slimheads.surgery import record_plan, recorded_plan, shrink

# What transformers raises, among asserts and plain mistakes, when a config and the weights do not make a model.
_LOADING_FAILURES = (
    *(OSError, ValueError, RuntimeError, TypeError, KeyError, IndexError, AttributeError, AssertionError),
    SafetensorError,
)


def load(source: str | Path, task: str = "auto", *, attn_implementation: str | None = None) -> PreTrainedModel:
    """Loads a dense or slim checkpoint for inference, on the CPU, in the dtype it was saved in.

    Args:
        source: as for `find`.
        task: as for `find`.
        attn_implementation: "sdpa", "eager", or None for transformers' own choice.

    Raises:
        As `find`, and ModelRefusedError for damaged, missing, non-finite or pickled weights (named).
    """
    found = find(str(source), task)
    config = read_config(found.folder)
    build = _load_slim if hasattr(config, PLAN_KEY) else _from_pretrained
    model = build(getattr(transformers, found.architecture), found.folder, config, attn_implementation)
    # A family file that does not describe this model is an error here, not later.
    for site in find_sites(model):
        dtype = model.get_submodule(site.output.module).get_parameter("weight").dtype
        for table in site.tables:  # DeBERTa declares its as float32, and then cannot run in half precision
            tensor = getattr(model.get_submodule(table.module), table.name)
            if isinstance(tensor, torch.nn.Parameter):
                tensor.data = tensor.data.to(dtype)
    return model.eval()


def save(model: PreTrainedModel, folder: str | Path) -> None:
    """Writes config.json (with the plan), model.safetensors and the side files of the model's source.

    The folder must not exist or be empty. `slimheads.load` gives the same model back.

    Raises:
        UsageError: the folder holds something already.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError("the folder exists and is not empty", where=str(folder), hint="name a new folder")
    # Listed before anything is written, for the folder may lie inside the source. A model made in memory has no source.
    source = Path(model.name_or_path)
    beside = list(side_files(source)) if model.name_or_path and source.is_dir() else []
    # Written beside and renamed, so that a failure midway leaves no folder that looks like a model.
    draft = new_folder(folder.absolute().parent)
    try:
        model.save_pretrained(draft, safe_serialization=True)
        for weights in weight_files(draft):
            # safetensors writes 0600; a shipped file is as readable as its config
            weights.chmod((draft / "config.json").stat().st_mode)
        copy_side_files(source, beside, draft)
        draft.replace(folder)
    finally:
        remove(draft)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences what transformers logs and draws while it loads: what matters of it is checked here and raised."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def _from_pretrained(
    model_class: Any, folder: Path, config: PretrainedConfig, attn_implementation: str | None
) -> PreTrainedModel:
    files = weight_files(folder)
    _check_headers(files)

    def build(**extra: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        return cast(
            tuple[PreTrainedModel, dict[str, Any]],
            model_class.from_pretrained(
                folder,
                config=config,
                dtype="auto",
                attn_implementation=attn_implementation,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **extra,
            ),
        )

    try:
        with quiet_transformers():
            model, info = build()
            if info["missing_keys"] and all(key.startswith("pooler.") for key in info["missing_keys"]):
                model, info = build(add_pooling_layer=False)
    except _LOADING_FAILURES as error:
        raise ModelRefusedError(
            f"transformers cannot load it ({' '.join(str(error).split())[:300]})",
            where=str(folder),
            hint="fetch the model again",
        ) from error
    _check_loaded(model, info, folder, config)
    _take_out_of_files(model, files)
    return model


def _take_out_of_files(model: PreTrainedModel, files: tuple[Path, ...]) -> None:
    """Copies the weights out of the mapped files, one at a time, and gives back what was resident of the file.

    Transformers leaves them in the files, whose pages stay for as long as any weight is there: what surgery deletes
    would be kept, and a file that is written to would change the model.
    """
    mapped = MappedFiles(files)
    for tensor in (*model.parameters(), *model.buffers()):
        in_file = tensor.data
        if in_file.numel() and mapped.hold(in_file.data_ptr()):
            tensor.data = in_file.clone()
            mapped.give_back(in_file.data_ptr(), in_file.numel() * in_file.element_size())


def _check_loaded(model: PreTrainedModel, info: dict[str, Any], folder: Path, config: PretrainedConfig) -> None:
    """Refuses a model that transformers completed with random numbers, cut short, or read NaN into."""
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise ModelRefusedError(
            f"{len(missing)} weights of {type(model).__name__} are not in the checkpoint, first {missing[0]}",
            where=str(folder),
            hint="name the task this checkpoint was trained for",
        )
    beyond = [key for key in sorted(info["unexpected_keys"]) if is_projection(family_of(config)[1], key)]
    if beyond:
        raise ModelRefusedError(
            f"the checkpoint has an attention block that config.json does not count: {beyond[0]}",
            where=str(folder),
            hint="the configuration is damaged: fetch the model again",
        )
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise ModelRefusedError("the tensor holds NaN or infinity", where=name, hint="the checkpoint is damaged")


def _is_finite(tensor: torch.Tensor) -> bool:
    """Ten times as fast as `isfinite(tensor).all()`, and makes nothing of the tensor's size; NaN is in both ends."""
    return tensor.numel() == 0 or all(math.isfinite(end) for end in torch.aminmax(tensor))


def _check_headers(files: tuple[Path, ...]) -> None:
    for path in files:
        try:
            with safe_open(path, framework="pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise ModelRefusedError(
                f"damaged weights ({error})", where=str(path), hint="fetch the model again"
            ) from error


def _load_slim(
    model_class: Any, folder: Path, config: PretrainedConfig, attn_implementation: str | None
) -> PreTrainedModel:
    """Builds the dense skeleton without weights, applies the same surgery, and lets transformers load the tensors."""
    _, family = family_of(config)
    plan = recorded_plan(config, family) or Plan(())
    for key, value in getattr(config, PLAN_KEY)["dense"].items():
        setattr(config, key, value)
    delattr(config, PLAN_KEY)
    config.pruned_heads = {}

    dense_sites: tuple[Site, ...] = ()

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        nonlocal dense_sites, plan
        model_class.__init__(self, *args, **kwargs)
        dense_sites = find_sites(self)
        plan = _for_class(plan, dense_sites)
        shrink(self, dense_sites, plan)

    skeleton = type(model_class.__name__, (model_class,), {"__init__": __init__, "__module__": model_class.__module__})
    try:
        model = _from_pretrained(skeleton, folder, config, attn_implementation)
    except UsageError as error:
        raise ModelRefusedError(
            f"the recorded plan does not fit the model ({error.where}: {error.what})",
            where=str(folder / "config.json"),
            hint="fetch the model again",
        ) from error
    model.__class__ = model_class
    record_plan(model.config, family, dense_sites, plan)
    return model


def _for_class(plan: Plan, sites: tuple[Site, ...]) -> Plan:
    """Renames a plan's sites for a class with another head: `h.0.attn` here is `transformer.h.0.attn` there."""

    def name(planned: str) -> str:
        return next(
            (s.name for s in sites if f".{s.name}".endswith(f".{planned}") or planned.endswith(f".{s.name}")), planned
        )

    return Plan(tuple(replace(site, site=name(site.site)) for site in plan.sites))
