"""The real NeMo and Megatron Core classes on a machine without a GPU.

NeMo 2.4's Megatron models assume CUDA, Apex and Transformer Engine in a few dozen places. `enable`
answers each of them on the CPU (torch.distributed runs on gloo), so that the very same
MegatronGPTSFTModel trains, validates and saves here. It is for development, tests and small runs.

The entries call it only for `trainer.accelerator=cpu`. It refuses to start on a machine that has a
GPU, where the unpatched code must run.
"""

import functools
import inspect
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import DictConfig, open_dict

from nemo_kd.cuda_on_cpu import answer_cuda_calls, refuse_gpus

# What Megatron's local layers, which stand in for Transformer Engine's, need in a model's config.
MODEL_OVERRIDES: dict[str, Any] = {
    "use_cpu_initialization": True,
    "transformer_engine": False,
    "megatron_amp_O2": False,
    "gradient_accumulation_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_add_fusion": False,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
    "apply_rope_fusion": False,
    "get_attention_mask_from_fusion": True,
}

CHECKPOINTED_ACTIVATIONS = tuple(
    f"activations_checkpoint_{key}"
    for key in ("granularity", "method", "num_layers", "layers_per_pipeline")
)

GPU_OPTIMIZERS = (
    "fused_adam",
    "megatron_fused_adam",
    "distributed_fused_adam",
    "mcore_distributed_optim",
)

_enabled = False


def enable() -> None:
    """Patch this process so that NeMo's Megatron models run on the CPU. Idempotent.

    Call it before any model or trainer is built.

    Raises:
        ValueError: CUDA is available.
    """
    global _enabled
    refuse_gpus("trainer.accelerator")
    if _enabled:
        return
    # NeMo compiles its C++ index helper with PATH's python3: it must be this one, with pybind11.
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")
    # MegatronBaseModel matches a regular expression on it; unset outside NGC containers.
    os.environ.setdefault("NVIDIA_PYTORCH_VERSION", "00.00")
    _replace_apex_and_transformer_engine()
    _name_the_checkpoint_format()
    # Last: torch.jit.script reads the factories' sources while NeMo is imported.
    answer_cuda_calls()
    _enabled = True


def prepare_model_config(config: DictConfig, section: str = "model") -> None:
    """Set in a model's config, in place, what the local layers on a CPU need.

    Raises:
        ValueError: The config asks for what the local layers cannot do; `section` is its place in
            the YAML, for the message.
    """
    for key in ("sequence_parallel", "fp8"):
        if config.get(key, False):
            raise ValueError(
                f"{section}.{key}=true needs Transformer Engine, which runs on a GPU alone; "
                f"set {section}.{key}=false with trainer.accelerator=cpu"
            )
    if config.get("context_parallel_size", 1) > 1:
        raise ValueError(
            f"expected {section}.context_parallel_size=1 with trainer.accelerator=cpu, "
            f"got {config.context_parallel_size}: the local attention has no context parallelism"
        )
    data = config.get("data") or {}
    for name in ("train_ds", "validation_ds"):
        dataset = data.get(name) or {}
        packed = dataset.get("packed_sequence", False)
        if packed and dataset.get("packed_sequence_return_cu_seqlen", True):
            raise ValueError(
                f"expected {section}.data.{name}.packed_sequence=false with "
                "trainer.accelerator=cpu, got true: attention within each of the packed sequences "
                "needs Transformer Engine, which runs on a GPU alone"
            )
    with open_dict(config):
        config.update(MODEL_OVERRIDES)
        for key in CHECKPOINTED_ACTIVATIONS:
            config.setdefault(key, None)  # NeMo's validation step reads it without a default


def drop_overrides(config: DictConfig) -> None:
    """Take out of a model's config, in place, what only the CPU needed, before it is saved.

    The saved model then has NeMo's defaults, and Transformer Engine on a GPU.
    """
    with open_dict(config):
        for key in MODEL_OVERRIDES:
            config.pop(key, None)
        config.transformer_engine = True
        # Its layers have states that the weights of a CPU lack; NeMo refuses what else is missing.
        config.dist_ckpt_load_strictness = "log_all"
        if config.get("activation") == "squared-relu":
            # Megatron Core has no fused one and refuses the key, which NeMo's default sets.
            config.bias_activation_fusion = False


def prepare_trainer_config(config: DictConfig) -> None:
    """Set in a run's config, in place, what the trainer and the optimizer need on a CPU."""
    with open_dict(config):
        config.trainer.precision = 32  # no mixed precision without a GPU
        optim = config.get("model", {}).get("optim")
        if optim is not None and optim.name in GPU_OPTIMIZERS:
            # torch's AdamW takes the same step. The keys left out spread that step over GPUs.
            taken = {"sched", *inspect.signature(torch.optim.AdamW).parameters}
            kept = {key: optim[key] for key in optim if key in taken}
            config.model.optim = kept | {"name": "adamw"}
        if config.get("exp_manager") is not None:
            config.exp_manager.log_tflops_per_sec_per_gpu = False


