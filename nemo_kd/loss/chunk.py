"""One chunk of tokens `[n, Vp]`: its statistics, the divergence and dloss/dz.

`measure` reads the logits and leaves exponentials, `combine` makes one student of all vocab shards,
and `form` computes the divergence and turns the exponentials into the gradient. docs/loss.md
derives the formulas.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_kd.loss.objective import KDLossConfig
from nemo_kd.loss.prepare import Rows, Student
from nemo_kd.vocab_parallel import LOG2_E, all_reduce_max, all_reduce_sum, vocab_shard_range


class Classes(NamedTuple):
    """The teacher's classes of N rows, and the columns of this vocab shard that they stand for."""

    column: Tensor  # [N, K + 1] int64, of the K entries and the label; 0 where foreign
    foreign: Tensor  # [N, K + 1] bool: an empty entry, or an id of another vocab shard
    absent: Tensor  # [N, K + 1] bool: as in Targets, and so are probs and log_probs
    probs: Tensor
    log_probs: Tensor
    token_weights: Tensor | None  # [N] multiply the rows of the gradient; None: all are 1


class Local(NamedTuple):
    """What one vocab shard says of N rows. With tail "bucket" the sums leave out the entries."""

    logits: Tensor  # [N, K + 1] at the entries and the label, -inf where foreign
    peak: Tensor  # [N] the largest logit in the sums
    sum: Tensor  # [N] sum exp(z - peak)
    sum_t: Tensor  # [N] sum exp((z - peak) / T)


def locate(
    rows: Rows, shard_size: int, group: ProcessGroup | None, token_weights: Tensor | None = None
) -> Classes:
    """The classes of one call's rows, in this rank's vocab shard."""
    start, end = vocab_shard_range(shard_size, group)
    ids = torch.cat([rows.ids, rows.labels[:, None]], dim=-1)
    foreign = (ids < start) | (ids >= end)
    return Classes((ids - start).masked_fill_(foreign, 0), foreign, *rows.targets, token_weights)


def measure(
    logits: Tensor, classes: Classes, config: KDLossConfig, work: Tensor, work_t: Tensor
) -> Local:
    """This shard's statistics of a chunk `[n, Vp]`; leaves its exponentials in both works."""
    # The entries are read first: `work` may be the logits' own memory.
    entries = logits.gather(1, classes.column).to(work.dtype)
    entries.masked_fill_(classes.foreign, -torch.inf)
    peak = exponentiate(logits, classes, config, work, work_t)
    total = work.sum(-1)
    return Local(entries, peak, total, total if work_t is work else work_t.sum(-1))


def exponentiate(
    logits: Tensor,
    classes: Classes,
    config: KDLossConfig,
    work: Tensor,
    work_t: Tensor,
    peak: Tensor | None = None,
) -> Tensor:
    """Writes exp(z - peak) to `work` and exp((z - peak) / T) to `work_t`; returns the peak.

    `work` may be the logits' memory; at T = 1 `work_t` is `work`. With tail "bucket" the entries
    are -inf, so that the sum is over the outside only, and never 1 minus another sum.
    """
    source = logits
    if logits.dtype != work.dtype or config.tail == "bucket":
        source = work.copy_(logits)
    if config.tail == "bucket":
        # Added, not assigned: a foreign entry stands at column 0, whose logit must stay.
        own_entries = ~classes.foreign[:, :-1]
        exclusion = torch.zeros_like(own_entries, dtype=work.dtype)
        exclusion.masked_fill_(own_entries, -torch.inf)
        work.scatter_add_(1, classes.column[:, :-1], exclusion)
    if peak is None:
        # Finite even where nothing is left of the row, or -inf - -inf would be NaN.
        peak = source.amax(-1).clamp_(min=torch.finfo(work.dtype).min)
    torch.sub(source, peak[:, None], out=work)
    if work_t is not work:
        # Before `work` is overwritten by its own exponential.
        torch.mul(work, LOG2_E / config.temperature, out=work_t).exp2_()
    work.mul_(LOG2_E).exp2_()
    return peak


def combine(local: Local, config: KDLossConfig, group: ProcessGroup | None) -> Student:
    """The student over all vocab shards."""
    # One all-reduce of K + 2 maxima a token: every entry's logit is -inf but on the shard that has
    # it, so that its maximum is the logit itself.
    maxima = all_reduce_max(torch.cat([local.logits, local.peak[:, None]], dim=-1), group)
    offset = local.peak - maxima[:, -1]
    sums = torch.stack(
        [local.sum * offset.exp(), local.sum_t * (offset / config.temperature).exp()]
    )
    # One all-reduce of two sums a token. It comes after the maxima, because every shard's sum has
    # to be relative to the same maximum.
    log_sum, log_sum_t = all_reduce_sum(sums, group).log()
    top = maxima.amax(-1)
    below_top = maxima[:, -1] - top
    log_sum = log_sum + below_top
    log_outside = log_sum_t = log_sum_t + below_top / config.temperature
    if config.tail == "bucket":
        entries = maxima[:, :-2] - top[:, None]
        log_sum = torch.logaddexp(log_sum, entries.logsumexp(-1))
        log_sum_t = torch.logaddexp(log_outside, (entries / config.temperature).logsumexp(-1))
    return Student(maxima[:, :-1], top, log_sum, log_sum_t, log_outside, local.peak - top)


def form(
    student: Student,
    classes: Classes,
    config: KDLossConfig,
    work: Tensor,
    work_t: Tensor,
    out: Tensor | None,
) -> Tensor:
    """D `[n]`. With `out`, the exponentials in `work` and `work_t` become dloss/dz in `out`.

    `out` and `work` may be one tensor.
    """
    value, class_gradient = divergence(student, classes, config)
    if out is not None:
        _form_gradient(student, classes, class_gradient, config, work, work_t)
        if work is not out:
            out.copy_(work)
    return value


