"""Tiny models of every text model class of transformers that has an output head, from their configuration classes."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 96
REACH = 12
"""Every window, chunk and top-k of a tiny model, tokens."""

# Sizes by the name of a setting; the first pattern that fits counts.
_SIZES: tuple[tuple[str, Any], ...] = (
    (r"unpadded_vocab_size", 90),
    (r"vocab_size(_per_layer_input)?|n_words|n_vocab", VOCABULARY),
    (r"(sliding|attention|local|keep)_window(_size|_len)?|window_size|attention_chunk_size", REACH),
    (r"local_attention(_window_len)?|sliding_window_size|attention_window_size|index_topk", REACH),
    (r"(local|lsh)_attn_chunk_length", 8),
    (r"index_block_size|index_topk_blocks", 4),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(target|source)_positions|context_length",
        256,
    ),
    (r"(decoder_)?hidden_size|d_model|n_embd|dim|emb_dim|embed_dim|word_embed_proj_dim|embedding_size", 32),
    (r"mamba_d_ssm|lru_width|attention_hidden_size", 32),
    (
        r"(moe_|(shared_)?expert_|mlp_|shared_)?(intermediate_size|ffn_dim|ffn_size|ffn_hidden_size)(_mlp)?",
        48,
    ),
    (r"(de|en)coder_ffn_dim|n_inner|d_ff|d_inner|dim_ff", 48),
    (r"num_hidden_layers|n_layers?|num_layers|(num_)?(de|en)coder_layers|depth", 2),
    (r"num_attention_heads|n_heads?|num_heads|(num_)?(de|en)coder_attention_heads|num_mem_heads", 4),
    (r"num_(key_value|kv)_heads|swa_num_key_value_heads|num_global_key_value_heads", 2),
    (
        r"(index_|global_|swa_|v_|attention_|linear_(key|value)_)?head_dim|kv_channels|d_kv|d_head|rotary_dim",
        8,
    ),
    (r"qk_(nope|rope)_head_dim|v_head_dim|qk_head_dim", 8),
    (r"(kv|q|o)_lora_rank", 16),
    (r"index_n_heads", 2),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|num_selected_experts", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"(ssm_)?state_size|(mamba_)?d_state|hidden_size_per_layer_input", 8),
    (r"mamba_n_heads|mamba_d_head", 8),
    (r"(image|patch|video|audio)_size", 16),
    (r"(pad|bos)_token_id", 0),
    (r"(eos|image|video|audio|img)_token_(id|index)", 2),
)
# Rotary positions of text, height and width.
_THREE_AXES = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
# What classes ask for beyond that, tried one after another with each set of sizes.
_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"num_hidden_layers": 4},
    {"num_hidden_layers": 4, "num_key_value_heads": 4},
    {"num_hidden_layers": 6},
    {"num_hidden_layers": 8, "num_key_value_heads": 4},
    {"rope_parameters": _THREE_AXES},
    {"rope_parameters": _THREE_AXES, "num_key_value_heads": 4},
)
# Settings of single kinds of models.
_ODD: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    # Without a seed, its hashing differs from one forward pass to the next.
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (16, 16), "hash_seed": 0},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
    },
    "falcon_h1": {"mamba_n_heads": 4, "mamba_n_groups": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "gemma3n_text": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": None},
    "gemma4_unified_text": {"num_kv_shared_layers": 0},
    "zaya": {"num_experts_per_tok": 1},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [24, 24]},
    "longcat_flash": {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "head_dim": 8},
    "xmod": {"default_language": "en_XX"},
}


def classes() -> dict[str, Any]:
    """Model classes by name: all causal ones, and those that generate with text and other inputs."""
    names = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
    names |= {
        name
        for name in dir(transformers)
        if re.search(r"(ForCausalLM|LMHeadModel|WithLMHead|ForConditionalGeneration)$", name)
    }
    found = (
        (name, getattr(transformers, name, None)) for name in sorted(names) if not name.startswith("Auto")
    )
    return {name: kind for name, kind in found if isinstance(kind, type)}


def built(kind: Any) -> nn.Module:
    """A tiny model in float32 on a CPU, at its first weights, that answers text alone.

    Raises:
        Exception: Of the first attempt, if no set of sizes makes one.
    """
    problem: Exception | None = None
    for variant in _VARIANTS:
        try:
            model = kind(_prepared(kind, tiny_config(kind.config_class, variant))).eval()
            with torch.no_grad():
                model(
                    input_ids=torch.randint(3, 60, (2, 24)),
                    attention_mask=torch.ones(2, 24, dtype=torch.long),
                )
        except Exception as error:
            problem = problem or error
        else:
            return model
    assert problem is not None
    raise problem


def tiny_config(kind: Any, variant: dict[str, Any]) -> Any:
    """A small configuration, and small ones of its parts."""
    names = {field.name for field in dataclasses.fields(kind)}
    values = {name: size for name in names if (size := _size(name)) is not None}
    for name, part in (getattr(kind, "sub_configs", None) or {}).items():
        part = type(getattr(kind(), name)) if part is transformers.AutoConfig else part
        if part is not type(None):
            values[name] = tiny_config(part, variant)
    values |= {name: value for name, value in variant.items() if name in names}
    return kind(**{**values, **_ODD.get(kind.model_type, {})})


def grow(model: nn.Module, deviation: float = 0.2) -> None:
    """Weights with which attention and positions matter, as after a training."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, deviation)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def _size(name: str) -> Any:
    return next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)


def _prepared(kind: Any, config: Any) -> Any:
    """A decoder without dropout, on SDPA where there is that."""
    for part in _parts(config):
        if hasattr(part, "is_decoder") and not getattr(part, "is_encoder_decoder", False):
            part.is_decoder = True
        for name in [*vars(part)]:
            if re.search(r"drop", name) and isinstance(getattr(part, name), float):
                setattr(part, name, 0.0)
        part._experts_implementation = "eager"
    config._attn_implementation = "sdpa" if kind._supports_sdpa else "eager"
    torch.manual_seed(0)
    return config


def _parts(config: Any) -> Iterator[Any]:
    names = getattr(config, "sub_configs", None) or {}
    parts = (getattr(config, name, None) for name in names)
    return itertools.chain([config], *(_parts(part) for part in parts if part is not None))
