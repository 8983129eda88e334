"""The loss with the output layer fused in: the logits exist one block of tokens at a time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from nemo_kd.loss.chunk import Classes, Local, combine, concatenate, divergence, form, take
from nemo_kd.loss.fused import engine_for, measure, spread, weigh
from nemo_kd.loss.objective import KDLossConfig
from nemo_kd.loss.prepare import Student
from nemo_kd.vocab_parallel import all_gather, all_reduce_sum, reduce_scatter_sum

# The size of a block of logits. It is large, because each block reads and writes the whole gradient
# of the weight.
_BLOCK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
# A half-precision product is added to the float32 gradient in pieces of so many ids; the product as
# a whole would be a second gradient.
_IDS_PER_PRODUCT = 8192


class FusedLinearLoss(torch.autograd.Function):
    """The scalar loss; the gradients of hidden states h and weight W are formed in the forward.

        G = token_weights / unit * dloss/dz,    dL/dh = unit G W,    dL/dW = unit G^T h

    backward multiplies both by unit * dL/dloss. unit is the largest token weight: G has the type of
    the logits, which is that of `hidden`, and in float16 a weight of one over the number of tokens
    would leave few bits of G, or none. backward scales the saved gradients in place and may run
    once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        classes: Classes,
        token_weights: Tensor,
        config: KDLossConfig,
        group: ProcessGroup | None,
        sequence_parallel: bool,
        needs_grad: bool,
    ) -> tuple[Tensor, ...]:
        rows = hidden.reshape(-1, hidden.shape[-1])
        if sequence_parallel:
            # Every rank needs the hidden states of all tokens for its vocab shard.
            rows = torch.cat(all_gather(rows, group))
        hidden_grad = weight_grad = None
        if needs_grad and hidden.requires_grad:
            hidden_grad = torch.empty_like(rows)
        if needs_grad and weight.requires_grad:
            weight_grad = weight.new_zeros(weight.shape, dtype=classes.probs.dtype)
        largest = torch.cat([token_weights.abs(), token_weights.new_zeros(1)]).amax()
        unit = torch.where(largest > 0, largest, torch.ones_like(largest))
        layer = _OutputLayer(rows, weight.to(rows.dtype), hidden_grad, weight_grad)
        # A block of a vocab shard is computed twice: then its memory can carry nothing.
        engine = engine_for(rows, config, classes.probs.dtype, layer.needs_grad and group is None)
        walked = (layer, engine, classes, token_weights / unit, config)
        value, student = _whole_pass(*walked) if group is None else _sharded_pass(*walked, group)
        if hidden_grad is not None:
            # Every shard's logits contribute to the hidden states; with sequence parallelism each
            # rank keeps its own tokens of the sum.
            reduce = reduce_scatter_sum if sequence_parallel else all_reduce_sum
            hidden_grad = reduce(hidden_grad, group).view(hidden.shape)
        loss, kd_loss, sft_loss = weigh(value, student, config)
        ctx.mark_non_differentiable(kd_loss, sft_loss, *student)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden_grad, weight_grad, unit)
        ctx.weight = weight
        return (token_weights * loss).sum(), kd_loss, sft_loss, *student

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        if scale is None:
            return (None,) * 8
        hidden_grad, weight_grad, unit = ctx.saved_tensors
        scale = scale * unit
        # In place: each gradient is as large as its tensor, and nothing else refers to it.
        if hidden_grad is not None:
            hidden_grad = hidden_grad.mul_(scale)
        if weight_grad is not None:
            weight_grad = _hand_over(weight_grad.mul_(scale), ctx.weight)
        return hidden_grad, weight_grad, *(None,) * 6


