"""Micro batches through Megatron's forward schedule to the teacher's rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_kd.selection import SelectionConfig, TeacherRows, select_teacher_rows
from nemo_kd.teacher.replica import Replica

_TOKENS_PER_SELECTION = 256


@dataclass
class Teacher:
    """The model, forward only: micro batches to the rows of each."""

    model: Any  # what Megatron's schedule calls, with or without wrappers around `module`
    module: Any  # the GPTModel of this rank
    selection: SelectionConfig
    vocab_size: int  # the tokenizer's own size, without padding
    tp_group: ProcessGroup  # the ranks that share the vocabulary
    has_stages: bool  # whether the model is split into pipeline stages
    replica: Replica  # asked between forward passes whether to stop

    def __post_init__(self) -> None:
        self._device = next(self.module.parameters()).device
        self._batch: dict[str, Tensor] = {}
        self._rows: TeacherRows | None = None
        self.module.eval()
        # Micro batches have different lengths, which pipeline stages must tell each other. This is
        # set here, because Megatron refuses a config that says so for a mixture-of-experts key that
        # a dense model ignores.
        self.module.config.variable_seq_lengths = True
        # Megatron has the logits without a copy only in this method, and only if it has labels.
        self.module.compute_language_model_loss = self._select

    def rows(self, batches: Sequence[dict[str, Any]]) -> list[TeacherRows]:
        """The rows of each micro batch's supervised positions, sample by sample, on the CPU.

        The list is empty on every pipeline stage but the last.
        """
        # Pipeline stages are at different micro batches, and can stop together only between calls.
        if self.has_stages:
            self.replica.stop_if_asked()
        with torch.no_grad():
            collected: list[TeacherRows] = get_forward_backward_func()(
                forward_step_func=self._forward_step,
                data_iterator=iter(batches),
                model=self.model,
                num_microbatches=len(batches),
                seq_length=max(batch["tokens"].shape[1] for batch in batches),
                micro_batch_size=batches[0]["tokens"].shape[0],
                forward_only=True,
                collect_non_loss_data=True,
            )
        return collected

    def _forward_step(self, batches: Iterator[dict[str, Any]], model: Any) -> Any:
        if not self.has_stages:
            self.replica.stop_if_asked()
        names = ("tokens", "position_ids", "labels", "loss_mask", "sample_numbers")
        batch = next(batches)
        self._batch = {name: batch[name].to(self._device, non_blocking=True) for name in names}
        output = model(
            input_ids=self._batch["tokens"],
            position_ids=self._batch["position_ids"],
            attention_mask=None,
            labels=self._batch["labels"],
        )
        return output, lambda _, non_loss_data: self._rows

    def _select(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Takes the rows out of logits `[S, B, Vp]`. Megatron gets a loss `[B, S]` of 0."""
        item, position = self._batch["loss_mask"].nonzero(as_tuple=True)
        index = position * logits.shape[1] + item
        # A key seeds the draws of its row. No layout, order or restart changes it.
        keys = self._batch["sample_numbers"][item] << 32 | position
        flat = logits.flatten(0, 1)
        parts = [
            select_teacher_rows(
                flat[index[chunk]], self.selection, self.vocab_size, self.tp_group, keys[chunk]
            )
            for chunk in torch.arange(len(index), device=index.device).split(_TOKENS_PER_SELECTION)
        ]
        self._rows = TeacherRows(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))
        return torch.zeros(labels.shape, device=labels.device)
