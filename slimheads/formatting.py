"""How numbers, sizes, shapes and lists are written for people: rounded here and nowhere else, in full in JSON."""

from __future__ import annotations

import re
from collections.abc import Sequence

from slimheads.names import GIB

MINUS = "\u2212"


def whole(number: float) -> str:
    """22713216 -> 22,713,216."""
    return f"{number:,.0f}"


def figures(number: float, count: int = 3) -> str:
    """Three significant figures without an exponent: 0.847, 12.4, 1,240."""
    if number == 0:
        return "0"
    digits = count - 1
    while digits > 0 and abs(number) >= 10 ** (count - digits):
        digits -= 1
    if abs(number) < 0.1:
        return f"{number:.{count}g}"
    return f"{number:,.{digits if abs(number) >= 1 else count}f}"


def milliseconds(number: float) -> str:
    """12.4 ms."""
    return f"{figures(number)} ms"


def size(count: float) -> str:
    """Bytes in decimal units, as disks and hubs show them: 90.4 MB."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{figures(count / 10**power)} {unit}"
    return f"{count:.0f} bytes"


def flops(count: float) -> str:
    """2.79 GFLOP."""
    for unit, power in (("TFLOP", 12), ("GFLOP", 9), ("MFLOP", 6), ("kFLOP", 3)):
        if count >= 10**power:
            return f"{figures(count / 10**power)} {unit}"
    return f"{count:.0f} FLOP"


def percent(share: float) -> str:
    """0.972 -> 97%; small shares keep a decimal."""
    return f"{share:.0%}" if abs(share) >= 0.095 or share == 0 else f"{share:.1%}"


def change(before: float | None, after: float | None) -> str:
    """From 100 to 96.1: 3.9% less, written with a true minus sign."""
    if before is None or after is None or before == 0:
        return "not measured"
    if before == after:
        return "unchanged"
    return signed_percent(after / before - 1)


def signed_percent(share: float) -> str:
    """0.0123 -> +1.2%, with a true minus sign below zero."""
    return f"{MINUS if share < 0 else '+'}{abs(share):.1%}"


def seconds(number: float) -> str:
    """20 ms, 0.4 s, 83 s, 3 min 20 s."""
    if number < 0.1:
        return f"{number * 1000:.0f} ms"
    if number < 10:
        return f"{number:.1f} s"
    if number < 100:
        return f"{number:.0f} s"
    return f"{number // 60:.0f} min {number % 60:.0f} s"


def difference(number: float) -> str:
    """3.6e-06; exact equality is said in words."""
    return "0 (exact)" if number == 0 else f"{number:.1e}"


def tolerance(number: float) -> str:
    """1e-04 as 1e-4."""
    return re.sub(r"e-0*", "e-", f"{number:.0e}" if float(f"{number:.0e}") == number else f"{number:.2g}")


def ratio(number: float) -> str:
    """1.12x."""
    return f"{number:.2f}x"


def memory(count: float) -> str:
    """Bytes of memory in binary units, as systems show them: 612 MiB, 15.6 GiB."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{whole(count / 2**20)} MiB"


def decimals_apart(first: float, second: float) -> int:
    """Three decimals, or more where three would make different numbers look equal."""
    return next((d for d in range(3, 8) if first == second or f"{first:.{d}f}" != f"{second:.{d}f}"), 8)


def span(low: float, high: float, decimals: int) -> str:
    """0.867 to 0.893; one number where both are equal."""
    return f"{low:.{decimals}f}" if low == high else f"{low:.{decimals}f} to {high:.{decimals}f}"


def listing(items: Sequence[object]) -> str:
    """1, 2 and 4."""
    *rest, last = [str(item) for item in items]
    return f"{', '.join(rest)} and {last}" if rest else last


def capitalized(text: str) -> str:
    """The first letter in upper case, the others as they are."""
    return text[:1].upper() + text[1:]


def plural(count: int, noun: str) -> str:
    """1 case, 2 cases."""
    return f"{whole(count)} {noun}{'' if count == 1 else 's'}"


def shape_text(shape: Sequence[int]) -> str:
    """Batch x length, after how many tokens in the cache, and what a decoder's encoder saw, where there are such: 1x1
    after 512; the batch alone where inputs have no length.
    """
    if len(shape) == 1:
        return f"batch {shape[0]}"
    text = "x".join(str(number) for number in shape[:2])
    past = f" after {shape[2]}" if len(shape) > 2 and shape[2] else ""
    return text + past + (f", encoder {shape[3]}" if len(shape) > 3 else "")
