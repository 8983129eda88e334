"""The student: NeMo's SFT model with the distillation loss in the place of its cross entropy."""

import inspect
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import ColumnParallelLinear
from nemo.collections.nlp.models.language_modeling import megatron_gpt_sft_model
from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
    MegatronGPTSFTModel,
)
from omegaconf import DictConfig
from torch import Tensor

from nemo_kd.config import DistillationConfig, read_settings
from nemo_kd.loss import vocab_parallel_kd_sft_loss, vocab_parallel_linear_kd_sft_loss
from nemo_kd.nemo.dataset import GPTSFTKDDataset, GPTSFTKDPackedDataset
from nemo_kd.nemo.resume import WholePassSampler
from nemo_kd.process import shield_workers

TEACHER_ROWS = ("topk_ids", "topk_log_probs", "tail_log_probs")
SFT_TERMS = ("sft_loss",)
KD_TERMS = (
    "kd_loss",
    "sft_loss",
    "teacher_topk_mass",
    "student_topk_mass",
    "teacher_entropy",
    "top1_agreement",
)
SCHEDULED = ("kd_loss_weight", "sft_loss_weight", "temperature")


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
        self.kd_config = self.distillation.at(0)  # the objective of the step at hand
        super().__init__(cfg, trainer=trainer)
        self.consumed = Consumed()
        self._validating = False
        self._teacher_rows: dict[str, Tensor] = {}  # of the micro batch in the forward pass
        self._cu_seqlens: Tensor | None = None  # its packed sequences' boundaries, on the host
        self._loss_mask = self._num_tokens = torch.empty(0)  # its mask [B, S] and the ones in it
        self._token_terms: dict[str, Tensor] = {}  # its terms, [B, S] each
        self._terms = _MeanTerms()  # of the global batch
        self._validation_terms: defaultdict[int, _MeanTerms] = defaultdict(_MeanTerms)

    # Model: the one place where Megatron has the bare logits, GPTModel._postprocess, calls
    # output_layer and then compute_language_model_loss. A forward without labels would copy them.

    def model_provider_func(self, pre_process: bool, post_process: bool) -> Any:
        model = super().model_provider_func(pre_process, post_process)
        if post_process:
            cross_entropy = model.compute_language_model_loss
            model.compute_language_model_loss = partial(self._token_losses, cross_entropy)
            if self.distillation.fuse_output_layer:
                layer = model.output_layer
                if type(layer) is not ColumnParallelLinear:
                    raise ValueError(
                        f"expected a plain output layer with fuse_output_layer=true, got "
                        f"{type(layer).__name__}, which does more than a product; set it to false"
                    )
                layer.forward = partial(self._hidden_for_logits, layer, layer.forward)
        return model

    def _hidden_for_logits(
        self,
        layer: Any,
        forward: Callable[..., Any],
        hidden: Tensor,
        weight: Any = None,
        **more: Any,
    ) -> Any:
        """Where the loss computes the logits itself, pass on what it computes them from."""
        if not self._teacher_rows:
            return forward(hidden, weight=weight, **more)
        return (hidden, layer.weight if weight is None else weight), None

    def _token_losses(
        self, cross_entropy: Callable[..., Tensor], labels: Tensor, logits: Any
    ) -> Tensor:
        """The loss of each token, [B, S], from labels [B, S] and logits [S, B, Vp].

        With the output layer fused in, from (hidden, weight) the loss of the micro batch.
        """
        if not self._teacher_rows:
            losses = cross_entropy(labels, logits)
            self._token_terms = {"sft_loss": losses.detach()}
            return losses
        ids, log_probs, tails = (self._teacher_rows[name].transpose(0, 1) for name in TEACHER_ROWS)
        self._teacher_rows = {}
        rows = (labels.transpose(0, 1), log_probs, ids, tails)
        tp_group = parallel_state.get_tensor_model_parallel_group()
        fused = isinstance(logits, tuple)
        if fused:
            out = self._fused_loss(*logits, rows, tp_group)
        else:
            out = vocab_parallel_kd_sft_loss(
                logits, *rows, config=self.kd_config, tp_group=tp_group, inplace=True
            )
        terms = {"kd_loss": out.kd_loss, "sft_loss": out.sft_loss, **out.metrics}
        self._token_terms = {name: term.transpose(0, 1) for name, term in terms.items()}
        if fused and not self._validating:
            return out.loss
        losses = out.sft_loss if self._validating else out.loss
        return losses.transpose(0, 1).contiguous()

    def _fused_loss(self, hidden: Tensor, weight: Tensor, rows: Any, tp_group: Any) -> Any:
        device = hidden.device.type
        if torch.is_autocast_enabled(device):  # as it would have cast the output layer's input
            hidden = hidden.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return vocab_parallel_linear_kd_sft_loss(
                hidden,
                weight,
                *rows,
                token_weights=self._loss_mask.transpose(0, 1).float() / self._num_tokens,
                config=self.kd_config,
                tp_group=tp_group,
                sequence_parallel=self.transformer_config.sequence_parallel,
            )

    # Data: caches are built where NeMo builds its datasets, and the teacher's rows go round
    # NeMo's list of the keys that a pipeline stage needs.

    def _build_dataset(self, data_cfg: DictConfig, is_train: bool = True) -> Any:
        caches = [path for path in data_cfg.file_names if os.path.isdir(path)]
        if is_train and len(caches) < len(data_cfg.file_names):
            raise ValueError(
                f"model.data.train_ds.file_names: expected cache directories, got "
                f"{list(data_cfg.file_names)}; write them with examples/dump_teacher_topk.py"
            )
        section = f"model.data.{'train_ds' if is_train else 'validation_ds'}"
        if data_cfg.get("packed_sequence", False) and data_cfg.micro_batch_size != 1:
            raise ValueError(
                f"expected {section}.micro_batch_size=1 with packed_sequence=true, a pack being "
                f"the micro batch, got {data_cfg.micro_batch_size}"
            )
        context_size = self.cfg.get("context_parallel_size", 1)
        num_slices = 2 * context_size if context_size > 1 else 1
        if self.cfg.get("sequence_parallel", False):
            num_slices *= self.cfg.tensor_model_parallel_size
        if data_cfg.max_seq_length % num_slices:
            raise ValueError(
                f"expected {section}.max_seq_length divisible by {num_slices}, the slices of a "
                f"sequence in context and sequence parallelism, got {data_cfg.max_seq_length}"
            )
        if caches and not is_train:
            metric = data_cfg.get("metric", {}).get("name", "exact_string_match")
            writes = data_cfg.get("write_predictions_to_file", False)
            if metric != "loss" or writes:
                raise ValueError(
                    f"{caches[0]}: a validation cache has no texts to generate from: expected "
                    f"metric.name=loss and write_predictions_to_file=false, got {metric} and "
                    f"{str(writes).lower()}; give the jsonl instead"
                )
        with self._caches_for_jsonl():
            return super()._build_dataset(data_cfg, is_train)

    @contextmanager
    def _caches_for_jsonl(self) -> Iterator[None]:
        """While it lasts, NeMo's _build_dataset makes a dataset of ours of a directory."""

        def dataset_for(nemo_class: type, own_class: Callable[..., Any]) -> Callable[..., Any]:
            def build(file_path: str, **settings: Any) -> Any:
                if os.path.isdir(file_path):
                    return own_class(file_path, kd_config=self.kd_config, **settings)
                return nemo_class(file_path=file_path, **settings)

            return build

        own_classes = {
            "GPTSFTDataset": GPTSFTKDDataset,
            "GPTSFTChatDataset": GPTSFTKDDataset,
            "GPTSFTPackedDataset": partial(
                GPTSFTKDPackedDataset,
                context_parallel_size=self.cfg.get("context_parallel_size", 1),
            ),
        }
        classes = {
            name: dataset_for(getattr(megatron_gpt_sft_model, name), own_class)
            for name, own_class in own_classes.items()
        }
        with patch.multiple(megatron_gpt_sft_model, **classes):
            yield

    def build_data_loader(
        self, dataset: Any, data_cfg: DictConfig, consumed_samples: int = 0
    ) -> Any:
        sampler = "MegatronPretrainingBatchSampler"
        with patch.object(megatron_gpt_sft_model, sampler, WholePassSampler):
            loader = super().build_data_loader(dataset, data_cfg, consumed_samples)
        shield_workers(loader)
        return loader

    def get_batch(self, data_iterator: Any, tuning: bool) -> dict[str, Any]:
        batch: dict[str, Any] = super().get_batch(data_iterator, tuning)
        self._teacher_rows = {name: batch[name] for name in TEACHER_ROWS if name in batch}
        self._cu_seqlens = batch.get("cu_seqlens")
        self._terms.names = KD_TERMS if self._teacher_rows else SFT_TERMS
        return {name: value for name, value in batch.items() if name not in TEACHER_ROWS}

    def get_batch_on_this_context_parallel_rank(self, batch: dict[str, Any]) -> dict[str, Any]:
        rows = {}
        if parallel_state.is_pipeline_last_stage():
            device = batch["labels"].device
            rows = {
                name: value.to(device, non_blocking=True)
                for name, value in self._teacher_rows.items()
            }
        batch = super().get_batch_on_this_context_parallel_rank(batch | rows)
        self._teacher_rows = {name: batch.pop(name) for name in rows}
        if rows:
            self._loss_mask = batch["loss_mask"]
            if (
                self._cu_seqlens is not None
                and parallel_state.get_context_parallel_world_size() > 1
            ):
                self._slice_packed_rows(self._cu_seqlens[0])
            self._num_tokens = batch["num_valid_tokens_in_ub"].clamp(min=1)
        return batch

    def _slice_packed_rows(self, cu_seqlens: Tensor) -> None:
        """Take this rank's part of each packed sequence, as NeMo does with its keys afterwards."""
        import transformer_engine_torch  # NeMo asks for it there as well

        cu_seqlens = cu_seqlens[: int(cu_seqlens.argmin())]  # on the host: the rest is padding
        index = transformer_engine_torch.thd_get_partitioned_indices(
            cu_seqlens.to(self._loss_mask.device, non_blocking=True),
            self._loss_mask.shape[1],
            parallel_state.get_context_parallel_world_size(),
            parallel_state.get_context_parallel_rank(),
        )
        self._loss_mask = self._loss_mask.index_select(1, index)
        self._teacher_rows = {
            name: value.index_select(1, index) for name, value in self._teacher_rows.items()
        }

    # Loss: NeMo's reduction, and the terms beside it.

    def loss_func(
        self, loss_mask: Tensor, num_valid_tokens_in_ub: Tensor, output_tensor: Tensor
    ) -> Tensor:
        # NeMo divides by the number itself: 0 / 0 for a micro batch without supervised tokens.
        num_tokens = num_valid_tokens_in_ub.clamp(min=1)
        terms = torch.stack([self._token_terms[name] for name in self._terms.names])
        means = terms.flatten(1) @ loss_mask.flatten().to(terms.dtype) / num_tokens
        if parallel_state.get_context_parallel_world_size() > 1:
            torch.distributed.all_reduce(means, group=parallel_state.get_context_parallel_group())
        weight = torch.ones_like(num_tokens)
        if self._validating and not self.validation_drop_last:
            weight = num_valid_tokens_in_ub
            if self.sample_weight == "constant":
                weight = weight.clamp(max=1)
        self._terms.add(means, weight)
        if output_tensor.dim() == 0:  # the fused loss is the micro batch's already
            loss_mask, num_tokens = torch.ones_like(output_tensor), 1
        loss: Tensor = super().loss_func(loss_mask, num_tokens, output_tensor)
        context_size = parallel_state.get_context_parallel_world_size()
        if context_size > 1 and loss.requires_grad and schedule_multiplies_by_context_size():
            # NeMo multiplies what is returned here by the CP size, which the mean of the gradients
            # over DP x CP takes back; the schedule multiplies it once more.
            loss.register_hook(lambda gradient: gradient / context_size)
        return loss

    def training_step_fwd_bwd_step_call(self, dataloader_iter: Any, forward_only: bool) -> Any:
        batch, _, _ = next(dataloader_iter)  # as NeMo's fwd_bwd_step would take it
        self.consumed.add(batch)
        return super().training_step_fwd_bwd_step_call(iter([batch]), forward_only)

    def fwd_bwd_step(
        self, dataloader_iter: Any, forward_only: bool, first_val_step: bool | None = None
    ) -> Any:
        self._validating = forward_only
        self._terms = _MeanTerms()
        # The trainer's step is restored with a checkpoint, and moves on after all micro batches.
        self.kd_config = self.distillation.at(self.trainer.global_step)
        loss = super().fwd_bwd_step(dataloader_iter, forward_only, first_val_step)
        if not forward_only:
            scheduled = {name: getattr(self.kd_config, name) for name in SCHEDULED}
            for name, value in (self._terms.means() | scheduled).items():
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
            for name, value in self._validation_terms[index].means().items():
                key = self._determine_log_key(data_cfg, index, name, mode)
                self.log(key, value, rank_zero_only=True, batch_size=1)
        self._validation_terms.clear()
        return super().inference_epoch_end(outputs, mode, data_cfg)


