"""Where the heads of each covered model type sit in transformers' own modules, written out by hand.

The oracle for everything that the package reads from families/: nothing here imports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import pytest
import torch
from tiny import DECODERS
from transformers import PretrainedConfig, PreTrainedModel

BERT_LIKE = {
    *("bert", "camembert", "data2vec-text", "electra", "megatron-bert", "mobilebert", "rembert", "roberta"),
    *("roformer", "splinter", "xlm-roberta"),
}
WAV2VEC2_LIKE = {"data2vec-audio", "hubert", "unispeech", "unispeech-sat", "wav2vec2"}
VIT_LIKE = {"audio-spectrogram-transformer", "deit", "dinov2", "dpt", "vit", "vit_msn", "yolos"}
BART_LIKE = {"bart", "blenderbot", "blenderbot-small", "m2m_100", "marian", "mbart", "pegasus", "whisper"}
LLAMA_LIKE = {
    *("arcee", "cohere", "gemma", "gemma2", "gemma3_text", "glm", "granite", "helium", "llama", "mistral", "nemotron"),
    *("olmo", "qwen2", "qwen3", "qwen3_moe", "smollm3", "stablelm"),
}


@dataclass(frozen=True)
class UnitTensors:
    """One head or KV group: views into the model's tensors, so that writing to them changes the model."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    biases: tuple[torch.Tensor, ...]
    others: tuple[torch.Tensor, ...] = ()  # what else goes with it: its entries in tables, its projections of positions

    @property
    def weights(self) -> tuple[torch.Tensor, ...]:
        """Its slices of the four matrices."""
        return self.query, self.key, self.value, self.output

    @property
    def elements(self) -> int:
        """Numbers that go when the unit goes."""
        return sum(tensor.numel() for tensor in (*self.weights, *self.biases, *self.others))


def kv_heads(config: PretrainedConfig) -> int:
    """How many KV heads a dense block of a decoder has."""
    if config.model_type == "falcon":
        few = config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else None
        return few or config.num_attention_heads
    if config.model_type == "gpt_bigcode" and config.multi_query:
        return 1
    return getattr(config, "num_key_value_heads", config.num_attention_heads)


def dense_counts(config: PretrainedConfig) -> list[int]:
    """How many units each block of a dense model has."""
    if hasattr(config, "text_config"):
        return dense_counts(config.text_config) + dense_counts(config.vision_config)
    if isinstance(config.num_attention_heads, list):  # by stage
        return [heads for heads, blocks in zip(config.num_heads, config.depths, strict=True) for _ in range(blocks)]
    shared = config.model_type == "albert"
    layers = config.num_hidden_groups * config.inner_group_num if shared else config.num_hidden_layers
    # Where all query heads read one KV head, they are units themselves.
    return [config.num_attention_heads if kv_heads(config) == 1 else kv_heads(config)] * layers


