"""The loss with the output layer fused in: hidden states go in, the logits are never all there."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_kd.loss.fused import Student, fused_pass, locate_columns, metrics, tokens_per_chunk
from nemo_kd.loss.objective import KDLossConfig, KDLossOutput, check_inputs, flatten_rows
from nemo_kd.vocab_parallel import (
    all_gather,
    all_reduce_sum,
    num_vocab_shards,
    reduce_scatter_sum,
)

# Logits that exist at a time. Large, for each block reads and writes the weight's whole gradient.
_BLOCK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
# A half-precision product is added to the float32 gradient in pieces, or it would be a second one.
_IDS_PER_PRODUCT = 8192


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
        tp_group: ranks that share the vocabulary; None if it is not sharded.
        sequence_parallel: whether `hidden` is split along S over `tp_group`.

    Returns:
        `loss`, a float32 scalar, differentiable in `hidden` and `output_weight`; `kd_loss`,
        `sft_loss` and `metrics`, `[S, B]` each, detached.

    Both gradients are formed in the forward pass, block by block, so that beside inputs and their
    gradients one block of logits is all there is, and in half precision the float32 sum of the
    weight's gradient; at TP > 1 a block's logits are computed twice. Logits have the type of
    `hidden`. backward only scales, and may run once. Where Megatron's DDP keeps
    `output_weight.main_grad`, the gradient is added there and the parameter marked, as its own
    linear layers do.

    Collectives: two all-reduces of K + 4 numbers a token, and one of the hidden gradient (with
    sequence parallelism a gather of `hidden` and a reduce-scatter of its gradient); none backward.

    Raises:
        ValueError: as vocab_parallel_kd_sft_loss; or logits_gather is "full".
    """
    if config.logits_gather == "full":
        raise ValueError(
            "expected logits_gather=topk with the output layer fused in, got full, which needs "
            "all the logits; use vocab_parallel_kd_sft_loss for it"
        )
    tp_group = tp_group if num_vocab_shards(tp_group) > 1 else None
    sequence_parallel = sequence_parallel and tp_group is not None
    vocab_size = len(output_weight) * num_vocab_shards(tp_group)
    gathered_length = len(hidden) * (num_vocab_shards(tp_group) if sequence_parallel else 1)
    leading_shape = torch.Size((gathered_length, *hidden.shape[1:-1]))
    check_inputs(
        leading_shape,
        vocab_size,
        labels,
        teacher_topk_log_probs,
        teacher_topk_ids,
        teacher_tail_log_probs,
        config,
    )
    if token_weights.shape != leading_shape:
        raise ValueError(
            f"expected token_weights of shape {tuple(leading_shape)}, one per label; "
            f"got {tuple(token_weights.shape)}"
        )
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    labels, log_probs, ids, targets = flatten_rows(
        labels,
        teacher_topk_log_probs,
        teacher_topk_ids,
        teacher_tail_log_probs,
        vocab_size,
        config,
        dtype,
    )
    loss, kd_loss, sft_loss, *student_fields = _FusedLinearLoss.apply(  # type: ignore[no-untyped-call] # torch's own
        hidden,
        output_weight,
        token_weights.detach().reshape(-1).to(dtype),
        locate_columns(ids, labels, len(output_weight), tp_group),
        targets,
        config,
        tp_group,
        sequence_parallel,
        torch.is_grad_enabled(),
    )
    values = metrics(Student(*student_fields), targets, log_probs, ids, config)
    return KDLossOutput(
        loss,
        kd_loss.view(leading_shape),
        sft_loss.view(leading_shape),
        {name: value.view(leading_shape) for name, value in values.items()},
    )


