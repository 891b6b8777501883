"""GraphForm graphs: what is built of each family, and that a form which computes something else may not ship."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnxruntime.transformers.fusion_options import FusionOptions
from onnxruntime.transformers.optimizer import optimize_model
from shipped import Shipped, ship
from tiny import DECODERS, task_of
from transformers import PreTrainedModel
from whole_runs import checkpoint, report_of, slimheads, steady, write_recipe

from slimheads.exporting import graph_files
from slimheads.exporting import graph_forms as candidates
from slimheads.exporting.export import export
from slimheads.exporting.graph_forms import build_form
from slimheads.models.checkpoint import find
from slimheads.names import GraphForm
from slimheads.pipeline.assemble import Circumstances, assemble
from slimheads.pipeline.finished import Finished
from slimheads.pipeline.run_models import RunModels
from slimheads.pipeline.stages import export as export_stage
from slimheads.pipeline.stages.export import SIDES, Exported
from slimheads.pipeline.stages.verify import Verified
from slimheads.pruning.plan import Plan
from slimheads.pruning.surgery import prune
from slimheads.recipe.recipe import Recipe
from slimheads.report.model import Report
from slimheads.runtime.onnx_signature import nodes_of, read_interface
from slimheads.verification.certificate import Certificate

SLOW = pytest.mark.slow
NAMES: tuple[GraphForm, ...] = ("optimized", "attention", "fused", "rewritten")
# A spread of how attention, norms, positions and caches are written.
TYPES = [
    *("bert", "llama", "vit", "wav2vec2"),
    *(pytest.param(name, marks=SLOW) for name in ("albert", "megatron-bert", "deberta", "gpt2", "bloom", "clip")),
]
# Forms that the tools make and ONNX Runtime does not run at some shape: nobody but the certificate says so.
BROKEN = (
    pytest.param("gemma", "fused", marks=SLOW),
    pytest.param("nemotron", "fused", marks=SLOW),
    ("siglip_vision_model", "rewritten"),
)


def build(made: Shipped, name: GraphForm) -> dict[str, str | None]:
    """Builds a candidate of both sides where a run has it; side -> why there is none."""
    reasons = {}
    for side in ("dense", "slim"):
        folder = made.root / "candidates" / name / side
        (folder / "onnx").mkdir(parents=True)
        plain = made.root / side / "onnx" / "model.onnx"
        reasons[side] = build_form(name, plain, folder / "onnx" / "model.onnx", made.dense.config)
        (folder / "config.json").write_bytes((made.folder / "config.json").read_bytes())
    return reasons


def prove(made: Shipped, *names: GraphForm) -> Certificate:
    return made.certificate(candidates={name: made.root / "candidates" / name for name in names})


def attention_of(path: Path) -> list[int]:
    """The head counts of all fused attention nodes."""
    nodes = nodes_of(onnx.load(str(path)).graph)
    return [a.i for node in nodes if node.op_type == "Attention" for a in node.attribute if a.name == "num_heads"]


@pytest.fixture
def made_of(shipped: Callable[..., Shipped], tmp_path: Path) -> Callable[[str], Shipped]:
    """`made_of(model_type)`: dense and slim graphs, pruned by a plan over all kinds; free to be changed."""
    return lambda model_type: shipped(model_type).copied(tmp_path / "run")


@pytest.mark.parametrize("model_type", TYPES)
def test_every_form_of_a_graph_is_built_and_holds(model_type: str, made_of: Callable[[str], Shipped]) -> None:
    made = made_of(model_type)
    for name in NAMES:
        assert build(made, name) == {"dense": None, "slim": None}
        for side in ("dense", "slim"):
            before = onnx.load(str(made.root / side / "onnx" / "model.onnx"))
            after = onnx.load(str(made.root / "candidates" / name / side / "onnx" / "model.onnx"))
            assert list(after.graph.input) == list(before.graph.input)
            assert list(after.graph.output) == list(before.graph.output)
            assert list(after.metadata_props) == list(before.metadata_props)
            assert len(list(nodes_of(after.graph))) < len(list(nodes_of(before.graph)))
            used = {node.domain for node in nodes_of(after.graph)}
            assert {opset.domain for opset in after.opset_import} <= used | {""}
    found = prove(made, *NAMES)
    assert found.passed
    for proof in found.forms:
        assert proof.passed, proof.reason
        numbers = [3, 3, 4, 4, *[5] * (model_type in DECODERS)]
        assert [link.link for link in proof.links] == numbers and all(link.cases for link in proof.links)


@pytest.mark.parametrize(
    "model_type,name",
    [
        ("bert", "attention"),
        ("bert", "fused"),
        ("albert", "attention"),
        ("albert", "fused"),
        ("megatron-bert", "fused"),
    ],
)
def test_attention_is_fused_with_each_layers_own_head_count(
    model_type: str, name: GraphForm, shipped: Callable[..., Shipped], tmp_path: Path
) -> None:
    made = shipped(model_type, kinds=("attention", "feed_forward")).copied(tmp_path / "run")
    build(made, name)
    paths = {side: made.root / "candidates" / name / side / "onnx" / "model.onnx" for side in ("dense", "slim")}
    counts = {side: attention_of(path) for side, path in paths.items()}
    norms = {node.op_type for node in nodes_of(onnx.load(str(paths["slim"])).graph) if "LayerNorm" in node.op_type}
    assert ("SkipLayerNormalization" in norms) == (name == "fused") and norms
    assert set(counts["dense"]) == {4}
    assert len(counts["dense"]) == len(counts["slim"])
    kept = {len(site.kept) for site in made.plan.of_kind("attention").sites}
    assert set(counts["slim"]) <= kept and len(set(counts["slim"])) > 1


@pytest.mark.parametrize("model_type,name", BROKEN)
def test_a_form_that_does_not_run_is_refused_and_nothing_else_with_it(
    model_type: str, name: GraphForm, made_of: Callable[[str], Shipped]
) -> None:
    made = made_of(model_type)
    assert build(made, name) == {"dense": None, "slim": None}
    build(made, "optimized")
    found = prove(made, name, "optimized")
    assert found.passed and found.error() is None
    refused, other = found.forms
    assert (refused.candidate, refused.passed, other.passed) == (name, False, True)
    assert refused.reason and refused.reason.startswith("link 3 (") and "does not run" in refused.reason


def stamped(path: Path, heads: int, hidden: int) -> onnx.ModelProto:
    """What optimum's ORTOptimizer and Olive do: the configuration's head count is handed to the tool."""
    made: onnx.ModelProto = optimize_model(
        str(path), "clip", num_heads=heads, hidden_size=hidden, optimization_options=FusionOptions("clip"), opt_level=0
    ).model
    return made


def test_the_dense_head_count_stamped_on_a_slim_graph_is_refused_by_links_3_and_4(
    tiny: Callable[..., PreTrainedModel], ragged: Callable[..., Plan], tmp_path: Path
) -> None:
    """The tool's fusion of CLIP takes the count as it is given, and ONNX Runtime runs what comes of it."""
    task, dense = "feature-extraction", tiny("clip_vision_model", attn_implementation="eager")
    made = ship(dense, ragged(dense, kinds=("attention",)), tmp_path, task=task)
    export(prune(copy.deepcopy(dense), made.plan), made.folder / "onnx", task=task)  # eager too
    for side in ("dense", "slim"):
        path = tmp_path / "candidates" / "fused" / side / "onnx" / "model.onnx"
        path.parent.mkdir(parents=True)
        onnx.save(stamped(tmp_path / side / "onnx" / "model.onnx", 4, 32), str(path))
        assert attention_of(path) == [4, 4, 4]
    found = prove(made, "fused")
    (proof,) = found.forms
    assert found.passed and not proof.passed
    assert [(link.link, link.passed) for link in proof.links] == [(3, True), (3, False), (4, True), (4, False)]
    assert proof.reason and proof.reason.startswith("link 3 (onnx/model.onnx (fused)): ")
    wrong = next(site for site in made.plan.sites if len(site.kept) != 4)
    assert f"of {wrong.site} says num_heads 4, the plan {len(wrong.kept)}" in str(proof.links[3].reason)
    assert not found.with_form("fused").passed


