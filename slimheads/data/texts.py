"""The texts on which drift is measured: read, tokenized and batched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimheads.errors import UsageError
from slimheads.families.limits import position_limit


def read_texts(path: Path | None) -> tuple[str, ...]:
    """The sample texts: one per line, without blank lines; `path` None is the built-in sample.

    Raises:
        UsageError: the file is missing, unreadable, not UTF-8, or has no text.
    """
    if path is None:
        data, where = (files("slimheads.data") / "samples" / "text.txt").read_bytes(), "samples/text.txt"
    else:
        where = str(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            hint = "use a UTF-8 text file with one text per line"
            what = f"{where}: the texts cannot be read ({error.strerror})"
            raise UsageError(what, keys=("verify.text",), hint=hint) from error
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = f"{where}:{line}: the texts are not UTF-8"
        raise UsageError(what, keys=("verify.text",), hint="save the file as UTF-8") from error
    texts = tuple(text for line in lines if (text := line.strip()))
    if not texts:
        raise UsageError(f"{where}: the file has no text", keys=("verify.text",), hint="write one text per line")
    return texts


@dataclass(frozen=True)
class TextBatch:
    """Right-padded texts: `input_ids` and `attention_mask` [texts, longest], `lengths` without the padding.

    `answer` is the text that an encoder-decoder generated from each, int64 [texts, 1 + longest], starting with the
    decoder's start token. `lengths` are then those of the answers, without the start token.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    lengths: list[int]
    answer: torch.Tensor | None = None


def text_batches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int, size: int
) -> Iterator[TextBatch]:
    """Batches of texts of similar length. Not padded by the tokenizer, which may have no padding token or pad left."""
    limit = min(max_length, tokenizer.model_max_length, position_limit(model.config))
    encoded: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
    rows = sorted((row for row in encoded if row), key=len)
    candidates = (tokenizer.pad_token_id, getattr(model.config, "pad_token_id", None), tokenizer.eos_token_id)
    known = range(model.get_input_embeddings().weight.shape[0])
    pad = next((token for token in candidates if token in known), 0)
    for start in range(0, len(rows), size):
        chosen = rows[start : start + size]
        lengths = [len(row) for row in chosen]
        width = max(lengths)
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in chosen], device=model.device)
        mask = torch.tensor([[1] * length + [0] * (width - length) for length in lengths], device=model.device)
        yield TextBatch(ids, mask, lengths)
