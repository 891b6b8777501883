"""The recipe: its sections, how it is read and written, and its JSON Schema."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    Strict,
    WithJsonSchema,
)

from slimheads.errors import SlimheadsError, UsageError
from slimheads.names import (
    Counts,
    GraphForm,
    Int8For,
    KvAxes,
    Normalize,
    OnMissing,
    OnWeakPrecision,
    Precision,
    Provider,
    Scope,
    ScoreMethod,
    Task,
)
from slimheads.recipe.dump import dump_value, dump_yaml
from slimheads.strict_yaml import KeyPath, Place, Positions, dotted, parse_value, read_yaml, validate

Item = TypeVar("Item")
DEFAULT_SHAPES = ((1, 16), (1, 128))


def _distinct(items: tuple[Item, ...]) -> tuple[Item, ...]:
    if len(set(items)) < len(items):
        raise ValueError("should not name the same thing twice")
    return items


def _holding(wanted: str) -> AfterValidator:
    def check(items: tuple[str, ...]) -> tuple[str, ...]:
        if wanted not in items:
            raise ValueError(f"should hold {wanted}, which the others are made from")
        return items

    return AfterValidator(check)


def _whole_or_auto(value: object) -> object:
    if value != "auto" and not (type(value) is int and value >= 1):
        raise ValueError("should be auto, or a whole number of at least 1")
    return value


# A tuple may be given as a list (as YAML and callers do); what is inside stays strict.
PathText = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")]
Precisions = Annotated[
    tuple[Precision, ...],
    Strict(False),
    AfterValidator(_distinct),
    _holding("fp32"),
    Field(json_schema_extra={"uniqueItems": True, "contains": {"const": "fp32"}}),
]
Candidates = Annotated[
    tuple[GraphForm, ...],
    Strict(False),
    AfterValidator(_distinct),
    _holding("plain"),
    Field(json_schema_extra={"uniqueItems": True, "contains": {"const": "plain"}}),
]
Providers = Annotated[
    tuple[Provider, ...],
    Strict(False),
    Field(min_length=1, json_schema_extra={"uniqueItems": True}),
    AfterValidator(_distinct),
]
RecipeShape = Annotated[tuple[PositiveInt, ...], Strict(False), Field(min_length=2, max_length=3)]
Shapes = Annotated[
    tuple[RecipeShape, ...],
    Strict(False),
    Field(min_length=1, json_schema_extra={"uniqueItems": True}),
    AfterValidator(_distinct),
]
# Not a plain union, whose errors would name the branch.
Multiple = Annotated[
    int | Literal["auto"],
    PlainValidator(_whole_or_auto),
    WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1}]}),
]
Share = Annotated[float, Field(gt=0, le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Score(_Section):
    """How a head's importance is estimated."""

    method: ScoreMethod = Field("magnitude", description="magnitude: Frobenius norms of the head's weights")


class Select(_Section):
    """Which heads are deleted."""

    ratio: float = Field(
        0.25,
        ge=0,
        lt=1,
        description="share of heads to delete, 0 to below 1: at least one head stays in every site",
    )
    scope: Scope = Field("global", description="global: rank all heads together; layer: the same share in each layer")
    normalize: Normalize = Field("none", description="layer: divide scores by their layer's mean before ranking")
    keep_at_least: PositiveInt = Field(1, description="heads that stay in each layer, at least 1")
    multiple_of: Multiple = Field(
        1, description="kept heads of each layer are a multiple of this; auto: of what is measured to pay"
    )
    counts: Counts = Field("any", description="equal: every layer keeps the same number of heads")
    within_groups: bool = Field(
        False, description="true: where query heads share KV heads, delete query heads and keep every KV head"
    )
    sites: Annotated[str, Field(min_length=1)] = Field(
        "*", description="glob of the attention blocks that may lose heads; the ratio is a share of theirs"
    )


class Recover(_Section):
    """How quality is won back after deletion."""

    method: Literal["none"] = Field("none", description="none: the kept weights stay as they are")


class Export(_Section):
    """Which ONNX graphs are written."""

    precisions: Precisions = Field(("fp32",), description="graphs to write: fp32 (always), fp16, int8, q4 (4 bits)")
    candidates: Candidates = Field(
        ("plain", "optimized", "attention", "fused", "rewritten"),
        description="forms of the fp32 graph to try; plain is always made",
    )
    int8_for: Int8For = Field(
        "any",
        description="CPUs that int8 is right on: any, avx2 (weights of 7 bits), avx512_vnni, arm64 (8 bits)",
    )
    on_weak_precision: OnWeakPrecision = Field(
        "fail", description="a precision that loses too much: fail ends with code 4, drop leaves it out"
    )
    kv_axes: KvAxes = Field(
        "symbolic", description="decoders: symbolic for optimum and transformers.js, static for onnxruntime-genai"
    )


