"""The loss with the output layer fused in: the logits exist one block of tokens at a time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_kd.loss.chunk import Classes, combine, concatenate, divergence, take
from nemo_kd.loss.fused import Scratch, form_chunks, measure_chunks, weigh, whole_pass
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
        config: KDLossConfig,
        group: ProcessGroup | None,
        sequence_parallel: bool,
        needs_grad: bool,
    ) -> tuple[Tensor, ...]:
        token_weights = classes.token_weights
        assert token_weights is not None
        rows = hidden.reshape(-1, hidden.shape[-1])
        if sequence_parallel:
            # Every rank needs the hidden states of all tokens for its vocab shard.
            rows = torch.cat(all_gather(rows, group))
        hidden_grad = weight_grad = None
        if needs_grad and hidden.requires_grad:
            hidden_grad = torch.empty_like(rows)
        if needs_grad and weight.requires_grad:
            weight_grad = weight.new_zeros(weight.shape, dtype=classes.probs.dtype)
        layer = _OutputLayer(rows, weight.to(rows.dtype), hidden_grad, weight_grad)
        largest = torch.cat([token_weights.abs(), token_weights.new_zeros(1)]).amax()
        unit = torch.where(largest > 0, largest, torch.ones_like(largest))
        walked = (layer, classes._replace(token_weights=token_weights / unit), config)
        value, student = _whole_walk(*walked) if group is None else _sharded_walk(*walked, group)
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
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        if scale is None:
            return (None,) * 7
        hidden_grad, weight_grad, unit = ctx.saved_tensors
        scale = scale * unit
        # In place: each gradient is as large as its tensor, and nothing else refers to it.
        if hidden_grad is not None:
            hidden_grad = hidden_grad.mul_(scale)
        if weight_grad is not None:
            weight_grad = _hand_over(weight_grad.mul_(scale), ctx.weight)
        return hidden_grad, weight_grad, *(None,) * 5


class _OutputLayer:
    """`rows` `[N, H]` times `matrix` `[Vp, H]`, block by block, and the gradients of both.

    A gradient that is None is not asked for.
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
        """The rows and the logits `[n, Vp]` of each block. The next block overwrites the logits."""
        for begin in range(0, max(1, len(self.rows)), self._num_tokens):
            part = slice(begin, min(begin + self._num_tokens, len(self.rows)))
            memory = self._memory[: part.stop - part.start]
            yield part, torch.mm(self.rows[part], self.matrix.t(), out=memory)

    def accumulate(self, part: slice, gradient: Tensor) -> None:
        """Takes dloss/dz `[n, Vp]` of the block `part` into the gradients of rows and matrix."""
        if self.rows_grad is not None:
            torch.mm(gradient, self.matrix, out=self.rows_grad[part])
        if self.matrix_grad is None:
            return
        # Each block adds to the whole gradient in place, in the computing type.
        if gradient.dtype == self.matrix_grad.dtype:
            self.matrix_grad.addmm_(gradient.t(), self.rows[part])
            return
        for begin in range(0, len(self.matrix_grad), _IDS_PER_PRODUCT):
            ids = slice(begin, begin + _IDS_PER_PRODUCT)
            self.matrix_grad[ids] += gradient[:, ids].t() @ self.rows[part]


def _whole_walk(
    layer: _OutputLayer, classes: Classes, config: KDLossConfig
) -> tuple[Tensor, Student]:
    """D `[N]` and the student, of a whole vocabulary. The gradient of a block overwrites it."""
    scratch = Scratch(classes.probs.dtype, config)
    values, students = [], []
    for part, logits in layer.blocks():
        gradients = logits if layer.needs_grad else None
        value, student = whole_pass(logits, gradients, take(classes, part), config, scratch)
        layer.accumulate(part, logits)
        values.append(value)
        students.append(student)
    return torch.cat(values), concatenate(students)


def _sharded_walk(
    layer: _OutputLayer, classes: Classes, config: KDLossConfig, group: ProcessGroup
) -> tuple[Tensor, Student]:
    """The same for a vocab shard: every block's logits are computed twice, rather than kept."""
    scratch = Scratch(classes.probs.dtype, config)
    local = concatenate(
        [
            measure_chunks(logits, None, take(classes, part), config, scratch)
            for part, logits in layer.blocks()
        ]
    )
    student = combine(local, config, group)
    if not layer.needs_grad:
        return divergence(student, classes, config)[0], student
    values = []
    for part, logits in layer.blocks():
        own = (local.peak[part], take(student, part), take(classes, part))
        values.append(form_chunks(logits, logits, *own, config, scratch))
        layer.accumulate(part, logits)
    return torch.cat(values), student


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
