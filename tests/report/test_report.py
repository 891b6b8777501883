"""The report says what the data says: in JSON, in words, in Markdown, in HTML and in the plots."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Container, Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from made_reports import (
    make_drift,
    make_joint,
    make_latency,
    make_link,
    make_model,
    make_prediction,
    make_report,
    make_tables,
)
from pydantic import ValidationError
from rich.console import Console
from ruamel.yaml import YAML

from slimheads.latency.records import CacheBytes, Interval, Latency, Timing
from slimheads.report import conditions, plots, tables
from slimheads.report.headline import headline
from slimheads.report.model import Report
from slimheads.report.render import (
    append_step_summary,
    print_summary,
    render_html,
    render_markdown,
    render_model_card,
)
from slimheads.runtime.environment import Gpu


def lines_of(report: Report) -> list[str]:
    return headline(report).lines


RANDOM_RANGE = "0.887 to 0.901 (3 seeds)"
REPORT = make_report()  # frozen, so every test may share it
FAILED = make_report(
    verdict={"ok": False, "exit_code": 4, "reasons": ["link 1 failed: the shipped weights are not the planned ones"]},
    certificate=[
        make_link(1, passed=False, max_abs=0.231, worst_case="batch 1, length 8", reason="a stale head count"),
        make_link(2),
    ],
    certificate_skipped=[],
    drift=None,
    drift_reason="there is no certified model to measure",
    latency=[],
    latency_reason="a model that fails is not timed",
    gates=[{"gate": "min_cosine", "limit": 0.85, "measured": None, "met": False, "reason": "drift was not measured"}],
)
NO_GPU = Latency(
    provider="cuda",
    threads=2,
    precision="fp32",
    shape=(1, 128),
    verdict="not measured",
    reason="no CUDAExecutionProvider",
)
NASTY = "evil/<script>alert('x')</script>|`a`\n# b"


def joint(kept: Sequence[int], dropped: Container[int] = (), removed: int = 3) -> Report:
    """A report on `make_joint`'s plan."""
    scores, plan = make_joint(kept, dropped, removed)
    return make_report(scores=scores, plan=plan, model=make_model(plan))


class Page(HTMLParser):
    """Collects what a browser would act on."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def cells(line: str) -> list[str]:
    """Cells of a Markdown table's line; an escaped pipe is no border."""
    return re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))


# The data


def test_json_has_the_keys_of_the_contract() -> None:
    data = json.loads(REPORT.to_json())
    wanted = {"format", "verdict", "recipe", "model", "files", "scores", "plan", "certificate", "certificate_skipped"}
    wanted |= {"drift", "drift_text", "latency", "gates", "stages", "environment", "command", "seconds", "peak_rss_mb"}
    assert wanted <= data.keys()
    assert data["format"] == 1
    assert data["verdict"].keys() >= {"ok", "exit_code", "reasons"}
    for side in ("dense", "slim"):
        assert data["model"][side].keys() >= {"parameters", "bytes", "flops"}
    link = {"link", "max_abs", "max_rel", "atol", "rtol", "cases", "passed"}
    assert data["certificate"][0].keys() >= link
    assert "random_control" in data["drift"]
    row = {"provider", "threads", "precision", "shape", "dense", "slim", "speedup", "flop_speedup", "realised"}
    assert data["latency"][0].keys() >= row
    assert data["latency"][0]["dense"].keys() >= {"median_ms", "p10_ms", "p90_ms", "runs"}
    assert data["latency"][0]["speedup"].keys() >= {"estimate", "low", "high"}
    assert data["stages"][0].keys() >= {"stage", "seconds", "peak_rss_mb", "reused"}


@pytest.mark.parametrize("report", [REPORT, FAILED, joint([922] * 6, {5})], ids=["passed", "failed", "all kinds"])
def test_json_reads_back_equal(report: Report) -> None:
    assert Report.model_validate_json(report.to_json()) == report


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_are_refused_wherever_they_hide(bad: float) -> None:
    places: list[dict[str, Any]] = [
        {"seconds": bad},
        {"latency": [make_latency((1, 16), 1.8, 1.1, control=Interval(estimate=1, low=bad, high=1.1))]},
        {"certificate": [make_link(1, max_abs=bad)]},
        {"recipe": {"select": {"ratio": bad}}},
        {"drift": make_drift(bad)},
    ]
    for place in places:
        with pytest.raises(ValidationError):
            make_report(**place)