def unit_tensors(model: PreTrainedModel, kept: Sequence[Sequence[int]] | None = None) -> list[list[UnitTensors]]:
    """The units of every layer; `kept` says which ones each layer of a slim model has left."""
    kind, config = model.config.model_type, model.config
    if config.is_encoder_decoder:
        return _two_stacks(model, kept and [len(units) for units in kept])
    base = getattr(model, model.base_model_prefix, model)
    dense = dense_counts(config)
    kept = kept or [range(count) for count in dense]
    counts = [len(units) for units in kept]
    shared = config.model_type in DECODERS and kv_heads(config) == 1
    if kind in BERT_LIKE:
        blocks = [layer.attention for layer in base.encoder.layer]
        linears = [(a.self.query, a.self.key, a.self.value, a.output.dense) for a in blocks]
    elif kind in VIT_LIKE:
        blocks = [layer.attention for layer in base.encoder.layer]
        linears = [(a.attention.query, a.attention.key, a.attention.value, a.output.dense) for a in blocks]
    elif kind in {"clip", "siglip", "clip_vision_model", "siglip_vision_model"}:
        towers = [getattr(model, name) for name in ("text_model", "vision_model") if hasattr(model, name)]
        blocks = [layer.self_attn for tower in towers for layer in tower.encoder.layers]
        linears = [(a.q_proj, a.k_proj, a.v_proj, a.out_proj) for a in blocks]
    elif kind in {"beit", "data2vec-vision"}:
        blocks = [layer.attention for layer in base.encoder.layer]
        linears = [(a.attention.query, a.attention.key, a.attention.value, a.output.dense) for a in blocks]
        if config.use_relative_position_bias:
            tables = [a.attention.relative_position_bias.relative_position_bias_table.data for a in blocks]
            made = zip(linears, counts, tables, strict=True)
            return [_with_table(_separate(*four, count), table) for four, count, table in made]
    elif kind in {"donut-swin", "swin"}:
        blocks = [block.attention for stage in base.encoder.layers for block in stage.blocks]
        return [
            _with_table(
                _separate(a.self.query, a.self.key, a.self.value, a.output.dense, count),
                a.self.relative_position_bias_table.data,
            )
            for a, count in zip(blocks, counts, strict=True)
        ]
    elif kind in WAV2VEC2_LIKE:
        blocks = [layer.attention for layer in base.encoder.layers]
        linears = [(a.q_proj, a.k_proj, a.v_proj, a.out_proj) for a in blocks]
    elif kind == "wavlm":
        blocks = [layer.attention for layer in base.encoder.layers]
        return [
            _with_table(_separate(a.q_proj, a.k_proj, a.v_proj, a.out_proj, n), a.gru_rel_pos_const.data[0, :, 0].T)
            for a, n in zip(blocks, counts, strict=True)
        ]
    elif kind == "albert":
        blocks = [layer.attention for group in base.encoder.albert_layer_groups for layer in group.albert_layers]
        linears = [(a.query, a.key, a.value, a.dense) for a in blocks]
    elif kind == "mpnet":
        linears = [(a.q, a.k, a.v, a.o) for a in (layer.attention.attn for layer in base.encoder.layer)]
    elif kind == "deberta":
        return [_deberta(layer.attention, count) for layer, count in zip(base.encoder.layer, counts, strict=True)]
    elif kind == "deberta-v2":
        return [_deberta_v2(layer.attention, count) for layer, count in zip(base.encoder.layer, counts, strict=True)]
    elif kind == "distilbert":
        blocks = [layer.attention for layer in base.transformer.layer]
        linears = [(a.q_lin, a.k_lin, a.v_lin, a.out_lin) for a in blocks]
    elif kind in LLAMA_LIKE:  # Gemma 3's declared prefix is not its attribute's name
        blocks = [layer.self_attn for layer in getattr(model, "model", model).layers]
        linears = [(a.q_proj, a.k_proj, a.v_proj, a.o_proj) for a in blocks]
    elif kind == "phi":
        blocks = [layer.self_attn for layer in base.layers]
        linears = [(a.q_proj, a.k_proj, a.v_proj, a.dense) for a in blocks]
    elif kind in {"gpt_neo", "gptj", "opt"}:
        blocks = {
            "gpt_neo": lambda: [layer.attn.attention for layer in base.h],
            "gptj": lambda: [layer.attn for layer in base.h],
            "opt": lambda: [layer.self_attn for layer in base.decoder.layers],
        }[kind]()
        linears = [(a.q_proj, a.k_proj, a.v_proj, a.out_proj) for a in blocks]
    elif kind == "modernbert":
        return [_three_blocks(b.attn.Wqkv, b.attn.Wo, count) for b, count in zip(base.layers, counts, strict=True)]
    elif kind == "mpt":
        return [
            _three_blocks(b.attn.Wqkv, b.attn.out_proj, count) for b, count in zip(base.blocks, counts, strict=True)
        ]
    elif kind == "phi3":
        pairs = [(layer.self_attn.qkv_proj, layer.self_attn.o_proj) for layer in base.layers]
        members = config.num_attention_heads // config.num_key_value_heads
        return [_runs(*pair, count, members) for pair, count in zip(pairs, counts, strict=True)]
    elif kind == "codegen":
        pairs = [(layer.attn.qkv_proj, layer.attn.out_proj) for layer in base.h]
        return [_four_shares(*pair, units, whole) for pair, units, whole in zip(pairs, kept, dense, strict=True)]
    elif kind in {"gpt_neox", "bloom", "falcon", "gpt_bigcode"}:
        pairs = {
            "gpt_neox": lambda: [(b.attention.query_key_value, b.attention.dense) for b in base.layers],
            "bloom": lambda: [(b.self_attention.query_key_value, b.self_attention.dense) for b in base.h],
            "falcon": lambda: [(b.self_attention.query_key_value, b.self_attention.dense) for b in base.h],
            "gpt_bigcode": lambda: [(b.attn.c_attn, b.attn.c_proj) for b in base.h],
        }[kind]()
        if shared:
            return [_one_key_for_all(*pair, count) for pair, count in zip(pairs, counts, strict=True)]
        members = config.num_attention_heads // kv_heads(config)
        return [_unit_by_unit(*pair, count, members) for pair, count in zip(pairs, counts, strict=True)]
    elif kind == "gpt2":
        return [_fused(b.attn.c_attn, b.attn.c_proj, count) for b, count in zip(base.h, counts, strict=True)]
    else:
        pytest.fail(f"tests/support/layouts.py does not say where the heads of '{kind}' are")
    if shared:
        return [_separate_one_key(*four, count) for four, count in zip(linears, counts, strict=True)]
    return [_separate(*four, count) for four, count in zip(linears, counts, strict=True)]


