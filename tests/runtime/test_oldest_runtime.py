"""Every kind of graph on the oldest ONNX Runtime that is allowed, against what the installed one computes.

The other release lives in an environment that the test makes; without an index to install from, it is skipped.
"""

from __future__ import annotations

import re
import subprocess
import tomllib
import venv
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest
from tiny import task_of, tiny_model

from slimheads.exporting.export import export
from slimheads.exporting.graph_forms import build_form
from slimheads.names import GraphForm
from slimheads.runtime.graph_inputs import inputs_for
from slimheads.runtime.onnx_signature import read_interface
from slimheads.runtime.sessions import ORT_ERRORS, open_session

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
MODELS = ("bert", "gpt2", "llama", "gemma2", "t5")
CANDIDATES = [name for name in get_args(GraphForm) if name != "plain"]
# What another release may compute otherwise, as a share of the largest output: the order of additions; in float16 also
# which results are rounded, and in int8 how activations are.
TOLERANCES = {"fp16": 1e-2, "int8": 2e-2, "q4": 2e-2, "fp32": 1e-4}
RUN = """
import sys, numpy, onnxruntime
assert onnxruntime.__version__.startswith(sys.argv[1] + "."), onnxruntime.__version__
for path in sys.argv[2:]:
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        outputs = session.run(None, dict(numpy.load(path + ".fed.npz")))
    except Exception as error:
        print(path, "FAILED", " ".join(str(error).split()))
        continue
    numpy.savez(path + ".old.npz", **dict(zip([o.name for o in session.get_outputs()], outputs)))
"""


def oldest() -> str:
    """The least release that the package asks for, as "1.24"."""
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    (found,) = (match[1] for line in asked if (match := re.match(r"onnxruntime\s*>=\s*([\d.]+)", line)))
    return str(found)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with that release and numpy."""
    home = tmp_path_factory.mktemp("oldest")
    venv.create(home, with_pip=True)
    interpreter = home / "bin" / "python"
    install = [str(interpreter), "-m", "pip", "install", "--quiet", f"onnxruntime=={oldest()}.*", "numpy"]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"onnxruntime {oldest()} cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
    return interpreter


def graphs(model_type: str, folder: Path) -> Iterator[Path]:
    """Every graph that could ship of a model: each precision of each file, and each candidate that runs here."""
    model = tiny_model(model_type)
    export(model, folder, task=task_of(model_type), precisions=["fp32", "fp16", "int8", "q4"])
    yield from sorted(folder.glob("*.onnx"))
    plain = folder / "model.onnx"
    for name in CANDIDATES if plain.is_file() else ():
        target = folder / f"model-{name}.onnx"
        if build_form(name, plain, target, model.config) is None:
            yield target


@cache
def fed(path: Path) -> dict[str, np.ndarray]:
    interface = read_interface(path)
    past = 3 if any(i.is_cache for i in interface.inputs) else 0
    return dict(inputs_for(interface, 2, 5, past, 0, 7))


def outputs_here(path: Path) -> dict[str, np.ndarray] | None:
    """What the installed release computes; None where it cannot run a graph, which the certificate refuses then."""
    session = open_session(path)
    try:
        outputs = session.run(None, fed(path))
    except ORT_ERRORS:
        return None
    return dict(zip([output.name for output in session.get_outputs()], outputs, strict=True))


@pytest.mark.parametrize("model_type", MODELS)
def test_every_graph_runs_alike_on_the_oldest_release(model_type: str, python: Path, tmp_path: Path) -> None:
    here = {path: made for path in graphs(model_type, tmp_path) if (made := outputs_here(path)) is not None}
    assert {path for path in tmp_path.glob("*.onnx") if "-" not in path.name} <= here.keys()  # all but the candidates
    for path in here:
        np.savez(f"{path}.fed.npz", **fed(path))
    done = subprocess.run([python, "-c", RUN, oldest(), *here], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
    for path, expected in here.items():
        precision = path.stem.rpartition("_")[2]
        tolerance = TOLERANCES.get(precision, TOLERANCES["fp32"])
        found = np.load(f"{path}.old.npz")
        for name, array in expected.items():
            off = np.abs(array.astype(np.float64) - found[name]).max(initial=0.0)
            assert off <= tolerance * np.abs(array).max(initial=1.0), (path.name, name)


def test_norms_square_in_float32(tmp_path: Path) -> None:
    """Llamas have activations of some hundreds, whose squares float16 cannot hold."""
    for model_type in ("llama", "gemma2"):
        export(tiny_model(model_type), tmp_path, task="text-generation", precisions=["fp32", "fp16"])
        graph = onnx.shape_inference.infer_shapes(onnx.load(str(tmp_path / "model_fp16.onnx"))).graph
        types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
        inner = [node for node in graph.node if node.op_type in ("Pow", "ReduceMean", "Sqrt")]
        assert inner and {types[name] for node in inner for name in node.output} == {onnx.TensorProto.FLOAT}
        assert onnx.TensorProto.FLOAT16 in types.values()


def test_no_file_asks_for_more_than_the_oldest_release_reads(tmp_path: Path) -> None:
    """Each release reads files up to some IR version: the least is far below what the installed onnx could write."""
    for path in graphs("llama", tmp_path):
        assert onnx.load(str(path)).ir_version <= 10, path.name
