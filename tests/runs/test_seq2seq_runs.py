"""Whole runs on encoder-decoders: the four files, what is measured of them, and what the report says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from optimum.onnxruntime import ORTModelForSeq2SeqLM
from tiny import task_of
from transformers import AutoTokenizer
from whole_runs import Ended, checkpoint, report_of, slimheads, steady, write_recipe

from slimheads.data.texts import read_texts
from slimheads.latency.bench import bench
from slimheads.models.loading import load

FILES = ("encoder_model", "decoder_model", "decoder_with_past_model", "decoder_model_merged")
TYPES = ("bart", pytest.param("t5", marks=pytest.mark.slow), pytest.param("whisper", marks=pytest.mark.slow))


def run(recipe: Path, out: Path, *options: str) -> Ended:
    return slimheads("run", recipe, "--out", out, *options)


@pytest.fixture(scope="module", params=TYPES)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run in every precision."""
    home = tmp_path_factory.mktemp(request.param)
    recipe = write_recipe(
        home / "r.yaml",
        checkpoint(request.param),
        select={"ratio": 0.5, "scope": "layer"},
        export={"precisions": ["fp32", "fp16", "int8"]},
        bench={"shapes": [[1, 8], [2, 5]], "min_seconds": 0.05, "threads": 1},
        gates={"size_ratio": 0.99},
    )
    with pytest.MonkeyPatch.context() as patch:
        steady(patch)
        ended = run(recipe, home / "out")
    assert ended.code == 0, ended.err
    return home / "out"


def test_all_four_files_ship_in_every_precision_beside_the_checkpoint(finished: Path) -> None:
    report = report_of(finished)
    names = {f"{part}{suffix}.onnx" for part in FILES for suffix in ("", "_fp16", "_int8", "_quantized")}
    for side in ("dense", "slim"):
        assert {path.name for path in (finished / side / "onnx").iterdir()} == names
        assert (finished / side / "config.json").is_file()
    assert {f"slim/onnx/{name}" for name in names} < report["files"].keys()
    assert {path.name for path in (finished / "slim").iterdir()} >= {"model.safetensors", "generation_config.json"}
    assert load(finished / "slim").config.model_type == report["model"]["type"]


def test_the_size_is_that_of_the_files_a_client_loads(finished: Path) -> None:
    report = report_of(finished)
    for side in ("dense", "slim"):
        files = [finished / side / "onnx" / f"{part}.onnx" for part in (FILES[0], FILES[3])]
        assert report["model"][side]["bytes"] == sum(path.stat().st_size for path in files)
    (gate,) = report["gates"]
    sizes = [report["model"][side]["bytes"] for side in ("slim", "dense")]
    assert gate["met"] and gate["measured"] == pytest.approx(sizes[0] / sizes[1])


def test_latency_has_rows_for_the_encoder_and_for_a_step_of_the_decoder(finished: Path) -> None:
    report = report_of(finished)
    whisper = report["model"]["type"] == "whisper"
    encoder = [[1], [2]] if whisper else [[1, 8], [2, 5]]
    steps = [[1, 1, 8, 20], [2, 1, 5, 20]] if whisper else [[1, 1, 8, 8], [2, 1, 5, 5]]
    expected = [(p, FILES[0], s) for p in ("fp32",) for s in encoder] + [("fp32", FILES[3], s) for s in steps]
    found = [(row["precision"], row["graph"], row["shape"]) for row in report["latency"]]
    assert found[:4] == expected and len(found) == 12
    assert all(row["flop_speedup"] > 1 for row in report["latency"])
    assert report["model"]["flops_shape"] == ([2] if whisper else [2, 5])
    page = (finished / "report.md").read_text()
    assert "decoder_model_merged, int8, cpu" in page and f"1x1 after 8, encoder {steps[0][3]}" in page


