"""The two sides that each link compares: of a model in one file, or of an encoder-decoder in four."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from slimheads.exporting.artifacts import ENCODER, FIRST_DECODER, MERGED_DECODER, NEXT_DECODER, PARTS, file_name
from slimheads.exporting.clients import greedy_tokens, seq2seq_greedy_tokens
from slimheads.exporting.precisions import PRECISIONS
from slimheads.exporting.quantize import SIXTEEN_BITS
from slimheads.families.limits import decoder_start, position_limit
from slimheads.families.sites import Site, find_sites, of_kind
from slimheads.models.generation import greedy_options, seq2seq_generate
from slimheads.models.kv_shapes import kv_shapes
from slimheads.names import Int8For, Precision
from slimheads.pruning.plan import Plan
from slimheads.runtime.onnx_signature import read_interface
from slimheads.runtime.sessions import open_session
from slimheads.verification import parity_seq2seq as seq2seq
from slimheads.verification.integer_products import overflow_faults, product_weights
from slimheads.verification.lengths import right_up_to
from slimheads.verification.parity import (
    AnyCase,
    Runner,
    cases,
    onnx_greedy,
    onnx_runner,
    torch_runner,
    tried_changes,
)
from slimheads.verification.rounded import write_losses, write_rounded
from slimheads.verification.structure import fused_faults, graph_faults, merged_faults

PROMPT_TOKENS, NEW_TOKENS = 8, 16


@dataclass(frozen=True)
class Subject:
    """One file, the cases that run it, and how to open it.

    `converted` is false for a graph that no converter wrote: the merged decoder is merged from converted ones.
    """

    path: Path
    cases: Sequence[AnyCase]
    open: Callable[[], Runner]
    converted: bool = True


@dataclass(frozen=True)
class Yardstick:
    """The reference of an int8 or q4 file, and the file itself, both without ONNX Runtime's fusions.

    `losses` is the float32 graph with the rounding error of each product, as `write_losses` writes it.
    """

    reference: Callable[[], Runner]
    as_written: Callable[[], Runner]
    losses: Callable[[], Runner]


@dataclass(frozen=True)
class Structure:
    """One file's structure: how many tensors are compared with the plan, and how to find the faults."""

    path: Path
    tensors: int
    faults: Callable[[], Iterator[str]]
    claim: str = "every targeted tensor shrank by what the plan says"


@dataclass(frozen=True)
class Generation:
    """Greedy search from one prompt: `expected` by torch, `found` by a file. int64 [batch, positions]."""

    path: Path
    prompt: str
    new_tokens: int
    expected: Callable[[], torch.Tensor]
    found: Callable[[], torch.Tensor]


class Chain(Protocol):
    """Everything that the links compare."""

    @property
    def cases(self) -> Sequence[AnyCase]: ...

    def torch_runner(self, model: PreTrainedModel) -> Runner: ...

    def subjects(self, precision: Precision) -> list[Subject]:
        """The slim files of a precision."""
        ...

    def yardsticks(self, precision: Precision) -> list[Yardstick | None]:
        """The references of these files where their weights are whole numbers, else None."""
        ...

    def structures(self, further: Sequence[Precision]) -> list[Structure]: ...

    @property
    def writes_text(self) -> bool:
        """Whether the model generates tokens with a cache; only then are there generations."""
        ...

    def generations(self) -> list[Generation]: ...