class Verify(_Section):
    """How close slim torch and slim ONNX must be, and on what drift is measured."""

    atol: PositiveFloat = Field(1e-4, description="absolute tolerance of torch against ONNX, above 0")
    rtol: PositiveFloat = Field(1e-4, description="relative tolerance of torch against ONNX, above 0")
    text: PathText | None = Field(
        None, description="UTF-8 file, one text a line: drift is measured on it besides the built-in sample"
    )
    inputs: PathText | None = Field(
        None,
        description="models fed images or sound: safetensors file of inputs by name to measure drift on",
    )


class Bench(_Section):
    """How latency is measured, dense against slim."""

    providers: Providers = Field(("cpu",), description="ONNX Runtime providers to measure on: cpu, cuda")
    threads: PositiveInt = Field(2, description="threads inside an operator, at least 1")
    shapes: Shapes = Field(
        DEFAULT_SHAPES,
        description="inputs, [batch, tokens or frames]; decoders also [batch, new tokens, tokens in cache]",
    )
    min_seconds: PositiveFloat = Field(3.0, description="seconds to measure each shape for, above 0")
    on_missing: OnMissing = Field(
        "fail", description="a provider that is not there: fail ends with code 5, skip reports not measured"
    )


class Gates(_Section):
    """What the slim model must reach for the run to end with code 0; null is no gate."""

    latency_ratio: PositiveFloat | None = Field(None, description="slim / dense latency, at most this in every shape")
    size_ratio: PositiveFloat | None = Field(None, description="slim / dense size of the fp32 graph, at most this")
    min_cosine: Share | None = Field(
        None, description="all but decoders: mean cosine to the dense embeddings, at least this, up to 1"
    )
    max_perplexity_ratio: PositiveFloat | None = Field(
        None, description="decoders: slim / dense perplexity, at most this"
    )
    min_top1_agreement: Share | None = Field(
        None, description="models that write: share of tokens predicted the same, at least this, up to 1"
    )
    min_precision_cosine: Share | None = Field(
        None, description="further precisions: mean cosine of outputs to fp32's, at least this, up to 1"
    )


