"""Teacher rows against float64, whole and sharded."""

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed

import nemo_kd.selection
from nemo_kd.selection import SelectionConfig, TeacherRows, select_teacher_rows

COLUMNS, VOCAB_SIZE = 48, 43  # five padded columns, all on the last shard


def teacher_logits(name: str) -> torch.Tensor:
    logits = torch.randn(9, COLUMNS, generator=torch.Generator().manual_seed(1)) * 3
    logits[:, VOCAB_SIZE:] = 100  # a padded column is never trained: it may hold anything
    if name == "certain":
        logits[:, 3] += 60  # the tail is e-27: 1 - sum of the kept is 0 in any float type
    if name == "far_from_zero":
        logits += 1000
    if name == "bfloat16":
        logits = logits.bfloat16()
    if name == "ties":
        logits = logits.round()
    return logits


NAMES = ("plain", "certain", "far_from_zero", "bfloat16", "ties")
CONFIGS = {
    f"k={k}-T{temperature:g}": SelectionConfig(k=k, temperature=temperature)
    for k in (1, 7, 20, VOCAB_SIZE)  # 20 is more than a shard of 12 holds
    for temperature in (1.0, 2.0)
}


def expected_rows(name: str, config: SelectionConfig) -> TeacherRows:
    logits = teacher_logits(name)[:, :VOCAB_SIZE].double()
    log_probs = (logits / config.temperature).log_softmax(-1)
    kept, ids = log_probs.sort(dim=-1, descending=True, stable=True)
    tail = kept[:, config.k :].logsumexp(-1)
    return TeacherRows(ids[:, : config.k].int(), kept[:, : config.k], tail)


def assert_rows(rows: TeacherRows, name: str, config: SelectionConfig) -> None:
    expected = expected_rows(name, config)
    assert rows.topk_ids.dtype == torch.int32
    assert rows.topk_log_probs.dtype == rows.tail_log_probs.dtype == torch.float32
    assert torch.equal(rows.topk_ids, expected.topk_ids)
    # A float32 logit near 1000 has steps of 6e-5, and so has the log-sum-exp beside it.
    tolerance = {"rtol": 1e-5, "atol": 2e-4 if name == "far_from_zero" else 1e-6}
    torch.testing.assert_close(rows.topk_log_probs.double(), expected.topk_log_probs, **tolerance)
    torch.testing.assert_close(rows.tail_log_probs.double(), expected.tail_log_probs, **tolerance)
    assert (rows.topk_log_probs.diff(dim=-1) <= 0).all()


def on_every_rank(rank: int, world_size: int) -> dict[tuple[str, str], TeacherRows]:
    nemo_kd.selection._CHUNK_BYTES["cpu"] = 4 * COLUMNS  # one to four tokens a chunk of nine
    shard = slice(rank * COLUMNS // world_size, (rank + 1) * COLUMNS // world_size)
    return {
        (name, key): select_teacher_rows(
            teacher_logits(name)[:, shard], config, VOCAB_SIZE, dist.group.WORLD
        )
        for name in NAMES
        for key, config in CONFIGS.items()
    }


@pytest.fixture(scope="module", params=(2, 4), ids=lambda size: f"TP={size}")
def ranks(request: pytest.FixtureRequest) -> list[dict[tuple[str, str], TeacherRows]]:
    return run_distributed(on_every_rank, request.param)


@pytest.mark.parametrize("key", CONFIGS)
@pytest.mark.parametrize("name", NAMES)
def test_sharded_rows(ranks: list[dict[tuple[str, str], TeacherRows]], name: str, key: str) -> None:
    for rows in ranks:
        assert_rows(rows[name, key], name, CONFIGS[key])


@pytest.mark.parametrize("tokens_a_chunk", [1, 4, 100])
@pytest.mark.parametrize("key", CONFIGS)
@pytest.mark.parametrize("name", NAMES)
def test_rows(name: str, key: str, tokens_a_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(nemo_kd.selection._CHUNK_BYTES, "cpu", 4 * COLUMNS * tokens_a_chunk)
    logits = teacher_logits(name)
    before = logits.clone()
    assert_rows(select_teacher_rows(logits, CONFIGS[key], VOCAB_SIZE), name, CONFIGS[key])
    assert torch.equal(logits, before)


def test_nothing_outside_the_whole_vocabulary() -> None:
    rows = select_teacher_rows(teacher_logits("plain"), SelectionConfig(k=VOCAB_SIZE), VOCAB_SIZE)
    assert (rows.tail_log_probs == -torch.inf).all()


def test_no_tokens() -> None:
    rows = select_teacher_rows(torch.randn(0, COLUMNS), SelectionConfig(k=7), VOCAB_SIZE)
    assert rows.topk_ids.shape == (0, 7)
    assert rows.tail_log_probs.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "top_n"}, "expected selection.kind top_k, top_p or sample, got 'top_n'"),
        ({"k": 0}, "expected selection.k >= 1, got 0"),
        ({"num_draws": 0}, "expected selection.num_draws >= 1, got 0"),
        ({"p": 0.0}, "expected 0 < selection.p <= 1, got 0.0"),
        ({"p": 1.5}, "expected 0 < selection.p <= 1, got 1.5"),
        ({"temperature": 0.0}, "expected selection.temperature > 0, got 0.0"),
        ({"seed": -1}, r"expected 0 <= selection.seed < 2\*\*63, got -1"),
    ],
)
def test_config_refuses_what_has_no_meaning(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelectionConfig(**change)


def test_k_above_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected selection.k <= 43, .* got selection.k=44; set"):
        select_teacher_rows(teacher_logits("plain"), SelectionConfig(k=44), VOCAB_SIZE)


@pytest.mark.parametrize("vocab_size", [0, COLUMNS + 1])
def test_vocabulary_that_the_logits_do_not_hold_is_refused(vocab_size: int) -> None:
    with pytest.raises(
        ValueError, match=f"expected 1 <= vocab_size <= 48.*got vocab_size={vocab_size}"
    ):
        select_teacher_rows(teacher_logits("plain"), SelectionConfig(k=1), vocab_size)
