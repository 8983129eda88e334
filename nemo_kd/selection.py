"""From the teacher's logits to the few entries of its distribution that the cache keeps."""

from dataclasses import dataclass
from math import log2
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_kd.vocab_parallel import (
    LOG2_E,
    all_gather,
    all_reduce_max,
    all_reduce_sum,
    global_log_sum_exp,
    global_topk,
    num_vocab_shards,
    vocab_shard_range,
)

_CHUNK_BYTES = (
    16 * 2**20
)  # one chunk of tokens in float32; sample holds four times as much beside it
# The most probable entry has a mass of 2^40: a sum over 2^22 entries fits an int64.
_MASS_BITS = 40


@dataclass(frozen=True)
class SelectionConfig:
    """Which entries of a teacher's row are kept.

    Raises:
        ValueError: a field is out of its range or `kind` is unknown.
    """

    kind: Literal["top_k", "top_p", "sample"] = "top_k"
    k: int = 100  # entries kept; for top_p their upper bound
    p: float = 0.99  # top_p: the smallest set with at least this mass
    num_draws: int = 50  # sample: draws with replacement
    temperature: float = 1.0  # log-probs are those of softmax(logits / temperature)
    seed: int = 1234  # sample: with a token's row key, all that its draws depend on

    def __post_init__(self) -> None:
        if self.kind not in ("top_k", "top_p", "sample"):
            raise ValueError(f"expected selection.kind top_k, top_p or sample, got {self.kind!r}")
        for name in ("k", "num_draws"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(
                    f"expected selection.{name} >= 1, got {value}; set it to 1 or more"
                )
        if not 0 < self.p <= 1:
            raise ValueError(
                f"expected 0 < selection.p <= 1, got {self.p}; p is a share of the teacher's mass"
            )
        if not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"expected selection.temperature > 0, got {self.temperature}; "
                "1.0 leaves the teacher as it is"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"expected 0 <= selection.seed < 2**63, got {self.seed}")


class TeacherRows(NamedTuple):
    """What is kept of N tokens' distributions, by descending log-prob.

    K is `k`, or for sample the smaller of `num_draws` and the vocabulary's size. Rows of top_p and
    sample may be shorter: id -1 and log-prob -inf fill them up.
    """

    topk_ids: Tensor  # [N, K] int32, ids in the whole vocabulary
    topk_log_probs: Tensor  # [N, K] float32
    tail_log_probs: Tensor  # [N] float32, log of the mass outside; -inf when nothing is outside


