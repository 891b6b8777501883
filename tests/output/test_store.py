"""The store: stages are reused only when whole and unchanged, and an output folder shows exactly one run."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from slimheads.errors import UsageError
from slimheads.files import sha256_file
from slimheads.output import folder as output_folder
from slimheads.output.publishing import Source, publish
from slimheads.output.store import Record, Store, lock, stage_key

KEY = "a" * 64
OTHER_KEY = "b" * 64


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, without our own folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in files
        if path.relative_to(folder).parts[0] != ".slimheads"
    }


def left_over(out: Path) -> list[str]:
    return [path.name for path in (out / ".slimheads").glob("tmp-*")]


def finish(store: Store, stage: str = "prune", key: str = KEY, result: dict[str, Any] | None = None) -> Record:
    """A stage with two files, one of them in a folder."""
    with store.begin(stage) as work:
        (work.path / "model.safetensors").write_bytes(b"weights of " + key.encode())
        (work.path / "onnx").mkdir()
        (work.path / "onnx" / "model.onnx").write_bytes(b"graph")
        return work.publish(key, result or {"kept": [0, 2]}, seconds=1.5, peak_rss_mb=200.0)


def test_a_finished_stage_is_found_again(tmp_path: Path) -> None:
    made = finish(Store(tmp_path))
    found = Store(tmp_path).find("prune", KEY)
    assert found == made
    assert found.result == {"kept": [0, 2]}
    assert (found.seconds, found.peak_rss_mb) == (1.5, 200.0)
    assert found.path == tmp_path / ".slimheads" / "stages" / "prune" / KEY
    data = b"weights of " + KEY.encode()
    assert found.files["model.safetensors"].sha256 == hashlib.sha256(data).hexdigest()
    assert found.files["model.safetensors"].bytes == len(data)
    assert set(found.files) == {"model.safetensors", "onnx/model.onnx"}
    assert json.loads((found.path / "record.json").read_text())["format"] == 1
    assert left_over(tmp_path) == []


def test_another_key_or_stage_is_not_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path)
    finish(store)
    assert store.find("prune", OTHER_KEY) is None
    assert store.find("export", KEY) is None
    assert caplog.records == []  # nothing is damaged, nothing to warn of


def test_a_stage_keeps_its_latest_record_only(tmp_path: Path) -> None:
    store = Store(tmp_path)
    finish(store)
    finish(store, "export")
    finish(store, key=OTHER_KEY)
    assert store.find("prune", KEY) is None
    assert store.find("prune", OTHER_KEY) is not None
    assert store.find("export", KEY) is not None
    assert len(list((tmp_path / ".slimheads" / "stages" / "prune").iterdir())) == 1


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_stage_that_fails_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    store = Store(tmp_path)
    with pytest.raises(failure), store.begin("prune") as work:
        (work.path / "model.safetensors").write_bytes(b"half")
        raise failure
    assert store.find("prune", KEY) is None
    assert left_over(tmp_path) == []


def test_a_failed_stage_keeps_the_record_before_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = finish(store)
    with pytest.raises(KeyboardInterrupt), store.begin("prune"):
        raise KeyboardInterrupt
    assert store.find("prune", KEY) == made


def test_leaving_without_publishing_leaves_nothing(tmp_path: Path) -> None:
    with Store(tmp_path).begin("prune") as work:
        (work.path / "x").write_bytes(b"x")
    assert Store(tmp_path).find("prune", KEY) is None
    assert left_over(tmp_path) == []


def test_a_result_must_be_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        finish(Store(tmp_path), result={"cosine": float("nan")})
    assert left_over(tmp_path) == []


def test_a_stage_cannot_leave_links_or_its_own_record(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    with pytest.raises(ValueError, match="not a regular file"), Store(tmp_path / "out").begin("prune") as work:
        (work.path / "link").symlink_to(secret)
        work.publish(KEY, {}, 0, None)
    with pytest.raises(ValueError, match="record"), Store(tmp_path / "out").begin("prune") as work:
        (work.path / "record.json").write_text("{}")
        work.publish(KEY, {}, 0, None)


def test_keys_follow_the_content_and_nothing_else() -> None:
    base = stage_key("select", {"ratio": 0.5, "scope": "layer"}, ["k1", "k2"], {"torch": "2.13"})
    assert base == stage_key("select", {"scope": "layer", "ratio": 0.5}, ("k1", "k2"), {"torch": "2.13"})
    others = [
        stage_key("prune", {"ratio": 0.5, "scope": "layer"}, ["k1", "k2"], {"torch": "2.13"}),
        stage_key("select", {"ratio": 0.25, "scope": "layer"}, ["k1", "k2"], {"torch": "2.13"}),
        stage_key("select", {"ratio": 0.5, "scope": "layer"}, ["k2", "k1"], {"torch": "2.13"}),
        stage_key("select", {"ratio": 0.5, "scope": "layer"}, ["k1k2"], {"torch": "2.13"}),
        stage_key("select", {"ratio": 0.5, "scope": "layer"}, ["k1", "k2"], {"torch": "2.14"}),
        stage_key("select", {"ratio": 0.5, "scope": "layer"}, ["k1", "k2"], {}),
    ]
    assert len({base, *others}) == 7
    assert len(base) == 64 and int(base, 16)


def test_sha256_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"abc")  # the example of FIPS 180-2, appendix B.1
    assert sha256_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_an_output_is_assembled_from_several_stages(tmp_path: Path) -> None:
    out, source = tmp_path / "out", tmp_path / "source"
    (source / "1_Pooling").mkdir(parents=True)
    (source / "1_Pooling" / "config.json").write_bytes(b"mean")
    store = Store(out)
    pruned, exported = finish(store), finish(store, "export")
    publish(
        out,
        {
            "slim": {
                "model.safetensors": pruned.path / "model.safetensors",
                "onnx": exported.path / "onnx",
                "1_Pooling": source / "1_Pooling",
                "README.md": b"# card",
            },
            "dense": exported.path,
            "recipe.yaml": b"model: m\n",
        },
    )
    weights = b"weights of " + KEY.encode()
    assert tree(out) == {
        "slim/model.safetensors": weights,
        "slim/onnx/model.onnx": b"graph",
        "slim/1_Pooling/config.json": b"mean",
        "slim/README.md": b"# card",
        "dense/model.safetensors": weights,
        "dense/onnx/model.onnx": b"graph",
        "recipe.yaml": b"model: m\n",
    }
    assert left_over(out) == []
    # The bytes of a stage are not stored twice; those of the user are not shared.
    assert (out / "slim" / "model.safetensors").samefile(pruned.path / "model.safetensors")
    assert not (out / "slim" / "1_Pooling" / "config.json").samefile(source / "1_Pooling" / "config.json")
    assert store.find("prune", KEY) == pruned


def test_publishing_again_replaces_and_retracts(tmp_path: Path) -> None:
    publish(tmp_path, {"slim": {"a": b"1", "b": b"1"}, "plan.json": b"1", "report.json": b"1", "report.md": b"1"})
    publish(tmp_path, {"slim": {"a": b"2"}, "plan.json": b"2"}, retract=["report.json", "report.html", "slim"])
    assert tree(tmp_path) == {"slim/a": b"2", "plan.json": b"2", "report.md": b"1"}
    publish(tmp_path, {"report.json": b"3"}, retract=["slim", "plan.json", "report.md"])
    assert tree(tmp_path) == {"report.json": b"3"}
    publish(tmp_path, {"slim": {"a": b"4"}})  # a name that was retracted may come back
    assert tree(tmp_path) == {"report.json": b"3", "slim/a": b"4"}
    assert left_over(tmp_path) == []


def test_where_links_are_refused_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("this filesystem has no hard links")

    record = finish(Store(tmp_path))
    monkeypatch.setattr(os, "link", refuse)
    publish(tmp_path, {"slim": record.path})
    assert tree(tmp_path)["slim/onnx/model.onnx"] == b"graph"
    assert not (tmp_path / "slim" / "onnx" / "model.onnx").samefile(record.path / "onnx" / "model.onnx")


def test_a_source_that_is_a_link_is_published_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"vocabulary")  # as the hub's cache lays out its snapshots
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "vocab.txt").symlink_to(tmp_path / "blob")
    out = tmp_path / "out"
    publish(out, {"slim": {"vocab.txt": tmp_path / "snapshot" / "vocab.txt", "all": tmp_path / "snapshot"}})
    assert tree(out / "slim") == {"vocab.txt": b"vocabulary", "all/vocab.txt": b"vocabulary"}
    assert not any(path.is_symlink() for path in (out / "slim").rglob("*"))


@pytest.mark.parametrize("name", ["../escaped", "/escaped", "a/../../escaped", ""])
def test_nothing_is_written_outside_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="inside its folder"):
        publish(tmp_path / "out", {"slim": {name: b"x"}})
    assert tree(tmp_path / "out") == {}
    assert not (tmp_path / "escaped").exists()


def test_a_path_given_twice_is_refused(tmp_path: Path) -> None:
    record = finish(Store(tmp_path))
    with pytest.raises(ValueError, match="given twice"):
        publish(tmp_path, {"slim": {"onnx": record.path / "onnx", "onnx/model.onnx": b"x"}})
    assert tree(tmp_path) == {}


def test_a_folder_of_the_users_own_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "slim").mkdir()
    (tmp_path / "slim" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="was not made by slimheads"), lock(tmp_path):
        pass
    attempts: list[tuple[dict[str, Source], list[str]]] = [({"slim": {"a": b"1"}}, []), ({}, ["slim"])]
    for wanted, retract in attempts:
        with pytest.raises(UsageError, match="was not made by slimheads"):
            publish(tmp_path, wanted, retract)
    assert tree(tmp_path) == {"slim/thesis.tex": b"years of work"}


def test_readers_never_see_a_half_made_folder(tmp_path: Path) -> None:
    names = sorted(f"{i:02}" for i in range(20))
    stop, seen, wrong = threading.Event(), [0], []

    def read() -> None:
        while not stop.is_set():
            try:
                folder = os.open(tmp_path / "slim", os.O_RDONLY)
            except FileNotFoundError:
                continue
            try:
                listed = sorted(os.listdir(folder))  # noqa: PTH208 - of the folder that is open, whatever its name is now
                # Only what still has the name counts: an old folder is emptied once it has lost it.
                if (tmp_path / "slim").stat().st_ino == os.fstat(folder).st_ino:
                    seen[0] += 1
                    if listed != names:
                        wrong.append(listed)
            except FileNotFoundError:
                continue
            finally:
                os.close(folder)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(15):
            publish(tmp_path, {"slim": {name: str(number).encode() for name in names}})
    finally:
        stop.set()
        reader.join()
    assert wrong == []
    assert seen[0] > 0


def test_a_damaged_list_of_published_names_protects_what_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish(tmp_path, {"slim": {"a": b"1"}})
    (tmp_path / ".slimheads" / "published.json").write_text("{")
    with caplog.at_level(logging.WARNING, logger=output_folder.__name__), pytest.raises(UsageError):
        publish(tmp_path, {"slim": {"a": b"2"}})
    assert tree(tmp_path) == {"slim/a": b"1"}
    assert "published.json is damaged" in caplog.text
