"""top_p and sample against float64, whole and sharded; the blocked top-k against a stable sort."""

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from test_selection import COLUMNS, NAMES, VOCAB_SIZE, teacher_logits

from nemo_kd.sampling import uniform
from nemo_kd.selection import SelectionConfig, TeacherRows, _topk, select_teacher_rows

KEYS = torch.arange(9) << 32 | 7
TOP_P = {
    f"p={p}-k={k}": SelectionConfig(kind="top_p", p=p, k=k)
    for p in (1e-20, 0.5, 0.99, 1.0)
    for k in (1, 7, VOCAB_SIZE)
}
SAMPLE = {
    f"draws={draws}-T{temperature:g}": SelectionConfig(
        kind="sample", num_draws=draws, temperature=temperature
    )
    for draws in (1, 50, 400)
    for temperature in (1.0, 2.0)
}


def select(name: str, config: SelectionConfig, shard=slice(None), group=None) -> TeacherRows:
    return select_teacher_rows(teacher_logits(name)[:, shard], config, VOCAB_SIZE, group, KEYS)


def on_every_rank(rank: int, world_size: int) -> dict[tuple[str, str], TeacherRows]:
    shard = slice(rank * COLUMNS // world_size, (rank + 1) * COLUMNS // world_size)
    return {
        (name, key): select(name, config, shard, dist.group.WORLD)
        for name in NAMES
        for key, config in (TOP_P | SAMPLE).items()
    }


@pytest.fixture(scope="module", params=(2, 4), ids=lambda size: f"TP={size}")
def ranks(request: pytest.FixtureRequest) -> list[dict[tuple[str, str], TeacherRows]]:
    return run_distributed(on_every_rank, request.param)


@pytest.mark.parametrize("key", SAMPLE)
@pytest.mark.parametrize("name", NAMES)
def test_a_sharded_vocabulary_draws_the_same(ranks, name: str, key: str) -> None:
    for rows in ranks:
        for actual, expected in zip(rows[name, key], select(name, SAMPLE[key]), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("key", TOP_P)
@pytest.mark.parametrize("name", NAMES)
def test_top_p(ranks, name: str, key: str) -> None:
    """The fewest of the sorted entries whose mass is p, their rest in the tail."""
    config = TOP_P[key]
    log_probs = teacher_logits(name)[:, :VOCAB_SIZE].double().log_softmax(-1)
    log_probs, order = log_probs.sort(dim=-1, descending=True, stable=True)
    mass_before = log_probs.exp().cumsum(-1) - log_probs.exp()
    for rows in [select(name, config), *(rank[name, key] for rank in ranks)]:
        lengths = (rows.topk_ids >= 0).sum(-1)
        for row in range(len(lengths)):
            n = int(lengths[row])
            assert rows.topk_ids[row, :n].tolist() == order[row, :n].tolist()
            assert (rows.topk_ids[row, n:] == -1).all()
            assert (rows.topk_log_probs[row, n:] == -torch.inf).all()
            # float32 log-probs beside a float64 sum: at the cut, 1e-6 of mass may go either way
            assert n == 1 or mass_before[row, n - 1] < config.p + 1e-6
            assert n == config.k or mass_before[row, n] > config.p - 1e-6
            torch.testing.assert_close(
                rows.tail_log_probs[row].double(),
                log_probs[row, n:].logsumexp(-1),
                rtol=1e-4,
                atol=3e-4,  # far_from_zero: a float32 logit near 1000 has steps of 6e-5
            )


def test_p_of_1_keeps_all_that_has_mass() -> None:
    config = SelectionConfig(kind="top_p", p=1.0, k=VOCAB_SIZE)
    for name in NAMES:
        rows = select(name, config)
        assert (rows.topk_ids >= 0).all()
        assert (rows.tail_log_probs == -torch.inf).all()


@pytest.mark.parametrize("key", SAMPLE)
def test_sampled_rows_are_counts_of_draws(key: str) -> None:
    config = SAMPLE[key]
    rows = select("plain", config)
    assert rows.topk_ids.shape == (9, min(config.num_draws, VOCAB_SIZE))
    counts = rows.topk_log_probs.exp() * config.num_draws
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-4)
    assert (counts.round().sum(-1) == config.num_draws).all()
    assert torch.equal(rows.topk_ids >= 0, counts > 0)
    assert (rows.topk_ids < VOCAB_SIZE).all()
    assert (rows.tail_log_probs == -torch.inf).all()
    for ids in rows.topk_ids:
        kept = ids[ids >= 0]
        assert len(kept.unique()) == len(kept)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_follow_the_teacher(temperature: float) -> None:
    """Chi-squared of 200,000 draws over 43 ids: 42 degrees of freedom, mean 42, deviation 9.2."""
    num_rows, num_draws = 400, 500
    logits = teacher_logits("plain")[:1].expand(num_rows, -1)
    config = SelectionConfig(kind="sample", num_draws=num_draws, temperature=temperature)
    rows = select_teacher_rows(logits, config, VOCAB_SIZE, None, torch.arange(num_rows))
    counts = torch.zeros(VOCAB_SIZE + 1).index_add_(
        0, rows.topk_ids.flatten() + 1, rows.topk_log_probs.exp().flatten() * num_draws
    )
    expected = (logits[0, :VOCAB_SIZE] / temperature).softmax(-1) * num_rows * num_draws
    chi_squared = ((counts[1:] - expected) ** 2 / expected).sum()
    assert 10 < chi_squared < 90


def test_draws_depend_on_seed_and_key_alone() -> None:
    config = SelectionConfig(kind="sample")
    whole = select("plain", config)
    for row in range(9):
        alone = select_teacher_rows(
            teacher_logits("plain")[row : row + 1], config, VOCAB_SIZE, None, KEYS[row : row + 1]
        )
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, whole, strict=True))
    other = select("plain", SelectionConfig(kind="sample", seed=5))
    assert not torch.equal(other.topk_ids, whole.topk_ids)


