"""Stock transformers alone, in a process that never imports slimheads, reloads what is said of each model type."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from blocks import WITHOUT_WIDTH
from plans import renamed
from safetensors.torch import load_file, save_file
from tiny import DECODERS, SEQ2SEQ, VARIANTS, task_of, type_of
from transformers import PreTrainedModel

from slimheads.families.family import families
from slimheads.models.loading import save
from slimheads.models.tasks import auto_classes
from slimheads.pruning.plan import Plan, SitePlan
from slimheads.pruning.surgery import prune

Tiny = Callable[..., PreTrainedModel]
Plans = Callable[..., Plan]
Batches = Callable[[PreTrainedModel], dict[str, dict[str, torch.Tensor]]]

RELOAD = {model_type: family.reload for family in families().values() for model_type in family.model_types}
STOCK = """
import copy, json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
def rebuild(folder):
    said = json.loads((folder / "said.json").read_text())
    auto = getattr(transformers, said["auto"])
    model, info = auto.from_pretrained(folder / "slim", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], (folder, info)
    fed = load_file(folder / "in.safetensors")
    with torch.no_grad():
        model = copy.deepcopy(model.eval())  # out of the mapped file, where alignment may change how sums round
        made = {k: v.contiguous() for k, v in model(**fed).items() if isinstance(v, torch.Tensor)}
        if said["generates"]:
            made["tokens"] = model.generate(**fed, **said["generates"])
    save_file(made, folder / "out.safetensors")

failed = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        rebuild(folder)
    except Exception as error:
        failed[folder.name] = f"{type(error).__name__}: {error}"
assert not failed, failed
assert not any(name.startswith("slimheads") for name in sys.modules)
"""


def what_stock_rebuilds(model: PreTrainedModel, variety: str, ragged: Plans, equal: Plans) -> dict[str, Plan]:
    """Plans over every kind after which the configuration's own keys say what is left."""
    model_type = type_of(variety)
    layers = ragged(model, kinds=("layer",))
    # Stock Phi makes norms of heads as wide as hidden_size / num_attention_heads, whatever their width is.
    rebuilds_heads = RELOAD[model_type] is not None and variety != "phi-norms"
    heads = [("equal", equal(model, 2))] if rebuilds_heads else [("dense", Plan(()))]
    if RELOAD[model_type] == "pruned_heads":
        heads.append(("ragged", ragged(model, kinds=("attention",))))
    widths = Plan(()) if model_type in WITHOUT_WIDTH else equal(model, None, 20)
    return {name: without_what_goes((*plan.sites, *widths.sites), layers) for name, plan in heads}


def without_what_goes(sites: Sequence[SitePlan], layers: Plan) -> Plan:
    return Plan((*(site for site in sites if renamed(site.site, layers)), *layers.sites))


@pytest.fixture
def rebuilt(tiny: Tiny, ragged: Plans, equal: Plans, batches: Batches, tmp_path: Path) -> Callable[[list[str]], int]:
    """`rebuilt(varieties)`: how many slim folders the stock library rebuilt, with the same outputs and tokens."""

    def of(varieties: list[str]) -> int:
        expected = {}
        for variety in varieties:
            for name, plan in what_stock_rebuilds(tiny(variety), variety, ragged, equal).items():
                folder = tmp_path / f"{variety}-{name}"
                expected[folder] = shipped_outputs(prune(tiny(variety), plan), variety, batches, folder)
        command = [sys.executable, "-c", STOCK, str(tmp_path)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        for folder, outputs in expected.items():
            reloaded = load_file(folder / "out.safetensors")
            assert reloaded.keys() == outputs.keys()
            assert all(torch.equal(reloaded[name], value) for name, value in outputs.items()), folder.name
        return len(expected)

    return of


def shipped_outputs(model: PreTrainedModel, variety: str, batches: Batches, folder: Path) -> dict[str, torch.Tensor]:
    """Saves a slim model, what it is fed and what it is asked; returns what it gives."""
    save(model, folder / "slim")
    known = batches(model)
    fed = known.get("padded left", known.get("several"))
    save_file(fed, folder / "in.safetensors")
    speaks = variety in DECODERS | SEQ2SEQ
    asked = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 1} if speaks else {}
    said = {"auto": auto_classes(model.config)[task_of(variety)], "generates": asked}
    (folder / "said.json").write_text(json.dumps(said), encoding="utf-8")
    with torch.no_grad():
        outputs = {name: value for name, value in model(**fed).items() if isinstance(value, torch.Tensor)}
        return outputs | ({"tokens": model.generate(**fed, **asked)} if speaks else {})


def test_the_stock_library_alone_reloads_what_is_said(rebuilt: Callable[[list[str]], int]) -> None:
    assert rebuilt([family.model_types[0] for family in families().values()]) > len(families())


@pytest.mark.slow
def test_the_stock_library_alone_reloads_what_is_said_of_every_variety(rebuilt: Callable[[list[str]], int]) -> None:
    assert rebuilt([*RELOAD, *VARIANTS]) > len(RELOAD) + len(VARIANTS)
