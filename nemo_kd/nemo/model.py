"""The student: NeMo's SFT model with the distillation loss in the place of its cross entropy."""

from collections import defaultdict
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
    MegatronGPTSFTModel,
)
from omegaconf import DictConfig
from torch import Tensor

from nemo_kd.chat.samples import warn_of_missing_begin
from nemo_kd.config import SCHEDULED, DistillationConfig, read_settings
from nemo_kd.nemo.data import (
    build_loader,
    cache_dataset,
    caches_of,
    check_section,
    file_dataset,
    training_blend,
)
from nemo_kd.nemo.parallel import (
    means_on_every_rank,
    schedule_multiplies_by_context_size,
    sum_gradients_of_qk_norms,
)
from nemo_kd.nemo.summary import Consumed
from nemo_kd.student.model_loss import MicroBatch, ModelLoss
from nemo_kd.student.rows import ROW_KEYS, scatter_rows
from nemo_kd.student.slices import part_of_packs
from nemo_kd.student.terms import (
    KD_TERMS,
    SFT_TERMS,
    MeanTerms,
    micro_batch_means,
    micro_batch_weight,
    share_of_weight,
)


class MegatronGPTSFTKDModel(MegatronGPTSFTModel):
    """MegatronGPTSFTModel trained on `kd_loss_weight * KD + sft_loss_weight * CE`.

    A cache directory may stand wherever NeMo takes a jsonl: `data.train_ds.file_names` and
    `data.validation_ds.file_names`. `knowledge_distillation` in the config holds
    DistillationConfig's fields. Logged beside what NeMo logs: kd_loss, sft_loss and the loss's
    metrics in training, and in validation `validation_<name>_<set>`; val_loss and validation_loss
    stay the cross entropy. So are the weights and the temperature of each step.

    The checkpoints are those of MegatronGPTSFTModel, which restores them.
    """

    def __init__(self, cfg: DictConfig, trainer: Any) -> None:
        self.distillation = read_settings(
            DistillationConfig,
            cfg.get("knowledge_distillation", {}),
            "model.knowledge_distillation",
        )
        self.model_loss = ModelLoss(self.distillation)
        super().__init__(cfg, trainer=trainer)
        self.consumed = Consumed()
        self._validating = False
        self._terms = MeanTerms()  # of the global batch
        self._share_of_weight: Tensor | float = 1.0
        self._validation_terms: defaultdict[int, MeanTerms] = defaultdict(MeanTerms)

    # Model: the one place where Megatron has the bare logits, GPTModel._postprocess, calls
    # output_layer and then compute_language_model_loss. A forward without labels would copy them.

    def model_provider_func(self, pre_process: bool, post_process: bool) -> Any:
        model = super().model_provider_func(pre_process, post_process)
        summed = self.use_mcore_dist_optim or self.cfg.get("sequence_parallel", False)
        if not summed:
            sum_gradients_of_qk_norms(model)
        if post_process:
            self.model_loss.install(model, parallel_state.get_tensor_model_parallel_group())
        return model

    # Data: caches are built where NeMo builds its datasets, and the teacher's rows go round
    # NeMo's list of the keys that a pipeline stage needs.

    def _build_dataset(self, data_cfg: DictConfig, is_train: bool = True) -> Any:
        check_section(data_cfg, self.cfg, is_train)
        rest = (data_cfg, self.cfg, self.tokenizer, self.model_loss.config)
        if is_train:
            blend = training_blend(*rest, max_steps=self.trainer.max_steps)
            warn_of_missing_begin(self.tokenizer, blend.datasets)
            return blend
        datasets: list[Any] = []
        for path in data_cfg.file_names:
            if path in caches_of(data_cfg):
                datasets.append(cache_dataset(path, *rest))
            else:
                nemos = super()._build_dataset
                datasets.append(file_dataset(path, data_cfg, self.cfg, self.tokenizer, nemos))
        warn_of_missing_begin(self.tokenizer, datasets)
        return datasets

    def build_data_loader(
        self, dataset: Any, data_cfg: DictConfig, consumed_samples: int = 0
    ) -> Any:
        return build_loader(dataset, data_cfg, consumed_samples)

    def get_batch(self, data_iterator: Any, tuning: bool) -> dict[str, Any]:
        batch: dict[str, Any] = super().get_batch(data_iterator, tuning)
        rows = {name: batch[name] for name in ROW_KEYS if name in batch}
        self.model_loss.micro_batch = MicroBatch(rows, cu_seqlens=batch.get("cu_seqlens"))
        self._terms.names = KD_TERMS if rows else SFT_TERMS
        return {name: value for name, value in batch.items() if name not in ROW_KEYS}

    def get_batch_on_this_context_parallel_rank(self, batch: dict[str, Any]) -> dict[str, Any]:
        micro_batch, rows = self.model_loss.micro_batch, {}
        if parallel_state.is_pipeline_last_stage() and micro_batch.rows:
            labels = batch["labels"]
            moved = {
                name: value.to(labels.device, non_blocking=True)
                for name, value in micro_batch.rows.items()
            }
            rows = scatter_rows(moved, labels.shape[1])
        # NeMo slices every tensor of the batch along the sequence: the rows go with the tokens.
        batch = super().get_batch_on_this_context_parallel_rank(batch | rows)
        micro_batch.rows = {name: batch.pop(name) for name in rows}
        if rows:
            micro_batch.loss_mask = batch["loss_mask"]
            if (
                micro_batch.cu_seqlens is not None
                and parallel_state.get_context_parallel_world_size() > 1
            ):
                slice_packed_rows(micro_batch)
            micro_batch.num_tokens = batch["num_valid_tokens_in_ub"].clamp(min=1)
        return batch

    # Loss: NeMo's reduction, and the terms beside it.

    def loss_func(
        self, loss_mask: Tensor, num_valid_tokens_in_ub: Tensor, output_tensor: Tensor
    ) -> Tensor:
        # NeMo divides by the number itself: 0 / 0 for a micro batch without supervised tokens.
        num_tokens = num_valid_tokens_in_ub.clamp(min=1)
        context_size = parallel_state.get_context_parallel_world_size()
        means = micro_batch_means(
            [self.model_loss.micro_batch.token_terms[name] for name in self._terms.names],
            loss_mask,
            num_tokens,
            parallel_state.get_context_parallel_group() if context_size > 1 else None,
        )
        weight = micro_batch_weight(num_valid_tokens_in_ub, self._reduction())
        self._terms.add(means, weight)
        if output_tensor.dim() == 0:  # the fused loss is the micro batch's already
            loss_mask, num_tokens = torch.ones_like(output_tensor), 1
        loss: Tensor = super().loss_func(loss_mask, num_tokens, output_tensor)
        if not self._validating:
            loss = loss * self._share_of_weight * weight
        if context_size > 1 and loss.requires_grad and schedule_multiplies_by_context_size():
            # NeMo multiplies what is returned here by the CP size, which the mean of the gradients
            # over DP x CP takes back; the schedule multiplies it once more.
            loss.register_hook(lambda gradient: gradient / context_size)
        return loss

    def _reduction(self) -> str:
        """How the micro batches of the step or the validation at hand weigh."""
        if not self._validating:
            return str(self.cfg.get("loss_reduction", "micro_batch"))
        if self.validation_drop_last or self.sample_weight == "constant":
            return "micro_batch"
        return "token"

    def training_step_fwd_bwd_step_call(self, dataloader_iter: Any, forward_only: bool) -> Any:
        batch, _, _ = next(dataloader_iter)  # as NeMo's fwd_bwd_step would take it
        self.consumed.add(batch)
        self._validating = forward_only
        self._share_of_weight = share_of_weight(
            batch["loss_mask"].to(torch.cuda.current_device()),
            get_num_microbatches(),
            self._reduction(),
            parallel_state.get_data_parallel_group(),
        )
        return super().training_step_fwd_bwd_step_call(iter([batch]), forward_only)

    def fwd_bwd_step(
        self, dataloader_iter: Any, forward_only: bool, first_val_step: bool | None = None
    ) -> Any:
        self._validating = forward_only
        self._terms = MeanTerms()
        # The trainer's step is restored with a checkpoint, and moves on after all micro batches.
        self.model_loss.config = self.distillation.at(self.trainer.global_step)
        loss = super().fwd_bwd_step(dataloader_iter, forward_only, first_val_step)
        if not forward_only:
            scheduled = {name: getattr(self.model_loss.config, name) for name in SCHEDULED}
            means, _ = means_on_every_rank(self._terms)
            for name, value in (means | scheduled).items():
                shown = name in ("kd_loss", "sft_loss")
                self.log(name, value, prog_bar=shown, rank_zero_only=True, batch_size=1)
        return loss

    def inference_step_validation_call(
        self, batch: Any, batch_idx: int, data_cfg: DictConfig, dataloader_idx: int = 0
    ) -> Any:
        outputs = super().inference_step_validation_call(batch, batch_idx, data_cfg, dataloader_idx)
        self._validation_terms[dataloader_idx].extend(self._terms)
        return outputs

    def inference_epoch_end(self, outputs: Any, mode: str, data_cfg: DictConfig) -> Any:
        for index in sorted(self._validation_terms):
            means, weight = means_on_every_rank(self._validation_terms[index])
            if not weight:
                raise ValueError(
                    f"{data_cfg.file_names[index]}: no sample of this validation set has a "
                    "supervised token; raise max_seq_length or set truncation_field"
                )
            if self.validation_drop_last:
                # NeMo would take the mean over all micro batches, an empty one counting as 0.
                for output in outputs[index] if isinstance(outputs[0], list) else outputs:
                    output["loss"] = means["sft_loss"]
            for name, value in means.items():
                key = self._determine_log_key(data_cfg, index, name, mode)
                self.log(key, value, rank_zero_only=True, batch_size=1)
        self._validation_terms.clear()
        return super().inference_epoch_end(outputs, mode, data_cfg)


def slice_packed_rows(micro_batch: MicroBatch) -> None:
    """Cut a micro batch's mask and rows to this rank's part of each packed sequence, in place.

    NeMo does the same with its own keys afterwards.
    """
    rows = micro_batch.rows | {"loss_mask": micro_batch.loss_mask}
    micro_batch.rows = part_of_packs(
        rows,
        micro_batch.cu_seqlens[0],
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_context_parallel_rank(),
    )
    micro_batch.loss_mask = micro_batch.rows.pop("loss_mask")
