"""The pages made from a report: report.html, report.md, the model card, the terminal's summary."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import jinja2
from rich.console import Console

from slimheads.report import markdown, plan_plot, plots, svg, tables
from slimheads.report.headline import headline
from slimheads.report.model import Report

LAYOUTS = (("wide", 960), ("narrow", 342))  # px; drawn once a layout, since shrinking a plot shrinks its letters


def render_html(report: Report) -> str:
    """`report.html`: one self-contained page; no script, and nothing is fetched."""
    drawn = {
        "plan": {
            size: plan_plot.plan_picture(report.scores, report.plan, width=w, name=f"plan-{size}")
            for size, w in LAYOUTS
        },
        "bars": {size: plots.latency(report.latency, width=w, name=f"latency-{size}") for size, w in LAYOUTS},
        "dots": {size: plots.drift(report.drift, width=w, name=f"drift-{size}") for size, w in LAYOUTS},
        "css": {"light": svg.palette_css(dark=False), "dark": svg.palette_css(dark=True)},
    }
    return _render("report.html.j2", report, **drawn)


def render_markdown(report: Report) -> str:
    """`report.md`: the same figures for a terminal, a pull request or a CI's step summary."""
    return _render("report.md.j2", report)


def render_model_card(report: Report) -> str:
    """`slim/README.md`: a model card with YAML front matter, how to load the model, and the measured figures."""
    return _render("model_card.md.j2", report, front_matter=markdown.front_matter(report))


def append_step_summary(report: Report) -> bool:
    """Append report.md to the file that GITHUB_STEP_SUMMARY names; False where the environment offers none."""
    if not (target := os.environ.get("GITHUB_STEP_SUMMARY")):
        return False
    with Path(target).open("a", encoding="utf-8") as file:
        file.write(render_markdown(report) + "\n")
    return True


def print_summary(report: Report, console: Console, out: Path | None = None) -> None:
    """The run in a few lines for the terminal: the verdict first, where the files are last.

    Args:
        out: the output folder; its slim model and report are named when given.
    """
    said = headline(report)
    style = "bold green" if report.verdict.ok else "bold red"
    console.print(str(said.verdict), style=style, markup=False, highlight=False)
    for line in said.warnings:
        console.print(line, style="bold yellow", markup=False, highlight=False)
    for finding in said.findings:
        console.print(f"  {finding}", markup=False, highlight=False)
    if out is not None:
        slim = str(out / "slim") if (out / "slim").is_dir() else "not published"
        console.print(f"  Slim model: {slim}", markup=False, highlight=False, soft_wrap=True)
        console.print(f"  Report: {out / 'report.html'}", markup=False, highlight=False, soft_wrap=True)


def _render(template: str, report: Report, **extra: object) -> str:
    page = _templates(html=template.endswith(".html.j2")).get_template(template)
    return page.render(report=report, headline=headline(report), **tables.tables(report), **extra)


@cache
def _templates(*, html: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("slimheads.report"),
        autoescape=html,
        finalize=None if html else markdown.markdown_safe,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(tables.FILTERS)
    return environment
