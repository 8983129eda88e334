"""What a step's loss is: how micro batches weigh in it."""

from pathlib import Path

import numpy as np
import pytest
from hosts import write_half
from runs import run_example
from test_hosts import (
    TRAIN,
    cache,  # noqa: F401
    curves,
    train_arguments,
)

from nemo_kd.cache import TopKCache


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
