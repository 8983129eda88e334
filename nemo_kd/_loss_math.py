"""What both losses share: settings, the teacher's targets, the student's statistics, gradients.

A row has K entries and one class more. The extra class is the label (tail "label"), everything
outside the entries (tail "bucket") or absent. With z the student's logits, T the temperature and
u the classes' logits at T, every mode is a divergence D between targets t and s = softmax(u), and

    loss = kd_loss_weight * T^2 * D(t, s) + sft_loss_weight * CE

All student logits are kept relative to the row's maximum: a float32 log-sum-exp of logits near 1e4
would have lost the third decimal of the loss.
"""

import math
import os
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_kd.vocab_parallel import all_reduce_max, all_reduce_sum, vocab_shard_range

_CHOICES = {
    "divergence": ("forward_kl", "reverse_kl", "jsd"),
    "tail": ("renormalize", "bucket", "label", "drop"),
    "logits_gather": ("topk", "full"),
}


@dataclass(frozen=True)
class KDLossConfig:
    """Which divergence, over which classes, at which temperature and weight.

    Raises:
        ValueError: a field is out of its range, or the combination has no meaning.
    """

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    tail: Literal["renormalize", "bucket", "label", "drop"] = "renormalize"
    temperature: float = 1.0
    jsd_beta: float = 0.5  # m = beta * teacher + (1 - beta) * student; read by jsd alone
    kd_loss_weight: float = 1.0
    sft_loss_weight: float = 0.4
    logits_gather: Literal["topk", "full"] = "topk"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"expected {name} one of {', '.join(choices)}; got {getattr(self, name)!r}"
                )
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"expected temperature > 0, got {self.temperature}; 1.0 leaves logits as they are"
            )
        if not 0 < self.jsd_beta < 1:
            raise ValueError(
                f"expected 0 < jsd_beta < 1, got {self.jsd_beta}; "
                "use divergence forward_kl or reverse_kl for its two limits"
            )
        for name in ("kd_loss_weight", "sft_loss_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"expected {name} >= 0, got {getattr(self, name)}; 0 turns it off")
        if self.kd_loss_weight == 0 and self.sft_loss_weight == 0:
            raise ValueError(
                "expected kd_loss_weight or sft_loss_weight above 0, got 0 for both; "
                "there would be nothing to learn"
            )
        if self.divergence != "forward_kl" and self.tail in ("label", "drop"):
            raise ValueError(
                f"divergence={self.divergence} with tail={self.tail}: the student is spread over "
                "the whole vocabulary and the target is 0 on most of it, where the divergence is "
                "infinite or blind; use tail renormalize or bucket, or divergence forward_kl"
            )

    @property
    def restricts_student(self) -> bool:
        """Whether the student is a distribution over the row's classes, not over the vocabulary."""
        return self.tail in ("renormalize", "bucket")


class KDLossOutput(NamedTuple):
    """The losses and the metrics; only `loss` carries a gradient."""

    loss: Tensor
    kd_loss: Tensor
    sft_loss: Tensor
    metrics: dict[str, Tensor]


class Columns(NamedTuple):
    """Where a row's K entries and, last, its label stand in this rank's vocab shard."""

    column: Tensor  # [N, K + 1] int64, 0 where not own
    own: Tensor  # [N, K + 1] bool, False for empty entries and for ids of other shards


class Targets(NamedTuple):
    """The teacher's side of N rows; nothing of the student in it. Classes as the module says."""

    present: Tensor  # [N, K + 1] bool, the classes the divergence runs over
    probs: Tensor  # [N, K + 1], 0 where absent, sums to 1 or, in a row without any, to 0
    log_probs: Tensor  # [N, K + 1], -inf where probs is 0 by definition


class Student(NamedTuple):
    """The student's side of N rows, the same on every rank but for `offset`."""

    logits: (
        Tensor  # [N, K + 1] at the entries and the label, minus the row's maximum; -inf if empty
    )
    log_sum: Tensor  # [N] log sum exp(z - max) over the vocabulary
    log_sum_t: Tensor  # [N] log sum exp((z - max) / T) over the vocabulary
    log_outside: Tensor  # [N] the same outside the entries (tail "bucket"; else log_sum_t)
    offset: Tensor  # [N] this rank's reference minus the row's maximum


def check_inputs(
    leading_shape: torch.Size,
    vocab_size: int,
    labels: Tensor,
    log_probs: Tensor,
    ids: Tensor,
    tail_log_probs: Tensor | None,
    config: KDLossConfig,
) -> None:
    """Shapes always; ids on CPU always and on CUDA if NEMO_KD_DEBUG=1, since it synchronises.

    Raises:
        ValueError: a shape does not fit, the tail is missing, an id or a label is outside the
            vocabulary, or a row names an id twice.
    """
    if ids.dim() == 0 or ids.shape[-1] < 1 or ids.shape[:-1] != leading_shape:
        raise ValueError(
            f"expected teacher_topk_ids of shape {tuple(leading_shape)} + (K,) with K >= 1, as the "
            f"student's leading dimensions are; got {tuple(ids.shape)}"
        )
    if log_probs.shape != ids.shape:
        raise ValueError(
            f"expected teacher_topk_log_probs of the ids' shape {tuple(ids.shape)}; "
            f"got {tuple(log_probs.shape)}"
        )
    if labels.shape != leading_shape:
        raise ValueError(
            f"expected labels of shape {tuple(leading_shape)}, one per row of student logits; "
            f"got {tuple(labels.shape)}"
        )
    if config.tail in ("bucket", "label"):
        if tail_log_probs is None:
            raise ValueError(
                f"expected teacher_tail_log_probs with tail={config.tail}, got None; "
                "pass the cache's tail_log_probs or use tail renormalize or drop"
            )
        if tail_log_probs.shape != leading_shape:
            raise ValueError(
                f"expected teacher_tail_log_probs of shape {tuple(leading_shape)}; "
                f"got {tuple(tail_log_probs.shape)}"
            )
    if ids.numel() == 0 or (ids.is_cuda and os.environ.get("NEMO_KD_DEBUG") != "1"):
        return
    for name, values, low in (("teacher_topk_ids", ids, -1), ("labels", labels, 0)):
        smallest, largest = (int(value) for value in values.aminmax())
        if smallest < low or largest >= vocab_size:
            wrong = smallest if smallest < low else largest
            raise ValueError(
                f"expected {name} from {low} to {vocab_size - 1}, got {wrong}; the student's "
                f"vocabulary has V={vocab_size} entries; dump a cache with the student's tokenizer"
            )
    ordered = ids.sort(dim=-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if twice.any():
        raise ValueError(
            f"expected each id at most once a row, got {int(ordered[..., 1:][twice][0])} twice; "
            "merge repeated entries and mark the freed ones with id -1"
        )


def locate_columns(
    ids: Tensor, labels: Tensor, shard_size: int, group: ProcessGroup | None
) -> Columns:
    """`ids` `[N, K]` and `labels` `[N]` as columns of this rank's vocab shard."""
    start, end = vocab_shard_range(shard_size, group)
    all_ids = torch.cat([ids.long(), labels.long()[:, None]], dim=-1)
    own = (all_ids >= start) & (all_ids < end)
    return Columns((all_ids - start).masked_fill_(~own, 0), own)


def make_targets(
    log_probs: Tensor,
    ids: Tensor,
    tail_log_probs: Tensor | None,
    labels: Tensor,
    vocab_size: int,
    config: KDLossConfig,
    dtype: torch.dtype,
) -> Targets:
    """The table of `docs/loss.md`: entries and extra class, normalised in log space.

    Storage rounds, so that the stored mass may exceed 1: normalising comes last.
    """
    valid = ids >= 0
    entries = log_probs.to(dtype).masked_fill(~valid, -torch.inf)
    extra = entries.new_full((len(ids), 1), -torch.inf)
    has_extra = torch.zeros_like(valid[:, :1])
    if config.tail == "renormalize":
        entries = entries / config.temperature
    elif config.tail == "bucket":
        assert tail_log_probs is not None
        # Entries that are the whole vocabulary leave no outside, whatever rounding put in the tail.
        has_extra = valid.sum(-1, keepdim=True) < vocab_size
        extra = tail_log_probs.to(dtype)[:, None].masked_fill(~has_extra, -torch.inf)
    elif config.tail == "label":
        assert tail_log_probs is not None
        has_extra = torch.ones_like(has_extra)
        is_label = ids == labels[:, None]
        own_mass = entries.masked_fill(~is_label, -torch.inf)
        extra = torch.cat([tail_log_probs.to(dtype)[:, None], own_mass], -1).logsumexp(-1, True)
        entries = entries.masked_fill(is_label, -torch.inf)
    classes = torch.cat([entries, extra], dim=-1)
    total = classes.logsumexp(-1, keepdim=True)
    present = torch.cat([valid, has_extra], dim=-1)
    present &= valid.any(-1, keepdim=True) & (total > -torch.inf)
    if config.divergence == "reverse_kl":
        present &= classes > -torch.inf
    target = (classes - total).masked_fill(~present, -torch.inf)
    return Targets(present, target.exp(), target)


class Local(NamedTuple):
    """What one vocab shard says of N rows. Left out of the sums with tail "bucket": own entries."""

    logits: Tensor  # [N, K + 1] at the entries and the label, -inf where not own
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
        # Added, not assigned: an entry that is not own stands at column 0 and must change nothing.
        exclusion = torch.zeros_like(columns.column[:, :-1], dtype=work.dtype)
        exclusion.masked_fill_(columns.own[:, :-1], -torch.inf)
        work.scatter_add_(1, columns.column[:, :-1], exclusion)
    if peak is None:
        peak = source.amax(-1).clamp_(min=torch.finfo(work.dtype).min)  # finite if nothing is left
    torch.sub(source, peak[:, None], out=work)
    if work_t is not work:
        torch.div(work, config.temperature, out=work_t).exp_()
    work.exp_()
    return peak


def measure(
    logits: Tensor, columns: Columns, config: KDLossConfig, work: Tensor, work_t: Tensor
) -> Local:
    """This shard's statistics of a chunk `[n, Vp]`; leaves its exponentials in `work`, `work_t`."""
    gathered = (
        logits.gather(1, columns.column).to(work.dtype).masked_fill_(~columns.own, -torch.inf)
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
    present, probs, log_probs = targets
    scaled = student.logits / config.temperature
    if config.tail == "bucket":
        scaled[:, -1] = student.log_outside
    if config.restricts_student:
        log_s = scaled.masked_fill_(~present, -torch.inf).log_softmax(-1)
    else:
        log_s = scaled.sub_(student.log_sum_t[:, None])
    log_s.masked_fill_(~present, -torch.inf)  # also clears the NaN of a row with no class present
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
    work: Tensor,
    work_t: Tensor,
) -> None:
    """Turns the exponentials in `work`, `work_t` into dloss/dz of a chunk, in `work`.

        dloss/dz_j = sft_loss_weight * (softmax(z)_j - 1[j = label])
                   + kd_loss_weight * T * (dD/du_j if j is an entry, else the dense part)

    The dense part is 0 for renormalize, dD/du_outside * softmax(z/T over the outside)_j for bucket
    and softmax(z/T)_j for label and drop. `class_gradient` (dD/du) is overwritten.
    """
    sparse = class_gradient.mul_(config.kd_loss_weight * config.temperature)
    if config.tail == "bucket":
        # Own entries were left out of the exponentials: their cells hold 0 and get all of theirs.
        softmax = (student.logits[:, :-1] - student.log_sum[:, None]).exp_()
        sparse[:, :-1].add_(softmax, alpha=config.sft_loss_weight)
        dense = sparse[:, -1].clone()
        sparse[:, -1] = 0
    else:
        dense = targets.present.any(-1) * (config.kd_loss_weight * config.temperature)
    sparse[:, -1] -= config.sft_loss_weight
    scale = (student.offset - student.log_sum).exp_().mul_(config.sft_loss_weight)
    if config.tail != "renormalize":
        # At most 0 unless the outside is empty (inf), and then `dense` is 0.
        exponent = (student.offset / config.temperature - student.log_outside).clamp_(max=0)
        scale_t = exponent.exp_().mul_(dense)
        if work_t is work:
            scale = scale + scale_t
    work.mul_(scale[:, None])
    if config.tail != "renormalize" and work_t is not work:
        work.addcmul_(work_t, scale_t[:, None])
    work.scatter_add_(1, columns.column, sparse.masked_fill_(~columns.own, 0))


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
