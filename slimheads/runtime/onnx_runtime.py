"""The one place where ONNX Runtime is imported: with its telemetry off, before any session is opened.

ONNX Runtime 1.32 sends usage events to its vendor unless it is told not to. The package sets ORT_DISABLE_TELEMETRY, for
what ONNX Runtime does while it is imported and for child processes; the call below is for a process that imported
onnxruntime, or changed the variable, before slimheads. A module that imports a submodule of onnxruntime, or optimum's
use of it, imports this one too.
"""

from __future__ import annotations

from typing import Literal

import onnxruntime as onnxruntime

onnxruntime.disable_telemetry_events()
TELEMETRY: Literal["off"] = "off"
