"""What the student is asked to match: the settings of the loss, and the teacher's rows as targets.

A teacher row has K entries. The loss adds one extra class to them: the label (tail "label"),
everything outside the entries (tail "bucket"), or no class at all (tails "renormalize" and "drop").
With z the student's logits, T the temperature, t the teacher's and s the student's probabilities
over those classes, every mode is a divergence D between t and s:

    loss = kd_loss_weight * T^2 * D(t, s) + sft_loss_weight * cross entropy
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
    """The settings of the loss: the divergence, its classes, the temperature and both weights.

    Raises:
        ValueError: a field is out of its range, the combination has no meaning, or the environment
            variable NEMO_KD_KERNELS has a value that says nothing.
    """

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    tail: Literal["renormalize", "bucket", "label", "drop"] = "label"  # the best in docs/study.md
    temperature: float = 1.0
    jsd_beta: float = 0.5  # m = beta * teacher + (1 - beta) * student; only jsd reads it
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

        forced_kernels()  # a wrong value shows here, before any weight is read

    @property
    def restricts_student(self) -> bool:
        """Whether s is normalised over the row's classes; otherwise it is over the vocabulary."""
        return self.tail in ("renormalize", "bucket")


def forced_kernels() -> str:
    """NEMO_KD_KERNELS: eager, triton, or "" where the logits' device decides.

    Raises:
        ValueError: it has another value.
    """
    value = os.environ.get("NEMO_KD_KERNELS", "")
    if value not in ("", "eager", "triton"):
        raise ValueError(
            f"expected NEMO_KD_KERNELS eager or triton, got {value!r}; unset it to let the logits' "
            "device decide"
        )
    return value


def weighted_sum(kd_loss: Tensor, sft_loss: Tensor, config: KDLossConfig) -> Tensor:
    """The loss. A weight of 0 turns its term off, also where the term is infinite or NaN."""
    if config.kd_loss_weight == 0:
        return config.sft_loss_weight * sft_loss
    if config.sft_loss_weight == 0:
        return config.kd_loss_weight * kd_loss
    return config.kd_loss_weight * kd_loss + config.sft_loss_weight * sft_loss


class KDLossOutput(NamedTuple):
    """The losses and the metrics. Only `loss` carries a gradient."""

    loss: Tensor
    kd_loss: Tensor
    sft_loss: Tensor
    metrics: dict[str, Tensor]


class Targets(NamedTuple):
    """The teacher's classes and their probabilities for N rows: K entries and the extra class."""

    absent: Tensor  # [N, K + 1] bool: True where the divergence has no such class
    probs: Tensor  # [N, K + 1]: 0 where absent; sums to 1, or to 0 in a row without any class
    log_probs: Tensor  # [N, K + 1]: log of probs, -inf where absent


def make_targets(
    log_probs: Tensor,
    ids: Tensor,
    tail_log_probs: Tensor | None,
    labels: Tensor,
    vocab_size: int,
    config: KDLossConfig,
    dtype: torch.dtype,
) -> Targets:
    """The teacher's side of the table in docs/loss.md, normalised in log space.

    `log_probs` and `ids` are `[N, K]`, `tail_log_probs` and `labels` `[N]`; the result has `dtype`.
    Normalising comes last, because float16 storage can round the mass of a row above 1.
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
    present = torch.cat([valid, has_extra], dim=-1)
    # "Not -inf" and not "above -inf", because a NaN of the teacher has to show in the loss.
    present &= valid.any(-1, keepdim=True) & (classes != -torch.inf).any(-1, keepdim=True)
    if config.divergence == "reverse_kl":
        present &= classes != -torch.inf
    # log_softmax subtracts the largest log-prob first. Subtracting a logsumexp would round every
    # target of a row of log-probs near -500 by the same 3e-5, and the targets would not sum to 1.
    target = classes.log_softmax(-1).masked_fill_(~present, -torch.inf)
    return Targets(~present, target.exp(), target)