@dataclass(frozen=True)
class Shipped:
    """The models and the folders: `dense_onnx` and `onnx` hold the graphs, `folder` is what clients load."""

    dense: PreTrainedModel
    slim: PreTrainedModel
    plan: Plan
    dense_onnx: Path
    folder: Path
    task: str
    int8_for: Int8For = "any"

    @property
    def onnx(self) -> Path:
        """The slim graphs."""
        return self.folder / "onnx"

    def graph(self, precision: Precision = "fp32", part: str = "model") -> Path:
        """A slim graph."""
        return self.onnx / file_name(part, precision)

    def dense_graph(self, part: str = "model") -> Path:
        """A dense graph, in float32."""
        return self.dense_onnx / file_name(part, "fp32")

    def as_form(self, folder: Path) -> Shipped:
        """The same models with another form of their graphs, which `folder` holds below dense/ and slim/."""
        return replace(self, dense_onnx=folder / "dense" / "onnx", folder=folder / "slim")

    def sums(self, part: str, further: Sequence[Precision]) -> list[Structure]:
        """Whether sums of int8 products fit into 16 bits, in files for CPUs that may add in 16 bits."""
        if self.int8_for not in SIXTEEN_BITS:
            return []
        claim = "no sum of two int8 products overflows 16 bits"
        paths = [self.graph(precision, part) for precision in further if PRECISIONS[precision].for_cpus]
        return [Structure(path, len(product_weights(path)), partial(overflow_faults, path), claim) for path in paths]


def chain_of(shipped: Shipped) -> Chain:
    """The chain that fits the model."""
    return _FourFiles(shipped) if shipped.dense.config.is_encoder_decoder else OneFile(shipped)


def fixed_cache_axes(path: Path) -> bool:
    """Whether a file fixes its cache's axes. optimum cannot run it, because it sizes empty caches by config.json."""
    caches = [i for i in read_interface(path).inputs if i.name.startswith("past_key_values.")]
    return any(isinstance(i.dims[1], int) for i in caches)


_Writer = Callable[[Path, Path, Path], None]


@contextmanager
def _temporary_graph(write: _Writer, plain: Path, made: Path) -> Iterator[Path]:
    """A graph made of a float32 file and an int8 or q4 file."""
    with tempfile.TemporaryDirectory(prefix="slimheads-") as scratch:
        path = Path(scratch) / plain.name
        write(plain, made, path)
        yield path


def _outputs_of_part(part: str, run: Runner) -> Runner:
    """A runner that returns only the outputs of one file of an encoder-decoder."""
    own = seq2seq.outputs_of(part)
    return lambda case: {name: array for name, array in run(case).items() if own(name)}


