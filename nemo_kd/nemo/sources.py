"""What the teacher run reads: jsonl, checked line by line; NeMo's samples; the teacher's files."""

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import ConcatDataset

from nemo_kd.cache import SourceFile
from nemo_kd.cache.manifest import fingerprint_file
from nemo_kd.config import DataConfig

_LAYOUT_KEYS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "sequence_parallel",
)


def check_source(path: str, data: DataConfig) -> SourceFile:
    """Read a jsonl once: each line a JSON object with the keys that the samples are made of.

    Raises:
        ValueError: It is not; names the file and the line.
    """
    if not os.path.isfile(path):
        raise ValueError(f"data.file_names: expected jsonl files, found no {path}")
    if not os.path.getsize(path):
        raise ValueError(f"{path}: expected samples, found an empty file")
    with open(path, "rb") as lines:
        blank = 0
        for number, line in enumerate(lines, 1):
            if not line.strip():
                blank = blank or number
                continue
            if blank:
                raise ValueError(f"{path}, line {blank}: expected a JSON object, got a blank line")
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
            missing = [
                key for key in data.keys if not isinstance(record, dict) or key not in record
            ]
            if missing:
                raise ValueError(
                    f"{path}, line {number}: expected the keys {', '.join(data.keys)}, "
                    f"found no {', '.join(missing)}; mend the line, or set data.prompt_template "
                    "and data.label_key to the file's keys"
                )
            if data.chat and (fault := fault_of_conversation(record)) is not None:
                raise ValueError(f"{path}, line {number}: {fault}")
    return fingerprint_file(path)


def fault_of_conversation(record: dict[str, Any]) -> str | None:
    """What NeMo's chat dataset would fail at, in the middle of the run."""
    turns, masked, kind = record["conversations"], record.get("mask", "User"), record.get("type")
    if not isinstance(record["system"], str):
        return f"expected a text as system, got {record['system']!r}"
    if kind not in (None, "VALUE_TO_TEXT", "TEXT_TO_VALUE"):
        return f"expected a type of VALUE_TO_TEXT or TEXT_TO_VALUE, or none, got {kind!r}"
    if not isinstance(turns, list) or not turns:
        return f"expected conversations to be a list of turns, got {turns!r:.60}"
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not all(
            isinstance(turn.get(key), str) for key in ("from", "value")
        ):
            return f"turn {number}: expected texts as from and value, got {turn!r:.60}"
        if kind is not None and not isinstance(turn.get("label"), str | None):
            return f"turn {number}: expected a text or null as label, got {turn['label']!r}"
    speakers = [turn["from"] for turn in turns]
    if not isinstance(masked, str) or not set(masked.split(",")) <= set(speakers):
        return (
            f"expected mask, the speakers that are not learnt from (default User), to name some of "
            f"{', '.join(sorted(set(speakers)))}, separated by commas, got {masked!r}"
        )
    # NeMo never learns from the first turn, but from the start of every masked one after the second
    # (TEXT_TO_VALUE: the first), and from what follows the last turn if that one is not masked.
    if len(turns) < (2 if kind == "TEXT_TO_VALUE" else 3) and speakers[-1] in masked:
        return f"expected a turn to learn from, but mask {masked!r} leaves none"
    return None


def build_samples(model: Any, data: DataConfig, sources: list[SourceFile]) -> ConcatDataset[Any]:
    """The samples of all files in their order, by NeMo's own dataset."""
    if data.index_mapping_dir is None:
        # NeMo keeps an index of the lines and never looks whether the file changed since.
        content = xxhash.xxh3_64_hexdigest("".join(source.xxh3_128 for source in sources).encode())
        index_dir = os.path.join(tempfile.gettempdir(), f"nemo-kd-{os.getuid()}-{content}")
        os.makedirs(index_dir, mode=0o700, exist_ok=True)
        if os.stat(index_dir).st_uid != os.getuid():  # NeMo unpickles what lies there
            raise ValueError(f"{index_dir} is another user's; set data.index_mapping_dir")
    else:
        index_dir = data.index_mapping_dir
    settings = OmegaConf.create(asdict(data) | {"index_mapping_dir": index_dir})
    datasets = model._build_dataset(settings, is_train=False)
    for dataset in datasets:
        dataset.is_test = False  # which would take a missing label for an empty one
    return ConcatDataset(datasets)


def cut_sample(item: dict[str, Any], dataset: Any) -> tuple[Any, Any, int]:
    """tokens int32 [T], loss mask uint8 [T] and context length, as NeMo's collate cuts them."""
    longest = dataset.max_seq_length
    # GPTSFTChatDataset computes its mask with the tokens, GPTSFTDataset when it collates.
    mask = item["mask"] if "mask" in item else dataset._build_loss_mask(item)
    tokens = np.asarray(item["input_ids"], dtype=np.int32)[: longest + 1]
    loss_mask = np.asarray(mask).astype(np.uint8)[: longest + 1]
    loss_mask[:1] = 0  # nothing predicts the first token
    return tokens, loss_mask, min(len(item["context_ids"]), longest)


def fingerprint_teacher(config: DictConfig) -> str:
    """Hash of the checkpoint, and of all that shapes its logits but the parallel layout.

    Of a file its size and blocks spaced evenly: 700 GB take no longer than 1 GB.
    """
    block, num_blocks = 1 << 16, 64
    path = Path(config.teacher.restore_from_path)
    settings: Any = OmegaConf.to_container(config.teacher, resolve=True)
    for key in ("restore_from_path", *_LAYOUT_KEYS):
        settings.pop(key, None)
    digest = xxhash.xxh3_128(
        json.dumps([settings, str(config.trainer.precision)], sort_keys=True).encode()
    )
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        size = file.stat().st_size
        digest.update(str(size).encode())
        with open(file, "rb") as stream:
            for number in range(num_blocks):
                stream.seek(number * max(0, size - block) // (num_blocks - 1))
                digest.update(stream.read(block))
    return digest.hexdigest()