class Consumed:
    """What this process has trained on: counted on the host, as its batches come."""

    names = ("samples", "tokens", "supervised_tokens")

    def __init__(self) -> None:
        self._counts = torch.zeros(len(self.names), dtype=torch.int64)

    def add(self, batch: dict[str, Any]) -> None:
        """Count a batch of NeMo's collate_fn, this replica's share of a global batch."""
        lengths = batch["token_count"]  # without padding
        self._counts += torch.tensor([len(lengths), sum(lengths), int(batch["loss_mask"].sum())])

    def totals(self) -> dict[str, int]:
        """The sums over the student's replicas, on every rank.

        Ranks of one replica (tensor, pipeline and context parallel) had the same batches.
        """
        counts = self._counts.to(torch.cuda.current_device())
        torch.distributed.all_reduce(counts, group=parallel_state.get_data_parallel_group())
        return dict(zip(self.names, counts.tolist(), strict=True))


@cache
def schedule_multiplies_by_context_size() -> bool:
    """Whether Megatron Core's schedule multiplies a loss by the context-parallel size.

    It does in 0.12 and 0.13, by `output_tensor *= ...` in forward_step. Read off the source: no
    argument or attribute tells, and a version number would have to be guessed for other releases.
    """
    return "output_tensor *=" in inspect.getsource(schedules.forward_step)


class _MeanTerms:
    """Weighted means of named scalars over micro batches, then over ranks."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self._sums: list[Tensor] = []  # each [len(names) + 1]: weight * term, and the weight

    def add(self, terms: Tensor, weight: Tensor) -> None:
        self._sums.append(torch.cat([weight * terms, weight.to(terms.dtype).view(1)]))

    def extend(self, other: "_MeanTerms") -> None:
        self.names = other.names
        self._sums += other._sums

    def means(self) -> dict[str, Tensor]:
        """The means, on every rank: the last pipeline stages have them and tell the others."""
        if parallel_state.is_pipeline_last_stage():
            sums = torch.stack(self._sums).sum(0)
            torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        else:
            sums = torch.empty(len(self.names) + 1, device=torch.cuda.current_device())
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            torch.distributed.broadcast(
                sums,
                src=parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )
        *totals, weight = sums.unbind()
        return {
            name: total / weight.clamp(min=1)
            for name, total in zip(self.names, totals, strict=True)
        }
