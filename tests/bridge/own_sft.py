"""The student run with Bridge's own dataset, forward step and loss: `own_sft.py JSONL SETTINGS...`.

What stays of this package is how the run is set up, and the order in which samples are drawn.
"""

import runpy
import sys
from pathlib import Path
from typing import Any

from megatron.bridge.data.datasets.utils import _OnlineSampleMapping
from megatron.bridge.training import pretrain
from megatron.bridge.training.gpt_step import forward_step

from nemo_kd.bridge import dataset
from nemo_kd.bridge.forward_step import KDForwardStep
from nemo_kd.cache import TopKCache
from nemo_kd.student.dataset import samples_mapping

JSONL = sys.argv.pop(1)
EXAMPLE = Path(__file__).parents[2] / "examples" / "bridge" / "train_kd_sft.py"


class OwnSamples(dataset.GPTSFTDataset):
    """Bridge's samples of the jsonl, as the settings in the cache's manifest make them."""

    def __init__(self, cache: str, *, kd_config: Any, reads_rows: bool, **settings: Any) -> None:
        shaped = TopKCache.open(cache).manifest.dataset
        own = {"prompt_template", "label_key", "truncation_field", "add_eos", "answer_only_loss"}
        settings |= {key: shaped[key] for key in own}
        super().__init__(JSONL, **settings)

    def _build_samples_mapping(self) -> None:
        self.samples_mapping = samples_mapping(self, _OnlineSampleMapping)


run = pretrain.pretrain


def keep_cross_entropy(self: KDForwardStep, models: list[Any]) -> list[Any]:
    self.models = models
    return models


def with_own_step(container: Any, step: KDForwardStep, callbacks: Any) -> None:
    run(container, forward_step, callbacks=callbacks)


dataset.GPTSFTKDDataset = OwnSamples
pretrain.pretrain = with_own_step
KDForwardStep.install = keep_cross_entropy
sys.argv[0] = str(EXAMPLE)
runpy.run_path(sys.argv[0], run_name="__main__")