@pytest.mark.parametrize(
    "fields",
    [
        {"drift": None},
        {"latency": []},
        {"certificate": []},
        {"drift_text_reason": None},
        {"latency": [NO_GPU.model_copy(update={"reason": None})]},
        {"gates": [{"gate": "min_cosine", "limit": 0.8, "measured": None, "met": False}]},
        {"model": make_model(slim={"parameters": 1, "bytes": 1, "flops": None})},
        {"verdict": {"ok": False, "exit_code": 7, "reasons": []}},
        {"verdict": {"ok": True, "exit_code": 7, "reasons": ["a gate"]}},
        {"plan": make_tables(5, 12, 3)[1]},
        {"model": make_model(make_tables(6, 12, 17)[1])},
        {"plan": make_joint([32] * 6)[1]},
        {"predictions": [], "predictions_reason": None},
        {"predictions": [make_prediction((1, 16), 1.1, 1.1, measured=None, error=None)]},
        {"predictions": [make_prediction((1, 16), 1.1, 1.1, speedup=None)]},
        {"unheard_of": 1},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_gap_without_a_reason_and_a_contradiction_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        make_report(**fields)


# The words


def test_headline_of_a_passed_run_starts_with_the_verdict_and_gives_every_finding() -> None:
    lines = lines_of(REPORT)
    assert lines[0].startswith("Passed")
    text = "\n".join(lines)
    assert "1.12x faster (95% interval 1.10 to 1.14) at 1x128, 97% of the FLOP-ratio speedup." in text
    assert "0.912" in text and RANDOM_RANGE in text
    assert "links 1, 2 and 4 held" in text
    assert "no better" not in text


def test_predictions_are_told_with_their_source_and_worst_error() -> None:
    rows = [
        make_prediction((1, 16), 1.10, 1.12, low=1.08, high=1.13),
        make_prediction((1, 128), 1.20, 1.14),
        make_prediction((4, 128), 1.25, 1.25, source="flops"),
        make_prediction((8, 128), 1.25, 0, measured=None, error=None, reason="too noisy"),
    ]
    report = make_report(predictions=rows)
    lines = [line for line in lines_of(report) if "prediction" in line]
    assert lines == [
        "Table-based latency prediction: worst error \u22125.0% (2 shapes).",
        "FLOP-based latency prediction: error +0.0% at 4x128.",
    ]
    for page in (render_markdown(report), Page(render_html(report)).text):
        assert all(said in page for said in ("1.10x", "1.08 to 1.13", "+1.8%", "latency table", "too noisy"))
        assert str(report.predictions_reason) in page
    silent = make_report(predictions=rows[3:])
    said = "Table-based latency prediction: 1.25x at 8x128 (no conclusive measurement to compare with)."
    assert said in lines_of(silent)


GAIN = {"estimate": 1.031, "low": 1.012, "high": 1.05}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"predicted_gain": GAIN}, "auto chose 2: predicted 1.03x vs. no step (1.01 to 1.05 by the latency"),
        ({"predicted_gain": GAIN, "kept_more": 3}, "latency table), with 3 heads more kept"),
        ({"predicted_gain": GAIN | {"low": 0.99}, "reason": "no difference beyond noise"}, "2: no difference beyond"),
        ({"multiple_of": 1, "reason": "all the same"}, "auto chose 1, no gain: all the same"),
    ],
)
def test_what_auto_came_to_is_told_and_no_more_than_the_table_supports(changes: dict[str, Any], said: str) -> None:
    report = make_report(selection={"asked": "auto", "multiple_of": 2} | changes)
    (line,) = [line for line in lines_of(report) if line.startswith("Head counts")]
    assert said in line
    assert ("1.03x" in line) is ("reason" not in changes)
    assert "Head counts" not in "\n".join(lines_of(REPORT))


