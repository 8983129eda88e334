"""The fused loss: forward takes a row's statistics, backward forms its gradient.

So the logits are read twice and the gradient is written once, already multiplied by what comes from
above. The work that is as wide as the vocabulary is an engine's: plain torch (eager.py) or, on a
GPU, Triton's kernels (triton_kernels.py).
"""

import contextlib
import mmap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from nemo_kd.loss.chunk import (
    Classes,
    Gradient,
    Local,
    combine,
    concatenate,
    divergence,
    form,
    take,
)
from nemo_kd.loss.eager import EagerEngine
from nemo_kd.loss.objective import KDLossConfig, forced_kernels, weighted_sum
from nemo_kd.loss.prepare import Student

HUGE_BYTES = 8 * 2**20  # from here on huge pages, of 2 MiB, are worth a system call


class FusedLoss(torch.autograd.Function):
    """Loss `[N]` of logits `[..., Vp]`; `needs_grad` says whether a backward will come.

    backward: dL/dz_j = dL/dloss * dloss/dz_j, with `inplace` in the memory of the logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        classes: Classes,
        config: KDLossConfig,
        group: ProcessGroup | None,
        inplace: bool,
        needs_grad: bool,
    ) -> tuple[Tensor, ...]:
        engine = engine_for(logits, config, classes.probs.dtype, inplace and needs_grad)
        local = measure(engine, logits, classes)
        student = combine(local, config, group)
        value, class_gradient = divergence(student, classes, config)
        loss, kd_loss, sft_loss = weigh(value, student, config)
        ctx.mark_non_differentiable(kd_loss, sft_loss, *student)
        ctx.set_materialize_grads(False)
        if needs_grad:
            gradient = form(local.peak, student, classes, class_gradient, config)
            ctx.save_for_backward(logits, *gradient)
        engine.free()  # many micro batches may be between forward and backward
        ctx.engine, ctx.inplace, ctx.overwrote = engine, inplace, False
        return loss, kd_loss, sft_loss, *student

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        weights = grad_outputs[0]
        if weights is None:
            return (None,) * 6
        if ctx.overwrote:
            raise RuntimeError(
                "expected one backward with inplace=True, got a second: the logits were modified "
                "by an inplace operation, because the first gradient took their memory; pass "
                "inplace=False to walk the graph again"
            )
        logits, *fields = ctx.saved_tensors
        ctx.overwrote = ctx.inplace
        out = logits.detach() if ctx.inplace else _fresh_like(logits)
        spread(ctx.engine, logits, Gradient(*fields), weights, out)
        return out, *(None,) * 5


def _fresh_like(logits: Tensor) -> Tensor:
    """torch.empty_like for the gradient; on Linux a large one on a CPU is in huge pages.

    The first touch of its small pages would take as long as all the rest of forward and backward.
    """
    on_linux = hasattr(mmap, "MADV_HUGEPAGE")
    if logits.device.type != "cpu" or logits.nbytes < HUGE_BYTES or not on_linux:
        return torch.empty_like(logits)
    memory = mmap.mmap(-1, logits.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    strides = torch.empty_like(logits, device="meta").stride()
    return torch.frombuffer(memory, dtype=logits.dtype).as_strided(logits.shape, strides)


def measure(engine: Any, logits: Tensor, classes: Classes) -> Local:
    """This vocab shard's statistics of all tokens of the logits `[..., Vp]`."""
    parts: list[Local] = [
        engine.measure(chunk, take(classes, rows)) for rows, chunk, _ in chunks(engine, logits)
    ]
    return parts[0] if len(parts) == 1 else concatenate(parts)


def spread(engine: Any, logits: Tensor, gradient: Gradient, weights: Tensor, out: Tensor) -> None:
    """Writes `weights * dloss/dz` of all tokens `[..., Vp]` to `out`, which may be the logits."""
    for rows, chunk, part in chunks(engine, logits, out):
        engine.spread(chunk, take(gradient, rows), weights[rows], part)


def weigh(value: Tensor, student: Student, config: KDLossConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, KD loss and SFT loss `[N]` of D `[N]` and the student's statistics."""
    kd_loss = value * config.temperature**2
    sft_loss = student.log_sum - (student.logits[:, -1] - student.top)
    return weighted_sum(kd_loss, sft_loss, config), kd_loss, sft_loss


def engine_for(logits: Tensor, config: KDLossConfig, dtype: torch.dtype, overwrites: bool) -> Any:
    """The engine for these logits, computing in `dtype`; `overwrites` as in EagerEngine.

    CUDA logits get Triton's kernels where Triton can be imported; NEMO_KD_KERNELS=eager or triton
    decides otherwise. The kernels compute in float32: float64 logits are for plain torch alone.

    Raises:
        ValueError: NEMO_KD_KERNELS=triton, and the kernels cannot run here.
    """
    forced = forced_kernels()
    if dtype == torch.float64 or forced == "eager" or not (logits.is_cuda or forced):
        return EagerEngine(logits, dtype, config, overwrites)
    try:
        from nemo_kd.loss.triton_kernels import TritonEngine
    except ImportError as error:
        if forced:
            raise ValueError(
                f"expected an importable triton with NEMO_KD_KERNELS=triton, got: {error}; "
                "install triton, or unset the variable"
            ) from None
        return EagerEngine(logits, dtype, config, overwrites)
    return TritonEngine(logits.device, config)


def chunks(
    engine: Any, logits: Tensor, other: Tensor | None = None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Walks the tokens: the rows of a chunk, and views `[n, Vp]` of `logits` and of `other`.

    Both tensors are `[..., Vp]`; without `other` it is the logits. The engine says how many tokens
    a chunk has. Without any token there is one empty chunk.
    """
    begin = 0
    other = logits if other is None else other
    for chunk, part in _flat_views(engine.chunk_tokens(logits), logits, other):
        yield slice(begin, begin := begin + len(chunk)), chunk, part


def _flat_views(num_tokens: int, logits: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    try:
        flat, flat_other = (x.view(-1, x.shape[-1]) for x in (logits, other))
    except RuntimeError:
        # These strides have no flat view: walk the first dimension, rather than copy the logits.
        for part, other_part in zip(logits, other, strict=True):
            yield from _flat_views(num_tokens, part, other_part)
        return
    for begin in range(0, max(1, len(flat)), num_tokens):
        rows = slice(begin, begin + num_tokens)
        yield flat[rows], flat_other[rows]
