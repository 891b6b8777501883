"""Closed sets of words and small types that several packages share, each defined once. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args

Task = Literal[
    "auto",
    "feature-extraction",
    "text-generation",
    "text2text-generation",
    "fill-mask",
    "text-classification",
    "token-classification",
    "question-answering",
    "image-classification",
    "zero-shot-image-classification",
    "object-detection",
    "audio-classification",
    "automatic-speech-recognition",
]
SiteKind = Literal["attention", "feed_forward", "layer"]
ALL_KINDS: tuple[SiteKind, ...] = get_args(SiteKind)
Unit = Literal["head", "kv_group", "neuron", "layer"]  # what can be deleted alone
ScoreMethod = Literal["magnitude"]
Scope = Literal["global", "layer"]  # among which units a score is ranked
Normalize = Literal["none", "layer"]
Counts = Literal["any", "equal"]
Precision = Literal["fp32", "fp16", "int8", "q4"]
Int8For = Literal["any", "avx512_vnni", "avx2", "arm64"]  # whose arithmetic the int8 weights are made for
OnWeakPrecision = Literal["fail", "drop"]
GraphForm = Literal["plain", "optimized", "attention", "fused", "rewritten"]  # of the float32 graph
KvAxes = Literal["symbolic", "static"]
Provider = Literal["cpu", "cuda"]
OnMissing = Literal["fail", "skip"]  # of a provider
LinkKind = Literal["deletion", "export", "conversion", "structure", "tokens"]  # of the certificate's links 1 to 5
Side = Literal["dense", "slim"]
KvShape = tuple[int, int, int]  # of one layer: KV heads, head_dim of keys, head_dim of values
Shape = tuple[int, ...]  # [batch], [batch, length] or [batch, length, past]
GIB = 2**30  # bytes
PLAIN: GraphForm = "plain"
UNITS: Mapping[SiteKind, tuple[Unit, ...]] = MappingProxyType(
    {"attention": ("head", "kv_group"), "feed_forward": ("neuron",), "layer": ("layer",)}
)
