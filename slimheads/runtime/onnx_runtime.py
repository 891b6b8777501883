"""The one place where ONNX Runtime is imported: with its telemetry off, before any session is opened.

ONNX Runtime 1.32 sends usage events to its vendor by default. The package sets ORT_DISABLE_TELEMETRY, which covers the
import of ONNX Runtime and child processes. The call below covers processes that imported onnxruntime, or changed the
variable, before slimheads. A module that imports a submodule of onnxruntime, or optimum code that uses it, imports this
module too.
"""

from __future__ import annotations

from typing import Literal

import onnxruntime as onnxruntime

onnxruntime.disable_telemetry_events()
TELEMETRY: Literal["off"] = "off"
