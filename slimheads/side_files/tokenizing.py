"""The one place where tokenizers are loaded, and where what is wrong with one is said: a file, or a package that lacks.

transformers is shown a copy of the tokenizer's own files, so that nothing else of a model's folder is read for it.
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
from slimheads.notices import tell
from slimheads.runtime.quiet import quiet
from slimheads.side_files.files import TOKENIZER_FILES, copy_side_files
from slimheads.side_files.tokenizer_settings import TOKENIZER_SETTINGS

# Any of these makes a tokenizer of a folder. Others (added_tokens.json, say) only complete one.
_SIGNS = (
    *("tokenizer.json", TOKENIZER_SETTINGS, "vocab.txt", "vocab.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model", "source.spm"),
)
_WITHOUT_WORDS = (TOKENIZER_SETTINGS, "special_tokens_map.json", "added_tokens.json")
# What transformers' tokenizers import only when they are built: the names in its messages, and what pip calls them.
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
    """The tokenizer of a model's folder, once tried on a word; None where the folder has none.

    Args:
        config: the model's configuration as `read_config` gives it: config.json is not read again.

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
    """Fails where a text has a token that the model's table of embeddings has no row for; tells where it could have.

    Args:
        rows: of the table of embeddings.

    Raises:
        ModelRefusedError: naming the token's id and the rows.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest < rows:
        return
    what = f"the tokenizer has ids up to {largest}, and the model only {rows} rows of embeddings"
    met = {
        token for row in tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"] for token in row
    }
    if max(met, default=-1) >= rows:
        raise ModelRefusedError(
            f"{what}: the sample's texts use id {max(met)}",
            where=str(folder / _named_file(folder)),
            hint="take the tokenizer that the model was trained with",
        )
    tell(f"{what}: a text with one of the others cannot be used")


def _load(folder: Path, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, config=config, local_files_only=True, trust_remote_code=False
    )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError("the vocabulary is of no kind that transformers reads")
    tokenizer(["a"])
    return tokenizer


def _attempt(act: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """What an action returns, or the error it ended with: of any kind but those that ask the process to end."""
    try:
        with quiet(), _silent_panics():
            return act(), None
    except Exception as error:  # tokenizers raise whatever their files make them stumble over
        return None, error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a Rust panic is no Exception, and cannot be imported
            raise
        return None, error


@contextmanager
def _silent_panics() -> Iterator[None]:
    """A Rust panic is written straight to the process's stderr, with a stack, before Python hears of it."""
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
    where, said = folder / _named_file(folder), one_line(error, 300)
    if lacking := _lacking(files, error):
        return EnvironmentLackError(
            f"the tokenizer needs the package {lacking}, which is not installed",
            where=str(where),
            hint=f"pip install {lacking}",
        )
    if isinstance(error, ImportError):
        hint = "install what it names"
        return EnvironmentLackError(f"the tokenizer needs more packages ({said})", where=str(where), hint=hint)
    hint = "fetch the model folder again"
    if all(name.name in _WITHOUT_WORDS for name in files):
        said = "there is no vocabulary beside it"
    if "does not exist or is not currently imported" in said:
        hint = f"save the tokenizer again with transformers {transformers.__version__}"
    fast = folder / "tokenizer.json"
    if fast.is_file():
        _, damage = _attempt(lambda: PreTrainedTokenizerFast(tokenizer_file=str(fast)))
        if damage is not None:
            where, said = fast, one_line(damage, 300)
    return ModelRefusedError(f"the tokenizer cannot be loaded ({said})", where=str(where), hint=hint)


def _lacking(files: Sequence[Path], error: BaseException) -> str | None:
    """The package that an error asks for and that is not installed."""
    said = f"{getattr(error, 'name', None) or ''} {error}".lower().replace("-", "_")
    missing = [name for name in _PACKAGES if name in said and find_spec(name) is None]
    if {"sentencepiece", "tiktoken"} <= set(missing):  # transformers tries both on any vocabulary
        missing = ["tiktoken" if any(name.suffix == ".tiktoken" for name in files) else "sentencepiece"]
    return _PACKAGES[missing[0]] if missing else None


def _is_tokenizers(path: Path) -> bool:
    return path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in TOKENIZER_FILES)


def _named_file(folder: Path) -> str:
    """The file of a tokenizer that an error names where no other is known to be the cause."""
    order = (TOKENIZER_SETTINGS, *(name for name in _SIGNS if name != TOKENIZER_SETTINGS))
    return next(name for name in order if (folder / name).is_file())
