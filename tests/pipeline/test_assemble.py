"""Gates and verdict, what is published, and whether report.json agrees with what lies beside it."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from jsonschema import validate
from pydantic import ValidationError
from ruamel.yaml import YAML
from safetensors import safe_open
from transformers import AutoModel, AutoTokenizer
from whole_runs import (
    BERT_SITES,
    checkpoint,
    finished,
    measured,
    report_of,
    slimheads,
    steady,
    visible,
    write_recipe,
)

from slimheads.data.metrics import Figures
from slimheads.data.texts import read_texts
from slimheads.pipeline.gates import judge
from slimheads.recipe.recipe import Recipe
from slimheads.recipe.sections import Gates
from slimheads.report.model import Report, Size
from slimheads.verification.drift import Drift

SIZE = Size(parameters=10, bytes=1000, flops=1)


def drift(**figures: float | None) -> Drift:
    return Drift(
        sample="built-in",
        texts=1,
        tokens=9,
        slim=Figures(**figures),
        headline=None,
        random_control=None,
        beats_random=None,
    )


def met(gates: dict[str, float], **found: Any) -> bool:
    """Whether the only gate of these is met."""
    given: dict[str, Any] = {"latency": (), "drifts": (), "dense": SIZE, "slim": SIZE} | found
    (result,) = judge(Gates(**gates), **given)
    assert result.reason
    return result.met


# Gates


def test_no_gates_nothing_to_judge() -> None:
    assert judge(Gates(), (), (), SIZE, SIZE) == ()


@pytest.mark.parametrize(("speedup", "expected"), [(1.25, True), (1.2500001, True), (1.2499, False), (0.9, False)])
def test_latency_at_most_the_limit(speedup: float, expected: bool) -> None:
    assert met({"latency_ratio": 0.8}, latency=[measured(estimate=speedup)]) is expected


@pytest.mark.parametrize("verdict", ["inconclusive", "no difference shown", "not measured"])
def test_a_latency_that_shows_nothing_meets_no_gate(verdict: str) -> None:
    assert not met({"latency_ratio": 0.9}, latency=[measured(verdict, estimate=9.0)])
    # a good row beside it does not help where the machine was too noisy or nothing showed
    both = [measured(estimate=9.0), measured(verdict, estimate=9.0, shape=(1, 128))]
    assert met({"latency_ratio": 0.9}, latency=both) is (verdict == "not measured")


def test_a_limit_on_slowdown_is_met_by_no_difference_but_not_by_an_inconclusive_one() -> None:
    assert met({"latency_ratio": 1.05}, latency=[measured("no difference shown", estimate=1.0)])
    assert not met({"latency_ratio": 1.05}, latency=[measured("inconclusive", estimate=1.0)])


def test_a_provider_that_was_skipped_is_not_judged_but_none_at_all_is_not_met() -> None:
    skipped = measured("not measured", provider="cuda")
    assert met({"latency_ratio": 0.9}, latency=[measured(), skipped])
    assert not met({"latency_ratio": 0.9}, latency=[skipped])
    assert not met({"latency_ratio": 0.9}, latency=[])


@pytest.mark.parametrize("order", [1, -1])
def test_the_slowest_row_decides_and_is_named(order: int) -> None:
    rows = [measured(estimate=1.5), measured(estimate=1.05, shape=(4, 128), precision="int8")][::order]
    (result,) = judge(Gates(latency_ratio=0.9), rows, (), SIZE, SIZE)
    assert not result.met
    assert result.measured == pytest.approx(1 / 1.05)
    assert result.reason is not None and "4x128 (cpu, int8)" in result.reason


@pytest.mark.parametrize(("slim", "expected"), [(799, True), (800, True), (801, False)])
def test_size_at_most_the_limit(slim: int, expected: bool) -> None:
    assert met({"size_ratio": 0.8}, slim=SIZE.model_copy(update={"bytes": slim})) is expected


@pytest.mark.parametrize(("gate", "figure"), [("min_cosine", "cosine"), ("min_top1_agreement", "top1_agreement")])
def test_floors_are_met_at_the_limit_by_the_worst_sample(gate: str, figure: str) -> None:
    for value, expected in ((0.75, True), (0.7501, True), (0.7499, False)):
        assert met({gate: 0.75}, drifts=[drift(**{figure: value})]) is expected
        for pair in ([value, 0.99], [0.99, value]):
            assert met({gate: 0.75}, drifts=[drift(**{figure: each}) for each in pair]) is expected


def test_perplexity_is_met_at_the_limit_by_the_worst_sample() -> None:
    for value, expected in ((1.5, True), (1.4, True), (1.5001, False)):
        assert met({"max_perplexity_ratio": 1.5}, drifts=[drift(perplexity_ratio=value)]) is expected
        for pair in ([value, 1.0], [1.0, value]):
            found = [drift(perplexity_ratio=each) for each in pair]
            assert met({"max_perplexity_ratio": 1.5}, drifts=found) is expected


@pytest.mark.parametrize(
    "gates",
    [{"min_cosine": 0.01}, {"max_perplexity_ratio": 99.0}, {"min_top1_agreement": 0.01}, {"latency_ratio": 9.0}],
)
def test_what_was_not_measured_is_not_met(gates: dict[str, float]) -> None:
    nothing = drift().model_copy(update={"slim": None, "reason": "no tokenizer"})
    for found in ([], [nothing], [drift()]):
        assert not met(gates, drifts=found)
    best = drift(cosine=1.0, perplexity_ratio=1.0, top1_agreement=1.0)
    assert not met(gates, drifts=[best, nothing])


def test_every_gate_of_the_recipe_is_judged_once() -> None:
    limits = dict.fromkeys(Gates.model_fields, 0.5)
    results = judge(Gates(**limits), (), (), SIZE, SIZE)
    assert sorted(result.gate for result in results) == sorted(limits)


def test_every_unmet_gate_is_a_reason_and_code_7(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steady(monkeypatch, estimate=1.1)
    gates = {"latency_ratio": 0.5, "size_ratio": 0.1, "min_cosine": 1.0, "min_top1_agreement": 0.1}
    recipe = write_recipe(tmp_path / "r.yaml", gates=gates)
    ended = slimheads("run", recipe, "--out", tmp_path / "out")
    assert ended.code == 7
    report = report_of(tmp_path / "out")
    assert (report["verdict"]["ok"], report["verdict"]["exit_code"]) == (False, 7)
    assert ended.complaints == [f"slimheads: {reason}" for reason in report["verdict"]["reasons"]]
    for gate in gates:
        (line,) = [reason for reason in report["verdict"]["reasons"] if f"gate {gate} was not met: " in reason]
        assert line.startswith(f"{recipe}:") and "; delete " in line  # where it is asked for, and what to do
    assert (tmp_path / "out" / "slim").is_dir()  # it is what it says it is, only not good enough


# What is published


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_the_tree_is_that_of_the_contract(model_type: str) -> None:
    out = finished(model_type)
    top = {"recipe.yaml", "report.json", "report.md", "report.html", "scores.json", "plan.json", "dense", "slim"}
    assert visible(out) == top
    files = {
        p.relative_to(out).as_posix() for side in ("dense", "slim") for p in (out / side).rglob("*") if p.is_file()
    }
    graphs = {
        f"{side}/onnx/model{kind}.onnx" for side in ("dense", "slim") for kind in ("", "_fp16", "_int8", "_quantized")
    }
    sides = {"config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    shipped = {f"slim/{name}" for name in sides | {"model.safetensors", "README.md"}}
    generation = {"slim/generation_config.json"} if model_type == "gpt2" else set()
    assert files == graphs | shipped | generation | {"dense/config.json"}
    # transformers.js asks for the one name, optimum's users for the other.
    int8 = {name: (out / "slim" / "onnx" / f"model_{name}.onnx").read_bytes() for name in ("int8", "quantized")}
    assert int8["int8"] == int8["quantized"]


def test_plan_and_scores_have_the_contract_s_format() -> None:
    out = finished()
    scores, plan = (json.loads((out / name).read_text()) for name in ("scores.json", "plan.json"))
    assert {k: v for k, v in scores.items() if k != "sites"} == {"format": 2, "method": "magnitude"}
    assert [site["site"] for site in scores["sites"]] == [site["site"] for site in plan["sites"]] == list(BERT_SITES)
    assert all(set(site) == {"site", "kind", "unit", "scores"} for site in scores["sites"])
    assert all(len(site["scores"]) == 4 for site in scores["sites"])
    assert set(plan) == {"format", "sites"} and plan["format"] == 2
    for site in plan["sites"]:
        assert set(site) == {"site", "kind", "unit", "total", "kept"}
        assert (site["kind"], site["unit"], site["total"]) == ("attention", "head", 4)
        assert site["kept"] == sorted(set(site["kept"])) and set(site["kept"]) <= set(range(4))
    assert sum(len(site["kept"]) for site in plan["sites"]) == 6
    assert json.loads((out / "slim" / "config.json").read_text())["slimheads"]["sites"] == plan["sites"]


def test_the_weakest_heads_by_the_published_scores_are_the_deleted_ones() -> None:
    out = finished()
    scores, plan = (json.loads((out / name).read_text())["sites"] for name in ("scores.json", "plan.json"))
    ranked = sorted((score, s, unit) for s, site in enumerate(scores) for unit, score in enumerate(site["scores"]))
    deleted = {(s, unit) for s, site in enumerate(plan) for unit in range(4) if unit not in site["kept"]}
    assert deleted == {(s, unit) for _, s, unit in ranked[:6]}


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_no_path_of_this_machine_in_what_ships(model_type: str) -> None:
    out = finished(model_type)
    private = [checkpoint(model_type).parent, out, Path.cwd(), Path(tempfile.gettempdir()), Path(torch.__file__).parent]
    for file in (p for side in ("dense", "slim") for p in (out / side).rglob("*") if p.is_file()):
        data = file.read_bytes()
        for path in private:
            assert str(path).encode() not in data, f"{path} is in {file.relative_to(out)}"


def test_the_card_names_a_local_model_by_its_folder() -> None:
    assert "of tiny-bert were deleted" in (finished() / "slim" / "README.md").read_text()


def test_ratio_zero_ships_the_source_s_own_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steady(monkeypatch, "no difference shown", 1.0)
    ended = slimheads("run", write_recipe(tmp_path / "r.yaml", select={"ratio": 0}), "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    shipped, source = (folder / "model.safetensors" for folder in (tmp_path / "out" / "slim", checkpoint()))
    assert shipped.read_bytes() == source.read_bytes()
    report = report_of(tmp_path / "out")
    assert report["model"]["dense"] == report["model"]["slim"]
    assert report["model"]["heads"]["removed"] == 0
    assert report["drift"]["random_control"] is None
    assert report["drift"]["slim"]["cosine"] == pytest.approx(1, abs=1e-6)


# report.json

NUMBER, TEXT, FLAG = {"type": "number"}, {"type": "string"}, {"type": "boolean"}
WHOLE = {"type": "integer", "minimum": 1}


def thing(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


def several(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": item}


def or_null(kind: str) -> dict[str, Any]:
    return {"type": [kind, "null"]}


SIDE = thing(parameters=WHOLE, bytes=WHOLE, flops=WHOLE)
TIMES = thing(median_ms=NUMBER, p10_ms=NUMBER, p90_ms=NUMBER, runs={"type": "integer", "minimum": 30})
CONTRACT = thing(
    format={"const": 1},
    verdict=thing(ok={"const": True}, exit_code={"const": 0}, reasons={"type": "array", "maxItems": 0}),
    model=thing(dense=SIDE, slim=SIDE),
    certificate=several(
        thing(
            link={"enum": [1, 2, 3, 4, 5]},
            max_abs=or_null("number"),
            max_rel=or_null("number"),
            atol=or_null("number"),
            rtol=or_null("number"),
            cases=WHOLE,
            passed={"const": True},
        )
    ),
    drift=thing(slim={"type": "object"}, random_control=thing(seeds={"type": "array", "minItems": 3, "maxItems": 3})),
    latency=several(
        thing(
            provider={"const": "cpu"},
            threads={"const": 1},
            precision={"enum": ["fp32", "fp16", "int8"]},
            shape={"const": [1, 8]},
            dense=TIMES,
            slim=TIMES,
            speedup=thing(estimate=NUMBER, low=NUMBER, high=NUMBER),
            flop_speedup=NUMBER,
            realised=NUMBER,
        )
    ),
    stages=several(
        thing(stage=TEXT, seconds=NUMBER, peak_rss_mb={"type": "number", "exclusiveMinimum": 0}, reused=FLAG)
    ),
    environment={"type": "object", "minProperties": 5},
)


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_report_json_has_what_the_contract_lists(model_type: str) -> None:
    report = report_of(finished(model_type))
    validate(report, CONTRACT)
    assert {row["precision"] for row in report["latency"]} == {"fp32", "fp16", "int8"}
    links = [link["link"] for link in report["certificate"]]
    assert links == [1, 2, 3, 3, 4, 4, *([5] if model_type == "gpt2" else [])]
    assert [stage["stage"] for stage in report["stages"]] == [
        "load", "score", "select", "prune", "recover", "export", "verify", "bench",
    ]  # fmt: skip
    text = (finished(model_type) / "report.json").read_text()
    assert Report.model_validate_json(text).to_json() == text


def elements(path: Path) -> int:
    """Parameters by the header of a safetensors file; a tied tensor is stored once."""
    with safe_open(path, framework="np") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_report_s_sizes_are_those_of_the_files(model_type: str) -> None:
    out, report = finished(model_type), report_of(finished(model_type))
    model = report["model"]
    assert model["dense"]["parameters"] == elements(checkpoint(model_type) / "model.safetensors")
    assert model["slim"]["parameters"] == elements(out / "slim" / "model.safetensors")
    # six heads of eight features: 32 wide Q, K, V and O each, and the biases of Q, K and V
    assert model["dense"]["parameters"] - model["slim"]["parameters"] == 6 * 8 * (4 * 32 + 3)
    for side in ("dense", "slim"):
        assert model[side]["bytes"] == (out / side / "onnx" / "model.onnx").stat().st_size
    for name, size in report["files"].items():
        assert (out / name).stat().st_size == size
    assert {name for name in report["files"] if name.endswith(".onnx")} == {
        p.relative_to(out).as_posix() for p in out.glob("*/onnx/*.onnx")
    }
    with_head = [model["heads"][name] for name in ("total", "kept", "removed")]
    assert with_head == [12, 6, 6]


def test_report_s_flops_are_those_of_the_matrix_products() -> None:
    report = report_of(finished())
    length, hidden, wide, layers, head = 8, 32, 48, 3, 8
    pooler = hidden * hidden

    def by_hand(heads: int) -> int:
        """2 a multiply-add; `heads` over all layers."""
        projections = 4 * hidden * head * heads * length
        attention = 2 * length * length * head * heads
        feed_forward = layers * 2 * hidden * wide * length
        return 2 * (projections + attention + feed_forward + pooler)

    model = report["model"]
    assert (model["dense"]["flops"], model["slim"]["flops"]) == (by_hand(12), by_hand(6))
    for row in report["latency"]:
        assert row["flop_speedup"] == pytest.approx(by_hand(12) / by_hand(6))
        assert row["realised"] == pytest.approx(row["speedup"]["estimate"] / row["flop_speedup"])


def test_report_s_cosine_is_that_of_the_published_model() -> None:
    """Mean-pooled embeddings of single texts, dense by transformers, slim by its published graph."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(finished() / "slim" / "onnx" / "model.onnx"))
    dense, tokenizer = (auto.from_pretrained(checkpoint()) for auto in (AutoModel, AutoTokenizer))
    cosines = []
    for text in read_texts(None):
        batch = tokenizer(text, truncation=True, max_length=128, return_tensors="pt")
        with torch.no_grad():
            expected = dense(**batch).last_hidden_state.mean(1)[0].numpy()
        feed = {given.name: batch[given.name].numpy() for given in session.get_inputs()}
        found = session.run(["last_hidden_state"], feed)[0].mean(1)[0]
        cosines.append(float(found @ expected / np.linalg.norm(found) / np.linalg.norm(expected)))
    figures = report_of(finished())["drift"]["slim"]
    assert figures["cosine"] == pytest.approx(np.mean(cosines), abs=1e-5) and figures["cosine"] < 0.9999
    assert figures["cosine_min"] == pytest.approx(min(cosines), abs=1e-5)


