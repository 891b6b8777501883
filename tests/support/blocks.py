"""Where the feed-forward neurons and the layers of each covered model type sit in transformers' own modules.

Written out by hand, as tests/support/layouts.py is for heads: the oracle for what the package reads from families/.
Nothing here imports it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from layouts import BART_LIKE, BERT_LIKE, LLAMA_LIKE, VIT_LIKE, WAV2VEC2_LIKE
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

T5_LIKE = {"mt5", "t5"}
SWIN_LIKE = {"donut-swin", "swin"}
BEIT_LIKE = {"beit", "data2vec-vision"}
TOWERS = {"clip", "clip_vision_model", "siglip", "siglip_vision_model"}
GPT2_LIKE = {"codegen", "gpt2", "gpt_bigcode", "gpt_neo", "gptj"}
BERT_LIKE_LAYERS = BERT_LIKE | VIT_LIKE | BEIT_LIKE | {"deberta", "deberta-v2", "mpnet"}
UNGATED_LLAMAS = {"arcee", "nemotron"}
FUSED = {"glm", "phi3"}

# Their configuration has no key from which transformers builds the width of their feed-forward blocks alone.
WITHOUT_WIDTH = {"bloom", "dinov2", "mpt", "siglip", "siglip_vision_model"} | SWIN_LIKE


@dataclass(frozen=True)
class Matrices:
    """The linear layers of a feed-forward block, by their names in it.

    `gate` passes through the activation and multiplies `expand`. Where both are one matrix, `gate` is `expand` and
    holds its first half of rows.
    """

    expand: str
    contract: str
    gate: str | None = None


_INTERMEDIATE = Matrices("intermediate.dense", "output.dense")
_FC = Matrices("fc1", "fc2")
_GPT2 = Matrices("c_fc", "c_proj")
_GPTJ = Matrices("fc_in", "fc_out")
_GLU = Matrices("up_proj", "down_proj", "gate_proj")
_UP_DOWN = Matrices("up_proj", "down_proj")
_4H = Matrices("dense_h_to_4h", "dense_4h_to_h")

# Model types, the blocks' names ("#" is an index), their matrices.
_BLOCKS: tuple[tuple[set[str], str, Matrices], ...] = (
    (BERT_LIKE_LAYERS - {"dinov2"}, "encoder.layer.#", _INTERMEDIATE),
    ({"mobilebert"}, "encoder.layer.#.ffn.#", _INTERMEDIATE),
    ({"dinov2"}, "encoder.layer.#.mlp", _FC),
    ({"dinov2"}, "encoder.layer.#.mlp", Matrices("weights_in", "weights_out", "weights_in")),
    (SWIN_LIKE, "encoder.layers.#.blocks.#", _INTERMEDIATE),
    ({"albert"}, "encoder.albert_layer_groups.#.albert_layers.#", Matrices("ffn", "ffn_output")),
    ({"distilbert"}, "transformer.layer.#.ffn", Matrices("lin1", "lin2")),
    ({"modernbert"}, "layers.#.mlp", Matrices("Wi", "Wo", "Wi")),
    (TOWERS, "encoder.layers.#.mlp", _FC),
    (WAV2VEC2_LIKE | {"wavlm"}, "encoder.layers.#.feed_forward", Matrices("intermediate_dense", "output_dense")),
    (BART_LIKE, "encoder.layers.#", _FC),
    (BART_LIKE | {"opt"}, "decoder.layers.#", _FC),
    ({"t5"}, "encoder.block.#.layer.1.DenseReluDense", Matrices("wi", "wo")),
    ({"t5"}, "decoder.block.#.layer.2.DenseReluDense", Matrices("wi", "wo")),
    ({"mt5"}, "encoder.block.#.layer.1.DenseReluDense", Matrices("wi_1", "wo", "wi_0")),
    ({"mt5"}, "decoder.block.#.layer.2.DenseReluDense", Matrices("wi_1", "wo", "wi_0")),
    ({"gpt2", "gpt_bigcode", "gpt_neo"}, "h.#.mlp", _GPT2),
    ({"codegen", "gptj"}, "h.#.mlp", _GPTJ),
    ({"bloom", "falcon"}, "h.#.mlp", _4H),
    ({"gpt_neox"}, "layers.#.mlp", _4H),
    ({"mpt"}, "blocks.#.ffn", _UP_DOWN),
    (UNGATED_LLAMAS, "layers.#.mlp", _UP_DOWN),
    ({"phi"}, "layers.#.mlp", _FC),
    (FUSED, "layers.#.mlp", Matrices("gate_up_proj", "down_proj", "gate_up_proj")),
    (LLAMA_LIKE - UNGATED_LLAMAS - FUSED, "layers.#.mlp", _GLU),
    ({"qwen3_moe"}, "layers.#.mlp.experts.#", _GLU),
)

# Model types and the names of their lists of layers.
_STACKS: tuple[tuple[set[str], str], ...] = (
    (BERT_LIKE_LAYERS, "encoder.layer"),
    (SWIN_LIKE, "encoder.layers.#.blocks"),
    ({"albert"}, "encoder.albert_layer_groups.#.albert_layers"),
    ({"distilbert"}, "transformer.layer"),
    (TOWERS | WAV2VEC2_LIKE | BART_LIKE | {"wavlm"}, "encoder.layers"),
    (BART_LIKE | {"opt"}, "decoder.layers"),
    (T5_LIKE, "encoder.block"),
    (T5_LIKE, "decoder.block"),
    (GPT2_LIKE | {"bloom", "falcon"}, "h"),
    ({"mpt"}, "blocks"),
    (LLAMA_LIKE | {"gpt_neox", "modernbert", "phi", "phi3"}, "layers"),
)


@dataclass(frozen=True)
class NeuronTensors:
    """One neuron: views into the model's tensors, so that writing to them changes the model."""

    row: torch.Tensor  # of the input matrix
    gate: torch.Tensor | None
    output: torch.Tensor  # its column of the output matrix
    biases: tuple[torch.Tensor, ...]

    @property
    def weights(self) -> tuple[torch.Tensor, ...]:
        """Its slices of the matrices."""
        return (self.row, self.output) if self.gate is None else (self.row, self.gate, self.output)

    @property
    def elements(self) -> int:
        """Numbers that go when the neuron goes."""
        return sum(tensor.numel() for tensor in (*self.weights, *self.biases))


