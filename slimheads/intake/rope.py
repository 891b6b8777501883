"""Translates rotary positions as transformers 5 writes them to the keys that transformers 4 reads.

    rope_parameters: {rope_type: llama3, rope_theta: 500000.0, factor: 8.0, ...}        # 5, the same for all layers
    rope_parameters: {full_attention: {...}, sliding_attention: {...}}                  # 5, per kind of layer
    rope_theta: 500000.0, rope_scaling: {rope_type: llama3, factor: 8.0, ...}           # 4

What transformers 4 cannot express is refused, because the angles would be silently wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from slimheads.errors import ModelRefusedError

Data = dict[str, Any]


@dataclass(frozen=True)
class _Names:
    """The keys of transformers 4 for one set of rotary parameters; None if there is no such key."""

    theta: str = "rope_theta"
    scaling: str | None = "rope_scaling"
    partial: str = "partial_rotary_factor"


_FLAT = {"gpt_neox": _Names("rotary_emb_base", partial="rotary_pct")}  # others use the default names
_BY_LAYER = {
    "gemma3_text": {"full_attention": _Names(), "sliding_attention": _Names("rope_local_base_freq", None)},
    "modernbert": {
        "full_attention": _Names("global_rope_theta", None),
        "sliding_attention": _Names("local_rope_theta", None),
    },
}

# By type: the keys that transformers 4.57 requires, and those that it also reads.
_TYPES: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset({"original_max_position_embeddings"})),  # which has no effect there
    "linear": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor"}), frozenset({"original_max_position_embeddings"})),
    "yarn": (
        frozenset({"factor"}),
        frozenset({"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"})
        | {"original_max_position_embeddings"},
    ),
    "longrope": (
        frozenset({"short_factor", "long_factor"}),
        frozenset({"attention_factor", "factor", "original_max_position_embeddings"}),
    ),
    "llama3": (
        frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
        frozenset(),
    ),
}
_HINT = "save the model again with transformers 4.57, or write the key as that version does"


def in_keys_of_4(data: Data, model_type: str, known: frozenset[str], where: str) -> Data:
    """The data of config.json with the values of `rope_parameters` under the keys that transformers 4 reads.

    Args:
        data: the file's content; not changed.
        model_type: a covered model type.
        known: the keys that its configuration class reads.
        where: the file, for errors.

    Raises:
        ModelRefusedError: naming the key that cannot be translated.
    """
    given = data.get("rope_parameters")
    rest = {key: value for key, value in data.items() if key != "rope_parameters"}
    rest = _without_layer_types(rest, model_type, where)
    if not given:
        _check_scaling(rest.get("rope_scaling"), model_type, where)
        return rest
    if not isinstance(given, dict):
        _refuse("rope_parameters", f"is {type(given).__name__}, but should be a mapping", where)
    layers = _BY_LAYER.get(model_type)
    if layers is None:
        parts = {"rope_parameters": (given, _FLAT.get(model_type, _Names()))}
    elif given.keys() == layers.keys() and all(isinstance(part, dict) for part in given.values()):
        parts = {f"rope_parameters.{name}": (given[name], names) for name, names in layers.items()}
    else:
        _refuse("rope_parameters", f"must have {' and '.join(sorted(layers))}", where)
    found: Data = {}
    for key, (part, names) in parts.items():
        found |= _translated(key, part, names, rest, known, where)
    for key, value in found.items():
        if rest.get(key) is not None and rest[key] != value:
            _refuse("rope_parameters", f"and {key} disagree: {value} and {rest[key]}", where)
    return rest | found


def _translated(key: str, part: Data, names: _Names, data: Data, known: frozenset[str], where: str) -> Data:
    settings = {name: value for name, value in part.items() if value is not None}
    kind = settings.pop("rope_type", settings.pop("type", "default"))
    settings.pop("type", None)  # some files have both
    theta, partial = settings.pop("rope_theta", None), settings.pop("partial_rotary_factor", 1.0)
    if names.theta not in known:
        _refuse(key, "is not read by transformers 4 for this kind of model", where)
    if not _is_number(theta):
        _refuse(key, "has no number as rope_theta", where)
    found: Data = {names.theta: theta}
    if names.partial in known:
        if "partial_rotary_factor" in part:
            found[names.partial] = partial
    elif partial != 1.0:
        _refuse(key, "has a partial_rotary_factor, which transformers 4 does not read for this kind of model", where)
    if kind == "default":
        _check_settings(key, kind, settings, where)
        return found | ({names.scaling: None} if names.scaling in known else {})
    if names.scaling is None or names.scaling not in known:
        _refuse(key, f"is of type {kind!r}, which transformers 4 does not compute for this kind of model", where)
    return found | _scaling(key, str(kind), settings, names.scaling, data, where)


def _scaling(key: str, kind: str, settings: Data, name: str, data: Data, where: str) -> Data:
    limit, original = data.get("max_position_embeddings"), settings.get("original_max_position_embeddings")
    ratio = limit / original if limit and _is_number(limit) and _is_number(original) else None
    if kind == "yarn" and "factor" not in settings and ratio:
        settings["factor"] = ratio
    _check_settings(key, kind, settings, where, whole=True)
    if kind == "dynamic" and original not in (None, limit):
        _refuse(key, "has original_max_position_embeddings, which transformers 4 does not read with 'dynamic'", where)
    if kind != "longrope":
        return {name: {"rope_type": kind, **settings}}
    return _longrope(key, settings, name, data, where)


def _longrope(key: str, settings: Data, name: str, data: Data, where: str) -> Data:
    limit = data.get("max_position_embeddings")
    original = settings.get("original_max_position_embeddings", data.get("original_max_position_embeddings"))
    ratio = limit / original if limit and _is_number(limit) and _is_number(original) else None
    # 4 reads the original length beside rope_scaling and uses the ratio of the two lengths as the factor.
    if not _is_number(original):
        _refuse(key, "has no number as original_max_position_embeddings", where)
    if settings.get("attention_factor") is None and settings.get("factor") not in (None, ratio):
        _refuse(key, "has a factor that is not max_position_embeddings / original_max_position_embeddings", where)
    factors: Data = {
        "type": "longrope",
        "short_factor": settings["short_factor"],
        "long_factor": settings["long_factor"],
    }
    if data["model_type"] != "phi3":
        factors |= {"rope_type": "longrope"} | {k: settings[k] for k in ("attention_factor", "factor") if k in settings}
    elif settings.get("attention_factor") is not None:
        _refuse(key, "has an attention_factor, which transformers 4 does not read for phi3", where)
    return {name: factors, "original_max_position_embeddings": original}


def _check_scaling(scaling: Any, model_type: str, where: str) -> None:
    """Checks `rope_scaling` as transformers 4 writes it, since that version ignores unknown keys."""
    if isinstance(scaling, dict):
        kind = "longrope" if model_type == "phi3" else scaling.get("rope_type", scaling.get("type"))
        left = {k: v for k, v in scaling.items() if k not in ("type", "rope_type", "finetuned") and v is not None}
        _check_settings("rope_scaling", str(kind), left, where)


def _check_settings(key: str, kind: str, settings: Data, where: str, *, whole: bool = False) -> None:
    if kind not in _TYPES:
        _refuse(key, f"is of type {kind!r}, which transformers 4.57 does not know", where)
    required, optional = _TYPES[kind]
    if beyond := sorted(settings.keys() - required - optional):
        _refuse(f"{key}.{beyond[0]}", f"is not read with type {kind!r} by transformers 4.57", where)
    if whole and (missing := sorted(required - settings.keys())):
        _refuse(key, f"of type {kind!r} has no {missing[0]}", where)


def _without_layer_types(data: Data, model_type: str, where: str) -> Data:
    """Drops ModernBERT's `layer_types` if it agrees with `global_attn_every_n_layers`, which 4 reads."""
    if model_type != "modernbert" or data.get("layer_types") is None:
        return data
    every, count = data.get("global_attn_every_n_layers", 3), data.get("num_hidden_layers", 22)
    if not (isinstance(every, int) and isinstance(count, int) and every > 0 and 0 <= count < 10_000):
        _refuse("layer_types", "cannot be compared with global_attn_every_n_layers", where)
    if data["layer_types"] != ["sliding_attention" if n % every else "full_attention" for n in range(count)]:
        _refuse("layer_types", "differs from global_attn_every_n_layers, which transformers 4 reads", where)
    return {key: value for key, value in data.items() if key != "layer_types"}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _refuse(key: str, what: str, where: str) -> NoReturn:
    raise ModelRefusedError(f"'{key}' {what}", where=where, hint=_HINT)
