"""The loss on a GPU: `loss.py --device cuda` measures it, `loss_gpu.py` counts it without one.

A row is forward and backward over the same logits, K = 100. Hidden states are projected to them by
the rows of the second table. GB/s is for what the row has to move at least, its *bytes* a logit;
the share is of the card's bandwidth as a copy of the logits reaches it.

    tail ...           vocab_parallel_kd_sft_loss in place, Triton's kernels; "eager": plain torch
    softmax            torch.softmax alone; "and backward" with its backward
    cross entropy      torch's; Megatron's vocab-parallel one, unfused and fused
    layer ...          the output layer and the loss: in two steps, and fused
    Liger, CCE         where liger_kernel and cut_cross_entropy are installed

Without a GPU, the kernels' loads and stores are counted in Triton's interpreter, and the small
operations around them by torch's dispatcher:

    PYTHONPATH=tests python benchmarks/loss_gpu.py
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_kd.loss import (
    KDLossConfig,
    vocab_parallel_kd_sft_loss,
    vocab_parallel_linear_kd_sft_loss,
)

K, HIDDEN_SIZE = 100, 4096
HBM_BYTES_PER_S = 3.35e12  # an H100 SXM's, from its data sheet
TAILS = ("renormalize", "bucket", "label", "drop")


class Inputs(NamedTuple):
    """One micro batch; `weights` is the mask over its sum, as in training."""

    logits: Tensor
    hidden: Tensor
    output_weight: Tensor
    labels: Tensor
    log_probs: Tensor
    ids: Tensor
    tails: Tensor
    weights: Tensor

    @property
    def teacher(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.log_probs, self.ids, self.tails


def make_inputs(num_tokens: int, vocab_size: int, device: str, from_hidden: bool) -> Inputs:
    """bfloat16 logits, or hidden states and output weight; the other is empty."""
    torch.manual_seed(0)
    num_hidden = num_tokens if from_hidden else 0
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    logits = torch.empty(0 if from_hidden else num_tokens, vocab_size, **options).normal_(0, 3)
    ids = torch.randint(vocab_size // K, (num_tokens, K), device=device)
    ids += torch.arange(K, device=device) * (vocab_size // K)  # each id once
    log_probs = torch.randn(num_tokens, K, device=device).log_softmax(-1) - 0.1
    return Inputs(
        logits.requires_grad_(),
        torch.randn(num_hidden, 1, HIDDEN_SIZE, **options).requires_grad_(),
        (
            torch.randn(vocab_size if from_hidden else 0, HIDDEN_SIZE, **options) / 20
        ).requires_grad_(),
        labels=torch.randint(vocab_size, (num_tokens,), device=device),
        log_probs=log_probs,
        ids=ids,
        tails=torch.log1p(-log_probs.exp().sum(-1)),
        weights=(torch.rand(num_tokens, device=device) < 0.7) / num_tokens,
    )


def ours(tail: str, temperature: float = 1.0) -> Callable[[Inputs], Tensor]:
    def loss(x: Inputs) -> Tensor:
        config = KDLossConfig(tail=tail, temperature=temperature)
        out = vocab_parallel_kd_sft_loss(
            x.logits, x.labels, *x.teacher, config=config, inplace=True
        )
        return (out.loss * x.weights).sum()

    return loss


def eager(tail: str) -> Callable[[Inputs], Tensor]:
    """The engine is chosen in forward and kept for backward."""

    def loss(x: Inputs) -> Tensor:
        with patch.dict(os.environ, NEMO_KD_KERNELS="eager"):
            return ours(tail)(x)

    return loss


def layer_then_loss(x: Inputs) -> Tensor:
    return ours("label")(x._replace(logits=x.hidden[:, 0] @ x.output_weight.t()))


def layer_fused(x: Inputs) -> Tensor:
    rows = [each[:, None] for each in (x.labels, *x.teacher)]
    return vocab_parallel_linear_kd_sft_loss(
        x.hidden, x.output_weight, *rows, token_weights=x.weights[:, None],
        config=KDLossConfig(tail="label"),
    ).loss  # fmt: skip


def softmax(x: Inputs) -> None:
    x.logits.detach().softmax(-1)


def softmax_and_backward(x: Inputs) -> None:
    # The logits stand in for the gradient from above, to move as many bytes.
    x.logits.softmax(-1).backward(x.logits.detach())


def cross_entropy(x: Inputs) -> Tensor:
    return (F.cross_entropy(x.logits, x.labels, reduction="none") * x.weights).sum()


def other_rows() -> tuple[dict[str, Any], dict[str, Any]]:
    """What others offer, by name, on logits and on hidden states; without what is not installed."""
    on_logits: dict[str, Any] = {}
    on_hidden: dict[str, Any] = {}
    try:
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
        from megatron.core.parallel_state import get_tensor_model_parallel_group
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        def megatron(function: Any, *rest: Any) -> Callable[[Inputs], Tensor]:
            return lambda x: (
                function(x.logits[:, None], x.labels[:, None], *rest)[:, 0] * x.weights
            ).sum()

        on_logits["cross entropy, Megatron's"] = megatron(vocab_parallel_cross_entropy)
        group = get_tensor_model_parallel_group()
        on_logits["cross entropy, Megatron's fused"] = megatron(
            fused_vocab_parallel_cross_entropy, group
        )
    except (ImportError, AssertionError) as error:
        print(f"without Megatron's cross entropy: {error}")
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

        cross, jsd = LigerFusedLinearCrossEntropyLoss(), LigerFusedLinearJSD()
        on_hidden["Liger, fused linear CE"] = lambda x: cross(
            x.output_weight, x.hidden[:, 0], x.labels
        )
        # The teacher is as large as the student, and its logits are computed in the loss.
        on_hidden["Liger, fused linear JSD"] = lambda x: jsd(
            x.hidden[:, 0], x.output_weight, x.hidden[:, 0].detach(), x.output_weight.detach()
        )
    except ImportError as error:
        print(f"without Liger: {error}")
    try:
        from cut_cross_entropy import linear_cross_entropy

        on_hidden["CCE"] = lambda x: linear_cross_entropy(x.hidden[:, 0], x.output_weight, x.labels)
    except ImportError as error:
        print(f"without cut_cross_entropy: {error}")
    return on_logits, on_hidden


def milliseconds(row: Callable[[Inputs], Tensor | None], x: Inputs, fresh: Tensor, n: int) -> float:
    """The fastest forward and backward of `n`; the logits are restored before each."""
    times = []
    for _ in range(n + 2):  # the first two compile and allocate
        x.logits.grad = x.hidden.grad = x.output_weight.grad = None
        x.logits.detach().copy_(fresh)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        loss = row(x)
        if loss is not None:
            loss.backward()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return min(times[2:])


def peak_gib(row: Callable[[Inputs], Tensor | None], x: Inputs, fresh: Tensor) -> float:
    # Gradients of an earlier row would be counted as there before, and be given back meanwhile.
    x.logits.grad = x.hidden.grad = x.output_weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    milliseconds(row, x, fresh, 1)
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def measure(small: bool, repeats: int) -> list[dict[str, Any]]:
    """Prints both tables, and returns their rows."""
    _one_rank()
    num_tokens, vocab_size = (256, 4096) if small else (16_384, 128_256)
    on_logits, on_hidden = other_rows()
    x = make_inputs(num_tokens, vocab_size, "cuda", from_hidden=False)
    fresh = x.logits.detach().clone()

    def copy(x: Inputs) -> None:
        x.logits.detach().copy_(fresh)

    copied = milliseconds(copy, x, fresh, repeats)
    bandwidth = 4 * fresh.numel() / copied * 1e3
    print(f"{torch.cuda.get_device_name()}: a copy of {fresh.nbytes / 2**30:.1f} GiB of logits "
          f"reaches {bandwidth / 1e9:,.0f} GB/s")  # fmt: skip
    table: dict[str, tuple[Any, int]] = {
        **{f"tail {tail}": (ours(tail), 6) for tail in TAILS},
        "tail label, T = 2": (ours("label", 2.0), 6),
        "tail label, eager": (eager("label"), 6),
        "softmax": (softmax, 4),
        "softmax and backward": (softmax_and_backward, 10),
        "cross entropy": (cross_entropy, 6),
        **{name: (row, 6) for name, row in on_logits.items()},
    }
    rows = []
    print("| row | ms | bytes | GB/s | share | peak GiB |\n" + "| --- " * 6 + "|")
    for name, (row, num_bytes) in table.items():
        ms = milliseconds(row, x, fresh, repeats)
        rate = num_bytes * fresh.numel() / ms * 1e3
        peak = peak_gib(row, x, fresh)
        rows.append({"row": name, "ms": ms, "share": rate / bandwidth, "peak": peak})
        share = f"{100 * rate / bandwidth:.0f}%"
        print(f"| {name} | {ms:.2f} | {num_bytes} | {rate / 1e9:,.0f} | {share} | {peak:.2f} |")
    return rows + measure_from_hidden(num_tokens // 2, vocab_size, on_hidden, repeats)


def measure_from_hidden(
    num_tokens: int, vocab_size: int, others: dict[str, Any], repeats: int
) -> list[dict[str, Any]]:
    """Prints the second table, and returns its rows."""
    x = make_inputs(num_tokens, vocab_size, "cuda", from_hidden=True)
    nothing = x.logits.detach()
    print(f"\n| {num_tokens:,} tokens, H = {HIDDEN_SIZE:,} | ms | peak GiB |\n| --- | --- | --- |")
    rows = []
    table = {"layer, loss": layer_then_loss, "layer fused": layer_fused, **others}
    for name, row in table.items():
        ms, peak = milliseconds(row, x, nothing, repeats), peak_gib(row, x, nothing)
        rows.append({"row": name, "ms": ms, "peak": peak})
        print(f"| {name} | {ms:.2f} | {peak:.2f} |")
    return rows


def _one_rank() -> None:
    """Megatron's cross entropy asks for a tensor-parallel group."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


