"""The teacher's rows of each sample -> tensors of a batch."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """The teacher's rows of one sample, and where they stand in the collated sequence."""

    positions: Tensor  # int64 [P]
    topk_ids: Tensor  # [P, K]
    topk_log_probs: Tensor  # [P, K]
    tail_log_probs: Tensor  # [P]


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
