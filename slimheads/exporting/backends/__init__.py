"""Exporters: each turns a torch model into float32 ONNX files. A new one is a module here that fits `Backend`."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from transformers import PreTrainedModel


class Backend(Protocol):
    """An exporter. Files, inputs and outputs have the same names whichever one wrote them.

    Files are named as in `slimheads.exporting.artifacts`, nodes after the module that they came from
    (`/encoder/layer.0/attention/self/query/MatMul`), and a cache `past_key_values.0.key` and `present.0.key`, or
    `past_key_values.0.decoder.key` and `past_key_values.0.encoder.key` in an encoder-decoder.
    """

    def to_onnx(self, model: PreTrainedModel, folder: Path, task: str) -> None:
        """Writes one float32 graph, or the four of an encoder-decoder. A model that generates text has a KV cache.

        Args:
            model: in float32, on the CPU; it and its configuration are left as they were.
            folder: an existing folder; weights past 2 GB go beside each file as `<name>_data`.

        Raises:
            ModelRefusedError: there is no export for this model type and task.
        """
        ...

    def merge_decoders(self, first: Path, following: Path, target: Path) -> None:
        """Writes both decoders of an encoder-decoder as one graph; its input `use_cache_branch` chooses."""
        ...
