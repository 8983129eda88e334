"""What a step's loss is: Bridge's own without KD, and how micro batches weigh in it."""

from pathlib import Path

import numpy as np
import pytest
from hosts import STEPS, write_half
from runs import run_example, scalars
from test_hosts import (
    TRAIN,
    cache,  # noqa: F401
    curves,
    train_arguments,
)

from nemo_kd.cache import TopKCache

OWN_SFT = Path(__file__).parent / "own_sft.py"


@pytest.mark.parametrize("per_token", ["true", "false"])
def test_without_kd_the_run_is_bridges_own_sft(
    per_token: str,
    cache: Path,  # noqa: F811
    wide_llamas: dict[str, Path],
    jsonl: Path,
    tmp_path: Path,
) -> None:
    """The loss and the gradient norm of each step, over the same samples in two micro batches."""
    found = []
    for script in (OWN_SFT, jsonl), (TRAIN,):
        logs = tmp_path / str(len(found))
        run_example(
            *script,
            *train_arguments(wide_llamas["tied"], cache, logs, "train.micro_batch_size=2"),
            f"model.calculate_per_token_loss={per_token}",
            "knowledge_distillation.kd_loss_weight=0",
            "knowledge_distillation.sft_loss_weight=1",
            "dataset.validation_caches=[]",
            "optimizer.lr=1e-4",  # rounding grows with each update
        )
        found.append(scalars(logs))
    own, ours = found
    assert "kd_loss" in ours
    assert "kd_loss" not in own
    for name in "lm loss", "grad-norm":
        assert len(own[name]) == STEPS
        np.testing.assert_allclose(ours[name], own[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("fused", ["false", "true"])
def test_micro_batches_without_supervised_tokens_weigh_nothing(
    fused: str,
    cache: Path,  # noqa: F811
    wide_llamas: dict[str, Path],
    tmp_path: Path,
) -> None:
    """As on the NeMo host (tests/test_train.py). Each step has every sample of the cache.

    The order is one of blocks of that size, of which this seed leaves the rest to the end.
    """
    found = []
    for drop, processes in ((False, 2), (True, 1)):
        path = write_half(tmp_path / f"cache-{drop}", TopKCache.open(cache), drop)
        size = len(TopKCache.open(path))
        assert size == (5 if drop else 10)
        logs = tmp_path / f"logs-{drop}"
        run_example(
            TRAIN,
            *train_arguments(wide_llamas["tied"], path, logs),
            "train.micro_batch_size=1",
            f"train.global_batch_size={size}",
            "train.train_iters=3",
            "dataset.seed=5",
            f"knowledge_distillation.fuse_output_layer={fused}",
            processes=processes,
        )
        found.append(curves(logs))
    for name, values in found[1].items():
        assert len(values) == 3
        np.testing.assert_allclose(found[0][name], values, rtol=1e-5, err_msg=name)
