"""What tests/test_kernels.py runs in processes that interpret the Triton kernels.

Triton decides when it is imported whether its kernels are interpreted, so that the pytest process,
which compiles them, cannot interpret them as well.
"""

import os
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from fuzz_loss import check
from loss_cases import EDGES, GRID, MODES, Case, random_case
from test_linear_loss import fused
from test_loss_distributed import run_shard

from nemo_kd.loss import KDLossConfig, KDLossOutput, vocab_parallel_kd_sft_loss

# Every edge with every divergence and tail, ordinary rows with every mode; every second in place.
WHOLE = [
    (edge, mode, n % 2 == 1)
    for n, (edge, mode) in enumerate(
        (edge, mode)
        for edge, mode, gather in GRID
        if gather == "topk" and (edge == "ordinary" or mode.endswith("-T2"))
    )
]
SHARDED = [
    (edge, mode)
    for edge in EDGES
    for mode in ("forward_kl-label-T2", "jsd-bucket-T0.5", "forward_kl-renormalize-T1")
]
ONE_OF_EACH = ("forward_kl-label-T1", "forward_kl-drop-T2", "jsd-bucket-T2", "reverse_kl-bucket-T1")
TYPED = [
    (dtype, mode, strides)
    for dtype in (torch.bfloat16, torch.float16)
    for mode in (*ONE_OF_EACH, "forward_kl-renormalize-T2")
    for strides in ("contiguous", "transposed", "vocabulary_strided", "wider_row")
    if dtype == torch.bfloat16 or strides == "contiguous"
]
LONG_V, LONG_K = 9000, 200  # more than one tile of a row, and more than one block of classes


def interpreted() -> None:
    """From here on this process's loss takes the kernels."""
    assert os.environ["TRITON_INTERPRET"] == "1"
    torch.set_num_threads(1)
    os.environ["NEMO_KD_KERNELS"] = "triton"


def loss_and_gradient(
    case: Case, config: KDLossConfig, *, inplace: bool = False, strides: str = "contiguous"
) -> tuple[KDLossOutput, torch.Tensor]:
    """The output, and the gradient for a token weight of 0.5; the logits have the strides."""
    logits = laid_out(case.logits, strides).requires_grad_()
    out = vocab_parallel_kd_sft_loss(
        logits, case.labels, case.log_probs, case.ids, case.tails, config=config, inplace=inplace
    )
    (gradient,) = torch.autograd.grad((0.5 * out.loss).sum(), logits)
    assert not inplace or gradient.data_ptr() == logits.data_ptr()
    return KDLossOutput(out.loss.detach(), *out[1:]), 2 * gradient.clone()


def laid_out(logits: torch.Tensor, strides: str) -> torch.Tensor:
    if strides == "transposed":
        return logits.transpose(0, 1).contiguous().transpose(0, 1)
    if strides == "vocabulary_strided":
        return logits.repeat_interleave(2, -1)[..., ::2]
    if strides == "wider_row":
        return torch.cat([logits, logits], -1)[..., : logits.shape[-1]]
    return logits.clone()


def long_case() -> Case:
    case = random_case(shape=(2,), k=LONG_K, v=LONG_V)
    case.ids[1, 150:] = -1
    return case


def run_whole(rank: int, world_size: int) -> dict[Any, Any]:
    """Each process takes its part of the cases; nothing is sharded."""
    interpreted()
    results: dict[Any, Any] = {}
    for edge, mode, inplace in WHOLE[rank::world_size]:
        results[edge, mode] = loss_and_gradient(EDGES[edge](), MODES[mode], inplace=inplace)
    for dtype, mode, strides in TYPED[rank::world_size]:
        case = random_case()
        case.logits = case.logits.to(dtype)
        results[dtype, mode, strides] = loss_and_gradient(
            case, MODES[mode], inplace=strides == "wider_row", strides=strides
        )
    for mode in ONE_OF_EACH[rank::world_size]:
        results["long", mode] = loss_and_gradient(long_case(), MODES[mode])
    results["fuzz", rank] = check(range(rank, 160, world_size), 0, 1)
    return results


def run_sharded(rank: int, world_size: int) -> dict[Any, Any]:
    interpreted()
    results: dict[Any, Any] = {}
    for edge, mode in SHARDED:
        results[edge, mode] = run_shard(EDGES[edge](), MODES[mode], rank, world_size, inplace=True)
    for mode in ONE_OF_EACH:
        results["linear", mode] = fused(mode, rank, world_size)
    results["fuzz"] = check(range(40), rank, world_size)
    return results


