"""LoRA: only the adapters learn. They are saved and restored as NeMo's own .nemo of adapters."""

import tarfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import run_example, scalars, train_arguments

# The layers of Megatron Core 0.12 import Transformer Engine, and so do NeMo's adapters.
pytestmark = pytest.mark.skipif(
    version("megatron-core") < "0.13" and find_spec("transformer_engine") is None,
    reason="with Megatron Core 0.12 LoRA needs Transformer Engine",
)

LORA = [
    "model.peft.peft_scheme=lora",
    "model.peft.lora_tuning.target_modules=[all]",
    "model.peft.lora_tuning.adapter_dim=4",
    "model.optim.lr=1e-2",
]


def test_adapters_learn_and_are_restored(
    nemos: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    adapters = tmp_path / "adapters.nemo"
    run = train_arguments(nemos["tied"], cache, cache, tmp_path / "logs", *LORA)
    run_example("train_kd_sft.py", *run, f"save_to={adapters}")
    curves = scalars(tmp_path / "logs")
    assert curves["validation_loss"][1] < curves["validation_loss"][0]

    with tarfile.open(adapters) as nemo:
        nemo.extract("./model_weights.ckpt", tmp_path, filter="data")
    weights = torch.load(tmp_path / "model_weights.ckpt")
    layers, matrices = 2, 4 * 2  # two for each of a layer's four linear layers
    assert len(weights) == layers * matrices
    assert all(".adapter_layer.lora_" in name for name in weights)
    for name, weight in weights.items():
        assert weight.any(), f"{name} starts at 0 and has learned"

    # The adapters fit the .nemo that the run started from, so the run did not change its weights.
    run = train_arguments(nemos["tied"], cache, cache, tmp_path / "again", *LORA)
    run_example(
        "train_kd_sft.py", *run, f"model.peft.restore_from_path={adapters}", "trainer.max_steps=0"
    )
    again = scalars(tmp_path / "again")
    for name in ("val_loss", "validation_kd_loss_dataloader0"):
        np.testing.assert_allclose(again[name][-1], curves[name][-1], rtol=1e-6)
