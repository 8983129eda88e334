"""What the teacher run reads: NeMo's samples of jsonl files, and the teacher's files."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch.utils.data import ConcatDataset

from nemo_kd.cache import SourceFile
from nemo_kd.chat import Renderer, as_jsonl
from nemo_kd.chat.samples import (
    index_directory,
    name_line_in_errors,
    renderer_of,
    warn_of_missing_begin,
)
from nemo_kd.config import DataConfig
from nemo_kd.nemo.nemo_file import fingerprint_checkpoint
from nemo_kd.nemo.rendered import RenderedDataset
from nemo_kd.student.dataset import padding_multiple

# Keys of `teacher` that leave the logits as they are.
_NOT_IN_FINGERPRINT = (
    "restore_from_path",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "sequence_parallel",
)


def build_samples(
    model: Any, data: DataConfig, sources: Sequence[SourceFile]
) -> ConcatDataset[Any]:
    """The samples of all files in their order."""
    directory = index_directory(data.index_mapping_dir, sources)
    files = [as_jsonl(path, directory) for path in data.file_names]
    settings = {"index_mapping_dir": directory, "file_names": files}
    if renderer := renderer_of(data, model.tokenizer):
        multiple = padding_multiple(model.cfg)
        datasets = [
            rendered_dataset(file, model.tokenizer, renderer, data, directory, multiple)
            for file in files
        ]
    else:
        datasets = model._build_dataset(
            OmegaConf.create(asdict(data) | data.host_settings | settings), is_train=False
        )
        for dataset in datasets:
            dataset.is_test = False  # when true, a missing label counts as an empty one
            name_line_in_errors(dataset)
    warn_of_missing_begin(model.tokenizer, datasets)
    return ConcatDataset(datasets)


def rendered_dataset(
    file: str,
    tokenizer: Any,
    renderer: Renderer,
    data: DataConfig,
    index_dir: str,
    multiple: int,
    **nemo_settings: Any,
) -> RenderedDataset:
    """A jsonl as a dataset of NeMo's; `multiple` is what the length of a batch is padded to."""
    return RenderedDataset(
        file,
        tokenizer,
        renderer,
        data.format,
        max_seq_length=data.max_seq_length,
        pad_seq_length_to_mult=multiple,
        index_mapping_dir=index_dir,
        memmap_workers=data.memmap_workers,
        get_attention_mask_from_fusion=True,
        **nemo_settings,
    )


def fingerprint_teacher(config: DictConfig) -> str:
    """Hash the checkpoint, and all settings that shape its logits."""
    teacher: Any = OmegaConf.to_container(config.teacher, resolve=True)
    settings = {key: teacher[key] for key in teacher if key not in _NOT_IN_FINGERPRINT}
    content = json.dumps([settings, str(config.trainer.precision)], sort_keys=True)
    return fingerprint_checkpoint(config.teacher.restore_from_path, content)
