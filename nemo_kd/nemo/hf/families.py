"""The families of models that NeMo and Hugging Face both compute, one short table each.

Megatron's names are those of its checkpoints, which stack the layers along the first axis and are
the same for every layer spec. They come from Transformer Engine's spec, which fuses each norm into
the linear layer behind it.
"""

from dataclasses import dataclass
from typing import Any

# Of one layer: Megatron's name, and those of the Hugging Face matrices that it holds.
_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm.weight",),
    "mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight",),
}
_ATTENTION = {
    "self_attention.linear_qkv.weight": tuple(f"self_attn.{x}_proj.weight" for x in "qkv"),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
}
_GATED_MLP = {
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}
# Outside the layers.
_WHOLE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",  # absent where the embedding is shared
}

# NeMo's keys, with what NeMo takes where a config leaves them out, and Hugging Face's.
_SIZES = {
    ("num_layers", None): "num_hidden_layers",
    ("hidden_size", None): "hidden_size",
    ("ffn_hidden_size", None): "intermediate_size",
    ("num_attention_heads", None): "num_attention_heads",
    ("num_query_groups", None): "num_key_value_heads",  # None: num_attention_heads
    ("kv_channels", None): "head_dim",  # None: hidden_size / num_attention_heads
    ("max_position_embeddings", None): "max_position_embeddings",
    ("init_method_std", 0.02): "initializer_range",
    ("rotary_base", 10000.0): "rope_theta",
    ("share_embeddings_and_output_weights", True): "tie_word_embeddings",
}

_LLAMA = {
    "normalization": "rmsnorm",
    "activation": "fast-swiglu",
    "bias": False,
    "position_embedding_type": "rope",
    "rotary_percentage": 1.0,
    "qkv_bias": False,
    "qk_layernorm": False,
    "layernorm_zero_centered_gamma": False,
}
# What NeMo takes where a config leaves one of the keys above out.
NEMO_DEFAULTS = {
    "normalization": "layernorm",
    "activation": "gelu",
    "bias": True,
    "position_embedding_type": "learned_absolute",
    "rotary_percentage": 1.0,
    "qkv_bias": False,
    "qk_layernorm": False,
    "layernorm_zero_centered_gamma": False,
    "name": "",
}
# NeMo's models with one of these compute what no family here does.
OTHER_ARCHITECTURES = (
    *("num_moe_experts", "multi_latent_attention", "window_size", "softmax_scale"),
    *("apply_embedding_scaling", "attn_logit_softcapping", "final_logit_softcapping"),
    *("mcore_customization_config", "rotary_interleaved", "openai_gelu"),
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models that differ in sizes and weights alone.

    Args:
        name: what messages call it.
        model_types: of config.json.
        hf_class: the config of transformers that an export has.
        architecture: NeMo's keys by which its models are told from other families.
        layer: of one layer, Megatron's names and the Hugging Face matrices that each holds.
        whole: the same outside the layers.
        sizes: NeMo's keys, each with its default, and Hugging Face's fields.
        activations: what config.json may have as hidden_act.
        rope_types: the kinds of RoPE that both compute.
        nemo: what else its NeMo config has, which does not change the function.
    """

    name: str
    model_types: tuple[str, ...]
    hf_class: str
    architecture: dict[str, Any]
    layer: dict[str, tuple[str, ...]]
    whole: dict[str, str]
    sizes: dict[tuple[str, Any], str]
    activations: tuple[str, ...] = ("silu", "swish")
    rope_types: tuple[str, ...] = ("default", "linear", "llama3")
    nemo: tuple[tuple[str, Any], ...] = ()


LLAMA = Family(
    name="Llama",
    model_types=("llama", "mistral"),
    hf_class="LlamaConfig",
    architecture=_LLAMA,
    layer=_NORMS | _ATTENTION | _GATED_MLP,
    whole=_WHOLE,
    sizes=_SIZES | {("layernorm_epsilon", 1e-5): "rms_norm_eps"},
)
QWEN2 = Family(  # biases in q, k and v
    name="Qwen2",
    model_types=("qwen2",),
    hf_class="Qwen2Config",
    architecture=_LLAMA | {"qkv_bias": True},
    layer=LLAMA.layer
    | {"self_attention.linear_qkv.bias": tuple(f"self_attn.{x}_proj.bias" for x in "qkv")},
    whole=_WHOLE,
    sizes=LLAMA.sizes,
)
QWEN3 = Family(  # norms on the heads of q and k
    name="Qwen3",
    model_types=("qwen3",),
    hf_class="Qwen3Config",
    # Of NeMo's layer specs only this one reads qk_layernorm; the others build no such norms.
    architecture=_LLAMA | {"qk_layernorm": True, "name": "decoder_block_gpt"},
    layer=LLAMA.layer
    | {f"self_attention.{x}_layernorm.weight": (f"self_attn.{x}_norm.weight",) for x in "qk"},
    whole=_WHOLE,
    sizes=LLAMA.sizes,
)
NEMOTRON = Family(  # no gates, LayerNorms with biases and with weights about 0, partial RoPE
    name="Nemotron",
    model_types=("nemotron",),
    hf_class="NemotronConfig",
    architecture={
        "normalization": "layernorm1p",
        "activation": "squared-relu",
        "bias": False,
        "position_embedding_type": "rope",
        "qkv_bias": False,
        "qk_layernorm": False,
    },
    layer=_NORMS
    | {
        name.replace("_weight", "_bias"): (hf_names[0].replace(".weight", ".bias"),)
        for name, hf_names in _NORMS.items()
    }
    | _ATTENTION
    | {
        "mlp.linear_fc1.weight": ("mlp.up_proj.weight",),
        "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
    },
    whole=_WHOLE | {"decoder.final_layernorm.bias": "model.norm.bias"},
    sizes=_SIZES
    | {
        ("layernorm_epsilon", 1e-5): "norm_eps",
        ("rotary_percentage", 1.0): "partial_rotary_factor",
    },
    activations=("relu2",),
    rope_types=("default",),
    # Megatron Core has no fused kernel of squared ReLU, and NeMo asks for one unless told not to.
    nemo=(("bias_activation_fusion", False),),
)
FAMILIES = (LLAMA, QWEN2, QWEN3, NEMOTRON)
MODEL_TYPES = {model_type: family for family in FAMILIES for model_type in family.model_types}


def family_of_nemo(nemo: Any) -> Family:
    """Return the family of a NeMo model's config.

    Raises:
        ValueError: It has none; names the first difference from the family that is nearest.
    """

    # null in a YAML is the same as leaving the key out
    found = {key: nemo.get(key) for key in NEMO_DEFAULTS}
    found = {key: NEMO_DEFAULTS[key] if value is None else value for key, value in found.items()}

    def differences(family: Family) -> list[str]:
        return [key for key, expected in family.architecture.items() if found[key] != expected]

    nearest = min(FAMILIES, key=lambda family: len(differences(family)))
    names = ", ".join(family.name for family in FAMILIES)
    if different := differences(nearest):
        key = different[0]
        raise ValueError(
            f"source: expected a model of one of the families {names}; the nearest is "
            f"{nearest.name} ({key}: {nearest.architecture[key]}), got {key}: {found[key]}"
        )
    for key in OTHER_ARCHITECTURES:
        if nemo.get(key):
            raise ValueError(
                f"source: expected a model of one of the families {names}, got one with "
                f"{key}: {nemo[key]}"
            )
    return nearest
