"""The teacher's rows of each sample -> tensors of a batch."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_kd.cache import Sample
from nemo_kd.loss import KDLossConfig

# What the loss takes of a batch, and what a batch has on its way there.
TEACHER_ROWS = ("topk_ids", "topk_log_probs", "tail_log_probs")
ROW_KEYS = ("row_positions", *TEACHER_ROWS)


class Rows(NamedTuple):
    """The teacher's rows of one sample, and where they stand in the collated sequence."""

    positions: Tensor  # int64 [P]
    topk_ids: Tensor  # [P, K]
    topk_log_probs: Tensor  # [P, K]
    tail_log_probs: Tensor  # [P]


def sample_rows(sample: Sample, config: KDLossConfig, dumped_at: float) -> Rows:
    """The rows of a cache's sample: the row for token t stands at t - 1, which predicts t.

    A sample that was read without its rows has none.

    Args:
        config: the objective that the rows are for.
        dumped_at: the temperature of the cache's log-probs.
    """
    return Rows(
        torch.from_numpy(sample.loss_mask).nonzero()[: len(sample.topk_ids), 0] - 1,
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


def collate_rows(batch: list[list[Rows]]) -> dict[str, Tensor]:
    """The rows of the samples in each sequence of a batch, one after another: ROW_KEYS.

    With R the rows of the sequence that has most, and K the entries of the longest row. A prompt
    takes no room, neither between processes nor on the way to a GPU.

    Args:
        batch: For each sequence the rows of its samples.

    Returns:
        row_positions [B, R] int64, topk_ids [B, R, K] int32, topk_log_probs [B, R, K] float32 and
        tail_log_probs [B, R] float32. What fills a sequence up has position -1.
    """
    num_entries = max(1, *(rows.topk_ids.shape[1] for packed in batch for rows in packed))
    num_rows = max(sum(len(rows.positions) for rows in packed) for packed in batch)
    shape = (len(batch), num_rows)
    positions = torch.full(shape, -1)
    ids = torch.full((*shape, num_entries), -1, dtype=torch.int32)
    log_probs = torch.full((*shape, num_entries), -torch.inf)
    tails = torch.full(shape, -torch.inf)
    for index, packed in enumerate(batch):
        begin = 0
        for rows in packed:
            own = slice(begin, begin + len(rows.positions))
            kept = rows.topk_ids.shape[1]
            positions[index, own] = rows.positions
            ids[index, own, :kept] = rows.topk_ids
            log_probs[index, own, :kept] = rows.topk_log_probs
            tails[index, own] = rows.tail_log_probs
            begin = own.stop
    return dict(zip(ROW_KEYS, (positions, ids, log_probs, tails), strict=True))


def scatter_rows(rows: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """Put the rows of a batch where the loss reads them, on their device; waits for nothing.

    Args:
        rows: As `collate_rows` makes them.
        length: S, the positions of a sequence.

    Returns:
        TEACHER_ROWS: topk_ids and topk_log_probs [B, S, K], tail_log_probs [B, S]; -1 and -inf
        where there is no row.
    """
    positions = rows["row_positions"]
    begins = torch.arange(len(positions), device=positions.device)[:, None] * length
    # What fills a sequence up goes to a place behind the last one.
    num_places = len(positions) * length
    places = torch.where(positions < 0, num_places, positions + begins).flatten()
    scattered = {}
    for name in TEACHER_ROWS:
        values = rows[name]
        filling = -1 if name == "topk_ids" else -torch.inf
        out = values.new_full((num_places + 1, *values.shape[2:]), filling)
        out.index_copy_(0, places, values.flatten(0, 1))
        scattered[name] = out[:-1].view(len(positions), length, *values.shape[2:])
    return scattered
