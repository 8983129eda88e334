"""NeMo's model config of a Hugging Face config, and the reverse."""

from typing import Any

from nemo_kd.nemo.hf.families import MODEL_TYPES, Family

# Fields that NeMo's model has no key for. The .nemo keeps them for the export.
KEPT = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
ROW_MULTIPLE = 128  # of the embedding's rows; NeMo's own
# NeMo's keys, with what NeMo takes where a config leaves them out, and those of rope_scaling.
LLAMA3_ROPE = {
    ("scale_factor", 8): "factor",
    ("low_freq_factor", 1): "low_freq_factor",
    ("high_freq_factor", 4): "high_freq_factor",
    ("old_context_len", 8192): "original_max_position_embeddings",
}


def nemo_config(
    hf: Any, tokenizer_directory: str, num_layers: int, num_tokens: int
) -> dict[str, Any]:
    """Return NeMo's model config for a Hugging Face config.

    Args:
        hf: The config, whose fields fields.py has checked.
        tokenizer_directory: Where the tokenizer lies.
        num_layers: Of the layers that are taken.
        num_tokens: Of the tokenizer. NeMo makes the embedding so large, and pads it.
    """
    family = MODEL_TYPES[hf.model_type]
    rows = -(-hf.vocab_size // ROW_MULTIPLE) * ROW_MULTIPLE
    # A Qwen has more rows than tokens, and all of them take part in its softmax.
    spare = {"override_vocab_size": rows} if rows >= num_tokens + ROW_MULTIPLE else {}
    return {
        **family.architecture,
        **dict(family.nemo),
        **{key: getattr(hf, hf_key, None) for (key, _), hf_key in family.sizes.items()},
        "num_layers": num_layers,
        "kv_channels": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        "encoder_seq_length": hf.max_position_embeddings,
        **_nemo_rope_scaling(getattr(hf, "rope_scaling", None)),
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


def hf_config(nemo: Any, family: Family, kept: dict[str, Any]) -> Any:
    """Return the Hugging Face config of a NeMo model.

    Args:
        nemo: NeMo's model config.
        family: The model's.
        kept: The fields that are named in KEPT.

    Raises:
        ValueError: The model's RoPE is not one that the family has at Hugging Face.
    """
    import transformers

    sizes = {hf_key: nemo.get(key, default) for (key, default), hf_key in family.sizes.items()}
    sizes["num_key_value_heads"] = sizes["num_key_value_heads"] or nemo.num_attention_heads
    sizes["head_dim"] = sizes["head_dim"] or nemo.hidden_size // nemo.num_attention_heads
    scaling = _hf_rope_scaling(nemo)
    if scaling is not None and scaling["rope_type"] not in family.rope_types:
        raise ValueError(
            f"source: expected a RoPE of {' or '.join(family.rope_types)} for {family.name}, as "
            f"transformers computes it, got {scaling}"
        )
    rope = {} if scaling is None else {"rope_scaling": scaling}
    return getattr(transformers, family.hf_class)(**rope, **sizes, **kept)


def _hf_rope_scaling(nemo: Any) -> dict[str, Any] | None:
    if nemo.get("scale_positional_embedding", False):
        factors = {hf_key: nemo.get(key, value) for (key, value), hf_key in LLAMA3_ROPE.items()}
        return {"rope_type": "llama3", **factors}
    if nemo.get("seq_len_interpolation_factor"):
        return {"rope_type": "linear", "factor": nemo.seq_len_interpolation_factor}
    return None
