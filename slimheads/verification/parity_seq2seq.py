"""Parity for encoder-decoders: the same inputs through torch and through the files that clients load.

Cases are those of an encoder (batch {1, 4} x length {1, 8, 128}, padded left and right). The decoder reads as many
tokens as the encoder in its first pass, or one token after seven in its cache. Sound has one length and no padding, so
the decoder's length varies instead. Clients give the decoder no mask: its tokens are not padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from slimheads.data.inputs import make_inputs
from slimheads.exporting.artifacts import ENCODER, FIRST_DECODER, MERGED_DECODER, NEXT_DECODER, file_name
from slimheads.families.config_facts import takes_text
from slimheads.families.limits import position_limit
from slimheads.families.sites import Site, find_sites
from slimheads.names import Precision
from slimheads.runtime.onnx_runtime import onnxruntime
from slimheads.runtime.onnx_signature import read_interface
from slimheads.runtime.sessions import open_session
from slimheads.verification import parity
from slimheads.verification.lengths import Change
from slimheads.verification.parity import BATCHES, LENGTHS, PAST, Outputs, Padding, Runner, tried_changes

_NO_IDS = np.zeros((1, 0), np.int64)
ENCODED = "encoder_last_hidden_state"


@dataclass(frozen=True)
class Seq2SeqCase:
    """One input: the encoder's inputs, and the decoder's ids, the first `past` of them through the cache."""

    batch: int
    length: int
    padding: Padding
    past: int
    inputs: Mapping[str, np.ndarray]  # input_ids and attention_mask [batch, length], or input_features
    decoder_ids: np.ndarray  # int64 [batch, past + new]

    def __str__(self) -> str:
        past = f", past {self.past}" if self.past else ""
        return f"batch {self.batch}, length {self.length}, {self.padding} padding{past}"

    @property
    def mask(self) -> np.ndarray | None:
        """The encoder's mask, int64 [batch, length]; sound has none."""
        return self.inputs.get("attention_mask")

    def unpadded(self, name: str, output: np.ndarray) -> np.ndarray:
        """An output's values at every position that is not padding: only the encoder has any."""
        if self.mask is None or not (name == ENCODED or ".encoder." in name):
            return output
        kept: np.ndarray = (output if name == ENCODED else output.swapaxes(1, 2))[self.mask.astype(bool)]
        return kept


def cases(config: PretrainedConfig, seed: int = 0) -> tuple[Seq2SeqCase, ...]:
    """The contract's cases for an encoder-decoder, shortened to its position table."""
    make = _text_cases if takes_text(config) else _sound_cases
    return tuple(make(config, np.random.default_rng(seed)))