def test_drift_is_measured_on_texts_and_null_with_a_reason_for_sound(finished: Path) -> None:
    report = report_of(finished)
    if report["model"]["type"] == "whisper":
        assert report["drift"] is None and "no built-in sample of recordings" in report["drift_reason"]
        return
    drift = report["drift"]
    assert drift["headline"] == "kl_divergence" and drift["slim"]["kl_divergence"] > 0
    assert 0 <= drift["slim"]["top1_agreement"] <= 1 and drift["slim"]["perplexity"] is None
    seeds = [figures["kl_divergence"] for figures in drift["random_control"]["figures"]]
    assert drift["beats_random"] == (drift["slim"]["kl_divergence"] < min(seeds))
    assert "KL divergence" in (finished / "report.md").read_text()


def test_the_cards_lines_load_what_ships(finished: Path) -> None:
    report = report_of(finished)
    card = (finished / "slim" / "README.md").read_text()
    whisper = report["model"]["type"] == "whisper"
    client = "ORTModelForSpeechSeq2Seq" if whisper else "ORTModelForSeq2SeqLM"
    assert f"model = {client}.from_pretrained" in card
    assert "slimheads.load" in card and report["model"]["reload"] == "slimheads"
    assert f'pipeline_tag: "{task_of(report["model"]["type"])}"' in card
    if not whisper:
        model = ORTModelForSeq2SeqLM.from_pretrained(finished / "slim")
        inputs = AutoTokenizer.from_pretrained(finished / "slim")(["the of and"], return_tensors="pt")
        inputs.pop("token_type_ids", None)
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        expected = load(finished / "slim").generate(**inputs, **options)
        assert torch.equal(torch.as_tensor(model.generate(**inputs, **options)), expected)


def test_the_decoders_step_is_really_timed_with_its_caches(finished: Path) -> None:
    report = report_of(finished)
    positions = 20 if report["model"]["type"] == "whisper" else 12
    dense, slim = (finished / side / "onnx" / "decoder_model_merged.onnx" for side in ("dense", "slim"))
    (row,) = bench(dense, slim, shapes=[(2, 1, 9, positions)], min_seconds=0.02, min_pairs=10, graph="decoder")
    assert row.graph == "decoder" and row.speedup is not None and row.dense is not None


def test_drift_is_that_of_a_loop_over_single_texts(tmp_path: Path) -> None:
    """Every text alone, its answer by plain generation, and the two models' next words one after the other."""
    folder, texts = checkpoint("bart"), ["the of and to", "a", "in is that it for as with on the of and a to in"]
    (tmp_path / "own.txt").write_text("\n".join(texts))
    recipe = write_recipe(tmp_path / "r.yaml", folder, verify={"text": "own.txt"})
    with pytest.MonkeyPatch.context() as patch:
        steady(patch)
        assert run(recipe, tmp_path / "out").code == 0
    found = report_of(tmp_path / "out")["drift_text"]
    dense, slim, tokenizer = load(folder), load(tmp_path / "out" / "slim"), AutoTokenizer.from_pretrained(folder)
    divergences, agreed = [], []
    for text in read_texts(tmp_path / "own.txt"):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        answer = dense.generate(
            ids, max_new_tokens=32, do_sample=False, num_beams=1, eos_token_id=2, forced_eos_token_id=None
        )
        for place in range(1, answer.shape[1]):
            with torch.no_grad():
                p, q = (m(input_ids=ids, decoder_input_ids=answer[:, :place]).logits[0, -1] for m in (dense, slim))
            p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
            divergences.append((p.exp() * (p - q)).sum().item())
            agreed.append((p.argmax() == q.argmax()).item())
    assert found["tokens"] == len(divergences) and found["texts"] == 3
    assert found["slim"]["kl_divergence"] == pytest.approx(sum(divergences) / len(divergences), rel=1e-3)
    assert found["slim"]["top1_agreement"] == pytest.approx(sum(agreed) / len(agreed))
