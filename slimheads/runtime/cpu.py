"""What the processor at hand can do, as far as int8 graphs depend on it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from types import MappingProxyType

from slimheads.errors import EnvironmentLackError
from slimheads.names import Int8For

_ARM = frozenset({"aarch64", "arm64"})
# Instructions that add products of bytes in 32 bits; ONNX Runtime's kernels use either.
_ADD_IN_32_BITS = frozenset({"avx512_vnni", "avx_vnni"})
# CPUs whose weights have all 8 bits: their sums are right only where products are added in 32 bits.
_FULL_RANGE: Mapping[str, str] = MappingProxyType({"avx512_vnni": "a CPU with VNNI", "arm64": "an ARM CPU"})


def cpu_features() -> tuple[str, ...] | None:
    """The instruction sets of this CPU by Linux's names (avx2, avx512_vnni, i8mm); None where torch is too old to tell.

    From the cpuinfo library inside torch, which ONNX Runtime chooses its kernels by as well.
    """
    import torch  # not before it is needed: small commands do without it

    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is None:
        return None
    return tuple(sorted(name for name, there in capabilities().items() if there is True))


def require_int8_target(int8_for: Int8For) -> None:
    """Refuses full-range int8 weights where this CPU cannot add up their products as their target does.

    Raises:
        EnvironmentLackError: what is exported could be neither proven nor measured here.
    """
    target = _FULL_RANGE.get(int8_for)
    if target is None or platform.machine().lower() in _ARM:
        return
    features = cpu_features()
    if features is not None and _ADD_IN_32_BITS & set(features):
        return
    said = "has no VNNI" if features is not None else "may have no VNNI (this torch does not tell)"
    raise EnvironmentLackError(
        f"int8 for {int8_for} is right on {target}, and this CPU {said}: it would add products in 16 bits and overflow",
        keys=("export.int8_for",),
        hint="use export.int8_for: any, which is right on every CPU, or run on a machine that has it",
    )