def test_json_has_a_section_for_each_kind_that_the_plan_names() -> None:
    model = json.loads(joint([1000, 1536, 500], {1}).to_json())["model"]
    sizes = ("unit", "sites", "total", "kept", "removed")
    assert {kind: [count[name] for name in sizes] for kind, count in model["kinds"].items()} == {
        "attention": ["head", 2, 24, 18, 6],
        "feed_forward": ["neuron", 2, 3072, 1500, 1572],
        "layer": ["layer", 3, 3, 2, 1],
    }
    model = json.loads(REPORT.to_json())["model"]
    assert list(model["kinds"]) == ["attention"] and model["unit"] == "head"
    assert [model["heads"][name] for name in sizes] == ["head", 6, 72, 54, 18]


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (REPORT, "Removed 18 of 72 heads (25%): "),
        (joint([922] * 6), "Removed 18 of 72 heads (25%) and 3,684 of 9,216 feed-forward neurons (40%): "),
        (joint([922] * 6, removed=0), "Removed 3,684 of 9,216 feed-forward neurons (40%): "),
        (
            joint([922] * 6, {5}),
            "Removed 1 of 6 layers (17%), and in the other layers 15 of 60 heads (25%) and 3,070 of 7,680 feed-forward "
            "neurons (40%): ",
        ),
        (joint([1536] * 6, removed=0), "Removed nothing: all 72 heads and 9,216 feed-forward neurons are kept."),
    ],
    ids=["heads", "both", "neurons", "all", "nothing"],
)
def test_what_was_removed_is_said_kind_by_kind(report: Report, said: str) -> None:
    assert str(headline(report).findings[0]).startswith(said)


def test_pages_name_the_kinds_in_tables_control_and_card() -> None:
    report = joint([922] * 6, {5})
    counted = {row[0]: row[1:3] for row in tables.sizes(report).rows}
    assert counted["Feed-forward neurons in layers that stay"] == ("7,680", "4,610")
    assert counted["Layers"] == ("6", "5")
    assert tables.sizes(REPORT).rows[0][:3] == ("Heads", "72", "54")
    for page in (render_markdown, render_html, render_model_card):
        assert "as many heads, feed-forward neurons and layers removed at random" in page(report)
        assert "as many heads removed at random" in page(REPORT)
        assert "neuron" not in page(REPORT) and "layers that stay" not in page(REPORT)
    whole = render_model_card(joint([922] * 6))
    assert "18 of 72 attention heads and 3,684 of 9,216 feed-forward neurons of pkg://" in whole
    assert "18 of 72 attention heads of pkg://" in render_model_card(REPORT)
    figures = [(one.value, one.label, one.note) for one in tables.key_figures(report)]
    assert ("40%", "of feed-forward neurons removed", "3,070 of 7,680 in layers that stay") in figures
    assert ("17%", "of layers removed", "1 of 6") in figures


@pytest.mark.parametrize("name", ["cosine", "perplexity_ratio"])
def test_losing_to_random_is_said_right_after_the_verdict(name: str) -> None:
    lost = make_drift(0.794, name=name) if name == "cosine" else make_drift(1.6, (1.2, 1.3, 1.4), name)
    lines = lines_of(make_report(drift=lost))
    assert "is no better than random removal" in lines[1]
    assert ("0.794" in lines[1] and RANDOM_RANGE in lines[1]) if name == "cosine" else "1.600" in lines[1]
    for page in (render_markdown, render_html, render_model_card):
        assert "is no better than random removal" in page(make_report(drift=lost))


def test_every_page_has_what_the_user_was_told() -> None:
    told = make_report(notices=["generation_config.json: the key `top_k` was left out"])
    assert lines_of(told)[-1] == "Note: generation_config.json: the key `top_k` was left out."
    for page in (render_markdown, render_html, render_model_card):
        assert "top_k" in page(told) and "top_k" not in page(make_report())


def test_close_figures_are_not_rounded_into_a_tie() -> None:
    line = lines_of(make_report(drift=make_drift(0.89401, (0.8942, 0.8942, 0.8942))))[1]
    assert "0.8940," in line and "0.8942 " in line
    edge = make_latency((1, 8), 2.0, 1.02, speedup=Interval(estimate=1.02, low=1.003, high=1.04))
    assert "interval 1.003 to 1.040" in "\n".join(lines_of(make_report(latency=[edge])))


