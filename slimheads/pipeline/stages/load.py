"""load: the checkpoint's files, hashed, and the dense model in memory."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

from slimheads.files import sha256_file
from slimheads.models import flops
from slimheads.models.checkpoint import Source, weight_files
from slimheads.pipeline.run_models import RunModels
from slimheads.pipeline.stage import Result, Stage
from slimheads.side_files.shipped_files import side_files


class Loaded(Result):
    """What the checkpoint holds."""

    task: str
    files: dict[str, str]  # path inside the checkpoint -> SHA-256
    parameters: int


def load_stage(models: RunModels) -> Stage[Loaded]:
    """Depends on every file of the checkpoint that counts."""
    task, files = models.source.task, cache(partial(_files, models.source))

    def work(folder: Path) -> Loaded:
        return Loaded(task=task, files=files(), parameters=flops.parameters(models.dense()))

    about = "load the model and hash its files"
    return Stage("load", Loaded, work, lambda: {"task": task, "files": files()}, about=about)


def _files(source: Source) -> dict[str, str]:
    folder = source.folder
    found = [Path("config.json"), *(f.relative_to(folder) for f in weight_files(folder)), *side_files(folder)]
    return {f.as_posix(): sha256_file(folder / f) for f in found}
