"""Hugging Face directories as Bridge's models, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.training.tokenizers.config import TokenizerConfig
from omegaconf import DictConfig

from nemo_kd.bridge import cpu_backend
from nemo_kd.values import set_fields


def read_model(model: DictConfig, device: str) -> tuple[Any, Any]:
    """Return Bridge's AutoBridge of a Hugging Face directory, and the provider of its model.

    Args:
        model: The section `model`; all keys but `hf_path` are the provider's.
        device: "gpu" or "cpu".

    Raises:
        ValueError: There is no such directory, no weights, no bridge for its model, or no such key.
    """
    path = Path(model.hf_path)
    if not (path / "config.json").is_file():
        raise ValueError(
            f"model.hf_path: expected a Hugging Face directory, found no {path}/config.json"
        )
    if not any(path.glob("*.safetensors")):
        raise ValueError(f"model.hf_path: expected weights in {path}, found no *.safetensors")
    try:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        bridge = AutoBridge.from_hf_pretrained(str(path), torch_dtype=dtype)
    except ValueError as error:
        first = next(line.strip() for line in str(error).splitlines() if line.strip(" ✗"))
        raise ValueError(f"model.hf_path: {path}: {first}") from error
    provider = bridge.to_megatron_provider(load_weights=True)
    # Bridge sets it to false, and then marks no parameter as tensor-parallel, so that the gradient
    # norm at a tensor-parallel size above 1 counts the shards of rank 0 only.
    provider.perform_initialization = True
    set_fields(provider, model, "model", leave_out=("hf_path",))
    for kind, number, what in (
        ("tensor", provider.vocab_size, "rows of the embedding, which Bridge does not pad"),
        ("pipeline", provider.num_layers, "layers"),
    ):
        size = getattr(provider, f"{kind}_model_parallel_size")
        if number % size:
            raise ValueError(
                f"expected model.{kind}_model_parallel_size to divide the {number} {what}, got "
                f"{size}"
            )
    if device == "cpu":
        cpu_backend.prepare_provider(provider)
    return bridge, provider


def tokenizer_config(path: str) -> TokenizerConfig:
    """Of the tokenizer in a Hugging Face directory."""
    return TokenizerConfig(
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=path,
        # Core's default is the slow one, which many tokenizers no longer have.
        hf_tokenizer_kwargs={"use_fast": True},
    )