class Recipe(_Section):
    """One run: which model, and what each stage does with it. Immutable; compares by its values alone."""

    model: PathText = Field(description="a folder, pkg://package/folder for one in an installed package, or a hub id")
    task: Task = Field("auto", description="what the model is used for; auto reads it from the model")
    score: Score = Field(Score(), description=Score.__doc__)
    select: Select = Field(Select(), description=Select.__doc__)
    recover: Recover = Field(Recover(), description=Recover.__doc__)
    export: Export = Field(Export(), description=Export.__doc__)
    verify: Verify = Field(Verify(), description=Verify.__doc__)
    bench: Bench = Field(Bench(), description=Bench.__doc__)
    gates: Gates = Field(Gates(), description=Gates.__doc__)

    _positions: Positions | None = PrivateAttr(None)

    @classmethod
    def read(cls, path: Path | str, overrides: Iterable[str] = ()) -> Recipe:
        """Read a recipe file.

        Args:
            path: a YAML 1.2 file.
            overrides: `key=value` strings, the key dotted (`select.ratio=0.5`), the value YAML; a later one wins.

        A relative `verify.text`, `verify.inputs` or folder in `model` is taken from the recipe's folder, or from the
        working directory when an override gives it.

        Raises:
            UsageError: the first thing wrong, located `path:line:column` or `--set key=value`.
        """
        data, positions = read_yaml(path)
        for number, override in enumerate(overrides):
            if isinstance(data, dict):
                _override(data, positions, override, number)
        recipe = validate(cls, data, positions)
        recipe._positions = positions
        found: dict[str, str] = {}
        for key in ("text", "inputs"):
            given = getattr(recipe.verify, key)
            if given is not None and not Path(given).is_absolute():
                found[key] = str(recipe._base(f"verify.{key}", path) / given)
        verify, model = recipe.verify.model_copy(update=found), recipe._model_folder(path)
        return recipe.model_copy(update={"verify": verify, "model": model})

    def _base(self, key: str, path: Path | str) -> Path:
        """What a relative path is taken from: the recipe's folder, or the working one where an override gives it."""
        return (Path() if self.where(key).startswith("--set ") else Path(path).parent).absolute()

    def _model_folder(self, path: Path | str) -> str:
        """`model` with a folder's path made whole; a hub id, pkg:// and ~ stay as written."""
        given, base = self.model, self._base("model", path)
        if given.startswith(("pkg://", "~")) or Path(given).is_absolute():
            return given
        if (base / given).is_dir():
            return str(base / given)
        if Path(given).is_dir():
            beside = os.path.relpath(given, base)
            raise UsageError(
                f"'{given}' is a folder of the working folder, and a recipe's paths start at its own",
                where=self.where("model"),
                hint=f"write {beside}, or give it as --set model={given}",
            )
        return given

    def where(self, *keys: str) -> str:
        """Where the first of these dotted keys that was given was given: `minilm.yaml:4:10`, `--set select.ratio=0.5`.

        Where all are left to their defaults, the first one's name says so: `minilm.yaml: select.ratio (default)`. For a
        recipe made in Python: the key.
        """
        key = next(filter(self._gives, keys), None)
        if key is None:
            named = f"{keys[0]} (default)"
            return f"{self._positions.source}: {named}" if self._positions else named
        place = self._positions.nearest(tuple(key.split("."))) if self._positions else None
        return place.text if place else key

    def _gives(self, key: str) -> bool:
        section, _, name = key.rpartition(".")
        return name in (getattr(self, section) if section else self).model_fields_set

    @contextmanager
    def located(self) -> Iterator[None]:
        """Errors about keys of the recipe point at where these were given."""
        try:
            yield
        except SlimheadsError as error:
            if error.keys:
                error.where, error.keys = self.where(*error.keys), ()
            raise

    def resolved_yaml(self) -> str:
        """Every key with its value, as YAML that `Recipe.read` reads back equal."""
        return dump_yaml(self.model_dump(mode="json"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    def __hash__(self) -> int:
        return hash(self.resolved_yaml())


def _override(data: dict[str, Any], positions: Positions, override: str, number: int) -> None:
    """Apply one `key=value` to `data`, in place."""
    source = f"--set {override}"
    key, equals, text = override.partition("=")
    path: KeyPath = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise UsageError("expected key=value", where=source, hint="write it as --set select.ratio=0.5")
    value = parse_value(text, source)
    place = Place((1, number, 0), source)
    section = data
    for end in range(1, len(path)):
        if path[end - 1] not in section:
            positions.put(path[:end], place)
        section = section.setdefault(str(path[end - 1]), {})
        if not isinstance(section, dict):
            name = dotted(path[:end])
            raise UsageError(f"{name} holds no keys of its own", where=source, hint=f"give {name} as a whole")
    section[str(path[-1])] = value
    positions.put(path, place)


def recipe_schema() -> dict[str, Any]:
    """The recipe as JSON Schema, draft 2020-12, for editors and other tools.

    It accepts what `Recipe.read` accepts, but for one thing: to JSON Schema 2.0 is a whole number, to the reader not.
    """
    schema = Recipe.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:slimheads:recipe:1",
        **schema,
        "title": "slimheads recipe",
    }


_DECODERS_ONLY = frozenset({"export.kv_axes", "gates.max_perplexity_ratio", "gates.min_top1_agreement"})
_ALL_BUT_DECODERS = frozenset({"gates.min_cosine"})


def commented_recipe(
    model: str,
    task: str = "auto",
    is_decoder: bool = False,
    facts: Sequence[str] = (),
    *,
    fed_texts: bool = True,
    shapes: Sequence[tuple[int, ...]] = DEFAULT_SHAPES,
) -> str:
    """A recipe to start from: every section and key with its default and what it is for.

    Args:
        model: where the model is, as `Recipe.model` takes it.
        task: a task of the recipe.
        is_decoder: whether the model generates text; keys that do not concern the model are left out.
        facts: what is known of the model, a line each, for the comment at the top.
        fed_texts: whether texts are all the model takes.
        shapes: to measure at, where those of every recipe are too long for the model.

    Returns:
        YAML text that `Recipe.read` reads as `Recipe(model=model, task=task)` with these shapes.
    """
    left_out = _ALL_BUT_DECODERS if is_decoder else _DECODERS_ONLY
    if task == "text2text-generation":
        left_out = _ALL_BUT_DECODERS | {"gates.max_perplexity_ratio"}
    left_out |= {"verify.inputs" if fed_texts else "verify.text"}
    lines = ["# A recipe for slimheads; run it with: slimheads run THIS-FILE"]
    lines += [f"# {_one_line(fact)}" for fact in facts]
    for name, info in Recipe.model_fields.items():
        about = info.description or ""
        lines += ["", f"# {about[:1].upper()}{about[1:]}"]
        if name in ("model", "task"):
            lines.append(f"{name}: {dump_value(model if name == 'model' else task)}")
            continue
        lines.append(f"{name}:")
        for key, field in type(info.default).model_fields.items():
            if f"{name}.{key}" not in left_out:
                given = f"  {key}: {dump_value(shapes if key == 'shapes' else field.default)}"
                lines.append(f"{given:<30}  # {field.description}")
    return "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text).strip()
