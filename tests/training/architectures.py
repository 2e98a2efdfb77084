"""Tiny configurations of real architectures."""

import transformers as hf

V = 61
SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {**SMALL, "head_dim": 8}
OLD = {"vocab_size": V, "bos_token_id": 1, "eos_token_id": 2}
GPT = {**OLD, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
STATE = {**OLD, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "pad_token_id": 0}
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**SMALL),
    "llama_tied": lambda: hf.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "mistral": lambda: hf.MistralConfig(**SMALL),
    "mixtral": lambda: hf.MixtralConfig(**SMALL, num_local_experts=4, output_router_logits=True),
    "qwen3": lambda: hf.Qwen3Config(**HEADS),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        **HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, output_router_logits=True
    ),
    "gemma2": lambda: hf.Gemma2Config(**HEADS, final_logit_softcapping=5.0, query_pre_attn_scalar=8),
    "gemma3": lambda: hf.Gemma3TextConfig(**HEADS, final_logit_softcapping=4.0, query_pre_attn_scalar=8),
    "cohere": lambda: hf.CohereConfig(**SMALL, logit_scale=0.3),
    "cohere2": lambda: hf.Cohere2Config(**SMALL, logit_scale=0.3),
    "granite": lambda: hf.GraniteConfig(**SMALL, logits_scaling=3.0),
    "gpt2": lambda: hf.GPT2Config(**GPT),
    "gptj": lambda: hf.GPTJConfig(**GPT, rotary_dim=8),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
    "phi": lambda: hf.PhiConfig(**SMALL),
    "olmo2": lambda: hf.Olmo2Config(**SMALL),
    "falcon_h1": lambda: hf.FalconH1Config(
        **HEADS,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
        lm_head_multiplier=0.5,
    ),
    "recurrent_gemma": lambda: hf.RecurrentGemmaConfig(
        **{
            **STATE,
            "num_hidden_layers": 3,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "lru_width": 32,
        },
        attention_window_size=16,
        logits_soft_cap=6.0,
    ),
    "mamba": lambda: hf.MambaConfig(**STATE),
    "mamba2": lambda: hf.Mamba2Config(**STATE, num_heads=8, head_dim=8, n_groups=1, expand=2),
    "rwkv": lambda: hf.RwkvConfig(
        **OLD, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, context_length=64
    ),
    "bloom": lambda: hf.BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4),
    "opt": lambda: hf.OPTConfig(
        vocab_size=V,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    ),
    "roformer": lambda: hf.RoFormerConfig(
        **{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}, is_decoder=True
    ),
    # Every second layer attends to a window.
    "gpt_neo": lambda: hf.GPTNeoConfig(
        **OLD,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        intermediate_size=48,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        max_position_embeddings=64,
    ),
    # Names a window that it does not apply.
    "moshi": lambda: hf.MoshiConfig(**HEADS, ffn_dim=48, sliding_window=4),
    "xlm": lambda: hf.XLMConfig(
        **OLD, emb_dim=32, n_layers=2, n_heads=4, causal=True, max_position_embeddings=64, pad_token_id=0
    ),
    # Names a scale of logits that it applies to hidden states.
    "minicpm3": lambda: hf.MiniCPM3Config(
        **{**SMALL, "num_key_value_heads": 4},
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        dim_model_base=8,
    ),
    # Cuts off the logits of padding.
    "inkling2": lambda: hf.Inkling2TextConfig(
        **{**HEADS, "vocab_size": V + 7},
        unpadded_vocab_size=V,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=8,
        sliding_window_size=4,
        d_rel=4,
        rel_extent=16,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_layers_per_attn_res_block=2,
    ),
}
