"""The CPU's instruction sets, on which int8 graphs depend."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from types import MappingProxyType

from slimheads.errors import EnvironmentLackError
from slimheads.names import Int8For

_ARM = frozenset({"aarch64", "arm64"})
# Instructions that add products of bytes in 32 bits; ONNX Runtime has kernels for both.
_ADD_IN_32_BITS = frozenset({"avx512_vnni", "avx_vnni"})
# Targets with full 8-bit weights: sums are right only if products are added in 32 bits.
_FULL_RANGE: Mapping[str, str] = MappingProxyType({"avx512_vnni": "a CPU with VNNI", "arm64": "an ARM CPU"})


def cpu_features() -> tuple[str, ...] | None:
    """The CPU's instruction sets by Linux's names (avx2, avx512_vnni, i8mm); None if torch is too old to list them.

    From the cpuinfo library inside torch. ONNX Runtime chooses its kernels by the same library.
    """
    import torch  # here, because small commands do not need it

    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is None:
        return None
    return tuple(sorted(name for name, there in capabilities().items() if there is True))


def require_int8_target(int8_for: Int8For) -> None:
    """Refuses full-range int8 weights on a CPU that cannot add their products in 32 bits.

    Raises:
        EnvironmentLackError: the graph could be neither verified nor measured on this machine.
    """
    target = _FULL_RANGE.get(int8_for)
    if target is None or platform.machine().lower() in _ARM:
        return
    features = cpu_features()
    if features is not None and _ADD_IN_32_BITS & set(features):
        return
    lack = "has no VNNI" if features is not None else "may have no VNNI (this torch does not list CPU features)"
    raise EnvironmentLackError(
        f"int8 for {int8_for} needs {target}, and this CPU {lack}: it would add products in 16 bits and overflow",
        keys=("export.int8_for",),
        hint="use export.int8_for: any, which works on every CPU, or run on such a machine",
    )
