"""From the teacher's logits to the few entries of its distribution that the cache keeps."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_kd.vocab_parallel import (
    global_log_sum_exp,
    local_topk_keys,
    merge_topk_keys,
    num_vocab_shards,
    unpack_topk_keys,
    vocab_shard_range,
)

# One chunk of tokens in float32; its integer keys take some six times as much beside it.
_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class SelectionConfig:
    """Which entries of a teacher's row are kept.

    Raises:
        ValueError: a field is out of its range or `kind` is unknown.
        NotImplementedError: `kind` is known and not there yet.
    """

    kind: Literal["top_k", "top_p", "sample"] = "top_k"
    k: int = 100  # entries kept; for top_p their upper bound
    p: float = 0.99  # top_p: the smallest set with at least this mass
    num_draws: int = 50  # sample: draws with replacement
    temperature: float = 1.0  # log-probs are those of softmax(logits / temperature)
    seed: int = 1234  # sample

    def __post_init__(self) -> None:
        if self.kind not in ("top_k", "top_p", "sample"):
            raise ValueError(f"expected selection.kind top_k, top_p or sample, got {self.kind!r}")
        for name in ("k", "num_draws"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(
                    f"expected selection.{name} >= 1, got {value}; set it to 1 or more"
                )
        if not 0 < self.p <= 1:
            raise ValueError(
                f"expected 0 < selection.p <= 1, got {self.p}; p is a share of the teacher's mass"
            )
        if not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"expected selection.temperature > 0, got {self.temperature}; "
                "1.0 leaves the teacher as it is"
            )
        if self.kind != "top_k":
            raise NotImplementedError(f"selection.kind={self.kind}")


class TeacherRows(NamedTuple):
    """What is kept of N tokens' distributions, by descending log-prob."""

    topk_ids: Tensor  # [N, K] int32, ids in the whole vocabulary
    topk_log_probs: Tensor  # [N, K] float32
    tail_log_probs: Tensor  # [N] float32, log of the mass outside; -inf when nothing is outside


def select_teacher_rows(
    logits: Tensor,
    config: SelectionConfig,
    vocab_size: int,
    tp_group: ProcessGroup | None = None,
) -> TeacherRows:
    """`log_softmax(z / T)` at the K largest of z, and `log sum exp` of all the others.

    `logits` is `[N, Vp]` of any float type, this rank's vocab shard; ids from `vocab_size` up are
    padding and take no part. Every rank returns the same rows. float32 inside, one chunk of tokens
    at a time. The tail is summed from the logits that were not kept, never as 1 - sum of the kept:
    a confident teacher's tail of 1e-12 is as exact as one of 0.5. Two all-gathers a call.

    Raises:
        ValueError: K is above `vocab_size`, or `vocab_size` above the columns that there are.
    """
    num_columns = logits.shape[-1] * num_vocab_shards(tp_group)
    if not 1 <= vocab_size <= num_columns:
        raise ValueError(
            f"expected 1 <= vocab_size <= {num_columns}, the logits' columns over all ranks; got "
            f"vocab_size={vocab_size}; pass the tokenizer's size and the teacher that goes with it"
        )
    if config.k > vocab_size:
        raise ValueError(
            f"expected selection.k <= {vocab_size}, the vocabulary's size, got "
            f"selection.k={config.k}; set selection.k={vocab_size} to keep every entry"
        )
    start, _ = vocab_shard_range(logits.shape[-1], tp_group)
    tokens_per_chunk = max(1, _CHUNK_BYTES // (4 * logits.shape[-1]))
    keys, rest = [], []
    for begin in range(0, max(1, len(logits)), tokens_per_chunk):
        scaled = logits[begin : begin + tokens_per_chunk].to(torch.float32, copy=True)
        scaled[:, max(0, vocab_size - start) :] = -torch.inf
        scaled /= config.temperature
        chunk_keys = local_topk_keys(scaled, config.k, tp_group)
        keys.append(chunk_keys)
        _, ids = unpack_topk_keys(chunk_keys)
        rest.append(scaled.scatter_(1, ids - start, -torch.inf).logsumexp(-1))
    candidates, ids = unpack_topk_keys(merge_topk_keys(torch.cat(keys), tp_group))
    kept = candidates[:, : config.k]
    # Outside the row: what no shard offered, and what the shards offered above K in all.
    offered = candidates[:, config.k :]
    tail = torch.cat([global_log_sum_exp(torch.cat(rest), tp_group)[:, None], offered], dim=-1)
    normaliser = torch.cat([kept, tail], dim=-1).logsumexp(-1)
    return TeacherRows(
        topk_ids=ids[:, : config.k].to(torch.int32),
        topk_log_probs=kept - normaliser[:, None],
        tail_log_probs=tail.logsumexp(-1) - normaliser,
    )
