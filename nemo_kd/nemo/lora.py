"""NeMo's LoRA (`model.peft`) on Megatron Core 0.12 and later.

NeMo 2.4's attention with adapters, MCoreSelfAttentionMixin, has a copy of the forward pass of an
older Megatron Core. Today's layers call it with arguments that it does not know, so that here
Core's own forward pass runs in its place. It calls NeMo's get_query_key_value_tensors, which adds
the adapters of q, k and v. The adapter of the output projection is added to the result.
"""

from typing import Any

from megatron.core.transformer.attention import SelfAttention
from nemo.collections.nlp.modules.common.megatron.adapters.mcore_mixins import (
    MCoreSelfAttentionMixin,
)
from nemo.collections.nlp.modules.common.megatron.adapters.parallel_adapters import AdapterName
from nemo.collections.nlp.parts.peft_config import LoraPEFTConfig
from omegaconf import DictConfig, OmegaConf

from nemo_kd.nemo.integrity import check_files, one_line
from nemo_kd.nemo.nemo_file import read_model_config

# Keys of the model that the adapters' shapes follow. They are saved by rank, so that the parallel
# sizes are among them.
_SHAPES = (
    *("hidden_size", "ffn_hidden_size", "num_layers", "num_attention_heads", "num_query_groups"),
    *("kv_channels", "tensor_model_parallel_size", "pipeline_model_parallel_size"),
    *("peft.peft_scheme", "peft.lora_tuning.adapter_dim"),
)
_KEY = "model.peft.restore_from_path"


def check_adapters(model: DictConfig) -> None:
    """Check the adapters of `model.peft.restore_from_path`, before the model's weights are read.

    Raises:
        ValueError: There are none, they are damaged, or they are those of another model or rank.
    """
    path = model.peft.restore_from_path
    if path is None:
        return
    adapters = read_model_config(path, _KEY)
    for name in _SHAPES:
        expected, found = OmegaConf.select(model, name), OmegaConf.select(adapters, name)
        if None not in (expected, found) and expected != found:
            raise ValueError(
                f"{_KEY}: expected adapters of a model with {name}={expected}, but those of {path} "
                f"have {name}={found}"
            )


def add_adapters(model: Any, peft: DictConfig) -> None:
    """Freeze the model and give it adapters, new ones or those of `peft.restore_from_path`.

    NeMo's megatron_gpt_finetuning.py does the same. From then on the model saves only its adapters.

    Raises:
        ValueError: The scheme is not LoRA, NeMo's adapters would change the model, or those of the
            .nemo are damaged or do not fit.
    """
    if peft.peft_scheme != "lora":
        raise ValueError(f"expected model.peft.peft_scheme=lora or null, got {peft.peft_scheme}")
    if model.cfg.get("qk_layernorm", False):
        raise ValueError("model.peft: NeMo's adapters leave out the norms of qk_layernorm=true")
    MCoreSelfAttentionMixin.forward = _attention_with_adapters
    settings = LoraPEFTConfig(model.cfg)
    if peft.restore_from_path is None:
        model.add_adapter(settings)
    else:
        _load_adapters(model, peft, settings)


def _load_adapters(model: Any, peft: DictConfig, settings: LoraPEFTConfig) -> None:
    path = peft.restore_from_path
    check_files(path, _KEY)
    try:
        with one_line(path, _KEY):
            model.load_adapters(path, settings)
    except AssertionError as error:  # NeMo's, on their names
        raise ValueError(
            f"{_KEY}: {path} has adapters of other layers than model.peft.lora_tuning asks for, "
            f"{list(peft.lora_tuning.target_modules)}"
        ) from error


def _attention_with_adapters(
    self: MCoreSelfAttentionMixin, *inputs: Any, **more: Any
) -> tuple[Any, Any]:
    projected: list[Any] = []
    hook = self.linear_proj.register_forward_pre_hook(lambda _, args: projected.append(args[0]))
    try:
        output, bias = SelfAttention.forward(self, *inputs, **more)
    finally:
        hook.remove()
    name = AdapterName.LORA_DENSE_ATTENTION_ADAPTER
    adapter = self.get_adapter_module(name) if self.is_adapter_available() else None
    if adapter is not None and self.adapter_cfg[name]["enabled"]:
        output = output + adapter(projected[0])
    return output, bias
