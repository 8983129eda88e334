"""Which fields of a published model change what it computes.

transformers takes any field of a config.json, and no version reads all that another one writes. So
each field is one that the import honours, one whose value must be that of NeMo's model, or one
that is known to leave the outputs as they are. Every other field is refused. The lists hold the
fields of LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config and NemotronConfig in transformers 4
and 5, and what publishers add.
"""

import re
from typing import Any

from nemo_kd.nemo.hf.configs import LLAMA3_ROPE
from nemo_kd.nemo.hf.families import MODEL_TYPES, NEMOTRON

# Beside the sizes of each family.
HONOURED = {"vocab_size", "rope_theta", "rope_scaling", "rope_parameters"}
# The values with which a model is NeMo's, beside hidden_act. None is the same as leaving the field
# out.
FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
    "use_sliding_window": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "per_layer_config": ({},),
    "quantization_config": (),
    "auto_map": (),  # code of its own
}
NO_EFFECT = {
    # names and types
    *("_name_or_path", "name_or_path", "_commit_hash", "architectures", "model_type"),
    *("transformers_version", "transformers.js_config", "tokenizer_class", "torch_dtype", "dtype"),
    *("is_llama_config", "unsloth_fixed", "unsloth_version", "use_bfloat16", "torchscript"),
    # how it is run, trained and generated with; the ids of tokens are kept for the export
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "pretraining_tp"),
    *("_attn_implementation", "attn_implementation", "_attn_implementation_autoset"),
    *("attention_dropout", "gradient_checkpointing", "chunk_size_feed_forward"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id"),
    *("decoder_start_token_id", "max_length", "min_length", "max_new_tokens", "do_sample"),
    *("early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature"),
    *("top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "bad_words_ids"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences"),
    *("output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id"),
    *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
    *("begin_suppress_tokens", "prefix", "task_specific_params"),
    # of other heads and other architectures
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "is_decoder"),
    *("tie_encoder_decoder", "cross_attention_hidden_size", "tf_legacy_loss"),
    *("tie_last_hidden_states", "max_window_layers"),  # the latter belongs to sliding windows
}
# Of each kind of RoPE, the keys that it must have beside its base.
ROPE_KEYS = {"default": (), "linear": ("factor",), "llama3": tuple(LLAMA3_ROPE.values())}

# GGUF's fields below the name of the architecture, as transformers reads them, and the head size's.
GGUF_FIELDS = {
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
    "rope.freq_base",
}
GGUF_HEAD_SIZES = {"rope.dimension_count", "attention.key_length", "attention.value_length"}
GGUF_TENSORS = re.compile(
    r"(token_embd|output_norm|output|blk\.\d+\."
    r"(attn_norm|attn_q|attn_k|attn_v|attn_output|ffn_norm|ffn_gate|ffn_up|ffn_down))\.(weight|bias)"
)


def check_fields(raw: dict[str, Any]) -> None:
    """Check the fields of a config.json.

    Raises:
        ValueError: One of them makes the model another function than NeMo's.
    """
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"source: expected model_type {' or '.join(MODEL_TYPES)}, got {model_type}"
        )
    family = MODEL_TYPES[model_type]
    honoured = HONOURED | set(family.sizes.values())
    fixed = FIXED | {"hidden_act": family.activations}
    for field, value in raw.items():
        if field in fixed.keys() - honoured and value is not None and value not in fixed[field]:
            expected = " or ".join(str(choice) for choice in fixed[field]) or "none"
            raise ValueError(
                f"source: config.json: expected {field} {expected}, got {value!r:.80}, which "
                f"NeMo's {family.name} does not compute"
            )
    for name in raw.get("architectures") or ():
        if not name.endswith("ForCausalLM"):
            raise ValueError(f"source: expected a model with logits (...ForCausalLM), got {name}")
    # Without the field Mistral's window is 4096. A Qwen's is off by use_sliding_window, see FIXED.
    window = raw.get("sliding_window", 4096 if model_type == "mistral" else None)
    windows = set(raw.get("layer_types") or ()) - {"full_attention"}
    if windows or (window is not None and model_type not in ("qwen2", "qwen3")):
        raise ValueError(
            f"source: sliding-window attention is not supported, got sliding_window {window} and "
            f"layer_types {sorted(windows)}"
        )
    known = honoured | fixed.keys() | NO_EFFECT | {"sliding_window", "layer_types"}
    if unknown := sorted(raw.keys() - known):
        field = unknown[0]
        raise ValueError(
            f"source: config.json has {field}: {raw[field]!r:.80}, a field that the import does "
            "not know; remove it if the model computes the same without it"
        )
    read_rope(raw)


