"""Tokenizers: those that load are shipped so that any client loads them, and what is wrong with one is said by name."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from sentence_folders import change, copied, write
from transformers import AutoTokenizer
from whole_runs import checkpoint, slimheads, write_recipe

from slimheads.errors import EnvironmentLackError, ModelRefusedError
from slimheads.models.checkpoint import read_config
from slimheads.models.loading import load, save
from slimheads.notices import collected
from slimheads.side_files import tokenizing
from slimheads.side_files.tokenizing import load_tokenizer, require_vocabulary

WORDS = "the cat and of"


def loaded(folder: Path) -> Any:
    return load_tokenizer(folder, read_config(folder))


def bare(folder: Path, **settings: Any) -> Path:
    """A model whose tokenizer is yet to be written, but for its settings."""
    copied(folder)
    for path in folder.glob("*token*"):
        path.unlink()
    write(folder / "tokenizer_config.json", settings)
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"extra_special_tokens": ["of", "and"]},
        {"extra_special_tokens": [{"content": "of", "special": True}], "additional_special_tokens": ["and"]},
        {"extra_special_tokens": [], "model_specific_special_tokens": {"image_token": "of"}},
        {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "is_local": True},
        {"tokenizer_file": "/nowhere/tokenizer.json", "auto_map": {"AutoTokenizer": ["a.B", None]}},
    ],
)
def test_settings_of_the_next_version_are_read_and_shipped_so_that_this_one_reads_them(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    expected = AutoTokenizer.from_pretrained(checkpoint())(WORDS)["input_ids"]
    source = copied(tmp_path / "m")
    change(source / "tokenizer_config.json", **settings)
    assert loaded(source)(WORDS)["input_ids"] == expected
    save(load(source), tmp_path / "out")
    shipped = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert shipped(WORDS)["input_ids"] == expected
    listed = [*settings.get("additional_special_tokens", []), *settings.get("extra_special_tokens", [])]
    assert {t if isinstance(t, str) else t["content"] for t in listed} <= set(shipped.all_special_tokens)
    if "model_specific_special_tokens" in settings:
        assert shipped.image_token == "of"


def test_settings_that_any_version_reads_are_shipped_byte_for_byte(tmp_path: Path) -> None:
    save(load(checkpoint()), tmp_path / "out")
    for name in ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"):
        assert (tmp_path / "out" / name).read_bytes() == (checkpoint() / name).read_bytes()


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    folder = bare(tmp_path / "m")
    (folder / "tokenizer_config.json").unlink()
    assert loaded(folder) is None


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


_WORD_LEVEL = {"type": "WordLevel", "vocab": {"a": "b"}, "unk_token": "a"}
_PANICS = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}  # tokenizers' own code ends in a Rust panic


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("tokenizer.json", _cut),
        ("tokenizer.json", lambda path: path.write_text("")),
        ("tokenizer.json", lambda path: path.write_text("[]")),
        ("tokenizer.json", lambda path: path.write_bytes(b"\xff\xfe{}")),
        ("tokenizer.json", lambda path: path.write_text("[" * 200_000)),
        ("tokenizer.json", lambda path: change(path, model=None)),
        ("tokenizer.json", lambda path: change(path, model=_WORD_LEVEL)),
        ("tokenizer.json", lambda path: change(path, normalizer=_PANICS)),
        ("tokenizer_config.json", _cut),
        ("tokenizer_config.json", lambda path: path.write_text("[]")),
        ("tokenizer_config.json", lambda path: change(path, tokenizer_class=7)),
        ("tokenizer_config.json", lambda path: change(path, tokenizer_class="Nonsense")),
        ("tokenizer_config.json", lambda path: change(path, model_max_length="long")),
        ("tokenizer_config.json", lambda path: change(path, pad_token=7)),
        ("tokenizer_config.json", lambda path: change(path, extra_special_tokens=[7])),
        ("tokenizer_config.json", lambda path: change(path, extra_special_tokens="of")),
        ("tokenizer_config.json", lambda path: change(path, added_tokens_decoder={"x": {"content": "y"}})),
        ("special_tokens_map.json", lambda path: path.write_text("{")),
    ],
)
def test_a_damaged_file_is_named_in_one_line(
    name: str, damage: Callable[[Path], Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = copied(tmp_path / "m")
    damage(source / name)
    with pytest.raises(ModelRefusedError) as caught:
        loaded(source)
    assert caught.value.where == str(source / name)
    assert capfd.readouterr() == ("", "")


def test_a_damaged_tokenizer_is_refused_before_any_stage_even_where_no_text_is_measured(tmp_path: Path) -> None:
    source = copied(tmp_path / "m", "vit")
    write(source / "tokenizer.json", "{")
    for command in ("run", "plan"):
        ended = slimheads(
            command, write_recipe(tmp_path / "r.yaml", source), *(["--out", tmp_path / "out"] * (command == "run"))
        )
        assert ended.code == 3 and "tokenizer.json" in ended.err and not list(tmp_path.rglob("*.onnx"))
        assert len(ended.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("settings", "files", "package"),
    [
        ({"tokenizer_class": "LlamaTokenizer"}, {"tokenizer.model": "x"}, "sentencepiece"),
        ({"tokenizer_class": "T5Tokenizer"}, {"spiece.model": "x"}, "sentencepiece"),
        ({"tokenizer_class": "MarianTokenizer"}, {"source.spm": "x", "vocab.json": "{}"}, "sentencepiece"),
        ({"tokenizer_class": "XLMTokenizer"}, {"vocab.json": "{}", "merges.txt": ""}, "sacremoses"),
        ({"tokenizer_class": "RoFormerTokenizer"}, {"vocab.txt": "[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]\na"}, "rjieba"),
        *(
            (
                {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": kind},
                {"vocab.txt": "[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]\na"},
                package,
            )
            for kind, package in (("mecab", "fugashi"), ("sudachi", "sudachipy"), ("jumanpp", "rhoknp"))
        ),
    ],
)
def test_a_package_that_lacks_is_named(
    settings: dict[str, Any], files: dict[str, str], package: str, tmp_path: Path
) -> None:
    if find_spec(package):
        pytest.skip(f"{package} is installed")
    source = bare(tmp_path / "m", **settings)
    for name, content in files.items():
        write(source / name, content)
    with pytest.raises(EnvironmentLackError, match=f"needs the package {package},") as caught:
        loaded(source)
    assert caught.value.hint == f"pip install {package}"
    assert Path(str(caught.value.where)).is_file()


def test_settings_without_a_vocabulary_say_so(tmp_path: Path) -> None:
    with pytest.raises(ModelRefusedError, match="no vocabulary"):
        loaded(bare(tmp_path / "m", tokenizer_class="BertTokenizer"))


def test_what_asks_the_process_to_end_is_not_taken_for_a_damaged_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (KeyboardInterrupt, SystemExit):

        def end(*_: Any, kind: type[BaseException] = kind, **__: Any) -> None:
            raise kind

        monkeypatch.setattr(tokenizing.AutoTokenizer, "from_pretrained", end)
        with pytest.raises(kind):
            loaded(checkpoint())
    sys.stderr.write("")  # stderr is there again


def test_nothing_else_of_the_folder_is_read_for_a_tokenizer(tmp_path: Path) -> None:
    """A class that builds a configuration from config.json finds none."""
    source = copied(tmp_path / "m")
    change(source / "tokenizer_config.json", tokenizer_class="RagTokenizer")
    config = read_config(source)
    change(source / "config.json", question_encoder={"model_type": "bert"}, generator={"model_type": "bert"})
    with pytest.raises(ModelRefusedError):
        load_tokenizer(source, config)


def test_ids_without_an_embedding_are_refused_where_the_sample_has_them_and_told_where_not() -> None:
    tokenizer = loaded(checkpoint())
    ids = tokenizer("the a of")["input_ids"]
    rows = max(ids)
    message = rf"ids up to \d+, but the model has only {rows} embeddings.*use id {rows}"
    with pytest.raises(ModelRefusedError, match=message):
        require_vocabulary(tokenizer, ["the a of"], rows, checkpoint())
    with collected() as told:
        require_vocabulary(tokenizer, ["the a"], rows, checkpoint())
        require_vocabulary(tokenizer, ["the a of"], 120, checkpoint())
    assert len(told) == 1 and f"only {rows} embeddings" in told[0]


def test_added_tokens_beyond_the_table_do_not_end_a_run_in_the_middle(tmp_path: Path) -> None:
    source = copied(tmp_path / "m")
    data = json.loads((source / "tokenizer.json").read_text())
    data["model"]["vocab"] |= {"the": 500}
    write(source / "tokenizer.json", data)
    ended = slimheads("plan", write_recipe(tmp_path / "r.yaml", source))
    assert ended.code == 3 and "ids up to 500" in ended.err and "120 embeddings" in ended.err
