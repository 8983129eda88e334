"""Hugging Face directories as Bridge's models, and back."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.bridge import AutoBridge, __version__
from megatron.bridge.training.tokenizers.config import TokenizerConfig
from omegaconf import DictConfig
from packaging.version import Version

from nemo_kd.bridge import cpu_backend
from nemo_kd.hf_config import WINDOWED, check_hf_config
from nemo_kd.layout import check_layout, check_slices, say_layout
from nemo_kd.values import set_fields


def read_model(
    model: DictConfig, device: str, max_seq_length: int, length_key: str
) -> tuple[Any, Any, int]:
    """Return AutoBridge of a Hugging Face directory, its model's provider, and how many replicas.

    Args:
        model: The section `model`; all keys but `hf_path` are the provider's.
        device: "gpu" or "cpu".
        max_seq_length: The longest sequence of the run, in tokens.
        length_key: Its place in the YAML.

    Raises:
        ValueError: The directory, a key, the layout or the length is none that Bridge can have.
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
    hf_config = bridge.hf_pretrained.config
    check_hf_config(hf_config, max_seq_length, length_key)
    provider = bridge.to_megatron_provider(load_weights=True)
    provider.register_pre_wrap_hook(partial(_check_names, bridge), prepend=True)
    _mend(provider, hf_config)
    provider.mtp_num_layers = getattr(provider, "mtp_num_layers", None) or None
    set_fields(provider, model, "model", leave_out=("hf_path",))
    if provider.mtp_num_layers:
        raise ValueError(
            "model.hf_path: expected a model without layers for multi-token prediction, got "
            f"{provider.mtp_num_layers}; set +model.mtp_num_layers=null to leave them out"
        )
    settings, num_processes = vars(provider), torch.distributed.get_world_size()
    num_replicas = check_layout(
        settings, num_processes, "model", "the number of processes", shares_groups=True
    )
    tensor_size = provider.tensor_model_parallel_size
    if provider.vocab_size % tensor_size:
        raise ValueError(
            f"expected model.tensor_model_parallel_size to divide the {provider.vocab_size} rows "
            f"of the embedding, which Bridge does not pad, got {tensor_size}"
        )
    check_slices(settings, max_seq_length, length_key)
    if device == "cpu":
        cpu_backend.prepare_provider(provider)
    say_layout(settings, num_processes, num_replicas)
    return bridge, provider, num_replicas


def _mend(provider: Any, hf_config: Any) -> None:
    """Set what Bridge's conversion of a config leaves out or gets wrong."""
    if hf_config.model_type == "gemma3_text":
        # Bridge leaves it out, and then each tensor-parallel rank trains norms of its own.
        provider.qk_layernorm = True
    if hf_config.model_type in WINDOWED and hf_config.sliding_window:
        # Hugging Face counts the token itself, Megatron those before it: Bridge is one too wide.
        before = hf_config.sliding_window - 1
        if not isinstance(provider.window_size, int):
            provider.window_size = (before, 0)
        elif Version(__version__) < Version("0.6"):  # whose Gemma 3 takes the one off itself
            provider.window_size = before
    # Bridge sets it to false, and then marks no parameter as tensor-parallel, so that the gradient
    # norm at a tensor-parallel size above 1 counts the shards of rank 0 only.
    provider.perform_initialization = True


def _check_names(bridge: Any, models: list[Any]) -> list[Any]:
    """Raise a ValueError if the Hugging Face directory and the model have different weights.

    Bridge leaves a parameter as it is for which it finds no tensor, and drops the other tensors.
    """
    tasks = [task for task in bridge.get_conversion_tasks(models) if task is not None]
    filled = {id(task.param_weight) for task in tasks}
    empty = [
        name
        for model in models
        for name, parameter in model.named_parameters()
        if id(parameter) not in filled
        and not (model.share_embeddings_and_output_weights and name.startswith("output_layer"))
    ]
    names, config = bridge._model_bridge.mapping_registry(), bridge.hf_pretrained.config
    # Old files have the rotary frequencies, new ones layers for multi-token prediction at the end.
    needless = rf"rotary_emb\.inv_freq|layers\.{getattr(config, 'num_hidden_layers', None)}\."
    unread = [
        key
        for key in bridge.hf_pretrained.state.source.get_all_keys()
        if names.hf_to_megatron_lookup(key) is None and not re.search(needless, key)
    ]
    for what, found in (("parameters without weights", empty), ("weights unread", unread)):
        if found:
            raise ValueError(
                f"model.hf_path: Megatron-Bridge would leave {len(found)} {what}, {found[0]} among "
                "them"
            )
    return models


def tokenizer_config(path: str) -> TokenizerConfig:
    """Of the tokenizer in a Hugging Face directory."""
    return TokenizerConfig(
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=path,
        # Core's default is the slow one, which many tokenizers no longer have.
        hf_tokenizer_kwargs={"use_fast": True},
    )