def read_rope(raw: dict[str, Any]) -> dict[str, Any]:
    """Return transformers 4's fields of RoPE for a config.json of transformers 4 or 5.

    They are rope_theta, rope_scaling (None for a plain RoPE), and partial_rotary_factor where the
    model has one. Version 5 writes one dict, rope_parameters, and prefers what is in a dict.

    Raises:
        ValueError: It is a RoPE that NeMo has no setting for.
    """
    family = MODEL_TYPES[raw["model_type"]]
    rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    named = str(rope)
    theta = next(
        base for base in (rope.pop("rope_theta", None), raw.get("rope_theta"), 10000.0) if base
    )
    shares = {rope.pop("partial_rotary_factor", None), raw.get("partial_rotary_factor")} - {None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    keys = rope.keys() - {"type", "rope_type"}
    if kind not in family.rope_types or keys != set(ROPE_KEYS[kind]):
        choices = "; ".join(f"{name} ({', '.join(ROPE_KEYS[name])})" for name in family.rope_types)
        raise ValueError(f"source: config.json: expected a RoPE of {choices}; got {named}")
    scaling = {"rope_type": kind, **{key: rope[key] for key in ROPE_KEYS[kind]}}
    fields = {"rope_theta": float(theta), "rope_scaling": None if kind == "default" else scaling}
    if family is NEMOTRON:
        if len(shares) > 1:
            raise ValueError(f"source: config.json: two values of partial_rotary_factor: {shares}")
        return fields | {"partial_rotary_factor": next(iter(shares), 0.5)}
    if shares - {1.0}:
        raise ValueError(
            f"source: config.json: expected partial_rotary_factor 1.0, got {named}, which NeMo's "
            f"{family.name} does not compute"
        )
    return fields


def check_gguf(reader: Any) -> None:
    """Check the fields and tensors of a GGUF file, of which transformers reads only some.

    Raises:
        ValueError: One of them makes the model another function than NeMo's.
    """
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields["general.architecture"]
    if architecture not in ("llama", "qwen2"):
        raise ValueError(
            f"source: expected a GGUF file of a llama or a qwen2, got {architecture}; import the "
            "Hugging Face directory of the model"
        )
    own = {
        name.removeprefix(f"{architecture}."): value
        for name, value in fields.items()
        if name.startswith(f"{architecture}.")
    }
    head_sizes = {own[name] for name in GGUF_HEAD_SIZES & own.keys()}
    unknown = [f"{architecture}.{name}" for name in own.keys() - GGUF_FIELDS - GGUF_HEAD_SIZES]
    unknown += [each.name for each in reader.tensors if not GGUF_TENSORS.fullmatch(each.name)]
    if architecture == "qwen2":  # transformers does not read its head size
        head_sizes.add(own["embedding_length"] // own["attention.head_count"])
    if unknown or len(head_sizes) > 1:
        raise ValueError(
            f"source: the GGUF file has {', '.join(sorted(unknown)[:3]) or 'several head sizes'}, "
            "which the import cannot honour (rope_freqs.weight: scaled RoPE); import the Hugging "
            "Face directory of the model"
        )
