"""The fused passes: they walk the logits in chunks of tokens and form dloss/dz as they go.

`whole_pass` is for a whole vocabulary, `sharded_pass` for one vocab shard of several. Both take the
logits from a source: `Logits` here, or the output layer of linear.py, which computes them.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_kd.loss.chunk import (
    Classes,
    Local,
    combine,
    concatenate,
    divergence,
    exponentiate,
    form,
    measure,
    take,
)
from nemo_kd.loss.objective import KDLossConfig, weighted_sum
from nemo_kd.loss.prepare import Student

# The size of a chunk of tokens in the computing type. On a CPU a chunk has to stay in the cache
# between the operations on it, and yet has to outweigh the small operations that each chunk costs.
# On a GPU it has to outweigh the kernel launches.
_CHUNK_BYTES = {"cpu": 6 * 2**20, "cuda": 128 * 2**20}


class Scratch:
    """Memory for one chunk in the computing type: allocated when first needed, then used again."""

    def __init__(self, dtype: torch.dtype, config: KDLossConfig) -> None:
        self.dtype = dtype
        self.needs_work_t = config.temperature != 1
        self._tensors: dict[str, Tensor] = {}

    def pair(self, chunk: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
        """`work` and `work_t` for a chunk. At T = 1 both are one tensor.

        `work` is `out`, the memory of the gradient, where `out` has the computing type.
        """
        work = out if out is not None and out.dtype == self.dtype else self.get("work", chunk)
        return work, self.get("work_t", chunk) if self.needs_work_t else work

    def get(self, name: str, chunk: Tensor) -> Tensor:
        """The memory of this name for a chunk; the first chunk that asks for it is the largest."""
        if name not in self._tensors:
            self._tensors[name] = chunk.new_empty(chunk.shape, dtype=self.dtype)
        return self._tensors[name][: len(chunk)]


class Logits:
    """Logits `[..., Vp]` and `gradients`, the memory for dloss/dz, or None: no gradient is formed.

    `gradients` may be the logits' own memory. A pass walks a source like this one in chunks.
    """

    def __init__(self, logits: Tensor, gradients: Tensor | None, dtype: torch.dtype) -> None:
        self.logits, self.gradients, self.dtype = logits, gradients, dtype
        self.needs_grad = gradients is not None
        # In the computing type, that memory can carry the exponentials from one walk to the next.
        self.keeps_exponentials = gradients is not None and gradients.dtype == dtype

    def walk(self, writes: bool) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """The rows of each chunk, its logits `[n, Vp]`, and what to write, if the walk `writes`."""
        return chunks(self.dtype, self.logits, self.gradients if writes else None)


def whole_pass(
    source: Any, classes: Classes, config: KDLossConfig, scratch: Scratch
) -> tuple[Tensor, Student]:
    """D `[N]` and the student's statistics, of a whole vocabulary; the logits are read once."""
    values, students = [], []
    for rows, chunk, out in source.walk(source.needs_grad):
        work, work_t = scratch.pair(chunk, out)
        own = take(classes, rows)
        student = combine(measure(chunk, own, config, work, work_t), config, None)
        values.append(form(student, own, config, work, work_t, out))
        students.append(student)
    return torch.cat(values), concatenate(students)


def sharded_pass(
    source: Any, classes: Classes, config: KDLossConfig, scratch: Scratch, group: ProcessGroup
) -> tuple[Tensor, Student]:
    """The same from one vocab shard, which is walked twice: a row's sums need every shard."""
    # At T = 1 the gradient's memory may carry exp(z - peak) to the second walk. In place, it
    # overwrites the logits, which are then read no more.
    carries = source.keeps_exponentials and config.temperature == 1
    parts = []
    for rows, chunk, out in source.walk(carries):
        parts.append(measure(chunk, take(classes, rows), config, *scratch.pair(chunk, out)))
    local: Local = concatenate(parts)
    # The collectives of all chunks at once: two, however many chunks there are.
    student = combine(local, config, group)
    if not source.needs_grad:
        return divergence(student, classes, config)[0], student
    values = []
    for rows, chunk, out in source.walk(True):
        work, work_t = scratch.pair(chunk, out)
        own = take(classes, rows)
        if not carries:
            exponentiate(chunk, own, config, work, work_t, local.peak[rows])
        values.append(form(take(student, rows), own, config, work, work_t, out))
    return torch.cat(values), student


