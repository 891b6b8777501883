"""Adapters: what a family does in code that its data file cannot say, one small function each, named by the file.

An adapter is called after the sites of its row have shrunk, with every one of them, changed or not, and its kept units,
counted as the model was just before. It runs on real and on meta tensors (it keeps lists, never makes tensors), may
run again on a model that is slim already, and what it changes must survive a copy of the model and its tracing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch

from slimheads.attention import Site

Blocks = Sequence[tuple[Site, tuple[int, ...]]]
Adapter = Callable[[torch.nn.Module, Blocks], None]

ADAPTERS: Mapping[str, Adapter] = MappingProxyType({})
