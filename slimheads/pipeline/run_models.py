"""The dense and the slim model of one run, each loaded at most once."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from slimheads.errors import ModelRefusedError
from slimheads.models.checkpoint import Source
from slimheads.models.loading import load


class RunModels:
    """Loads a model in float32 when it is first needed."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._loaded: dict[Path, PreTrainedModel] = {}

    def dense(self) -> PreTrainedModel:
        """The untouched model."""
        return self._model(self.source.folder, self.source.given_task)

    def slim(self, folder: Path) -> PreTrainedModel:
        """The slim model, as reloaded from the folder that the prune stage wrote.

        Raises:
            ModelRefusedError: it cannot be loaded; the error names the source, which the user has.
        """
        try:
            return self._model(folder, self.source.task)
        except ModelRefusedError as error:
            error.what = f"the slim model made of it cannot be loaded: {error.what}"
            error.where, error.hint = str(self.source.folder), f"run again with --debug and report it ({error.hint})"
            raise

    def _model(self, folder: Path, task: str) -> PreTrainedModel:
        if folder not in self._loaded:
            self._loaded[folder] = load(folder, task).float()
        return self._loaded[folder]
