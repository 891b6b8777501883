"""The list of families says what the tests proved, and "not proven" of everything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from whole_runs import slimheads

from slimheads.errors import UsageError
from slimheads.families import evidence as packaged
from slimheads.families import support
from slimheads.families.evidence import Evidence, digest, evidence
from slimheads.families.family import families
from slimheads.families.support import FamilySupport, shortfall, supported_families
from slimheads.report.families_page import render_families

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parents[2]
COVERED = {model_type: family for family in families().values() for model_type in family.model_types}
LINKS = [
    {"link": 1, "subject": "model.safetensors", "cases": 8, "max_abs": 2e-7, "max_rel": 1e-7},
    {"link": 3, "subject": "onnx/model_int8.onnx", "cases": 8, "max_abs": 0.5, "max_rel": 0.02},
    {"link": 4, "subject": "onnx/model.onnx", "cases": 12, "max_abs": None, "max_rel": None},
]
PROOFS: dict[str, Any] = {
    "certificate": [{"task": "feature-extraction", "units": ["head", "neuron", "layer"], "links": LINKS}],
    "gated": [
        {"implementation": "eager", "dtype": "float64", "max_abs": 4e-16},
        {"implementation": "sdpa", "dtype": "float64", "max_abs": 5e-16, "variant": "width: 3"},
    ],
    "tasks": [{"task": "fill-mask", "max_abs": 0.0}],
    "reload": [{"counts": "ragged", "tier": "slimheads"}, {"counts": "equal", "tier": "stock"}],
    "scores": [{"dtype": "float32", "max_rel": 1e-8}],
}
SUITE = """
import pytest

@pytest.mark.parametrize("model_type", ["bert", "roberta", "gpt2"])
@pytest.mark.parametrize("dtype,size", [("float32", 1.2345e-7), ("float32", 3.4567e-7), ("float64", 0.0)])
def test_one(model_type, dtype, size, prove):
    prove("scores", dtype=dtype, max_rel=size)
    if dtype == "float64" and model_type == "roberta":
        pytest.fail("not equal")
    if dtype == "float64" and model_type == "gpt2":
        pytest.skip("not for it")

def test_other():
    assert False, "takes no part"
"""


@pytest.fixture
def believe(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`believe(bert={...})`: the evidence holds these model types and no others."""

    def put(**model_types: dict[str, Any]) -> None:
        made = Evidence.model_validate({"versions": {"torch": "2"}, "model_types": model_types})
        monkeypatch.setattr(support, "evidence", lambda: made)

    return put


def proven(**changes: Any) -> dict[str, Any]:
    return {"family": "bert", "digest": digest(families()["bert"]), "tests": {"tests/a.py::b": 7}} | PROOFS | changes


def row_of(name: str) -> FamilySupport:
    return next(row for row in supported_families() if row.family == name)


# ------------------------------------------------------------------------------------------- what is in the repository


def test_every_covered_model_type_is_proven_as_its_family_file_stands() -> None:
    shortfalls = {t: reason for t, family in COVERED.items() if (reason := shortfall(t, family))}
    assert not shortfalls, "run `make families`"


def test_the_evidence_names_no_model_type_that_is_not_covered() -> None:
    assert evidence().model_types.keys() <= COVERED.keys(), "run `make families`"


def test_the_page_is_what_the_evidence_gives() -> None:
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert page == render_families(supported_families(), evidence().versions), "run `make families`"


def test_the_evidence_is_written_as_it_is_written_anew() -> None:
    """Edited by hand, or in another order, it would be."""
    text = packaged.EVIDENCE.read_text(encoding="utf-8")
    assert Evidence.model_validate_json(text).to_json() == text


# ------------------------------------------------------------------------------------------------------ what it says


def test_a_row_says_what_was_proven_and_how_far_off_the_worst_was(believe: Callable[..., None]) -> None:
    believe(bert=proven())
    row = row_of("bert")
    assert row.tasks == ("fill-mask",) and row.reload == "stock with equal head counts; slimheads"
    assert row.variants == {"bert": ("width: 3",)}
    assert row.evidence.keys() == {"bert"}
    found = row.evidence["bert"]
    assert found.links == {"1": 2e-7, "3 int8": 0.02, "4": None}
    assert found.gated == {"float64": 5e-16} and found.tests == {"tests/a.py::b": 7}
    page = render_families([row], {"torch": "2"})
    assert "| `bert` | head, neuron, layer | 5e-16 | 2e-07 | 0.02 | held | 7 |" in page
    assert "| `roberta` | not proven: no evidence |" in page