def test_headline_names_inconclusive_no_difference_slower_and_not_measured() -> None:
    rows = [
        make_latency((1, 8), 1.0, 1.01, "no difference shown"),
        make_latency((1, 16), 1.0, 1.3, "inconclusive", reason="the control reads 1.05 to 1.09"),
        make_latency((1, 32), 1.0, 0.9, "slower"),
        NO_GPU,
    ]
    text = "\n".join(lines_of(make_report(latency=rows)))
    assert "no difference shown at 1x8" in text
    assert re.search(r"inconclusive at 1x16: the control reads 1.05 to 1.09", text)
    assert "slower, 0.90x" in text
    assert re.search(r"Latency, fp32, cuda, 2 threads: not measured at 1x128: no CUDAExecutionProvider", text)
    assert "faster" not in text


def test_headline_of_a_failed_certificate_names_link_case_and_difference() -> None:
    lines = lines_of(FAILED)
    assert lines[0].startswith("Failed (exit code 4): link 1 failed")
    line = next(line for line in lines if line.startswith("Certificate"))
    assert all(part in line for part in ("link 1 FAILED", "2.3e-01", "batch 1, length 8", "stale head count"))
    assert "link 2" not in line


@pytest.mark.parametrize("render", [render_markdown, render_html, render_model_card])
def test_every_gap_has_its_reason_in_the_text(render: Callable[[Report], str]) -> None:
    page = render(FAILED)
    for reason in (FAILED.drift_reason, FAILED.latency_reason, "a stale head count"):
        assert reason is not None
        assert page.count(reason) >= 2  # among the first lines, and where the figures would be
    assert "no CUDAExecutionProvider" in render(make_report(latency=[NO_GPU]))
    counted = make_model(dense={"parameters": 5, "bytes": 6, "flops": None, "reason": "no count for this layer"})
    if render is not render_model_card:
        assert "no count for this layer" in render(make_report(model=counted))
        assert "drift was not measured" in page
    assert not re.search(r"\b(None|nan|null)\b", Page(page).text if render is render_html else page)


def test_the_command_is_given_exactly() -> None:
    assert REPORT.command in render_markdown(REPORT)
    assert REPORT.command in Page(render_html(REPORT)).text


# The pages


@pytest.mark.parametrize(
    "fields", [{}, {"drift": make_drift(0.7), "latency": [NO_GPU]}, {"model": make_model(source=NASTY)}]
)
def test_markdown_tables_have_equal_columns_and_blank_lines_around(fields: dict[str, Any]) -> None:
    for page in (render_markdown(make_report(**fields)), render_model_card(make_report(**fields))):
        blocks = [block for block in page.split("\n\n") if block.lstrip().startswith("|")]
        assert len(blocks) >= 4
        for block in blocks:
            lines = block.strip().splitlines()
            assert all(line.startswith("|") for line in lines), block
            assert len({len(cells(line)) for line in lines}) == 1, block
            assert len(lines) >= 3


@pytest.mark.parametrize("report", [REPORT, FAILED], ids=["passed", "failed"])
def test_markdown_has_the_certificate_as_a_heading_and_a_table(report: Report) -> None:
    lines = render_markdown(report).splitlines()
    start = lines.index("## Certificate")
    rows = [cells(line) for line in lines[start:] if line.startswith("| ")]
    assert [row[0].strip() for row in rows[: 2 + len(report.certificate)]] == [
        "Link",
        "---",
        *(str(link.link) for link in report.certificate),
    ]


def test_names_cannot_break_out_of_any_page() -> None:
    report = make_report(model=make_model(source=NASTY, hub_id='a"\nlicense: mit'), command="echo ```\n<b>")
    page = Page(render_html(report))
    assert "script" not in [tag for tag, _ in page.tags]
    assert "<script>alert('x')</script>" in page.text
    for text in (render_markdown(report), render_model_card(report)):
        assert "<script" not in text
        assert "\n# b" not in text
    front = YAML(typ="safe").load(render_model_card(report).split("---\n")[1])
    assert front["base_model"] == 'a"\nlicense: mit' and "license" not in front


