"""Top-K distillation and cross entropy on vocab-parallel logits, in one fused pass.

`vocab_parallel_kd_sft_loss` is the front. Its default way reads the logits in chunks of tokens
that stay in the processor's cache and forms the gradient while a chunk is at hand;
`logits_gather="full"` is the formula read plainly on the whole vocabulary, check and fallback.
`vocab_parallel_linear_kd_sft_loss` starts one layer earlier and never holds the logits.
docs/loss.md derives every gradient.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_kd.loss.fused import (
    Columns,
    Student,
    fused_pass,
    locate_columns,
    metrics,
    tokens_per_chunk,
)
from nemo_kd.loss.linear import vocab_parallel_linear_kd_sft_loss
from nemo_kd.loss.objective import KDLossConfig, KDLossOutput, Targets, check_inputs, flatten_rows
from nemo_kd.vocab_parallel import all_gather, num_vocab_shards, vocab_shard_range

__all__ = [
    "KDLossConfig",
    "KDLossOutput",
    "vocab_parallel_kd_sft_loss",
    "vocab_parallel_linear_kd_sft_loss",
]


def vocab_parallel_kd_sft_loss(
    student_logits: Tensor,
    labels: Tensor,
    teacher_topk_log_probs: Tensor,
    teacher_topk_ids: Tensor,
    teacher_tail_log_probs: Tensor | None = None,
    *,
    config: KDLossConfig,
    tp_group: ProcessGroup | None = None,
    inplace: bool = False,
) -> KDLossOutput:
    """`kd_loss_weight * T^2 * D(teacher, student) + sft_loss_weight * -log softmax(z)[label]`.

    Args:
        student_logits: `[..., Vp]`, this rank's vocab shard, any float type and any strides.
            float64 is computed in float64, everything else in float32.
        labels: `[...]` int64, ids in the whole vocabulary, also where the caller masks the token.
        teacher_topk_log_probs: `[..., K]` float, log of the teacher's softmax over its vocabulary.
        teacher_topk_ids: `[..., K]` int, ids in the whole vocabulary, each at most once a row; -1
            marks an empty entry. Any order.
        teacher_tail_log_probs: `[...]` float, log of the mass outside; read by bucket and label.
        config: the objective.
        tp_group: ranks that share the vocabulary; None if it is not sharded.
        inplace: the logits' memory becomes the gradient's (logits_gather="topk"). Then they must
            not be read again, and backward may run once. Without a gradient to form, and so under
            no_grad, nothing is written.

    Returns:
        `[...]` each, float32 (float64 for float64 logits): `loss`, differentiable in the logits;
        `kd_loss` (T^2 in it), `sft_loss` and `metrics`, detached. The same on every rank.

    Collectives: logits_gather="topk" two all-reduces forward (K + 2 maxima and 2 sums a token),
    none backward; "full" one all-gather of the logits. The gradient is each rank's slice of the
    dense gradient. Repeated ids are refused where ids are checked, and by the cache's writer;
    elsewhere (CUDA without NEMO_KD_DEBUG=1) each occurrence is a class of its own, and with tail
    bucket counts in the cross entropy's sum, too.

    Raises:
        ValueError: shapes do not fit, the tail is missing, or (CPU, or NEMO_KD_DEBUG=1) an id or a
            label is outside the vocabulary or a row names an id twice.

    Sources: distillation and T^2, Hinton et al., arXiv 1503.02531; tail "label", Sparse Logit
    Sampling, arXiv 2503.16870; jsd, Agarwal et al., arXiv 2306.13649.
    """
    leading_shape = student_logits.shape[:-1]
    vocab_size = student_logits.shape[-1] * num_vocab_shards(tp_group)
    check_inputs(
        leading_shape,
        vocab_size,
        labels,
        teacher_topk_log_probs,
        teacher_topk_ids,
        teacher_tail_log_probs,
        config,
    )
    # A group of one moves nothing, and the whole vocabulary is read once.
    tp_group = tp_group if num_vocab_shards(tp_group) > 1 else None
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    labels, log_probs, ids, targets = flatten_rows(
        labels,
        teacher_topk_log_probs,
        teacher_topk_ids,
        teacher_tail_log_probs,
        vocab_size,
        config,
        dtype,
    )
    if config.logits_gather == "full":
        loss, kd_loss, sft_loss, student = _dense_loss(
            student_logits, labels, ids, targets, config, tp_group, dtype
        )
    else:
        columns = locate_columns(ids, labels, student_logits.shape[-1], tp_group)
        gradients = None
        if torch.is_grad_enabled() and student_logits.requires_grad:
            gradients = student_logits.detach() if inplace else torch.empty_like(student_logits)
        loss, kd_loss, sft_loss, *student_fields = _FusedLoss.apply(  # type: ignore[no-untyped-call] # torch's own
            student_logits, gradients, columns, targets, config, tp_group, inplace
        )
        student = Student(*student_fields)
    values = metrics(student, targets, log_probs, ids, config)
    return KDLossOutput(
        loss.view(leading_shape),
        kd_loss.view(leading_shape),
        sft_loss.view(leading_shape),
        {name: value.view(leading_shape) for name, value in values.items()},
    )


def _chunks(num_tokens: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views `[n, Vp]`, n <= `num_tokens`, of `[..., Vp]` tensors, in the order of the tokens."""
    try:
        flat = [tensor.view(-1, tensor.shape[-1]) for tensor in tensors]
    except RuntimeError:  # strides that no flat view has: one dimension down, rather than copy
        for parts in zip(*tensors, strict=True):
            yield from _chunks(num_tokens, *parts)
        return
    for begin in range(0, max(1, len(flat[0])), num_tokens):
        yield tuple(tensor[begin : begin + num_tokens] for tensor in flat)