def _replace_apex_and_transformer_engine() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import (
        set_defaults_if_not_set_tensor_model_parallel_attributes,
    )
    from megatron.core.utils import local_multi_tensor_applier, local_multi_tensor_l2_norm
    from nemo.collections.nlp.models.language_modeling import megatron_gpt_model
    from nemo.collections.nlp.modules.common.megatron import build_model, clip_grads, utils
    from nemo.collections.nlp.parts import nlp_overrides
    from nemo.core.optim.optimizers import AVAILABLE_OPTIMIZERS

    # NLPDDPStrategy refuses to run without Apex. Its isinstance checks name Apex's optimizers: here
    # they are classes that have no instances.
    nlp_overrides.HAVE_APEX = True
    for name in ("MegatronDistributedFusedAdam", "McoreDistributedOptimizer"):
        if not hasattr(nlp_overrides, name):
            setattr(nlp_overrides, name, type(name, (), {}))

    # get_specs builds every layer spec it knows, those of Transformer Engine too.
    def get_local_spec(spec_name: str, transformer_config: Any = None, *_: Any, **__: Any) -> Any:
        if spec_name not in ("", "decoder_block_gpt"):
            raise ValueError(
                f"model.name={spec_name!r} names a layer spec that needs Transformer Engine; with "
                "trainer.accelerator=cpu only the local spec (model.name='' or decoder_block_gpt) "
                "runs"
            )
        return get_gpt_layer_local_spec(
            normalization="RMSNorm" if transformer_config.normalization == "RMSNorm" else None,
            # As in NeMo: its other specs build no norms of q and k, whatever the config says.
            qk_layernorm=spec_name == "decoder_block_gpt" and transformer_config.qk_layernorm,
        )

    megatron_gpt_model.get_specs = get_local_spec
    _build_layernorm1p()

    AVAILABLE_OPTIMIZERS["adamw"] = _AdamW

    # Apex's functions of these names, which Megatron Core has too.
    build_model.set_defaults_if_not_set_tensor_model_parallel_attributes = (
        set_defaults_if_not_set_tensor_model_parallel_attributes
    )
    utils.listify_model = lambda model: model if isinstance(model, list) else [model]
    # Gradient clipping computes the norm with Apex's kernels.
    clip_grads.multi_tensor_applier = local_multi_tensor_applier
    clip_grads.amp_C = SimpleNamespace(multi_tensor_l2norm=local_multi_tensor_l2_norm)
    # NeMo asks by isinstance for these norms, whose weights do not decay.
    utils.FusedLayerNorm = utils.FastLayerNorm = torch.nn.LayerNorm
    utils.MixedFusedRMSNorm = torch.nn.RMSNorm


def _build_layernorm1p() -> None:
    """Give Megatron's local norm NeMo's layernorm1p, which only Transformer Engine's norm has."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    new = WrappedTorchNorm.__new__

    def new_norm(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **more: Any) -> Any:
        if config.layernorm_zero_centered_gamma and config.normalization == "LayerNorm":
            return _LayerNorm1P(hidden_size, eps=eps)
        return new(cls, config, hidden_size, eps, **more)

    WrappedTorchNorm.__new__ = new_norm


class _LayerNorm1P(torch.nn.LayerNorm):
    """LayerNorm that multiplies by 1 + weight, and so begins with a weight of 0."""

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(
            hidden, self.normalized_shape, 1 + self.weight, self.bias, self.eps
        )


def _name_the_checkpoint_format() -> None:
    """Give torch's writer of checkpoints the format that Megatron Core 0.12 does not pass to it."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from torch.distributed.checkpoint import filesystem

    write_item = filesystem_async._write_item
    if "serialization_format" in inspect.signature(write_item).parameters:
        filesystem_async._write_item = functools.partial(
            write_item, serialization_format=filesystem.SerializationFormat.TORCH_SAVE
        )


class _AdamW(torch.optim.AdamW):
    """torch's AdamW, with `step` in the parameter group, as Apex's FusedAdam has it.

    NeMo's checkpoints shard all of a parameter's state as they shard the parameter. A number cannot
    be sharded.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if self.state[parameter]:
                    self.state[parameter]["step"] = torch.tensor(float(group.get("step", 0)))
        loss = super().step(closure)
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                self.state[parameter].pop("step", None)
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's asks for each parameter's step
