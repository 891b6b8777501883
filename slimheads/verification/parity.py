"""Parity: the same inputs through two versions of a model, compared at every position that is not padding.

Cases are batch {1, 4} x length {1, 8, 128}, and one input past every length at which the model changes its computation
(lengths.py says which); batches of four have rows of different lengths, padded left and right;
decoders also continue a cache of seven positions. Each runner builds its own cache by running the first seven positions
itself, so the cache inputs and outputs of an ONNX file are part of what is compared. Images and spectrograms have one
size, and waveforms no padding, because the exported graphs take no mask for them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from slimheads.data.inputs import make_inputs, to_torch
from slimheads.data.metrics import Agreement
from slimheads.errors import first_line
from slimheads.families.config_facts import has_length, takes_padding, takes_text, text_config
from slimheads.names import KvShape
from slimheads.runtime.onnx_runtime import onnxruntime
from slimheads.runtime.sessions import ORT_ERRORS
from slimheads.verification.lengths import PAST_IT, USUAL, Change, lengths, right_up_to

Padding = Literal["no", "left", "right"]
BATCHES, LENGTHS, PAST = (1, 4), (1, 8, USUAL), 7
REFUSALS: tuple[type[Exception], ...] = (*ORT_ERRORS, ValueError, IndexError)
Outputs = dict[str, np.ndarray]
_NOTHING: Mapping[str, np.ndarray] = MappingProxyType({})
Runner = Callable[[Any], Outputs]  # from a case to a model's outputs


class AnyCase(Protocol):
    """The part of an input that a comparison uses."""

    def unpadded(self, name: str, output: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Case:
    """One input: `inputs` by name; texts' first `past` positions go through the cache."""

    batch: int
    length: int  # 0 where inputs have no length
    padding: Padding
    past: int
    inputs: Mapping[str, np.ndarray]

    def __str__(self) -> str:
        length = f", length {self.length}" if self.length else ""
        padding = f", {self.padding} padding" if "attention_mask" in self.inputs else ""
        past = f", past {self.past}" if self.past else ""
        return f"batch {self.batch}{length}{padding}{past}"

    @property
    def ids(self) -> np.ndarray:
        """int64 [batch, past + length], of texts."""
        return self.inputs["input_ids"]

    @property
    def mask(self) -> np.ndarray:
        """int64 [batch, past + length], of texts: 1 where there is no padding."""
        return self.inputs["attention_mask"]

    @property
    def others(self) -> dict[str, np.ndarray]:
        """The inputs besides token ids and their mask."""
        return {name: array for name, array in self.inputs.items() if name not in ("input_ids", "attention_mask")}

    @property
    def positions(self) -> np.ndarray:
        """int64 [batch, past + length]."""
        return _positions(self.mask)

    def unpadded(self, name: str, output: np.ndarray) -> np.ndarray:
        """An output's values at every position that is not padding."""
        mask = self.inputs.get("attention_mask")
        return output if mask is None else _unpadded(name, output, mask.astype(bool), self.past)


@dataclass(frozen=True)
class Comparison:
    """The outcome of one case."""

    case: str
    max_abs: float
    max_rel: float  # max_abs over the reference's largest magnitude
    passed: bool
    reason: str | None
    numeric: bool = False  # whether it failed by numbers alone: too far off, or not finite