def test_reduced_precision_graphs_hold_reduced_weights() -> None:
    folder = finished() / "slim" / "onnx"
    kinds = {
        name: {tensor.data_type for tensor in onnx.load(str(folder / name)).graph.initializer if len(tensor.dims) == 2}
        for name in ("model.onnx", "model_fp16.onnx", "model_int8.onnx")
    }
    types = onnx.TensorProto
    assert kinds["model.onnx"] == {types.FLOAT}
    assert kinds["model_fp16.onnx"] == {types.FLOAT16}
    assert types.INT8 in kinds["model_int8.onnx"]


def test_the_resolved_recipe_says_every_key_and_reads_back() -> None:
    out = finished()
    written = YAML(typ="safe").load((out / "recipe.yaml").read_text())
    assert written["model"] == str(checkpoint())
    assert {
        name: set(Recipe.model_fields[name].annotation.model_fields)
        for name in written
        if name not in ("model", "task")
    } == {name: set(section) for name, section in written.items() if isinstance(section, dict)}
    assert Recipe.read(out / "recipe.yaml").model_dump(mode="json") == report_of(out)["recipe"]


def test_a_report_that_contradicts_itself_cannot_be_made() -> None:
    report = report_of(finished())
    report["verdict"]["exit_code"] = 7
    with pytest.raises(ValidationError):
        Report.model_validate_json(json.dumps(report))
