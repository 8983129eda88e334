"""The student run on NeMo 2.4: checks the settings, restores the model, trains and saves it."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_kd.config import DistillationConfig, read_settings, refuse_unknown_keys
from nemo_kd.layout import check_expert_training, check_layout, check_sequence_length, say_layout
from nemo_kd.nemo import cpu_backend
from nemo_kd.nemo.console import report_short_fields
from nemo_kd.nemo.integrity import restore_model
from nemo_kd.nemo.nemo_file import check_target, read_model_config, save_nemo
from nemo_kd.nemo.trainer import (
    build_trainer,
    initialize_model_parallel,
    prepare_accelerator,
)
from nemo_kd.process import check_installed, say
from nemo_kd.ranks import on_rank_zero
from nemo_kd.student.terms import KD_TERMS, SFT_TERMS
from nemo_kd.yaml_rules import check_yaml_values

_DATASETS = ("train_ds", "validation_ds")
# How the run that wrote the .nemo laid out its work, which this one may not be able to.
_NOT_INHERITED = {
    "virtual_pipeline_model_parallel_size": None,
    "ub_tp_comm_overlap": False,
    "defer_embedding_wgrad_compute": False,
}
_AFTER_TRAINING = "The checkpoints are whole: free space, and the same command saves the last one"


def check_settings(config: DictConfig) -> None:
    """Check the objective, the optimizer and the logger before anything is read.

    Raises:
        ValueError: There is a key that nothing reads, or a setting that has no meaning.
    """
    check_yaml_values(config, "train_kd_sft")
    if config.get("exp_manager"):
        check_monitor(config)
    sections = ("name", "save_to", "save_checkpoint", "resume_changed", "trainer", "exp_manager")
    refuse_unknown_keys(config, (*sections, "model"))
    if config.save_to is not None and config.trainer.max_steps != 0:
        check_target(config.save_to, config.model.restore_from_path)
    writes_checkpoints = (config.exp_manager or {}).get("create_checkpoint_callback", False)
    if config.save_checkpoint == "best" and not (writes_checkpoints and config.save_to):
        raise ValueError(
            "save_checkpoint=best needs save_to and exp_manager.create_checkpoint_callback=true, "
            "because the best checkpoint is what save_to gets"
        )
    if config.save_to is None and not writes_checkpoints and config.trainer.max_steps != 0:
        say("warning: save_to and checkpoints are off: this run keeps no weights")
    check_optimizer(config.model.optim)
    check_overlaps(config.model)
    objective = config.model.get("knowledge_distillation", {})
    read_settings(DistillationConfig, objective, "model.knowledge_distillation")
    if config.model.peft.peft_scheme is not None and "distributed" in config.model.optim.name:
        raise ValueError(
            f"expected model.optim.name=fused_adam with model.peft, got {config.model.optim.name}, "
            "whose state NeMo's checkpoints of adapters leave out"
        )
    if (config.exp_manager or {}).get("create_wandb_logger", False):
        check_installed("wandb", "exp_manager.create_wandb_logger=true", "false")


def check_monitor(config: Any) -> None:
    """Refuse a monitor that no validation logs: the first checkpoint would fail.

    Raises:
        ValueError: There is no such metric.
    """
    key = "exp_manager.checkpoint_callback_params.monitor"
    monitor = OmegaConf.select(config, key)
    data = config.model.data.validation_ds
    names = data.get("names") or [f"dataloader{i}" for i in range(len(data.file_names))]
    known = ["validation_loss", "val_loss"]
    for name, path in zip(names, data.file_names, strict=False):
        terms = KD_TERMS if Path(path).is_dir() else SFT_TERMS
        known += [f"validation_{term}_{name}" for term in ("loss", *terms)]
    if monitor is not None and monitor not in known:
        raise ValueError(f"{key}: expected one of {', '.join(known)}, got {monitor!r}")


def check_optimizer(optim: DictConfig) -> None:
    """Refuse an optimizer or a schedule that NeMo does not have, before NeMo reads the weights.

    Raises:
        ValueError: There is none of that name.
    """
    from nemo.core.optim.lr_scheduler import AVAILABLE_SCHEDULERS
    from nemo.core.optim.optimizers import AVAILABLE_OPTIMIZERS

    schedule = (optim.get("sched") or {}).get("name")
    for key, name, known in (
        ("name", optim.get("name"), {*AVAILABLE_OPTIMIZERS, *cpu_backend.GPU_OPTIMIZERS}),
        ("sched.name", schedule, {*AVAILABLE_SCHEDULERS, None}),
    ):
        if name not in known:
            choices = ", ".join(sorted(filter(None, known)))
            raise ValueError(f"model.optim.{key}: expected one of {choices}; got {name!r}")


def check_batches(model: DictConfig, num_processes: int) -> None:
    """Check the student's layout and its batches against each other.

    Raises:
        ValueError: The parallel sizes do not divide the model; the micro batches of all replicas
            do not divide a global batch; sequences are longer than the student's; or a list and
            the list of files differ in length.
    """
    num_replicas = check_layout(model, num_processes, "model")
    check_expert_training(model, "model")
    say_layout(model, num_processes, num_replicas)
    for name in _DATASETS:
        dataset, key = model.data[name], f"model.data.{name}"
        if dataset.global_batch_size % (dataset.micro_batch_size * num_replicas):
            raise ValueError(
                f"expected {key}.global_batch_size divisible by its micro_batch_size "
                f"{dataset.micro_batch_size} x data-parallel size {num_replicas}, got "
                f"{dataset.global_batch_size}"
            )
        check_sequence_length(model, "model", dataset.max_seq_length, f"{key}.max_seq_length")
        for each in ("names", "concat_sampling_probabilities"):
            values = dataset.get(each)
            if values is not None and len(values) != len(dataset.file_names):
                raise ValueError(
                    f"expected as many values of {key}.{each} as of {key}.file_names, "
                    f"{len(dataset.file_names)}, got {len(values)}"
                )


def check_overlaps(model: DictConfig) -> None:
    """Refuse keys that move work in ways which this run cannot take.

    Args:
        model: The section of the run's YAML.

    Raises:
        ValueError: One of them is set.
    """
    if (model.get("virtual_pipeline_model_parallel_size") or 1) > 1:
        raise ValueError(
            "model.virtual_pipeline_model_parallel_size: expected null, got "
            f"{model.virtual_pipeline_model_parallel_size}: NeMo 2.4 fine-tunes without virtual "
            "stages"
        )
    lengths_differ = not all(model.data[name].pad_to_max_length for name in _DATASETS)
    if model.get("ub_tp_comm_overlap") and lengths_differ:
        raise ValueError(
            "model.ub_tp_comm_overlap=true needs pad_to_max_length=true in model.data.train_ds and "
            "model.data.validation_ds: its buffers hold sequences of one length"
        )
    fuses = model.get("knowledge_distillation", {}).get("fuse_output_layer", False)
    if model.get("defer_embedding_wgrad_compute") and fuses:
        raise ValueError(
            "model.defer_embedding_wgrad_compute: expected false with "
            "model.knowledge_distillation.fuse_output_layer=true, got true: the loss computes that "
            "gradient itself"
        )


def merge_model_config(config: DictConfig, student: DictConfig) -> DictConfig:
    """The .nemo's config, changed to what the run asks for.

    NeMo's MegatronGPTSFTModel.merge_cfg_with does so too, but replaces whole sections, so that
    +model.tokenizer.type=... would drop the tokenizer's other keys.

    Raises:
        ValueError: A file of the data is not there.
    """
    train_ds, validation_ds = config.model.data.train_ds, config.model.data.validation_ds
    with open_dict(student):
        student.data, student.optim = {}, {}  # those of the run that wrote the .nemo
        student.update(_NOT_INHERITED)
        merged: Any = OmegaConf.merge(student, config.model)
        merged.micro_batch_size = train_ds.micro_batch_size
        merged.global_batch_size = train_ds.global_batch_size
        merged.precision = config.trainer.precision
        if train_ds.concat_sampling_probabilities is None and len(train_ds.file_names) == 1:
            merged.data.train_ds.concat_sampling_probabilities = [1.0]
    for name in (*train_ds.file_names, *validation_ds.file_names):
        if not Path(name).exists():
            raise ValueError(f"model.data: expected a cache or a jsonl, found no {name}")
    if not all(Path(name).is_dir() for name in train_ds.file_names):
        raise ValueError(
            f"model.data.train_ds.file_names: expected cache directories, got "
            f"{list(train_ds.file_names)}; write them with examples/dump_teacher_topk.py"
        )
    if config.trainer.accelerator == "cpu":
        cpu_backend.prepare_model_config(merged)
    return merged


def train_kd_sft(config: DictConfig) -> None:
    """Train the student that `config` describes: see examples/conf/train_kd_sft.yaml.

    Raises:
        ValueError: A setting, the student, a cache or a checkpoint does not fit, or is damaged.
        OSError: A checkpoint or `save_to` cannot be written.
    """
    check_settings(config)  # before prepare_accelerator, which replaces what a CPU cannot do
    student = read_model_config(config.model.restore_from_path, "model.restore_from_path")
    asked = config.copy()
    prepare_accelerator(config)
    validates = config.trainer.max_steps == 0
    if config.save_checkpoint == "best":  # NeMo's key, which loads it after the last step
        with open_dict(config):
            config.exp_manager.checkpoint_callback_params.save_best_model = True
    if validates and config.exp_manager is not None:
        # The weights of model.restore_from_path are wanted, not an earlier run's checkpoint.
        config.exp_manager.resume_if_exists = False
    model_config = merge_model_config(config, student)

    from nemo_kd.nemo.data import check_files
    from nemo_kd.nemo.model import MegatronGPTSFTKDModel
    from nemo_kd.nemo.resume import start_exp_manager
    from nemo_kd.nemo.run_directory import settings_of

    with open_dict(config):
        config.model = model_config  # the trainer's plugins read keys that only the .nemo has
    has_adapters = config.model.peft.peft_scheme is not None
    if has_adapters:
        from nemo_kd.nemo.lora import add_adapters, check_adapters

        check_adapters(config.model)
    trainer = build_trainer(config)
    check_batches(model_config, trainer.world_size)
    initialize_model_parallel(trainer, model_config)
    on_rank_zero(lambda: check_files(model_config))
    settings = None if validates else settings_of(asked)
    start_exp_manager(trainer, config.exp_manager, settings, config.resume_changed)
    path, key = config.model.restore_from_path, "model.restore_from_path"
    model = restore_model(MegatronGPTSFTKDModel, path, key, model_config, trainer)
    if has_adapters:
        add_adapters(model, config.model.peft)
    _train_and_save(config, trainer, model, validates)


def _train_and_save(config: DictConfig, trainer: Any, model: Any, validates: bool) -> None:
    from nemo_kd.nemo.resume import exit_if_stopped, fit
    from nemo_kd.nemo.summary import follow

    summary = follow(trainer)
    if validates:
        trainer.validate(model)
        report_short_fields()
        return
    fit(trainer, model)
    report_short_fields()
    exit_if_stopped(trainer)
    if config.save_to is not None:
        if config.trainer.accelerator == "cpu":
            cpu_backend.drop_overrides(model.cfg)
        resumes = trainer.checkpoint_callback is not None and config.exp_manager.resume_if_exists
        save_nemo(model, config.save_to, _AFTER_TRAINING if resumes else "")
    if torch.distributed.get_rank() == 0:
        print(summary.report(trainer, config.save_to))
