"""The loss with the output layer fused in: the logits exist one block of tokens at a time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_kd.loss.chunk import Classes
from nemo_kd.loss.fused import Scratch, chunks, sharded_pass, weigh, whole_pass
from nemo_kd.loss.objective import KDLossConfig
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
        scratch = Scratch(classes.probs.dtype, config)
        layer = _OutputLayer(rows, weight.to(rows.dtype), hidden_grad, weight_grad, scratch.dtype)
        largest = torch.cat([token_weights.abs(), token_weights.new_zeros(1)]).amax()
        unit = torch.where(largest > 0, largest, torch.ones_like(largest))
        walked = (layer, classes._replace(token_weights=token_weights / unit), config, scratch)
        value, student = whole_pass(*walked) if group is None else sharded_pass(*walked, group)
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

    A gradient that is None is not asked for. The logits of a block exist until the next one: a
    vocab shard, which is walked twice, computes them twice.
    """

    keeps_exponentials = False

    def __init__(
        self,
        rows: Tensor,
        matrix: Tensor,
        rows_grad: Tensor | None,
        matrix_grad: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.rows, self.matrix, self.dtype = rows, matrix, dtype
        self.rows_grad, self.matrix_grad = rows_grad, matrix_grad
        self.needs_grad = rows_grad is not None or matrix_grad is not None
        block_bytes = _BLOCK_BYTES.get(rows.device.type, _BLOCK_BYTES["cuda"])
        self._num_tokens = max(1, block_bytes // (len(matrix) * rows.dtype.itemsize))
        self._memory = rows.new_empty(min(self._num_tokens, len(rows)), len(matrix))

    def walk(self, writes: bool) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """As Logits.walk; the gradient of a chunk overwrites its logits."""
        for begin in range(0, max(1, len(self.rows)), self._num_tokens):
            block = slice(begin, min(begin + self._num_tokens, len(self.rows)))
            # Every block overwrites the logits of the one before.
            logits = self._memory[: block.stop - begin]
            torch.mm(self.rows[block], self.matrix.t(), out=logits)
            for rows, chunk, out in chunks(self.dtype, logits, logits if writes else None):
                yield slice(begin + rows.start, begin + rows.stop), chunk, out
            # The pass asks for the next chunk when the gradient of the block's last one is written.
            if writes:
                self._accumulate(block, logits)

    def _accumulate(self, part: slice, gradient: Tensor) -> None:
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
