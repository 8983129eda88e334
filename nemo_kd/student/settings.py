"""The YAML of a student run, whose sections are those of Megatron-Bridge, checked at its start."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from nemo_kd.config import DistillationConfig, read_settings, refuse_unknown_keys
from nemo_kd.process import check_installed, check_new_directory
from nemo_kd.student.fit import check_there
from nemo_kd.yaml_rules import check_yaml_values

_SECTIONS = (
    *("device", "save_hf", "resume_changed", "model", "knowledge_distillation", "dataset", "data"),
    *("peft", "train", "optimizer", "scheduler", "checkpoint", "logger", "ddp", "rng"),
    "mixed_precision",
)


def check_settings(config: DictConfig) -> DistillationConfig:
    """Check what can be checked of a run's YAML before the host is imported.

    Args:
        config: Its sections are those of Megatron-Bridge. A trailing slash of `save_hf` is dropped.

    Raises:
        ValueError: A setting does not fit.
    """
    check_yaml_values(config, "bridge/train_kd_sft")
    refuse_unknown_keys(config, _SECTIONS)
    objective = config.knowledge_distillation
    distillation = read_settings(DistillationConfig, objective, "knowledge_distillation")
    for key in "train_caches", "validation_caches":
        check_there(config.dataset[key], f"dataset.{key}")
    logger = config.logger
    if logger.wandb_project is not None:
        if not (logger.tensorboard_dir and (config.checkpoint.save or logger.wandb_save_dir)):
            raise ValueError(
                "logger.wandb_project: expected logger.tensorboard_dir too, without which Bridge "
                "logs no step, and checkpoint.save or logger.wandb_save_dir for the files of W&B"
            )
        check_installed("wandb", "logger.wandb_project", "null")
    for key in "optimizer.min_lr", "scheduler.lr_warmup_init":
        if (rate := OmegaConf.select(config, key)) > config.optimizer.lr:
            raise ValueError(
                f"{key}: expected at most optimizer.lr={config.optimizer.lr}, got {rate}"
            )
    if config.save_hf is not None:
        config.save_hf = os.path.normpath(config.save_hf)
        check_new_directory(config.save_hf, "save_hf")
    for key in "load", "pretrained_checkpoint":
        path = config.checkpoint.get(key)
        if path is not None and not Path(path).is_dir():
            raise ValueError(f"checkpoint.{key}: expected a directory, found no {path}")
    if config.model.context_parallel_size > 1 and not config.model.calculate_per_token_loss:
        raise ValueError(
            "expected model.calculate_per_token_loss=true with model.context_parallel_size above "
            "1, got false: a rank may have no supervised token of a micro batch"
        )
    if config.dataset.packed_sequence and config.train.micro_batch_size != 1:
        raise ValueError(
            "expected train.micro_batch_size=1 with dataset.packed_sequence=true, a pack being "
            f"several samples, got {config.train.micro_batch_size}"
        )
    if not (config.save_hf or config.checkpoint.save or config.train.train_iters == 0):
        raise ValueError(
            "expected save_hf=DIRECTORY or checkpoint.save=DIRECTORY, got neither: the run would "
            "leave nothing"
        )
    return distillation


def check_output_layer(lora: Any, tied: bool, fused: bool) -> None:
    """Raise a ValueError if the output layer gets an adapter and cannot have one.

    Args:
        lora: Bridge's, which matches names of layers.
        tied: Whether its weight is the embedding's.
        fused: Whether the loss computes its product.
    """
    if lora.match(torch.nn.Linear(1, 1), "output_layer"):
        for is_so, why in (
            (tied, "its weight is the embedding's, so that save_hf would lose the adapter"),
            (fused, "knowledge_distillation.fuse_output_layer=true computes it without an adapter"),
        ):
            if is_so:
                raise ValueError(f"peft.target_modules: expected no output_layer, got one: {why}")
