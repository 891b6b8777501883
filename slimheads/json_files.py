"""JSON files of a model folder, read with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slimheads.errors import ModelRefusedError, in_short


def read_json(path: Path, kind: type) -> Any:
    """What a JSON file holds, which must be of `kind` (dict or list); None where there is no such file.

    Raises:
        ModelRefusedError: it cannot be read, is not JSON, or holds something else.
    """
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelRefusedError(
            f"not valid JSON ({in_short(error)})", where=str(path), hint="fetch the model folder again"
        ) from error
    if not isinstance(data, kind):
        raise ModelRefusedError(f"not a JSON {kind.__name__}", where=str(path), hint="fetch the model folder again")
    return data
