"""prune: a fresh copy of the model loses what the plan deletes, and is saved as slim/."""

from __future__ import annotations

import shutil
from pathlib import Path

from slimheads.models import flops
from slimheads.models.checkpoint import Source, weight_files
from slimheads.models.loading import load, save
from slimheads.models.reload import Tier, reload_tier
from slimheads.pipeline.stage import Result, Stage
from slimheads.pipeline.stages.load import Loaded
from slimheads.pipeline.stages.select import Selected
from slimheads.pruning.plan import Plan
from slimheads.pruning.surgery import prune
from slimheads.side_files.sentence_modules import MODULES


class Pruned(Result):
    """The slim checkpoint, and who can load it."""

    parameters: int
    reload: Tier
    reload_note: str
    sentence_transformers: bool

    @property
    def slim(self) -> Path:
        """The torch half of slim/."""
        return self.folder / "slim"


def prune_stage(source: Source, loaded: Loaded, selected: Selected) -> Stage[Pruned]:
    """Writes slim/ without its graphs."""

    def work(folder: Path) -> Pruned:
        return _prune(source, selected.plan, folder / "slim")

    return Stage("prune", Pruned, work, dict, (loaded, selected), about="delete them, save and reload the slim model")


def _prune(source: Source, plan: Plan, out: Path) -> Pruned:
    model = prune(load(source.folder, source.given_task), plan)
    save(model, out)
    if plan.removed == 0:
        _ship_unchanged(source.folder, out)
    tier, note = reload_tier(out, model, source.task)
    return Pruned(
        parameters=flops.parameters(model),
        reload=tier,
        reload_note=note,
        sentence_transformers=source.task == "feature-extraction" and (out / MODULES).is_file(),
    )


def _ship_unchanged(source: Path, out: Path) -> None:
    """Ratio 0 changes nothing: the weights that ship are the source's own files, byte for byte."""
    for made in weight_files(out):
        made.unlink()
    for original in weight_files(source):
        shutil.copyfile(original, out / original.name)
    index = source / "model.safetensors.index.json"
    if index.is_file():
        shutil.copyfile(index, out / index.name)
