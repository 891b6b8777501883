"""What the benchmarks share: models of a given size, paired measurements, and how a result is printed."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.modeling_utils import no_init_weights

from slimheads.families.sites import find_sites
from slimheads.latency.records import Interval
from slimheads.runtime.environment import environment

SIZES = {  # millions of parameters, nearly: (width, layers)
    "1M": (64, 2),  # for the benchmarks' own tests
    "20M": (256, 12),
    "100M": (640, 12),
    "350M": (1024, 20),
    "1.5B": (2048, 23),
}
HEAD_DIM, VOCABULARY = 64, 16_000
LAYOUTS = ("llama", "gpt2", "bert", "gpt_neox")  # grouped queries; Conv1D; separate biased; fused and interleaved
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def config_of(layout: str, size: str) -> Any:
    """A configuration of that layout with about as many parameters."""
    width, layers = SIZES[size]
    heads = width // HEAD_DIM if width > 2 * HEAD_DIM else 4
    if layout == "gpt2":
        return AutoConfig.for_model(
            layout, n_embd=width, n_layer=layers, n_head=heads, n_inner=6 * width, vocab_size=VOCABULARY
        )
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": (4 if layout == "llama" else 6) * width,
        "vocab_size": VOCABULARY,
    }
    own = {"llama": {"num_key_value_heads": heads // 2}}
    return AutoConfig.for_model(layout, **sizes, **own.get(layout, {}))


def model_of(layout: str, size: str, dtype: torch.dtype, *, all_weights: bool = False) -> PreTrainedModel:
    """A model with random weights in its blocks, made quickly: nothing is initialized that is not read.

    The other weights are memory that was never touched, and takes none, unless `all_weights` asks for numbers there.
    """
    auto = AutoModelForMaskedLM if layout == "bert" else AutoModelForCausalLM
    with no_init_weights():
        model = auto.from_config(config_of(layout, size), dtype=dtype)
    read = {p.module for site in find_sites(model) for p in site.projections}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if all_weights or name.rpartition(".")[0] in read:
                parameter.uniform_(-0.05, 0.05, generator=generator)
    return model.eval()


def block_weights(model: PreTrainedModel) -> list[torch.Tensor]:
    """The weights that are scored and cut: those of attention and of feed-forward blocks."""
    projections = (p for site in find_sites(model) for p in site.projections)
    return [model.get_submodule(p.module).get_parameter("weight").detach() for p in projections]


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' elements."""
    return sum(t.numel() * t.element_size() for t in tensors)


def paired(
    runs: Sequence[tuple[Callable[[], Any], Callable[[Any], object]]], *, sets: int, rounds: int, seed: int = 0
) -> np.ndarray:
    """Seconds of several runs, interleaved, in a new random order for every round; [runs, sets, rounds].

    Each run is a preparation that is not timed and the work that is, which takes what the preparation gave. What the
    work made is dropped after the clock has stopped. Every set begins with a round that is not counted.
    """
    rng = np.random.default_rng(seed)
    seconds = np.zeros((len(runs), sets, rounds + 1))
    for group in range(sets):
        for turn in range(rounds + 1):
            for index in rng.permutation(len(runs)).tolist():
                prepare, work = runs[index]
                given = prepare()
                start = time.perf_counter()
                made = work(given)
                seconds[index, group, turn] = time.perf_counter() - start
                del given, made
    return seconds[:, :, 1:]


def slope(parameters: Sequence[int], seconds: Sequence[float]) -> float:
    """Of the line through the logarithms: 1 if the cost is proportional to the size."""
    return float(np.polyfit(np.log(parameters), np.log(seconds), 1)[0])


def arguments(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with `--json`, and with an option for each default: `sizes=[...]` is `--sizes A B`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    choices = {"sizes": tuple(SIZES), "layouts": LAYOUTS, "dtypes": tuple(DTYPES)}
    for name, value in defaults.items():
        many = {"nargs": "+"} if isinstance(value, list) else {}
        kind = type(value[0] if isinstance(value, list) else value)
        parser.add_argument(f"--{name}", default=value, type=kind, choices=choices.get(name), help=" ", **many)
    return parser


def machine() -> str:
    """One line: processor, cores, load and versions."""
    here = environment()
    load = "unknown" if here.load_average is None else f"{here.load_average[0]:.1f}"
    versions = ", ".join(f"{name} {here.packages[name]}" for name in ("torch", "transformers", "optimum-onnx"))
    return (
        f"{here.cpu}, {here.cores_usable:g} cores, load {load}, {here.memory_bytes / 2**30:.0f} GiB, "
        f"{platform.system()}, Python {here.python}, {versions}, {torch.get_num_threads()} threads"
    )


def spread(interval: Any) -> str:
    """A ratio with its interval."""
    return f"{interval.estimate:.2f} ({interval.low:.2f} to {interval.high:.2f})"


def show(rows: Sequence[Mapping[str, Any]], *, title: str, notes: Sequence[str], as_json: bool, **more: Any) -> None:
    """Prints the machine and a Markdown table of the rows, or everything as JSON."""
    if as_json:
        plain = [{k: v.model_dump() if isinstance(v, Interval) else v for k, v in row.items()} for row in rows]
        print(json.dumps({"title": title, "machine": machine(), "rows": plain, **more, "notes": list(notes)}, indent=2))
        return
    print(f"{title}\n{machine()}\n")
    print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(_cell(value) for value in row.values())} |")
    print("".join(f"\n{note}" for note in notes))


def _cell(value: Any) -> str:
    if isinstance(value, Interval):
        return spread(value)
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