class _FusedLinearLoss(torch.autograd.Function):
    """The scalar loss; the gradients of hidden states h and weight W are formed in the forward.

        G = token_weights / unit * dloss/dz,    dL/dh = unit G W,    dL/dW = unit G^T h

    backward multiplies both by unit * dL/dloss. unit is the largest token weight: G has the logits'
    type, and in float16 one over the number of tokens would leave it few bits or none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        token_weights: Tensor,
        columns: Any,
        targets: Any,
        config: KDLossConfig,
        group: ProcessGroup | None,
        sequence_parallel: bool,
        grad_enabled: bool,
    ) -> tuple[Tensor, ...]:
        rows = hidden.reshape(-1, hidden.shape[-1])
        if sequence_parallel:
            rows = torch.cat(all_gather(rows, group))
        matrix = weight.to(rows.dtype)
        dtype = targets.probs.dtype
        hidden_grad = weight_grad = None
        if grad_enabled and hidden.requires_grad:
            hidden_grad = torch.empty_like(rows)
        if grad_enabled and weight.requires_grad:
            weight_grad = weight.new_zeros(weight.shape, dtype=dtype)

        block_bytes = _BLOCK_BYTES.get(rows.device.type, _BLOCK_BYTES["cuda"])
        tokens_per_block = max(1, block_bytes // (len(matrix) * rows.dtype.itemsize))
        num_tokens = tokens_per_chunk(len(matrix), dtype, rows.device)
        block = rows.new_empty(min(tokens_per_block, len(rows)), len(matrix))

        def blocks() -> Iterator[tuple[slice, Tensor]]:
            for begin in range(0, max(1, len(rows)), tokens_per_block):
                part = slice(begin, min(begin + tokens_per_block, len(rows)))
                yield part, torch.mm(rows[part], matrix.t(), out=block[: part.stop - part.start])

        def chunks(logits: Tensor) -> Iterator[Tensor]:
            for begin in range(0, max(1, len(logits)), num_tokens):
                yield logits[begin : begin + num_tokens]

        def read() -> Iterator[Tensor]:
            for _, logits in blocks():
                yield from chunks(logits)

        def write() -> Iterator[tuple[Tensor, ...]]:
            for part, logits in blocks():
                for chunk in chunks(logits):
                    yield chunk, chunk
                # By now the chunks hold G.
                if hidden_grad is not None:
                    torch.mm(logits, matrix, out=hidden_grad[part])
                if weight_grad is not None and logits.dtype == dtype:
                    weight_grad.addmm_(logits.t(), rows[part])
                elif weight_grad is not None:
                    for begin in range(0, len(weight_grad), _IDS_PER_PRODUCT):
                        ids = slice(begin, begin + _IDS_PER_PRODUCT)
                        weight_grad[ids] += logits[:, ids].t() @ rows[part]

        forms_gradient = hidden_grad is not None or weight_grad is not None
        largest = torch.cat([token_weights.abs(), token_weights.new_zeros(1)]).amax()
        unit = torch.where(largest > 0, largest, torch.ones_like(largest))
        value, student = fused_pass(
            read,
            write if forms_gradient else None,
            columns,
            targets,
            config,
            group,
            token_weights=token_weights / unit,
        )
        if hidden_grad is not None:
            reduce = reduce_scatter_sum if sequence_parallel else all_reduce_sum
            hidden_grad = reduce(hidden_grad, group).view(hidden.shape)
        kd_loss = value * config.temperature**2
        sft_loss = student.log_sum - student.logits[:, -1]
        loss = config.kd_loss_weight * kd_loss + config.sft_loss_weight * sft_loss
        ctx.mark_non_differentiable(kd_loss, sft_loss, *student)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden_grad, weight_grad, unit)
        ctx.weight = weight
        return (token_weights * loss).sum(), kd_loss, sft_loss, *student

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        if scale is None:
            return (None,) * 9
        hidden_grad, weight_grad, unit = ctx.saved_tensors
        scale = scale * unit
        if hidden_grad is not None:
            hidden_grad = hidden_grad.mul_(scale)
        if weight_grad is not None:
            weight_grad = _hand_over(weight_grad.mul_(scale), ctx.weight)
        return hidden_grad, weight_grad, *(None,) * 7


def _hand_over(gradient: Tensor, weight: Any) -> Tensor:
    """The gradient for autograd, or, added to Megatron's main_grad, a stand-in for it.

    Megatron's DDP sets `grad_added_to_main_grad` on every parameter whose main_grad it keeps, and
    its hook passes over a parameter that says True; with `zero_out_wgrad` (tied embeddings, whose
    other half still comes through autograd) the hook adds all the same, and must find zeros.
    """
    if getattr(weight, "main_grad", None) is None or not hasattr(weight, "grad_added_to_main_grad"):
        return gradient.to(weight.dtype)
    weight.main_grad.add_(gradient)
    weight.grad_added_to_main_grad = True
    make = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
    return make(weight, requires_grad=False)
