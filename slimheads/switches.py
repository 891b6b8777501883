"""Keys of config.json that say what a model is asked for, not what it is: they are left out wherever they are switched.

`torchscript` and `return_dict` make tuples of the outputs, `output_attentions` and `output_hidden_states` add to them,
and `gradient_checkpointing` is for training. An export has its own say in all of that.
"""

from __future__ import annotations

import json
from typing import Any

from slimheads.notices import tell

_DEFAULTS: dict[str, bool] = {
    "torchscript": False,
    "return_dict": True,
    "output_attentions": False,
    "output_hidden_states": False,
    "gradient_checkpointing": False,
}


def without_switches(data: Any) -> Any:
    """A configuration as JSON without them, in its parts' configurations too. Tells of each that is not the default."""
    if isinstance(data, list):
        return [without_switches(value) for value in data]
    if not isinstance(data, dict):
        return data
    for key, default in _DEFAULTS.items():
        if data.get(key, default) not in (default, None):
            tell(f"config.json: '{key}: {json.dumps(data[key])}' is left out, for it asks for another form of output")
    return {key: without_switches(value) for key, value in data.items() if key not in _DEFAULTS}