def divergence(student: Student, classes: Classes, config: KDLossConfig) -> tuple[Tensor, Tensor]:
    """D `[n]` and dD/du `[n, K + 1]`, without the part that is dense in the vocabulary.

    With the tails "label" and "drop" q is dense, and dD/du is -t here. From docs/loss.md:

        forward_kl   dD/du = s - t
        reverse_kl   dD/du = s (log s - log t - D)
        jsd          dD/du = (1 - beta) s (log s - log m - KL(s||m)),  m = beta t + (1 - beta) s
    """
    absent, probs, log_probs = classes.absent, classes.probs, classes.log_probs
    if config.restricts_student:
        # Relative to the largest of the classes, not of the vocabulary: the rounding of a distance
        # of 1e4 would be an error in every difference between the classes.
        own = student.logits[:, :-1].masked_fill(absent[:, :-1], -torch.inf)
        largest = own.amax(-1)
        largest = largest.where(largest > -torch.inf, student.top)
        outside = student.log_outside + (student.top - largest) / config.temperature
        own = (own - largest[:, None]) / config.temperature
        scaled = torch.cat([own, outside[:, None]], dim=-1)
        log_s = scaled.masked_fill_(absent, -torch.inf).log_softmax(-1)
    else:
        scaled = (student.logits - student.top[:, None]) / config.temperature
        log_s = scaled.sub_(student.log_sum_t[:, None])
    log_s.masked_fill_(absent, -torch.inf)  # also clears the NaN of a row without any class
    if config.divergence == "forward_kl":
        value = _terms(probs, log_probs, log_s).sum(-1)
        return value, log_s.exp_().sub_(probs) if config.restricts_student else -probs
    s = log_s.exp()
    if config.divergence == "reverse_kl":
        terms = _terms(s, log_s, log_probs)
        value = terms.sum(-1)
        return value, terms.addcmul_(s, value[:, None], value=-1)
    beta = config.jsd_beta
    log_m = torch.logaddexp(log_probs + math.log(beta), log_s + math.log1p(-beta))
    terms = _terms(s, log_s, log_m)
    student_kl = terms.sum(-1)
    value = beta * _terms(probs, log_probs, log_m).sum(-1) + (1 - beta) * student_kl
    return value, terms.addcmul_(s, student_kl[:, None], value=-1).mul_(1 - beta)


def _terms(probs: Tensor, log_probs: Tensor, log_others: Tensor) -> Tensor:
    """a (log a - log b), 0 where a is 0."""
    return (probs * (log_probs - log_others)).masked_fill_(probs == 0, 0)


def _form_gradient(
    student: Student,
    classes: Classes,
    class_gradient: Tensor,
    config: KDLossConfig,
    work: Tensor,
    work_t: Tensor,
) -> None:
    """Turns the exponentials in `work` and `work_t` into dloss/dz of a chunk, in `work`.

        dloss/dz_j = sft_loss_weight * (softmax(z)_j - 1[j = label])
                   + kd_loss_weight * T * (dD/du_j if j is an entry, else the dense part)

    The dense part is 0 for renormalize, dD/du_outside * softmax(z/T over the outside)_j for bucket
    and softmax(z/T)_j for label and drop. `class_gradient` (dD/du) is overwritten.
    """
    sparse = class_gradient.mul_(config.kd_loss_weight * config.temperature)
    if config.kd_loss_weight == 0:
        sparse.zero_()  # also where KD is NaN
    if config.tail == "bucket":
        # The entries were left out of the exponentials: their cells hold 0 and get all of theirs.
        softmax = (student.logits[:, :-1] - student.top[:, None] - student.log_sum[:, None]).exp_()
        sparse[:, :-1].add_(softmax, alpha=config.sft_loss_weight)
        # Copied before the column becomes the label's.
        dense = sparse[:, -1].clone()
        sparse[:, -1] = 0
    elif config.tail != "renormalize":
        dense = (~classes.absent.all(-1)).to(work.dtype)
        dense.mul_(config.kd_loss_weight * config.temperature)
    sparse[:, -1] -= config.sft_loss_weight
    scale = (student.offset - student.log_sum).exp_().mul_(config.sft_loss_weight)
    scale_t = None
    if config.tail != "renormalize":
        # The exponent is at most 0. It is inf where the outside is empty, and NaN where T < 1 takes
        # the offset out of float32; `dense` is 0 in both cases.
        exponent = student.offset / config.temperature - student.log_outside
        exponent = exponent.nan_to_num_(nan=0).clamp_(max=0)
        scale_t = exponent.exp_().mul_(dense)
        if work_t is work:
            scale, scale_t = scale.add_(scale_t), None
    if classes.token_weights is not None:
        for factor in (sparse.t(), scale, *([] if scale_t is None else [scale_t])):
            factor.mul_(classes.token_weights)
    work.mul_(scale[:, None])
    if scale_t is not None:
        work.addcmul_(work_t, scale_t[:, None])
    # Added, since an entry's cell may be the label's too, and foreign entries add 0 to column 0.
    work.scatter_add_(1, classes.column, sparse.masked_fill_(classes.foreign, 0))


def take(fields: Any, rows: slice) -> Any:
    """The same rows of every field of a named tuple."""
    return type(fields)(*(None if field is None else field[rows] for field in fields))


def concatenate(parts: list[Any]) -> Any:
    """The rows of named tuples of one type, in order."""
    return type(parts[0])(*map(torch.cat, zip(*parts, strict=True)))
