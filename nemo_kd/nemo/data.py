"""The student's data on NeMo: checks of a data section, caches as datasets, and the loader."""

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from nemo.collections.nlp.data.language_modeling.megatron.base_dataset_utils import (
    get_datasets_weights_and_num_samples,
)
from nemo.collections.nlp.data.language_modeling.megatron.blendable_dataset import BlendableDataset
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_kd.cache import TopKCache
from nemo_kd.chat import as_jsonl, is_dataset_directory
from nemo_kd.chat.lines import check_files as check_lines_of
from nemo_kd.chat.samples import (
    fingerprint_source,
    index_directory,
    name_line_in_errors,
    renderer_of,
    with_found_format,
)
from nemo_kd.config import DataConfig, DistillationConfig, read_settings
from nemo_kd.layout import check_slices
from nemo_kd.loss import KDLossConfig
from nemo_kd.nemo.dataset import GPTSFTKDDataset
from nemo_kd.nemo.nemo_file import tokenizer_of
from nemo_kd.nemo.packing import GPTSFTKDPackedDataset
from nemo_kd.nemo.resume import WholePassSampler
from nemo_kd.nemo.sources import rendered_dataset
from nemo_kd.process import say, shield_workers
from nemo_kd.student.dataset import padding_multiple
from nemo_kd.student.fit import check_fits
from nemo_kd.student.vocabulary import check_lacking


def caches_of(data: DictConfig) -> list[str]:
    """The cache directories among a data section's files."""
    return [path for path in data.file_names if _is_cache(path)]


def _is_cache(path: str) -> bool:
    return os.path.isdir(path) and not is_dataset_directory(path)


def check_files(model: DictConfig) -> None:
    """Check caches and lines of jsonl files against the student, before its weights are read.

    Args:
        model: The model's config.

    Raises:
        ValueError: A cache does not fit the student or the objective, or a line of a jsonl is not
            what NeMo takes.
    """
    tokenizer = tokenizer_of(model, Path(model.restore_from_path))
    objective = read_settings(
        DistillationConfig, model.knowledge_distillation, "model.knowledge_distillation"
    )
    for section in "train_ds", "validation_ds":
        data = model.data[section]
        for path in data.file_names:
            if _is_cache(path):
                cache, length = TopKCache.open(path), data.max_seq_length
                ids = check_fits(cache, objective.at(0), tokenizer=tokenizer, max_seq_length=length)
                if line := check_lacking(cache, ids):
                    say(line)
            else:
                settings = file_settings(path, data, model, says=True)
                check_lines_of(settings, tokenizer, "model.data.validation_ds")


def file_settings(path: str, data: DictConfig, model: DictConfig, says: bool = False) -> DataConfig:
    """What the samples of a validation file are made with.

    Args:
        path: The file.
        data: `model.data.validation_ds`.
        model: The model's config.
        says: Whether to say the format that was found.

    Raises:
        ValueError: A setting does not fit, or the file has no known format.
    """
    section: Any = OmegaConf.to_container(data, resolve=True)
    own = {field.name: section[field.name] for field in fields(DataConfig) if field.name in section}
    chat = {name: model.data[name] for name in ("chat", "chat_prompt_tokens")}
    settings = read_settings(
        DataConfig,
        own | chat | {"file_names": [path], "sep_id": model.sep_id},
        "model.data.validation_ds",
    )
    found = with_found_format(settings, says)
    if found.chat and not model.data.chat:
        raise ValueError(
            f"model.data.chat: expected true for the validation file {path}, which is in NeMo's "
            "chat format, got false"
        )
    return found


def check_section(data: DictConfig, model: DictConfig, is_train: bool) -> None:
    """Check `model.data.train_ds` or `model.data.validation_ds` before a dataset is built.

    Args:
        data: The section.
        model: The model's config.
        is_train: Which of the two it is.

    Raises:
        ValueError: A file, a size or a metric of the section does not fit.
    """
    section = f"model.data.{'train_ds' if is_train else 'validation_ds'}"
    caches = caches_of(data)
    if data.get("packed_sequence", False) and data.micro_batch_size != 1:
        raise ValueError(
            f"expected {section}.micro_batch_size=1 with packed_sequence=true, a pack being "
            f"the micro batch, got {data.micro_batch_size}"
        )
    if model.get("expert_model_parallel_size", 1) > 1 and not data.get("pad_to_max_length", False):
        raise ValueError(
            f"expected {section}.pad_to_max_length=true with expert parallelism, got false: "
            "Megatron's experts take sequences of one length"
        )
    check_slices(model, data.max_seq_length, f"{section}.max_seq_length")
    if caches and not is_train:
        metric = data.get("metric", {}).get("name", "exact_string_match")
        writes = data.get("write_predictions_to_file", False)
        if metric != "loss" or writes:
            raise ValueError(
                f"{caches[0]}: a validation cache has no texts to generate from: expected "
                f"metric.name=loss and write_predictions_to_file=false, got {metric} and "
                f"{str(writes).lower()}; give the jsonl instead"
            )


