"""sentence-transformers, unmodified, on the folder that ships."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from sentence_transformers import SentenceTransformer
from shipped import Shipped
from transformers import AutoTokenizer, PreTrainedModel

TEXTS = [
    "Return the length of an object.",
    "Sort the list in place.",
    "A socket object represents one endpoint of a network connection; it may be connected, listening or closed.",
    "",
]


def embeddings(model: PreTrainedModel, folder: str) -> np.ndarray:
    """Mean over the real tokens, scaled to length 1, float64 [texts, hidden]: what MiniLM's card prescribes."""
    batch = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state.numpy().astype(np.float64)
    weight = batch["attention_mask"].numpy()[..., None]
    pooled = (hidden * weight).sum(axis=1) / weight.sum(axis=1)
    return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def found(slim_minilm: Shipped) -> np.ndarray:
    model = SentenceTransformer(str(slim_minilm.folder), backend="onnx", device="cpu")
    assert "ORTModel" in type(model[0].auto_model).__name__
    return model.encode(TEXTS)


def test_embeddings_are_those_of_the_slim_torch_model(slim_minilm: Shipped, found: np.ndarray) -> None:
    expected = embeddings(slim_minilm.slim, str(slim_minilm.folder))
    assert found.shape == expected.shape == (len(TEXTS), 384)
    assert np.abs(found - expected).max() <= 1e-4


def test_embeddings_are_not_those_of_the_dense_model(slim_minilm: Shipped, found: np.ndarray) -> None:
    dense = embeddings(slim_minilm.dense, str(slim_minilm.folder))
    assert (np.abs(found - dense).max(axis=1) > 1e-2).all()


def test_the_files_are_smaller_by_exactly_the_deleted_rows_and_columns(slim_minilm: Shipped) -> None:
    """float32: of every deleted head 4 matrices of 384 by 32 and 3 biases of 32; of a neuron 2 times 384 and 1 bias;
    of a layer twelve heads, 1536 neurons, and 6 vectors of 384: two biases and two norms.
    """
    head, neuron = 4 * 384 * 32 + 3 * 32, 2 * 384 + 1
    sizes = {"attention": head, "feed_forward": neuron, "layer": 12 * head + 1536 * neuron + 6 * 384}
    gone = {kind: slim_minilm.plan.of_kind(kind).removed for kind in sizes}
    assert all(gone.values())
    deleted = 4 * sum(sizes[kind] * count for kind, count in gone.items())
    tensors = [sum(p.numel() * 4 for p in m.parameters()) for m in (slim_minilm.dense, slim_minilm.slim)]
    assert tensors[0] - tensors[1] == deleted
    graphs = [onnx.load(str(path)).graph.initializer for path in (slim_minilm.dense_onnx, slim_minilm.onnx())]
    stored = [sum(4 * math.prod(t.dims) for t in graph if t.data_type == TensorProto.FLOAT) for graph in graphs]
    assert stored[0] - stored[1] == deleted
