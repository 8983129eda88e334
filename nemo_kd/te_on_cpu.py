"""Transformer Engine's layers, as Megatron Core names them, on a machine without a GPU.

A host's CPU backend puts them into Megatron Core, so that each family of models is built from its
own layers, with the names of its weights, and computes what it computes on a GPU.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, rms_norm

# What Megatron's local layers need in a model's provider, in the place of Transformer Engine's.
PROVIDER_OVERRIDES: dict[str, Any] = {
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
    "apply_rope_fusion": False,
    "cross_entropy_loss_fusion": False,
    "moe_permute_fusion": False,
    "bf16": False,
    "fp16": False,
    "params_dtype": torch.float32,
    "autocast_dtype": torch.float32,
    "pipeline_dtype": torch.float32,
}


def stand_in_for_transformer_engine() -> None:
    """Give Megatron Core these layers. Call it before core's models are imported."""
    # The probes of core must find no Transformer Engine.
    import megatron.core.extensions.transformer_engine as extension
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    layers = {
        "TENorm": TENorm,
        "TEColumnParallelLinear": ColumnParallelLinear,
        "TERowParallelLinear": RowParallelLinear,
        "TELayerNormColumnParallelLinear": _norm_and_linear(),
        "TEDotProductAttention": _attention(),
        "TEColumnParallelGroupedLinear": TEColumnParallelGroupedLinear,
        "TERowParallelGroupedLinear": TERowParallelGroupedLinear,
    }
    for name, layer in layers.items():
        setattr(extension, name, layer)
    from megatron.core.extensions import transformer_engine_spec_provider as provider
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer import transformer_block
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    moe_utils.te_general_gemm = None  # the router's product is torch's
    # Core turns into numbers only what lies on a GPU.
    token_dispatcher.maybe_move_tensor_to_cpu = _as_numbers
    provider.is_te_min_version = lambda *_, **__: True
    gpt_layer_specs.TESpecProvider = provider.TESpecProvider
    gpt_layer_specs.TENorm = transformer_block.LayerNormImpl = TENorm


