"""Keys of config.json that say how a model is run, not what it is. They are left out.

`torchscript` and `return_dict` change the type of the outputs, `output_attentions` and `output_hidden_states` add
outputs, and `gradient_checkpointing` is for training. An export decides all of these itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from slimheads.notices import notify

_DEFAULTS: dict[str, bool] = {
    "torchscript": False,
    "return_dict": True,
    "output_attentions": False,
    "output_hidden_states": False,
    "gradient_checkpointing": False,
}


def without_switches(data: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as JSON data without these keys, at any depth; a value other than the default gives a notice."""
    kept: dict[str, Any] = {}
    for key, value in data.items():
        if key in _DEFAULTS:
            if value not in (_DEFAULTS[key], None):
                shown = json.dumps(value)[:40]
                notify(f"config.json: '{key}: {shown}' is left out: it says how a model is run, not what it is")
        elif isinstance(value, dict) and (key.endswith("_config") or "model_type" in value):
            kept[key] = without_switches(value)
        else:
            kept[key] = value
    return kept
