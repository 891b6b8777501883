"""Loads and saves models, dense and slim.

Only safetensors are read, no code of a checkpoint is ever run, and a checkpoint that lacks a weight is refused rather
than completed with random numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel

from slimheads.errors import ModelRefusedError, UsageError
from slimheads.families.family import PLAN_KEY, assign, family_of
from slimheads.families.sites import Site, find_sites, of_kind
from slimheads.files import new_folder, remove
from slimheads.intake.side_json import strip_code
from slimheads.models.checkpoint import Source, find, read_config, weight_files
from slimheads.models.generation_settings import generation_settings, settings_left_alone, write_settings
from slimheads.models.unused_weights import account_for_unused
from slimheads.models.weights import check_loaded, refused_loading, tensor_files
from slimheads.pruning.plan import Plan
from slimheads.pruning.plan_record import record_plan, recorded_plan
from slimheads.pruning.surgery import shrink
from slimheads.runtime.memory import MappedFiles
from slimheads.runtime.quiet import quiet_transformers
from slimheads.side_files.shipped_files import copy_side_files, side_files

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
    model = build(getattr(transformers, found.architecture), found, config, attn_implementation)
    # Raises here, not later, if the family file does not describe this model.
    for site in of_kind(find_sites(model), "attention"):
        dtype = model.get_submodule(site.output.module).get_parameter("weight").dtype
        for table in site.tables:  # DeBERTa declares its tables as float32, which fails in half precision
            tensor = getattr(model.get_submodule(table.module), table.name)
            if isinstance(tensor, torch.nn.Parameter):
                tensor.data = tensor.data.to(dtype)
    return model.eval()


def save(model: PreTrainedModel, folder: str | Path) -> None:
    """Writes config.json (with the plan), model.safetensors and the side files of the model's source.

    The folder must be empty or not exist. `slimheads.load` gives the same model back.

    Raises:
        UsageError: the folder is not empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError("the folder exists and is not empty", where=str(folder), hint="name a new folder")
    # Listed before writing, because the folder may be inside the source. A model made in memory has no source.
    source = Path(model.name_or_path) if model.name_or_path and Path(model.name_or_path).is_dir() else None
    beside = list(side_files(source)) if source else []
    # Written under another name and then renamed, so that a failure leaves no folder that looks like a model.
    draft = new_folder(folder.absolute().parent)
    try:
        with quiet_transformers(), settings_left_alone(model):
            model.save_pretrained(draft, safe_serialization=True)
        write_settings(model, source, draft)
        for written in draft.glob("*.json"):
            strip_code(written)
        for weights in weight_files(draft):
            # safetensors writes with mode 0600; the weights should be as readable as the config
            weights.chmod((draft / "config.json").stat().st_mode)
        if source:
            copy_side_files(source, beside, draft)
        draft.replace(folder)
    finally:
        remove(draft)


def _from_pretrained(
    model_class: Any, found: Source, config: PretrainedConfig, attn_implementation: str | None
) -> PreTrainedModel:
    folder = found.folder
    shards = weight_files(folder)
    files = tensor_files(shards)
    settings = generation_settings(folder, config) if model_class.can_generate() else None

    def build(**extra: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        return cast(
            tuple[PreTrainedModel, dict[str, Any]],
            model_class.from_pretrained(
                folder,
                config=config,
                dtype="auto",
                attn_implementation=attn_implementation,
                generation_config=settings,
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
            if _lacks_pooler(model_class, info):
                model, info = build(add_pooling_layer=False)
    except _LOADING_FAILURES as error:
        raise refused_loading(error, model_class, config, files, folder) from error
    if settings is not None:
        model.generation_config = settings  # from_pretrained copies it without the hash that `generate` reads
    check_loaded(model, info, files, folder, family_of(config)[1])
    account_for_unused(model, info["unexpected_keys"], files, folder, task_named=found.task_named)
    _copy_out_of_files(model, shards)
    return model


def _lacks_pooler(model_class: Any, info: Mapping[str, Any]) -> bool:
    """Whether only a pooler is missing, and the class can be built without one."""
    missing = info["missing_keys"]
    # The class of a slim model is a subclass of the one with the parameter.
    takes = any("add_pooling_layer" in inspect.signature(made_of).parameters for made_of in model_class.__mro__[:2])
    return bool(missing) and takes and all(key.startswith("pooler.") for key in missing)


def _copy_out_of_files(model: PreTrainedModel, files: tuple[Path, ...]) -> None:
    """Copies the weights out of the memory-mapped files, one at a time, and frees the pages of the file.

    transformers leaves the weights in the mapped files. Their pages stay while any weight uses them, so the memory of
    deleted heads would not be freed, and writing to a file would change the model.
    """
    mapped = MappedFiles(files)
    for tensor in (*model.parameters(), *model.buffers()):
        in_file = tensor.data
        if in_file.numel() and mapped.hold(in_file.data_ptr()):
            tensor.data = in_file.clone()
            mapped.release(in_file.data_ptr(), in_file.numel() * in_file.element_size())


def _load_slim(
    model_class: Any, found: Source, config: PretrainedConfig, attn_implementation: str | None
) -> PreTrainedModel:
    """Builds the dense skeleton without weights, applies the same surgery, and lets transformers load the tensors."""
    _, family = family_of(config)
    plan = recorded_plan(config, family) or Plan(())
    for key, value in getattr(config, PLAN_KEY)["dense"].items():
        assign(config, key, value)
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
        model = _from_pretrained(skeleton, found, config, attn_implementation)
    except UsageError as error:
        raise ModelRefusedError(
            f"the recorded plan does not fit the model ({error.where}: {error.what})",
            where=str(found.folder / "config.json"),
            hint="use the config.json that was saved with these weights",
        ) from error
    model.__class__ = model_class
    record_plan(model.config, family, dense_sites, plan)
    return model


def _for_class(plan: Plan, sites: tuple[Site, ...]) -> Plan:
    """Renames a plan's sites for another task class: `h.0.attn` of the body is `transformer.h.0.attn` under a head."""
    named = {s.name for s in sites}
    ends = {end: name for name in named for end in _ends(name)}

    def name(planned: str) -> str:
        return ends.get(planned) or next((end for end in _ends(planned) if end in named), planned)

    return Plan(tuple(replace(site, site=name(site.site)) for site in plan.sites))


def _ends(name: str) -> Iterator[str]:
    """A qualified name, and what is left of it without its first parts."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name
