"""The engine of CUDA logits: three Triton kernels, each of which reads what it needs once.

`_measure` reads the logits (2 bytes a logit in bfloat16), `_spread` reads them again and writes the
gradient (2 + 2 bytes). `_place` then writes the gradient where a class of the row stands: K + 1
places a row. Nothing is summed by atomics, so that the same input gives the same bits.

No other file imports triton. Sizes and the time that they imply are in docs/performance.md.
"""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemo_kd.loss.chunk import Classes, Gradient, Local
from nemo_kd.loss.objective import KDLossConfig
from nemo_kd.vocab_parallel import LOG2_E

# Below every finite logit, and finite: in a row of -inf alone, -inf - -inf would be NaN.
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_LOG2_E = tl.constexpr(LOG2_E)
_NO_COLUMN = 2**31 - 1
NUM_WARPS = 4


class TritonEngine:
    """Computes in float32; the logits are float32, bfloat16 or float16, of any strides."""

    def __init__(self, device: torch.device, config: KDLossConfig) -> None:
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"expected CUDA logits with NEMO_KD_KERNELS=triton, got logits on {device}; unset "
                "the variable, or set TRITON_INTERPRET=1 to interpret the kernels for a test"
            )
        self.device, self.config = device, config

    def _launching(self) -> AbstractContextManager[object]:
        """Triton launches on the current device, which need not be that of the logits."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def chunk_tokens(self, logits: Tensor) -> int:
        """All tokens at once."""
        return max(1, logits.numel())

    def free(self) -> None:
        """Nothing is kept from one call to the next."""

    def measure(self, logits: Tensor, classes: Classes) -> Local:
        """This shard's statistics of `[n, Vp]`; at T = 1 both sums are one tensor."""
        num_tokens, vocab_size = logits.shape
        own = classes.probs.new_empty(classes.column.shape)
        peak, total, total_t = (own.new_empty(num_tokens) for _ in range(3))
        excludes, tempered = self.config.tail == "bucket", self.config.temperature != 1
        entries = _entries_in_order(classes) if excludes else classes.column
        if num_tokens == 0:
            return Local(own, peak, total, total)
        with self._launching():
            _measure[(num_tokens,)](
                logits, classes.column, classes.foreign, entries, own, peak, total, total_t,
                *logits.stride(), vocab_size, own.shape[1], LOG2_E / self.config.temperature,
                TEMPERED=tempered, EXCLUDES=excludes, **measure_sizes(vocab_size, excludes),
                CLASSES=_class_block(own.shape[1]), num_warps=NUM_WARPS,
            )  # fmt: skip
        return Local(own, peak, total, total_t if tempered else total)

    def spread(self, logits: Tensor, gradient: Gradient, weights: Tensor, out: Tensor) -> None:
        """Writes `weights * dloss/dz` to `out` `[n, Vp]`, which may be the logits."""
        num_tokens, vocab_size = logits.shape
        if num_tokens == 0:
            return
        num_classes = gradient.column.shape[1]
        # One line a row: peak, and what its two exponentials and its classes are multiplied by.
        scale_t = gradient.scale if gradient.scale_t is None else gradient.scale_t * weights
        factors = torch.stack([gradient.peak, gradient.scale * weights, scale_t, weights], -1)
        inverse_t, tempered = LOG2_E / self.config.temperature, gradient.scale_t is not None
        block = spread_size(vocab_size)
        num_blocks = triton.cdiv(vocab_size, block)
        own = gradient.logits.contiguous()  # part of a wider tensor, as it comes from a collective
        with self._launching():
            _spread[(num_tokens * num_blocks,)](
                logits, out, factors, *logits.stride(), *out.stride(), vocab_size, num_blocks,
                inverse_t, TEMPERED=tempered, BLOCK=block, num_warps=NUM_WARPS,
            )  # fmt: skip
            _place[(num_tokens,)](
                out, factors, gradient.column, gradient.foreign, own, gradient.sparse,
                *out.stride(), num_classes, inverse_t, TEMPERED=tempered,
                EXCLUDES=self.config.tail == "bucket", CLASSES=_class_block(num_classes),
                num_warps=1,
            )  # fmt: skip
        # The kernels write past torch: whoever saved this memory for a backward has to know.
        torch.autograd.graph.increment_version(out)


