"""One pass over chunks of tokens: the student's statistics, the divergence and dloss/dz.

Chunks are `[n, Vp]` logits of this rank's vocab shard. All student logits that are kept stand
relative to the row's maximum: a float32 log-sum-exp of logits near 1e4 would have lost the third
decimal of the loss.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_kd.loss.objective import KDLossConfig, Targets
from nemo_kd.vocab_parallel import LOG2_E, all_reduce_max, all_reduce_sum, vocab_shard_range

# One chunk of tokens in the computing type. On a CPU it is to stay in the cache between the passes
# over it and yet be worth the small operations a chunk costs; on a GPU, worth the launches.
_CHUNK_BYTES = {"cpu": 6 * 2**20, "cuda": 128 * 2**20}


def tokens_per_chunk(shard_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many rows of `shard_size` logits make a chunk."""
    chunk_bytes = _CHUNK_BYTES.get(device.type, _CHUNK_BYTES["cuda"])
    return max(1, chunk_bytes // (shard_size * dtype.itemsize))


class Columns(NamedTuple):
    """Where a row's K entries and, last, its label stand in this rank's vocab shard."""

    column: Tensor  # [N, K + 1] int64, 0 where foreign
    foreign: Tensor  # [N, K + 1] bool: an empty entry, or an id of another shard


class Student(NamedTuple):
    """The student's side of N rows, the same on every rank but for `offset`."""

    logits: (
        Tensor  # [N, K + 1] at the entries and the label, minus the row's maximum; -inf if empty
    )
    log_sum: Tensor  # [N] log sum exp(z - max) over the vocabulary
    log_sum_t: Tensor  # [N] log sum exp((z - max) / T) over the vocabulary
    log_outside: Tensor  # [N] the same outside the entries (tail "bucket"; else log_sum_t)
    offset: Tensor  # [N] this rank's reference minus the row's maximum


def locate_columns(
    ids: Tensor, labels: Tensor, shard_size: int, group: ProcessGroup | None
) -> Columns:
    """`ids` `[N, K]` and `labels` `[N]` as columns of this rank's vocab shard."""
    start, end = vocab_shard_range(shard_size, group)
    all_ids = torch.cat([ids.long(), labels.long()[:, None]], dim=-1)
    foreign = (all_ids < start) | (all_ids >= end)
    return Columns((all_ids - start).masked_fill_(foreign, 0), foreign)


class Local(NamedTuple):
    """What one vocab shard says of N rows. Left out of the sums with tail "bucket": own entries."""

    logits: Tensor  # [N, K + 1] at the entries and the label, -inf where foreign
    peak: Tensor  # [N] the largest logit summed
    sum: Tensor  # [N] sum exp(z - peak)
    sum_t: Tensor  # [N] sum exp((z - peak) / T)


def exponentials(
    logits: Tensor,
    columns: Columns,
    config: KDLossConfig,
    work: Tensor,
    work_t: Tensor,
    peak: Tensor | None = None,
) -> Tensor:
    """Leaves exp(z - peak) in `work` and exp((z - peak) / T) in `work_t`; returns the peak.

    `work` may be the logits' memory; at T = 1 `work_t` is `work`. With tail "bucket" own entries
    are -inf first: what is left is the outside, summed without a difference.
    """
    source = logits
    if logits.dtype != work.dtype or config.tail == "bucket":
        source = work.copy_(logits)
    if config.tail == "bucket":
        # Added, not assigned: a foreign entry stands at column 0 and must change nothing there.
        exclusion = work.new_full((len(work), columns.column.shape[-1] - 1), -torch.inf)
        exclusion.masked_fill_(columns.foreign[:, :-1], 0)
        work.scatter_add_(1, columns.column[:, :-1], exclusion)
    if peak is None:
        peak = source.amax(-1).clamp_(min=torch.finfo(work.dtype).min)  # finite if nothing is left
    torch.sub(source, peak[:, None], out=work)
    if work_t is not work:
        torch.mul(work, LOG2_E / config.temperature, out=work_t).exp2_()
    work.mul_(LOG2_E).exp2_()
    return peak


def measure(
    logits: Tensor, columns: Columns, config: KDLossConfig, work: Tensor, work_t: Tensor
) -> Local:
    """This shard's statistics of a chunk `[n, Vp]`; leaves its exponentials in `work`, `work_t`."""
    gathered = (
        logits.gather(1, columns.column).to(work.dtype).masked_fill_(columns.foreign, -torch.inf)
    )
    peak = exponentials(logits, columns, config, work, work_t)
    total = work.sum(-1)
    return Local(gathered, peak, total, total if work_t is work else work_t.sum(-1))


def combine(local: Local, config: KDLossConfig, group: ProcessGroup | None) -> Student:
    """The statistics over all vocab shards: one all-reduce of K + 2 maxima and one of two sums."""
    maxima = all_reduce_max(torch.cat([local.logits, local.peak[:, None]], dim=-1), group)
    offset = local.peak - maxima[:, -1]
    sums = torch.stack(
        [local.sum * offset.exp(), local.sum_t * (offset / config.temperature).exp()]
    )
    log_sum, log_sum_t = all_reduce_sum(sums, group).log()
    top = maxima.amax(-1)
    below_top = maxima[:, -1] - top
    logits = maxima[:, :-1] - top[:, None]
    log_sum = log_sum + below_top
    log_outside = log_sum_t = log_sum_t + below_top / config.temperature
    if config.tail == "bucket":
        entries = logits[:, :-1]
        log_sum = torch.logaddexp(log_sum, entries.logsumexp(-1))
        log_sum_t = torch.logaddexp(log_outside, (entries / config.temperature).logsumexp(-1))
    return Student(logits, log_sum, log_sum_t, log_outside, local.peak - top)


def _terms(probs: Tensor, log_probs: Tensor, log_others: Tensor) -> Tensor:
    """a (log a - log b), 0 where a is 0."""
    return (probs * (log_probs - log_others)).masked_fill_(probs == 0, 0)


def divergence(student: Student, targets: Targets, config: KDLossConfig) -> tuple[Tensor, Tensor]:
    """D `[N]` and dD/du `[N, K + 1]`, but for the part that is dense in the vocabulary.

    Dense is q for the tails "label" and "drop"; their dD/du here is -t. Derived in docs/loss.md:

        forward_kl   dD/du = s - t
        reverse_kl   dD/du = s (log s - log t - D)
        jsd          dD/du = (1 - beta) s (log s - log m - KL(s||m)),  m = beta t + (1 - beta) s
    """
    absent, probs, log_probs = targets
    scaled = student.logits / config.temperature
    if config.tail == "bucket":
        scaled[:, -1] = student.log_outside
    if config.restricts_student:
        log_s = scaled.masked_fill_(absent, -torch.inf).log_softmax(-1)
    else:
        log_s = scaled.sub_(student.log_sum_t[:, None])
    log_s.masked_fill_(absent, -torch.inf)  # also clears the NaN of a row with no class present
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


def gradient(
    student: Student,
    targets: Targets,
    columns: Columns,
    class_gradient: Tensor,
    config: KDLossConfig,
    token_weights: Tensor | None,
    work: Tensor,
    work_t: Tensor,
) -> None:
    """Turns the exponentials in `work`, `work_t` into dloss/dz of a chunk, in `work`.

        dloss/dz_j = sft_loss_weight * (softmax(z)_j - 1[j = label])
                   + kd_loss_weight * T * (dD/du_j if j is an entry, else the dense part)

    The dense part is 0 for renormalize, dD/du_outside * softmax(z/T over the outside)_j for bucket
    and softmax(z/T)_j for label and drop. `token_weights` `[n]` multiply the rows.
    `class_gradient` (dD/du) is overwritten.
    """
    sparse = class_gradient.mul_(config.kd_loss_weight * config.temperature)
    if config.tail == "bucket":
        # Own entries were left out of the exponentials: their cells hold 0 and get all of theirs.
        softmax = (student.logits[:, :-1] - student.log_sum[:, None]).exp_()
        sparse[:, :-1].add_(softmax, alpha=config.sft_loss_weight)
        dense = sparse[:, -1].clone()
        sparse[:, -1] = 0
    elif config.tail != "renormalize":
        dense = ~targets.absent.all(-1) * (config.kd_loss_weight * config.temperature)
    sparse[:, -1] -= config.sft_loss_weight
    scale = (student.offset - student.log_sum).exp_().mul_(config.sft_loss_weight)
    scale_t = None
    if config.tail != "renormalize":
        # At most 0; if the outside is empty inf or, where T < 1 takes the offset out of float32,
        # NaN, but then `dense` is 0.
        exponent = student.offset / config.temperature - student.log_outside
        exponent = exponent.nan_to_num_(nan=0).clamp_(max=0)
        scale_t = exponent.exp_().mul_(dense)
        if work_t is work:
            scale, scale_t = scale.add_(scale_t), None
    if token_weights is not None:
        sparse.mul_(token_weights[:, None])
        scale.mul_(token_weights)
        scale_t = None if scale_t is None else scale_t.mul_(token_weights)
    work.mul_(scale[:, None])
    if scale_t is not None:
        work.addcmul_(work_t, scale_t[:, None])
    work.scatter_add_(1, columns.column, sparse.masked_fill_(columns.foreign, 0))


def metrics(
    student: Student, targets: Targets, log_probs: Tensor, ids: Tensor, config: KDLossConfig
) -> dict[str, Tensor]:
    """What to watch, at T, `[N]` each; 0 for a row without entries."""
    valid = ids >= 0
    stored = log_probs.to(targets.probs.dtype).masked_fill(~valid, -torch.inf)
    entries = student.logits[:, :-1]
    largest = entries.gather(1, stored.argmax(-1, keepdim=True))[:, 0]
    student_log_probs = entries / config.temperature - student.log_sum_t[:, None]
    return {
        "teacher_topk_mass": stored.exp().sum(-1),
        "student_topk_mass": student_log_probs.exp().sum(-1),
        "teacher_entropy": -_terms(
            targets.probs, targets.log_probs, torch.zeros_like(targets.probs)
        ).sum(-1),
        "top1_agreement": (largest == 0).to(stored.dtype),  # logits are relative to the maximum
    }


def take(fields: Any, rows: slice) -> Any:
    """The same rows of every field of a named tuple."""
    return type(fields)(*(field[rows] for field in fields))


def concatenate(parts: list[Any]) -> Any:
    """The rows of named tuples of one kind, in order."""
    return type(parts[0])(*map(torch.cat, zip(*parts, strict=True)))


def fused_pass(
    read: Callable[[], Iterator[Tensor]],
    write: Callable[[], Iterator[tuple[Tensor, ...]]] | None,
    columns: Columns,
    targets: Targets,
    config: KDLossConfig,
    group: ProcessGroup | None,
    *,
    token_weights: Tensor | None = None,
    keeps: bool = False,
) -> tuple[Tensor, Student]:
    """D `[N]` and the student's statistics; dloss/dz of every chunk if `write` is there.

    `read` walks the chunks of logits; `write` walks them with the memory, maybe their own, that has
    dloss/dz, times `token_weights`, when the walk goes on. A whole vocabulary is walked once. A
    sharded one is walked twice: the rows' normalisers need every shard, and one collective for all
    chunks beats one for each. `keeps` says that the memory of `write` is of the computing type and
    still holds at the second walk what the first put there: the exponentials, at T = 1.
    """
    dtype = targets.probs.dtype
    scratch: dict[str, Tensor] = {}  # allocated when first needed: forming in place needs none

    def memory(name: str, z: Tensor) -> Tensor:
        if name not in scratch:
            scratch[name] = z.new_empty(z.shape, dtype=dtype)
        return scratch[name][: len(z)]

    def working_memory(z: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
        work = out if out is not None and out.dtype == dtype else memory("work", z)
        return work, work if config.temperature == 1 else memory("work_t", z)

    def walk(writes: bool) -> Iterator[tuple[Any, ...]]:
        return write() if writes and write else ((z, None) for z in read())

    keeps = keeps and config.temperature == 1
    local: Local | None = None
    if group is not None:
        parts, begin = [], 0
        for z, out in walk(keeps):
            rows = slice(begin, begin := begin + len(z))
            parts.append(measure(z, take(columns, rows), config, *working_memory(z, out)))
        local = concatenate(parts)
        whole = combine(local, config, group)
        if write is None:
            return divergence(whole, targets, config)[0], whole

    values, students, begin = [], [], 0
    for z, out in walk(True):
        rows = slice(begin, begin := begin + len(z))
        chunk_columns, chunk_targets = take(columns, rows), take(targets, rows)
        work, work_t = working_memory(z, out)
        if local is None:
            student = combine(measure(z, chunk_columns, config, work, work_t), config, None)
        else:
            student = take(whole, rows)
            if not keeps:
                exponentials(z, chunk_columns, config, work, work_t, local.peak[rows])
        value, class_gradient = divergence(student, chunk_targets, config)
        if out is not None:
            weights = None if token_weights is None else token_weights[rows]
            gradient(
                student,
                chunk_targets,
                chunk_columns,
                class_gradient,
                config,
                weights,
                work,
                work_t,
            )
            if work is not out:
                out.copy_(work)
        values.append(value)
        students.append(student)
    return torch.cat(values), concatenate(students)
