"""A session and a shape as one callable run: inputs and outputs stay on the session's device, caches are never copied.

ONNX Runtime's IO binding is used for every provider. Inputs are put on the device once. A cache that is to hold tokens
holds real ones: a prefill in the same session leaves its `present` outputs on the device, and these very values are
bound as the `past_key_values` inputs. Outputs are bound to the device too, so that no run ends with a copy to the host.
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

# (batch, length), (batch, length, past), (batch, length, past, encoder's positions), (batch,)


@dataclass(frozen=True)
class Feed:
    """What a file is fed at a shape.

    `prefill` are the inputs of the run that fills the cache, and `cache` says which of its outputs become which inputs
    (output -> input); both are empty where the cache holds nothing.
    """

    inputs: Mapping[str, Array]
    prefill: Mapping[str, Array] = field(default_factory=dict)
    cache: Mapping[str, str] = field(default_factory=dict)


def feed_for(interface: Interface, shape: Shape, seed: int) -> Feed:
    """The inputs of a file at a shape.

    Args:
        interface: of the file.
        shape: (batch, length), (batch, length, past) or, for the decoder behind an encoder, (batch, length, past,
            encoder's positions); (batch,) where inputs have no length. `past` tokens are in the cache.
        seed: of the values.

    Raises:
        UsageError: that is no shape of this file, or it has no cache for the past.
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
        raise _no_past(interface, shape, "the file takes no cache")
    unfilled = [i.name for i in interface.inputs if i.is_cache and not i.is_cross and i.name not in cache.values()]
    if unfilled:
        raise _no_past(interface, shape, f"no output of the file fills the cache {unfilled[0]}")
    return Feed(
        inputs_for(interface.without(cache.values()), batch, length, past, seed, encoder_length),
        inputs_for(interface, batch, past, 0, seed, encoder_length or length),
        cache,
    )


def _no_past(interface: Interface, shape: Shape, why: str) -> UsageError:
    return UsageError(
        f"{list(shape)} asks for {shape[2]} tokens in the cache, and {why}",
        where=interface.where,
        hint="give [batch, length], or a decoder that was exported with its cache",
    )


class BoundRun:
    """One run of a session, again and again with the same inputs; it returns when its outputs are there.

    By default ONNX Runtime waits for a GPU's stream at the end of a run, and `synchronize_outputs` waits for every
    device that holds an output: a clock that is read after the call has seen all of the work. On the CPU it is free.
    The output buffers of the first run are written again by those that follow.
    """

    def __init__(
        self, session: onnxruntime.InferenceSession, inputs: Mapping[str, onnxruntime.OrtValue], device: str
    ) -> None:
        self._session, self._inputs = session, inputs  # on the CPU a value lies in its array's memory: both must live
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
        """What the last run left on the device, by output name."""
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._binding.get_outputs(), strict=True))


def bind(session: onnxruntime.InferenceSession, feed: Feed) -> BoundRun:
    """Put a feed on the session's device, fill the cache where it is to hold tokens, and bind all of it.

    Raises:
        one of sessions.ORT_ERRORS: the prefill does not run.
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