def measure_sizes(vocab_size: int, excludes: bool) -> dict[str, int]:
    """A tile of `_measure`: LANES sums side by side, each of which takes STEPS logits at a time.

    A thread has 8 lanes: one load of 16 bytes of bfloat16. More steps save rescaling; with the
    entries left out fewer are better, because each entry is compared with its whole tile.
    """
    lanes = min(1024, triton.next_power_of_2(vocab_size))
    steps = 2 if excludes else 8
    return {"LANES": lanes, "STEPS": min(steps, triton.next_power_of_2(-(-vocab_size // lanes)))}


def spread_size(vocab_size: int) -> int:
    """How many logits a program of `_spread` has: 32 a thread."""
    return int(min(4096, triton.next_power_of_2(vocab_size)))


def _class_block(num_classes: int) -> int:
    return int(min(128, triton.next_power_of_2(num_classes)))


def _entries_in_order(classes: Classes) -> Tensor:
    """`[n, K + 1]` int32: the columns of the shard's own entries, ascending, then _NO_COLUMN."""
    column = classes.column.to(torch.int32).masked_fill_(classes.foreign, _NO_COLUMN)
    column[:, -1] = _NO_COLUMN  # the label is no entry, and the last is a stop for the kernel
    return column.sort(-1).values


@triton.jit
def _measure(
    logits, column, foreign, entries, own, peak, total, total_t,
    row_stride, column_stride, vocab_size, num_classes, log2_e_over_t,
    TEMPERED: tl.constexpr, EXCLUDES: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr,
    CLASSES: tl.constexpr,
):  # fmt: skip
    """One row a program: its largest logit, its sums of exponentials, its logits at the classes."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    classes = row * num_classes
    offsets = tl.arange(0, STEPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    # Each lane has a maximum and sums of its own, so that no thread waits for another in the loop.
    highest = tl.full([LANES], _LOWEST, tl.float32)
    sums = tl.zeros([LANES], tl.float32)
    sums_t = tl.zeros([LANES], tl.float32)
    index = classes
    if EXCLUDES:
        excluded = tl.load(entries + index)
    for begin in range(0, vocab_size, STEPS * LANES):
        place = begin + offsets
        z = tl.load(
            logits + place.to(tl.int64) * column_stride,
            mask=place < vocab_size,
            other=-float("inf"),
        ).to(tl.float32)
        if EXCLUDES:
            while excluded < begin + STEPS * LANES:
                z = tl.where(place == excluded, -float("inf"), z)
                index += 1
                excluded = tl.load(entries + index)
        higher = tl.maximum(highest, tl.max(z, axis=0))
        distance = z - higher[None, :]
        rise = highest - higher
        sums = sums * tl.exp2(rise * _LOG2_E) + tl.sum(tl.exp2(distance * _LOG2_E), axis=0)
        if TEMPERED:
            sums_t = sums_t * tl.exp2(rise * log2_e_over_t)
            sums_t += tl.sum(tl.exp2(distance * log2_e_over_t), axis=0)
        highest = higher
    top = tl.max(highest, axis=0)
    tl.store(peak + row, top)
    tl.store(total + row, tl.sum(sums * tl.exp2((highest - top) * _LOG2_E), axis=0))
    if TEMPERED:
        tl.store(total_t + row, tl.sum(sums_t * tl.exp2((highest - top) * log2_e_over_t), axis=0))
    for begin in range(0, num_classes, CLASSES):
        slot = begin + tl.arange(0, CLASSES)
        exists = slot < num_classes
        here = exists & (tl.load(foreign + classes + slot, mask=exists, other=1) == 0)
        place = tl.load(column + classes + slot, mask=here, other=0)
        z = tl.load(logits + place * column_stride, mask=here, other=-float("inf"))
        tl.store(own + classes + slot, z.to(tl.float32), mask=exists)


@triton.jit
def _spread(
    logits, out, factors,
    row_stride, column_stride, out_row_stride, out_column_stride, vocab_size, num_blocks,
    log2_e_over_t,
    TEMPERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of a row a program: scale * exp(z - peak) + scale_t * exp((z - peak) / T)."""
    program = tl.program_id(0)
    row = (program // num_blocks).to(tl.int64)
    place = (program % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    exists = place < vocab_size
    place = place.to(tl.int64)
    z = tl.load(logits + row * row_stride + place * column_stride, mask=exists, other=0)
    distance = z.to(tl.float32) - tl.load(factors + row * 4)
    gradient = tl.exp2(distance * _LOG2_E) * tl.load(factors + row * 4 + 1)
    if TEMPERED:
        gradient += tl.exp2(distance * log2_e_over_t) * tl.load(factors + row * 4 + 2)
    tl.store(out + row * out_row_stride + place * out_column_stride, gradient, mask=exists)


@triton.jit
def _place(
    out, factors, column, foreign, own, sparse,
    row_stride, column_stride, num_classes, log2_e_over_t,
    TEMPERED: tl.constexpr, EXCLUDES: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """One row a program: the gradient at the entries and the label, over what `_spread` left there.

    No entry occurs twice, but one may be the label too: it takes the label's part, and the label
    is written only where no entry is. So each place is written once, rounded once.
    """
    row = tl.program_id(0).to(tl.int64)
    out += row * row_stride
    classes = row * num_classes
    label = classes + num_classes - 1
    peak, scale = tl.load(factors + row * 4), tl.load(factors + row * 4 + 1)
    scale_t, weight = tl.load(factors + row * 4 + 2), tl.load(factors + row * 4 + 3)
    label_place, label_foreign = tl.load(column + label), tl.load(foreign + label) != 0
    label_part = tl.load(sparse + label) * weight
    taken = label_foreign.to(tl.int32)
    for begin in range(0, num_classes - 1, CLASSES):
        slot = begin + tl.arange(0, CLASSES)
        exists = slot < num_classes - 1
        here = exists & (tl.load(foreign + classes + slot, mask=exists, other=1) == 0)
        place = tl.load(column + classes + slot, mask=here, other=0)
        is_label = here & (place == label_place) & (label_foreign == 0)
        taken += tl.sum(is_label.to(tl.int32), axis=0)
        gradient = tl.load(sparse + classes + slot, mask=here, other=0) * weight
        gradient += tl.where(is_label, label_part, 0.0)
        if not EXCLUDES:
            distance = tl.load(own + classes + slot, mask=here, other=0) - peak
            gradient += tl.exp2(distance * _LOG2_E) * scale
            if TEMPERED:
                gradient += tl.exp2(distance * log2_e_over_t) * scale_t
        tl.store(out + place * column_stride, gradient, mask=here)
    distance = tl.load(own + label) - peak
    label_part += tl.exp2(distance * _LOG2_E) * scale
    if TEMPERED:
        label_part += tl.exp2(distance * log2_e_over_t) * scale_t
    tl.store(out + label_place * column_stride, label_part, mask=taken == 0)
