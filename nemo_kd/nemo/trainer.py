"""From a Hydra config to a running NeMo: the trainer and the process groups.

The trainer is the one that NeMo's own fine-tuning script builds; on the CPU backend it differs in
the process group's backend alone.
"""

import os
from typing import Any

import torch
from omegaconf import DictConfig

from nemo_kd.nemo import cpu_backend


def prepare_accelerator(config: DictConfig) -> None:
    """Check `config.trainer` against the machine and, for accelerator=cpu, turn the backend on.

    Under torchrun and srun their numbers of processes and nodes are taken over.

    Raises:
        ValueError: A GPU is asked for and there is none, or the CPU and there is a GPU.
    """
    take_over_launcher(config)
    accelerator = config.trainer.accelerator
    if accelerator not in ("gpu", "cpu"):
        raise ValueError(f"expected trainer.accelerator=gpu or cpu, got {accelerator!r}")
    if accelerator == "cpu":
        cpu_backend.enable()
        cpu_backend.prepare_trainer_config(config)
    elif not torch.cuda.is_available():
        raise ValueError(
            "trainer.accelerator=gpu, but torch sees no CUDA device; set trainer.accelerator=cpu "
            "to run the same code on the CPU"
        )
    drop_noise()


def take_over_launcher(config: DictConfig) -> None:
    """Set `config.trainer`'s devices and num_nodes to what torchrun or srun started."""
    from lightning.fabric.plugins.environments import SLURMEnvironment

    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:  # also within srun, as Lightning has it
        config.trainer.devices = int(environment["LOCAL_WORLD_SIZE"])
        config.trainer.num_nodes = int(environment["GROUP_WORLD_SIZE"])
    elif SLURMEnvironment.detect():
        num_nodes = int(environment["SLURM_NNODES"])
        config.trainer.devices = int(environment["SLURM_NTASKS"]) // num_nodes
        config.trainer.num_nodes = num_nodes


def build_trainer(config: DictConfig) -> Any:
    """Return the lightning Trainer of NeMo's fine-tuning script for `config`.

    Args:
        config: Has `trainer` (Lightning's arguments), `model` (NeMo reads a few keys of it for the
            strategy and the plugins) and `exp_manager` (or None).

    Raises:
        ValueError: Lightning's Trainer has no argument of the name of a key of `trainer`.
    """
    from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronLMPPTrainerBuilder
    from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy

    class GlooTrainerBuilder(MegatronLMPPTrainerBuilder):
        def _training_strategy(self) -> NLPDDPStrategy:
            return NLPDDPStrategy(
                no_ddp_communication_hook=True,
                find_unused_parameters=False,
                process_group_backend="gloo",
            )

    # The data loaders and NeMo's indexing fork after the tokenizer has been used.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    on_cpu = config.trainer.accelerator == "cpu"
    builder = GlooTrainerBuilder if on_cpu else MegatronLMPPTrainerBuilder
    try:
        return builder(config).create_trainer()
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"trainer: {error}; Lightning's Trainer has no such key") from error


def initialize_model_parallel(trainer: Any, model_config: DictConfig) -> None:
    """Start torch.distributed and Megatron's groups before a model is built.

    NeMo starts them after its constructor, but the layers of Megatron Core 0.12 and later take
    their process groups at construction. NeMo's own later calls find them there.
    """
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from nemo.collections.nlp.modules.common.megatron.megatron_init import (
        initialize_model_parallel_for_nemo,
    )

    seed = model_config.get("seed", 1234)
    initialize_model_parallel_for_nemo(
        world_size=trainer.world_size,
        global_rank=trainer.global_rank,
        local_rank=trainer.local_rank,
        tensor_model_parallel_size=model_config.tensor_model_parallel_size,
        pipeline_model_parallel_size=model_config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=model_config.get(
            "virtual_pipeline_model_parallel_size"
        ),
        context_parallel_size=model_config.get("context_parallel_size", 1),
        expert_model_parallel_size=model_config.get("expert_model_parallel_size", 1),
        micro_batch_size=model_config.get("micro_batch_size"),
        global_batch_size=model_config.get("global_batch_size"),
        use_tp_pp_dp_mapping=model_config.get("use_tp_pp_dp_mapping", False),
        use_te_rng_tracker=model_config.get("use_te_rng_tracker", False),
        seed=seed,
    )
    if trainer.strategy.launcher is not None:
        trainer.strategy.launcher.launch(lambda: None, trainer=trainer)
    trainer.strategy.setup_environment()
    model_parallel_cuda_manual_seed(seed)


def drop_noise() -> None:
    """NeMo warns about each of some hundred config fields that a checkpoint does not name."""
    from nemo.utils import logging

    logging._logger.addFilter(lambda record: "does not have field.name" not in record.getMessage())
