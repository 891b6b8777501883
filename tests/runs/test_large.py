"""Models whose weights do not fit one ONNX file: external data beside every graph, through every stage and client."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path

import onnx
import pytest
import torch
from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForFeatureExtraction
from shipped import ship
from tiny import task_of, tiny_model
from transformers import AutoModel, PreTrainedModel
from whole_runs import checkpoint, report_of, slimheads, steady, visible, write_recipe

from slimheads.exporting import graph_files
from slimheads.exporting.artifacts import file_name, parts_of
from slimheads.exporting.export import export
from slimheads.exporting.precisions import PRECISIONS
from slimheads.exporting.quantize import to_fp16, to_int8
from slimheads.families.sites import find_sites, of_kind
from slimheads.models.checkpoint import read_config
from slimheads.models.loading import load
from slimheads.names import Precision
from slimheads.pruning.plan import Plan
from slimheads.runtime.memory import PeakMemory
from slimheads.runtime.sessions import open_session
from slimheads.verification.parity import cases, compare_all, onnx_runner
from slimheads.verification.precision_proof import FUSED_TOLERANCE
from slimheads.verification.quantized_weights import quantized_faults

pytestmark = pytest.mark.slow
TWO_GB = 2**31
MEMORY_MB = 16_000  # eight times the weights
EVERY = tuple(PRECISIONS)
FILES = [file_name("model", precision) for precision in EVERY]
GRAPHS = {name for graph in FILES for name in (graph, f"{graph}_data")}


@pytest.fixture
def weights_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models are exported as large ones are: by the exporter's own switch, and by our own limit."""
    monkeypatch.setenv("FORCE_ONNX_EXTERNAL_DATA", "1")
    monkeypatch.setattr(graph_files, "ONE_FILE", 1000)


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "bart", "t5"])
@pytest.mark.usefixtures("weights_beside")
def test_all_links_hold_for_graphs_with_external_data(
    model_type: str, tiny: Callable[..., PreTrainedModel], ragged: Callable[..., Plan], tmp_path: Path
) -> None:
    dense = tiny(model_type)
    made = ship(dense, ragged(dense), tmp_path, task=task_of(model_type), precisions=EVERY)
    files = {path.name: path.stat() for path in made.onnx().parent.iterdir()}
    graphs = {file_name(part, precision) for part in parts_of(dense.config) for precision in EVERY}
    assert files.keys() == graphs | {f"{name}_data" for name in graphs}
    assert len({stat.st_mode for stat in files.values()}) == 1
    found = made.certificate(*EVERY[1:])
    assert found.passed, found.error()


