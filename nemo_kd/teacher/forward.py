"""Micro batches through Megatron's forward schedule to the teacher's rows."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_kd.selection import SelectionConfig, TeacherRows, select_teacher_rows
from nemo_kd.teacher.replica import Replica

_TOKENS_PER_SELECTION = 256


class Teacher:
    """The model, forward only: micro batches to the rows of each.

    Args:
        model: what Megatron's schedule calls, with or without wrappers around `module`.
        module: the GPTModel of this rank.
        selection: which entries of a row are kept.
        vocab_size: the tokenizer's own size, without padding.
        tp_group: the ranks that share the vocabulary.
        has_stages: whether the model is split into pipeline stages.
        replica: asked between forward passes whether to stop.
    """

    def __init__(
        self,
        model: Any,
        module: Any,
        *,
        selection: SelectionConfig,
        vocab_size: int,
        tp_group: ProcessGroup,
        has_stages: bool,
        replica: Replica,
    ) -> None:
        self._replica = replica
        # Pipeline stages are at different micro batches: they can agree only between windows.
        self._has_stages = has_stages
        self._module = module
        self._model = model
        self._selection = selection
        self._vocab_size = vocab_size
        self._tp_group = tp_group
        self._device = next(self._module.parameters()).device
        self._rows: TeacherRows | None = None
        self._batch: dict[str, Tensor] = {}
        self._module.eval()
        # Micro batches have their own lengths, and pipeline stages must tell each other. Set here:
        # a config that says so is refused for a mixture-of-experts key that a dense model ignores.
        self._module.config.variable_seq_lengths = True
        # The one place where Megatron has the bare logits; without labels it would copy them.
        self._module.compute_language_model_loss = self._select

    def rows(self, batches: Sequence[dict[str, Any]]) -> list[TeacherRows]:
        """The rows of each micro batch's supervised positions, sample by sample, on the CPU.

        Empty but on the last pipeline stage.
        """
        if self._has_stages:
            self._replica.stop_if_asked()
        with torch.no_grad():
            collected: list[TeacherRows] = get_forward_backward_func()(
                forward_step_func=self._forward_step,
                data_iterator=iter(batches),
                model=self._model,
                num_microbatches=len(batches),
                seq_length=max(batch["tokens"].shape[1] for batch in batches),
                micro_batch_size=batches[0]["tokens"].shape[0],
                forward_only=True,
                collect_non_loss_data=True,
            )
        return collected

    def _forward_step(self, batches: Iterator[dict[str, Any]], model: Any) -> Any:
        if not self._has_stages:
            self._replica.stop_if_asked()
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
        """Take the rows out of logits [S, B, Vp]; the loss [B, S] that Megatron asks for is 0."""
        item, position = self._batch["loss_mask"].nonzero(as_tuple=True)
        index = position * logits.shape[1] + item
        # What a row's draws are seeded with: no layout, order or restart changes it.
        keys = self._batch["sample_numbers"][item] << 32 | position
        flat = logits.flatten(0, 1)
        parts = [
            select_teacher_rows(
                flat[index[chunk]],
                self._selection,
                self._vocab_size,
                self._tp_group,
                keys[chunk],
            )
            for chunk in torch.arange(len(index), device=index.device).split(_TOKENS_PER_SELECTION)
        ]
        self._rows = TeacherRows(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))
        return torch.zeros(labels.shape, device=labels.device)
