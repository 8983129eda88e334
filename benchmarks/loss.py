"""Time and memory of the loss beside what it replaces, forward and backward.

Logits in (ratios to "unfused", "in place" and "softmax"):
    renormalize bucket label drop   vocab_parallel_kd_sft_loss with that tail, inplace
    kept       renormalize without inplace: the logits are kept, and the gradient has its own memory
    dense      all-gather, log_softmax, KL of renormalised top-K and cross entropy in plain torch
    unfused    megatron.core's vocab-parallel cross entropy and a separate top-K KL in plain torch,
               whose gather needs the logits that the cross entropy overwrites: on a copy
    in place   the same without the copy, by a gather that has a backward of its own
    softmax    torch.softmax over the same tensor: one read, one exponential, one write
Hidden states in (ratios to "layer, loss"):
    layer, loss   the output layer, then vocab_parallel_kd_sft_loss inplace
    layer fused   vocab_parallel_linear_kd_sft_loss

A time is the fastest of interleaved repetitions, because other work on the machine only adds to it.
Peak memory is the growth of the resident set above the inputs, on the rank that needs most, in
multiples of its logits. The gradients of hidden states and weight are subtracted, because both ways
hold them.
Run, with tests/ for what starts the ranks; --device cuda is loss_gpu.py, whose rows are others:

    PYTHONPATH=tests python benchmarks/loss.py [--small] [--device cuda]
"""

import argparse
import ctypes
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loss_gpu
import torch
import torch.distributed as dist
from distributed import run_distributed
from loss_gpu import Inputs
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from nemo_kd.loss import (
    KDLossConfig,
    vocab_parallel_kd_sft_loss,
    vocab_parallel_linear_kd_sft_loss,
)

