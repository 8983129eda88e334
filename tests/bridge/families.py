"""A tiny random model of each family that Bridge runs without a GPU, as transformers makes it."""

from pathlib import Path
from typing import Any

import torch
import transformers

SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
WINDOW = {"sliding_window": 16}  # shorter than the samples
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
# The class of the config, and what differs from SMALL.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("LlamaConfig", {"rope_scaling": LLAMA3, "rope_theta": 5e5}),
    "mistral": ("MistralConfig", {"head_dim": 32} | WINDOW),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"head_dim": 32, "moe_intermediate_size": 48, "norm_topk_prob": True} | EXPERTS,
    ),
    # As Gemma 2B: two ranks share the one head of keys and values.
    "gemma": ("GemmaConfig", {"head_dim": 32, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2Config", {"head_dim": 32, "query_pre_attn_scalar": 24}),
    "gemma3": (  # the seventh layer is the first to follow one that sees all
        "Gemma3TextConfig",
        {"head_dim": 32, "query_pre_attn_scalar": 24, "num_hidden_layers": 7} | WINDOW,
    ),
    "nemotron": ("NemotronConfig", {"head_dim": 16, "partial_rotary_factor": 0.5}),
    "olmoe": ("OlmoeConfig", {"num_key_value_heads": 4} | EXPERTS),
    "gpt_oss": (
        "GptOssConfig",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2} | WINDOW,
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        {
            "head_dim": 16,
            "use_qk_norm": True,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 0,
        },
    ),
}


# Its attention needs a GPU.
DEEPSEEK: tuple[str, dict[str, Any]] = (
    "DeepseekV3Config",
    {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "moe_intermediate_size": 48,
        "first_k_dense_replace": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
    },
)


def config_of(family: str, **changes: Any) -> Any:
    name, differs = FAMILIES[family] if family != "deepseek_v3" else DEEPSEEK
    return getattr(transformers, name)(**SMALL | differs | changes)


def save_model(path: Path, config: Any, tokenizer: Any) -> Path:
    """Save a model with random weights in every parameter, and the tokenizer; return the path."""
    config.eos_token_id, config.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "norm" in name:  # around what the family starts it with
            weight.data.add_(torch.empty_like(weight).normal_(std=0.1, generator=generator))
        else:  # peaked distributions, as a trained model has
            weight.data.normal_(std=0.2, generator=generator)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
