"""What is logged of a step beside the loss: the terms of each token, and their means."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_kd.loss import KDLossOutput

SFT_TERMS = ("sft_loss",)
KD_TERMS = (
    "kd_loss",
    "sft_loss",
    "teacher_topk_mass",
    "student_topk_mass",
    "teacher_entropy",
    "top1_agreement",
)


def token_terms(out: KDLossOutput) -> dict[str, Tensor]:
    """The terms of KD_TERMS, one value a token, in the shape of the loss's labels."""
    return {"kd_loss": out.kd_loss, "sft_loss": out.sft_loss, **out.metrics}


def micro_batch_means(
    terms: list[Tensor],
    loss_mask: Tensor,
    num_tokens: Tensor,
    context_group: ProcessGroup | None,
) -> Tensor:
    """The mean of each term over the micro batch's supervised tokens, `[len(terms)]`.

    Args:
        terms: `[B, S]` each, of this context-parallel rank's part of the sequence.
        loss_mask: `[B, S]`, of the same part.
        num_tokens: the supervised tokens of the whole micro batch, at least 1.
        context_group: the ranks that share the sequence; None if it is whole.
    """
    stacked = torch.stack(terms)
    means = stacked.flatten(1) @ loss_mask.flatten().to(stacked.dtype) / num_tokens
    if context_group is not None:
        # Each rank has summed its own part of the sequence.
        torch.distributed.all_reduce(means, group=context_group)
    return means


def micro_batch_weight(num_tokens: Tensor, reduction: str) -> Tensor:
    """What a micro batch with so many supervised tokens weighs among those of its global batch.

    Args:
        num_tokens: of each micro batch, or of one.
        reduction: "micro_batch": all weigh alike, but an empty one nothing; "token": each token
            weighs alike, however the samples are cut into micro batches.
    """
    return num_tokens if reduction == "token" else num_tokens.clamp(max=1)


def share_of_weight(
    loss_mask: Tensor, num_micro_batches: int, reduction: str, data_group: ProcessGroup
) -> Tensor:
    """What the mean loss of a micro batch is multiplied by, for each unit of its weight.

    A host divides the sum of the micro batches' losses by their number. This is their number over
    the sum of their weights, in all replicas. A collective of `data_group`.

    Args:
        loss_mask: [B, S] of this replica's global batch, which is cut into equal micro batches; or,
            for "micro_batch", the supervised tokens of each sample, [B].
        num_micro_batches: into how many.
        reduction: of `micro_batch_weight`.
        data_group: the replicas.
    """
    num_tokens = loss_mask.reshape(num_micro_batches, -1).count_nonzero(dim=1)
    # float64: float32 counts tokens up to 16.8 million, and a global batch may have more.
    weights = micro_batch_weight(num_tokens, reduction).double()
    counts = torch.stack([torch.ones_like(weights), weights]).sum(1)
    torch.distributed.all_reduce(counts, group=data_group)
    return (counts[0] / counts[1].clamp(min=1)).float()


def of_each_set(
    report: dict[str, Tensor], set_number: int, set_names: list[str], num_with_rows: int
) -> dict[str, Tensor]:
    """A validation's report of a micro batch, with each term over all sets and of each set.

    A host may ask each micro batch for the same keys: those of the other sets are 0 of 0 tokens.

    Args:
        report: `[sum, number of tokens]` of each term, "lm loss" among them.
        set_number: Of the micro batch's set.
        set_names: Of all sets.
        num_with_rows: How many of them are caches; they are the first ones.
    """
    none = torch.zeros_like(report["lm loss"])
    of_all = ("lm loss", *(KD_TERMS if num_with_rows else SFT_TERMS))
    whole = {name: report.get(name, none) for name in of_all}
    for number, name in enumerate(set_names):
        for term in ("lm loss", *(KD_TERMS if number < num_with_rows else SFT_TERMS)):
            whole[f"{term} {name}"] = report[term] if number == set_number else none
    return whole


class MeanTerms:
    """Weighted means of named terms over micro batches, and then over ranks."""

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        self.names = names
        self._sums: list[Tensor] = []  # each [len(names) + 1]: weight * term, and the weight

    def add(self, terms: Tensor, weight: Tensor) -> None:
        """Add one micro batch's means `[len(names)]`, which count `weight` times."""
        self._sums.append(torch.cat([weight * terms, weight.to(terms.dtype).view(1)]))

    def extend(self, other: MeanTerms) -> None:
        """Add what `other` has, of the same names."""
        self.names = other.names
        self._sums += other._sums

    def means(
        self,
        data_group: ProcessGroup,
        *,
        device: torch.device | int,
        pipeline_group: ProcessGroup | None = None,
        last_stage_rank: int | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The means over the replicas' micro batches, and their weight, on every rank.

        A collective of all ranks. A mean of no weight is 0.

        Args:
            data_group: the ranks of this pipeline stage in all replicas.
            device: where the ranks without terms receive them.
            pipeline_group: the stages of this replica; None if there is one stage.
            last_stage_rank: the global rank of the last stage, the only one that has terms.
        """
        has_terms = last_stage_rank is None or torch.distributed.get_rank() == last_stage_rank
        if has_terms:
            sums = torch.stack(self._sums).sum(0)
            torch.distributed.all_reduce(sums, group=data_group)
        else:
            sums = torch.empty(len(self.names) + 1, device=device)
        if pipeline_group is not None:
            # The other stages log too, and a checkpoint's name needs the value on every rank.
            torch.distributed.broadcast(sums, src=last_stage_rank, group=pipeline_group)
        *totals, weight = sums.unbind()
        means = (total / weight.clamp(min=1) for total in totals)
        return dict(zip(self.names, means, strict=True)), weight
