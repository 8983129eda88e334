"""Random inputs of the loss against its formula in long double: `make fuzz`.

A case is determined by its number. It draws the objective, the shapes, the types, the strides, the
edges, how many tokens a chunk has and the gradient from above. A failure names its number:
`python tests/fuzz_loss.py --first NUMBER --cases 1 --tp TP` runs that case alone.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from distributed import run_distributed
from loss_cases import MODES
from torch import Tensor
from tqdm import tqdm

import nemo_kd.loss.eager
import nemo_kd.loss.linear
from nemo_kd.loss import (
    KDLossConfig,
    KDLossOutput,
    vocab_parallel_kd_sft_loss,
    vocab_parallel_linear_kd_sft_loss,
)

Array = npt.NDArray[Any]
Real = np.longdouble
OBJECTIVES = sorted({(c.divergence, c.tail) for c in MODES.values()})
FRONTS = ("topk", "topk", "inplace", "inplace", "full", "linear")


@dataclass
class FuzzCase:
    """Arguments of the loss over the whole vocabulary, and how it is called."""

    config: KDLossConfig
    front: str  # of FRONTS
    logits: Tensor  # [..., V]
    hidden: Tensor  # [S, B, H]; with `weight` the logits of front "linear"
    weight: Tensor  # [V, H]
    labels: Tensor
    log_probs: Tensor
    ids: Tensor
    tails: Tensor
    above: Tensor  # [...] float32, the gradient of each token's loss
    chunk_tokens: int


def draw_case(number: int, tp_size: int) -> FuzzCase:
    rng = np.random.default_rng([number, tp_size])

    def choose(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    front = choose(*FRONTS)
    shapes = [(3,), (2, 3), (3, 2), (1, 4), (5, 1), (2, 2, 2), (), (0, 2)]
    shape = choose((3, 2), (4, 1), (2, 3)) if front == "linear" else choose(*shapes)
    v = tp_size * int(choose(1, 2, 5, 12, 24, 33))
    k = int(choose(1, v, rng.integers(1, v + 1), min(v, 6)))
    real = choose(torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
    if front == "linear":
        real = choose(torch.float32, torch.float64)
    logits = rng.standard_normal((*shape, v)) * choose(0.0, 0.1, 3, 3, 30, 1e4) + choose(
        0, 0, 0, 5000, -300
    )
    if rng.random() < 0.3:  # a student that is certain of something
        logits[..., rng.integers(v)] += choose(200, -200, 50, 1e4)
    labels = rng.integers(0, v, shape)
    log_probs, ids, tails = draw_rows(rng, choose, shape, v, k)
    if rng.random() < 0.1 and front != "linear":  # a vocabulary with ids that are ruled out
        barred = np.ones((*shape, v), bool)
        np.put_along_axis(barred, np.maximum(ids, 0), False, -1)
        np.put_along_axis(barred, labels[..., None], False, -1)
        logits[barred & (rng.random((*shape, v)) < 0.5)] = -np.inf
    divergence, tail = choose(*OBJECTIVES)
    kd_weight, sft_weight = choose((1.0, 0.4), (0.0, 1.0), (1.0, 0.0), (0.7, 1.3), (1e-3, 1e3))
    width = int(choose(1, 4, 7))
    return FuzzCase(
        KDLossConfig(
            divergence=divergence,
            tail=tail,
            temperature=choose(0.25, 0.5, 1.0, 1.0, 1.7, 2.0, 20.0),
            jsd_beta=choose(0.01, 0.3, 0.5, 0.99),
            kd_loss_weight=kd_weight,
            sft_loss_weight=sft_weight,
            logits_gather="full" if front == "full" else "topk",
        ),
        front,
        laid_out(torch.tensor(logits.clip(-60000, 60000)).to(real), rng),
        torch.tensor(rng.standard_normal((*shape, width))).to(real),
        torch.tensor(rng.standard_normal((v, width)) * choose(0.1, 2)).to(real),
        laid_out(torch.tensor(labels).to(choose(torch.int64, torch.int32, torch.uint8)), rng),
        laid_out(torch.tensor(log_probs).to(choose(torch.float32, torch.float16)), rng),
        laid_out(torch.tensor(ids).to(choose(torch.int64, torch.int32, torch.int16)), rng),
        laid_out(torch.tensor(tails).to(choose(torch.float32, torch.float16)), rng),
        torch.tensor(rng.standard_normal(shape) * (rng.random(shape) < 0.8)).float(),
        int(choose(1, 2, 3, 4, 100)),
    )


def draw_rows(
    rng: np.random.Generator, choose: Callable[..., Any], shape: tuple[int, ...], v: int, k: int
) -> tuple[Array, Array, Array]:
    """Log-probs, ids and tails of a teacher: its top k or any k entries, whole or damaged."""
    teacher = rng.standard_normal((*shape, v)) * choose(0.0, 0.1, 2, 2, 30)
    teacher -= np.logaddexp.reduce(teacher, -1, keepdims=True)
    order = np.argsort(choose(-teacher, rng.random((*shape, v))), -1)
    ids = order[..., :k]
    log_probs = np.take_along_axis(teacher, ids, -1)
    rest = np.take_along_axis(teacher, order[..., k:], -1)
    # A reduction of nothing is -inf, which is the tail of a row of the whole vocabulary.
    tails = np.logaddexp.reduce(rest, -1)
    damage = choose(*[None] * 8, "pads", "empty", "-inf", "all -inf", "shift", "sharp", "no tail")
    if damage == "pads":
        ids[rng.random(ids.shape) < 0.5] = -1
    elif damage == "empty":
        ids[...] = -1
    elif damage == "-inf":
        log_probs[rng.random(ids.shape) < 0.5] = -np.inf
    elif damage == "all -inf":
        log_probs[...] = -np.inf
    elif damage == "shift":
        log_probs += choose(-500, -20, 1e-3)
    elif damage == "sharp":
        log_probs[..., 1:] -= 100
    elif damage == "no tail":
        tails = np.full(shape, choose(-np.inf, -9.0))
    if damage in ("pads", "empty") and rng.random() < 0.5:
        log_probs[ids < 0] = -np.inf
    return log_probs, ids, np.asarray(tails)


def laid_out(tensor: Tensor, rng: np.random.Generator) -> Tensor:
    """The same values with other strides."""
    kind = rng.integers(6)
    if kind == 0 and tensor.dim() > 1:  # [S, B, ...] out of memory [B, S, ...]
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == 1 and tensor.dim() > 1:  # all but the last of each sequence
        return torch.cat([tensor, tensor[:, -1:]], 1)[:, :-1]
    if kind == 2 and tensor.dim() > 0:  # every second element
        return torch.stack([tensor, tensor], -1).flatten(-2)[..., ::2]
    if kind == 3 and tensor.dim() > 0:  # part of a wider row
        return torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]]
    return tensor


def formula(case: FuzzCase, logits: Array) -> dict[str, Array]:
    """The outputs, flat, and "gradient", dsum(loss)/dlogits [N, V], in long double."""
    config, v = case.config, logits.shape[-1]
    t = Real(config.temperature)
    k = case.ids.shape[-1]
    rows = zip(
        logits.reshape(-1, v),
        case.labels.reshape(-1).tolist(),
        case.log_probs.double().reshape(-1, k).tolist(),
        case.ids.reshape(-1, k).tolist(),
        case.tails.double().reshape(-1).tolist(),
        strict=True,
    )
    columns: dict[str, list[Any]] = {}
    for z, label, log_p, ids, tail in rows:
        q, log_q = softmax(z)
        onehot = (np.arange(v) == label).astype(Real)
        row: dict[str, Any] = {"sft_loss": -log_q[label], "kd_loss": Real(0)}
        row |= dict.fromkeys(("teacher_topk_mass", "student_topk_mass", "teacher_entropy"), Real(0))
        sft_gradient, kd_gradient = q - onehot, np.zeros(v, Real)
        kept = {i: Real(lp) for i, lp in zip(ids, log_p, strict=True) if i >= 0}
        if kept:
            row["teacher_topk_mass"] = np.exp(np.array(list(kept.values()))).sum()
            row["student_topk_mass"] = softmax(z / t)[0][list(kept)].sum()
            log_t, classes = targets(kept, label, Real(tail), config, v)
            if log_t is not None:
                support = log_t > -np.inf
                row["teacher_entropy"] = -(np.exp(log_t[support]) * log_t[support]).sum()
                kd, gradient = divergence(log_t, classes, z / t, config)
                row["kd_loss"], kd_gradient = t * t * kd, t * gradient
        row["loss"] = weigh(config.kd_loss_weight, row["kd_loss"]) + weigh(
            config.sft_loss_weight, row["sft_loss"]
        )
        row["gradient"] = weigh(config.kd_loss_weight, kd_gradient) + weigh(
            config.sft_loss_weight, sft_gradient
        )
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return {name: np.array(values) for name, values in columns.items()}


def weigh(weight: float, term: Any) -> Any:
    return Real(weight) * term if weight else 0 * np.nan_to_num(term)


def softmax(z: Array) -> tuple[Array, Array]:
    shifted = z - z.max()
    log_q = shifted - np.log(np.exp(shifted).sum())
    return np.exp(log_q), log_q


def targets(
    kept: dict[int, Any], label: int, tail: Any, config: KDLossConfig, v: int
) -> tuple[Array | None, list[list[int]]]:
    """The teacher's log-probs over the classes, which are lists of ids; None without any mass."""
    if config.tail == "label":
        kept = {**kept, label: np.logaddexp(kept.get(label, Real(-np.inf)), tail)}
    log_t = np.array(list(kept.values()))
    classes = [[i] for i in kept]
    if config.tail == "renormalize":
        log_t = log_t / Real(config.temperature)
    outside = [i for i in range(v) if i not in kept]
    if config.tail == "bucket" and outside:
        log_t, classes = np.append(log_t, tail), [*classes, outside]
    if (log_t == -np.inf).all():
        return None, classes
    shifted = log_t - log_t.max()
    return shifted - np.log(np.exp(shifted).sum()), classes


