"""Decoders that embed: their graph counts positions itself, as the torch model does where it is given none."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
from tiny import spread, tiny_model

from slimheads.exporting.export import export
from slimheads.verification.parity import cases, compare_all, onnx_runner, torch_runner


@pytest.mark.parametrize("kind", spread("gpt2", "llama", "opt", "gpt_bigcode", "bloom", "phi"))
def test_a_decoder_embeds_in_onnx_as_in_torch_under_any_padding(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind, task="feature-extraction")
    export(model, tmp_path, task="feature-extraction")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    assert [given.name for given in session.get_inputs()] == ["input_ids", "attention_mask"]
    over = cases(model.config, "feature-extraction")
    assert {case.padding for case in over} == {"no", "left", "right"}
    found = compare_all(torch_runner(model), onnx_runner(session, ()), over, 1e-4, 1e-4)
    assert [case.reason for case in found if not case.passed] == []
