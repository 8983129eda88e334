"""The student run on Megatron-Bridge: Bridge's own loop, over caches, with this package's loss."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_kd.bridge import console, cpu_backend
from nemo_kd.config import DataConfig, DistillationConfig, read_settings
from nemo_kd.hf_config import hf_files
from nemo_kd.layout import check_expert_training
from nemo_kd.process import exit_stopped, rank, say
from nemo_kd.ranks import check_batches, on_rank_zero, start, write_whole
from nemo_kd.student.dataset import padding_multiple
from nemo_kd.student.run_record import find_groups_by_kind, keep_record, renew_optimizer
from nemo_kd.student.settings import check_output_layer, check_settings
from nemo_kd.values import set_fields


def train_kd_sft(config: DictConfig) -> None:
    """Train the student that `config` describes: see conf/bridge/train_kd_sft.yaml.

    Raises:
        ValueError: A setting, the student or a cache does not fit.
    """
    distillation = check_settings(config)
    console.quiet_host()
    if config.device == "cpu":
        cpu_backend.enable()
    from megatron.bridge.training.pretrain import pretrain
    from megatron.bridge.training.utils.checkpoint_utils import checkpoint_exists

    from nemo_kd.bridge.dataset import check_sets
    from nemo_kd.bridge.forward_step import KDForwardStep
    from nemo_kd.bridge.models import read_model

    start(config.device)
    length = config.model.seq_length
    bridge, provider, replicas = read_model(config.model, config.device, length, "model.seq_length")
    check_expert_training(vars(provider), "model")
    check_batches(replicas, config.train.micro_batch_size, config.train.global_batch_size)
    container = _container(config, provider, distillation)
    dataset = container.dataset
    container.train.eval_iters = on_rank_zero(lambda: check_sets(dataset, config.model.hf_path))
    if config.peft.peft_scheme is not None:
        from nemo_kd.bridge.lora import LoRA, add_adapters

        lora = set_fields(LoRA(), config.peft, "peft", ("peft_scheme",))
        tied = provider.share_embeddings_and_output_weights
        check_output_layer(lora, tied, distillation.fuse_output_layer)
        provider.register_pre_wrap_hook(partial(add_adapters, container, lora))
    own: Any = OmegaConf.to_container(config, resolve=True)
    loads, files = container.checkpoint.load, hf_files(config.model.hf_path)
    on_rank_zero(lambda: keep_record(own, files, resumes=checkpoint_exists(loads)))
    step = KDForwardStep(distillation, dataset.set_names, len(dataset.validation_caches))
    provider.register_pre_wrap_hook(step.install, prepend=True)  # before the weights are read
    try:
        pretrain(container, step, callbacks=_callbacks(step, bridge, config))
    except SystemExit:  # Bridge has saved a checkpoint and ends the process
        if step.state is not None and any(step.state.signal_handler.signals_received()):
            saved = container.checkpoint.save is not None
            advice = "resumes from the last checkpoint" if saved else "begins anew"
            message = f"stopped by SIGTERM; the same command {advice}"
            exit_stopped(message if rank() == 0 else None)
        raise


def _callbacks(step: Any, bridge: Any, config: DictConfig) -> Any:
    """What Bridge calls. Once it returns, it has no model parallel groups to save with."""
    from megatron.bridge.training.callbacks import CallbackManager

    def save(_: Any) -> None:
        if config.save_hf is not None:
            bar = sys.stderr.isatty()
            save_to = partial(bridge.save_hf_pretrained, step.models, show_progress=bar)
            write_whole(config.save_hf, save_to)
            say(f"{config.save_hf}: the student as a Hugging Face model")

    def begin(context: Any) -> None:
        # Bridge 0.3 makes the handler that its loop asks, and does not install it.
        context.state.signal_handler.__enter__()
        num_done, num_steps = context.state.train_state.step, context.state.cfg.train.train_iters
        if num_done:
            left = "the run resumes" if num_done < num_steps else "nothing is left to train"
            say(f"{context.state.cfg.checkpoint.load}: step {num_done} of {num_steps}: {left}")
        if num_done and config.resume_changed:
            renew_optimizer(context.optimizer.param_groups, context.state.cfg.optimizer)
            context.scheduler.step(0)

    def begin_anew(context: Any) -> None:
        """Bridge's sampler would begin the next validation where the last one ended."""
        context.state.train_state.consumed_valid_samples = 0

    callbacks = CallbackManager()
    callbacks.register("on_train_start", begin)
    callbacks.register("on_train_end", save)
    callbacks.register("on_eval_end", begin_anew)
    return callbacks


def _container(config: DictConfig, provider: Any, distillation: DistillationConfig) -> Any:
    """Bridge's ConfigContainer of a run's YAML.

    Raises:
        ValueError: A section has a key that Bridge does not know, or a cache does not fit.
    """
    from megatron.bridge.training import config as sections

    from nemo_kd.bridge.dataset import KDCaches
    from nemo_kd.bridge.models import tokenizer_config

    train = set_fields(sections.TrainingConfig(), config.train, "train")
    lists = ("train_caches", "validation_caches", "validation_files")
    files = config.dataset.validation_files
    own = {"max_seq_length": config.model.seq_length, "file_names": tuple(files)}
    dataset = KDCaches(
        **{key: list(config.dataset[key]) for key in lists},
        data=read_settings(DataConfig, {**config.data, **own}, "data") if files else None,
        seq_length=config.model.seq_length,
        pad_seq_length_to_mult=padding_multiple(config.model),
        global_batch_size=train.global_batch_size,
        objective=distillation.at(0),
    )
    set_fields(dataset, config.dataset, "dataset", lists)
    on_gpu = config.device == "gpu"
    checkpoint = set_fields(sections.CheckpointConfig(), config.checkpoint, "checkpoint")
    checkpoint.load = checkpoint.load or checkpoint.save  # a run resumes by the same command
    container = sections.ConfigContainer(
        train=train,
        model=provider,
        optimizer=set_fields(sections.OptimizerConfig(), config.optimizer, "optimizer"),
        scheduler=set_fields(sections.SchedulerConfig(), config.scheduler, "scheduler"),
        dataset=dataset,
        logger=set_fields(sections.LoggerConfig(), config.logger, "logger"),
        tokenizer=tokenizer_config(config.model.hf_path),
        checkpoint=checkpoint,
        rng=set_fields(sections.RNGConfig(), config.rng, "rng"),
        ddp=set_fields(sections.DistributedDataParallelConfig(), config.ddp, "ddp"),
        dist=sections.DistributedInitConfig(distributed_backend="nccl" if on_gpu else "gloo"),
        mixed_precision=config.mixed_precision if on_gpu else None,
    )
    # settings.json holds the schedule; Megatron's own check would refuse more steps as well.
    if not container.scheduler.use_checkpoint_opt_param_scheduler:
        container.scheduler.override_opt_param_scheduler = True
    if config.resume_changed:
        find_groups_by_kind()
    # Bridge leaves them null, and then multiplies null.
    for name in "start_weight_decay", "end_weight_decay":
        if getattr(container.scheduler, name) is None:
            setattr(container.scheduler, name, container.optimizer.weight_decay)
    if train.train_iters == 0:  # validates alone, and has no schedule
        container.scheduler.lr_decay_iters, container.scheduler.lr_warmup_iters = 1, 0
    if not on_gpu:
        container.optimizer.use_distributed_optimizer = False
        container.ddp.use_distributed_optimizer = False
        container.dataset.pin_memory = False
    return container