def divergence(
    log_t: Array, classes: list[list[int]], u: Array, config: KDLossConfig
) -> tuple[Any, Array]:
    """D(t, s) and dD/du [V]; u are the logits over the temperature."""
    if config.divergence == "reverse_kl":  # the classes that the teacher rules out are left out
        classes = [c for c, lt in zip(classes, log_t, strict=True) if lt > -np.inf]
        log_t = log_t[log_t > -np.inf]
    within = [softmax(u[c])[0] if (u[c] > -np.inf).any() else 0 * u[c] for c in classes]
    a = np.array([np.logaddexp.reduce(u[c]) for c in classes])
    t = np.exp(log_t)
    gradient = np.zeros(len(u), Real)
    if not config.restricts_student:
        q, log_q = softmax(u)
        kept = t > 0
        kd = (t[kept] * (log_t[kept] - log_q[[c[0] for c in classes]][kept])).sum()
        gradient += q
        da = -t
    else:
        # Over the whole vocabulary for bucket, whose classes are all of it.
        s, log_s = softmax(a)
        kd, da = Real(0), np.zeros(len(a), Real)
        if config.divergence == "forward_kl":
            kept = t > 0
            kd, da = (t[kept] * (log_t[kept] - log_s[kept])).sum(), s - t
        elif config.divergence == "reverse_kl":
            lives = s > 0
            difference = np.where(lives, log_s - log_t, 0)
            kd = (s * difference).sum()
            da = s * (difference - kd)
        else:
            beta = Real(config.jsd_beta)
            log_m = np.logaddexp(np.log(beta) + log_t, np.log1p(-beta) + log_s)
            kept, lives = t > 0, s > 0
            difference = np.where(lives, log_s - np.where(lives, log_m, 0), 0)
            student_kl = (s * difference).sum()
            kd = beta * (t[kept] * (log_t[kept] - log_m[kept])).sum() + (1 - beta) * student_kl
            da = (1 - beta) * s * (difference - student_kl)
    for ids, share, d in zip(classes, within, da, strict=True):
        gradient[ids] += d * share
    return kd, gradient