class FusedLoss(torch.autograd.Function):
    """Loss `[N]` of logits `[..., Vp]`; the gradient is formed in the forward pass.

    `gradients` is the memory for dloss/dz (both weights in it), or None where none is asked for;
    with `inplace` it is the logits' own. backward: dL/dz_j = dL/dloss * dloss/dz_j.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        gradients: Tensor | None,
        classes: Classes,
        config: KDLossConfig,
        group: ProcessGroup | None,
        inplace: bool,
    ) -> tuple[Tensor, ...]:
        scratch = Scratch(classes.probs.dtype, config)
        walked = (Logits(logits, gradients, scratch.dtype), classes, config, scratch)
        value, student = whole_pass(*walked) if group is None else sharded_pass(*walked, group)
        loss, kd_loss, sft_loss = weigh(value, student, config)
        ctx.mark_non_differentiable(kd_loss, sft_loss, *student)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradients)
        ctx.inplace, ctx.config = inplace, config
        return loss, kd_loss, sft_loss, *student

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        weights = grad_outputs[0]
        if weights is None:
            return (None,) * 6
        (gradients,) = ctx.saved_tensors
        # In place the saved gradient is scaled where it lies, so that no third tensor of all the
        # logits exists. Otherwise it stays as it is, and the graph may be walked again.
        scaled = gradients if ctx.inplace else torch.empty_like(gradients)
        scratch = Scratch(weights.dtype, ctx.config)
        for rows, source, out in chunks(weights.dtype, gradients, scaled):
            assert out is not None
            weight = weights[rows, None]
            if source.dtype == weight.dtype:
                torch.mul(source, weight, out=out)
            else:
                # In float32: a weight rounded to bfloat16 would be off for its whole row.
                out.copy_(scratch.get("work", source).copy_(source).mul_(weight))
        return scaled, *(None,) * 5


def weigh(value: Tensor, student: Student, config: KDLossConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, KD loss and SFT loss `[N]` of D `[N]` and the student's statistics."""
    kd_loss = value * config.temperature**2
    sft_loss = student.log_sum - (student.logits[:, -1] - student.top)
    return weighted_sum(kd_loss, sft_loss, config), kd_loss, sft_loss


def chunks(
    dtype: torch.dtype, logits: Tensor, other: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Walks the tokens: the rows of a chunk, and views `[n, Vp]` of `logits` and of `other`.

    Both tensors are `[..., Vp]`; `other` may be None. A chunk is `_CHUNK_BYTES` of `dtype`. Without
    any token there is one empty chunk.
    """
    chunk_bytes = _CHUNK_BYTES.get(logits.device.type, _CHUNK_BYTES["cuda"])
    num_tokens = max(1, chunk_bytes // (logits.shape[-1] * dtype.itemsize))
    begin = 0
    for views in _flat_views(num_tokens, logits, other):
        yield slice(begin, begin := begin + len(views[0])), *views


def _flat_views(
    num_tokens: int, logits: Tensor, other: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    try:
        flat = logits.view(-1, logits.shape[-1])
        flat_other = None if other is None else other.view(-1, other.shape[-1])
    except RuntimeError:
        # These strides have no flat view: walk the first dimension, rather than copy the logits.
        for i, part in enumerate(logits):
            yield from _flat_views(num_tokens, part, None if other is None else other[i])
        return
    for begin in range(0, max(1, len(flat)), num_tokens):
        part = slice(begin, begin + num_tokens)
        yield flat[part], None if flat_other is None else flat_other[part]
