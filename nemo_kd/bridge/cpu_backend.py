"""The real Megatron-Bridge on a machine without a GPU, for development, tests and small runs.

Bridge 0.3 assumes CUDA, NCCL and Transformer Engine in some twenty places. `enable`, which only
`device=cpu` calls, answers each of them on the CPU. torch.distributed runs on gloo.
"""

import functools
import os
from typing import Any

import torch

from nemo_kd.cuda_on_cpu import (
    answer_cuda_calls,
    answer_streams,
    name_tensors_as_cuda,
    refuse_gpus,
)
from nemo_kd.te_on_cpu import (
    PROVIDER_OVERRIDES,
    importable_transformer_engine,
    stand_in_for_transformer_engine,
)


@functools.cache
def enable() -> None:
    """Patch this process so that Bridge runs on the CPU. Call it before Bridge is imported.

    Raises:
        ValueError: CUDA is available.
    """
    refuse_gpus("device")
    # Compiling core's small functions takes a CPU longer than they take it.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    _import_bridge()
    # After the imports: torch.jit.script reads the factories' sources there.
    answer_cuda_calls()
    answer_streams()
    _send_contiguous_shards()
    _initialize_without_cuda()
    name_tensors_as_cuda()


def prepare_provider(provider: Any) -> None:
    """Set in a model's provider, in place, what the local layers on a CPU need.

    Raises:
        ValueError: The provider asks for what the local layers cannot do.
    """
    needs_gpu = ("sequence_parallel", False), ("multi_latent_attention", False)
    for key, wanted in (*needs_gpu, ("context_parallel_size", 1)):
        if getattr(provider, key) != wanted:
            raise ValueError(
                f"expected model.{key}={str(wanted).lower()} with device=cpu, got "
                f"{getattr(provider, key)}: the local layers do not have it"
            )
    for name, value in PROVIDER_OVERRIDES.items():
        if hasattr(provider, name):
            setattr(provider, name, value)


def _import_bridge() -> None:
    """Import Bridge, whose adapters import Transformer Engine whether it is there or not."""
    # Core first: its own probes must find no Transformer Engine.
    stand_in_for_transformer_engine()
    with importable_transformer_engine():
        import megatron.bridge
        import megatron.bridge.training.gpt_step
        import megatron.bridge.training.pretrain  # noqa: F401
        from megatron.bridge.models.gemma import gemma2_provider
        from megatron.bridge.peft import utils
    gemma2_provider._HAVE_FLEX_ATTN = False  # of Bridge 0.6; it has no gradient on a CPU
    utils.HAVE_TE = False  # the stand-ins are Megatron's own layers, and give adapters their sizes


def _send_contiguous_shards() -> None:
    """gloo scatters a strided tensor as if it were contiguous, so that weights were wrong.

    Bridge 0.6 makes the shards contiguous itself.
    """
    from megatron.bridge.models.conversion.param_mapping import MegatronParamMapping

    scatter = MegatronParamMapping.scatter_to_tp_ranks

    @functools.wraps(scatter)
    def contiguous(self: Any, splits: Any, *args: Any, **kwargs: Any) -> Any:
        splits = [split.contiguous() for split in splits] if splits else splits
        return scatter(self, splits, *args, **kwargs)

    MegatronParamMapping.scatter_to_tp_ranks = contiguous


def _initialize_without_cuda() -> None:
    from megatron.bridge.training import initialize, setup
    from megatron.core import tensor_parallel

    # setup does not pass on that no GPU is needed.
    setup.initialize_megatron = functools.partial(
        initialize.initialize_megatron, allow_no_cuda=True
    )
    set_seed = initialize._set_random_seed

    @functools.wraps(set_seed)
    def seed_tracker_too(seed: int, *args: Any, pg_collection: Any, **kwargs: Any) -> None:
        """Bridge seeds Megatron's generators only where there is a GPU."""
        set_seed(seed, *args, pg_collection=pg_collection, **kwargs)
        stage = torch.distributed.get_group_rank(pg_collection.pp, torch.distributed.get_rank())
        tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * stage)

    initialize._set_random_seed = seed_tracker_too
    # The wheel has the compiled helpers, and no Makefile to compile them with.
    initialize.compile_helpers = lambda: None
    # It would compile kernels with tensors on a GPU.
    setup.set_jit_fusion_options = lambda *_, **__: None
