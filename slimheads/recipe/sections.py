"""The sections of a recipe, one per stage: their keys, the values each takes, and its default."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PlainValidator,
    PositiveFloat,
    PositiveInt,
    Strict,
    WithJsonSchema,
)

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
    SiteKind,
)

Item = TypeVar("Item")
DEFAULT_SHAPES = ((1, 16), (1, 128))


def _distinct(items: tuple[Item, ...]) -> tuple[Item, ...]:
    if len(set(items)) < len(items):
        raise ValueError("should not name the same thing twice")
    return items


def _holding(wanted: str) -> AfterValidator:
    def check(items: tuple[str, ...]) -> tuple[str, ...]:
        if wanted not in items:
            raise ValueError(f"should hold {wanted}, because the others are made from it")
        return items

    return AfterValidator(check)


def _whole_or_auto(value: object) -> object:
    if value != "auto" and not (type(value) is int and value >= 1):
        raise ValueError("should be auto, or a whole number of at least 1")
    return value


# A tuple may be given as a list, as YAML and callers do; its items stay strict.
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
MeasuredShape = Annotated[tuple[PositiveInt, ...], Strict(False), Field(min_length=2, max_length=3)]
Shapes = Annotated[
    tuple[MeasuredShape, ...],
    Strict(False),
    Field(min_length=1, json_schema_extra={"uniqueItems": True}),
    AfterValidator(_distinct),
]
# Not a plain union, because its errors would name the branch.
Multiple = Annotated[
    int | Literal["auto"],
    PlainValidator(_whole_or_auto),
    WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1}]}),
]
Share = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Score(Section):
    """How a head's importance is estimated."""

    method: ScoreMethod = Field("magnitude", description="magnitude: Frobenius norms of the head's weights")


class Select(Section):
    """Which heads, feed-forward neurons and layers are deleted."""

    ratio: float = Field(
        0.25,
        ge=0,
        lt=1,
        description="fraction of heads to delete, from 0 to below 1; at least one head stays per site",
    )
    scope: Scope = Field("layer", description="layer: the same ratio in each layer; global: rank all layers together")
    normalize: Normalize = Field(
        "layer", description="scope global: layer divides scores by their layer's mean before ranking; none does not"
    )
    keep_at_least: PositiveInt = Field(1, description="heads kept per layer, at least 1")
    multiple_of: Multiple = Field(
        1, description="kept heads per layer are a multiple of this; auto: chosen from measured latency"
    )
    counts: Counts = Field("any", description="equal: every layer keeps the same number of heads")
    within_groups: bool = Field(
        False, description="true: where query heads share KV heads, delete query heads and keep every KV head"
    )
    sites: Annotated[str, Field(min_length=1)] = Field(
        "*", description="glob of the blocks and layers to prune; the ratios are fractions of their units"
    )
    ffn_ratio: float = Field(0.0, ge=0, lt=1, description="fraction of feed-forward neurons to delete, as ratio")
    ffn_multiple_of: Multiple = Field(
        32,
        description="kept neurons per block are a multiple of this, never fewer; auto: by latency",
    )
    drop_layers: NonNegativeInt = Field(0, description="whole layers to drop; takes a score.method that scores layers")

    @property
    def kinds(self) -> tuple[SiteKind, ...]:
        """The kinds of sites that the plan names."""
        asked: tuple[tuple[SiteKind, float], ...] = (("feed_forward", self.ffn_ratio), ("layer", self.drop_layers))
        return ("attention", *(kind for kind, much in asked if much > 0))

    @property
    def auto_steps(self) -> tuple[str, ...]:
        """The keys of the steps that are chosen from measured latency."""
        return tuple(key for key in ("multiple_of", "ffn_multiple_of") if getattr(self, key) == "auto")


class Recover(Section):
    """How quality is recovered after deletion."""

    method: Literal["none"] = Field("none", description="none: the kept weights stay as they are")


class Export(Section):
    """Which ONNX graphs are written."""

    precisions: Precisions = Field(("fp32",), description="graphs to write: fp32 (always), fp16, int8, q4 (4 bits)")
    candidates: Candidates = Field(
        ("plain", "optimized", "attention", "fused", "rewritten"),
        description="forms of the fp32 graph to try; plain is always made",
    )
    int8_for: Int8For = Field(
        "any",
        description="target CPUs of int8: any, avx2 (7-bit weights), avx512_vnni, arm64 (8-bit weights)",
    )
    on_weak_precision: OnWeakPrecision = Field(
        "fail", description="if a precision loses too much: fail ends with exit code 4, drop leaves it out"
    )
    kv_axes: KvAxes = Field(
        "symbolic", description="decoders: symbolic for optimum and transformers.js, static for onnxruntime-genai"
    )


class Verify(Section):
    """How close slim torch and slim ONNX must be, and on which inputs drift is measured."""

    atol: PositiveFloat = Field(1e-4, description="absolute tolerance of torch against ONNX, above 0")
    rtol: PositiveFloat = Field(1e-4, description="relative tolerance of torch against ONNX, above 0")
    text: PathText | None = Field(
        None, description="UTF-8 file, one text per line: also measure drift on it, not just on the sample"
    )
    inputs: PathText | None = Field(
        None,
        description="image and audio models: safetensors file of inputs by name, to measure drift on",
    )


class Bench(Section):
    """How latency is measured, dense against slim."""

    providers: Providers = Field(("cpu",), description="ONNX Runtime providers to measure on: cpu, cuda")
    threads: PositiveInt = Field(2, description="threads inside an operator, at least 1")
    shapes: Shapes = Field(
        DEFAULT_SHAPES,
        description="inputs, [batch, tokens or frames]; decoders also [batch, new tokens, tokens in cache]",
    )
    min_seconds: PositiveFloat = Field(3.0, description="seconds to measure each shape for, above 0")
    on_missing: OnMissing = Field(
        "fail", description="if a provider is missing: fail ends with exit code 5, skip reports it as not measured"
    )


class Gates(Section):
    """What the slim model must reach for the run to end with exit code 0; null: no gate."""

    latency_ratio: PositiveFloat | None = Field(None, description="slim / dense latency, at most this, in every shape")
    size_ratio: PositiveFloat | None = Field(None, description="slim / dense size of the fp32 graph, at most this")
    min_cosine: Share | None = Field(
        None, description="all but decoders: mean cosine to the dense embeddings, at least this, up to 1"
    )
    max_perplexity_ratio: PositiveFloat | None = Field(
        None, description="decoders: slim / dense perplexity, at most this"
    )
    min_top1_agreement: Share | None = Field(
        None, description="generative models: fraction of tokens predicted the same, at least this, up to 1"
    )
    min_precision_cosine: Share | None = Field(
        None, description="other precisions: mean cosine of outputs to fp32, at least this, up to 1"
    )