def run_case(case: FuzzCase, rank: int = 0, tp_size: int = 1) -> tuple[KDLossOutput, list[Tensor]]:
    """This rank's output, and its gradients: [logits], or [hidden, weight]."""
    group = dist.group.WORLD if tp_size > 1 else None
    size = case.logits.shape[-1] // tp_size
    own = slice(rank * size, (rank + 1) * size)
    itemsize = 8 if case.logits.dtype == torch.float64 else 4
    nemo_kd.loss.eager.CHUNK_BYTES["cpu"] = case.chunk_tokens * size * itemsize
    nemo_kd.loss.linear._BLOCK_BYTES["cpu"] = case.chunk_tokens * size * itemsize
    rows = (case.labels, case.log_probs, case.ids, case.tails)
    options: dict[str, Any] = {"config": case.config, "tp_group": group}
    if case.front == "linear":
        leaves = [case.hidden.clone().requires_grad_(), case.weight[own].clone().requires_grad_()]
        out = vocab_parallel_linear_kd_sft_loss(*leaves, *rows, token_weights=case.above, **options)
        out.loss.backward()
    else:
        logits = case.logits[..., own].detach()
        if case.front == "inplace":  # the memory is the loss's own, with the strides that it had
            logits = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype).copy_(
                logits
            )
        leaves = [logits.requires_grad_()]
        out = vocab_parallel_kd_sft_loss(
            logits.view_as(logits), *rows, inplace=case.front == "inplace", **options
        )
        out.loss.backward(case.above.to(out.loss.dtype))
    return out, [leaf.grad if leaf.grad is not None else leaf * 0 for leaf in leaves]


