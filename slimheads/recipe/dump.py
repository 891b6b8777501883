"""YAML out: plain data as text that recipe_yaml reads back equal."""

from __future__ import annotations

import re
from typing import Any

from slimheads.strict_yaml import scalar

_PLAIN = re.compile(r"[A-Za-z./][\w./@+-]*(://[\w./@+-]+)?", re.ASCII)
_OTHER_YAML = frozenset({"y", "n", "yes", "no", "on", "off"})  # YAML 1.1 reads these as booleans


def dump_yaml(data: dict[str, Any], indent: str = "") -> str:
    """Write plain data as YAML that this module reads back equal: mappings as blocks, lists on one line."""
    lines = []
    for key, value in data.items():
        if isinstance(value, dict) and value:
            lines.append(f"{indent}{dump_value(key)}:\n{dump_yaml(value, indent + '  ')}")
        else:
            lines.append(f"{indent}{dump_value(key)}: {dump_value(value)}\n")
    return "".join(lines)


def dump_value(value: Any) -> str:
    """One value on one line. Text is left plain only where no YAML reader could take it for anything else."""
    if isinstance(value, str):
        ambiguous = value.lower() in _OTHER_YAML or not isinstance(scalar(value), str)
        return value if _PLAIN.fullmatch(value) and not ambiguous else _quoted(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(dump_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{dump_value(key)}: {dump_value(item)}" for key, item in value.items()) + "}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _quoted(text: str) -> str:
    """Double-quoted YAML; json.dumps will not do, because it writes an emoji as two surrogates."""
    return '"' + "".join(_escaped(c) for c in text) + '"'


def _escaped(c: str) -> str:
    if " " <= c <= "~":
        return "\\" + c if c in '"\\' else c
    return f"\\U{ord(c):08x}" if ord(c) > 0xFFFF else f"\\u{ord(c):04x}"