def test_html_fetches_nothing_and_runs_nothing() -> None:
    for report in (REPORT, FAILED):
        page = Page(render_html(report))
        ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
        assert len(ids) == len(set(ids))
        for tag, attributes in page.tags:
            assert tag not in ("script", "link", "iframe", "object", "embed", "img")
            for name, value in attributes.items():
                assert not name.startswith("on")
                if name in ("src", "href", "xlink:href", "action", "data"):
                    assert value.startswith("#") and value[1:] in ids
                assert "http" not in value
        assert "@import" not in render_html(report) and "url(http" not in render_html(report)


def test_html_is_accessible_and_complete() -> None:
    page = Page(render_html(REPORT))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    plots = [attributes for tag, attributes in page.tags if tag == "svg" and "viewbox" in attributes]
    assert all(plot.get("aria-label") or plot.get("aria-hidden") == "true" for plot in plots)
    order = [
        "Passed",
        "What was removed",
        "Latency",
        "Certificate",
        "Size",
        "Drift",
        "Stages",
        "Environment",
        "Run it again",
    ]
    headings = re.findall(r"<h2[^>]*>([^<]*)</h2>", render_html(REPORT))
    assert [one for one in headings if one in order] == order


def test_the_same_report_gives_the_same_bytes() -> None:
    copy = Report.model_validate_json(REPORT.to_json())
    for render in (render_html, render_markdown, render_model_card):
        assert render(REPORT) == render(copy)


def test_plots_say_nothing_where_nothing_was_measured() -> None:
    assert plots.latency([NO_GPU], width=960, name="l") is None
    assert plots.drift(None, width=960, name="d") is None


# The model card


def card(**fields: Any) -> str:
    return render_model_card(make_report(model=make_model(**fields)))


def test_card_gives_the_code_that_fits_the_model() -> None:
    decoder = {"task": "text-generation", "sentence_transformers": False}
    assert "AutoModel.from_pretrained" in card() and 'backend="onnx"' in card()
    assert "AutoModelForCausalLM.from_pretrained" in card(**decoder)
    assert "ORTModelForCausalLM" in card(**decoder) and "SentenceTransformer" not in card(**decoder)
    own = card(reload="slimheads", **decoder)
    assert "slimheads.load(" in own and "AutoModelForCausalLM" not in own
    onnx = card(reload="onnx only", **decoder)
    assert "slimheads.load(" not in onnx and "AutoModelForCausalLM.from_pretrained" not in onnx.replace("ORT", "")
    for text in (card(), own, onnx):
        for code in re.findall(r"```python\n(.*?)```", text, flags=re.S):
            compile(code, "card", "exec")


def test_card_does_not_send_a_static_cache_to_optimum() -> None:
    report = make_report(recipe={"export": {"kv_axes": "static"}}, model=make_model(task="text-generation"))
    assert "ORTModelForCausalLM" not in render_model_card(report)


def test_card_front_matter_holds_only_what_is_known() -> None:
    def front(**fields: Any) -> dict[str, Any]:
        found: dict[str, Any] = YAML(typ="safe").load(card(**fields).split("---\n")[1])
        return found

    assert "base_model" not in front()
    assert front(hub_id="org/name")["base_model"] == "org/name"
    assert front()["library_name"] == "sentence-transformers"
    assert front(sentence_transformers=False)["library_name"] == "transformers"
    assert "library_name" not in front(sentence_transformers=False, reload="onnx only")
    assert "That of the source model." in card()


# Effects


def test_step_summary_is_appended_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    assert append_step_summary(REPORT) is False
    summary = tmp_path / "summary.md"
    summary.write_text("# before\n", encoding="utf-8")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert append_step_summary(REPORT) is True
    assert append_step_summary(FAILED) is True
    text = summary.read_text(encoding="utf-8")
    assert text.startswith("# before\n")
    assert text.index("**Passed") < text.index("**Failed")


