"""The files of a checkpoint besides weights and config that are copied to slim/.

They are known by name. Other files in a model's folder (training state, other exports, code, notes) are not copied.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from slimheads.intake.json_files import read_json_as
from slimheads.intake.model_files import refuse_link
from slimheads.intake.side_json import strip_code
from slimheads.notices import notify
from slimheads.side_files.sentence_modules import MODULES, TRANSFORMER_SETTINGS, module_files
from slimheads.side_files.tokenizer_settings import TOKENIZER_SETTINGS, translated

# Tokenizer files, by the names that transformers gives them.
TOKENIZER_FILES = (
    *("tokenizer.json", TOKENIZER_SETTINGS, "special_tokens_map.json", "added_tokens.json", "normalizer.json"),
    *("vocab.*", "*.vocab", "target_vocab.json", "vocab-*.json", "encoder.json", "entity_vocab.json"),
    *("merges.txt", "vocab.bpe", "*.bpe", "bpe.codes", "dict.txt"),
    *("*.model", "tokenizer.model.v*", "*.spm", "*.tiktoken", "tekken.json", "emoji_dict.json"),
)
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_PREPARATION = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_SENTENCES = (MODULES, "config_sentence_transformers.json", *TRANSFORMER_SETTINGS)
_NAMES = (*TOKENIZER_FILES, *_TEMPLATES, *_PREPARATION, *_SENTENCES)
_TERMS = re.compile(
    r"(?:.*[-_ .])?(?:un)?(?:licen[sc]es?|notices?|copying|copyrights?|patents|(?:acceptable[-_ ])?use[-_ ]policy)"
    r"(?:[-_ .].*)?",
    re.IGNORECASE,
)
_TERMS_SUFFIXES = {"", ".txt", ".md", ".rst", ".html", ".pdf", ".lesser", ".apache", ".mit", ".bsd"}
_TERMS_FOLDERS = {"licenses", "licences"}
# Common files that are never shipped and need no notice.
_UNSHIPPED = (
    *("config.json", "generation_config.json", "plan.json", "*.index.json", "README*", ".*", "*_results.json"),
    *(
        "trainer_state.json",
        "training_args.json",
        "train_config.json",
        "data_config.json",
        "adapter_config.json",
        "quantize_config.json",
    ),
)
_CARD_CHARACTERS = 20_000  # the front matter of a model card is within these
# Keys of sentence_bert_config.json that ship; others can make a client load further files or a kernel.
_TRANSFORMER_KEYS = {
    *("max_seq_length", "do_lower_case", "transformer_task", "modality_config", "module_output_name"),
    *("processing_kwargs", "unpad_inputs"),
}
# The keys with tokenizer options, by old and new name, and the options that ship.
_TOKENIZER_OPTIONS = {"tokenizer_args", "processor_kwargs"}
_TOKENIZER_OPTION_KEYS = {"model_max_length", "padding_side", "truncation_side", "use_fast"}

# Files that are downloaded from a model on the hub: weights, and all that could ship under any spelling.
HUB_PATTERNS = [
    *("*.json", "*.safetensors", "*.txt", "*.model", "*.model.v*", "*.jinja", "*.vocab", "*.bpe", "*.spm"),
    *("*.tiktoken", "bpe.codes", "*.md", "*LICEN[SC]E*", "*[Ll]icen[sc]e*", "*NOTICE*", "Notice*", "COPYING*"),
]


def side_files(folder: Path) -> Iterator[Path]:
    """Relative paths of a checkpoint's files besides weights and config: tokenizer, pooling, licence.

    Raises:
        ModelRefusedError: as `sentence_modules`.
    """
    yield from sorted({*_top(folder), *_templates(folder), *_terms_folders(folder), *module_files(folder)})


def copy_side_files(folder: Path, files: Iterable[Path], target: Path) -> None:
    """Copies side files, unchanged except for keys that clients must not follow or cannot read.

    A file that exists in `target` is not replaced.

    Raises:
        ModelRefusedError: a file is a link out of the folder.
    """
    for relative in files:
        made = target / relative
        made.parent.mkdir(parents=True, exist_ok=True)
        if made.exists():
            continue
        refuse_link(folder, folder / relative)
        shipped = shipped_json(folder, relative)
        if shipped is None:
            shutil.copyfile(folder / relative, made)
        else:
            made.write_text(json.dumps(shipped, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if made.suffix == ".json":
            strip_code(made)


def shipped_json(folder: Path, relative: Path) -> Any:
    """The changed content of a JSON side file; None if it ships byte for byte."""
    name = relative.as_posix()
    if name == TOKENIZER_SETTINGS:
        return translated(folder)
    if name in TRANSFORMER_SETTINGS:
        settings = read_json_as(folder / relative, dict)
        kept = dict(_client_settings(settings))
        return None if kept == settings else kept
    return None


def stated_terms(folder: Path) -> dict[str, str]:
    """The licence from the front matter of the source's model card: license, license_name and license_link."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8", errors="replace")[:_CARD_CHARACTERS]
    head = re.match(r"---\r?\n(.*?\n)---\s", text, re.DOTALL)
    found = re.findall(r"^(license(?:_name|_link)?):[ \t]*(\S[^\r\n]*?)[ \t]*$", head[1] if head else "", re.MULTILINE)
    return {key: value.strip("\"'") for key, value in found if not value.startswith(("[", "{", "|", ">", "&", "*"))}


def note_files_left_out(folder: Path) -> None:
    """Adds a notice about files that may matter to the user and are not in slim/."""
    shipped = set(side_files(folder))
    lost = [
        path.name
        for path in sorted(folder.iterdir())
        if path.suffix in {".json", ".jinja", ".txt"}
        and path.is_file()
        and Path(path.name) not in shipped
        and not any(fnmatchcase(path.name, pattern) for pattern in _UNSHIPPED)
    ]
    if lost:
        notify(f"slim/ does not have {', '.join(lost)}: only files with known names are copied")
    for name in TRANSFORMER_SETTINGS:
        settings = read_json_as(folder / name, dict) or {}
        dropped = sorted(
            k for k, value in settings.items() if value and dict(_client_settings({k: value})) != {k: value}
        )
        if dropped:
            notify(f"slim/{name} is without {', '.join(dropped)} because a client would load what they name")


def _top(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        known = any(fnmatchcase(path.name, pattern) for pattern in _NAMES) or _is_terms(path.name)
        if known and not path.name.startswith(".") and path.is_file():
            yield Path(path.name)


def _is_terms(name: str) -> bool:
    suffix = Path(name).suffix.lower()
    numbered = suffix[1:].isdigit()  # LICENSE-2.0
    return _TERMS.fullmatch(name) is not None and (suffix in _TERMS_SUFFIXES or numbered)


def _templates(folder: Path) -> Iterator[Path]:
    for path in (folder / "additional_chat_templates").glob("*.jinja"):
        yield path.relative_to(folder)


def _terms_folders(folder: Path) -> Iterator[Path]:
    for inside in folder.iterdir():
        if inside.is_dir() and inside.name.lower() in _TERMS_FOLDERS:
            for path in inside.iterdir():
                if path.is_file() and path.suffix.lower() in _TERMS_SUFFIXES and not path.name.startswith("."):
                    yield path.relative_to(folder)


def _client_settings(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if key in _TRANSFORMER_KEYS:
            yield key, value
        elif key in _TOKENIZER_OPTIONS and isinstance(value, dict):
            yield key, {name: option for name, option in value.items() if name in _TOKENIZER_OPTION_KEYS}
