"""The loss inside a host's model: where Megatron has the bare logits, or in place of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from nemo_kd.config import DistillationConfig
from nemo_kd.loss import (
    KDLossOutput,
    vocab_parallel_kd_sft_loss,
    vocab_parallel_linear_kd_sft_loss,
)
from nemo_kd.student.rows import TEACHER_ROWS
from nemo_kd.student.terms import token_terms


@dataclass
class MicroBatch:
    """What travels beside the tensors that a host hands to the model, of one micro batch."""

    rows: dict[str, Tensor]  # ROW_KEYS, then on the device TEACHER_ROWS; empty for a plain file
    cu_seqlens: Tensor | None = None  # boundaries of its packed sequences, on the host
    loss_mask: Tensor | None = None  # [B, S]
    num_tokens: Tensor | None = None  # what the host has divided the loss by when the model ends
    token_terms: dict[str, Tensor] = field(default_factory=dict)  # [B, S] each


class ModelLoss:
    """KD + SFT in the place of a model's cross entropy, for the micro batch at hand.

    A host sets `micro_batch` before it calls the model. Megatron's GPTModel calls `output_layer`
    and then `compute_language_model_loss`, the one place where the bare logits are: there the loss
    takes the rows and leaves the terms. No other micro batch comes in between.

    Args:
        distillation: The objective, step by step; `config` is that of the step at hand.
    """

    def __init__(self, distillation: DistillationConfig) -> None:
        self.fuse_output_layer = distillation.fuse_output_layer
        self.config = distillation.at(0)
        self.micro_batch = MicroBatch(rows={})

    def install(self, model: Any, tp_group: Any) -> None:
        """Put the loss in the last stage's GPTModel.

        Raises:
            ValueError: fuse_output_layer=true, and the output layer is more than a product.
        """
        if self.fuse_output_layer:
            layer = model.output_layer
            if type(layer) is not ColumnParallelLinear:
                # Bridge's subclasses have the name of what they extend: their bases tell more.
                bases = " and ".join(base.__name__ for base in type(layer).__bases__)
                raise ValueError(
                    f"expected a plain output layer with fuse_output_layer=true, got one that "
                    f"extends {bases}, and does more than a product; set it to false"
                )
            layer.forward = partial(self._hidden_for_logits, layer, layer.forward)
        cross_entropy = model.compute_language_model_loss
        model.compute_language_model_loss = partial(
            self._token_losses, cross_entropy, tp_group, model.config.sequence_parallel
        )

    def _hidden_for_logits(
        self,
        layer: Any,
        forward: Callable[..., Any],
        hidden: Tensor,
        weight: Any = None,
        **more: Any,
    ) -> Any:
        """Where the loss computes the logits itself, pass on what it computes them from."""
        if not self.micro_batch.rows:
            return forward(hidden, weight=weight, **more)
        return (hidden, layer.weight if weight is None else weight), None

    def _token_losses(
        self,
        cross_entropy: Callable[..., Tensor],
        tp_group: Any,
        sequence_parallel: bool,
        labels: Tensor,
        logits: Any,
    ) -> Tensor:
        """The loss of each token, [B, S], from labels [B, S] and logits [S, B, Vp].

        With the output layer fused in, from (hidden, weight) the loss of the micro batch. Without
        gradients the cross entropy of each token, so that runs of SFT and of KD can be compared.
        """
        micro_batch = self.micro_batch
        if not micro_batch.rows:
            cross_entropies = cross_entropy(labels, logits)
            micro_batch.token_terms = {"sft_loss": cross_entropies.detach()}
            return cross_entropies
        ids, log_probs, tails = (micro_batch.rows[name].transpose(0, 1) for name in TEACHER_ROWS)
        # Taken: the rows' memory is free after the loss, and no later forward pass may find them.
        micro_batch.rows = {}
        rows = (labels.transpose(0, 1), log_probs, ids, tails)
        is_fused = isinstance(logits, tuple)
        if is_fused:
            hidden, weight = logits
            out = self._fused_loss(hidden, weight, rows, tp_group, sequence_parallel)
        else:
            # In place: nothing reads the logits after the loss, so that their memory becomes the
            # gradient's and no second tensor of their size is needed.
            out = vocab_parallel_kd_sft_loss(
                logits, *rows, config=self.config, tp_group=tp_group, inplace=True
            )
        micro_batch.token_terms = {
            name: term.transpose(0, 1) for name, term in token_terms(out).items()
        }
        if is_fused and torch.is_grad_enabled():
            return out.loss
        losses = out.loss if torch.is_grad_enabled() else out.sft_loss
        return losses.transpose(0, 1).contiguous()

    def _fused_loss(
        self, hidden: Tensor, weight: Tensor, rows: Any, tp_group: Any, sequence_parallel: bool
    ) -> KDLossOutput:
        micro_batch = self.micro_batch
        assert micro_batch.loss_mask is not None
        weights = micro_batch.loss_mask.transpose(0, 1).float()
        if micro_batch.num_tokens is not None:
            weights = weights / micro_batch.num_tokens
        device = hidden.device.type
        if torch.is_autocast_enabled(device):  # as it would have cast the output layer's input
            hidden = hidden.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return vocab_parallel_linear_kd_sft_loss(
                hidden,
                weight,
                *rows,
                token_weights=weights,
                config=self.config,
                tp_group=tp_group,
                sequence_parallel=sequence_parallel,
            )
