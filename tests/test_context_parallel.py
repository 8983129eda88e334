"""Context parallelism: each rank gets its slices of the rows, and the split changes no curve."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from distributed import run_distributed
from runs import EXAMPLES, scalars, train_arguments

NUM_STEPS = 2


@contextmanager
def standing_in(rank: int, size: int) -> Iterator[None]:
    """Megatron's groups, as rank `rank` of a context-parallel group of `size` ranks sees them."""
    from megatron.core import parallel_state

    with patch.multiple(
        parallel_state,
        get_context_parallel_world_size=lambda: size,
        get_context_parallel_rank=lambda: rank,
        is_pipeline_last_stage=lambda *_, **__: True,
    ):
        yield


def on_this_rank(batch: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The student, and a batch after the steps that NeMo takes before the model's forward."""
    from nemo_kd.config import DistillationConfig
    from nemo_kd.nemo.model import MegatronGPTSFTKDModel
    from nemo_kd.student.model_loss import ModelLoss
    from nemo_kd.student.terms import MeanTerms

    model = object.__new__(MegatronGPTSFTKDModel)
    model._terms, model.model_loss = MeanTerms(), ModelLoss(DistillationConfig())
    batch = model.get_batch(iter([batch]), tuning=True)
    batch = {
        name: value if isinstance(value, torch.Tensor) else None for name, value in batch.items()
    }
    return model, model.get_batch_on_this_context_parallel_rank(batch)


def partitioned_indices(cu_seqlens: torch.Tensor, length: int, size: int, rank: int) -> Any:
    """Transformer Engine's thd_get_partitioned_indices: chunks r and -1-r of each sequence."""
    assert cu_seqlens[-1] == length
    parts = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        chunks = torch.arange(start, end).chunk(2 * size)
        parts += [chunks[rank], chunks[-1 - rank]]
    return torch.cat(parts)


def check_slices(rank: int, world_size: int, cache: Path, hf_student: Path) -> None:
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    from nemo_kd.loss import KDLossConfig
    from nemo_kd.nemo import cpu_backend
    from nemo_kd.nemo.dataset import GPTSFTKDDataset
    from nemo_kd.nemo.packing import GPTSFTKDPackedDataset
    from nemo_kd.student.rows import TEACHER_ROWS, scatter_rows

    cpu_backend.enable()
    tokenizer = AutoTokenizer(str(hf_student))
    sys.modules["transformer_engine_torch"] = SimpleNamespace(
        thd_get_partitioned_indices=partitioned_indices
    )
    settings: dict[str, Any] = {
        "kd_config": KDLossConfig(tail="renormalize"),
        "get_attention_mask_from_fusion": True,
    }
    for size in (2, 4):
        samples = GPTSFTKDDataset(str(cache), tokenizer, max_seq_length=48, **settings)
        packs = GPTSFTKDPackedDataset(
            str(cache), tokenizer, max_seq_length=96, context_parallel_size=size, **settings
        )
        batches = {
            "samples": samples.collate_fn([samples[index] for index in range(len(samples))]),
            "a pack": packs.collate_fn([packs[0]]),
        }
        for kind, whole in batches.items():
            seen: list[torch.Tensor] = []
            length = whole["tokens"].shape[1]
            for number in range(size):
                with standing_in(number, size):
                    model, own = on_this_rank(dict(whole))
                micro_batch = model.model_loss.micro_batch
                rows = scatter_rows(whole, length)
                if kind == "samples":
                    chunks = torch.arange(length).chunk(2 * size)
                    positions = torch.cat([chunks[number], chunks[-1 - number]])
                    for name in ("tokens", "labels", "loss_mask", "position_ids"):
                        torch.testing.assert_close(own[name], whole[name][:, positions])
                else:  # NeMo slices packed sequences later
                    bounds = whole["cu_seqlens"][0]
                    assert (bounds[:-1] >= 0).sum() > 2, "several samples"
                    positions = partitioned_indices(bounds[bounds >= 0], length, size, number)
                for name in TEACHER_ROWS:
                    torch.testing.assert_close(
                        micro_batch.rows[name], rows[name][:, positions], msg=name
                    )
                mask = whole["loss_mask"][:, positions]
                torch.testing.assert_close(micro_batch.loss_mask, mask)
                kept = micro_batch.rows["topk_ids"] >= 0
                torch.testing.assert_close(kept.any(-1), mask.bool(), msg="rows at their tokens")
                assert (
                    micro_batch.num_tokens
                    == own["num_valid_tokens_in_ub"]
                    == whole["loss_mask"].sum()
                )
                seen.append(positions)
            assert sorted(torch.cat(seen).tolist()) == list(range(length)), "each token on one rank"


def test_each_rank_has_its_slices(cache: Path, hf_llamas: dict[str, Path]) -> None:
    run_distributed(check_slices, 1, cache, hf_llamas["tied"])


def gradient_of_one(rank: int, world_size: int, sizes: list[int]) -> tuple[list[float], bool]:
    """The gradient, at each CP size, that Megatron's schedule makes of a loss's gradient of 1."""
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.pipeline_parallel import schedules

    from nemo_kd.nemo import cpu_backend
    from nemo_kd.nemo.model import schedule_multiplies_by_context_size

    class Weight(torch.nn.Module):
        config = ModelParallelConfig()
        model_type = None

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def set_input_tensor(self, _: Any) -> None:
            pass

    cpu_backend.enable()
    parallel_state.initialize_model_parallel()
    gradients = []
    for size in sizes:
        model = Weight()
        with standing_in(0, size):
            schedules.forward_backward_no_pipelining(
                forward_step_func=lambda _, module: (module.weight * 1, lambda loss: (loss, {})),
                data_iterator=None,
                model=model,
                num_microbatches=1,
                seq_length=1,
                micro_batch_size=1,
            )
        gradients.append(float(model.weight.grad))
    return gradients, schedule_multiplies_by_context_size()


def test_the_schedule_does_what_its_source_says() -> None:
    [(gradients, multiplies)] = run_distributed(gradient_of_one, 1, [1, 2])
    assert gradients == ([1, 2] if multiplies else [1, 1])


def train(rank: int, world_size: int, *arguments: str) -> None:
    """examples/train_kd_sft.py with a real context-parallel group. Only the attention differs."""
    from hydra import compose, initialize_config_dir
    from nemo.utils.exp_manager import exp_manager

    from nemo_kd.nemo import cpu_backend
    from nemo_kd.nemo.trainer import build_trainer, initialize_model_parallel, prepare_accelerator

    with initialize_config_dir(str(EXAMPLES / "conf"), version_base=None):
        config = compose("train_kd_sft", list(arguments))
    config.trainer.devices = world_size
    prepare_accelerator(config)
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
        MegatronGPTSFTModel,
    )
    from omegaconf import open_dict

    from nemo_kd.nemo.model import MegatronGPTSFTKDModel

    student = config.model.restore_from_path
    config.model.data.train_ds.concat_sampling_probabilities = [1.0]
    merged = MegatronGPTSFTModel.merge_cfg_with(student, config)
    cpu_backend.prepare_model_config(merged)
    with open_dict(merged):
        merged.context_parallel_size = world_size
    gather_keys_for_attention()
    trainer = build_trainer(config)
    exp_manager(trainer, config.exp_manager)
    initialize_model_parallel(trainer, merged)
    model = MegatronGPTSFTKDModel.restore_from(
        student, override_config_path=merged, trainer=trainer
    )
    trainer.fit(model)


