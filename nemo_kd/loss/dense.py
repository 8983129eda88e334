"""The loss as a plain reading of its formula. Read this file first.

Every vocab shard is gathered (`logits_gather="full"`), autograd forms the gradient, and no memory
is saved. It is the check of the fused passes and the fallback when something looks wrong.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_kd.loss.objective import KDLossConfig, Targets, weighted_sum
from nemo_kd.loss.prepare import Rows, Student
from nemo_kd.vocab_parallel import all_gather, vocab_shard_range


def dense_loss(
    logits: Tensor, rows: Rows, config: KDLossConfig, group: ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor, Student]:
    """Loss, KD loss and SFT loss `[N]` and the student's statistics, from logits `[..., Vp]`."""
    gathered = _GatherVocab.apply(logits, group)  # type: ignore[no-untyped-call] # torch's own
    z = gathered.reshape(-1, gathered.shape[-1]).to(rows.targets.probs.dtype)
    top = z.amax(-1, keepdim=True).detach()
    scaled = (z - top) / config.temperature
    columns = torch.cat([rows.ids.clamp(min=0), rows.labels[:, None]], dim=-1)
    own = z.gather(1, columns)  # the student's logits at the entries and at the label
    log_outside = _log_sum_outside(scaled, rows.ids)
    if config.restricts_student:
        log_s = _restricted(own[:, :-1], log_outside, top, rows.targets.absent, config)
    else:
        log_s = scaled.log_softmax(-1).gather(1, columns)
    kd_loss = config.temperature**2 * _divergence(log_s, rows.targets, config)
    sft_loss = F.cross_entropy(z - top, rows.labels, reduction="none")
    loss = weighted_sum(kd_loss, sft_loss, config)
    is_empty = F.pad(rows.ids < 0, (0, 1))
    student = Student(
        logits=own.detach().masked_fill(is_empty, -torch.inf),
        top=top[:, 0],
        log_sum=(z - top).detach().logsumexp(-1),
        log_sum_t=scaled.detach().logsumexp(-1),
        log_outside=log_outside[:, 0].detach(),
        offset=torch.zeros_like(sft_loss),
    )
    return loss, kd_loss.detach(), sft_loss.detach(), student


def _restricted(
    entries: Tensor, log_outside: Tensor, top: Tensor, absent: Tensor, config: KDLossConfig
) -> Tensor:
    """log s `[N, K + 1]`, normalised over the row's classes: the entries and their outside."""
    # Relative to the largest of the classes, as in chunk.divergence, so that no difference between
    # them is rounded where the vocabulary's largest logit lies far above them.
    largest = entries.detach().masked_fill(absent[:, :-1], -torch.inf).amax(-1, keepdim=True)
    largest = largest.where(largest > -torch.inf, top)
    outside = log_outside + (top - largest) / config.temperature
    classes = torch.cat([(entries - largest) / config.temperature, outside], dim=-1)
    return classes.masked_fill(absent, -torch.inf).log_softmax(-1)


def _divergence(log_s: Tensor, targets: Targets, config: KDLossConfig) -> Tensor:
    """D(t, s) `[N]`, with 0 log 0 = 0; `log_s` `[N, K + 1]` are the student's classes."""
    absent, t, log_t = targets
    # An absent class has s = t = 0 and adds nothing.
    log_s = log_s.masked_fill(absent, 0)
    s = log_s.exp().masked_fill(absent, 0)
    log_t_or_0 = log_t.masked_fill(t == 0, 0)
    if config.divergence == "forward_kl":
        return (t * (log_t_or_0 - log_s)).sum(-1)
    if config.divergence == "reverse_kl":
        # Of the classes that are present none has t = 0: make_targets removes these.
        return (s * (log_s - log_t.masked_fill(absent, 0))).sum(-1)
    beta = config.jsd_beta
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    return (beta * t * (log_t_or_0 - log_m) + (1 - beta) * s * (log_s - log_m)).sum(-1)


def _log_sum_outside(scaled: Tensor, ids: Tensor) -> Tensor:
    """log sum exp of `scaled` `[N, V]` over the ids that are no entries of the row, `[N, 1]`."""
    vocab_size = scaled.shape[-1]
    # One more column takes the empty entries, whose id is -1.
    is_entry = torch.zeros(len(ids), vocab_size + 1, dtype=torch.bool, device=ids.device)
    is_entry.scatter_(1, ids.where(ids >= 0, vocab_size), True)
    lowest = torch.finfo(scaled.dtype).min  # autograd would make NaN of a row of -inf only
    return scaled.masked_fill(is_entry[:, :-1], lowest).logsumexp(-1, keepdim=True)


class _GatherVocab(torch.autograd.Function):
    """`[..., Vp]` to `[..., V]`; backward takes this rank's slice of the gradient.

    Every rank computes the same loss from the same gathered logits, so that its gradient is
    already whole: a sum over the ranks would count it TP times.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.range = vocab_shard_range(logits.shape[-1], group)
        # The only collective: every rank gets all the logits.
        return torch.cat(all_gather(logits, group), dim=-1)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        start, end = ctx.range
        # A copy, so that the memory of the whole vocabulary's gradient can be freed.
        return grad_output[..., start:end].contiguous(), None