def _two_stacks(model: PreTrainedModel, counts: Sequence[int] | None) -> list[list[UnitTensors]]:
    """The encoder's blocks, then the decoder's self-attention, then its cross-attention."""
    config, encoder, decoder = model.config, model.get_encoder(), model.get_decoder()
    if config.model_type in {"mt5", "t5"}:
        stacks = [
            [block.layer[0].SelfAttention for block in encoder.block],
            [block.layer[0].SelfAttention for block in decoder.block],
            [block.layer[1].EncDecAttention for block in decoder.block],
        ]
        linears = [[(a.q, a.k, a.v, a.o) for a in stack] for stack in stacks]
        heads = [config.num_heads] * 3
    elif config.model_type in BART_LIKE:
        stacks = [
            [layer.self_attn for layer in encoder.layers],
            [layer.self_attn for layer in decoder.layers],
            [layer.encoder_attn for layer in decoder.layers],
        ]
        linears = [[(a.q_proj, a.k_proj, a.v_proj, a.out_proj) for a in stack] for stack in stacks]
        heads = [config.encoder_attention_heads, config.decoder_attention_heads, config.decoder_attention_heads]
    else:
        pytest.fail(f"tests/support/layouts.py does not say where the heads of '{config.model_type}' are")
    counts = counts or [count for stack, count in zip(linears, heads, strict=True) for _ in stack]
    return [_separate(*four, count) for four, count in zip(chain(*linears), counts, strict=True)]


def _separate(
    q: torch.nn.Linear, k: torch.nn.Linear, v: torch.nn.Linear, o: torch.nn.Linear, count: int
) -> list[UnitTensors]:
    wide, narrow = q.out_features // count, k.out_features // count
    units = []
    for unit in range(count):
        own = slice(unit * narrow, (unit + 1) * narrow)
        queries = slice(unit * wide, (unit + 1) * wide)
        biases = ((q, queries), (k, own), (v, own))
        units.append(
            UnitTensors(
                q.weight.data[queries, :],
                k.weight.data[own, :],
                v.weight.data[own, :],
                o.weight.data[:, queries],
                tuple(module.bias.data[rows] for module, rows in biases if module.bias is not None),
            )
        )
    return units


def _with_table(units: list[UnitTensors], table: torch.Tensor) -> list[UnitTensors]:
    """`table` [positions, heads]"""
    return [replace(unit, others=(table[:, head],)) for head, unit in enumerate(units)]


def _deberta(block: torch.nn.Module, count: int) -> list[UnitTensors]:
    """Rows of the first head's query, key and value, then of the second's, without a bias; two biases apart."""
    own, out = block.self, block.output.dense
    rows = own.in_proj.weight.data.view(count, 3, -1, own.in_proj.in_features)
    columns = out.weight.data.view(out.out_features, count, -1)
    biases = [(own.q_bias.data.view(count, -1)[head], own.v_bias.data.view(count, -1)[head]) for head in range(count)]
    positions = _rows_by_head(own, ("pos_proj", "pos_q_proj"), count)
    return [UnitTensors(*rows[h], columns[:, h], biases[h], positions[h]) for h in range(count)]


def _deberta_v2(block: torch.nn.Module, count: int) -> list[UnitTensors]:
    own = block.self
    positions = _rows_by_head(own, ("pos_key_proj", "pos_query_proj"), count)
    units = _separate(own.query_proj, own.key_proj, own.value_proj, block.output.dense, count)
    return [replace(unit, others=positions[head]) for head, unit in enumerate(units)]


def _rows_by_head(block: torch.nn.Module, names: Sequence[str], count: int) -> list[tuple[torch.Tensor, ...]]:
    """The weight rows and bias entries of each head in those of these linear layers that the configuration asks for."""
    linears = [getattr(block, name) for name in names if hasattr(block, name)]
    tensors = [t.data.view(count, -1, *t.shape[1:]) for m in linears for t in (m.weight, m.bias) if t is not None]
    return [tuple(tensor[head] for tensor in tensors) for head in range(count)]


