"""The teacher's rows of each sample -> tensors of a batch."""

from typing import NamedTuple

import torch
from torch import Tensor

from nemo_kd.cache import Sample
from nemo_kd.loss import KDLossConfig


class Rows(NamedTuple):
    """The teacher's rows of one sample, and where they stand in the collated sequence."""

    positions: Tensor  # int64 [P]
    topk_ids: Tensor  # [P, K]
    topk_log_probs: Tensor  # [P, K]
    tail_log_probs: Tensor  # [P]


def sample_rows(sample: Sample, config: KDLossConfig, dumped_at: float) -> Rows:
    """The rows of a cache's sample: the row for token t stands at t - 1, which predicts t.

    Args:
        config: the objective that the rows are for.
        dumped_at: the temperature of the cache's log-probs.
    """
    return Rows(
        torch.from_numpy(sample.loss_mask).nonzero()[:, 0] - 1,
        torch.from_numpy(sample.topk_ids),
        _untempered(torch.from_numpy(sample.topk_log_probs), config, dumped_at),
        torch.from_numpy(sample.tail_log_probs),
    )


def _untempered(log_probs: Tensor, config: KDLossConfig, dumped_at: float) -> Tensor:
    """For tail renormalize, which tempers the teacher itself, log-probs at temperature 1.

    log p = dumped_at * (log p at dumped_at) + a constant of the row, which the softmax over the
    entries cancels; the constant chosen here keeps the row's stored mass.
    """
    if config.tail != "renormalize" or dumped_at == 1:
        return log_probs
    scaled = log_probs * dumped_at
    scaled += log_probs.logsumexp(-1, True) - scaled.logsumexp(-1, True)
    return scaled.where(log_probs > -torch.inf, -torch.inf)  # also in a row that has no other


def collate_rows(batch: list[list[Rows]], length: int) -> dict[str, Tensor]:
    """The rows of the samples in each sequence of a batch, in tensors [B, S, K] and [B, S]."""
    num_entries = max(1, *(rows.topk_ids.shape[1] for packed in batch for rows in packed))
    ids = torch.full((len(batch), length, num_entries), -1, dtype=torch.int32)
    log_probs = torch.full((len(batch), length, num_entries), -torch.inf)
    tails = torch.full((len(batch), length), -torch.inf)
    for index, packed in enumerate(batch):
        for rows in packed:
            kept = rows.topk_ids.shape[1]
            ids[index, rows.positions, :kept] = rows.topk_ids
            log_probs[index, rows.positions, :kept] = rows.topk_log_probs
            tails[index, rows.positions] = rows.tail_log_probs
    return {"topk_ids": ids, "topk_log_probs": log_probs, "tail_log_probs": tails}