def test_the_hash_is_uniform_and_never_repeats() -> None:
    numbers = uniform(torch.arange(2000) << 32 | 9, 1234, 50).flatten()
    assert len(numbers.unique()) == len(numbers)
    assert 0 <= numbers.min() < 1e-4
    assert 1 - 1e-4 < numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 4 * (1 / 12 / len(numbers)) ** 0.5
    # Pinned: a cache that is resumed by a later release must get the same draws.
    first = uniform(torch.tensor([1 << 32 | 2]), 1234, 3)[0]
    torch.testing.assert_close(
        first,
        torch.tensor(
            [0.11551428536602149, 0.641917863124423, 0.35201839134050017], dtype=torch.float64
        ),
        rtol=0,
        atol=0,
    )


def test_row_keys_are_needed_to_sample() -> None:
    with pytest.raises(ValueError, match="expected row_keys, the seeds of the draws"):
        select_teacher_rows(torch.randn(1, 9), SelectionConfig(kind="sample"), 9)


@pytest.mark.parametrize("kind", ["top_k", "top_p", "sample"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_overflowed_is_no_distribution(kind: str, bad: float) -> None:
    """NaN log-probs, which the cache's writer refuses; the other rows are as ever."""
    logits = torch.randn(3, COLUMNS)
    logits[1, 5] = bad
    config = SelectionConfig(kind=kind, k=7, num_draws=7)
    rows = select_teacher_rows(logits, config, VOCAB_SIZE, None, torch.arange(3))
    kept = rows.topk_ids >= 0
    assert rows.topk_log_probs[1].isnan().any()
    assert rows.topk_log_probs[[0, 2]][kept[[0, 2]]].isfinite().all()


@pytest.mark.parametrize("kind", ["top_p", "sample"])
def test_no_tokens(kind: str) -> None:
    config = SelectionConfig(kind=kind, k=7)
    rows = select_teacher_rows(
        torch.randn(0, COLUMNS), config, VOCAB_SIZE, None, torch.empty(0, dtype=torch.int64)
    )
    assert rows.topk_ids.shape[0] == rows.tail_log_probs.shape[0] == 0


@pytest.mark.parametrize("k", [1, 3, 10, 100, 500])
@pytest.mark.parametrize("num_values", [2, 40, 10_000])
def test_blocked_topk_is_a_stable_sort(k: int, num_values: int) -> None:
    """Few values: ties at the K-th place, within blocks and across them."""
    generator = torch.Generator().manual_seed(k)
    logits = torch.randint(num_values, (20, 1024), generator=generator).float()
    logits[0] = -torch.inf
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    actual = _topk(logits, k)
    assert torch.equal(actual[0], values[:, :k])
    assert torch.equal(actual[1], ids[:, :k])
