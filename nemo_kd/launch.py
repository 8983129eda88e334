"""From a Hydra config to a running NeMo: trainer, process groups, errors that a user can read.

The trainer is the one that NeMo's own fine-tuning script builds; on the CPU backend it differs in
the process group's backend alone.
"""

import atexit
import multiprocessing
import multiprocessing.util  # its own work at the exit, before which ours is to come
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from omegaconf import DictConfig, open_dict

from nemo_kd import cpu_backend

# Exit status of a run that was stopped, as a shell has it after SIGTERM: no fault, and the same
# command goes on.
STOPPED = 128 + signal.SIGTERM


def exit_stopped(message: str | None) -> NoReturn:
    """End the process with status STOPPED, and a line if it is the one to say it."""
    if message is not None:
        print(message, file=sys.stderr)
    sys.exit(STOPPED)


def shield_workers(loader: Any) -> None:
    """Let a data loader's workers outlive SIGTERM, which Slurm sends them too.

    The loss of one would be an error in the process that is about to end as it should. At its end
    multiprocessing would then send them SIGTERM in vain and wait: they are killed before.
    """
    loader.worker_init_fn = _ignore_sigterm
    atexit.unregister(_kill_workers)  # once is enough: the teacher run has a loader a shard
    atexit.register(_kill_workers)


def _ignore_sigterm(worker: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _kill_workers() -> None:
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


@contextmanager
def user_errors() -> Iterator[None]:
    """End the process with one line, not a traceback, for what a user can mend.

    HYDRA_FULL_ERROR=1, Hydra's own switch, shows the traceback.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        sys.exit(f"error: {error}  (HYDRA_FULL_ERROR=1 shows where)")


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
    return builder(config).create_trainer()


def check_layout(model: DictConfig, num_processes: int, section: str) -> int:
    """Return the data-parallel size; refuse a model that the parallel sizes do not divide.

    Args:
        model: The model's config: its sizes and its parallel sizes.
        num_processes: In all.
        section: Where the YAML has it, for the errors.

    Raises:
        ValueError: The processes, heads, key/value groups, feed-forward size or layers do not
            divide.
    """
    tensor_size = model.tensor_model_parallel_size
    pipeline_size = model.pipeline_model_parallel_size
    context_size = model.get("context_parallel_size", 1)
    replica_size = tensor_size * pipeline_size * context_size
    if num_processes % replica_size:
        raise ValueError(
            f"expected a number of processes divisible by tensor {tensor_size} x pipeline "
            f"{pipeline_size} x context {context_size} parallel sizes, got {num_processes}; "
            f"set trainer.devices and trainer.num_nodes, or {section}'s parallel sizes"
        )
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        size = model.get(name)
        if size is not None and size % tensor_size:
            raise ValueError(
                f"expected {section}.tensor_model_parallel_size to divide the model's {name}, "
                f"{size}, got {tensor_size}"
            )
    # Where stages are to hold other numbers of layers, Megatron checks them.
    uneven = ("_pipeline_stage", "_pipeline_split", "_parallel_layout")
    if not any(model[key] for key in model if key.endswith(uneven)):
        chunks = model.get("virtual_pipeline_model_parallel_size") or 1
        if model.num_layers % (pipeline_size * chunks):
            virtual = f" x virtual_pipeline_model_parallel_size {chunks}" if chunks > 1 else ""
            raise ValueError(
                f"expected {section}.pipeline_model_parallel_size to divide the model's "
                f"num_layers, {model.num_layers}, got {pipeline_size}{virtual}"
            )
    return num_processes // replica_size


def check_sequence_length(model: DictConfig, section: str, max_seq_length: int, key: str) -> None:
    """Refuse sequences that are longer than the model's positions.

    Of learned positions there are no more; with rotary ones the model has met no longer sequence.

    Args:
        model: The model's config.
        section: Where the YAML has it, for the error.
        max_seq_length: Of the data, in tokens.
        key: Where the YAML has that.

    Raises:
        ValueError: They are longer.
    """
    names = ("encoder_seq_length", "max_position_embeddings")
    sizes = [model[name] for name in names if model.get(name) is not None]
    if model.get("position_embedding_type") in (None, "learned_absolute"):
        positions, otherwise = min(sizes, default=None), ""
    else:
        positions = max(sizes, default=None)
        otherwise = (
            f", or set +{section}.encoder_seq_length={max_seq_length} for a model that extrapolates"
        )
    if positions is not None and max_seq_length > positions:
        raise ValueError(
            f"expected {key} of at most the model's {positions} positions, got {max_seq_length}; "
            f"lower it{otherwise}"
        )


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


def read_model_config(path: str, key: str) -> DictConfig:
    """Return the model config inside a .nemo file or an unpacked .nemo directory.

    Args:
        path: The .nemo.
        key: The YAML key that named it, for the error.

    Raises:
        ValueError: There is no such file, or it is no .nemo.
    """
    import tarfile

    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
        MegatronGPTSFTModel,
    )

    if path is None or not os.path.exists(path):
        raise ValueError(f"{key}: expected the path of a .nemo file or directory, found no {path}")
    is_nemo = (
        os.path.exists(os.path.join(path, "model_config.yaml"))
        if os.path.isdir(path)
        else tarfile.is_tarfile(path)
    )
    if not is_nemo:
        raise ValueError(f"{key}: expected a .nemo (a tar with model_config.yaml), got {path}")
    config = MegatronGPTSFTModel.restore_from(path, return_config=True)
    if not config.get("mcore_gpt", False):
        raise ValueError(f"{key}: expected a Megatron Core model (mcore_gpt: true), got {path}")
    tokenizer = config.get("tokenizer", {})
    directory = tokenizer.get("type")
    # A .nemo names a Hugging Face tokenizer by its path; one that stands beside it moved with it.
    beside = os.path.splitext(os.path.abspath(path))[0] + ".tokenizer"
    if directory and not os.path.exists(directory) and os.path.isdir(beside):
        with open_dict(config):
            config.tokenizer.type = beside
    return config


def save_nemo(model: Any, path: str) -> None:
    """Write a .nemo, on every rank of the model, by one atomic rename.

    NeMo collects the weights in the directory of the .nemo, under one name for all: two runs that
    save there at once would mix theirs.
    """
    target = Path(path).absolute()
    directory = target.parent / f".{target.name}.saving"
    directory.mkdir(parents=True, exist_ok=True)
    model.save_to(str(directory / target.name))
    if torch.distributed.get_rank() == 0:  # NeMo's save of a whole model ends in a barrier
        os.replace(directory / target.name, target)
        shutil.rmtree(directory)


def drop_noise() -> None:
    """NeMo warns about each of some hundred config fields that a checkpoint does not name."""
    from nemo.utils import logging

    logging._logger.addFilter(lambda record: "does not have field.name" not in record.getMessage())
