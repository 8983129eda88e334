"""From a Hydra config to a running NeMo: the trainer and the process groups.

The trainer is the one that NeMo's own fine-tuning script builds. On the CPU only the backend of the
process groups differs.
"""

import os
from typing import Any

import torch
from omegaconf import DictConfig

from nemo_kd.nemo import cpu_backend
from nemo_kd.nemo.console import quiet_host

# Keys of a model's config that decide the process groups and the number of micro batches; NeMo has
# a default for each.
_GROUP_KEYS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "micro_batch_size",
    "global_batch_size",
    "use_tp_pp_dp_mapping",
    "use_te_rng_tracker",
)


def prepare_accelerator(config: DictConfig) -> None:
    """Check `config.trainer` against the machine and, for accelerator=cpu, turn the backend on.

    Under torchrun or srun, the numbers of devices and nodes are those that it started.

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
    quiet_host()


def take_over_launcher(config: DictConfig) -> None:
    """Set `config.trainer`'s devices and num_nodes to what torchrun or srun started."""
    from lightning.fabric.plugins.environments import SLURMEnvironment

    if "TORCHELASTIC_RUN_ID" in os.environ:  # first, because torchrun may run within srun
        config.trainer.devices = int(os.environ["LOCAL_WORLD_SIZE"])
        config.trainer.num_nodes = int(os.environ["GROUP_WORLD_SIZE"])
    elif SLURMEnvironment.detect():
        config.trainer.num_nodes = int(os.environ["SLURM_NNODES"])
        config.trainer.devices = int(os.environ["SLURM_NTASKS"]) // config.trainer.num_nodes


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

    # The data loaders and NeMo's indexing fork after the tokenizer has run, and its threads do not
    # survive a fork.
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
    device = trainer.strategy.root_device
    if device.type == "cuda":
        # Before anything seeds CUDA, which would open a context of each process on the first GPU.
        torch.cuda.set_device(device)
    initialize_model_parallel_for_nemo(
        world_size=trainer.world_size,
        global_rank=trainer.global_rank,
        local_rank=trainer.local_rank,
        seed=seed,
        **{name: model_config[name] for name in _GROUP_KEYS if name in model_config},
    )
    # The order matters: the strategy reads the sizes noted above, and the seed needs the groups.
    if trainer.strategy.launcher is not None:
        trainer.strategy.launcher.launch(lambda: None, trainer=trainer)
    trainer.strategy.setup_environment()
    model_parallel_cuda_manual_seed(seed)
