"""The Llama family's weights as Hugging Face and as Megatron Core lay them out, in both directions.

With h the hidden size, d the head size, g the key/value groups and q the query heads a group:

    linear_qkv  [g * (q + 2) * d, h]  by group: its q query heads, its key head, its value head
    linear_fc1  [2 * ffn, h]          gate rows, then up rows

Everything else is one matrix in both. Megatron's names are those of its checkpoints, which stack
the layers along the first axis and are the same for every layer spec. They come from Transformer
Engine's spec, which fuses each norm into the linear layer behind it.
"""

from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

# Of one layer: Megatron's name, and those of the Hugging Face matrices that it holds.
LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.weight": tuple(f"self_attn.{x}_proj.weight" for x in "qkv"),
    "self_attention.linear_qkv.bias": tuple(f"self_attn.{x}_proj.bias" for x in "qkv"),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}
# Outside the layers.
WHOLE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",  # absent where the embedding is shared
}
# Fields that NeMo's model has no key for. The .nemo keeps them for the export.
KEPT = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
ROW_MULTIPLE = 128  # of the embedding's rows; NeMo's own
VOCAB_ROWS = ("embedding.word_embeddings.weight", "output_layer.weight")  # padded in Megatron

# What makes a NeMo model one of the Llama family.
ARCHITECTURE = {
    "normalization": "rmsnorm",
    "activation": "fast-swiglu",
    "bias": False,
    "position_embedding_type": "rope",
    "rotary_percentage": 1.0,
}
OTHER_ARCHITECTURES = (
    *("num_moe_experts", "multi_latent_attention", "window_size", "qk_layernorm", "softmax_scale"),
    *("apply_embedding_scaling", "attn_logit_softcapping", "final_logit_softcapping"),
    *("layernorm_zero_centered_gamma", "mcore_customization_config", "rotary_interleaved"),
)
# NeMo's keys, with what NeMo takes where a config leaves them out, and Hugging Face's.
SIZES = {
    ("num_layers", None): "num_hidden_layers",
    ("hidden_size", None): "hidden_size",
    ("ffn_hidden_size", None): "intermediate_size",
    ("num_attention_heads", None): "num_attention_heads",
    ("num_query_groups", None): "num_key_value_heads",  # None: num_attention_heads
    ("kv_channels", None): "head_dim",  # None: hidden_size / num_attention_heads
    ("max_position_embeddings", None): "max_position_embeddings",
    ("init_method_std", 0.02): "initializer_range",
    ("layernorm_epsilon", 1e-5): "rms_norm_eps",
    ("rotary_base", 10000.0): "rope_theta",
    ("share_embeddings_and_output_weights", True): "tie_word_embeddings",
}
LLAMA3_ROPE = {
    ("scale_factor", 8): "factor",
    ("low_freq_factor", 1): "low_freq_factor",
    ("high_freq_factor", 4): "high_freq_factor",
    ("old_context_len", 8192): "original_max_position_embeddings",
}


