"""The teacher run on Megatron-Bridge: a Hugging Face model over SFT data, into a cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import ConcatDataset

from nemo_kd.bridge import console, cpu_backend
from nemo_kd.cache.manifest import fingerprint_model
from nemo_kd.chat.samples import warn_of_missing_begin, with_found_format
from nemo_kd.config import CacheConfig, DataConfig, read_dump, refuse_unknown_keys
from nemo_kd.hf_config import hf_files
from nemo_kd.layout import check_replica
from nemo_kd.ranks import on_rank_zero, start
from nemo_kd.selection import SelectionConfig
from nemo_kd.student.dataset import padding_multiple
from nemo_kd.teacher.fill import fill_cache
from nemo_kd.teacher.forward import Teacher
from nemo_kd.teacher.plan import plan_cache
from nemo_kd.teacher.replica import PATIENCE, Replica
from nemo_kd.yaml_rules import check_yaml_values

# Keys of `model` that leave the logits as they are.
_NOT_IN_FINGERPRINT = (
    *("hf_path", "tensor_model_parallel_size", "pipeline_model_parallel_size"),
    *("expert_model_parallel_size", "sequence_parallel"),
)


def dump_teacher_topk(config: DictConfig) -> None:
    """Fill the cache that `config` describes: see conf/bridge/dump_teacher_topk.yaml.

    Raises:
        ValueError: A setting, the data, the teacher or an existing cache does not fit; what the
            cache held stays.
    """
    data, selection, cache = check_settings(config)
    data = with_found_format(data)
    console.quiet_host()
    if config.device == "cpu":
        cpu_backend.enable()
    from megatron.core import parallel_state

    from nemo_kd.bridge.dataset import file_datasets, read_tokenizer
    from nemo_kd.bridge.models import read_model

    start(config.device)
    length = data.max_seq_length
    _, provider, _ = read_model(config.model, config.device, length, "data.max_seq_length")
    check_replica(vars(provider), "model")
    provider.seq_length = max(provider.seq_length, length)
    everyone = torch.distributed.new_group(timeout=PATIENCE, backend="gloo")
    tokenizer = read_tokenizer(Path(config.model.hf_path), "model.hf_path")
    # Checked before the weights are read, so that a broken line costs seconds.
    manifest = on_rank_zero(
        lambda: plan_cache(data, selection, cache, tokenizer, _fingerprint(config)), everyone
    )
    provider.finalize()
    provider.initialize_model_parallel(seed=1234)
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
    datasets = file_datasets(data, tokenizer, manifest.sources, padding_multiple(config.model))
    warn_of_missing_begin(tokenizer, datasets)
    fill_cache(
        manifest,
        cache,
        data,
        ConcatDataset(datasets),
        everyone,
        start=lambda: _replica_and_forward(model, selection, tokenizer.vocab_size),
        is_first_replica=parallel_state.get_expert_data_parallel_rank() == 0,
    )


def check_settings(config: DictConfig) -> tuple[DataConfig, SelectionConfig, CacheConfig]:
    """Read the sections that are this package's own.

    Raises:
        ValueError: There is a key that nothing reads, or a setting does not fit.
    """
    check_yaml_values(config, "bridge/dump_teacher_topk")
    refuse_unknown_keys(config, ("device", "model", "data", "selection", "cache"))
    return read_dump(config)


def _fingerprint(config: DictConfig) -> str:
    """Hash the teacher's files, and all settings that shape its logits."""
    model: Any = OmegaConf.to_container(config.model, resolve=True)
    settings = {key: model[key] for key in model if key not in _NOT_IN_FINGERPRINT}
    files = hf_files(config.model.hf_path)
    return fingerprint_model(files, json.dumps([settings, config.device], sort_keys=True))


def _replica_and_forward(
    model: Any, selection: SelectionConfig, vocab_size: int
) -> tuple[Replica, Teacher]:
    """This process's part in the teacher run, out of Bridge's model and Megatron's groups.

    Ranks that share out the experts are of one replica, because each of them waits for the others.
    """
    from megatron.core import parallel_state

    ranks = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_expert_model_parallel_rank(),
    )
    replica = Replica(
        parallel_state.get_expert_tensor_model_pipeline_parallel_group(),
        leads=parallel_state.is_pipeline_last_stage() and ranks == (0, 0),
    )
    forward = Teacher(
        model,
        getattr(model, "module", model),
        selection=selection,
        vocab_size=vocab_size,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        has_stages=parallel_state.get_pipeline_model_parallel_world_size() > 1,
        replica=replica,
    )
    return replica, forward