class _FusedLoss(torch.autograd.Function):
    """loss `[N]` with its gradient formed in the forward pass.

    backward: dL/dz_j = dL/dloss * dloss/dz_j; `gradient` gave dloss/dz_j, both weights in it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        gradients: Tensor | None,
        columns: Columns,
        targets: Targets,
        config: KDLossConfig,
        group: ProcessGroup | None,
        inplace: bool,
    ) -> tuple[Tensor, ...]:
        num_tokens = tokens_per_chunk(logits.shape[-1], targets.probs.dtype, logits.device)

        write = None if gradients is None else partial(_chunks, num_tokens, logits, gradients)
        value, student = fused_pass(
            lambda: (z for (z,) in _chunks(num_tokens, logits)),
            write,
            columns,
            targets,
            config,
            group,
            keeps=gradients is not None and gradients.dtype == targets.probs.dtype,
        )
        kd_loss = value * config.temperature**2
        sft_loss = student.log_sum - student.logits[:, -1]
        loss = config.kd_loss_weight * kd_loss + config.sft_loss_weight * sft_loss
        ctx.mark_non_differentiable(kd_loss, sft_loss, *student)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradients)
        ctx.inplace, ctx.num_tokens = inplace, num_tokens
        return loss, kd_loss, sft_loss, *student

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        weights = grad_outputs[0]
        if weights is None:
            return (None,) * 7
        (gradients,) = ctx.saved_tensors
        # Not inplace: the saved gradient stays whole, so that the graph may be walked again.
        scaled = gradients if ctx.inplace else torch.empty_like(gradients)
        scratch: Tensor | None = None
        begin = 0
        for source, out in _chunks(ctx.num_tokens, gradients, scaled):
            weight = weights[begin : begin + len(source), None]
            begin += len(source)
            if source.dtype == weight.dtype:
                torch.mul(source, weight, out=out)
            else:  # in float32: a weight rounded to bfloat16 would be off for its whole row
                scratch = (
                    source.float() if scratch is None else scratch[: len(source)].copy_(source)
                )
                out.copy_(scratch.mul_(weight))
        return scaled, *(None,) * 6


class _GatherVocab(torch.autograd.Function):
    """`[..., Vp]` to `[..., V]`; backward: this rank's slice, which is whole on every rank."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.range = vocab_shard_range(logits.shape[-1], group)
        return torch.cat(all_gather(logits, group), dim=-1)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        start, end = ctx.range
        return grad_output[..., start:end].contiguous(), None


def _dense_loss(
    logits: Tensor,
    labels: Tensor,
    ids: Tensor,
    targets: Targets,
    config: KDLossConfig,
    group: ProcessGroup | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Student]:
    """The formula as it stands, by autograd, on the gathered logits `[N, V]`."""
    gathered = _GatherVocab.apply(logits, group)  # type: ignore[no-untyped-call] # torch's own
    z = gathered.reshape(-1, gathered.shape[-1]).to(dtype)
    z = z - z.amax(-1, keepdim=True).detach()
    sft_loss = F.cross_entropy(z, labels, reduction="none")
    log_q = (z / config.temperature).log_softmax(-1)
    lowest = torch.finfo(dtype).min  # -inf would come back from autograd as NaN
    is_entry = torch.zeros(len(z), z.shape[-1] + 1, dtype=torch.bool, device=z.device)
    is_entry = is_entry.scatter_(1, ids.long().where(ids >= 0, z.shape[-1]), True)[:, :-1]
    log_outside = log_q.masked_fill(is_entry, lowest).logsumexp(-1, keepdim=True)
    log_label = log_q.gather(1, labels[:, None])
    extra = log_outside if config.tail == "bucket" else log_label
    log_s = torch.cat([log_q.gather(1, ids.long().clamp(min=0)), extra], dim=-1)
    absent, probs, log_probs = targets
    if config.restricts_student:
        log_s = log_s.masked_fill(absent, lowest).log_softmax(-1)
    log_s = log_s.masked_fill(absent, 0)
    s = log_s.exp().masked_fill(absent, 0)
    log_t = log_probs.masked_fill(probs == 0, 0)
    if config.divergence == "forward_kl":
        kd_loss = (probs * (log_t - log_s)).sum(-1)
    elif config.divergence == "reverse_kl":
        kd_loss = (s * (log_s - log_probs.masked_fill(absent, 0))).sum(-1)
    else:
        beta = config.jsd_beta
        log_m = torch.logaddexp(
            log_probs.clamp(min=lowest) + math.log(beta), log_s + math.log1p(-beta)
        )
        kd_loss = (beta * probs * (log_t - log_m) + (1 - beta) * s * (log_s - log_m)).sum(-1)
    kd_loss = kd_loss * config.temperature**2
    loss = config.kd_loss_weight * kd_loss + config.sft_loss_weight * sft_loss
    at = z.detach()
    student = Student(
        logits=at.gather(1, locate_columns(ids, labels, at.shape[-1], None).column).masked_fill(
            torch.cat([ids < 0, torch.zeros_like(labels[:, None], dtype=torch.bool)], -1),
            -torch.inf,
        ),
        log_sum=at.logsumexp(-1),
        log_sum_t=(at / config.temperature).logsumexp(-1),
        log_outside=log_outside[:, 0].detach(),
        offset=torch.zeros_like(sft_loss),
    )
    return loss, kd_loss.detach(), sft_loss.detach(), student