class Traffic:
    """Bytes that interpreted kernels load from and store to each of some named tensors."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self.ranges = {
            name: (t.data_ptr(), t.data_ptr() + t.untyped_storage().nbytes())
            for name, t in tensors.items()
        }
        self.loaded = dict.fromkeys(tensors, 0)
        self.stored = dict.fromkeys(tensors, 0)

    def __enter__(self) -> "Traffic":
        from triton.runtime.interpreter import InterpreterBuilder

        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def counting_load(builder: Any, ptrs: Any, mask: Any, *args: Any) -> Any:
            self._count(self.loaded, ptrs, mask)
            return load(builder, ptrs, mask, *args)

        def counting_store(builder: Any, ptrs: Any, value: Any, mask: Any, *args: Any) -> Any:
            self._count(self.stored, ptrs, mask)
            return store(builder, ptrs, value, mask, *args)

        self._patches = [
            patch.object(InterpreterBuilder, "create_masked_load", counting_load),
            patch.object(InterpreterBuilder, "create_masked_store", counting_store),
        ]
        for one in self._patches:
            one.start()
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._patches:
            one.stop()

    def _count(self, counts: dict[str, int], ptrs: Any, mask: Any) -> None:
        itemsize = ptrs.get_element_ty().primitive_bitwidth // 8
        addresses = ptrs.data[mask.data.astype(bool)]
        for name, (begin, end) in self.ranges.items():
            counts[name] += itemsize * int(np.sum((addresses >= begin) & (addresses < end)))


def run_alone(rank: int, world_size: int) -> dict[str, Any]:
    """What needs one process only."""
    interpreted()
    return {
        "traffic": {mode: traffic(mode) for mode in ONE_OF_EACH},
        "far": {name: far_logits(*strides) for name, strides in FAR.items()},
        "linear": {mode: fused(mode) for mode in ONE_OF_EACH},
        "refusals": refusals(),
        "float64": float64_gradient(),
    }


def traffic(mode: str) -> dict[str, dict[str, int]]:
    """Bytes of the logits and of the gradient in forward and in backward, of the long case."""
    case = long_case()
    logits = case.logits.bfloat16().requires_grad_()
    with Traffic(logits=logits) as forward:
        out = vocab_parallel_kd_sft_loss(
            logits, case.labels, case.log_probs, case.ids, case.tails, config=MODES[mode],
            inplace=True,
        )  # fmt: skip
    with Traffic(logits=logits) as backward:
        out.loss.sum().backward()
    return {
        "loaded": {"forward": forward.loaded["logits"], "backward": backward.loaded["logits"]},
        "stored": {"forward": forward.stored["logits"], "backward": backward.stored["logits"]},
    }


# Offsets beyond 2^31 elements: along the tokens, and along the vocabulary.
FAR = {"tokens": (2**30 + 8, 1), "vocabulary": (1, 2**31 // 40)}


def far_logits(row_stride: int, column_stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of rows far apart and of adjacent rows; untouched pages take no memory."""
    from triton.runtime.interpreter import GridExecutor

    case = random_case(shape=(3,))
    values, v = case.logits.half(), case.logits.shape[-1]
    size = 2 * row_stride + (v - 1) * column_stride + 1
    far = torch.empty(size, dtype=torch.float16).as_strided((3, v), (row_stride, column_stride))
    far.copy_(values)
    config = MODES["forward_kl-label-T2"]
    case.logits = values
    near = loss_and_gradient(case, config)[1]
    # On a CPU it would copy each tensor's memory onto itself.
    with patch.object(GridExecutor, "_restore_args_dev", lambda *_: None):
        out = vocab_parallel_kd_sft_loss(
            far.requires_grad_(), case.labels, case.log_probs, case.ids, case.tails,
            config=config, inplace=True,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(out.loss.sum(), far)
    return gradient.clone(memory_format=torch.contiguous_format), near


def refusals() -> dict[str, str]:
    """What a second backward in place, and a stranger to the overwritten logits, are told."""
    case, config, said = random_case(), MODES["forward_kl-label-T1"], {}
    logits = (case.logits * 1).requires_grad_()
    square = (logits * logits).sum()  # saves the logits
    out = vocab_parallel_kd_sft_loss(
        logits, case.labels, case.log_probs, case.ids, case.tails, config=config, inplace=True
    )
    loss = 2 * out.loss.sum()
    torch.autograd.grad(loss, logits, retain_graph=True)
    for name, value in (("again", loss), ("stranger", square)):
        try:
            torch.autograd.grad(value, logits)
        except RuntimeError as error:
            said[name] = str(error)
    return said


def float64_gradient() -> torch.dtype:
    """float64 logits take plain torch, whatever is forced."""
    case = random_case()
    case.logits = case.logits.double()
    return loss_and_gradient(case, MODES["jsd-bucket-T2"])[1].dtype
