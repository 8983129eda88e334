"""What the teacher run reads: NeMo's samples of jsonl files, and the teacher's files."""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import ConcatDataset

from nemo_kd.cache import SourceFile
from nemo_kd.cache.manifest import fingerprint_file
from nemo_kd.chat import Renderer, as_jsonl, format_of
from nemo_kd.config import DataConfig
from nemo_kd.nemo.nemo_file import fingerprint_checkpoint, warn_of_missing_begin
from nemo_kd.nemo.rendered import RenderedDataset, renderer_of
from nemo_kd.process import rank, say

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
            OmegaConf.create(asdict(data) | nemo_settings(data) | settings), is_train=False
        )
        for dataset in datasets:
            dataset.is_test = False  # when true, a missing label counts as an empty one
            name_line_in_errors(dataset)
    warn_of_missing_begin(model.tokenizer, datasets)
    return ConcatDataset(datasets)


def with_found_format(data: DataConfig) -> DataConfig:
    """`data` with the format of its files, which with "auto" is found by their first lines.

    Raises:
        ValueError: A file is not there, or has no known format.
    """
    if data.chat:
        return data.with_format("nemo_chat")
    if data.format != "auto":
        return data.with_format(data.format)
    found = format_of(data.file_names, data.keys)
    if found != "prompt" and rank() == 0:
        say(f"{', '.join(data.file_names)}: the format is {found}, by the first line")
    return data.with_format(found)


def fingerprint_source(path: str) -> SourceFile:
    """Size and hash of a file, or of all files of a directory that Hugging Face datasets saved."""
    if not os.path.isdir(path):
        return fingerprint_file(path)
    files = [fingerprint_file(file) for file in sorted(Path(path).rglob("*")) if file.is_file()]
    content = "".join(f"{file.name}{file.xxh3_128}" for file in files)
    return SourceFile(
        name=os.path.basename(os.path.normpath(path)),
        size_bytes=sum(file.size_bytes for file in files),
        xxh3_128=xxhash.xxh3_128_hexdigest(content.encode()),
    )


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


def padding_multiple(model: DictConfig) -> int:
    """What NeMo's `_build_dataset` pads a batch's length to a multiple of."""
    multiple = 16
    if model.get("sequence_parallel", False):
        multiple = 8 * model.get("tensor_model_parallel_size", 1)
    return int(multiple * model.get("context_parallel_size", 1))


def nemo_settings(data: DataConfig) -> dict[str, Any]:
    """What NeMo's dataset of a jsonl must be given in another form, or asks for and never reads."""
    return {"prompt_template": data.escaped_template, "min_seq_length": 1}


def index_directory(given: str | None, sources: Sequence[SourceFile]) -> str:
    """Where NeMo keeps its index of the lines of files; `given` or the temporary directory.

    NeMo uses an index that is there even if the file has changed since. In a directory named by the
    content, an index is always that of the file.
    """
    content = xxhash.xxh3_64_hexdigest("".join(source.xxh3_128 for source in sources).encode())
    root = given or tempfile.gettempdir()
    path = os.path.join(root, f"nemo-kd-{os.getuid()}-{content}")
    os.makedirs(path, mode=0o700, exist_ok=True)
    if os.stat(path).st_uid != os.getuid():  # NeMo unpickles what lies there
        raise ValueError(f"{path} is another user's; set index_mapping_dir")
    return path


def name_line_in_errors(dataset: Any) -> None:
    """Make NeMo's dataset of a jsonl say which line it fails at."""
    process = dataset._process_example

    def named(example: dict[str, Any]) -> Any:
        try:
            return process(example)
        except Exception as error:  # NeMo's assertions, and whatever a tokenizer raises
            raise ValueError(
                f"{dataset.file_path}: NeMo's dataset fails at the line that begins "
                f"{json.dumps(example)[:80]}: {type(error).__name__}: {error}"
            ) from error

    dataset._process_example = named


def cut_sample(item: dict[str, Any], dataset: Any) -> tuple[Any, Any, int]:
    """Return tokens int32 [T], loss mask uint8 [T] and context length, cut as NeMo cuts them."""
    longest = dataset.max_seq_length
    # GPTSFTChatDataset computes its mask with the tokens, GPTSFTDataset when it collates.
    mask = item["mask"] if "mask" in item else dataset._build_loss_mask(item)
    tokens = np.asarray(item["input_ids"], dtype=np.int32)[: longest + 1]
    loss_mask = np.asarray(mask).astype(np.uint8)[: longest + 1]
    loss_mask[:1] = 0  # nothing predicts the first token
    return tokens, loss_mask, min(len(item["context_ids"]), longest)


def fingerprint_teacher(config: DictConfig) -> str:
    """Hash the checkpoint, and all settings that shape its logits."""
    teacher: Any = OmegaConf.to_container(config.teacher, resolve=True)
    settings = {key: teacher[key] for key in teacher if key not in _NOT_IN_FINGERPRINT}
    content = json.dumps([settings, str(config.trainer.precision)], sort_keys=True)
    return fingerprint_checkpoint(config.teacher.restore_from_path, content)