def _text_cases(config: PretrainedConfig, rng: np.random.Generator) -> Iterator[Seq2SeqCase]:
    encoders = parity.cases(config, "feature-extraction")
    for past in (0, min(PAST, position_limit(config) // 2)):
        for case in encoders:
            ids = rng.integers(0, config.vocab_size, (case.batch, past + 1 if past else case.length))
            inputs = {name: case.inputs[name] for name in ("input_ids", "attention_mask")}
            yield Seq2SeqCase(case.batch, case.length, case.padding, past, inputs, ids)
    short = next(case for case in encoders if case.batch == 1)
    for change in tried_changes(config):
        inputs = {name: short.inputs[name] for name in ("input_ids", "attention_mask")}
        yield _continued(config, rng, change, Seq2SeqCase(1, short.length, "no", 0, inputs, _NO_IDS))


def _continued(config: PretrainedConfig, rng: np.random.Generator, change: Change, like: Seq2SeqCase) -> Seq2SeqCase:
    """The decoder's last token where the text ends past a change, or at it where nothing is right past it."""
    length = change.tried or 0
    return replace(like, past=length - 1, decoder_ids=rng.integers(0, config.vocab_size, (1, length)))


def _sound_cases(config: PretrainedConfig, rng: np.random.Generator) -> Iterator[Seq2SeqCase]:
    limit = position_limit(config)
    for past in (0, min(PAST, limit // 2)):
        for batch in BATCHES:
            inputs = make_inputs(config, batch, 1, rng)
            del inputs["decoder_input_ids"]
            for length in (1,) if past else sorted({min(length, limit) for length in LENGTHS}):
                ids = rng.integers(0, config.vocab_size, (batch, past + length))
                yield Seq2SeqCase(batch, length, "no", past, inputs, ids)
    inputs = make_inputs(config, 1, 1, rng)
    del inputs["decoder_input_ids"]
    for change in tried_changes(config):
        case = Seq2SeqCase(1, change.length, "no", 0, inputs, rng.integers(0, config.vocab_size, (1, change.length)))
        yield case
        yield _continued(config, rng, change, case)


def encoder_sites(model: PreTrainedModel) -> tuple[Site, ...]:
    """The sites inside the encoder; all others are the decoder's."""
    encoder = model.get_encoder()
    name = next(name for name, module in model.named_modules() if module is encoder)
    return tuple(site for site in find_sites(model) if site.name.startswith(f"{name}."))


def outputs_of(part: str) -> Callable[[str], bool]:
    """The outputs of a runner that come from one file: the encoder's states, or all the others."""
    return (lambda name: name == ENCODED) if part == ENCODER else (lambda name: name != ENCODED)


def torch_runner(model: PreTrainedModel) -> Runner:
    """A torch model as a function from a case to its encoder's states and its logits."""

    def run(case: Seq2SeqCase) -> Outputs:
        inputs = {name: torch.from_numpy(array) for name, array in case.inputs.items()}
        ids = torch.from_numpy(case.decoder_ids)
        with torch.no_grad():
            given: dict[str, Any] = {"encoder_outputs": model.get_encoder()(**inputs), "use_cache": True}
            if "attention_mask" in inputs:
                given["attention_mask"] = inputs["attention_mask"]
            if case.past:
                first = model(**given, decoder_input_ids=ids[:, : case.past])
                given["past_key_values"] = first.past_key_values
            made = model(**given, decoder_input_ids=ids[:, case.past :])
        return {ENCODED: given["encoder_outputs"].last_hidden_state.numpy(), "logits": made.logits.numpy()}

    return run


@dataclass(frozen=True)
class Files:
    """The files by their role. The merged decoder has both roles of the decoder."""

    encoder: Path
    first: Path
    following: Path

    @classmethod
    def in_folder(cls, folder: Path, part: str | None = None, precision: Precision = "fp32") -> Files:
        """The float32 files, with `part` in its own precision."""

        def path(*parts: str) -> Path:
            chosen = part if part in parts else parts[0]
            return folder / file_name(chosen, precision if chosen == part else "fp32")

        return cls(path(ENCODER), path(FIRST_DECODER, MERGED_DECODER), path(NEXT_DECODER, MERGED_DECODER))

    def open(self, *, optimize: bool = True) -> Decoding:
        """Sessions on them, with or without ONNX Runtime's own fusions."""
        sessions = {path: open_session(path, optimize=optimize) for path in {self.encoder, self.first, self.following}}
        return Decoding(sessions[self.encoder], sessions[self.first], sessions[self.following])


@dataclass(frozen=True)
class Decoding:
    """Open sessions of an encoder-decoder's files."""

    encoder: onnxruntime.InferenceSession
    first: onnxruntime.InferenceSession
    following: onnxruntime.InferenceSession

    def encode(self, case: Seq2SeqCase) -> np.ndarray:
        """float32 [batch, positions, hidden]."""
        wanted = {i.name for i in self.encoder.get_inputs()}
        states: np.ndarray = self.encoder.run(
            ["last_hidden_state"], {k: v for k, v in case.inputs.items() if k in wanted}
        )[0]
        return states

    def decode(self, states: np.ndarray, mask: np.ndarray | None, ids: np.ndarray, cache: Outputs | None) -> Outputs:
        """One pass of the decoder: its logits, and the cache under the names of its outputs."""
        session = self.first if cache is None else self.following
        feed = {
            "input_ids": ids,
            "encoder_hidden_states": states,
            "encoder_attention_mask": mask,
            "use_cache_branch": np.array([cache is not None]),
        } | {name.replace("present", "past_key_values"): array for name, array in (cache or {}).items()}
        if cache is None:
            feed |= self._empty(len(ids))
        wanted = {i.name for i in session.get_inputs()}
        names = [o.name for o in session.get_outputs()]
        found = dict(zip(names, session.run(None, {k: v for k, v in feed.items() if k in wanted}), strict=True))
        if cache is not None:
            # The cache of cross-attention does not change: the file returns none, or an empty one.
            found |= {name: array for name, array in cache.items() if ".encoder." in name}
        return found

    def _empty(self, batch: int) -> Outputs:
        """The empty cache that the merged decoder takes in its first pass."""
        interface = read_interface(self.first)
        return {
            f"past_key_values.{layer}.{side}.{kind}": np.zeros((batch, heads, 0, dim), np.float32)
            for side, shapes in (("decoder", interface.kv_shapes), ("encoder", interface.cross_kv_shapes))
            for layer, (heads, *dims) in enumerate(shapes)
            for kind, dim in zip(("key", "value"), dims, strict=True)
        }

    @property
    def runner(self) -> Runner:
        """The files as a function from a case to all their outputs."""

        def run(case: Seq2SeqCase) -> Outputs:
            states = self.encode(case)
            cache: Outputs | None = None
            if case.past:
                cache = self.decode(states, case.mask, case.decoder_ids[:, : case.past], None)
                cache.pop("logits")
            made = self.decode(states, case.mask, case.decoder_ids[:, case.past :], cache)
            return {ENCODED: states} | made

        return run


def onnx_greedy(files: Files, case: Seq2SeqCase, start: int, new_tokens: int) -> torch.Tensor:
    """Greedy search through the files themselves: for fixed cache axes, whose caches clients create in the wrong size.

    Returns:
        int64 [batch, 1 + new_tokens].
    """
    decoding = files.open()
    states, cache = decoding.encode(case), None
    made = fresh = np.full((case.batch, 1), start, np.int64)
    for _ in range(new_tokens):
        cache = decoding.decode(states, case.mask, fresh, cache)
        fresh = cache.pop("logits")[:, -1:].argmax(axis=-1)
        made = np.concatenate([made, fresh], axis=1)
    return torch.from_numpy(made)
