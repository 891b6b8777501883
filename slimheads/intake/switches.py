"""Keys of config.json that say what a model is asked for, not what it is: they are left out wherever they are switched.

`torchscript` and `return_dict` make tuples of the outputs, `output_attentions` and `output_hidden_states` add to them,
and `gradient_checkpointing` is for training. An export has its own say in all of that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from slimheads.notices import tell

_DEFAULTS: dict[str, bool] = {
    "torchscript": False,
    "return_dict": True,
    "output_attentions": False,
    "output_hidden_states": False,
    "gradient_checkpointing": False,
}


def without_switches(data: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as JSON without them, in its parts' configurations too. Tells of each that is not the default."""
    kept: dict[str, Any] = {}
    for key, value in data.items():
        if key in _DEFAULTS:
            if value not in (_DEFAULTS[key], None):
                shown = json.dumps(value)[:40]
                tell(f"config.json: '{key}: {shown}' is not carried over: it is how a model is run, not what it is")
        elif isinstance(value, dict) and (key.endswith("_config") or "model_type" in value):
            kept[key] = without_switches(value)
        else:
            kept[key] = value
    return kept
