"""What the central tests prove of each model type, gathered from those that passed: `pytest --evidence=FILE`.

A test that takes `prove` is marked `evidence`. What it says with `prove(section, **facts)` travels in its report, from
parallel workers too, and counts if the test passed. A model type that fails one of them is left out altogether; a
session that broke off writes nothing.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import type_of

from slimheads.families.evidence import SECTIONS, Evidence, TypeEvidence, digest
from slimheads.families.family import families
from slimheads.runtime.environment import installed

VERSIONED = ("onnxruntime", "optimum-onnx", "torch", "transformers")
_SIZES = ("max_abs", "max_rel")  # of several proofs of the same, the largest counts
_PROPERTY = "evidence"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--evidence", type=Path, metavar="FILE", help="write what was proved of each model type")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--evidence")
    if path is None or hasattr(config, "workerinput"):
        return
    if config.getoption("keyword") or config.getoption("markexpr") != "evidence":
        raise pytest.UsageError("--evidence is of all tests marked so: give it with -m evidence, and without -k")
    config.pluginmanager.register(_Gatherer(path))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "prove" in getattr(item, "fixturenames", ()):
            item.add_marker("evidence")


@pytest.fixture
def prove(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`prove(section, **facts)` records what this test found about its model type, as a proof of that section."""
    parameters = request.node.callspec.params
    names = ("model_type", "variety", "exported_type", "exported_variant", "exported_decoder")
    (variety,) = (parameters[name] for name in names if name in parameters)
    model_type = type_of(variety)
    facts: list[Any] = []
    request.node.user_properties.append((_PROPERTY, {"model_type": model_type, "facts": facts}))

    def record(section: str, **found: Any) -> None:
        facts.append([section, SECTIONS[section].model_validate(found).model_dump(mode="json")])

    return record


class _Gatherer:
    """Listens to every report of the session and writes the file at its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.whole = True
        self.failed: set[str] = set()
        self.tests: dict[str, Counter[str]] = defaultdict(Counter)
        self.facts: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.whole = self.whole and not report.failed

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, said in report.user_properties:
            if name != _PROPERTY:
                continue
            if report.failed:
                self.failed.add(said["model_type"])
            elif report.when == "call" and report.passed:
                self.tests[said["model_type"]][report.nodeid.partition("[")[0]] += 1
                self.facts[said["model_type"]] += said["facts"]

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self.whole = self.whole and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        if not self.whole:
            return
        proven = {t: self._of(t, name) for t, name in _covered() if t in self.tests and t not in self.failed}
        versions = {name: installed(name) or "none" for name in VERSIONED}
        self.path.write_text(Evidence(versions=versions, model_types=proven).to_json(), encoding="utf-8")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self.whole:
            terminalreporter.line("evidence: not written, for not every test was run")
            return
        lacking = sorted({t for t, _ in _covered()} - (self.tests.keys() - self.failed))
        without = f", without {', '.join(lacking)}" if lacking else ""
        terminalreporter.line(f"evidence: {self.path}{without}")

    def _of(self, model_type: str, family: str) -> TypeEvidence:
        sections: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for section, fact in self.facts[model_type]:
            _merge(sections[section], fact)
        return TypeEvidence.model_validate(
            {"family": family, "digest": digest(families()[family]), "tests": self.tests[model_type]}
            | {section: sorted(map(_rounded, found), key=json.dumps) for section, found in sections.items()}
        )


def _covered() -> Iterator[tuple[str, str]]:
    yield from ((model_type, name) for name, family in families().items() for model_type in family.model_types)


def _merge(found: list[dict[str, Any]], fact: dict[str, Any]) -> None:
    def what(proof: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in proof.items() if key not in _SIZES}

    same = next((other for other in found if what(other) == what(fact)), None)
    if same is None:
        found.append(dict(fact))
    else:
        same.update({key: max(same[key], fact[key]) for key in _SIZES if key in fact})


def _rounded(value: Any) -> Any:
    """Two significant digits, so that another machine's last bits change little."""
    if isinstance(value, float):
        return float(f"{value:.2g}")
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list) else value
