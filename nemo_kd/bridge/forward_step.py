"""Bridge's forward step with this package's loss, and the terms of it in Bridge's logs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.bridge.training.state import GlobalState
from megatron.bridge.training.utils.pg_utils import get_pg_collection
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel.utils import is_pp_first_stage, is_pp_last_stage
from torch import Tensor

from nemo_kd.config import SCHEDULED, DistillationConfig
from nemo_kd.student.model_loss import MicroBatch, ModelLoss
from nemo_kd.student.packing import PACK_KEYS, attention_of_packs
from nemo_kd.student.rows import ROW_KEYS, TEACHER_ROWS, scatter_rows
from nemo_kd.student.slices import part_of_packs, part_of_sequence
from nemo_kd.student.terms import of_each_set, share_of_weight


class KDForwardStep:
    """What Bridge calls for each micro batch: `pretrain(config, KDForwardStep(...))`.

    Bridge calls, for each micro batch and in this order: this object, which keeps the teacher's
    rows and runs the model; in the model's forward, the loss; and `_reduce`, which reads the terms.

    Args:
        distillation: The objective, step by step.
        set_names: Of the validation sets.
        num_with_rows: How many of them are caches; they are the first ones.
    """

    def __init__(
        self, distillation: DistillationConfig, set_names: list[str], num_with_rows: int
    ) -> None:
        self.distillation, self.set_names = distillation, set_names
        self.num_with_rows = num_with_rows
        self.loss = ModelLoss(distillation)
        self.models: list[Any] = []  # of this rank, not wrapped
        self.state: GlobalState | None = None  # Bridge's, once the training has begun
        self._shares: dict[int, Tensor] = {}  # of the step at hand: see _share

    def install(self, models: list[Any]) -> list[Any]:
        """A pre-wrap hook of the provider: puts the loss where the last stage has the logits."""
        self.models = models
        for model in models:
            if model.post_process:
                self.loss.install(model, model.pg_collection.tp)
        return models

    def __call__(
        self, state: GlobalState, data_iterator: Any, model: Any, return_schedule_plan: bool = False
    ) -> tuple[Tensor, Callable[[Tensor], Any]]:
        self.state = state
        groups = get_pg_collection(model)
        is_first, is_last = is_pp_first_stage(groups.pp), is_pp_last_stage(groups.pp)
        names = ["tokens", "position_ids"] if is_first else []
        whole = next(data_iterator)
        has_rows = is_last and ROW_KEYS[0] in whole
        names += ["labels", "loss_mask"] if is_last else []
        names += ROW_KEYS if has_rows else ()
        batch = {name: whole[name].cuda(non_blocking=True) for name in names}
        if has_rows:
            moved = {name: batch.pop(name) for name in ROW_KEYS}
            batch |= scatter_rows(moved, batch["labels"].shape[1])
        more, is_packed = {}, PACK_KEYS[0] in whole
        if is_packed:  # on every pipeline stage
            device = torch.device(torch.cuda.current_device())
            more["packed_seq_params"] = attention_of_packs(whole, device)
        if groups.cp.size() > 1 and is_packed:
            bounds = whole[PACK_KEYS[0]][0]
            batch = part_of_packs(batch, bounds, groups.cp.size(), groups.cp.rank())
        elif groups.cp.size() > 1:
            batch = part_of_sequence(batch, groups.cp)
        self.loss.config = self.distillation.at(state.train_state.step)
        rows = {name: batch[name] for name in TEACHER_ROWS if has_rows}
        self.loss.micro_batch = MicroBatch(rows, loss_mask=batch.get("loss_mask"))
        output = model(
            input_ids=batch.get("tokens"),
            position_ids=batch.get("position_ids"),
            attention_mask=None,
            labels=batch.get("labels"),
            **more,
        )
        # All samples of a micro batch are of one validation set; a training batch has no number.
        number = int(whole["set_index"][0]) if "set_index" in whole else None
        shares = is_last and number is None and not state.cfg.model.calculate_per_token_loss
        share = self._share(state.train_state.step, whole, groups.dp_cp) if shares else 1.0
        return output, partial(self._reduce, batch.get("loss_mask"), number, share)

    def _share(self, step: int, whole: Any, replicas: Any) -> Tensor:
        """What a mean of a micro batch is multiplied by, if all micro batches weigh alike.

        Bridge divides their sum by their number in all replicas, here by the number of those with a
        supervised token: the others weigh nothing. A collective of the replicas, once a step.
        """
        if step not in self._shares:
            counts = whole["whole_batch"]["num_supervised"].cuda()
            num, kind = get_num_microbatches(), "micro_batch"
            self._shares = {step: share_of_weight(counts, num, kind, replicas)}
        return self._shares[step]

    def _reduce(
        self, loss_mask: Any, set_number: int | None, share: Tensor | float, losses: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The loss's sum over the supervised tokens, their number, and `[sum, number]` of terms.

        Bridge divides the sum by the number, of a micro batch or of the global batch as
        model.calculate_per_token_loss says, and the terms' sums over all ranks by their numbers.
        """
        mask = loss_mask.flatten().float()
        num_tokens, terms = mask.sum(), self.loss.micro_batch.token_terms
        # The fused loss is the sum already.
        loss = losses.flatten() @ mask if losses.dim() else losses
        sums = {name: term.flatten() @ mask for name, term in terms.items()}
        sums = {"lm loss": loss.detach()} | sums
        report = {name: torch.stack([value, num_tokens]) for name, value in sums.items()}
        if set_number is not None:
            report = of_each_set(report, set_number, self.set_names, self.num_with_rows)
        else:
            values = {name: getattr(self.loss.config, name) for name in SCHEDULED}
            report |= {k: torch.stack([v * num_tokens, num_tokens]) for k, v in values.items()}
        return loss * share, num_tokens.to(torch.int), report
