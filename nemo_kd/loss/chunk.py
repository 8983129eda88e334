"""What the passes share: the small tensors of N tokens, none of them as wide as the vocabulary.

A pass reads the logits twice. First an engine (eager.py or triton_kernels.py) measures this vocab
shard, `combine` makes one student of all shards, and `divergence` compares it with the teacher.
Then `form` says in K + 4 numbers a token what the gradient is, and the engine spreads them over the
vocabulary. docs/loss.md derives the formulas.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_kd.loss.objective import KDLossConfig
from nemo_kd.loss.prepare import Rows, Student
from nemo_kd.vocab_parallel import all_reduce_max, all_reduce_sum, vocab_shard_range


class Classes(NamedTuple):
    """The teacher's classes of N rows, and the columns of this vocab shard that they stand for."""

    column: Tensor  # [N, K + 1] int64, of the K entries and the label; 0 where foreign
    foreign: Tensor  # [N, K + 1] bool: an empty entry, or an id of another vocab shard
    absent: Tensor  # [N, K + 1] bool: as in Targets, and so are probs and log_probs
    probs: Tensor
    log_probs: Tensor


class Local(NamedTuple):
    """What one vocab shard says of N rows. With tail "bucket" the sums leave out the entries."""

    logits: Tensor  # [N, K + 1] at the entries and the label, -inf where foreign
    peak: Tensor  # [N] the largest logit in the sums
    sum: Tensor  # [N] sum exp(z - peak)
    sum_t: Tensor  # [N] sum exp((z - peak) / T)


class Gradient(NamedTuple):
    """dloss/dz of N rows of one vocab shard, before an engine spreads it over the vocabulary.

        dloss/dz_j = scale * exp(z_j - peak) + scale_t * exp((z_j - peak) / T)
                   + the sum of `sparse` over the classes whose column is j

    With tail "bucket" both exponentials are left out where j is an entry.
    """

    column: Tensor  # [N, K + 1] int64, and foreign: as in Classes
    foreign: Tensor  # [N, K + 1] bool
    logits: Tensor  # [N, K + 1] as in Student
    sparse: Tensor  # [N, K + 1]
    peak: Tensor  # [N] as in Local
    scale: Tensor  # [N]
    scale_t: Tensor | None  # [N]; None where no such term exists, or where `scale` has it (T = 1)


def locate(rows: Rows, shard_size: int, group: ProcessGroup | None) -> Classes:
    """The classes of one call's rows, in this rank's vocab shard."""
    start, end = vocab_shard_range(shard_size, group)
    ids = torch.cat([rows.ids, rows.labels[:, None]], dim=-1)
    foreign = (ids < start) | (ids >= end)
    return Classes((ids - start).masked_fill_(foreign, 0), foreign, *rows.targets)


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


def form(
    local_peak: Tensor,
    student: Student,
    classes: Classes,
    class_gradient: Tensor,
    config: KDLossConfig,
) -> Gradient:
    """The gradient of the loss, from `class_gradient` (dD/du), which is overwritten.

        dloss/dz_j = sft_loss_weight * (softmax(z)_j - 1[j = label])
                   + kd_loss_weight * T * (dD/du_j if j is an entry, else the dense part)

    The dense part is 0 for renormalize, dD/du_outside * softmax(z/T over the outside)_j for bucket
    and softmax(z/T)_j for label and drop.
    """
    sparse = class_gradient.mul_(config.kd_loss_weight * config.temperature)
    if config.kd_loss_weight == 0:
        sparse.zero_()  # also where KD is NaN
    if config.tail == "bucket":
        # The entries were left out of the exponentials: their cells get all of their gradient here.
        softmax = (student.logits[:, :-1] - student.top[:, None] - student.log_sum[:, None]).exp_()
        sparse[:, :-1].add_(softmax, alpha=config.sft_loss_weight)
        # Copied before the column becomes the label's.
        dense = sparse[:, -1].clone()
        sparse[:, -1] = 0
    elif config.tail != "renormalize":
        dense = (~classes.absent.all(-1)).to(sparse.dtype)
        dense.mul_(config.kd_loss_weight * config.temperature)
    sparse[:, -1] -= config.sft_loss_weight
    scale = (student.offset - student.log_sum).exp_().mul_(config.sft_loss_weight)
    scale_t = None
    if config.tail != "renormalize":
        # The exponent is at most 0. It is inf where the outside is empty, and NaN where T < 1 takes
        # the offset out of float32; `dense` is 0 in both cases.
        exponent = student.offset / config.temperature - student.log_outside
        scale_t = exponent.nan_to_num_(nan=0).clamp_(max=0).exp_().mul_(dense)
        if config.temperature == 1:
            scale, scale_t = scale.add_(scale_t), None
    places = (classes.column, classes.foreign, student.logits)
    return Gradient(*places, sparse, local_peak, scale, scale_t)


def take(fields: Any, rows: slice) -> Any:
    """The same rows of every field of a named tuple."""
    return type(fields)(*(None if field is None else field[rows] for field in fields))


def concatenate(parts: list[Any]) -> Any:
    """The rows of named tuples of one type, in order."""
    return type(parts[0])(*map(torch.cat, zip(*parts, strict=True)))