class OneFile:
    """The chain of a model in one file."""

    def __init__(self, shipped: Shipped) -> None:
        self._shipped = shipped
        self.writes_text = shipped.task == "text-generation"
        self.cases = cases(shipped.dense.config, shipped.task)

    def torch_runner(self, model: PreTrainedModel) -> Runner:
        return torch_runner(model)

    def subjects(self, precision: Precision) -> list[Subject]:
        return [self._subject(self._shipped.graph(precision), self._shipped.slim)]

    def dense_subject(self) -> Subject:
        """The dense model's file."""
        return self._subject(self._shipped.dense_graph(), self._shipped.dense)

    def _subject(self, path: Path, model: PreTrainedModel) -> Subject:
        return Subject(path, self.cases, partial(self._runner, path, model))

    def _runner(self, path: Path, model: PreTrainedModel, *, optimize: bool = True) -> Runner:
        return onnx_runner(open_session(path, optimize=optimize), kv_shapes(model) if self.writes_text else ())

    def yardsticks(self, precision: Precision) -> list[Yardstick | None]:
        if not PRECISIONS[precision].rounded:
            return [None]
        slim, plain, made = self._shipped.slim, self._shipped.graph(), self._shipped.graph(precision)

        def of_both(write: _Writer) -> Runner:
            with _temporary_graph(write, plain, made) as path:
                return self._runner(path, slim, optimize=False)

        as_written = partial(self._runner, made, slim, optimize=False)
        return [Yardstick(partial(of_both, write_rounded), as_written, partial(of_both, write_losses))]

    def fused(self) -> list[Structure]:
        """In both files: whether each fused attention node has the head count of its own layer."""
        sites, plan = find_sites(self._shipped.dense), self._shipped.plan
        graphs = ((self._shipped.dense_graph(), Plan(())), (self._shipped.graph(), plan))
        attention = len(of_kind(sites, "attention"))
        return [Structure(path, attention, partial(fused_faults, path, sites, kept)) for path, kept in graphs]

    def structures(self, further: Sequence[Precision]) -> list[Structure]:
        shipped = self._shipped
        sites, plan, path = find_sites(shipped.dense), shipped.plan, shipped.graph()

        def faults() -> Iterator[str]:
            yield from graph_faults(shipped.dense_graph(), path, sites, plan)
            for precision in further:
                yield from fused_faults(shipped.graph(precision), sites, plan)

        return [
            Structure(path, sum(len(site.projections) for site in sites), faults),
            *shipped.sums("model", further),
        ]

    def generations(self) -> list[Generation]:
        if not self.writes_text:
            return []
        slim, path = self._shipped.slim, self._shipped.graph()

        def found(ids: torch.Tensor, mask: torch.Tensor, new_tokens: int) -> torch.Tensor:
            if fixed_cache_axes(path):
                shapes = kv_shapes(slim)
                return torch.from_numpy(onnx_greedy(open_session(path), shapes, ids.numpy(), mask.numpy(), new_tokens))
            return greedy_tokens(self._shipped.folder, ids, mask, new_tokens)

        made = []
        for shown, *prompt, new_tokens in self._prompts():
            ids, mask = (torch.from_numpy(array) for array in prompt)
            expected = partial(slim.generate, input_ids=ids, attention_mask=mask, **greedy_options(new_tokens))
            made.append(Generation(path, shown, new_tokens, expected, partial(found, ids, mask, new_tokens)))
        return made

    def _prompts(self) -> Iterator[tuple[str, np.ndarray, np.ndarray, int]]:
        """Prompts as (name, ids, mask, new tokens): a short text, and one that ends before each change."""
        config = self._shipped.dense.config
        limit = right_up_to(config)
        fresh = [case for case in self.cases if case.padding in ("no", "left") and not case.past]
        length = max(case.length for case in fresh if case.length <= min(PROMPT_TOKENS, limit // 2))
        for case in (case for case in fresh if case.length == length):
            yield str(case), case.ids, case.mask, min(NEW_TOKENS, limit - length)
        longest = max((case for case in fresh if case.batch == 1), key=lambda case: case.length)
        for change in tried_changes(config):
            length = max(1, change.length - (NEW_TOKENS if change.wrong_past else NEW_TOKENS // 2))
            ids, mask = (array[:, :length] for array in (longest.ids, longest.mask))
            yield f"batch 1, length {length}, no padding", ids, mask, min(NEW_TOKENS, limit - length)


class _FourFiles:
    """The chain of an encoder-decoder."""

    writes_text = True

    def __init__(self, shipped: Shipped) -> None:
        self._shipped = shipped
        self.cases = seq2seq.cases(shipped.dense.config)

    def torch_runner(self, model: PreTrainedModel) -> Runner:
        return seq2seq.torch_runner(model)

    def subjects(self, precision: Precision) -> list[Subject]:
        """Each file in turn, with the others in float32."""
        fresh = [case for case in self.cases if not case.past]
        run_by = {ENCODER: fresh, FIRST_DECODER: fresh, NEXT_DECODER: [case for case in self.cases if case.past]}

        def opened(part: str) -> Runner:
            return _outputs_of_part(part, seq2seq.Files.in_folder(self._shipped.onnx, part, precision).open().runner)

        return [
            Subject(
                self._shipped.graph(precision, part),
                run_by.get(part, self.cases),
                partial(opened, part),
                converted=part != MERGED_DECODER,
            )
            for part in PARTS
        ]

    def yardsticks(self, precision: Precision) -> list[Yardstick | None]:
        """The merged decoder has the weights of the other two decoders, so it is compared with them."""
        if not PRECISIONS[precision].rounded:
            return [None] * len(PARTS)
        folder = self._shipped.onnx
        parts = seq2seq.Files(*(folder / file_name(part, precision) for part in (ENCODER, FIRST_DECODER, NEXT_DECODER)))
        plain = seq2seq.Files.in_folder(folder)
        names: dict[str, str] = {ENCODER: "encoder", FIRST_DECODER: "first", NEXT_DECODER: "following"}

        def of_both(write: _Writer, part: str) -> Runner:
            if part == MERGED_DECODER:
                return _outputs_of_part(part, replace(parts, encoder=plain.encoder).open(optimize=False).runner)
            with _temporary_graph(write, folder / file_name(part, "fp32"), getattr(parts, names[part])) as path:
                return _outputs_of_part(part, replace(plain, **{names[part]: path}).open(optimize=False).runner)

        def as_written(part: str) -> Runner:
            return _outputs_of_part(part, seq2seq.Files.in_folder(folder, part, precision).open(optimize=False).runner)

        return [
            Yardstick(
                partial(of_both, write_rounded, part), partial(as_written, part), partial(of_both, write_losses, part)
            )
            for part in PARTS
        ]

    def structures(self, further: Sequence[Precision]) -> list[Structure]:
        encoder = seq2seq.encoder_sites(self._shipped.dense)
        decoder = tuple(site for site in find_sites(self._shipped.dense) if site.key not in {s.key for s in encoder})
        own = {ENCODER: encoder, FIRST_DECODER: decoder, NEXT_DECODER: decoder}
        structures = [self._structure(part, sites, further) for part, sites in own.items()] + [self._merged(further)]
        return structures + [structure for part in own for structure in self._shipped.sums(part, further)]

    def _structure(self, part: str, sites: tuple[Site, ...], further: Sequence[Precision]) -> Structure:
        keys = {site.key for site in sites}
        plan = Plan(tuple(site for site in self._shipped.plan.sites if site.key in keys))
        before, after = self._shipped.dense_graph(part), self._shipped.graph("fp32", part)

        def faults() -> Iterator[str]:
            yield from graph_faults(before, after, sites, plan, cached=part == NEXT_DECODER)
            for precision in further:
                yield from fused_faults(self._shipped.graph(precision, part), sites, plan)

        return Structure(after, sum(len(site.projections) for site in sites), faults)

    def _merged(self, further: Sequence[Precision]) -> Structure:
        def faults() -> Iterator[str]:
            for precision in ("fp32", *further):
                parts = (FIRST_DECODER, NEXT_DECODER, MERGED_DECODER)
                yield from merged_faults(*(self._shipped.graph(precision, part) for part in parts))

        return Structure(self._shipped.graph("fp32", MERGED_DECODER), 1 + len(further), faults)

    def generations(self) -> list[Generation]:
        slim, folder = self._shipped.slim, self._shipped.onnx
        start, new_tokens = decoder_start(slim), min(NEW_TOKENS, position_limit(slim.config) - 1)
        fresh = [case for case in self.cases if not case.past]
        length = max(case.length for case in fresh if case.length <= PROMPT_TOKENS)
        made = []
        for part in (MERGED_DECODER, NEXT_DECODER):
            for case in (case for case in fresh if case.length == length):
                inputs = {name: torch.from_numpy(array) for name, array in case.inputs.items()}
                expected = partial(seq2seq_generate, slim, inputs, start, new_tokens)
                if fixed_cache_axes(folder / file_name(part, "fp32")):
                    found = partial(seq2seq.onnx_greedy, seq2seq.Files.in_folder(folder, part), case, start, new_tokens)
                else:
                    found = partial(
                        seq2seq_greedy_tokens,
                        self._shipped.folder,
                        inputs,
                        start,
                        new_tokens,
                        merged=part == MERGED_DECODER,
                    )
                made.append(Generation(folder / file_name(part, "fp32"), str(case), new_tokens, expected, found))
        return made