def to_megatron(
    source: dict[str, Tensor], num_groups: int, layers: list[int], padded_vocab_size: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield Megatron's weights, named as WHOLE and `decoder.layers.<n>.<LAYER>` are.

    Args:
        source: A Hugging Face state dict.
        num_groups: Key/value groups.
        layers: The source's layers to take, in this order.
        padded_vocab_size: Rows of the embedding; those past the source's own are zero, and so are
            their logits.
    """
    for name, hf_name in WHOLE.items():
        if hf_name not in source:
            continue
        tensor = source[hf_name]
        if name in VOCAB_ROWS:
            tensor = pad(tensor, (0, 0, 0, padded_vocab_size - len(tensor)))
        yield name, tensor
    for new, old in enumerate(layers):
        for name, hf_names in LAYER.items():
            full_names = [f"model.layers.{old}.{hf_name}" for hf_name in hf_names]
            if full_names[0] in source:
                parts = [source[full_name] for full_name in full_names]
                yield f"decoder.layers.{new}.{name}", _join(parts, _num_groups(name, num_groups))


def to_hf(
    weights: MutableMapping[str, Tensor], shapes: dict[str, torch.Size], num_groups: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield the Hugging Face state dict; each of `weights` is removed from it when it is used.

    Args:
        weights: Megatron's, named as WHOLE and `decoder.layers.<LAYER>` are, the latter
            with the layers along the first axis.
        shapes: Of each Hugging Face parameter: the vocabulary's rows past it are padding.
        num_groups: Key/value groups.
    """
    for name, hf_name in WHOLE.items():
        if name in weights:
            yield hf_name, weights.pop(name)[: shapes[hf_name][0]]
    for name, hf_names in LAYER.items():
        stacked = weights.pop(f"decoder.layers.{name}", None)
        for layer, tensor in enumerate(() if stacked is None else stacked.unbind()):
            full_names = [f"model.layers.{layer}.{hf_name}" for hf_name in hf_names]
            sizes = [shapes[hf_name][0] for hf_name in full_names]
            parts = _split(tensor, sizes, _num_groups(name, num_groups))
            yield from zip(full_names, parts, strict=True)


def _num_groups(name: str, num_groups: int) -> int:
    """Into how many parts each matrix of linear_qkv is cut; the others stay whole."""
    return num_groups if "linear_qkv" in name else 1


def _join(parts: list[Tensor], num_groups: int) -> Tensor:
    """Matrices [rows, ...] -> one, group by group."""
    if len(parts) == 1:
        return parts[0]
    grouped = [part.reshape(num_groups, -1, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _split(tensor: Tensor, sizes: list[int], num_groups: int) -> list[Tensor]:
    """The inverse of _join, for matrices of these numbers of rows, in memory of their own."""
    if len(sizes) == 1:
        return [tensor.clone()]
    grouped = tensor.reshape(num_groups, -1, *tensor.shape[1:])
    parts = torch.split(grouped, [size // num_groups for size in sizes], dim=1)
    return [part.flatten(0, 1).contiguous() for part in parts]


def nemo_config(
    hf: Any, tokenizer_directory: str, num_layers: int, num_tokens: int
) -> dict[str, Any]:
    """Return NeMo's model config for a Hugging Face config of the Llama family.

    Args:
        hf: The config, whose fields hf_fields has checked.
        tokenizer_directory: Where the tokenizer lies.
        num_layers: Of the layers that are taken.
        num_tokens: Of the tokenizer. NeMo makes the embedding so large, and pads it.
    """
    rows = -(-hf.vocab_size // ROW_MULTIPLE) * ROW_MULTIPLE
    # A Qwen has more rows than tokens, and all of them take part in its softmax.
    spare = {"override_vocab_size": rows} if rows >= num_tokens + ROW_MULTIPLE else {}
    return {
        **ARCHITECTURE,
        **{key: getattr(hf, hf_key, None) for (key, _), hf_key in SIZES.items()},
        "num_layers": num_layers,
        "kv_channels": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        "encoder_seq_length": hf.max_position_embeddings,
        "qkv_bias": hf.model_type == "qwen2",
        **_nemo_rope_scaling(hf.rope_scaling),
        **spare,
        "hugging_face": {name: getattr(hf, name) for name in KEPT},
        "tokenizer": {"library": "huggingface", "type": tokenizer_directory, "use_fast": True},
        # What every NeMo model's config has, whatever its architecture.
        "mcore_gpt": True,
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "ffn_dropout": 0.0,
        "make_vocab_size_divisible_by": ROW_MULTIPLE,
        "apply_query_key_layer_scaling": False,
        "precision": 32,
        "optim": {"name": "adamw", "lr": 1e-5},
        "data": {},
    }


def _nemo_rope_scaling(scaling: dict[str, Any] | None) -> dict[str, Any]:
    """NeMo's keys for Hugging Face's `rope_scaling` (none, linear, llama3)."""
    if scaling is None:
        return {}
    if scaling["rope_type"] == "linear":
        return {"seq_len_interpolation_factor": scaling["factor"]}
    factors = {key: scaling[hf_key] for (key, _), hf_key in LLAMA3_ROPE.items()}
    return {"scale_positional_embedding": True, **factors}


def hf_config(nemo: Any, kept: dict[str, Any]) -> Any:
    """Return the Hugging Face config of a NeMo model: LlamaConfig, or Qwen2Config with its biases.

    Args:
        nemo: NeMo's model config.
        kept: The fields that are named in KEPT.

    Raises:
        ValueError: The model is not one of the Llama family.
    """
    from transformers import LlamaConfig, Qwen2Config

    for key, expected in ARCHITECTURE.items():
        # rotary_percentage is 1 unless named
        if nemo.get(key, 1.0 if key == "rotary_percentage" else None) != expected:
            raise ValueError(
                f"source: expected a model of the Llama family ({key}: {expected}), got "
                f"{key}: {nemo.get(key)}"
            )
    for key in OTHER_ARCHITECTURES:
        if nemo.get(key):
            raise ValueError(
                f"source: expected a model of the Llama family, got one with {key}: {nemo[key]}"
            )
    sizes = {hf_key: nemo.get(key, default) for (key, default), hf_key in SIZES.items()}
    sizes["num_key_value_heads"] = sizes["num_key_value_heads"] or nemo.num_attention_heads
    sizes["head_dim"] = sizes["head_dim"] or nemo.hidden_size // nemo.num_attention_heads
    return (Qwen2Config if nemo.get("qkv_bias", False) else LlamaConfig)(
        rope_scaling=_hf_rope_scaling(nemo),
        **sizes,
        **kept,
    )


def _hf_rope_scaling(nemo: Any) -> dict[str, Any] | None:
    if nemo.get("scale_positional_embedding", False):
        factors = {hf_key: nemo.get(key, value) for (key, value), hf_key in LLAMA3_ROPE.items()}
        return {"rope_type": "llama3", **factors}
    if nemo.get("seq_len_interpolation_factor"):
        return {"rope_type": "linear", "factor": nemo.seq_len_interpolation_factor}
    return None
