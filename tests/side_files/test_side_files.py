"""What of a model's folder ships beside the weights, and what stays there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sentence_folders import change, copied, lay_out, write
from tiny import tiny_model

from slimheads.models.loading import load, save
from slimheads.notices import collected
from slimheads.side_files.shipped_files import note_files_left_out, side_files, stated_terms

TERMS = (
    *("LICENSE", "LICENSE.txt", "LICENSE.md", "License.txt", "licence.md", "LICENSE-MODEL", "LICENSE-2.0", "COPYING"),
    *("NOTICE", "NOTICE.md", "Notice.txt", "USE_POLICY.md", "MODEL_LICENSE", "THIRD_PARTY_NOTICES.txt"),
    *("COPYING.LESSER", "LICENSES/MIT.txt", "UNLICENSE"),
)
TOKENIZERS = (
    *("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "source.spm"),
    *("sentencepiece.bpe.model", "special_tokens_map.json", "added_tokens.json", "qwen.tiktoken", "tekken.json"),
    *("chat_template.jinja", "additional_chat_templates/tool.jinja", "preprocessor_config.json", "vocab-src.json"),
)
LEFT = (
    *("trainer_state.json", "training_args.json", "training_args.bin", "all_results.json", "eval_results.json"),
    *("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "events.out.tfevents.1", "zero_to_fp32.py"),
    *("latest", "run.log", "wandb/config.json", "runs/a/events.out.tfevents.2", "checkpoint-500/config.json"),
    *("checkpoint-500/LICENSE", "global_step10/mp_rank_00_model_states.pt", "adapter_config.json"),
    *("adapter_model.safetensors", "onnx/model.onnx", "onnx/tokenizer.json", "openvino/openvino_model.xml"),
    *("pytorch_model.bin", "modeling.py", "license.py", ".git/config.json", ".LICENSE", "1_Pooling/config.json"),
    *("model-00001-of-00002.safetensors", "model.safetensors.index.json", "notes.txt", "README.md"),
)


def test_terms_and_tokenizers_travel_and_a_trainers_files_do_not(tmp_path: Path) -> None:
    for name in (*TERMS, *TOKENIZERS, *LEFT):
        write(tmp_path / name, name)
    assert {path.as_posix() for path in side_files(tmp_path)} == {*TERMS, *TOKENIZERS}


def test_what_travels_is_the_same_bytes_even_into_a_folder_inside_the_source(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_model("bert").save_pretrained(source)
    wanted = ("tokenizer.json", "LICENSE", "additional_chat_templates/a.jinja")
    for name in wanted:
        write(source / name, f"{name}\n")
    for folder in (tmp_path / "out", source / "slim"):
        save(load(source), folder)
        files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert files == {*wanted, "config.json", "model.safetensors"}
        assert all((folder / name).read_text() == f"{name}\n" for name in wanted)


def test_only_modules_that_modules_json_names_travel(tmp_path: Path) -> None:
    lay_out(copied(tmp_path / "m"), {"1_Pooling": {"pooling_mode": "cls"}})
    write(tmp_path / "m" / "2_Dense" / "model.safetensors", "")
    names = {path.as_posix() for path in side_files(tmp_path / "m")}
    assert {"modules.json", "1_Pooling/config.json"} <= names
    assert not any(name.startswith("2_Dense") for name in names)


def test_a_client_of_the_copy_is_led_nowhere_else(tmp_path: Path) -> None:
    source = lay_out(copied(tmp_path / "m"), {"1_Pooling": {}})
    elsewhere = {"model_args": {"revision": "main"}, "cache_dir": "/somewhere"}
    kept = {"max_seq_length": 64, "do_lower_case": False, "tokenizer_args": {"padding_side": "left"}}
    change(source / "sentence_bert_config.json", **kept, **elsewhere)
    change(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["a.B", None]}, tokenizer_file="/etc/x.json")
    save(load(source), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "sentence_bert_config.json").read_text()) == kept
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert not {"auto_map", "tokenizer_file"} & settings.keys() and settings["pad_token"] == "[PAD]"
    with collected() as told:
        note_files_left_out(source)
    assert any("model_args" in text and "cache_dir" in text for text in told)


@pytest.mark.parametrize(("name", "told"), [("labels.json", True), ("trainer_state.json", False), ("a.log", False)])
def test_a_file_that_may_matter_is_told_by_name(tmp_path: Path, name: str, told: bool) -> None:
    source = copied(tmp_path / "m")
    write(source / name, "{}")
    with collected() as texts:
        note_files_left_out(source)
    assert [name in text for text in texts] == [True] * told


@pytest.mark.parametrize(
    ("card", "terms"),
    [
        ("---\nlicense: apache-2.0\ntags:\n- a\n---\n# A\n", {"license": "apache-2.0"}),
        (
            "---\r\nlanguage: en\r\nlicense: other\r\nlicense_name: 'mine'\r\nlicense_link: LICENSE\r\n---\r\n",
            {"license": "other", "license_name": "mine", "license_link": "LICENSE"},
        ),
        ("---\nlicense:\n- mit\n- apache-2.0\n---\n", {}),
        ("# A\nlicense: mit\n---\n", {}),
        ("---\nlicense: mit\n", {}),
        ("", {}),
    ],
)
def test_the_licence_is_what_the_head_of_the_card_states(card: str, terms: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    assert stated_terms(tmp_path) == terms
    assert stated_terms(tmp_path / "nowhere") == {}