def gather_keys_for_attention() -> None:
    """Let local attention do as Transformer Engine's: own queries meet the keys of all ranks."""
    from megatron.core import parallel_state
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.module import MegatronModule
    from torch.distributed.nn.functional import all_gather

    def whole(local: torch.Tensor, size: int) -> torch.Tensor:
        chunks: list[Any] = [None] * 2 * size
        parts = all_gather(local, group=parallel_state.get_context_parallel_group())
        for rank, part in enumerate(parts):
            chunks[rank], chunks[-1 - rank] = part.chunk(2)
        return torch.cat(chunks)

    def build(self: Any, config: Any, *_: Any, **__: Any) -> None:
        MegatronModule.__init__(self, config)

    def attend(self: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> torch.Tensor:
        size = parallel_state.get_context_parallel_world_size()
        repeats = query.shape[2] // key.shape[2]
        key, value = (whole(x, size).repeat_interleave(repeats, 2) for x in (key, value))
        chunks = torch.arange(len(key)).chunk(2 * size)
        rank = parallel_state.get_context_parallel_rank()
        positions = torch.cat([chunks[rank], chunks[-1 - rank]])
        scores = torch.einsum("sbhd,tbhd->bhst", query, key) / query.shape[-1] ** 0.5
        later = positions[:, None] < torch.arange(len(key))
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        return torch.einsum("bhst,tbhd->sbhd", weights, value).flatten(2)

    DotProductAttention.__init__ = build
    DotProductAttention.forward = attend


@pytest.fixture(scope="module")
def whole_run(
    nemos: dict[str, Path], cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[float]]:
    logs = tmp_path_factory.mktemp("whole")
    run_distributed(train, 1, *arguments(nemos, cache, logs), timeout=400)
    return scalars(logs)


def arguments(nemos: dict[str, Path], cache: Path, logs: Path) -> list[str]:
    return [
        *train_arguments(nemos["tied"], cache, cache, logs),
        f"trainer.max_steps={NUM_STEPS}",
    ]


@pytest.mark.parametrize("fused", ["false", "true"])
def test_a_split_run_is_the_whole_run(
    fused: str,
    whole_run: dict[str, list[float]],
    nemos: dict[str, Path],
    cache: Path,
    tmp_path: Path,
) -> None:
    run_distributed(
        train,
        2,
        *arguments(nemos, cache, tmp_path),
        f"model.knowledge_distillation.fuse_output_layer={fused}",
        timeout=400,
    )
    split = scalars(tmp_path)
    assert split.keys() == whole_run.keys()
    assert len(split["grad_norm"]) == NUM_STEPS
    for name, values in whole_run.items():
        if "timing" not in name:
            np.testing.assert_allclose(split[name], values, rtol=1e-4, atol=1e-4, err_msg=name)
