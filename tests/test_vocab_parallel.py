"""What loss and teacher share on a sharded vocabulary, whole and in real gloo processes."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed

from nemo_kd.vocab_parallel import (
    all_gather,
    all_reduce_max,
    all_reduce_sum,
    global_log_sum_exp,
    global_topk,
    vocab_shard_range,
)

V, K = 24, 7


def plain_logits() -> torch.Tensor:
    return torch.randn(5, V, generator=torch.Generator().manual_seed(0))


def logits_with_ties() -> torch.Tensor:
    """Four values over 24 ids: every row has ties, across shards and at the Kth place."""
    return torch.randint(-2, 2, (50, V), generator=torch.Generator().manual_seed(0)).bfloat16()


def logits_with_signed_zeros() -> torch.Tensor:
    return torch.tensor([0.0, -0.0, -1.0, 0.0, -0.0, -torch.inf] * (V // 6))[None]


LOGITS = {
    "plain": plain_logits,
    "ties": logits_with_ties,
    "signed_zeros": logits_with_signed_zeros,
    "1e4": lambda: plain_logits() * 1e4,
    "float16": lambda: plain_logits().half(),
}


def expected_topk(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Higher logit first, then lower id: a stable descending sort."""
    values, ids = logits.float().sort(dim=-1, descending=True, stable=True)
    return values[:, :k], ids[:, :k]


def on_every_rank(rank: int, world_size: int) -> dict[str, Any]:
    group = dist.group.WORLD
    start, end = vocab_shard_range(V // world_size, group)
    local = torch.tensor([rank + 1.0, -torch.inf, -torch.inf if rank else 5000.0])
    return {
        "range": (start, end),
        "max": all_reduce_max(torch.tensor([float(rank), -float(rank)]), group),
        "sum": all_reduce_sum(torch.tensor([float(rank), 1.0]), group),
        "gather": all_gather(torch.tensor([rank]), group),
        "gather_strided": all_gather(torch.tensor([[rank, 0], [-rank, 0]])[:, 0], group),
        "log_sum_exp": global_log_sum_exp(local, group),
        "topk": {
            (name, k): global_topk(make()[:, start:end], k, group)
            for name, make in LOGITS.items()
            for k in (1, K, V)
        },
    }


@pytest.fixture(scope="module", params=(2, 4), ids=lambda size: f"TP={size}")
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_distributed(on_every_rank, request.param)


def test_reductions(ranks: list[dict[str, Any]]) -> None:
    size = len(ranks)
    for rank, result in enumerate(ranks):
        assert result["range"] == (rank * V // size, (rank + 1) * V // size)
        assert result["max"].tolist() == [size - 1, 0]
        assert result["sum"].tolist() == [size * (size - 1) / 2, size]
        assert torch.cat(result["gather"]).tolist() == list(range(size))
        assert torch.stack(result["gather_strided"]).tolist() == [[r, -r] for r in range(size)]
        first = torch.arange(1.0, size + 1).logsumexp(0)
        expected = torch.stack([first, torch.tensor(-torch.inf), torch.tensor(5000.0)])
        torch.testing.assert_close(result["log_sum_exp"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("k", [1, K, V])
@pytest.mark.parametrize("name", LOGITS)
def test_global_topk_is_the_same_for_every_tp_size(
    ranks: list[dict[str, Any]], name: str, k: int
) -> None:
    logits = LOGITS[name]()
    values, ids = expected_topk(logits, k)
    for result in [*(rank["topk"][name, k] for rank in ranks), global_topk(logits, k, None)]:
        assert torch.equal(result[0], values)
        assert torch.equal(result[1], ids)
        assert result[0].dtype == torch.float32
        assert result[1].dtype == torch.int64


def test_unsharded_moves_nothing() -> None:
    x = torch.tensor([1.0, 2.0])
    assert vocab_shard_range(10, None) == (0, 10)
    assert all_reduce_max(x, None) is x
    assert all_reduce_sum(x, None) is x
    assert all_gather(x, None) == [x]
    assert global_log_sum_exp(x, None) is x


@pytest.mark.parametrize("k", [0, V + 1])
def test_k_outside_the_vocabulary_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"expected 1 <= k <= {V}, .*got k={k}"):
        global_topk(plain_logits(), k, None)
