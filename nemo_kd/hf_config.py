"""Fields of a Hugging Face config.json that Megatron-Bridge 0.3.1 drops or replaces, in silence.

A model that has one would be another model on Megatron, so it is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

# What a family's bridge takes, whatever config.json says.
_ACTIVATIONS = {
    "mistral": "silu",
    "nemotron": "relu2",
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), "gelu_pytorch_tanh"),
}
_FIXED: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"norm_topk_prob": True},
    "olmoe": {"norm_topk_prob": False, "clip_qkv": None},
}
# The rope scalings that a family's bridge reads, with the values that it fixes.
_ROPES: dict[tuple[str, str], dict[str, Any]] = {
    ("llama", "llama3"): {
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    ("gemma3_text", "linear"): {},
    ("gpt_oss", "yarn"): {
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
    ("deepseek_v2", "yarn"): {},
    ("deepseek_v3", "yarn"): {},
}
# Families whose attention reads a window. In the others each token sees all before it.
WINDOWED = ("mistral", "gemma3_text", "gpt_oss")


def check_hf_config(config: Any, max_seq_length: int, key: str) -> None:
    """Refuse a model that Bridge would make another one of.

    Args:
        config: transformers' config of the model.
        max_seq_length: The longest sequence of the run, in tokens.
        key: Its place in the YAML, for the message.

    Raises:
        ValueError: A field has a value that the family's bridge does not read.
    """
    family = config.model_type
    fixed = dict(_FIXED.get(family, {}))
    if family in _ACTIVATIONS:
        name = "hidden_activation" if getattr(config, "hidden_activation", None) else "hidden_act"
        fixed[name] = _ACTIVATIONS[family]
    for name, expected in fixed.items():
        if getattr(config, name, expected) != expected:
            _refuse(family, f"{name}={expected}", getattr(config, name))
    rope = getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default":
        if (family, kind) not in _ROPES:
            _refuse(family, "no rope_scaling of this type", kind)
        for name, expected in _ROPES[family, kind].items():
            if rope.get(name, expected) != expected:
                _refuse(family, f"rope_scaling.{name}={expected}", rope[name])
    window = getattr(config, "sliding_window", None)
    if window and family not in WINDOWED and max_seq_length > window:
        raise ValueError(
            f"expected {key} of at most {window}, the sliding window of this {family} model, got "
            f"{max_seq_length}: Megatron-Bridge 0.3.1 has no such window for this family"
        )


def _refuse(family: str, expected: str, got: Any) -> None:
    raise ValueError(
        f"model.hf_path: expected {expected} in config.json, got {got}: for {family} models "
        "Megatron-Bridge 0.3.1 reads nothing else, and would compute another model"
    )


def hf_files(directory: str) -> list[Path]:
    """The files of a Hugging Face directory that say what a model computes."""
    path = Path(directory)
    return sorted([*path.glob("config.json"), *path.glob("*.safetensors")])