def faults(case: FuzzCase, out: KDLossOutput, gradients: list[Tensor]) -> list[str]:
    """What differs from the formula by more than the type's rounding explains."""
    linear = case.front == "linear"
    exact = [x.double().numpy().astype(Real) for x in (case.hidden, case.weight)]
    logits = exact[0] @ exact[1].T if linear else case.logits.double().numpy().astype(Real)
    v = logits.shape[-1]
    with np.errstate(all="ignore"):
        expected = formula(case, logits) if logits.size else {}
    if not expected:
        return []
    kd_room, sft_room = rooms(case, logits.reshape(-1, v), linear)
    w_kd, w_sft = case.config.kd_loss_weight, case.config.sft_loss_weight
    t = case.config.temperature
    room_of = {
        "loss": w_kd * t * t * kd_room + w_sft * sft_room,
        "kd_loss": t * t * kd_room,
        "sft_loss": sft_room,
    }
    named = {**out._asdict(), **out.metrics}
    found = []
    for name, want in expected.items():
        if name != "gradient" and not (linear and name == "loss"):
            got = named[name].detach().double().flatten().numpy()
            room = room_of.get(name, kd_room + sft_room)
            found += differing(name, got, want, room + 4 * sft_room * np.abs(want))
    above = case.above.double().flatten().numpy().astype(Real)[:, None]
    want = np.where(above == 0, 0, expected["gradient"] * above)
    room = (w_kd * t * kd_room + w_sft * sft_room)[:, None] * np.abs(above) * np.ones_like(want)
    relative = 4 * sft_room.max()
    if linear:
        hidden, weight = exact[0].reshape(-1, exact[0].shape[-1]), exact[1]
        room = room + relative * np.abs(want)
        wants = [want @ weight, want.T @ hidden]
        room_for = [room @ np.abs(weight), room.T @ np.abs(hidden)]
    else:
        wants, room_for = [want], [room]
    # Half precision rounds once. Triton's interpreter cuts float32 off to bfloat16.
    cut = 2 if os.environ.get("NEMO_KD_KERNELS") == "triton" else 1
    rounding = {torch.bfloat16: cut * 2.0**-8, torch.float16: 2.0**-11}.get(case.logits.dtype, 0)
    smallest = 2.0**-24 if case.logits.dtype == torch.float16 else 0
    for index, (got_tensor, one, allowed) in enumerate(
        zip(gradients, wants, room_for, strict=True)
    ):
        got = got_tensor.double().numpy().reshape(one.shape)
        allowed = allowed + np.abs(one) * (rounding + relative) + smallest
        found += differing(f"gradient {index}", got, one, allowed)
    return found


