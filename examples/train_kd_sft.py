"""Train a student on the teacher's cached top-K and on the labels: KD + SFT.

    python examples/train_kd_sft.py model.restore_from_path=student.nemo \\
        model.data.train_ds.file_names=[cache] model.data.validation_ds.file_names=[heldout-cache]

conf/train_kd_sft.yaml lists every key. model.knowledge_distillation.kd_loss_weight=0 with
sft_loss_weight=1 is plain SFT on the same samples.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_kd import cpu_backend
from nemo_kd.config import DistillationConfig, read_settings, refuse_unknown_keys
from nemo_kd.launch import (
    build_trainer,
    initialize_model_parallel,
    prepare_accelerator,
    read_model_config,
    save_nemo,
    user_errors,
)

CONFIG_FILE = Path(__file__).parent / "conf" / "train_kd_sft.yaml"


def check_settings(config: DictConfig, model_keys: set[str]) -> None:
    """Check the objective, and refuse keys of a preset or a + override that nothing reads.

    trainer, exp_manager and model.optim are refused by Lightning, NeMo and the optimizer.
    """
    known = OmegaConf.load(CONFIG_FILE)
    refuse_unknown_keys(config, known, "config")
    objective = config.model.get("knowledge_distillation", {})
    read_settings(DistillationConfig, objective, "model.knowledge_distillation")
    refuse_unknown_keys(config.model, set(known.model) | model_keys, "model")
    refuse_unknown_keys(config.model.data, known.model.data, "model.data")
    for name in ("train_ds", "validation_ds"):
        refuse_unknown_keys(config.model.data[name], known.model.data[name], f"model.data.{name}")
    peft = known.model.peft
    refuse_unknown_keys(config.model.peft, peft, "model.peft")
    refuse_unknown_keys(config.model.peft.lora_tuning, peft.lora_tuning, "model.peft.lora_tuning")


def merge_model_config(config: DictConfig, student: DictConfig) -> DictConfig:
    """The .nemo's config under the run's, as NeMo's MegatronGPTSFTModel.merge_cfg_with has it."""
    train_ds, validation_ds = config.model.data.train_ds, config.model.data.validation_ds
    with open_dict(student):
        student.data, student.optim = {}, {}  # of the run that wrote the .nemo
        merged: Any = OmegaConf.merge(student, config.model)
        merged.micro_batch_size = train_ds.micro_batch_size
        merged.global_batch_size = train_ds.global_batch_size
        merged.precision = config.trainer.precision
        if train_ds.concat_sampling_probabilities is None and len(train_ds.file_names) == 1:
            merged.data.train_ds.concat_sampling_probabilities = [1.0]
    for name in (*train_ds.file_names, *validation_ds.file_names):
        if not Path(name).exists():
            raise ValueError(f"model.data: expected a cache or a jsonl, found no {name}")
    if config.trainer.accelerator == "cpu":
        cpu_backend.prepare_model_config(merged)
    return merged


def train_kd_sft(config: DictConfig) -> None:
    prepare_accelerator(config)
    validates = config.trainer.max_steps == 0
    if validates and config.exp_manager is not None:
        # of model.restore_from_path, not of the checkpoint of an earlier run
        config.exp_manager.resume_if_exists = False
    student = read_model_config(config.model.restore_from_path, "model.restore_from_path")
    from megatron.core.transformer import TransformerConfig

    model_keys = {field.name for field in fields(TransformerConfig)} | set(student)
    check_settings(config, model_keys)
    model_config = merge_model_config(config, student)
    from nemo_kd.model import MegatronGPTSFTKDModel
    from nemo_kd.resume import exit_if_out_of_time, start_exp_manager

    with open_dict(config):
        config.model = model_config  # what the trainer's plugins read of it is the .nemo's too
    trainer = build_trainer(config)
    start_exp_manager(trainer, config.exp_manager)
    initialize_model_parallel(trainer, model_config)
    model = MegatronGPTSFTKDModel.restore_from(
        config.model.restore_from_path, override_config_path=model_config, trainer=trainer
    )
    if config.model.peft.peft_scheme is not None:
        from nemo_kd.lora import add_adapters

        add_adapters(model, config.model.peft)
    if validates:
        trainer.validate(model)
        return
    trainer.fit(model)
    exit_if_out_of_time(trainer)
    if config.save_to is not None:
        if config.trainer.accelerator == "cpu":
            cpu_backend.drop_overrides(model.cfg)
        save_nemo(model, config.save_to)


@hydra.main(version_base=None, config_path="conf", config_name="train_kd_sft")
def main(config: DictConfig) -> None:
    with user_errors():
        train_kd_sft(config)


if __name__ == "__main__":
    main()
