"""The fused passes: they walk the logits in chunks of tokens and form dloss/dz as they go.

`whole_pass` is for a whole vocabulary and reads the logits once. A sharded vocabulary is walked
twice, because the normalisers of a row need every shard: `measure_chunks` collects what this shard
says of each row, `combine` asks all shards in two collectives, however many chunks there are, and
`form_chunks` computes the divergence and the gradient.
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
from nemo_kd.loss.objective import KDLossConfig
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


def whole_pass(
    logits: Tensor,
    gradients: Tensor | None,
    classes: Classes,
    config: KDLossConfig,
    scratch: Scratch,
) -> tuple[Tensor, Student]:
    """D `[N]` and the student's statistics, from the logits `[..., V]` of a whole vocabulary.

    Writes dloss/dz to `gradients`, which may be the logits' memory.
    """
    values, students = [], []
    for rows, chunk, out in chunks(scratch.dtype, logits, gradients):
        work, work_t = scratch.pair(chunk, out)
        own = take(classes, rows)
        student = combine(measure(chunk, own, config, work, work_t), config, None)
        values.append(form(student, own, config, work, work_t, out))
        students.append(student)
    return torch.cat(values), concatenate(students)


def sharded_pass(
    logits: Tensor,
    gradients: Tensor | None,
    classes: Classes,
    config: KDLossConfig,
    scratch: Scratch,
    group: ProcessGroup,
) -> tuple[Tensor, Student]:
    """What `whole_pass` returns and writes, from one vocab shard `[..., Vp]`."""
    # At T = 1 and in the computing type, the gradient's memory carries the exponentials from the
    # first walk to the second one. In place they overwrite the logits, which are read no more.
    carries = gradients is not None and gradients.dtype == scratch.dtype and config.temperature == 1
    local = measure_chunks(logits, gradients if carries else None, classes, config, scratch)
    student = combine(local, config, group)
    if gradients is None:
        return divergence(student, classes, config)[0], student
    peak = None if carries else local.peak
    return form_chunks(logits, gradients, peak, student, classes, config, scratch), student


def measure_chunks(
    logits: Tensor,
    exponentials: Tensor | None,
    classes: Classes,
    config: KDLossConfig,
    scratch: Scratch,
) -> Local:
    """The first walk over a vocab shard `[..., Vp]`: what it says of its rows.

    Leaves exp(z - peak) in `exponentials`, of the computing type, if that memory is there.
    """
    parts = []
    for rows, chunk, out in chunks(scratch.dtype, logits, exponentials):
        parts.append(measure(chunk, take(classes, rows), config, *scratch.pair(chunk, out)))
    local: Local = concatenate(parts)
    return local


def form_chunks(
    logits: Tensor,
    gradients: Tensor,
    peak: Tensor | None,
    student: Student,
    classes: Classes,
    config: KDLossConfig,
    scratch: Scratch,
) -> Tensor:
    """The second walk: D `[N]`; dloss/dz is written to `gradients`.

    `peak` `[N]` is what the first walk measured, or None: then `gradients` still holds the
    exponentials that the first walk left there. `student` is what `combine` made of all shards.
    """
    values = []
    for rows, chunk, out in chunks(scratch.dtype, logits, gradients):
        work, work_t = scratch.pair(chunk, out)
        own = take(classes, rows)
        if peak is not None:
            exponentiate(chunk, own, config, work, work_t, peak[rows])
        values.append(form(take(student, rows), own, config, work, work_t, out))
    return torch.cat(values)


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
        walked = (logits, gradients, classes, config, Scratch(classes.probs.dtype, config))
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
    sft_loss = student.log_sum - student.logits[:, -1]
    return config.kd_loss_weight * kd_loss + config.sft_loss_weight * sft_loss, kd_loss, sft_loss


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
