"""export: both models to ONNX, in every precision, and every other form of their float32 graphs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slimheads.exporting.artifacts import file_name
from slimheads.exporting.export import export
from slimheads.exporting.graph_forms import build_form
from slimheads.intake.examine import checked_config
from slimheads.names import PLAIN, GraphForm, Precision, Side
from slimheads.pipeline.run_models import RunModels
from slimheads.pipeline.stage import Result, Stage
from slimheads.pipeline.stages.load import Loaded
from slimheads.pipeline.stages.prune import Pruned
from slimheads.pipeline.stages.recover import Recovered
from slimheads.recipe.sections import Export

SIDES: tuple[Side, Side] = ("dense", "slim")


class Exported(Result):
    """The graphs of both sides; `forms` says of each further form why it was not built, or null where it was."""

    forms: dict[GraphForm, str | None]

    @property
    def built(self) -> list[GraphForm]:
        """The further forms that were built."""
        return [form for form, reason in self.forms.items() if reason is None]

    def form_folder(self, form: GraphForm = PLAIN) -> Path:
        """Where a form's dense/ and slim/ are."""
        return _form_folder(self.folder, form)

    def onnx_folder(self, side: Side, form: GraphForm = PLAIN) -> Path:
        """The exported graphs of one side."""
        return self.form_folder(form) / side / "onnx"

    def onnx(self, side: Side, precision: Precision, graph: str = "model", form: GraphForm = PLAIN) -> Path:
        """One graph; `graph` is one of an encoder-decoder's. A further form is there in "fp32" alone."""
        return self.onnx_folder(side, form) / file_name(graph, precision)


def export_stage(
    section: Export,
    models: RunModels,
    loaded: Loaded,
    pruned: Pruned,
    recovered: Recovered,
    note: Callable[[str], None],
) -> Stage[Exported]:
    """`on_weak_precision` is not read here: the certificate decides which graphs may ship."""

    def work(folder: Path) -> Exported:
        return _Work(section, models, pruned.slim, folder, note).all()

    def depends() -> dict[str, Any]:
        return section.model_dump(mode="json", exclude={"on_weak_precision"})

    about = f"dense and slim to ONNX, as {', '.join((*section.precisions, *section.candidates))}"
    return Stage("export", Exported, work, depends, (loaded, pruned, recovered), about=about)


class _Work:
    def __init__(
        self, section: Export, models: RunModels, slim: Path, folder: Path, note: Callable[[str], None]
    ) -> None:
        self._section, self._models, self._slim, self._folder, self._note = section, models, slim, folder, note

    def all(self) -> Exported:
        section, task = self._section, self._models.source.task
        options = section.model_dump(include={"precisions", "kv_axes", "int8_for"})
        for side, model in (("dense", self._models.dense()), ("slim", self._models.slim(self._slim))):
            self._note(f"{side} to ONNX ({', '.join(section.precisions)})")
            export(model, self._folder / side / "onnx", task=task, **options)
        self._beside_graphs(self._folder)
        forms: dict[GraphForm, str | None] = {}
        for form in section.candidates:
            if form != PLAIN:
                self._note(f"dense and slim {form}")
                forms[form] = self._form(form)
        return Exported(forms=forms)

    def _form(self, form: GraphForm) -> str | None:
        """Builds a form of both sides, or of none: a fused graph's gain is measured against a fused dense graph."""
        folder, config = _form_folder(self._folder, form), self._models.dense().config
        for side in SIDES:
            plain, target = (root / side / "onnx" / file_name("model", "fp32") for root in (self._folder, folder))
            target.parent.mkdir(parents=True)
            reason = build_form(form, plain, target, config)
            if reason:
                shutil.rmtree(folder)
                return f"{side}: {reason}"
        self._beside_graphs(folder)
        return None

    def _beside_graphs(self, folder: Path) -> None:
        """optimum's and transformers.js's clients look for config.json beside onnx/."""
        config = json.dumps(checked_config(self._models.source.folder), indent=2, ensure_ascii=False) + "\n"
        (folder / "dense" / "config.json").write_text(config, encoding="utf-8")
        shutil.copyfile(self._slim / "config.json", folder / "slim" / "config.json")
        generation = self._slim / "generation_config.json"
        if generation.is_file():
            shutil.copyfile(generation, folder / "slim" / generation.name)


def _form_folder(folder: Path, form: GraphForm) -> Path:
    return folder if form == PLAIN else folder / "candidates" / form
