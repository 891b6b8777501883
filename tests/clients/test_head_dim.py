"""Decoders whose head_dim is not hidden_size / heads, through a whole run, in optimum's unmodified client.

optimum sizes the first cache by config.json alone, so its own export of such a model does not run, dense or slim.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from optimum.onnxruntime import ORTModelForCausalLM
from tiny import spread, tiny_model
from whole_runs import report_of, slimheads, steady, write_recipe

from slimheads.models.loading import load


@pytest.mark.parametrize("head_dim", [2, 6])
@pytest.mark.parametrize("model_type", spread("llama", "qwen3", "gemma"))
def test_dense_and_slim_of_a_run_generate_torchs_tokens(
    model_type: str, head_dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steady(monkeypatch)
    dense = tiny_model(model_type, head_dim=head_dim)
    assert dense.config.hidden_size // dense.config.num_attention_heads == 4
    dense.save_pretrained(tmp_path / "dense")
    out = tmp_path / "out"
    ended = slimheads("run", write_recipe(tmp_path / "r.yaml", tmp_path / "dense"), "--out", out)
    assert ended.code == 0, ended.err
    assert [link["link"] for link in report_of(out)["certificate"] if link["passed"]] == [1, 2, 4, 5]
    ids = torch.randint(5, 120, (3, 9), generator=torch.Generator().manual_seed(0))
    left = (torch.arange(9) >= torch.tensor([[0], [5], [2]])).long()
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    for side, model in (("dense", dense), ("slim", load(out / "slim"))):
        client = ORTModelForCausalLM.from_pretrained(out / side, use_cache=True)
        for inputs in ({"input_ids": ids[:1]}, {"input_ids": ids, "attention_mask": left}):
            expected = model.generate(**inputs, **options)
            assert expected.shape[1] == 21 and torch.equal(
                torch.as_tensor(client.generate(**inputs, **options)), expected
            )