def test_terminal_summary_says_the_verdict_first_and_where_the_files_are(tmp_path: Path) -> None:
    (tmp_path / "slim").mkdir()
    for report, folder in ((REPORT, tmp_path), (FAILED, tmp_path / "other")):
        console = Console(file=io.StringIO(), width=400)
        print_summary(report, console, folder)
        assert isinstance(console.file, io.StringIO)
        lines = console.file.getvalue().splitlines()
        assert lines[0] == lines_of(report)[0]
        assert str(folder / "report.html") in lines[-1]
        assert ("not published" in lines[-2]) == (report is FAILED)


def test_every_links_tolerance_is_in_words() -> None:
    """A precision's tolerance is a share of the largest output; structure and tokens allow no deviation at all."""
    link = make_report().certificate[0]
    precision = link.model_copy(update={"link": 3, "atol": None, "rtol": 0.01})
    tokens = link.model_copy(update={"link": 5, "max_abs": None, "max_rel": None, "atol": None, "rtol": None})
    assert tables.allowed(precision) == "1.0% of the largest output"
    assert (tables.largest(tokens), tables.allowed(tokens)) == ("tokens only", "no deviation")


def test_what_only_decoders_have_is_a_column_only_where_there_is_one() -> None:
    row = make_report().latency[0]
    assert "Tokens/s" not in tables.latencies([row]).head
    fast = Timing(median_ms=2.0, p10_ms=1.9, p90_ms=2.1, runs=30, tokens_per_second=500.0)
    cache = CacheBytes(dense=36864, slim=18432)
    found = row.model_copy(update={"dense": fast, "slim": fast, "cache_bytes_per_token": cache, "shape": (1, 1, 512)})
    lost = Latency(
        provider="cuda", threads=2, precision="fp32", shape=(1, 8), verdict="not measured", reason="no provider"
    )
    table = tables.latencies([found, lost])
    cells = [dict(zip(table.head, cells, strict=True)) for cells in table.rows]
    assert cells[0]["Shape"] == "decode 1x1 after 512"
    assert (cells[0]["Tokens/s"], cells[0]["Cache per token"]) == ("500 to 500", "36.9 kB to 18.4 kB")
    assert cells[1]["Tokens/s"] == cells[1]["Cache per token"] == "not measured"
    assert table.head[-1] == "Verdict" and table.numeric == {*range(2, 10)}


def test_the_environment_shows_each_provider_s_options_and_the_gpus_of_a_run_on_cuda() -> None:
    report = make_report()
    rows = dict(conditions.environment(report.environment).rows)
    assert rows["Session, cpu: intra_op_num_threads"] == "2" and "GPU" not in rows
    assert rows["Clock boost"] == "not readable on this system"
    assert rows["Memory"] == "16.0 GiB, 9.0 GiB free at the start"
    options = {"cuda": {"provider_options": {"device_id": "0", "arena": {}}, "provider_reason": None}}
    gpu = Gpu(name="Some GPU", driver="570.1", memory="80000 MiB")
    for found, said in (
        ({"gpus": (gpu,)}, "Some GPU, driver 570.1, 80000 MiB"),
        ({"gpu_reason": "no tool"}, "no tool"),
    ):
        env = report.environment.model_copy(update={"session_options": options, "cpu_boost": True} | found)
        rows = dict(conditions.environment(env).rows)
        assert rows["GPU"] == said and rows["Clock boost"] == "allowed"
        assert rows["Session, cuda: provider_options"] == "device_id=0, arena=none"
        assert "Session, cuda: provider_reason" not in rows


def test_the_certificate_is_in_order_and_each_step_has_its_figures() -> None:
    report = make_report(certificate=[make_link(4), make_link(2), make_link(1, passed=False, worst_case="batch 4")])
    assert [step.number for step in tables.chain(report)] == [1, 2, 3, 4, 5]
    assert [row[0] for row in tables.links(report.certificate).rows] == ["1", "2", "4"]
    first, second, third, fourth, _ = tables.chain(report)
    assert (first.state, first.tone, first.fault) == ("FAILED", "bad", "beyond the tolerance; worst case: batch 4")
    assert second.figures == ("3.6e-06", "allowed 1e-4 + 1e-4 relative", "12 cases") and not second.fault
    assert (third.tone, third.name) == ("skipped", "the recipe asks for no further graphs")
    assert fourth.figures == ("structure only", "12 cases")
