"""What a sharded vocabulary needs: this rank's range, sums over all ranks, the global top-K.

Vocab-parallel logits are `[N, Vp]`: rank r of a tensor-parallel group holds the columns
`r * Vp <= id < (r + 1) * Vp` of the whole vocabulary. The group arrives as an argument; `None`
means that the vocabulary is not sharded, and then nothing here communicates.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

# exp(x) is computed as exp2(x * LOG2_E), because torch.exp takes three times as long on a CPU.
# Relative error |x| 2^-24, largest where exp(x) is negligible.
LOG2_E = math.log2(math.e)
_ID_BITS = 32
_ID_MASK = (1 << _ID_BITS) - 1


def num_vocab_shards(group: ProcessGroup | None) -> int:
    """How many ranks share the vocabulary."""
    return 1 if group is None else group.size()


def vocab_shard_range(shard_size: int, group: ProcessGroup | None) -> tuple[int, int]:
    """This rank's ids, `[start, end)` of the whole vocabulary; every shard has `shard_size`."""
    start = 0 if group is None else group.rank() * shard_size
    return start, start + shard_size


def all_reduce_max(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Elementwise maximum over the group, in place; returns `tensor`."""
    if group is not None:
        dist.all_reduce(tensor, op=ReduceOp.MAX, group=group)
    return tensor


def all_reduce_sum(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Elementwise sum over the group, in place; returns `tensor`."""
    if group is not None:
        dist.all_reduce(tensor, op=ReduceOp.SUM, group=group)
    return tensor


def all_gather(tensor: Tensor, group: ProcessGroup | None) -> list[Tensor]:
    """The tensor of every rank, in rank order; all have one shape."""
    if group is None:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts


def reduce_scatter_sum(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """This rank's part, along the first dimension, of the sum over the group."""
    if group is None:
        return tensor
    part = torch.empty_like(tensor[: len(tensor) // group.size()])
    dist.reduce_scatter_tensor(part, tensor, group=group)
    return part


def global_log_sum_exp(local: Tensor, group: ProcessGroup | None) -> Tensor:
    """`log sum_ranks exp(local)`, elementwise; -inf where every rank has -inf. One all-gather."""
    if group is None:
        return local
    return torch.stack(all_gather(local, group)).logsumexp(0)


def global_topk(logits: Tensor, k: int, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The `k` largest logits of the whole vocabulary: values `[N, k]` float32, ids `[N, k]` int64.

    `logits` is `[N, Vp]` of any float type. Sorted by descending logit; equal logits by ascending
    id, so that the same logits give the same rows at every tensor-parallel size. One all-gather of
    `k` int64 a shard.

    Raises:
        ValueError: `k` is not within 1 and the size of the whole vocabulary.
    """
    vocab_size = logits.shape[-1] * num_vocab_shards(group)
    if not 1 <= k <= vocab_size:
        raise ValueError(f"expected 1 <= k <= {vocab_size}, the vocabulary's size; got k={k}")
    # An int64 key orders as (logit, -id) does and gives both back: the logit's float32 bits, mapped
    # to an integer of the same order, stand above `2^32 - 1 - id`. So one top-k breaks ties, and
    # one all-gather carries logits and ids.
    start, end = vocab_shard_range(logits.shape[-1], group)
    bits = (logits.float() + 0.0).view(torch.int32)  # + 0.0: -0.0 equals 0.0 and so must its bits
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats order backwards as integers
    ids = torch.arange(start, end, device=logits.device)
    keys = (ordered.to(torch.int64) << _ID_BITS) + (_ID_MASK - ids)
    keys = keys.topk(min(k, logits.shape[-1]), dim=-1).values
    if group is not None:
        keys = torch.cat(all_gather(keys, group), dim=-1).sort(dim=-1, descending=True).values
    keys = keys[:, :k]
    ordered = (keys >> _ID_BITS).to(torch.int32)
    values = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return values, _ID_MASK - (keys & _ID_MASK)
