"""Context parallelism: each rank has its slices of the rows, and the run is that of one rank.

The local attention has no context parallelism: RingAttention stands in for Transformer Engine's.
All else is NeMo's, Megatron's and ours, on two ranks of a real context-parallel group.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_distributed
from runs import EXAMPLES, scalars, train_arguments

SIZE = 2
NUM_STEPS = 2


def train(rank: int, world_size: int, *arguments: str) -> None:
    """examples/train_kd_sft.py at a context-parallel size of the world's."""
    from hydra import compose, initialize_config_dir
    from megatron.core.models.gpt import gpt_layer_specs
    from nemo.utils.exp_manager import exp_manager

    from nemo_kd import cpu_backend
    from nemo_kd.launch import build_trainer, initialize_model_parallel, prepare_accelerator

    with initialize_config_dir(str(EXAMPLES / "conf"), version_base=None):
        config = compose("train_kd_sft", list(arguments))
    prepare_accelerator(config)
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
        MegatronGPTSFTModel,
    )
    from omegaconf import open_dict

    from nemo_kd.model import MegatronGPTSFTKDModel

    student = config.model.restore_from_path
    config.model.data.train_ds.concat_sampling_probabilities = [1.0]
    merged = MegatronGPTSFTModel.merge_cfg_with(student, config)
    cpu_backend.prepare_model_config(merged)
    with open_dict(merged):
        merged.context_parallel_size = world_size
    gpt_layer_specs.DotProductAttention = gathering_attention()
    trainer = build_trainer(config)
    exp_manager(trainer, config.exp_manager)
    initialize_model_parallel(trainer, merged)
    model = MegatronGPTSFTKDModel.restore_from(
        student, override_config_path=merged, trainer=trainer
    )
    trainer.fit(model)


def gathering_attention() -> type:
    """Causal attention of this rank's queries to the keys of all, gathered: chunks r and -1-r."""
    from megatron.core import parallel_state
    from megatron.core.transformer.module import MegatronModule
    from torch.distributed.nn.functional import all_gather

    def whole(local: torch.Tensor, size: int) -> torch.Tensor:
        chunks: list[Any] = [None] * 2 * size
        parts = all_gather(local, group=parallel_state.get_context_parallel_group())
        for rank, part in enumerate(parts):
            chunks[rank], chunks[-1 - rank] = part.chunk(2)
        return torch.cat(chunks)

    class GatheringAttention(MegatronModule):
        def __init__(self, config: Any, *_: Any, **__: Any) -> None:
            super().__init__(config)

        def forward(
            self, query: Any, key: Any, value: Any, attention_mask: Any, *_: Any, **__: Any
        ) -> Any:
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

    return GatheringAttention


@pytest.fixture(scope="module")
def whole_run(
    nemos: dict[str, Path], cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[float]]:
    logs = tmp_path_factory.mktemp("whole")
    run_distributed(train, 1, *arguments(nemos, cache, logs), timeout=240)
    return scalars(logs)


def arguments(nemos: dict[str, Path], cache: Path, logs: Path) -> list[str]:
    return [
        *train_arguments(nemos["tied"], cache, cache, logs),
        f"trainer.max_steps={NUM_STEPS}",
        "trainer.gradient_clip_val=1e-3",
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
        SIZE,
        *arguments(nemos, cache, tmp_path),
        f"model.knowledge_distillation.fuse_output_layer={fused}",
        timeout=240,
    )
    split = scalars(tmp_path)
    assert split.keys() == whole_run.keys()
    assert len(split["grad_norm"]) == NUM_STEPS
    for name, values in whole_run.items():
        if "timing" not in name:
            np.testing.assert_allclose(split[name], values, rtol=1e-4, atol=1e-4, err_msg=name)