def rooms(case: FuzzCase, logits: Array, linear: bool) -> tuple[Array, Array]:
    """The error of a divergence and of the cross entropy that rounding explains, of each row [N].

    An exponent x has an error of |x| epsilon. Each sum and each exp adds some epsilon.
    """
    t, (n, v) = min(case.config.temperature, 1.0), logits.shape
    epsilon = 2.0**-53 if case.logits.dtype == torch.float64 else 2.0**-24
    if linear:
        epsilon *= 4  # the logits are rounded products
    magnitude = np.where(np.isfinite(logits), np.abs(logits), 0).astype(float)
    largest = magnitude.max(-1)
    relevant = largest
    if case.config.tail == "renormalize":  # nothing outside the entries takes part
        ids = case.ids.long().reshape(n, -1).numpy()
        relevant = np.where(ids >= 0, np.take_along_axis(magnitude, np.maximum(ids, 0), -1), 0).max(
            -1
        )
    log_p = case.log_probs.double().reshape(n, -1).numpy()
    log_p = np.where(np.isfinite(log_p), np.abs(log_p), 0).max(-1)
    base = 8 + v**0.5
    return 16 * epsilon * (base + relevant / t + log_p / t), 16 * epsilon * (base + largest)


def differing(name: str, got: Array, want: Array, allowed: Any) -> list[str]:
    with np.errstate(all="ignore"):
        close = np.abs(got - want) <= allowed
    same = close | (got == want) | (np.isnan(got) & np.isnan(want.astype(float)))
    if same.all():
        return []
    index = tuple(int(i[0]) for i in np.nonzero(~same))
    limit = np.broadcast_to(allowed, want.shape)[index]
    return [f"{name}{list(index)}: {got[index]:.9g} for {want[index]:.9g}, room {limit:.2g}"]


def describe(case: FuzzCase) -> str:
    c = case.config
    shapes = ", ".join(
        f"{name} {str(x.dtype)[6:]} {list(x.shape)} {x.stride()}"
        for name, x in (("logits", case.logits), ("log_probs", case.log_probs), ("ids", case.ids))
    )
    return f"{case.front} {c.divergence}/{c.tail} T={c.temperature:g}, {shapes}"


def check(numbers: range, rank: int = 0, tp_size: int = 1) -> list[str]:
    """Run the cases and return a line for each that is wrong. Ranks divide the comparing."""
    torch.set_num_threads(1)
    wrong = []
    for number in tqdm(numbers, desc=f"TP={tp_size}", disable=None if rank == 0 else True):
        case = draw_case(number, tp_size)
        try:
            out, gradients = run_case(case, rank, tp_size)
            if tp_size > 1:
                gradients = [
                    gathered(gradient, along=dim, shared=shared, tp_size=tp_size)
                    for gradient, (dim, shared) in zip(gradients, layout(case), strict=True)
                ]
        except Exception as error:  # a crash is a finding as well
            if tp_size > 1:
                raise RuntimeError(f"case {number} at TP={tp_size}: {describe(case)}") from error
            wrong.append(f"case {number}: {describe(case)}: {type(error).__name__}: {error}")
            continue
        if number % tp_size == rank:
            wrong += [f"case {number}: {describe(case)}: {f}" for f in faults(case, out, gradients)]
    return wrong


def layout(case: FuzzCase) -> list[tuple[int, bool]]:
    """Of each gradient: the dimension that is sharded, or whether every rank has all of it."""
    return [(-1, True), (0, False)] if case.front == "linear" else [(-1, False)]


def gathered(gradient: Tensor, *, along: int, shared: bool, tp_size: int) -> Tensor:
    if shared:
        return gradient
    wide = gradient.double().contiguous()
    parts = [torch.empty_like(wide) for _ in range(tp_size)]
    dist.all_gather(parts, wide)
    return torch.cat(parts, along)


def check_rank(rank: int, world_size: int, numbers: range) -> list[str]:
    return check(numbers, rank, world_size)


def fuzz(numbers: range, tp_size: int, timeout: float = 600) -> list[str]:
    if tp_size == 1:
        return check(numbers)
    return [*chain(*run_distributed(check_rank, tp_size, numbers, timeout=timeout))]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, default=20000, help="cases at each TP")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2, 4], help="default 1 2 4")
    arguments = parser.parse_args()
    num_wrong = 0
    for tp_size in arguments.tp:
        numbers = range(arguments.first, arguments.first + arguments.cases)
        wrong = fuzz(numbers, tp_size, timeout=7200)
        num_wrong += len(wrong)
        print(
            "\n".join([*wrong[:50], f"TP={tp_size}: {len(wrong)} faults in {len(numbers)} cases"])
        )
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
