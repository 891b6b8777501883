"""Loads tokenizers, and names the damaged file or the missing package if that fails.

transformers gets a copy of only the tokenizer's files, so that it reads nothing else from a model's folder.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from slimheads.errors import EnvironmentLackError, ModelRefusedError, SlimheadsError, one_line
from slimheads.intake.json_files import read_json_as
from slimheads.notices import notify
from slimheads.runtime.quiet import quiet
from slimheads.side_files.shipped_files import TOKENIZER_FILES, copy_side_files
from slimheads.side_files.tokenizer_settings import TOKENIZER_SETTINGS

# A folder with any of these has a tokenizer. Others (e.g. added_tokens.json) only complete one.
_SIGNS = (
    *("tokenizer.json", TOKENIZER_SETTINGS, "vocab.txt", "vocab.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model", "source.spm"),
)
_NO_VOCABULARY = (TOKENIZER_SETTINGS, "special_tokens_map.json", "added_tokens.json")
# Packages that transformers' tokenizers import when they are built: name in its messages -> name for pip.
_PACKAGES = {
    "sentencepiece": "sentencepiece",
    "tiktoken": "tiktoken",
    "fugashi": "fugashi",
    "ipadic": "ipadic",
    "unidic_lite": "unidic-lite",
    "unidic": "unidic",
    "sudachipy": "sudachipy",
    "rhoknp": "rhoknp",
    "sacremoses": "sacremoses",
    "rjieba": "rjieba",
    "jieba": "jieba",
    "pythainlp": "pythainlp",
    "phonemizer": "phonemizer",
    "mistral_common": "mistral-common",
    "blobfile": "blobfile",
}


def load_tokenizer(folder: Path, config: PretrainedConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model's folder, after a trial on one word; None if the folder has none.

    Args:
        config: the model's configuration from `read_config`, since config.json is not read again.

    Raises:
        ModelRefusedError: a file of the tokenizer is damaged or not one that transformers reads (named).
        EnvironmentLackError: the tokenizer needs a package that is not installed (named).
    """
    if not any((folder / name).is_file() for name in _SIGNS):
        return None
    files = [Path(path.name) for path in sorted(folder.iterdir()) if _is_tokenizers(path)]
    for name in files:
        if name.suffix == ".json":
            read_json_as(folder / name, dict)
    with tempfile.TemporaryDirectory(prefix="slimheads-") as made:
        copy_side_files(folder, files, Path(made))
        loaded, error = _attempt(lambda: _load(Path(made), config))
        if error is None:
            return loaded
        raise _failure(folder, files, error) from error


def require_vocabulary(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], rows: int, folder: Path, max_length: int = 128
) -> None:
    """Refuses texts with a token id beyond the model's embedding table; a notice if other texts could have one.

    Args:
        rows: of the embedding table.

    Raises:
        ModelRefusedError: naming the token's id and the rows.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest < rows:
        return
    what = f"the tokenizer has ids up to {largest}, but the model has only {rows} embeddings"
    used = {
        token for row in tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"] for token in row
    }
    if max(used, default=-1) >= rows:
        raise ModelRefusedError(
            f"{what}: the sample's texts use id {max(used)}",
            where=str(folder / _named_file(folder)),
            hint="use the tokenizer that the model was trained with",
        )
    notify(f"{what}: texts with a larger id do not work")


def _load(folder: Path, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, config=config, local_files_only=True, trust_remote_code=False
    )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError("transformers does not know this kind of vocabulary")
    tokenizer(["a"])
    return tokenizer


def _attempt(act: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """An action's result, or its error, except for errors that end the process."""
    try:
        with quiet(), _silent_panics():
            return act(), None
    except Exception as error:  # damaged tokenizer files raise errors of any class
        return None, error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a Rust panic, whose class cannot be imported
            raise
        return None, error


@contextmanager
def _silent_panics() -> Iterator[None]:
    """Suppresses the stack that a Rust panic writes to stderr before it raises in Python."""
    sys.stderr.flush()
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - a device
        kept = os.dup(2)
        try:
            os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _failure(folder: Path, files: Sequence[Path], error: BaseException) -> SlimheadsError:
    where, reason = folder / _named_file(folder), one_line(error, 300)
    if missing := _missing_package(files, error):
        return EnvironmentLackError(
            f"the tokenizer needs the package {missing}, which is not installed",
            where=str(where),
            hint=f"pip install {missing}",
        )
    if isinstance(error, ImportError):
        hint = "install the packages that it names"
        return EnvironmentLackError(f"the tokenizer needs more packages ({reason})", where=str(where), hint=hint)
    hint = "fetch the model folder again"
    if all(name.name in _NO_VOCABULARY for name in files):
        reason = "there is no vocabulary beside it"
    if "does not exist or is not currently imported" in reason:
        hint = f"save the tokenizer again with transformers {transformers.__version__}"
    fast = folder / "tokenizer.json"
    if fast.is_file():
        _, damage = _attempt(lambda: PreTrainedTokenizerFast(tokenizer_file=str(fast)))
        if damage is not None:
            where, reason = fast, one_line(damage, 300)
    return ModelRefusedError(f"the tokenizer cannot be loaded ({reason})", where=str(where), hint=hint)


def _missing_package(files: Sequence[Path], error: BaseException) -> str | None:
    """The missing package that an error is about, if any."""
    said = f"{getattr(error, 'name', None) or ''} {error}".lower().replace("-", "_")
    missing = [name for name in _PACKAGES if name in said and find_spec(name) is None]
    if {"sentencepiece", "tiktoken"} <= set(missing):  # transformers tries both on any vocabulary
        missing = ["tiktoken" if any(name.suffix == ".tiktoken" for name in files) else "sentencepiece"]
    return _PACKAGES[missing[0]] if missing else None


def _is_tokenizers(path: Path) -> bool:
    return path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in TOKENIZER_FILES)


def _named_file(folder: Path) -> str:
    """The tokenizer file that an error names if the cause is in no other."""
    order = (TOKENIZER_SETTINGS, *(name for name in _SIGNS if name != TOKENIZER_SETTINGS))
    return next(name for name in order if (folder / name).is_file())