def neuron_tensors(model: PreTrainedModel) -> dict[str, list[NeuronTensors]]:
    """The neurons of every feed-forward block, by the block's name, in the model's order."""
    kind = model.config.model_type
    rows = [(_pattern(name), matrices) for types, name, matrices in _BLOCKS if kind in types]
    if not rows:
        pytest.fail(f"tests/support/blocks.py does not say where the neurons of '{kind}' are")
    return {
        name: list(_neurons(module, matrices))
        for name, module in model.named_modules()
        for pattern, matrices in rows
        if pattern.fullmatch(name) and hasattr(module, matrices.expand.split(".")[0])
    }


def stacks_of(model: PreTrainedModel) -> dict[str, torch.nn.ModuleList]:
    """Every list of layers by its name: an encoder's, a decoder's, a tower's, a stage's."""
    kind = model.config.model_type
    patterns = [_pattern(name) for types, name in _STACKS if kind in types]
    if not patterns:
        pytest.fail(f"tests/support/blocks.py does not say where the layers of '{kind}' are")
    return {name: m for name, m in model.named_modules() if any(pattern.fullmatch(name) for pattern in patterns)}


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(r"(?:.*\.)?" + re.escape(name).replace(r"\#", r"\d+"))


def _neurons(block: torch.nn.Module, names: Matrices) -> Iterator[NeuronTensors]:
    expand, expand_bias = _features(block.get_submodule(names.expand))
    contract = block.get_submodule(names.contract)
    columns = contract.weight.data if isinstance(contract, Conv1D) else contract.weight.data.T
    gate = gate_bias = None
    if names.gate == names.expand:
        half = len(expand) // 2
        gate, expand = expand[:half], expand[half:]
        if expand_bias is not None:
            gate_bias, expand_bias = expand_bias[:half], expand_bias[half:]
    elif names.gate is not None:
        gate, gate_bias = _features(block.get_submodule(names.gate))
    biases = [bias for bias in (expand_bias, gate_bias) if bias is not None]
    for index in range(len(columns)):
        own = None if gate is None else gate[index]
        yield NeuronTensors(expand[index], own, columns[index], tuple(bias[index : index + 1] for bias in biases))


def _features(module: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output features of a linear layer and their biases."""
    weight = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
    return weight, None if module.bias is None else module.bias.data