@pytest.mark.usefixtures("weights_beside")
def test_exporting_again_replaces_external_data_and_leaves_none_behind(
    tiny: Callable[..., PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    for _ in range(2):
        export(tiny("bert"), tmp_path, task="feature-extraction", precisions=EVERY)
        sizes.append({path.name: path.stat().st_size for path in tmp_path.iterdir()})
    assert sizes[0] == sizes[1] and sizes[0].keys() == GRAPHS
    monkeypatch.undo()
    export(tiny("bert"), tmp_path, task="feature-extraction", precisions=EVERY)
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)


@pytest.mark.parametrize("model_type", ["bert", "llama"])
@pytest.mark.usefixtures("weights_beside")
def test_a_run_publishes_and_counts_external_data(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steady(monkeypatch)
    out = tmp_path / "out"
    recipe = write_recipe(tmp_path / "r.yaml", checkpoint(model_type), export={"precisions": EVERY})
    assert slimheads("run", recipe, "--out", out).code == 0
    report = report_of(out)
    for side in ("dense", "slim"):
        onnx_folder = out / side / "onnx"
        assert visible(onnx_folder) == GRAPHS | {"model_quantized.onnx"}  # reads the int8 file's data
        both = [(onnx_folder / name).stat().st_size for name in ("model.onnx", "model.onnx_data")]
        assert report["model"][side]["bytes"] == sum(both)
        assert report["files"][f"{side}/onnx/model.onnx_data"] == both[1] > 4 * 1000
        for name in (*FILES, "model_quantized.onnx"):
            # Weights that have a second name, a hard link, onnx refuses to load.
            onnx.load(str(onnx_folder / name))
    assert slimheads("run", recipe, "--out", out, "--from", "verify").code == 0  # reads what was published before
    client_class = ORTModelForCausalLM if model_type == "llama" else ORTModelForFeatureExtraction
    client = client_class.from_pretrained(out / "slim")
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with torch.no_grad():
        expected = load(out / "slim")(**batch)[0]
    assert (client(**batch)[0] - expected).abs().max() <= 1e-4


def test_a_checkpoint_in_shards_stays_in_shards(
    tiny: Callable[..., PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers itself splits past 5 GB: `save` leaves the limit to it, so a test can lower it."""
    tiny("bert").save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    steady(monkeypatch)
    monkeypatch.setattr(
        PreTrainedModel, "save_pretrained", partialmethod(PreTrainedModel.save_pretrained, max_shard_size="20KB")
    )
    out = tmp_path / "out"
    ended = slimheads("run", write_recipe(tmp_path / "r.yaml", tmp_path / "dense"), "--out", out)
    assert ended.code == 0 and not ended.complaints, ended.err
    shards = sorted((out / "slim").glob("model-*.safetensors"))
    assert len(shards) > 1 and (out / "slim" / "model.safetensors.index.json").is_file()
    assert not (out / "slim" / "model.safetensors").exists()
    assert {path.stat().st_mode for path in shards} == {(out / "slim" / "config.json").stat().st_mode}
    assert report_of(out)["files"].keys() >= {f"slim/{path.name}" for path in shards}
    once = load(out / "slim")
    assert sum(site.total for site in of_kind(find_sites(once), "attention")) == 6
    stock = AutoModel.from_pretrained(out / "slim").state_dict()
    assert all(torch.equal(stock[name], tensor) for name, tensor in once.state_dict().items())


# ------------------------------------------------------------------------------------- a model really over 2 GB


@pytest.mark.timeout(1800)
def test_a_model_over_2_gb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One test, for two workers building it at once would need more memory than many machines have."""
    steady(monkeypatch)
    out = tmp_path / "out"
    # Large by its vocabulary, which costs no arithmetic.
    changes = {"hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 2, "vocab_size": 1_060_000}
    tiny_model("bert", **changes).save_pretrained(tmp_path / "dense")
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "dense", bench={"shapes": [[1, 8]], "threads": 2})
    try:
        assert slimheads("run", recipe, "--out", out).code == 0
        assert_it_is_proven_and_every_byte_counted(out)
        assert_it_opens_in_unmodified_optimum(out)
        for precision in ("fp16", "int8"):
            assert_it_becomes_smaller_and_stays_itself(out, precision, tmp_path / precision)
    finally:
        shutil.rmtree(tmp_path)  # gigabytes: pytest itself would keep them for three sessions


def assert_it_is_proven_and_every_byte_counted(out: Path) -> None:
    report = report_of(out)
    assert [link["link"] for link in report["certificate"]] == [1, 2, 4]
    assert all(link["passed"] for link in report["certificate"])
    deleted = 4 * (report["model"]["dense"]["parameters"] - report["model"]["slim"]["parameters"])
    assert deleted == 4 * report["model"]["heads"]["removed"] * (4 * 64 * 512 + 3 * 64)
    sizes = {side: report["model"][side]["bytes"] for side in ("dense", "slim")}
    assert min(sizes.values()) > TWO_GB
    assert sizes["dense"] - sizes["slim"] == pytest.approx(deleted, abs=20_000)  # the exporter pads tensors to pages
    for side, size in sizes.items():
        assert visible(out / side / "onnx") == {"model.onnx", "model.onnx_data"}
        assert sum(path.stat().st_size for path in (out / side / "onnx").iterdir()) == size
    weights = (out / "slim" / "model.safetensors").stat().st_size
    assert report["files"]["slim/model.safetensors"] == weights > TWO_GB
    assert report["peak_rss_mb"] < MEMORY_MB


def assert_it_opens_in_unmodified_optimum(out: Path) -> None:
    client = ORTModelForFeatureExtraction.from_pretrained(out / "slim")
    batch = {"input_ids": torch.tensor([[5, 1_059_999, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with torch.no_grad():
        expected = load(out / "slim")(**batch).last_hidden_state
    assert (client(**batch).last_hidden_state - expected).abs().max() <= 1e-4


def assert_it_becomes_smaller_and_stays_itself(out: Path, precision: Precision, folder: Path) -> None:
    memory = PeakMemory()
    folder.mkdir()
    plain, made = out / "slim" / "onnx" / "model.onnx", folder / file_name("model", precision)
    {"fp16": to_fp16, "int8": to_int8}[precision](plain, made)
    assert [path.name for path in folder.iterdir()] == [made.name]
    shrunk = graph_files.graph_bytes(plain) / {"fp16": 2, "int8": 4}[precision]
    assert made.stat().st_size == pytest.approx(shrunk, rel=0.01)
    over = [case for case in cases(read_config(out / "slim"), "feature-extraction") if case.length == 8]
    forms = (onnx_runner(open_session(path), ()) for path in (plain, made))
    tolerance = {"fp16": PRECISIONS["fp16"].tolerance, "int8": FUSED_TOLERANCE}[precision]
    found = compare_all(*forms, over, None, tolerance)
    assert len(found) == 3 and all(outcome.passed for outcome in found)
    if precision == "int8":
        assert not list(quantized_faults(plain, made))
    assert memory.megabytes() < MEMORY_MB