class _OutputLayer:
    """`rows` `[N, H]` times `matrix` `[Vp, H]`, block by block, and the gradients of both.

    A gradient that is None is not asked for. The logits of a block exist until the next one: a
    vocab shard, which is walked twice, computes them twice.
    """

    def __init__(
        self, rows: Tensor, matrix: Tensor, rows_grad: Tensor | None, matrix_grad: Tensor | None
    ) -> None:
        self.rows, self.matrix = rows, matrix
        self.rows_grad, self.matrix_grad = rows_grad, matrix_grad
        self.needs_grad = rows_grad is not None or matrix_grad is not None
        block_bytes = _BLOCK_BYTES.get(rows.device.type, _BLOCK_BYTES["cuda"])
        self._num_tokens = max(1, block_bytes // (len(matrix) * rows.dtype.itemsize))
        self._memory = rows.new_empty(min(self._num_tokens, len(rows)), len(matrix))

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The rows of each block and its logits `[n, Vp]`, which the next block overwrites."""
        for begin in range(0, max(1, len(self.rows)), self._num_tokens):
            block = slice(begin, min(begin + self._num_tokens, len(self.rows)))
            logits = self._memory[: block.stop - begin]
            yield block, torch.mm(self.rows[block], self.matrix.t(), out=logits)

    def accumulate(self, block: slice, gradient: Tensor) -> None:
        """Takes dloss/dz `[n, Vp]` of a block into the gradients of rows and matrix."""
        if self.rows_grad is not None:
            torch.mm(gradient, self.matrix, out=self.rows_grad[block])
        if self.matrix_grad is None:
            return
        # Each block adds to the whole gradient in place, in the computing type.
        if gradient.dtype == self.matrix_grad.dtype:
            self.matrix_grad.addmm_(gradient.t(), self.rows[block])
            return
        if gradient.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):
            # cuBLAS adds a half-precision product to a float32 matrix where it computes it.
            product = (self.matrix_grad, gradient.t(), self.rows[block])
            torch.addmm(*product, out_dtype=self.matrix_grad.dtype, out=self.matrix_grad)
            return
        for begin in range(0, len(self.matrix_grad), _IDS_PER_PRODUCT):
            ids = slice(begin, begin + _IDS_PER_PRODUCT)
            self.matrix_grad[ids] += gradient[:, ids].t() @ self.rows[block]


def _whole_pass(
    layer: _OutputLayer, engine: Any, classes: Classes, weights: Tensor, config: KDLossConfig
) -> tuple[Tensor, Student]:
    """D `[N]` and the student's statistics, of a whole vocabulary; each block is computed once.

    The gradient of a block overwrites its logits.
    """
    values, students = [], []
    for block, logits in layer.blocks():
        own = take(classes, block)
        local = measure(engine, logits, own)
        student = combine(local, config, None)
        value, class_gradient = divergence(student, own, config)
        if layer.needs_grad:
            gradient = form(local.peak, student, own, class_gradient, config)
            spread(engine, logits, gradient, weights[block], logits)
            layer.accumulate(block, logits)
        values.append(value)
        students.append(student)
    return torch.cat(values), concatenate(students)


def _sharded_pass(
    layer: _OutputLayer,
    engine: Any,
    classes: Classes,
    weights: Tensor,
    config: KDLossConfig,
    group: ProcessGroup,
) -> tuple[Tensor, Student]:
    """The same from one vocab shard, which is walked twice: a row's sums need every shard."""
    local: Local = concatenate(
        [measure(engine, logits, take(classes, block)) for block, logits in layer.blocks()]
    )
    # The collectives of all blocks at once: two, however many blocks there are.
    student = combine(local, config, group)
    value, class_gradient = divergence(student, classes, config)
    if layer.needs_grad:
        gradient = form(local.peak, student, classes, class_gradient, config)
        for block, logits in layer.blocks():
            spread(engine, logits, take(gradient, block), weights[block], logits)
            layer.accumulate(block, logits)
    return value, student


def _hand_over(gradient: Tensor, weight: Any) -> Tensor:
    """The gradient for autograd, or a stand-in for it once it is added to Megatron's main_grad.

    Megatron's DDP sets `grad_added_to_main_grad` on every parameter whose main_grad it keeps, and
    its hook skips a parameter where that is True. With `zero_out_wgrad` (tied embeddings, whose
    other half still comes through autograd) the hook adds all the same, and must find zeros.
    """
    if getattr(weight, "main_grad", None) is None or not hasattr(weight, "grad_added_to_main_grad"):
        return gradient.to(weight.dtype)
    weight.main_grad.add_(gradient)
    weight.grad_added_to_main_grad = True
    make = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
    return make(weight, requires_grad=False)