def _as_numbers(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _norm(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, config: Any, epsilon: float
) -> Tensor:
    """RMSNorm without a bias, LayerNorm with one; 1 is added to a zero-centred weight."""
    weight = weight + 1 if config.layernorm_zero_centered_gamma else weight
    if bias is None:
        return rms_norm(hidden, weight.shape, weight, epsilon)
    return layer_norm(hidden, weight.shape, weight, bias, epsilon)


def _norm_parameters(size: int, config: Any) -> tuple[torch.nn.Parameter, Any]:
    start = torch.zeros if config.layernorm_zero_centered_gamma else torch.ones
    weight = torch.nn.Parameter(start(size, dtype=config.params_dtype))
    if config.normalization == "RMSNorm":
        return weight, None
    return weight, torch.nn.Parameter(torch.zeros(size, dtype=config.params_dtype))


class TENorm(torch.nn.Module):
    """RMSNorm or LayerNorm, as `config.normalization` says. Never fused with the residual sum."""

    def __init__(
        self, config: Any, hidden_size: int, eps: float = 1e-5, has_residual: bool = False
    ) -> None:
        super().__init__()
        self.config, self.eps = config, eps
        self.weight, self.bias = _norm_parameters(hidden_size, config)

    def forward(self, hidden: Tensor) -> Tensor:
        return _norm(hidden, self.weight, self.bias, self.config, self.eps)


def _norm_and_linear() -> type:
    """The class of a norm and a column-parallel layer in one."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    class TELayerNormColumnParallelLinear(ColumnParallelLinear):  # type: ignore[misc]
        return_layernorm_output = False

        def __init__(self, input_size: int, output_size: int, *, config: Any, **settings: Any):
            super().__init__(input_size, output_size, config=config, **settings)
            self.layer_norm_weight, self.layer_norm_bias = _norm_parameters(input_size, config)

        def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            weight, bias = self.layer_norm_weight, self.layer_norm_bias
            normal = _norm(hidden, weight, bias, self.config, self.config.layernorm_epsilon)
            output = super().forward(normal, *args, **kwargs)
            # An adapter takes the norm's output, too.
            return (*output, normal) if self.return_layernorm_output else output

    return TELayerNormColumnParallelLinear


def _attention() -> type:
    """The class of core's own attention, which takes the settings of Transformer Engine's."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class TEDotProductAttention(DotProductAttention):  # type: ignore[misc]
        def __init__(self, *args: Any, **settings: Any) -> None:
            for name in ("k_channels", "v_channels", "num_splits"):
                settings.pop(name, None)
            super().__init__(*args, **settings)

        def forward(
            self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **settings: Any
        ) -> Tensor:
            """As core's, and within each of the sequences that `packed_seq_params` tells of.

            Packed, query, key and value are [tokens, heads, size], and what comes back is
            [tokens, heads * size].
            """
            packed = settings.pop("packed_seq_params", None)
            attend: Any = super().forward
            if packed is None:
                output: Tensor = attend(query, key, value, *args, **settings)
                return output
            lengths = packed.cu_seqlens_q.diff().tolist()
            parts = (torch.split(each[:, None], lengths) for each in (query, key, value))
            outputs = [attend(*each, *args, **settings) for each in zip(*parts, strict=True)]
            return torch.cat(outputs)[:, 0]

    return TEDotProductAttention


class TEGroupedLinear(torch.nn.Module):
    """The layers of this rank's experts: `weight0`, `weight1`, ... and with a bias `bias0`, ..."""

    dim: int  # of a weight that the experts' tensor parallelism divides

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        init_method: Any,
        bias: bool,
        skip_bias_add: bool,
        pg_collection: Any,
        **_: Any,
    ) -> None:
        from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

        super().__init__()
        self.config, self.groups = config, pg_collection
        self.num_gemms, self.skip_bias_add = num_gemms, skip_bias_add
        sizes = [output_size, input_size]
        sizes[self.dim] //= pg_collection.expt_tp.size()
        for number in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(*sizes, dtype=config.params_dtype))
            init_method(weight)
            set_tensor_model_parallel_attributes(weight, True, self.dim, 1)
            self.register_parameter(f"weight{number}", weight)
            if bias:
                zeros = torch.zeros(sizes[0], dtype=config.params_dtype)
                self.register_parameter(f"bias{number}", torch.nn.Parameter(zeros))
        for parameter in self.parameters():
            # Megatron's gradients of experts are summed over their own data-parallel ranks.
            parameter.allreduce = config.expert_model_parallel_size == 1  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor, tokens_per_expert: list[int]) -> tuple[Tensor, Any]:
        biases = [getattr(self, f"bias{number}", None) for number in range(self.num_gemms)]
        outputs = [
            linear(part, getattr(self, f"weight{number}"), None if self.skip_bias_add else bias)
            for number, (part, bias) in enumerate(
                zip(torch.split(hidden, tokens_per_expert), biases, strict=True)
            )
        ]
        return torch.cat(outputs), biases if self.skip_bias_add and biases[0] is not None else None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        """The experts in Megatron's checkpoints: a tensor of all of them, a part for each."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        first = self.groups.ep.rank() * self.num_gemms
        number_of_all = self.groups.ep.size() * self.num_gemms
        sharded: dict[str, Any] = {}
        for number in range(self.num_gemms):
            names = [name for name in ("weight", "bias") if hasattr(self, f"{name}{number}")]
            parts = make_sharded_tensors_for_checkpoint(
                {name: getattr(self, f"{name}{number}") for name in names},
                prefix,
                {"weight": self.dim} | ({"bias": 0} if self.dim == 0 else {}),
                (*sharded_offsets, (len(sharded_offsets), first + number, number_of_all)),
                tp_group=self.groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            for name in names:
                part = parts[f"{prefix}{name}"]
                part.replica_id = (*part.replica_id[:2], self.groups.expt_dp.rank())
                sharded[f"{prefix}{name}{number}"] = part
        return sharded


class TEColumnParallelGroupedLinear(TEGroupedLinear):
    dim = 0


class TERowParallelGroupedLinear(TEGroupedLinear):
    dim = 1


@contextmanager
def importable_transformer_engine() -> Iterator[None]:
    """Let a host be imported that imports Transformer Engine whether it is there or not."""
    engine = types.ModuleType("transformer_engine")
    pytorch = types.ModuleType("transformer_engine.pytorch")
    engine.__path__, engine.pytorch = [], pytorch  # type: ignore[attr-defined]
    for name in ("Linear", "LayerNormLinear"):  # base classes of adapters
        setattr(pytorch, name, type(name, (torch.nn.Module,), {}))
    pytorch.ops = types.SimpleNamespace(Sequential=object)  # type: ignore[attr-defined]
    stubs = {"transformer_engine": engine, "transformer_engine.pytorch": pytorch}
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name in stubs:
            del sys.modules[name]
