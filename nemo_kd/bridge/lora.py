"""Bridge's LoRA on weights that come from a Hugging Face directory.

Bridge's own way to it, ConfigContainer.peft, asks for them as a Megatron checkpoint.
"""

from __future__ import annotations

from typing import Any

from megatron.bridge.peft.adapter_wrapper import AdapterWrapper
from megatron.bridge.peft.lora import LoRA


def add_adapters(container: Any, lora: LoRA, models: list[Any]) -> list[Any]:
    """A pre-wrap hook: freezes the model and gives it adapters, once the weights are there.

    From then on the checkpoints have the adapters alone, because `container.peft` is set.

    Raises:
        ValueError: No layer has one of the names, or Bridge has no adapter for one.
    """
    try:
        lora(models, training=True)
    except NotImplementedError as error:
        raise ValueError(f"peft.target_modules: {error}") from error
    lora.set_params_to_save(models)
    wrapped = [m for model in models for m in model.modules() if isinstance(m, AdapterWrapper)]
    if not wrapped:
        raise ValueError(
            f"peft.target_modules: expected names of linear layers, got {list(lora.target_modules)}"
        )
    for module in wrapped:
        if hasattr(module.to_wrap, "layer_norm_weight"):  # the adapter works on the norm's output
            module.to_wrap.return_layernorm_output = True
    container.peft = lora
    return models
