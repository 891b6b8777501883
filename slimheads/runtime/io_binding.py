"""A session and a shape as one callable run. Inputs and outputs stay on the session's device; caches are not copied.

ONNX Runtime's IO binding is used for every provider. Inputs are put on the device once. A cache with tokens is a real
one: a prefill in the same session leaves its `present` outputs on the device, and these are bound as the
`past_key_values` inputs. Outputs are bound to the device too, so that no run ends with a copy to the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from slimheads.errors import UsageError
from slimheads.names import Shape
from slimheads.runtime.graph_inputs import Array, inputs_for
from slimheads.runtime.onnx_runtime import onnxruntime
from slimheads.runtime.onnx_signature import Interface
from slimheads.runtime.sessions import device_of


@dataclass(frozen=True)
class Feed:
    """The inputs of a file for one shape.

    `prefill` are the inputs of the run that fills the cache, and `cache` maps its outputs to inputs of the measured run
    (output -> input). Both are empty if the cache is empty.
    """

    inputs: Mapping[str, Array]
    prefill: Mapping[str, Array] = field(default_factory=dict)
    cache: Mapping[str, str] = field(default_factory=dict)


def feed_for(interface: Interface, shape: Shape, seed: int) -> Feed:
    """The inputs of a file for one shape.

    Args:
        interface: the file's description.
        shape: (batch, length), (batch, length, past) or, for the decoder of an encoder-decoder, (batch, length, past,
            encoder positions); (batch,) if inputs have no length. `past` tokens are in the cache.
        seed: for the values.

    Raises:
        UsageError: the shape does not fit the file, or the file has no cache.
    """
    if len(shape) not in ((2, 3, 4) if interface.has_length else (1,)):
        raise UsageError(
            f"{list(shape)} is not a shape", where="shapes", hint="give [batch, length] or [batch, length, past]"
        )
    batch, length, past = (*shape, *(1, 0)[len(shape) - 1 :])[:3]
    encoder_length = shape[3] if len(shape) > 3 else None
    if past <= 0:
        return Feed(inputs_for(interface, batch, length, past, seed, encoder_length))
    cache = interface.cache
    if not any(wanted.is_cache for wanted in interface.inputs):
        raise _no_cache(interface, shape, "the file takes no cache")
    unfilled = [i.name for i in interface.inputs if i.is_cache and not i.is_cross and i.name not in cache.values()]
    if unfilled:
        raise _no_cache(interface, shape, f"no output of the file fills the cache {unfilled[0]}")
    return Feed(
        inputs_for(interface.without(cache.values()), batch, length, past, seed, encoder_length),
        inputs_for(interface, batch, past, 0, seed, encoder_length or length),
        cache,
    )


def _no_cache(interface: Interface, shape: Shape, why: str) -> UsageError:
    return UsageError(
        f"{list(shape)} needs {shape[2]} tokens in the cache, but {why}",
        where=interface.where,
        hint="use [batch, length], or a decoder that was exported with its cache",
    )


class BoundRun:
    """Runs a session on fixed inputs each time it is called, and returns when the outputs are complete.

    By default ONNX Runtime waits for a GPU's stream at the end of a run, and `synchronize_outputs` waits for every
    device that holds an output, so the time measured around a call covers all of the work. On the CPU it costs nothing.
    All runs write to the output buffers of the first.
    """

    def __init__(
        self, session: onnxruntime.InferenceSession, inputs: Mapping[str, onnxruntime.OrtValue], device: str
    ) -> None:
        self._session, self._inputs = (
            session,
            inputs,
        )  # both must stay alive: on the CPU, values are array memory
        self._binding = session.io_binding()
        for name, value in inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for output in session.get_outputs():
            self._binding.bind_output(output.name, device)
        self._binding.synchronize_inputs()

    def __call__(self) -> None:
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()

    def outputs(self) -> dict[str, onnxruntime.OrtValue]:
        """The outputs of the last run, on the device, by name."""
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._binding.get_outputs(), strict=True))


def bind(session: onnxruntime.InferenceSession, feed: Feed) -> BoundRun:
    """Put a feed on the session's device, fill the cache by a prefill if needed, and bind everything.

    Raises:
        one of sessions.ORT_ERRORS: the prefill fails.
    """
    device = device_of(session)
    inputs = {name: _on(device, array) for name, array in feed.inputs.items()}
    if feed.prefill:
        prefill = BoundRun(session, {name: _on(device, array) for name, array in feed.prefill.items()}, device)
        prefill()
        left = prefill.outputs()
        inputs |= {name: left[output] for output, name in feed.cache.items()}
    return BoundRun(session, inputs, device)


def _on(device: str, array: Array) -> onnxruntime.OrtValue:
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), device)
