"""What is asked of the student: the settings, their checks, and the teacher's side as targets.

A row has K entries and one class more. The extra class is the label (tail "label"), everything
outside the entries (tail "bucket") or absent. With z the student's logits, T the temperature and
s the student over those classes, every mode is a divergence D between targets t and s:

    loss = kd_loss_weight * T^2 * D(t, s) + sft_loss_weight * CE
"""

import math
import os
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

_CHOICES = {
    "divergence": ("forward_kl", "reverse_kl", "jsd"),
    "tail": ("renormalize", "bucket", "label", "drop"),
    "logits_gather": ("topk", "full"),
}


@dataclass(frozen=True)
class KDLossConfig:
    """Which divergence, over which classes, at which temperature and weight.

    Raises:
        ValueError: a field is out of its range, or the combination has no meaning.
    """

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    tail: Literal["renormalize", "bucket", "label", "drop"] = "label"  # docs/study.md: it wins
    temperature: float = 1.0
    jsd_beta: float = 0.5  # m = beta * teacher + (1 - beta) * student; read by jsd alone
    kd_loss_weight: float = 1.0
    sft_loss_weight: float = 0.4
    logits_gather: Literal["topk", "full"] = "topk"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"expected {name} one of {', '.join(choices)}; got {getattr(self, name)!r}"
                )
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"expected temperature > 0, got {self.temperature}; 1.0 leaves logits as they are"
            )
        if not 0 < self.jsd_beta < 1:
            raise ValueError(
                f"expected 0 < jsd_beta < 1, got {self.jsd_beta}; "
                "use divergence forward_kl or reverse_kl for its two limits"
            )
        for name in ("kd_loss_weight", "sft_loss_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"expected {name} >= 0, got {getattr(self, name)}; 0 turns it off")
        if self.kd_loss_weight == 0 and self.sft_loss_weight == 0:
            raise ValueError(
                "expected kd_loss_weight or sft_loss_weight above 0, got 0 for both; "
                "there would be nothing to learn"
            )
        if self.divergence != "forward_kl" and self.tail in ("label", "drop"):
            raise ValueError(
                f"divergence={self.divergence} with tail={self.tail}: the student is spread over "
                "the whole vocabulary and the target is 0 on most of it, where the divergence is "
                "infinite or blind; use tail renormalize or bucket, or divergence forward_kl"
            )

    @property
    def restricts_student(self) -> bool:
        """Whether the student is a distribution over the row's classes, not over the vocabulary."""
        return self.tail in ("renormalize", "bucket")


class KDLossOutput(NamedTuple):
    """The losses and the metrics; only `loss` carries a gradient."""

    loss: Tensor
    kd_loss: Tensor
    sft_loss: Tensor
    metrics: dict[str, Tensor]


class Targets(NamedTuple):
    """The teacher's classes and their probabilities, for N rows; nothing of the student in it."""

    absent: Tensor  # [N, K + 1] bool: no class of the divergence
    probs: Tensor  # [N, K + 1], 0 where absent, sums to 1 or, in a row without any, to 0
    log_probs: Tensor  # [N, K + 1], -inf where probs is 0 by definition


def check_inputs(
    leading_shape: torch.Size,
    vocab_size: int,
    labels: Tensor,
    log_probs: Tensor,
    ids: Tensor,
    tail_log_probs: Tensor | None,
    config: KDLossConfig,
) -> None:
    """Shapes always; ids on CPU always and on CUDA if NEMO_KD_DEBUG=1, since it synchronises.

    Raises:
        ValueError: a shape does not fit, the tail is missing, an id or a label is outside the
            vocabulary, or a row names an id twice.
    """
    if ids.dim() == 0 or ids.shape[-1] < 1 or ids.shape[:-1] != leading_shape:
        raise ValueError(
            f"expected teacher_topk_ids of shape {tuple(leading_shape)} + (K,) with K >= 1, as the "
            f"student's leading dimensions are; got {tuple(ids.shape)}"
        )
    if log_probs.shape != ids.shape:
        raise ValueError(
            f"expected teacher_topk_log_probs of the ids' shape {tuple(ids.shape)}; "
            f"got {tuple(log_probs.shape)}"
        )
    if labels.shape != leading_shape:
        raise ValueError(
            f"expected labels of shape {tuple(leading_shape)}, one per row of student logits; "
            f"got {tuple(labels.shape)}"
        )
    if config.tail in ("bucket", "label"):
        if tail_log_probs is None:
            raise ValueError(
                f"expected teacher_tail_log_probs with tail={config.tail}, got None; "
                "pass the cache's tail_log_probs or use tail renormalize or drop"
            )
        if tail_log_probs.shape != leading_shape:
            raise ValueError(
                f"expected teacher_tail_log_probs of shape {tuple(leading_shape)}; "
                f"got {tuple(tail_log_probs.shape)}"
            )
    if ids.numel() == 0 or (ids.is_cuda and os.environ.get("NEMO_KD_DEBUG") != "1"):
        return
    for name, values, low in (("teacher_topk_ids", ids, -1), ("labels", labels, 0)):
        smallest, largest = (int(value) for value in values.aminmax())
        if smallest < low or largest >= vocab_size:
            wrong = smallest if smallest < low else largest
            raise ValueError(
                f"expected {name} from {low} to {vocab_size - 1}, got {wrong}; the student's "
                f"vocabulary has V={vocab_size} entries; dump a cache with the student's tokenizer"
            )
    ordered = ids.sort(dim=-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if twice.any():
        raise ValueError(
            f"expected each id at most once a row, got {int(ordered[..., 1:][twice][0])} twice; "
            "merge repeated entries and mark the freed ones with id -1"
        )


def make_targets(
    log_probs: Tensor,
    ids: Tensor,
    tail_log_probs: Tensor | None,
    labels: Tensor,
    vocab_size: int,
    config: KDLossConfig,
    dtype: torch.dtype,
) -> Targets:
    """The table of `docs/loss.md`: entries and extra class, normalised in log space.

    Storage rounds, so that the stored mass may exceed 1: normalising comes last.
    """
    valid = ids >= 0
    entries = log_probs.to(dtype).masked_fill(~valid, -torch.inf)
    extra = entries.new_full((len(ids), 1), -torch.inf)
    has_extra = torch.zeros_like(valid[:, :1])
    if config.tail == "renormalize":
        entries = entries / config.temperature
    elif config.tail == "bucket":
        assert tail_log_probs is not None
        # Entries that are the whole vocabulary leave no outside, whatever rounding put in the tail.
        has_extra = valid.sum(-1, keepdim=True) < vocab_size
        extra = tail_log_probs.to(dtype)[:, None].masked_fill(~has_extra, -torch.inf)
    elif config.tail == "label":
        assert tail_log_probs is not None
        has_extra = torch.ones_like(has_extra)
        is_label = ids == labels[:, None]
        own_mass = entries.masked_fill(~is_label, -torch.inf)
        extra = torch.cat([tail_log_probs.to(dtype)[:, None], own_mass], -1).logsumexp(-1, True)
        entries = entries.masked_fill(is_label, -torch.inf)
    classes = torch.cat([entries, extra], dim=-1)
    total = classes.logsumexp(-1, keepdim=True)
    present = torch.cat([valid, has_extra], dim=-1)
    present &= valid.any(-1, keepdim=True) & (total > -torch.inf)
    if config.divergence == "reverse_kl":
        present &= classes > -torch.inf
    target = (classes - total).masked_fill_(~present, -torch.inf)
    return Targets(~present, target.exp(), target)


def flatten_rows(
    labels: Tensor,
    log_probs: Tensor,
    ids: Tensor,
    tail_log_probs: Tensor | None,
    vocab_size: int,
    config: KDLossConfig,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Targets]:
    """Labels `[N]`, log-probs and ids `[N, K]` and the targets of any leading dimensions."""
    ids = ids.reshape(-1, ids.shape[-1])
    labels = labels.reshape(-1)
    log_probs = log_probs.detach().reshape(ids.shape)
    tail = None if tail_log_probs is None else tail_log_probs.detach().reshape(-1)
    targets = make_targets(log_probs, ids, tail, labels, vocab_size, config, dtype)
    return labels, log_probs, ids, targets
