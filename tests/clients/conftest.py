"""The real MiniLM, pruned and laid out as a run publishes it."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
from shipped import Shipped, ship
from transformers import PreTrainedModel

from slimheads.pruning.plan import Plan


@pytest.fixture(scope="session")
def slim_minilm(
    minilm: PreTrainedModel, ragged: Callable[..., Plan], tmp_path_factory: pytest.TempPathFactory
) -> Shipped:
    """MiniLM with another head count in nearly every layer."""
    made = ship(minilm, ragged(minilm), tmp_path_factory.mktemp("minilm"), task="feature-extraction")
    # The dense graph needs its config beside it, as in dense/ of a run.
    shutil.copyfile(f"{minilm.name_or_path}/config.json", made.root / "dense" / "config.json")
    return made
