"""The loss on a sharded vocabulary, in real gloo processes, against the same float64 reference."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from loss_cases import EDGES, GRID, MODES, Case, V, random_case
from loss_checks import assert_matches, expected_of

import nemo_kd.loss.eager
from nemo_kd.loss import KDLossConfig, KDLossOutput, vocab_parallel_kd_sft_loss

TP_SIZES = (2, 4)
TYPED = [
    (dtype, inplace, mode)
    for dtype in (torch.float32, torch.bfloat16)
    for inplace in (False, True)
    for mode in ("forward_kl-label-T1", "jsd-bucket-T1", "forward_kl-drop-T2")
]


def run_shard(
    case: Case, config: KDLossConfig, rank: int, world_size: int, inplace: bool
) -> tuple[KDLossOutput, torch.Tensor]:
    """This rank's output and its slice of dsum(loss)/dlogits."""
    shard_size = case.logits.shape[-1] // world_size
    logits = case.logits[..., rank * shard_size : (rank + 1) * shard_size].clone().requires_grad_()
    out = vocab_parallel_kd_sft_loss(
        logits,
        case.labels,
        case.log_probs,
        case.ids,
        case.tails,
        config=config,
        tp_group=dist.group.WORLD,
        inplace=inplace,
    )
    # Not one, and the same on every rank, as a masked mean over the tokens is.
    (0.5 * out.loss).sum().backward()
    return KDLossOutput(*map(_detach, out)), 2 * logits.grad


def _detach(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def every_case(rank: int, world_size: int) -> dict[Any, Any]:
    # 4 tokens a chunk, of the 6 tokens in a case.
    nemo_kd.loss.eager.CHUNK_BYTES["cpu"] = 4 * V // world_size * 4
    results = {}
    for edge, mode, gather in GRID:
        config = replace(MODES[mode], logits_gather=gather)
        inplace = gather == "topk"
        results[edge, mode, gather] = run_shard(EDGES[edge](), config, rank, world_size, inplace)
    return results


def collectives(rank: int, world_size: int) -> dict[int, list[tuple[str, int]]]:
    """(name, elements) of every collective of forward and backward, by the number of chunks."""
    seen: list[tuple[str, int]] = []
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}
    for name in originals:

        def spy(*args: Any, name: str = name, **kwargs: Any) -> Any:
            tensor = args[0] if isinstance(args[0], torch.Tensor) else args[1]
            seen.append((name, tensor.numel()))
            return originals[name](*args, **kwargs)

        setattr(dist, name, spy)
    result = {}
    for tokens in (1, 3, 6):
        nemo_kd.loss.eager.CHUNK_BYTES["cpu"] = tokens * V // world_size * 4
        seen.clear()
        run_shard(random_case(), MODES["forward_kl-bucket-T2"], rank, world_size, inplace=True)
        result[6 // tokens] = list(seen)
    return result


def everything(rank: int, world_size: int) -> Any:
    counted = collectives(rank, world_size)
    by_type = {}
    for dtype, inplace, mode in TYPED:
        case = random_case()
        case.logits = case.logits.to(dtype)
        by_type[dtype, inplace, mode] = run_shard(case, MODES[mode], rank, world_size, inplace)
    return every_case(rank, world_size), counted, by_type


@pytest.fixture(scope="module", params=TP_SIZES, ids=lambda size: f"TP={size}")
def ranks(request: pytest.FixtureRequest) -> list[Any]:
    """What every rank saw; one start of processes for all the tests of a TP size."""
    return run_distributed(everything, request.param)


@pytest.mark.parametrize(("edge", "mode", "gather"), GRID)
def test_matches_reference(ranks: list[Any], edge: str, mode: str, gather: str) -> None:
    results = [cases[edge, mode, gather] for cases, _, _ in ranks]
    gradient = torch.cat([gradient for _, gradient in results], dim=-1)
    for out, _ in results:
        assert_matches(expected_of(edge, mode), out, gradient)


@pytest.mark.parametrize("edge", EDGES)
def test_every_rank_has_the_same_output(ranks: list[Any], edge: str) -> None:
    first, *others = [cases[edge, "forward_kl-label-T2", "topk"][0] for cases, _, _ in ranks]
    for other in others:
        assert torch.equal(first.loss, other.loss)


def test_collectives_do_not_grow_with_the_chunks(ranks: list[Any]) -> None:
    tokens, k = random_case().labels.numel(), random_case().ids.shape[-1]
    for _, counted, _ in ranks:
        expected = [("all_reduce", tokens * (k + 2)), ("all_reduce", 2 * tokens)]
        assert counted == dict.fromkeys((1, 2, 6), expected)


@pytest.mark.parametrize("typed", TYPED, ids=str)
def test_shards_equal_the_whole(ranks: list[Any], typed: Any) -> None:
    dtype, _, mode = typed
    case = random_case()
    case.logits = case.logits.to(dtype)
    logits = case.logits.clone().requires_grad_()
    whole = vocab_parallel_kd_sft_loss(
        logits, case.labels, case.log_probs, case.ids, case.tails, config=MODES[mode]
    )
    whole.loss.sum().backward()
    gradient = torch.cat([by_type[typed][1] for _, _, by_type in ranks], dim=-1)
    # A float32 sum in another order; in bfloat16 it may round to the neighbouring value.
    rtol = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(gradient, logits.grad, rtol=rtol, atol=1e-6)


def raise_on_rank_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("from rank one")


def test_run_distributed_passes_exceptions_back() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 of 2: (.|\n)*ValueError: from rank one"):
        run_distributed(raise_on_rank_one, 2)