class SmallOperations(TorchDispatchMode):
    """How many operations run outside the kernels, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        infos = [value.alias_info for value in func._schema.returns]
        is_view = any(info is not None and not info.is_write for info in infos)
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        # The interpreter's own: it copies the memory of each argument of a kernel onto itself.
        is_interpreter = str(func).startswith("aten.set_") or (
            func is torch.ops.aten.copy_.default and args[0].data_ptr() == args[1].data_ptr()
        )
        if not is_view and not is_interpreter and "empty" not in str(func):
            self.count += 1
            self.bytes += sum(tensor.nbytes for tensor in tensors)
        return result


def count() -> None:
    """Bytes and kernels of each mode, and the time that they imply on an H100."""
    os.environ |= {"TRITON_INTERPRET": "1", "NEMO_KD_KERNELS": "triton"}
    from kernel_runs import Traffic

    # Left out on a GPU as well. The package has a function of the module's name.
    sys.modules["nemo_kd.loss.prepare"]._check_ids = lambda *_: None
    n, v, shown_n, shown_v = 4, 16_384, 16_384, 128_256
    header = (
        "tail | T | bytes a logit, forward | backward | at the classes, bytes a token | "
        "small operations | their bytes a token | implied ms"
    )
    print(f"| {header} |\n|" + " --- |" * len(header.split("|")))
    for tail, temperature in [*((tail, 1.0) for tail in TAILS), ("label", 2.0)]:
        x = make_inputs(n, v, "cpu", from_hidden=False)
        with SmallOperations() as small:
            with Traffic(logits=x.logits) as forward:
                loss = ours(tail, temperature)(x)
            with Traffic(logits=x.logits) as backward:
                loss.backward()
        moved = [sum((t.loaded["logits"], t.stored["logits"])) for t in (forward, backward)]
        per_logit = [total // (n * v) for total in moved]
        # A GPU moves 32 bytes for the 2 of a logit that stands alone, and back for a write.
        at_classes = (moved[0] - per_logit[0] * n * v) / n / 2 * 32
        at_classes += (moved[1] - per_logit[1] * n * v) / n / 2 * 64
        per_token = sum(per_logit) * shown_v + at_classes + small.bytes / n
        ms = 1e3 * shown_n * per_token / HBM_BYTES_PER_S
        cells = [tail, f"{temperature:g}", *per_logit, f"{at_classes:,.0f}", small.count]
        print("| " + " | ".join(map(str, [*cells, f"{small.bytes / n:,.0f}", f"{ms:.2f}"])) + " |")


def main(small: bool, repeats: int, output: Path) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("expected a CUDA device with --device cuda, got none; leave it out")
    rows = measure(small, repeats)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    count()
