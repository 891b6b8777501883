"""Small random models, one a covered model type, built from their configurations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from slimheads.models.tasks import auto_classes

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 120,
    "max_position_embeddings": 160,
}
_GROUPED: dict[str, Any] = _SIZES | {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256}

_IMAGE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 30,
    "patch_size": 6,
}

_STAGES: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 4,
    "window_size": 3,  # does not divide the grid of patches
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [4, 4],
}

_TWO_TOWERS: dict[str, Any] = {
    "text_config": _SIZES | {"num_hidden_layers": 2, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    "vision_config": _IMAGE
    | {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2}
    | {"num_attention_heads": 6},
    "projection_dim": 16,
}

_WAVEFORM: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 32,
    "conv_dim": [16, 16],
    "conv_kernel": [4, 3],
    "conv_stride": [2, 2],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 16,
    "apply_spec_augment": False,  # it masks frames at random in training, and wants long recordings
    "layerdrop": 0.0,
}

_WIDE_HEADS: dict[str, Any] = _GROUPED | {"head_dim": 6}  # not hidden_size / num_attention_heads, which is 4
_GPT2: dict[str, Any] = {
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "vocab_size": 120,
    "n_positions": 160,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_WINDOWS: dict[str, Any] = {  # far shorter than the longest texts, in some layers
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_SEQ2SEQ: dict[str, Any] = {  # head_dim 6 in the encoder, 4 in the decoder
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "vocab_size": 120,
    "max_position_embeddings": 160,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "scale_embedding": True,
    "tie_word_embeddings": False,  # a small random model that reads what it writes says one word only
}
_T5: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 6,  # not d_model / num_heads
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 5,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "vocab_size": 120,
    "decoder_start_token_id": 0,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "bert": _SIZES,
    "roberta": _SIZES | {"pad_token_id": 1},
    "xlm-roberta": _SIZES | {"pad_token_id": 1},
    "camembert": _SIZES | {"pad_token_id": 1},
    "data2vec-text": _SIZES | {"pad_token_id": 1},
    "megatron-bert": _SIZES,
    "mobilebert": _SIZES  # whose relu would kink finite differences: no norm stands between
    | {"embedding_size": 16, "intra_bottleneck_size": 24, "hidden_act": "gelu"},
    "rembert": _SIZES | {"input_embedding_size": 16},
    "roformer": _SIZES | {"embedding_size": 16},
    "splinter": _SIZES,
    "modernbert": _SIZES
    | {"global_attn_every_n_layers": 2, "local_attention": 6, "reference_compile": False}
    | {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3},
    "electra": _SIZES | {"embedding_size": 16},
    "albert": _SIZES | {"embedding_size": 16, "num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2},
    "mpnet": _SIZES | {"pad_token_id": 1},
    "deberta": _SIZES | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 20},
    "deberta-v2": _SIZES | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 20},
    "distilbert": {
        "dim": 32,
        "n_layers": 3,
        "n_heads": 4,
        "hidden_dim": 48,
        "vocab_size": 120,
        "max_position_embeddings": 160,
    },
    "gpt2": _GPT2,
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "vocab_size": 120,
        "max_position_embeddings": 160,
        "attention_types": [[["local", "global", "local"], 1]],
        "window_size": 5,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "gptj": {
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "rotary_dim": 4,
        "vocab_size": 120,
        "n_positions": 160,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "gpt_neox": _SIZES,
    "opt": _SIZES | {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "llama": _GROUPED,
    "mistral": _GROUPED | {"sliding_window": 5},
    "qwen2": _GROUPED,
    "qwen3": _WIDE_HEADS,
    "gemma": _WIDE_HEADS,
    # A norm follows each block too: with little left in a block, it would enlarge what rounding does to the rest.
    "gemma2": _WIDE_HEADS | _WINDOWS | {"query_pre_attn_scalar": 6, "rms_norm_eps": 0.01},
    "gemma3_text": _WIDE_HEADS | _WINDOWS | {"query_pre_attn_scalar": 6, "rms_norm_eps": 0.01},
    "granite": _GROUPED | {"attention_multiplier": 0.5, "residual_multiplier": 0.7, "logits_scaling": 2.0},
    "cohere": _GROUPED,
    "smollm3": _GROUPED | {"no_rope_layers": [1, 0, 1], "pad_token_id": 1},
    "stablelm": _GROUPED | {"partial_rotary_factor": 0.5},
    "phi": _GROUPED,
    "olmo": _GROUPED | {"clip_qkv": 1.0},
    "arcee": _WIDE_HEADS,
    "glm": _GROUPED | {"head_dim": 8, "pad_token_id": 1},
    "helium": _GROUPED | {"head_dim": 4},  # its output projection takes no other
    "nemotron": _GROUPED | {"head_dim": 8},
    "vit": _IMAGE,
    "dpt": _IMAGE | {"backbone_out_indices": [0, 1, 2, 2]},
    "deit": _IMAGE | {"architectures": []},  # transformers looks there which of two classifiers to build
    "dinov2": _IMAGE | {"mlp_ratio": 2},
    "vit_msn": _IMAGE,
    "yolos": _IMAGE | {"image_size": [30, 42], "num_detection_tokens": 5},
    "audio-spectrogram-transformer": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_length": 40,
        "num_mel_bins": 24,
    },
    "clip_vision_model": _IMAGE,
    "siglip_vision_model": _IMAGE,
    "clip": _TWO_TOWERS,
    "siglip": _TWO_TOWERS | {"text_config": _TWO_TOWERS["text_config"] | {"projection_size": 48}},
    "swin": _STAGES,
    "donut-swin": _STAGES,
    "beit": _IMAGE | {"use_relative_position_bias": True, "layer_scale_init_value": 0.5},
    "data2vec-vision": _IMAGE | {"use_relative_position_bias": True, "layer_scale_init_value": 0.5},
    "wav2vec2": _WAVEFORM,
    "wavlm": _WAVEFORM | {"num_buckets": 16, "max_bucket_distance": 20},
    "hubert": _WAVEFORM,
    "data2vec-audio": _WAVEFORM,
    "unispeech": _WAVEFORM,
    "unispeech-sat": _WAVEFORM,
    "bart": _SEQ2SEQ | {"tie_word_embeddings": True},
    "blenderbot": _SEQ2SEQ,
    "blenderbot-small": _SEQ2SEQ,
    "m2m_100": _SEQ2SEQ | {"tie_word_embeddings": True},  # transformers saves and loads it no other way
    "marian": _SEQ2SEQ | {"decoder_vocab_size": 120},
    "mbart": _SEQ2SEQ | {"tie_word_embeddings": True},
    "mt5": _T5 | {"initializer_factor": 0.3},  # its vocabulary's matrix starts far larger than T5's
    "pegasus": _SEQ2SEQ,
    "t5": _T5,
    "whisper": _SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 140, "init_std": 0.2},
    "bloom": {"hidden_size": 48, "n_layer": 3, "n_head": 6, "vocab_size": 120},  # slopes of six heads are irregular
    "mpt": {"d_model": 48, "n_layers": 3, "n_heads": 6, "vocab_size": 120, "max_seq_len": 160},
    "falcon": _SIZES | {"num_attention_heads": 8, "num_kv_heads": 4, "new_decoder_architecture": True, "bias": True},
    "gpt_bigcode": _GPT2 | {"multi_query": False},
    "codegen": _GPT2 | {"n_head": 8, "rotary_dim": 4, "n_ctx": 160},
    "phi3": _GROUPED | {"pad_token_id": 1},
    # Every expert sees every token: which ones are chosen is a jump that rounding to another precision may take.
    "qwen3_moe": _WIDE_HEADS | {"num_experts": 3, "num_experts_per_tok": 3, "moe_intermediate_size": 24},
}
ENCODERS = {
    *("albert", "bert", "camembert", "data2vec-text", "deberta", "deberta-v2", "distilbert", "electra"),
    *("megatron-bert", "mobilebert", "modernbert", "mpnet", "rembert", "roberta", "roformer", "splinter"),
    "xlm-roberta",
}
VISION = {
    *(
        "beit",
        "clip_vision_model",
        "data2vec-vision",
        "deit",
        "dinov2",
        "donut-swin",
        "dpt",
        "siglip_vision_model",
        "swin",
    ),
    *("vit", "vit_msn", "yolos"),
}
TWO_TOWERS = {"clip", "siglip"}
AUDIO = {
    *("audio-spectrogram-transformer", "data2vec-audio", "hubert", "unispeech", "unispeech-sat", "wav2vec2", "wavlm"),
}
SEQ2SEQ = {
    *("bart", "blenderbot", "blenderbot-small", "m2m_100", "marian", "mbart", "mt5", "pegasus", "t5", "whisper"),
}
# How attention, norms, positions and caches are written in a graph: where exporting decides, one of each will do.
SPREAD = {
    *("albert", "bart", "bert", "bloom", "clip", "deberta", "falcon", "gpt2", "llama", "vit", "wav2vec2"),
}
_MULTI_QUERY: dict[str, Any] = {"new_decoder_architecture": False, "multi_query": True}
_OLD_FALCON: dict[str, Any] = {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": None}
# Configurations that lead a family's rows, its adapter or transformers' forward another way: name -> type and changes.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-relative": ("bert", {"position_embedding_type": "relative_key"}),
    "roberta-relative": ("roberta", {"position_embedding_type": "relative_key_query"}),
    "electra-relative": ("electra", {"position_embedding_type": "relative_key_query"}),
    "albert-one-layer": ("albert", {"num_hidden_groups": 1, "inner_group_num": 1}),
    "albert-relative": ("albert", {"position_embedding_type": "relative_key_query"}),
    "yolos-plain": ("yolos", {"use_mid_position_embeddings": False}),  # its layers can go
    "beit-shared": ("beit", {"use_shared_relative_position_bias": True}),
    "beit-absolute": ("beit", {"use_relative_position_bias": False}),
    "data2vec-vision-shared": (
        "data2vec-vision",
        {"use_relative_position_bias": False, "use_shared_relative_position_bias": True},
    ),
    "deberta-p2c": ("deberta", {"pos_att_type": ["p2c"]}),
    "deberta-absolute": ("deberta", {"relative_attention": False, "pos_att_type": None}),
    "deberta-v2-shared": ("deberta-v2", {"share_att_key": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm"}),
    "deberta-v2-c2p": ("deberta-v2", {"pos_att_type": ["c2p"]}),
    "deberta-v2-conv": ("deberta-v2", {"conv_kernel_size": 3, "conv_act": "gelu"}),
    "deberta-v2-absolute": ("deberta-v2", {"relative_attention": False, "pos_att_type": None}),
    "dinov2-gated": ("dinov2", {"use_swiglu_ffn": True}),
    "gpt2-inner": ("gpt2", {"n_inner": 48}),
    "gpt2-inverse-layers": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2-upcast": ("gpt2", {"reorder_and_upcast_attn": True}),
    "llama-ungrouped": ("llama", {"num_key_value_heads": 8}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide": ("llama", {"head_dim": 6}),
    "mistral-wide": ("mistral", {"head_dim": 10, "sliding_window": 4}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "modernbert-biased": ("modernbert", {"mlp_bias": True, "attention_bias": True}),
    "swin-windows": ("swin", {"num_heads": [4, 8], "window_size": 4, "qkv_bias": False}),
    "wavlm-stable": ("wavlm", {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}),
    "phi-norms": ("phi", {"qk_layernorm": True}),
    "qwen2-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "gemma-multi-query": ("gemma", {"num_key_value_heads": 1}),
    "falcon-alibi": ("falcon", {"alibi": True}),
    "falcon-multi-query": ("falcon", _MULTI_QUERY),
    "falcon-multi-query-alibi": ("falcon", _MULTI_QUERY | {"alibi": True}),
    "falcon-old": ("falcon", _OLD_FALCON),
    "falcon-old-alibi": ("falcon", _OLD_FALCON | {"alibi": True, "num_attention_heads": 6, "hidden_size": 48}),
    "gpt_bigcode-multi-query": ("gpt_bigcode", {"multi_query": True}),
    "phi3-wide": ("phi3", {"head_dim": 6, "sliding_window": 5}),
    "qwen3_moe-sparse": ("qwen3_moe", {"num_experts_per_tok": 2, "mlp_only_layers": [1]}),
}
SPREAD_VARIANTS = ("albert-relative", "falcon-multi-query", "llama-wide")
DECODERS = CONFIGS.keys() - ENCODERS - VISION - TWO_TOWERS - AUDIO - SEQ2SEQ
DECODERS |= {name for name, (model_type, _) in VARIANTS.items() if model_type in DECODERS}


def spread(*cases: Any) -> list[Any]:
    """Cases of a model type, or of one and more: those whose model type is not in SPREAD belong to `--whole` alone."""

    def of(case: Any) -> Any:
        values = case if isinstance(case, tuple) else (case,)
        return pytest.param(*values, marks=() if values[0] in SPREAD else pytest.mark.slow)

    return [of(case) for case in cases]


def type_of(variety: str) -> str:
    """The model type of a name of VARIANTS, or of itself."""
    return VARIANTS[variety][0] if variety in VARIANTS else variety


def variant_of(variety: str) -> str:
    """In words, what sets a variant apart; nothing for a model type."""
    _, changes = VARIANTS.get(variety, (variety, {}))
    return ", ".join(f"{key}: {value}" for key, value in changes.items())


def task_of(variety: str) -> str:
    """What the tests use a model for, unless they say otherwise."""
    if variety in SEQ2SEQ:
        return "automatic-speech-recognition" if variety == "whisper" else "text2text-generation"
    return "text-generation" if variety in DECODERS else "feature-extraction"


def tasks_of(variety: str) -> list[str]:
    """The tasks that transformers has a class for, the ones that name a model best first."""
    model_type = type_of(variety)
    config = AutoConfig.for_model(model_type)
    return [
        task
        for task, auto in auto_classes(config).items()
        if type(config) in getattr(transformers, auto)._model_mapping
        and not (task == "text-generation" and model_type not in DECODERS)
        and not (task == "image-classification" and model_type in TWO_TOWERS)  # a class with one tower only
    ]


def config_of(variety: str, **changes: Any) -> PretrainedConfig:
    """The small configuration of a model type or of a name of VARIANTS."""
    model_type, own = VARIANTS.get(variety, (variety, {}))
    return AutoConfig.for_model(model_type, **CONFIGS[model_type] | own | changes)


def tiny_model(
    variety: str, *, task: str | None = None, seed: int = 0, attn_implementation: str | None = None, **changes: Any
) -> PreTrainedModel:
    """A random float32 model in eval mode whose biases and norms are random too, so that none of them can hide.

    `variety` is a model type or a name of VARIANTS.
    """
    torch.manual_seed(seed)
    config = config_of(variety, **changes)
    auto = getattr(transformers, auto_classes(config)[task or task_of(variety)])
    model = auto.from_config(config, attn_implementation=attn_implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # a table of sines is not saved, but made again
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What a forward makes without naming a dtype is of this one: the masks of CLIP and MPT fit into no smaller."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class InFloat64Throughout(TorchFunctionMode):
    """Norms, softmax and scores round to float32 whatever the model's dtype, which would drown a finite difference."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(wide, args), **{key: wide(value) for key, value in (kwargs or {}).items()})
