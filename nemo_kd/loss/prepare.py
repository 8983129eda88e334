"""What both fronts of the loss do before and after the passes over the logits.

`prepare` checks the arguments and flattens them to N tokens. `assemble` gives the results the
caller's shape and adds the metrics.
"""

import os
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_kd.loss.objective import KDLossConfig, KDLossOutput, Targets, make_targets


class Rows(NamedTuple):
    """The arguments of one call, for N tokens."""

    shape: torch.Size  # the caller's leading dimensions, with N elements
    labels: Tensor  # [N] int64
    log_probs: Tensor  # [N, K] float, as the teacher's row was stored
    ids: Tensor  # [N, K] int64, -1 marks an empty entry
    targets: Targets  # [N, K + 1]


class Student(NamedTuple):
    """What the passes learn about the student, for N tokens; the same on every rank but `offset`.

    The sums are relative to the maximum of their row: the float32 log-sum-exp of logits near 1e4
    would lose the third decimal of the loss.
    """

    logits: Tensor  # [N, K + 1] z at the entries and the label; -inf for an empty entry
    top: Tensor  # [N] max z over the vocabulary
    log_sum: Tensor  # [N] log sum exp(z - top) over the vocabulary
    log_sum_t: Tensor  # [N] log sum exp((z - top) / T) over the vocabulary
    log_outside: Tensor  # [N] log_sum_t, with tail "bucket" over the ids outside the row only
    offset: Tensor  # [N] this rank's peak (see chunk.Local) minus top


def prepare(
    shape: torch.Size,
    vocab_size: int,
    labels: Tensor,
    log_probs: Tensor,
    ids: Tensor,
    tail_log_probs: Tensor | None,
    config: KDLossConfig,
    logits_dtype: torch.dtype,
) -> Rows:
    """Checks one call's arguments, flattens them and computes the targets.

    float64 logits are computed in float64, all others in float32. The teacher gets no gradient.

    Raises:
        ValueError: a shape does not fit, ids or labels are no integers, the tail is missing, or (on
            CPU, or with NEMO_KD_DEBUG=1) an id or a label is outside the vocabulary or a row names
            an id twice.
    """
    for name, values in (("teacher_topk_ids", ids), ("labels", labels)):
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise ValueError(f"expected {name} of an integer type, got {values.dtype}")
    ids, labels = ids.long(), labels.long()
    _check_shapes(shape, labels, log_probs, ids, tail_log_probs, config)
    # Reading a value back makes the host wait for the GPU, so CUDA ids are checked on request only.
    if ids.numel() > 0 and (not ids.is_cuda or os.environ.get("NEMO_KD_DEBUG") == "1"):
        _check_ids(vocab_size, labels, ids)
    dtype = torch.float64 if logits_dtype == torch.float64 else torch.float32
    ids = ids.reshape(-1, ids.shape[-1])
    labels = labels.reshape(-1)
    log_probs = log_probs.detach().reshape(ids.shape)
    tail = None if tail_log_probs is None else tail_log_probs.detach().reshape(-1)
    targets = make_targets(log_probs, ids, tail, labels, vocab_size, config, dtype)
    return Rows(shape, labels, log_probs, ids, targets)


def assemble(
    loss: Tensor,
    kd_loss: Tensor,
    sft_loss: Tensor,
    student: Student,
    rows: Rows,
    config: KDLossConfig,
) -> KDLossOutput:
    """The output of a front: `loss` as it is, all the rest in the caller's shape."""
    values = _metrics(student, rows, config)
    return KDLossOutput(
        loss,
        kd_loss.view(rows.shape),
        sft_loss.view(rows.shape),
        {name: value.view(rows.shape) for name, value in values.items()},
    )


def _metrics(student: Student, rows: Rows, config: KDLossConfig) -> dict[str, Tensor]:
    """`[N]` each, at temperature T; 0 for a row without entries."""
    targets = rows.targets
    stored = rows.log_probs.to(targets.probs.dtype).masked_fill(rows.ids < 0, -torch.inf)
    entries = student.logits[:, :-1] - student.top[:, None]
    at_largest = entries.gather(1, stored.argmax(-1, keepdim=True))[:, 0]
    student_log_probs = entries / config.temperature - student.log_sum_t[:, None]
    entropy_terms = (targets.probs * targets.log_probs).masked_fill_(targets.probs == 0, 0)
    return {
        "teacher_topk_mass": stored.exp().sum(-1),
        "student_topk_mass": student_log_probs.exp().sum(-1),
        "teacher_entropy": -entropy_terms.sum(-1),
        "top1_agreement": (at_largest == 0).to(stored.dtype),
    }


def _check_shapes(
    shape: torch.Size,
    labels: Tensor,
    log_probs: Tensor,
    ids: Tensor,
    tail_log_probs: Tensor | None,
    config: KDLossConfig,
) -> None:
    if ids.dim() == 0 or ids.shape[-1] < 1 or ids.shape[:-1] != shape:
        raise ValueError(
            f"expected teacher_topk_ids of shape {tuple(shape)} + (K,) with K >= 1, as the "
            f"student's leading dimensions are; got {tuple(ids.shape)}"
        )
    if log_probs.shape != ids.shape:
        raise ValueError(
            f"expected teacher_topk_log_probs of the ids' shape {tuple(ids.shape)}; "
            f"got {tuple(log_probs.shape)}"
        )
    if labels.shape != shape:
        raise ValueError(
            f"expected labels of shape {tuple(shape)}, one per row of student logits; "
            f"got {tuple(labels.shape)}"
        )
    if config.tail in ("bucket", "label"):
        if tail_log_probs is None:
            raise ValueError(
                f"expected teacher_tail_log_probs with tail={config.tail}, got None; "
                "pass the cache's tail_log_probs or use tail renormalize or drop"
            )
        if tail_log_probs.shape != shape:
            raise ValueError(
                f"expected teacher_tail_log_probs of shape {tuple(shape)}; "
                f"got {tuple(tail_log_probs.shape)}"
            )


def _check_ids(vocab_size: int, labels: Tensor, ids: Tensor) -> None:
    for name, values, low, remedy in (
        ("teacher_topk_ids", ids, -1, "dump a cache with the student's tokenizer"),
        ("labels", labels, 0, "where the loss is masked, use any id instead of -100"),
    ):
        smallest, largest = (int(value) for value in values.aminmax())
        if smallest < low or largest >= vocab_size:
            wrong = smallest if smallest < low else largest
            raise ValueError(
                f"expected {name} from {low} to {vocab_size - 1}, got {wrong}; the student's "
                f"vocabulary has V={vocab_size} entries; {remedy}"
            )
    ordered = ids.sort(dim=-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if twice.any():
        raise ValueError(
            f"expected each id at most once a row, got {int(ordered[..., 1:][twice][0])} twice; "
            "merge repeated entries and mark the freed ones with id -1"
        )