K, HIDDEN_SIZE, SFT_LOSS_WEIGHT = 100, 576, 0.4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_inputs(num_tokens: int, vocab_size: int, dtype: torch.dtype, from_hidden: bool) -> Inputs:
    """Logits, or hidden states and output weight; the other is empty."""
    shard_size = vocab_size // dist.get_world_size()
    common = torch.Generator().manual_seed(0)
    own = torch.Generator().manual_seed(1 + dist.get_rank())
    ids = torch.randint(vocab_size // K, (num_tokens, K), generator=common)
    ids += torch.arange(K) * (vocab_size // K)  # each id once, spread over the vocabulary
    log_probs = torch.randn(num_tokens, K, generator=common).log_softmax(-1) - 0.1
    hidden = torch.randn(num_tokens * from_hidden, HIDDEN_SIZE, generator=common)
    weight = torch.randn(shard_size * from_hidden, HIDDEN_SIZE, generator=own) * 0.1
    logits = torch.empty(num_tokens * (not from_hidden), shard_size, dtype=dtype)
    for row in logits:
        row.copy_(torch.randn(shard_size, generator=own) * 3)
    return Inputs(
        logits.requires_grad_(),
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        labels=torch.randint(vocab_size, (num_tokens,), generator=common),
        log_probs=log_probs,
        ids=ids,
        tails=torch.log1p(-log_probs.exp().sum(-1)),
        weights=(torch.rand(num_tokens, generator=common) < 0.7) / num_tokens,
    )


def fused(x: Inputs, tail: str, inplace: bool = True) -> Tensor:
    config = KDLossConfig(tail=tail, sft_loss_weight=SFT_LOSS_WEIGHT)
    out = vocab_parallel_kd_sft_loss(
        x.logits, x.labels, x.log_probs, x.ids, x.tails,
        config=config, tp_group=dist.group.WORLD, inplace=inplace,
    )  # fmt: skip
    return (out.loss * x.weights).sum()


class _Gather(torch.autograd.Function):
    """All ranks' columns; backward returns this rank's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.chunk(dist.get_world_size(), dim=-1)[dist.get_rank()].contiguous()


class _GatherEntries(torch.autograd.Function):
    """Logits at ids of the whole vocabulary, from whichever rank; backward fills a whole shard."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> Tensor:
        start = dist.get_rank() * logits.shape[-1]
        foreign = (ids < start) | (ids >= start + logits.shape[-1])
        local = (ids - start).masked_fill(foreign, 0)
        ctx.save_for_backward(local, foreign)
        ctx.like = logits.new_empty(0), logits.shape
        entries = logits.gather(1, local).float().masked_fill(foreign, 0)
        if dist.get_world_size() > 1:
            dist.all_reduce(entries)
        return entries

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        local, foreign = ctx.saved_tensors
        empty, shape = ctx.like
        whole = empty.new_zeros(shape)
        return whole.scatter_add_(1, local, grad.masked_fill(foreign, 0).to(whole.dtype)), None


def _kl(log_probs: Tensor, student: Tensor) -> Tensor:
    """KL of the teacher against the student, both renormalised over the K entries."""
    target = log_probs.log_softmax(-1)
    return (target.exp() * (target - student.log_softmax(-1))).sum(-1)


def dense(x: Inputs) -> Tensor:
    logits = x.logits if dist.get_world_size() == 1 else _Gather.apply(x.logits)
    log_q = logits.float().log_softmax(-1)
    sft_loss = -log_q.gather(1, x.labels[:, None])[:, 0]
    kd_loss = _kl(x.log_probs, log_q.gather(1, x.ids))
    return ((kd_loss + SFT_LOSS_WEIGHT * sft_loss) * x.weights).sum()


def unfused(x: Inputs, *, copy: bool) -> Tensor:
    """Each term forms a gradient of the logits' size, and autograd adds the two."""
    kd_loss = _kl(x.log_probs, _GatherEntries.apply(x.logits, x.ids))
    # Last, because Megatron Core's cross entropy overwrites float32 logits.
    logits = x.logits.clone() if copy and x.logits.dtype == torch.float32 else x.logits
    sft_loss = vocab_parallel_cross_entropy(logits[:, None], x.labels[:, None])[:, 0]
    return ((kd_loss + SFT_LOSS_WEIGHT * sft_loss) * x.weights).sum()


def softmax(x: Inputs) -> Tensor:
    x.logits.detach().softmax(-1)
    return torch.zeros((), requires_grad=True)  # no backward to time


def layer_then_loss(x: Inputs) -> Tensor:
    return fused(x._replace(logits=x.hidden @ x.output_weight.t()), "renormalize")


def layer_fused(x: Inputs) -> Tensor:
    return vocab_parallel_linear_kd_sft_loss(
        x.hidden, x.output_weight, x.labels, x.log_probs, x.ids,
        token_weights=x.weights,
        config=KDLossConfig(tail="renormalize", sft_loss_weight=SFT_LOSS_WEIGHT),
        tp_group=dist.group.WORLD,
    ).loss  # fmt: skip


LOGITS_ROWS: dict[str, Callable[[Inputs], Tensor]] = {
    "renormalize": lambda x: fused(x, "renormalize"),
    "bucket": lambda x: fused(x, "bucket"),
    "label": lambda x: fused(x, "label"),
    "drop": lambda x: fused(x, "drop"),
    "kept": lambda x: fused(x, "renormalize", inplace=False),
    "dense": dense,
    "unfused": lambda x: unfused(x, copy=True),
    "in place": lambda x: unfused(x, copy=False),
    "softmax": softmax,
}
HIDDEN_ROWS: dict[str, Callable[[Inputs], Tensor]] = {
    "layer, loss": layer_then_loss,
    "layer fused": layer_fused,
}


def step(name: str, x: Inputs) -> None:
    """Forward and backward, whose gradients are then dropped."""
    (LOGITS_ROWS | HIDDEN_ROWS)[name](x).backward()
    if name == "layer, loss" and dist.get_world_size() > 1:
        dist.all_reduce(x.hidden.grad)
    x.logits.grad = x.hidden.grad = x.output_weight.grad = None


def peak_growth_bytes(name: str, x: Inputs) -> int:
    """How far one step pushes this process's resident set above where it starts."""
    # Otherwise memory that an earlier step left would hide what this step takes.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts over
    before = _status_bytes("VmRSS")
    step(name, x)
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(
    rank: int,
    world_size: int,
    num_threads: int,
    repeats: int,
    names: list[str],
    num_tokens: int,
    vocab_size: int,
    dtype: str,
) -> dict[str, tuple[float, float]]:
    """(fastest milliseconds, peak memory in multiples of the logits) of every row."""
    torch.set_num_threads(num_threads)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    from_hidden = names[0] in HIDDEN_ROWS
    x = make_inputs(num_tokens, vocab_size, DTYPES[dtype], from_hidden)
    fresh = x.logits.detach().clone()
    samples: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats + 1):
        for name in names:
            x.logits.detach().copy_(fresh)
            dist.barrier()
            begin = time.perf_counter()
            step(name, x)
            dist.barrier()
            samples[name].append(1e3 * (time.perf_counter() - begin))
    result = {}
    logits_bytes = num_tokens * vocab_size // world_size * x.logits.itemsize
    for name in names:
        x.logits.detach().copy_(fresh)
        growth = peak_growth_bytes(name, x) - x.hidden.nbytes - x.output_weight.nbytes
        result[name] = (min(samples[name][1:]), growth / logits_bytes)
    return result


def report(
    names: list[str], references: list[str], shapes: list[tuple[int, int]], repeats: int
) -> list[dict[str, Any]]:
    """Measures `names` for all shapes (tokens, V), types and TP sizes; prints a table."""
    header = ["tokens", "V", "type", "TP", "row", "ms", *(f"/ {r}" for r in references), "peak"]
    print("\n| " + " | ".join(header) + " |\n|" + " --- |" * len(header))
    rows = []
    for (num_tokens, vocab_size), dtype, tp in itertools.product(shapes, DTYPES, (1, 2)):
        threads = max(1, torch.get_num_threads() // tp)
        arguments = (threads, repeats, names, num_tokens, vocab_size, dtype)
        ranks = run_distributed(measure, tp, *arguments, timeout=900)
        ms = {name: max(rank[name][0] for rank in ranks) for name in names}
        for name in names:
            ratios = [ms[name] / ms[reference] for reference in references]
            peak = max(rank[name][1] for rank in ranks)
            values = [num_tokens, vocab_size, dtype, tp, name, ms[name], *ratios, peak]
            rows.append(dict(zip(header, values, strict=True)))
            cells = (f"{v:.2f}" if isinstance(v, float) else str(v) for v in values)
            print("| " + " | ".join(cells) + " |", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="64 tokens, V=4,096: does it run?")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/loss.json"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    if args.device == "cuda":
        loss_gpu.main(args.small, args.repeats, args.output)
        return
    logits_shapes = [(64, 4096)] if args.small else [(1024, 49_152), (1024, 128_256)]
    hidden_shapes = [(64, 4096)] if args.small else [(4096, 49_152)]
    rows = report(
        list(LOGITS_ROWS), ["unfused", "in place", "softmax"], logits_shapes, args.repeats
    )
    rows += report(list(HIDDEN_ROWS), ["layer, loss"], hidden_shapes, max(1, args.repeats // 3))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