def file_dataset(path: str, data: DictConfig, model: DictConfig, tokenizer: Any, nemos: Any) -> Any:
    """A validation set of plain samples.

    Args:
        path: The file.
        data: `model.data.validation_ds`.
        model: The model's config.
        tokenizer: NeMo's.
        nemos: NeMo's `_build_dataset`, for the formats that its datasets read.
    """
    settings = file_settings(path, data, model)
    directory = _index_directory(path, settings)
    file = as_jsonl(path, directory)
    if renderer := renderer_of(settings, tokenizer):
        own = {
            "pad_to_max_length": data.get("pad_to_max_length", False),
            "tokens_to_generate": data.get("tokens_to_generate", 0),
        }
        multiple = padding_multiple(model)
        return rendered_dataset(file, tokenizer, renderer, settings, directory, multiple, **own)
    with open_dict(data):
        given = {"file_names": [file], "index_mapping_dir": directory}
        alone = OmegaConf.merge(data, settings.host_settings | given)
    (dataset,) = nemos(alone, is_train=False)
    name_line_in_errors(dataset)
    return dataset


def _index_directory(path: str, settings: DataConfig) -> str:
    return index_directory(settings.index_mapping_dir, [fingerprint_source(path)])


def training_blend(
    data: DictConfig, model: DictConfig, tokenizer: Any, config: KDLossConfig, max_steps: int
) -> BlendableDataset:
    """The training caches in one dataset, as NeMo's MegatronGPTSFTModel blends its jsonl files."""
    weights = data.concat_sampling_probabilities
    prefix = [value for pair in zip(weights, data.file_names, strict=True) for value in pair]
    _, _, counts = get_datasets_weights_and_num_samples(
        prefix, [max_steps * data.global_batch_size]
    )
    datasets = [
        cache_dataset(path, data, model, tokenizer, config, max_num_samples=count)
        for path, (count,) in zip(data.file_names, counts, strict=True)
    ]
    packed = data.get("packed_sequence", False)
    size = sum(map(len, datasets)) if packed else sum(count for (count,) in counts)
    return BlendableDataset(datasets=datasets, weights=weights, size=size)


def cache_dataset(
    path: str,
    data: DictConfig,
    model: DictConfig,
    tokenizer: Any,
    config: KDLossConfig,
    max_num_samples: int | None = None,
) -> GPTSFTKDDataset | GPTSFTKDPackedDataset:
    """A cache as NeMo's SFT dataset, with those of its settings that a cache leaves open."""
    settings = {
        "kd_config": config,
        "reads_rows": parallel_state.is_pipeline_last_stage(),
        "max_seq_length": data.max_seq_length,
        "pad_seq_length_to_mult": padding_multiple(model),
        "pad_to_max_length": data.get("pad_to_max_length", False),
        "ceil_to_power_2": data.get("ceil_to_power_2", False),
        "get_attention_mask_from_fusion": data.get("get_attention_mask_from_fusion", True),
        "tokens_to_generate": data.get("tokens_to_generate", 0),  # which lengthens a batch
        "max_num_samples": max_num_samples,
        "seed": data.get("seed", 1234),
    }
    if not data.get("packed_sequence", False):
        return GPTSFTKDDataset(path, tokenizer, **settings)
    return GPTSFTKDPackedDataset(
        path,
        tokenizer,
        context_parallel_size=model.get("context_parallel_size", 1),
        return_cu_seqlen=data.get("packed_sequence_return_cu_seqlen", True),
        **settings,
    )


def build_loader(
    dataset: Any, data: DictConfig, consumed_samples: int
) -> torch.utils.data.DataLoader[Any]:
    """NeMo's data loader, whose sampler is as long as the whole pass and whose workers are ours.

    Args:
        dataset: The blend of the training caches, or one validation set.
        data: Its section.
        consumed_samples: The place in the data that a resumed run starts from.
    """
    first = dataset.datasets[0] if isinstance(dataset, BlendableDataset) else dataset
    sampler = WholePassSampler(
        total_samples=len(dataset),
        consumed_samples=consumed_samples,
        micro_batch_size=data.micro_batch_size,
        global_batch_size=data.global_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        drop_last=data.drop_last,
        pad_samples_to_global_batch_size=not data.drop_last,
    )
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=first.collate_fn,
        num_workers=data.num_workers,
        pin_memory=data.pin_memory,
        persistent_workers=data.num_workers > 0,
    )
    shield_workers(loader)
    return loader