def cases(config: PretrainedConfig, task: str, seed: int = 0) -> tuple[Case, ...]:
    """The contract's cases for a model, shortened where it has fewer positions."""
    rng = np.random.default_rng(seed)
    if not has_length(config):
        return tuple(Case(batch, 0, "no", 0, make_inputs(config, batch, 1, rng)) for batch in BATCHES)
    limit, decoder = right_up_to(config), task == "text-generation"
    pasts = (0, min(PAST, limit // 2)) if decoder else (0,)
    usual = [
        _case(rng, config, batch, length, padding, past)
        for past in pasts
        for batch in BATCHES
        for length in sorted({min(length, limit - past) for length in LENGTHS})
        for padding in (_paddings(batch, length, past) if takes_padding(config) else ("no",))
    ]
    long = dict.fromkeys(pair for change in tried_changes(config) for pair in _inputs_around(change, decoder=decoder))
    return (*usual, *(_case(rng, config, 1, length, "no", past) for length, past in long))


def _inputs_around(change: Change, *, decoder: bool) -> Iterator[tuple[int, int]]:
    """(length, past) of the inputs for a change: whole, across it with a cache, and with all but one token cached.

    They end at the change where nothing is right past it.
    """
    longest = change.tried or 0
    if longest <= max(LENGTHS) and change.wrong_past == "model":
        return  # the usual inputs end there, with a cache and without
    if longest > max(LENGTHS) or not change.wrong_past:
        yield longest, 0
    if decoder:
        yield 2 * PAST_IT, longest - 2 * PAST_IT
        yield 1, longest - 1


def tried_changes(config: PretrainedConfig) -> tuple[Change, ...]:
    """The changes that are tried, at lengths that an input can be continued to."""
    found = lengths(config)
    changes = found.changes if found else ()
    return tuple(change for change in changes if change.tried and change.length > 2 * PAST_IT)


def torch_runner(model: PreTrainedModel) -> Runner:
    """A torch model as a function from a case to its float outputs by name."""
    takes_positions = model.can_generate() and "position_ids" in inspect.signature(model.forward).parameters

    def run(case: Case) -> Outputs:
        others, p = to_torch(case.others, model), case.past

        def placed(where: slice) -> dict[str, Any]:
            return {"position_ids": positions[:, where]} if takes_positions else {}

        with torch.no_grad():
            if "input_ids" not in case.inputs:
                return _floats(model(**others))
            ids, mask, positions = (torch.from_numpy(a) for a in (case.ids, case.mask, case.positions))
            cache: dict[str, Any] = {}
            if p:
                first = model(input_ids=ids[:, :p], attention_mask=mask[:, :p], use_cache=True, **placed(np.s_[:p]))
                cache = {"past_key_values": first.past_key_values}
            return _floats(model(input_ids=ids[:, p:], attention_mask=mask, **cache, **placed(np.s_[p:]), **others))

    return run


def _floats(made: Mapping[str, Any]) -> Outputs:
    return {k: v.numpy() for k, v in made.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}


def onnx_runner(session: onnxruntime.InferenceSession, kv_shapes: tuple[KvShape, ...]) -> Runner:
    """An ONNX Runtime session as a runner; `kv_shapes` are (heads, key head_dim, value head_dim) per layer."""
    step = _cached_step(session, kv_shapes)

    def run(case: Case) -> Outputs:
        if "input_ids" not in case.inputs:
            names = [output.name for output in session.get_outputs()]
            return dict(zip(names, session.run(None, dict(case.inputs)), strict=True))
        cache: Outputs | None = None
        if case.past:
            _, cache = step(case.ids[:, : case.past], case.mask[:, : case.past], None)
        return step(case.ids[:, case.past :], case.mask, cache, case.others)[0]

    return run


def onnx_greedy(
    session: onnxruntime.InferenceSession,
    kv_shapes: tuple[KvShape, ...],
    ids: np.ndarray,
    mask: np.ndarray,
    new_tokens: int,
) -> np.ndarray:
    """Greedy search through the session itself: for fixed cache axes, whose caches clients create in the wrong size.

    Args:
        ids, mask: int64 [batch, length]; padding is on the left.

    Returns:
        int64 [batch, length + new_tokens].
    """
    step = _cached_step(session, kv_shapes)
    made, fresh, cache = ids, ids, None
    for _ in range(new_tokens):
        outputs, cache = step(fresh, mask, cache)
        fresh = outputs["logits"][:, -1:].argmax(axis=-1)
        made, mask = np.concatenate([made, fresh], axis=1), np.concatenate([mask, np.ones_like(fresh)], axis=1)
    return made


def _cached_step(
    session: onnxruntime.InferenceSession, kv_shapes: tuple[KvShape, ...]
) -> Callable[..., tuple[Outputs, Outputs]]:
    """(new ids, mask of all positions so far, cache or None, others) -> (outputs, cache with the new positions)."""
    wanted = {i.name for i in session.get_inputs()}
    names = [o.name for o in session.get_outputs()]

    def step(
        ids: np.ndarray, mask: np.ndarray, cache: Outputs | None, others: Mapping[str, np.ndarray] = _NOTHING
    ) -> tuple[Outputs, Outputs]:
        if cache is None:
            cache = {
                f"past_key_values.{layer}.{kind}": np.zeros((len(ids), heads, 0, dim), np.float32)
                for layer, (heads, *dims) in enumerate(kv_shapes)
                for kind, dim in zip(("key", "value"), dims, strict=True)
            }
        feed = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": _positions(mask)[:, -ids.shape[1] :],
            "token_type_ids": np.zeros_like(ids),
        }
        fed = {k: v for k, v in (feed | dict(others)).items() if k in wanted} | cache
        outputs = dict(zip(names, session.run(None, fed), strict=True))
        return outputs, {name: outputs[name.replace("past_key_values", "present")] for name in cache}

    return step


def compare(reference: Outputs, other: Outputs, case: AnyCase, atol: float | None, rtol: float) -> Comparison:
    """Compares two outputs at every unpadded position of every output that both have; all values must be finite.

    The reference a and the other b agree where |a - b| <= atol + rtol |a| everywhere; with `atol` None, where the
    largest difference is at most rtol times the largest |a| (for errors that grow with the tensor's values).
    """
    shared = [name for name in reference if name in other]
    if not shared:
        return Comparison(str(case), np.inf, np.inf, False, "the two have no output in common")
    worst = Comparison(str(case), 0.0, 0.0, True, None)
    for name in shared:
        found = _compare_one(name, reference[name], other[name], case, atol, rtol)
        if not found.passed or (worst.passed and found.max_abs > worst.max_abs):
            worst = found
        if not worst.passed:
            break
    return worst


def compare_all(
    reference: Runner,
    other: Runner,
    over: Iterable[AnyCase],
    atol: float | None,
    rtol: float,
    agreement: Agreement | None = None,
) -> tuple[Comparison, ...]:
    """`compare` over every case; a case that a runner cannot run fails with the runtime's own words.

    Args:
        agreement: gathers the outputs of each case that holds.
    """
    return tuple(_run_and_compare(reference, other, case, atol, rtol, agreement) for case in over)


def _run_and_compare(
    reference: Runner, other: Runner, case: AnyCase, atol: float | None, rtol: float, agreement: Agreement | None
) -> Comparison:
    outputs: list[Outputs] = []
    for run, called in ((reference, "the reference"), (other, "it")):
        try:
            outputs.append(run(case))
        except REFUSALS as error:
            return Comparison(str(case), np.inf, np.inf, False, f"{called} does not run: {first_line(error)}")
    found = compare(outputs[0], outputs[1], case, atol, rtol)
    if agreement and found.passed:
        for name in outputs[0].keys() & outputs[1].keys():
            if not name.startswith("present."):  # a cache is no answer
                a, b = (np.atleast_2d(case.unpadded(name, each[name])) for each in outputs)
                agreement.add(a, b, logits=name == "logits")
    return found


def _compare_one(name: str, a: np.ndarray, b: np.ndarray, case: AnyCase, atol: float | None, rtol: float) -> Comparison:
    def failed(reason: str, max_abs: float = np.inf, max_rel: float = np.inf, *, numeric: bool = True) -> Comparison:
        return Comparison(str(case), max_abs, max_rel, False, f"{name}: {reason}", numeric)

    if a.shape != b.shape:
        return failed(f"shapes {list(a.shape)} and {list(b.shape)} differ", numeric=False)
    a, b = case.unpadded(name, a), case.unpadded(name, b)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return failed("a value is NaN or infinite")
    a, b = a.astype(np.float64), b.astype(np.float64)
    off = np.abs(a - b)
    max_abs = float(off.max(initial=0.0))
    max_rel = max_abs / max(float(np.abs(a).max(initial=0.0)), float(np.finfo(np.float32).tiny))
    if (max_rel > rtol) if atol is None else (off > atol + rtol * np.abs(a)).any():
        return failed("differs beyond the tolerance", max_abs, max_rel)
    return Comparison(str(case), max_abs, max_rel, True, None)


def _unpadded(name: str, array: np.ndarray, real: np.ndarray, past: int) -> np.ndarray:
    # A cache is [batch, KV heads, positions, head_dim], past positions included; a window drops the first ones.
    if name.startswith("present."):
        kept: np.ndarray = array.swapaxes(1, 2)[real[:, real.shape[1] - array.shape[2] :]]
        return kept
    has_positions = array.ndim == 3 or name in ("start_logits", "end_logits")
    return array[real[:, past:]] if has_positions else array


def _positions(mask: np.ndarray) -> np.ndarray:
    """Position ids counted over unpadded positions, as `generate` counts them; int64 [batch, positions]."""
    counted: np.ndarray = np.maximum(mask.cumsum(axis=1) - 1, 0)
    return counted


def _paddings(batch: int, length: int, past: int) -> tuple[Padding, ...]:
    if batch == 1:
        return ("no",)
    if past:  # nobody pads on the right before new tokens
        return ("left",)
    return ("no",) if length == 1 else ("left", "right")


def _case(
    rng: np.random.Generator, config: PretrainedConfig, batch: int, length: int, padding: Padding, past: int
) -> Case:
    whole = past + length
    inputs = make_inputs(config, batch, whole, rng)
    if not takes_text(config):
        return Case(batch, length, padding, past, inputs)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    pad = getattr(text_config(config), "pad_token_id", None)
    room = past or length
    for row in range(1, batch if padding != "no" else 1):
        gone = min(room - 1, 1 + row * room // (batch + 1))
        where = np.s_[:gone] if padding == "left" else np.s_[whole - gone :]
        mask[row, where] = 0
        ids[row, where] = 0 if pad is None else pad
    return Case(batch, length, padding, past, inputs)
