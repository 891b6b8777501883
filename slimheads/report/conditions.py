"""The tables of a run's conditions: its stages with time and memory, and its environment."""

from __future__ import annotations

from slimheads import formatting as fmt
from slimheads.report.markdown import Table
from slimheads.report.model import Report
from slimheads.runtime.environment import Environment


def stages(report: Report) -> Table:
    """Time and peak memory of each stage."""
    rows = [
        (one.stage, fmt.seconds(one.seconds), _memory(one.peak_rss_mb), "reused" if one.reused else "ran")
        for one in report.stages
    ]
    rows.append(("whole run", fmt.seconds(report.seconds), _memory(report.peak_rss_mb), ""))
    return Table.of(("Stage", "Time", "Peak memory", "Status"), rows, {1, 2})


def environment(env: Environment) -> Table:
    """Software, hardware and session options."""
    hidden = "not readable on this system"
    load = " ".join(f"{value:.2f}" for value in env.load_average) if env.load_average else hidden
    clock = f"{fmt.whole(env.cpu_frequency_mhz)} MHz at the start" if env.cpu_frequency_mhz else hidden
    clock += f", at most {fmt.whole(env.cpu_frequency_max_mhz)} MHz" if env.cpu_frequency_max_mhz else ""
    boost = hidden if env.cpu_boost is None else "allowed" if env.cpu_boost else "off"
    cores = ", ".join(
        f"{count or 'unknown'} {kind}"
        for count, kind in ((env.cores_physical, "physical"), (env.cores_logical, "logical"))
    )
    memory = f"{fmt.memory(env.memory_bytes)}, {fmt.memory(env.memory_available_bytes)} free at the start"
    rows = [("slimheads", env.slimheads), ("Python", env.python)]
    rows += [(name, version or "not installed") for name, version in env.packages.items()]
    rows += [
        ("Platform", env.platform),
        ("CPU", env.cpu),
        ("CPU features", hidden if env.cpu_features is None else ", ".join(env.cpu_features)),
        ("Cores", f"{cores}, {env.cores_usable:g} usable"),
        ("CPU governor", env.cpu_governor or hidden),
    ]
    rows += [("CPU clock", clock), ("Clock boost", boost), ("Memory", memory), ("Load average, 1, 5, 15 min", load)]
    rows += [("Providers", ", ".join(env.providers) or "none")]
    gpus = [f"{gpu.name}, driver {gpu.driver}, {gpu.memory}" for gpu in env.gpus or ()]
    rows += [("GPU", "; ".join(gpus) or str(env.gpu_reason))] if env.gpus or "cuda" in env.session_options else []
    rows += [
        (f"Session, {provider}: {key}", _option(value))
        for provider, options in env.session_options.items()
        for key, value in options.items()
        if value is not None
    ]
    return Table.of(("What", "Value"), rows)


def _option(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={_option(inner)}" for key, inner in value.items()) or "none"
    return (", ".join(map(str, value)) or "none") if isinstance(value, list | tuple) else str(value)


def _memory(count: float) -> str:
    return fmt.memory(count * 2**20)
