"""From the teacher's logits to the few entries of its distribution that the cache keeps."""

from dataclasses import dataclass
from math import log2
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_kd.sampling import uniform
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

# Of one chunk of tokens in float32; `sample` allocates four times as much besides. On a GPU a chunk
# is large, because each is a dozen kernels.
_CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 512 * 2**20}
# The most probable entry has a mass of 2^40, so that a sum over 2^22 entries fits an int64.
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
    seed: int = 1234  # sample: a token's draws depend on this and on its row key only

    def __post_init__(self) -> None:
        if self.kind not in ("top_k", "top_p", "sample"):
            raise ValueError(f"expected selection.kind top_k, top_p or sample, got {self.kind!r}")
        for name, value in ("k", self.k), ("num_draws", self.num_draws):
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
    sample may be shorter than K: id -1 and log-prob -inf pad them.
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

    top_k keeps the K largest of z. top_p keeps the fewest largest that hold at least the mass p,
    and at most K. sample keeps the entries that `num_draws` draws with replacement hit, each with
    `log(count / num_draws)`, and no tail. Among equal logits the lower id comes first.

    Every rank returns the same rows. They are computed in float32, one chunk of tokens at a time.
    Collectives: three all-gathers of at most K entries a token; for sample, in each chunk, a max,
    an all-gather and a sum of `num_draws` ids a token.

    Args:
        logits: `[N, Vp]` of any float type, this rank's vocab shard. Ids from `vocab_size` up are
            padding and take no part.
        row_keys: `[N]` int64, for sample: the seed of a token's draws, besides `config.seed`. No
            other token of the run may have the same, such as `sample << 32 | position`.

    A row whose logits hold NaN or inf gets NaN log-probs, which the cache's writer refuses.

    Raises:
        ValueError: K is above `vocab_size`, `vocab_size` is above the number of columns, or
            `row_keys` is missing.
    """
    _check_vocabulary(config, vocab_size, logits.shape[-1] * num_vocab_shards(tp_group))
    start, _ = vocab_shard_range(logits.shape[-1], tp_group)
    chunk_bytes = _CHUNK_BYTES.get(logits.device.type, _CHUNK_BYTES["cuda"])
    tokens_per_chunk = max(1, chunk_bytes // (4 * logits.shape[-1]))
    chunks = (
        _scaled(chunk, config.temperature, num_ids=max(0, vocab_size - start))
        for chunk in torch.split(logits, tokens_per_chunk)
    )
    if config.kind == "sample":
        if row_keys is None:
            raise ValueError("expected row_keys, the seeds of the draws, for selection.kind=sample")
        keys = torch.split(row_keys, tokens_per_chunk)
        drawn = [
            _draw(chunk, config, vocab_size, chunk_keys, tp_group)
            for chunk, chunk_keys in zip(chunks, keys, strict=True)
        ]
        return TeacherRows(*(torch.cat(parts) for parts in zip(*drawn, strict=True)))
    candidates = [_local_candidates(chunk, config.k) for chunk in chunks]
    values, ids, rest = (torch.cat(parts) for parts in zip(*candidates, strict=True))
    rows = _merge(values, ids + start, rest, config.k, tp_group)
    return rows if config.kind == "top_k" else _cut(rows, config.p)


def _check_vocabulary(config: SelectionConfig, vocab_size: int, num_columns: int) -> None:
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


def _scaled(logits: Tensor, temperature: float, num_ids: int) -> Tensor:
    """`logits / temperature` in float32; -inf in the padding, the columns from `num_ids` up."""
    # A copy, because the caller's logits stay as they are and what follows writes in place.
    logits = logits.to(torch.float32, copy=True)
    logits[:, num_ids:] = -torch.inf
    return logits if temperature == 1 else logits.div_(temperature)


def _local_candidates(scaled: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """This shard's k largest, their columns, and the log-sum-exp of the others.

    Overwrites `scaled`. The tail is the sum of what was not kept, never 1 - the sum of what was
    kept: so a confident teacher's tail of 1e-12 is as exact as one of 0.5.
    """
    values, columns = _topk(scaled, min(k, scaled.shape[-1]))
    rest = scaled.scatter_(1, columns, -torch.inf)
    # In place and with exp2: a quarter of torch.logsumexp's time, which dominates that of a row.
    peak = rest.amax(-1, keepdim=True).clamp_(min=torch.finfo(rest.dtype).min)  # -inf: all are kept
    rest.sub_(peak).mul_(LOG2_E).exp2_()
    return values, columns, rest.sum(-1).log_().add_(peak[:, 0])


def _topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`global_topk(logits, k, None)`, found within the k blocks of columns with the largest maxima.

    No other block can hold one of the k: each of the k blocks has a column that is larger, or as
    large with a lower id. The blocks stay in the order of their columns, so that ties among the
    candidates break by id, as in the row.
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
    # Every rank needs all shards' candidates. They follow each other in the order of ids, so that
    # global_topk, which breaks ties by place, breaks them by id.
    values = torch.cat(all_gather(values, tp_group), dim=-1)
    ids = torch.cat(all_gather(ids, tp_group), dim=-1)
    values, places = global_topk(values, values.shape[-1], None)
    kept = values[:, :k]
    # The tail: what no shard offered, and the candidates after the first k.
    tail = torch.cat([global_log_sum_exp(rest, tp_group)[:, None], values[:, k:]], dim=-1)
    normaliser = torch.cat([kept, tail], dim=-1).logsumexp(-1)
    return TeacherRows(
        topk_ids=ids.gather(1, places[:, :k]).int(),
        topk_log_probs=kept - normaliser[:, None],
        tail_log_probs=tail.logsumexp(-1) - normaliser,
    )


def _cut(rows: TeacherRows, p: float) -> TeacherRows:
    """Keep the entries that, together with all after them and the tail, hold more than 1 - p."""
    mass = torch.cat([rows.topk_log_probs, rows.tail_log_probs[:, None]], dim=-1).double().exp()
    # Summed from the smallest up, so that rounding loses no entry that has mass when p is 1.
    kept = mass.flip(-1).cumsum(-1).flip(-1)[:, :-1] > 1 - p
    kept[:, 0] = True
    cut = rows.topk_log_probs.masked_fill(kept, -torch.inf).logsumexp(-1)
    return TeacherRows(
        topk_ids=rows.topk_ids.masked_fill(~kept, -1),
        topk_log_probs=rows.topk_log_probs.masked_fill(~kept, -torch.inf),
        tail_log_probs=torch.logaddexp(rows.tail_log_probs, cut),
    )


def _draw(
    scaled: Tensor,
    config: SelectionConfig,
    vocab_size: int,
    row_keys: Tensor,
    tp_group: ProcessGroup | None,
) -> TeacherRows:
    """The rows that a chunk's draws hit; overwrites `scaled`.

    A draw is the first id up to which the masses sum to more than u * total, u uniform in [0, 1).
    Masses are integers, because sums of integers do not depend on how the vocabulary is sharded.
    """
    # Every shard must scale its masses by the same, the row's largest logit.
    top = all_reduce_max(scaled.amax(-1), tp_group)
    mass = scaled.sub_(top[:, None]).exp_().mul_(2.0**_MASS_BITS).long()
    up_to = mass.cumsum_(-1)
    own = up_to[:, -1:].clone()
    # The mass up to the end of each shard says where this shard's part of u * total begins.
    ends = torch.stack(all_gather(own, tp_group)).cumsum(0)
    total = ends[-1]
    start, _ = vocab_shard_range(scaled.shape[-1], tp_group)
    before = ends[start // scaled.shape[-1]] - own
    targets = uniform(row_keys, config.seed, config.num_draws) * total.double()
    targets = targets.long().clamp(max=total - 1) - before
    ids = torch.searchsorted(up_to, targets, right=True) + start
    # One shard owns each draw and the others add 0, so that the sum is its id, on every rank.
    ids = all_reduce_sum(torch.where((targets >= 0) & (targets < own), ids, 0), tp_group)
    ids, counts = (part[:, :vocab_size] for part in _count(ids))
    log_probs = (counts.double() / config.num_draws).log().float()
    log_probs.masked_fill_(~top.isfinite()[:, None], torch.nan)
    return TeacherRows(ids.int(), log_probs, log_probs.new_full((len(ids),), -torch.inf))


def _count(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids and their counts, both `[N, num_draws]`, padded by -1 and 0.

    The largest count comes first, and among equal counts the lowest id.
    """
    draws = draws.sort(dim=-1).values
    is_new = draws.diff(dim=-1, prepend=draws[:, :1] - 1) != 0
    places = is_new.cumsum(-1) - 1
    counts = torch.zeros_like(draws).scatter_add_(1, places, torch.ones_like(draws))
    ids = torch.full_like(draws, -1).scatter_(1, places, draws)
    counts, order = counts.sort(dim=-1, descending=True, stable=True)
    return ids.gather(1, order), counts