def _fused(c_attn: torch.nn.Module, c_proj: torch.nn.Module, count: int) -> list[UnitTensors]:
    fused, bias = c_attn.weight.data, c_attn.bias.data
    width = fused.shape[1] // 3
    dim = width // count
    units = []
    for head in range(count):
        q, k, v = (slice(part * width + head * dim, part * width + (head + 1) * dim) for part in range(3))
        rows = slice(head * dim, (head + 1) * dim)
        units.append(
            UnitTensors(fused[:, q], fused[:, k], fused[:, v], c_proj.weight.data[rows, :], (bias[q], bias[k], bias[v]))
        )
    return units


def _three_blocks(fused: torch.nn.Linear, out: torch.nn.Linear, count: int) -> list[UnitTensors]:
    """Rows of all queries, then of all keys, then of all values."""
    three = fused.weight.data.view(3, count, -1, fused.in_features)
    columns = out.weight.data.view(out.out_features, count, -1)
    biases = [()] * count if fused.bias is None else fused.bias.data.view(3, count, -1).unbind(1)
    return [UnitTensors(*three[:, head], columns[:, head], tuple(biases[head])) for head in range(count)]


def _unit_by_unit(fused: torch.nn.Linear, out: torch.nn.Linear, count: int, members: int) -> list[UnitTensors]:
    """Rows of the first unit's queries (one or, in a group, several), its key and its value, then of the second's."""
    dim = fused.out_features // count // (members + 2)
    units = []
    for unit in range(count):
        query = slice(unit * (members + 2) * dim, (unit * (members + 2) + members) * dim)
        key = slice(query.stop, query.stop + dim)
        value = slice(key.stop, key.stop + dim)
        units.append(_of_rows(fused, out, query, key, value, unit, members * dim))
    return units


def _runs(fused: torch.nn.Linear, out: torch.nn.Linear, count: int, members: int) -> list[UnitTensors]:
    """Rows of all queries, group by group, then of all keys, then of all values."""
    dim = fused.out_features // count // (members + 2)
    keys, values = count * members * dim, count * (members + 1) * dim
    return [
        _of_rows(
            fused,
            out,
            slice(unit * members * dim, (unit + 1) * members * dim),
            slice(keys + unit * dim, keys + (unit + 1) * dim),
            slice(values + unit * dim, values + (unit + 1) * dim),
            unit,
            members * dim,
        )
        for unit in range(count)
    ]


def _one_key_for_all(fused: torch.nn.Linear, out: torch.nn.Linear, count: int) -> list[UnitTensors]:
    """Rows of all queries, then of the one key and the one value that they share."""
    dim = fused.out_features // (count + 2)
    key, value = slice(count * dim, (count + 1) * dim), slice((count + 1) * dim, (count + 2) * dim)
    return [_of_rows(fused, out, slice(head * dim, (head + 1) * dim), key, value, head, dim) for head in range(count)]


def _four_shares(fused: torch.nn.Linear, out: torch.nn.Linear, kept: Sequence[int], dense: int) -> list[UnitTensors]:
    """Four parts, each of them the queries, the values and then the keys of what is left of a quarter of the heads."""
    dim = fused.out_features // len(kept) // 3
    units, at = [], 0
    for quarter in range(4):
        here = [place for place, head in enumerate(kept) if head // (dense // 4) == quarter]
        for number, place in enumerate(here):
            query, value, key = (
                slice(at + (part * len(here) + number) * dim, at + (part * len(here) + number + 1) * dim)
                for part in range(3)
            )
            units.append(_of_rows(fused, out, query, key, value, place, dim))
        at += 3 * len(here) * dim
    return units


def _of_rows(
    fused: torch.nn.Linear, out: torch.nn.Linear, query: slice, key: slice, value: slice, unit: int, width: int
) -> UnitTensors:
    """The unit with these rows, and `width` columns of the output matrix."""
    weight, rows = fused.weight.data, (query, key, value)
    biases = () if fused.bias is None else tuple(fused.bias.data[part] for part in rows)
    columns = out.weight.data[:, unit * width : (unit + 1) * width]
    return UnitTensors(weight[query], weight[key], weight[value], columns, biases)


def _separate_one_key(
    q: torch.nn.Linear, k: torch.nn.Linear, v: torch.nn.Linear, o: torch.nn.Linear, count: int
) -> list[UnitTensors]:
    """Query heads of their own, the one key and the one value that they share."""
    dim = q.out_features // count
    queries = [slice(head * dim, (head + 1) * dim) for head in range(count)]
    weights = k.weight.data, v.weight.data
    return [UnitTensors(q.weight.data[own], *weights, o.weight.data[:, own], ()) for own in queries]
