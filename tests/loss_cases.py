"""Named inputs of the loss: every mode, and every edge that has hurt somebody's top-K loss."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_kd.loss import KDLossConfig

V, K = 48, 6  # 48 has shards of 24 at TP=2 and of 12 at TP=4

MODES = {
    f"{divergence}-{tail}-T{temperature:g}": KDLossConfig(
        divergence=divergence, tail=tail, temperature=temperature, jsd_beta=0.3, kd_loss_weight=0.7
    )
    for divergence, tails in {
        "forward_kl": ("renormalize", "bucket", "label", "drop"),
        "reverse_kl": ("renormalize", "bucket"),
        "jsd": ("renormalize", "bucket"),
    }.items()
    for tail in tails
    for temperature in (1.0, 2.0, 0.5)
}


@dataclass
class Case:
    """Arguments of the loss over the whole vocabulary; leading dimensions [S, B]."""

    logits: Tensor
    labels: Tensor
    log_probs: Tensor
    ids: Tensor
    tails: Tensor

    def flat(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The same with one leading dimension, as the reference reads it."""
        return (
            self.logits.reshape(-1, self.logits.shape[-1]),
            self.labels.reshape(-1),
            self.log_probs.reshape(-1, self.ids.shape[-1]),
            self.ids.reshape(-1, self.ids.shape[-1]),
            self.tails.reshape(-1),
        )


def random_case(seed: int = 0, shape: tuple[int, ...] = (3, 2), k: int = K, v: int = V) -> Case:
    """A teacher's top k of v and a student of its own; the labels are anywhere."""
    generator = torch.Generator().manual_seed(seed)
    teacher = (torch.randn(*shape, v, generator=generator) * 2).log_softmax(-1)
    log_probs, ids = teacher.topk(k)
    return Case(
        logits=torch.randn(*shape, v, generator=generator) * 3,
        labels=torch.randint(v, shape, generator=generator),
        log_probs=log_probs,
        ids=ids.to(torch.int32),
        tails=teacher.scatter(-1, ids, -torch.inf).logsumexp(-1),
    )


def _with_ids(case: Case, ids: list[int]) -> Case:
    case.ids = torch.tensor(ids, dtype=torch.int32).expand(case.ids.shape).clone()
    return case


def _label_in_row(case: Case) -> Case:
    case.labels = case.ids[..., 2].long()
    return case


def _label_not_in_row(case: Case) -> Case:
    return _with_ids(_with_labels(case, 40), [1, 5, 9, 20, 30, 33])


def _label_on_another_shard(case: Case) -> Case:
    return _with_ids(_with_labels(case, V - 1), [2, 3, 5, 7, 8, 11])


def _with_labels(case: Case, label: int) -> Case:
    case.labels = torch.full_like(case.labels, label)
    return case


def _ids_at_shard_edges(case: Case) -> Case:
    return _with_ids(case, [0, V - 1, V // 2 - 1, V // 2, V // 4 - 1, V // 4])


def _id_zero_beside_foreign_ids(case: Case) -> Case:
    return _with_ids(_with_labels(case, 0), [0, 13, 25, 37, 47, -1])


def _no_id_zero(case: Case) -> Case:
    return _with_ids(case, [-1, 13, 25, -1, 37, 47])


def _ragged(case: Case) -> Case:
    case.ids[..., 4:] = -1
    case.ids[0, :, 1:] = -1
    case.ids[1, 0] = -1
    case.log_probs[case.ids < 0] = -torch.inf
    return case


def _all_rows_empty(case: Case) -> Case:
    case.ids.fill_(-1)
    return case


def _huge_logits(case: Case) -> Case:
    case.logits = torch.where(case.logits > 0, 1e4, -1e4) + case.logits
    return case


def _certain_outside_the_row(case: Case) -> Case:
    case = _with_ids(case, [1, 5, 9, 20, 30, 33])
    case.logits[..., 40] += 200
    return case


def _certain_inside_the_row(case: Case) -> Case:
    case.logits.scatter_add_(
        -1, case.ids[..., :1].long(), torch.full(case.ids.shape[:2], 200.0)[..., None]
    )
    return case


def _teacher_minus_inf(case: Case) -> Case:
    case.log_probs[..., 3:] = -torch.inf
    return case


def _teacher_all_minus_inf(case: Case) -> Case:
    case.log_probs.fill_(-torch.inf)
    return case


def _tail_minus_inf(case: Case) -> Case:
    case.tails.fill_(-torch.inf)
    return case


def _nothing_but_minus_inf(case: Case) -> Case:
    return _tail_minus_inf(_teacher_all_minus_inf(case))


def _float16_mass_above_one(case: Case) -> Case:
    case.log_probs = (case.log_probs.log_softmax(-1) + 1e-3).half()
    return case


def _tail_rounded_from_nothing(case: Case) -> Case:
    """Entries that are the whole vocabulary, and a tail that storage rounded to more than 0."""
    case.tails.fill_(-9.0)
    return case


def _low_log_probs(case: Case) -> Case:
    """A row near -500, as when its ids are those of another temperature or of another teacher."""
    case.log_probs = case.log_probs - 500
    return case


def _logits_far_from_zero(case: Case) -> Case:
    case.logits += 5000
    return case


EDGES: dict[str, Callable[[], Case]] = {
    "ordinary": random_case,
    "S=1": lambda: random_case(shape=(1, 4)),
    "B=1": lambda: random_case(shape=(4, 1)),
    "K=1": lambda: random_case(k=1),
    "K=V": lambda: random_case(k=V),
    "K=V_and_a_rounded_tail": lambda: _tail_rounded_from_nothing(random_case(k=V)),
    "label_in_row": lambda: _label_in_row(random_case()),
    "label_not_in_row": lambda: _label_not_in_row(random_case()),
    "label_on_another_shard": lambda: _label_on_another_shard(random_case()),
    "ids_at_shard_edges": lambda: _ids_at_shard_edges(random_case()),
    "id_zero_beside_foreign_ids": lambda: _id_zero_beside_foreign_ids(random_case()),
    "no_id_zero": lambda: _no_id_zero(random_case()),
    "ragged_and_single_entry_rows": lambda: _ragged(random_case()),
    "all_rows_empty": lambda: _all_rows_empty(random_case()),
    "logits_1e4": lambda: _huge_logits(random_case()),
    "logits_far_from_zero": lambda: _logits_far_from_zero(random_case()),
    "certain_outside_the_row": lambda: _certain_outside_the_row(random_case()),
    "certain_inside_the_row": lambda: _certain_inside_the_row(random_case()),
    "low_log_probs": lambda: _low_log_probs(random_case()),
    "teacher_minus_inf": lambda: _teacher_minus_inf(random_case()),
    "teacher_all_minus_inf": lambda: _teacher_all_minus_inf(random_case()),
    "tail_minus_inf": lambda: _tail_minus_inf(random_case()),
    "nothing_but_minus_inf": lambda: _nothing_but_minus_inf(random_case()),
    "float16_mass_above_one": lambda: _float16_mass_above_one(random_case()),
}

# (edge, mode, logits_gather). Every edge meets every divergence and tail three times, and ordinary
# rows meet everything. The rest of the product kills no further mutant of the loss.
GRID = [
    (edge, mode, gather)
    for edge in EDGES
    for mode in MODES
    for gather in ("topk", "full")
    if edge == "ordinary" or mode.endswith("-T2") or (mode.endswith("-T0.5") and gather == "topk")
]