def select_teacher_rows(
    logits: Tensor,
    config: SelectionConfig,
    vocab_size: int,
    tp_group: ProcessGroup | None = None,
    row_keys: Tensor | None = None,
) -> TeacherRows:
    """The rows of `log_softmax(z / T)` that `config` keeps.

    top_k keeps the K largest of z; top_p the fewest largest that hold at least the mass p, and at
    most K; sample the entries that `num_draws` draws with replacement hit, each with
    `log(count / num_draws)`, and no tail. Equal logits: the lower id first.

    `logits` is `[N, Vp]` of any float type, this rank's vocab shard; ids from `vocab_size` up are
    padding and take no part. Every rank returns the same rows. float32 inside, one chunk of tokens
    at a time. Collectives: three all-gathers of at most K entries a token; for sample, a chunk, one
    max, one all-gather and one sum of `num_draws` ids a token.

    Args:
        row_keys: `[N]` int64, what sample seeds a token's draws with, besides `config.seed`: a
            number that no other token of the run has, such as `sample << 32 | position`.

    A row of logits with NaN or inf has NaN log-probs, which no cache takes.

    Raises:
        ValueError: K is above `vocab_size`, `vocab_size` above the columns that there are, or
            `row_keys` is missing.
    """
    num_columns = logits.shape[-1] * num_vocab_shards(tp_group)
    if not 1 <= vocab_size <= num_columns:
        raise ValueError(
            f"expected 1 <= vocab_size <= {num_columns}, the logits' columns over all ranks; got "
            f"vocab_size={vocab_size}; pass the tokenizer's size and the teacher that goes with it"
        )
    if config.kind != "sample" and config.k > vocab_size:
        raise ValueError(
            f"expected selection.k <= {vocab_size}, the vocabulary's size, got "
            f"selection.k={config.k}; set selection.k={vocab_size} to keep every entry"
        )
    start, _ = vocab_shard_range(logits.shape[-1], tp_group)
    tokens_per_chunk = max(1, _CHUNK_BYTES // (4 * logits.shape[-1]))

    def scaled(chunk: Tensor) -> Tensor:
        chunk = chunk.to(torch.float32, copy=True)
        chunk[:, max(0, vocab_size - start) :] = -torch.inf
        return chunk if config.temperature == 1 else chunk.div_(config.temperature)

    chunks = torch.split(logits, tokens_per_chunk)
    if config.kind == "sample":
        if row_keys is None:
            raise ValueError("expected row_keys, the seeds of the draws, for selection.kind=sample")
        parts = [
            _draw(scaled(chunk), config, keys, tp_group)
            for chunk, keys in zip(chunks, torch.split(row_keys, tokens_per_chunk), strict=True)
        ]
        ids, counts, finite = (torch.cat(part) for part in zip(*parts, strict=True))
        ids, counts = ids[:, :vocab_size], counts[:, :vocab_size]
        log_probs = (counts.double() / config.num_draws).log().float()
        log_probs[~finite] = torch.nan  # as those of the other kinds are then
        return TeacherRows(ids.int(), log_probs, log_probs.new_full((len(logits),), -torch.inf))
    candidates = [_local_candidates(scaled(chunk), config.k) for chunk in chunks]
    values, ids, rest = (torch.cat(part) for part in zip(*candidates, strict=True))
    rows = _merge(values, ids + start, rest, config.k, tp_group)
    return rows if config.kind == "top_k" else _cut(rows, config.p)


def _local_candidates(scaled: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """This shard's k largest, their columns, and the log-sum-exp of its others; spoils `scaled`.

    The tail is summed from the logits that were not kept, never as 1 - sum of the kept: a confident
    teacher's tail of 1e-12 is as exact as one of 0.5.
    """
    values, columns = _topk(scaled, min(k, scaled.shape[-1]))
    rest = scaled.scatter_(1, columns, -torch.inf)
    # A quarter of torch.logsumexp's time, which is most of what a row costs here.
    peak = rest.amax(-1, keepdim=True).clamp_(min=torch.finfo(rest.dtype).min)  # -inf: all are kept
    rest.sub_(peak).mul_(LOG2_E).exp2_()
    return values, columns, rest.sum(-1).log_().add_(peak[:, 0])


def _topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`global_topk(logits, k, None)`, from the k blocks of columns with the largest maxima.

    A column elsewhere has k before it: of each of these blocks one that is larger, or as large
    with a lower id. So the blocks, in order of their columns, also break ties as the row does.
    """
    num_tokens, num_columns = logits.shape
    block = 2 << int(log2(num_columns / k) / 2)
    if num_columns % block or k * block >= num_columns:
        return global_topk(logits, k, None)
    blocks = logits.view(num_tokens, num_columns // block, block)
    chosen = global_topk(blocks.amax(-1), k, None)[1].sort(dim=-1).values
    candidates = blocks.gather(1, chosen[:, :, None].expand(-1, -1, block)).flatten(1)
    values, places = global_topk(candidates, k, None)
    return values, chosen.gather(1, places // block) * block + places % block


def _merge(
    values: Tensor, ids: Tensor, rest: Tensor, k: int, tp_group: ProcessGroup | None
) -> TeacherRows:
    """The k largest of all shards' candidates, normalised over the whole vocabulary."""
    # Shards follow each other by id, so that the place among candidates breaks ties as the id does.
    values = torch.cat(all_gather(values, tp_group), dim=-1)
    ids = torch.cat(all_gather(ids, tp_group), dim=-1)
    values, places = global_topk(values, values.shape[-1], None)
    kept = values[:, :k]
    # Outside the row: what no shard offered, and what the shards offered above K in all.
    tail = torch.cat([global_log_sum_exp(rest, tp_group)[:, None], values[:, k:]], dim=-1)
    normaliser = torch.cat([kept, tail], dim=-1).logsumexp(-1)
    return TeacherRows(
        topk_ids=ids.gather(1, places[:, :k]).int(),
        topk_log_probs=kept - normaliser[:, None],
        tail_log_probs=tail.logsumexp(-1) - normaliser,
    )


def _cut(rows: TeacherRows, p: float) -> TeacherRows:
    """Keep an entry while it and all after it, the tail included, hold more than 1 - p."""
    mass = torch.cat([rows.topk_log_probs, rows.tail_log_probs[:, None]], dim=-1).double().exp()
    # Summed from the smallest up, so that p = 1 keeps all that has mass.
    kept = mass.flip(-1).cumsum(-1).flip(-1)[:, :-1] > 1 - p
    kept[:, 0] = True
    cut = rows.topk_log_probs.masked_fill(kept, -torch.inf).logsumexp(-1)
    return TeacherRows(
        topk_ids=rows.topk_ids.masked_fill(~kept, -1),
        topk_log_probs=rows.topk_log_probs.masked_fill(~kept, -torch.inf),
        tail_log_probs=torch.logaddexp(rows.tail_log_probs, cut),
    )


def _draw(
    scaled: Tensor, config: SelectionConfig, row_keys: Tensor, tp_group: ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """ids and counts `[N, num_draws]` of a chunk's draws, largest count first, then lowest id; and
    `[N]` whether the row has no NaN or inf to draw from.

    A draw is the first id up to which the masses sum to more than u * total. The masses are whole
    numbers: their sums are the same however the vocabulary is sharded, and so are the draws.
    Spoils `scaled`.
    """
    top = all_reduce_max(scaled.amax(-1), tp_group)
    mass = scaled.sub_(top[:, None]).exp_().mul_(2.0**_MASS_BITS).long()
    up_to = mass.cumsum_(-1)
    own = up_to[:, -1:].clone()
    totals = all_gather(own, tp_group)
    rank = 0 if tp_group is None else tp_group.rank()
    total = torch.stack(totals).sum(0)
    before = torch.stack([torch.zeros_like(own), *totals[:rank]]).sum(0)
    uniform = _uniform(row_keys, config.seed, config.num_draws)
    targets = (uniform * total.double()).long().clamp(max=total - 1) - before
    ids = torch.searchsorted(up_to, targets, right=True)
    ids += vocab_shard_range(scaled.shape[-1], tp_group)[0]
    ids = all_reduce_sum(torch.where((targets >= 0) & (targets < own), ids, 0), tp_group)
    return *_count(ids), top.isfinite()


def _count(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids and their counts, both padded to the number of draws: -1, and 0."""
    draws = draws.sort(dim=-1).values
    is_new = draws.diff(dim=-1, prepend=draws[:, :1] - 1) != 0
    places = is_new.cumsum(-1) - 1
    counts = torch.zeros_like(draws).scatter_add_(1, places, torch.ones_like(draws))
    ids = torch.full_like(draws, -1).scatter_(1, places, draws)
    counts, order = counts.sort(dim=-1, descending=True, stable=True)
    return ids.gather(1, order), counts


def _uniform(row_keys: Tensor, seed: int, num_draws: int) -> Tensor:
    """`[N, num_draws]` float64 in [0, 1): a hash of seed, row key and number of the draw."""
    step = -0x61C8864680B583EB  # 2^64 divided by the golden ratio, as an int64
    states = _mix(row_keys + _mix(torch.full_like(row_keys, seed) + step))
    numbers = torch.arange(1, num_draws + 1, device=row_keys.device)
    return _shift(_mix(states[:, None] + numbers * step), 11).double() * 2.0**-53


def _mix(state: Tensor) -> Tensor:
    """The output function of SplitMix64 on int64, whose products wrap around."""
    state = (state ^ _shift(state, 30)) * -0x40A7B892E31B1A47
    state = (state ^ _shift(state, 27)) * -0x6B2FB644ECCEEE15
    return state ^ _shift(state, 31)


def _shift(state: Tensor, bits: int) -> Tensor:
    """The bits moved right, with zeros behind them, not copies of the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
