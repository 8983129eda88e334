"""The teacher run on NeMo 2.4: checks and builds settings, data and model, and fills the cache."""

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
    MegatronGPTSFTModel,
)
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_kd.chat.samples import with_found_format
from nemo_kd.config import CacheConfig, DataConfig, read_dump, refuse_unknown_keys
from nemo_kd.layout import check_layout, check_sequence_length, check_slices, say_layout
from nemo_kd.nemo import cpu_backend
from nemo_kd.nemo.console import forget_short_fields, log_to, report_short_fields
from nemo_kd.nemo.integrity import restore_model
from nemo_kd.nemo.nemo_file import read_model_config, tokenizer_of
from nemo_kd.nemo.sources import build_samples, fingerprint_teacher
from nemo_kd.nemo.trainer import (
    build_trainer,
    initialize_model_parallel,
    prepare_accelerator,
)
from nemo_kd.ranks import on_rank_zero
from nemo_kd.selection import SelectionConfig
from nemo_kd.teacher.fill import fill_cache
from nemo_kd.teacher.forward import Teacher
from nemo_kd.teacher.plan import plan_cache
from nemo_kd.teacher.replica import PATIENCE, Replica
from nemo_kd.yaml_rules import check_yaml_values


def dump_teacher_topk(config: DictConfig) -> None:
    """Fill the cache that `config` describes: see examples/conf/dump_teacher_topk.yaml.

    Raises:
        ValueError: A setting, the data, the teacher or an existing cache does not fit; what the
            cache held stays.
    """
    data, selection, cache = check_settings(config)
    stored = read_model_config(config.teacher.restore_from_path, "teacher.restore_from_path")
    data = with_found_format(data)
    prepare_accelerator(config)
    teacher = _merge_teacher_config(config, stored, data)
    trainer = _start_megatron(config, teacher, data)
    # NCCL's time-out is shorter than the reading of a long file, or the wait for a shard that
    # another job fills; this group of gloo's has its own.
    everyone = torch.distributed.new_group(timeout=PATIENCE, backend="gloo")
    # Checked before the weights are read, so that a broken line costs seconds.
    manifest = on_rank_zero(
        lambda: plan_cache(
            data,
            selection,
            cache,
            tokenizer_of(teacher, Path(config.teacher.restore_from_path)),
            fingerprint_teacher(config),
        ),
        everyone,
    )
    path = config.teacher.restore_from_path
    model = restore_model(MegatronGPTSFTModel, path, "teacher.restore_from_path", teacher, trainer)
    samples = build_samples(model, data, manifest.sources)
    fill_cache(
        manifest,
        cache,
        data,
        samples,
        everyone,
        start=lambda: _replica_and_forward(model, selection),
        is_first_replica=parallel_state.get_data_parallel_rank() == 0,
        log_to=log_to,
    )
    report_short_fields()


def _start_megatron(config: DictConfig, teacher: DictConfig, data: DataConfig) -> Any:
    """Return the trainer, once Megatron's groups are up and the teacher fits them."""
    run = OmegaConf.create(
        {
            "trainer": config.trainer,
            "model": teacher,
            "exp_manager": {"log_tflops_per_sec_per_gpu": False},
        }
    )
    trainer = build_trainer(run)
    num_replicas = check_layout(teacher, trainer.world_size, "teacher")
    say_layout(teacher, trainer.world_size, num_replicas)
    check_sequence_length(teacher, "teacher", data.max_seq_length, "data.max_seq_length")
    check_slices(teacher, data.max_seq_length, "data.max_seq_length")
    with open_dict(teacher):  # NeMo's count of micro batches; this run does not use it
        teacher.global_batch_size = data.micro_batch_size * num_replicas
    initialize_model_parallel(trainer, teacher)
    return trainer


def _replica_and_forward(model: Any, selection: SelectionConfig) -> tuple[Replica, Teacher]:
    """This process's part in the teacher run, out of NeMo's model and Megatron's groups."""
    forget_short_fields()  # those of the samples that were tokenised for the checks
    is_last_stage = parallel_state.is_pipeline_last_stage()
    replica = Replica(
        parallel_state.get_model_parallel_group(),
        leads=is_last_stage and parallel_state.get_tensor_model_parallel_rank() == 0,
    )
    (module,) = model.get_model_module_list()
    forward = Teacher(
        model.model,
        module,
        selection=selection,
        vocab_size=model.tokenizer.vocab_size,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        has_stages=parallel_state.get_pipeline_model_parallel_world_size() > 1,
        replica=replica,
    )
    return replica, forward


def check_settings(config: DictConfig) -> tuple[DataConfig, SelectionConfig, CacheConfig]:
    """Read the sections that are this package's own.

    Raises:
        ValueError: There is a key that nothing reads, or a setting does not fit.
    """
    check_yaml_values(config, "dump_teacher_topk")
    refuse_unknown_keys(config, ("teacher", "data", "selection", "cache", "trainer"))
    return read_dump(config)


def _merge_teacher_config(
    config: DictConfig, model_config: DictConfig, data: DataConfig
) -> DictConfig:
    """The .nemo's config, changed in place to what the run asks for and a forward pass needs."""
    with open_dict(model_config):
        model_config.update({k: v for k, v in config.teacher.items() if k != "restore_from_path"})
        model_config.precision = config.trainer.precision
        model_config.micro_batch_size = data.micro_batch_size
        model_config.answer_only_loss = data.answer_only_loss
        model_config.sep_id = data.sep_id
        model_config.data = {"chat": data.chat, "chat_prompt_tokens": data.chat_prompt_tokens}
        model_config.optim = {"name": "adamw", "lr": 0.0}  # NeMo reads its name
        model_config.gradient_as_bucket_view = False  # read on a GPU
        # What the run that wrote the .nemo had, and a forward pass over whole sequences has not.
        model_config.context_parallel_size = 1
        model_config.virtual_pipeline_model_parallel_size = None
        model_config.ub_tp_comm_overlap = False
        model_config.use_cpu_initialization = False
        model_config.update(dict.fromkeys(cpu_backend.CHECKPOINTED_ACTIVATIONS))
    if config.trainer.accelerator == "cpu":
        cpu_backend.prepare_model_config(model_config, "teacher")
    return model_config
