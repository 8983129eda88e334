"""Top-K distillation and cross entropy on vocab-parallel logits, in two steps.

`vocab_parallel_kd_sft_loss` takes the logits. `vocab_parallel_linear_kd_sft_loss` starts one layer
earlier, from hidden states and the output layer's weight, and never holds all the logits. Both
fronts use one `prepare` and one `assemble`. Between the two stands the formula as it is written
(dense.py) or the fused passes (fused.py, linear.py). docs/loss.md derives every gradient.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_kd.loss.chunk import locate
from nemo_kd.loss.dense import dense_loss
from nemo_kd.loss.fused import FusedLoss
from nemo_kd.loss.linear import FusedLinearLoss
from nemo_kd.loss.objective import KDLossConfig, KDLossOutput
from nemo_kd.loss.prepare import Student, assemble, prepare
from nemo_kd.vocab_parallel import num_vocab_shards

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
        student_logits: `[..., Vp]`, this rank's vocab shard; any float type, any strides.
        labels: `[...]` int64, ids in the whole vocabulary, also where the caller masks the token.
        teacher_topk_log_probs: `[..., K]` float, log of the teacher's softmax over its vocabulary.
        teacher_topk_ids: `[..., K]` int, ids in the whole vocabulary, in any order, each at most
            once a row; -1 marks an empty entry.
        teacher_tail_log_probs: `[...]` float, log of the mass outside; bucket and label read it.
        config: the objective.
        tp_group: the ranks that share the vocabulary; None if it is not sharded.
        inplace: the memory of the logits becomes that of the gradient (logits_gather="topk"). Then
            nobody may read the logits again, and backward may run once. Under no_grad nothing is
            written.

    Returns:
        `[...]` each, float32 (float64 for float64 logits), the same on every rank: `loss`,
        differentiable in the logits; `kd_loss` (T^2 in it), `sft_loss` and `metrics`, detached.

    Raises:
        ValueError: see `prepare`, and `engine_for` in fused.py.

    docs/loss.md has the collectives, the edges and the sources: Hinton et al., arXiv 1503.02531
    (T^2); Sparse Logit Sampling, arXiv 2503.16870 (tail "label"); Agarwal et al., arXiv 2306.13649.
    """
    vocab_size = student_logits.shape[-1] * num_vocab_shards(tp_group)
    teacher = (teacher_topk_log_probs, teacher_topk_ids, teacher_tail_log_probs)
    shape = student_logits.shape[:-1]
    rows = prepare(shape, vocab_size, labels, *teacher, config, student_logits.dtype)
    # A group of one moves nothing: it is the same as no group.
    tp_group = tp_group if num_vocab_shards(tp_group) > 1 else None
    if config.logits_gather == "full":
        loss, kd_loss, sft_loss, student = dense_loss(student_logits, rows, config, tp_group)
    else:
        classes = locate(rows, student_logits.shape[-1], tp_group)
        # Inside forward autograd is always off: whether a backward will come is asked here.
        needs_grad = torch.is_grad_enabled() and student_logits.requires_grad
        loss, kd_loss, sft_loss, *fields = FusedLoss.apply(  # type: ignore[no-untyped-call] # torch's own
            student_logits, classes, config, tp_group, inplace, needs_grad
        )
        student = Student(*fields)
    return assemble(loss.view(shape), kd_loss, sft_loss, student, rows, config)


def vocab_parallel_linear_kd_sft_loss(
    hidden: Tensor,
    output_weight: Tensor,
    labels: Tensor,
    teacher_topk_log_probs: Tensor,
    teacher_topk_ids: Tensor,
    teacher_tail_log_probs: Tensor | None = None,
    *,
    token_weights: Tensor,
    config: KDLossConfig,
    tp_group: ProcessGroup | None = None,
    sequence_parallel: bool = False,
) -> KDLossOutput:
    """`sum(token_weights * loss(hidden @ output_weight^T))`, loss as vocab_parallel_kd_sft_loss.

    Args:
        hidden: `[S, B, H]`, the same on every rank; `[S/TP, B, H]` with sequence parallelism.
        output_weight: `[Vp, H]`, this rank's vocab shard, tied to the embedding or not.
        labels: and the teacher's rows: `[S, B]` and `[S, B, K]`, as for vocab_parallel_kd_sft_loss.
        token_weights: `[S, B]` float32, the loss mask over its normaliser; carries no gradient.
        config: the objective; logits_gather="topk".
        tp_group: the ranks that share the vocabulary; None if it is not sharded.
        sequence_parallel: whether `hidden` is split along S over `tp_group`.

    Returns:
        `loss`, a float32 scalar, differentiable in `hidden` and `output_weight`, whose backward may
        run once; `kd_loss`, `sft_loss` and `metrics`, `[S, B]` each, detached.

    Raises:
        ValueError: see `prepare` and `engine_for`; or token_weights has another shape, or
            logits_gather is "full".
    """
    if config.logits_gather == "full":
        raise ValueError(
            "expected logits_gather=topk with the output layer fused in, got full, which needs "
            "all the logits; use vocab_parallel_kd_sft_loss for it"
        )
    num_shards = num_vocab_shards(tp_group)
    shape = torch.Size(
        (len(hidden) * (num_shards if sequence_parallel else 1), *hidden.shape[1:-1])
    )
    teacher = (teacher_topk_log_probs, teacher_topk_ids, teacher_tail_log_probs)
    vocab_size = len(output_weight) * num_shards
    rows = prepare(shape, vocab_size, labels, *teacher, config, hidden.dtype)
    if token_weights.shape != shape:
        raise ValueError(
            f"expected token_weights of shape {tuple(shape)}, one per label; "
            f"got {tuple(token_weights.shape)}"
        )
    tp_group = tp_group if num_shards > 1 else None
    weights = token_weights.detach().reshape(-1).to(rows.targets.probs.dtype)
    classes = locate(rows, len(output_weight), tp_group)
    needs_grad = torch.is_grad_enabled()
    loss, kd_loss, sft_loss, *fields = FusedLinearLoss.apply(  # type: ignore[no-untyped-call] # torch's own
        hidden, output_weight, classes, weights, config, tp_group, sequence_parallel, needs_grad
    )
    return assemble(loss, kd_loss, sft_loss, Student(*fields), rows, config)
