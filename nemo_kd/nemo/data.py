"""The student's data on NeMo: checks of a data section, and caches in the place of jsonl."""

import os
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest.mock import patch

from nemo.collections.nlp.models.language_modeling import megatron_gpt_sft_model
from omegaconf import DictConfig

from nemo_kd.loss import KDLossConfig
from nemo_kd.nemo.dataset import GPTSFTKDDataset
from nemo_kd.nemo.packing import GPTSFTKDPackedDataset
from nemo_kd.nemo.resume import WholePassSampler


def check_section(data: DictConfig, model: DictConfig, is_train: bool) -> None:
    """Check `model.data.train_ds` or `model.data.validation_ds` before a dataset is built.

    Raises:
        ValueError: A file, a size or a metric of the section does not fit.
    """
    section = f"model.data.{'train_ds' if is_train else 'validation_ds'}"
    caches = [path for path in data.file_names if os.path.isdir(path)]
    if is_train and len(caches) < len(data.file_names):
        raise ValueError(
            f"model.data.train_ds.file_names: expected cache directories, got "
            f"{list(data.file_names)}; write them with examples/dump_teacher_topk.py"
        )
    if data.get("packed_sequence", False) and data.micro_batch_size != 1:
        raise ValueError(
            f"expected {section}.micro_batch_size=1 with packed_sequence=true, because a pack is "
            f"the micro batch, got {data.micro_batch_size}"
        )
    context_size = model.get("context_parallel_size", 1)
    num_slices = 2 * context_size if context_size > 1 else 1
    if model.get("sequence_parallel", False):
        num_slices *= model.tensor_model_parallel_size
    if data.max_seq_length % num_slices:
        raise ValueError(
            f"expected {section}.max_seq_length divisible by {num_slices}, the slices of a "
            f"sequence in context and sequence parallelism, got {data.max_seq_length}"
        )
    if caches and not is_train:
        metric = data.get("metric", {}).get("name", "exact_string_match")
        writes = data.get("write_predictions_to_file", False)
        if metric != "loss" or writes:
            raise ValueError(
                f"{caches[0]}: a validation cache has no texts to generate from: expected "
                f"metric.name=loss and write_predictions_to_file=false, got {metric} and "
                f"{str(writes).lower()}; give the jsonl instead"
            )


def opening_caches(
    kd_config: KDLossConfig, context_parallel_size: int
) -> AbstractContextManager[Any]:
    """Within it, MegatronGPTSFTModel opens a directory among `file_names` as a cache.

    NeMo's `_build_dataset` looks its classes up in its module and takes no others.
    """
    samples = partial(GPTSFTKDDataset, kd_config=kd_config)
    packs = partial(
        GPTSFTKDPackedDataset, kd_config=kd_config, context_parallel_size=context_parallel_size
    )
    classes = {
        "GPTSFTDataset": samples,
        "GPTSFTChatDataset": samples,
        "GPTSFTPackedDataset": packs,
    }
    return patch.multiple(
        megatron_gpt_sft_model,
        **{
            name: partial(_open, getattr(megatron_gpt_sft_model, name), of_cache)
            for name, of_cache in classes.items()
        },
    )


def _open(of_jsonl: Any, of_cache: Any, *, file_path: str, **settings: Any) -> Any:
    dataset_class = of_cache if os.path.isdir(file_path) else of_jsonl
    return dataset_class(file_path=file_path, **settings)


def sampling_whole_passes() -> AbstractContextManager[Any]:
    """Within it, MegatronGPTSFTModel's data loaders have WholePassSampler, for the same reason."""
    return patch.object(megatron_gpt_sft_model, "MegatronPretrainingBatchSampler", WholePassSampler)