@pytest.mark.parametrize(
    "changes,reason",
    [
        ({"digest": "0123456789abcdef"}, "its family file changed since"),
        ({"gated": []}, "no proof of gated"),
        ({"certificate": [], "scores": []}, "no proof of certificate, scores, deleted heads, deleted layers, deleted neurons"),
    ],
)
def test_what_is_not_proven_is_said_to_be_so(
    believe: Callable[..., None], changes: dict[str, Any], reason: str
) -> None:
    believe(bert=proven(**changes), roberta=proven())
    assert shortfall("bert", families()["bert"]) == reason and shortfall("roberta", families()["bert"]) is None
    assert row_of("bert").not_proven["bert"] == reason
    data, people = slimheads("families", "--json"), slimheads("families")
    (row,) = (row for row in data.json if row["family"] == "bert")
    assert "bert" not in row["evidence"] and "roberta" in row["evidence"]
    page = " ".join(people.out.split())
    assert f" bert bert head neuron layer not proven: {reason}" in page and " roberta bert head neuron layer 7 tests" in page
    assert " distilbert distilbert head neuron layer not proven: no evidence" in page


def test_a_digest_is_of_what_is_said_of_the_model_type() -> None:
    family = families()["bert"]
    said = digest(family)
    assert digest(family.model_copy(update={"title": "Another", "model_types": ("bert",)})) == said
    site = family.sites[0]
    for change in ({"reload": None}, {"sites": (site.model_copy(update={"keep": ()}),)}):
        assert digest(family.model_copy(update=change)) != said


def test_damaged_evidence_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "evidence.json"
    path.write_text('{"format": 1}')
    monkeypatch.setattr(packaged, "EVIDENCE", path)
    with pytest.raises(UsageError, match="damaged evidence") as refused:
        evidence.__wrapped__()
    assert refused.value.where == str(path)
    path.unlink()
    assert evidence.__wrapped__().model_types == {}


# --------------------------------------------------------------------------------------------------- how it is gathered


@pytest.mark.parametrize("workers", [(), pytest.param(("-n", "1"), marks=pytest.mark.slow)], ids=["here", "in workers"])
def test_only_what_passed_is_written_and_the_largest_difference_counts(
    workers: tuple[str, ...], pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests/support'}")
    pytester.makepyfile(SUITE)
    options = ("-p", "evidence", "-m", "evidence", "--evidence", "out.json", *workers)
    ended = (pytester.runpytest_subprocess if workers else pytester.runpytest_inprocess)(*options)
    ended.assert_outcomes(passed=7, failed=1, skipped=1, deselected=0 if workers else 1)
    text = (pytester.path / "out.json").read_text(encoding="utf-8")
    data = json.loads(text)
    assert data["model_types"].keys() == {"bert", "gpt2"}
    assert data["versions"].keys() == {"torch", "transformers", "optimum-onnx", "onnxruntime"}
    bert, gpt2 = (data["model_types"][t] for t in ("bert", "gpt2"))
    assert bert["scores"] == [{"dtype": "float32", "max_rel": 3.5e-7}, {"dtype": "float64", "max_rel": 0.0}]
    assert [proof["dtype"] for proof in gpt2["scores"]] == ["float32"]
    assert bert["digest"] == digest(families()["bert"])
    assert list(bert["tests"].values()) == [3] and list(gpt2["tests"].values()) == [2]
    ended.stdout.fnmatch_lines(["evidence: out.json, without *roberta*"])


@pytest.mark.parametrize("workers", [(), pytest.param(("-n", "1"), marks=pytest.mark.slow)], ids=["here", "in workers"])
def test_a_session_that_did_not_run_every_test_writes_nothing(
    workers: tuple[str, ...], pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests/support'}")
    pytester.makepyfile(test_whole=SUITE, test_broken="import nothing_of_that_name")
    run = pytester.runpytest_subprocess if workers else pytester.runpytest_inprocess
    ended = run("-p", "evidence", "-m", "evidence", "--evidence", "out.json", *workers)
    assert ended.ret != 0 and not (pytester.path / "out.json").exists()
    ended.stdout.fnmatch_lines(["evidence: not written*"])


@pytest.mark.parametrize("options", [("-m", "evidence", "-k", "bert"), ()], ids=str)
def test_evidence_of_a_selection_is_refused(options: tuple[str, ...], pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SUITE)
    ended = pytester.runpytest_inprocess("-p", "evidence", "--evidence", "out.json", *options)
    ended.stderr.fnmatch_lines(["*--evidence is of all tests marked so*"])
    assert not (pytester.path / "out.json").exists()
