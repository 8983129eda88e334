"""What tests do with a .nemo, in processes of their own: the CPU backend patches all of torch."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf, open_dict


def restore(
    path: Path,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    model_class: Any = None,
) -> Any:
    """The .nemo as a plain MegatronGPTSFTModel or a subclass, on the ranks of this run."""
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
        MegatronGPTSFTModel,
    )

    from nemo_kd.nemo import cpu_backend
    from nemo_kd.nemo.integrity import restore_model
    from nemo_kd.nemo.nemo_file import read_model_config
    from nemo_kd.nemo.trainer import build_trainer, initialize_model_parallel

    cpu_backend.enable()
    config = read_model_config(str(path), "path")
    cpu_backend.prepare_model_config(config)
    with open_dict(config):
        config.tensor_model_parallel_size = tensor_parallel_size
        config.pipeline_model_parallel_size = pipeline_parallel_size
        config.micro_batch_size, config.global_batch_size = 1, 1
    devices = tensor_parallel_size * pipeline_parallel_size
    run = {
        "trainer": {"accelerator": "cpu", "devices": devices, "precision": 32, "logger": False},
        "model": config,
        "exp_manager": {"log_tflops_per_sec_per_gpu": False},
    }
    trainer = build_trainer(OmegaConf.create(run))
    initialize_model_parallel(trainer, config)
    return restore_model(model_class or MegatronGPTSFTModel, str(path), "path", config, trainer)


def local_logits(
    rank: int, world_size: int, paths: list[Path], tokens: torch.Tensor
) -> list[torch.Tensor]:
    """This rank's vocab shard of each model's logits, [B, S, Vp]."""
    logits = []
    for path in paths:
        model = restore(path, tensor_parallel_size=world_size).eval()
        (module,) = model.get_model_module_list()
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        with torch.no_grad():
            logits.append(module(tokens, positions, None))
    return logits
