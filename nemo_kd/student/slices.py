"""The part of a batch that a context-parallel rank computes."""

from __future__ import annotations

import inspect
from typing import Any

from megatron.core import utils
from torch import Tensor
from torch.distributed import ProcessGroup


def part_of_sequence(batch: dict[str, Tensor], group: ProcessGroup) -> dict[str, Tensor]:
    """Two of the 2 * CP chunks of each tensor [B, S, ...], as Megatron Core cuts them.

    Args:
        batch: What has a sequence in its second dimension.
        group: The ranks that share the sequence.
    """
    cut = utils.get_batch_on_this_cp_rank
    # Core 0.19 asks how the ranks share the sequences, which the Core before does in one way.
    asks = "is_hybrid_cp" in inspect.signature(cut).parameters
    more = {"is_hybrid_cp": False} if asks else {}
    part: dict[str, Tensor] = cut(batch, cp_group=group, **more)
    return part


def part_of_packs(
    batch: dict[str, Tensor], bounds: Tensor, size: int, rank: int
) -> dict[str, Tensor]:
    """Two of the 2 * CP chunks of each packed sequence, as Transformer Engine's attention has them.

    Args:
        batch: Tensors [1, S, ...].
        bounds: The ends of the sequences after a 0, then -1 if anything, on the host.
        size: CP, the ranks that share the sequences.
        rank: This rank among them.
    """
    import transformer_engine_torch  # on a GPU alone

    whole = bounds[bounds >= 0]
    partitioned: Any = transformer_engine_torch.thd_get_partitioned_indices
    part = {}
    for name, value in batch.items():
        index = partitioned(whole.to(value.device, non_blocking=True), value.shape[1], size, rank)
        part[name] = value.index_select(1, index)
    return part