def test_a_wrong_count_in_the_dense_graph_is_refused_too(made_of: Callable[[str], Shipped]) -> None:
    made = made_of("bert")
    build(made, "fused")
    path = made.root / "candidates" / "fused" / "dense" / "onnx" / "model.onnx"
    proto = onnx.load(str(path))
    attention = next(node for node in proto.graph.node if node.op_type == "Attention")
    next(a for a in attention.attribute if a.name == "num_heads").i = 2
    onnx.save(proto, str(path))
    (proof,) = prove(made, "fused").forms
    assert [(link.link, link.passed) for link in proof.links] == [(3, False), (3, True), (4, False), (4, True)]
    assert proof.reason and "dense/onnx/model.onnx (fused)" in proof.reason


def test_other_tokens_are_refused_by_link_5(made_of: Callable[[str], Shipped], monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_of("gpt2")
    build(made, "optimized")
    path = made.root / "candidates" / "optimized" / "slim" / "onnx" / "model.onnx"
    proto = onnx.load(str(path))
    swap = {"present.1.key": "present.1.value", "present.1.value": "present.1.key"}
    for node in proto.graph.node:
        for names in (node.input, node.output):
            names[:] = [swap.get(name, name) for name in names]
    onnx.save(proto, str(path))
    (proof,) = prove(made, "optimized").forms
    assert [link.link for link in proof.links if not link.passed] == [3, 5]


def test_what_ships_with_a_candidate_is_proved_by_both_graphs_links(made_of: Callable[[str], Shipped]) -> None:
    made = made_of("bert")
    build(made, "fused")
    found = prove(made, "fused")
    whole = found.with_form("fused")
    assert whole.passed and found.with_form("plain") is found
    assert [(link.link, link.subject) for link in whole.links] == [
        (1, "model.safetensors"),
        (2, "onnx/model.onnx (plain)"),
        (4, "onnx/model.onnx (plain)"),
        (3, "dense/onnx/model.onnx (fused)"),
        (3, "onnx/model.onnx (fused)"),
        (4, "dense/onnx/model.onnx (fused)"),
        (4, "onnx/model.onnx (fused)"),
    ]
    assert [skipped.link for skipped in found.skipped] == [3, 5] and [s.link for s in whole.skipped] == [5]
    with pytest.raises(KeyError):
        found.with_form("rewritten")


# ---------------------------------------------------------------------------------------------- what is not built


def test_a_tool_that_breaks_down_leaves_its_error_as_the_reason_and_nothing_else(
    made_of: Callable[[str], Shipped], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = made_of("distilbert")

    def broken(*_: Any, **__: Any) -> Any:
        print("failed in shape inference")
        raise AssertionError("no such node\nand more")

    monkeypatch.setattr(candidates, "optimize_model", broken)
    assert build(made, "fused")["slim"] == "it could not be made (AssertionError: no such node)"
    assert capsys.readouterr().out == ""
    assert list((made.root / "candidates" / "fused" / "slim" / "onnx").iterdir()) == []


def test_a_form_that_changes_nothing_is_none(made_of: Callable[[str], Shipped], tmp_path: Path) -> None:
    made = made_of("distilbert")
    build(made, "optimized")
    once = made.root / "candidates" / "optimized" / "slim" / "onnx" / "model.onnx"
    assert build_form("optimized", once, tmp_path / "model.onnx", made.dense.config) == (
        "it changes nothing in this graph"
    )
    assert not (tmp_path / "model.onnx").exists()


def test_a_form_without_one_of_the_outputs_is_none(
    made_of: Callable[[str], Shipped], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = made_of("gpt2")
    real = optimize_model

    def forgetful(*args: Any, **options: Any) -> Any:
        optimized = real(*args, **options)
        del optimized.model.graph.output[-1]
        return optimized

    monkeypatch.setattr(candidates, "optimize_model", forgetful)
    assert build(made, "fused")["slim"] == "it removes inputs or outputs of the graph"


def test_an_encoder_decoder_has_none(tiny: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    for name in NAMES:
        reason = build_form(name, tmp_path / "a.onnx", tmp_path / "b.onnx", tiny("t5").config)
        assert reason and reason.startswith("an encoder-decoder ships as four graphs")


@pytest.mark.parametrize("model_type", ["bert", pytest.param("llama", marks=SLOW)])
def test_weights_beside_the_graph_stay_beside_it(
    model_type: str,
    tiny: Callable[..., PreTrainedModel],
    ragged: Callable[..., Plan],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_ONNX_EXTERNAL_DATA", "1")
    monkeypatch.setattr(graph_files, "ONE_FILE", 1000)
    dense = tiny(model_type)
    made = ship(dense, ragged(dense), tmp_path, task=task_of(model_type))
    for name in NAMES:
        assert build(made, name) == {"dense": None, "slim": None}
        folder = made.root / "candidates" / name / "slim" / "onnx"
        assert {path.name for path in folder.iterdir()} == {"model.onnx", "model.onnx_data"}
        assert read_interface(folder / "model.onnx").kv_shapes == read_interface(made.onnx()).kv_shapes
    assert all(proof.passed for proof in prove(made, *NAMES).forms)


# --------------------------------------------------------------------------------------------------- in a whole run


def test_a_run_tries_every_candidate_and_keeps_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steady(monkeypatch)
    found: list[tuple[Exported, Verified]] = []

    def watched(run: Finished, circumstances: Circumstances) -> Report:
        found.append((run.exported, run.verified))
        return assemble(run, circumstances)

    monkeypatch.setattr("slimheads.pipeline.run.assemble", watched)
    recipe = write_recipe(tmp_path / "r.yaml", export={"candidates": ["plain", *NAMES]})
    ended = slimheads("run", recipe, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    ((exported, verified),) = found
    assert exported.forms == dict.fromkeys(NAMES)
    for form, side in product(("plain", *NAMES), SIDES):
        path = exported.onnx(side, "fp32", form=form)
        assert path.is_file() and (path.parent.parent / "config.json").is_file()
    again = Verified.model_validate_json(verified.model_dump_json())
    assert [(proof.candidate, proof.passed, proof.reason) for proof in again.certificate.forms] == [
        (name, True, None) for name in NAMES
    ]
    assert not (tmp_path / "out" / "slim" / "candidates").exists()
    assert report_of(tmp_path / "out")["verdict"]["ok"]


def test_a_candidate_that_one_side_lacks_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_dense(name: str, plain: Path, target: Path, _config: Any) -> str | None:
        target.write_bytes(plain.read_bytes())
        return "it went wrong" if plain.parent.parent.name == "slim" else None

    monkeypatch.setattr(export_stage, "build_form", only_dense)
    recipe = Recipe.read(write_recipe(tmp_path / "r.yaml", export={"candidates": ["plain", "fused"]}))
    for side in SIDES:
        (tmp_path / "work" / side / "onnx").mkdir(parents=True)
        (tmp_path / "work" / side / "onnx" / "model.onnx").write_bytes(b"graph")
    work = export_stage._Work(recipe.export, RunModels(find(str(checkpoint()))), tmp_path, tmp_path / "work", print)
    assert work._form("fused") == "slim: it went wrong"
    assert not (tmp_path / "work" / "candidates" / "fused").exists()
