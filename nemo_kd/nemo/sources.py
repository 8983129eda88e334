"""What the teacher run reads: jsonl files, NeMo's samples of them, and the teacher's files."""

import json
import os
import tempfile
from dataclasses import asdict
from typing import Any

import numpy as np
import xxhash
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import ConcatDataset

from nemo_kd.cache import SourceFile
from nemo_kd.cache.manifest import fingerprint_file
from nemo_kd.config import DataConfig
from nemo_kd.nemo.nemo_file import fingerprint_checkpoint, warn_of_missing_begin

# Keys of `teacher` that leave the logits as they are.
_NOT_IN_FINGERPRINT = (
    "restore_from_path",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "sequence_parallel",
)


def check_source(path: str, data: DataConfig) -> SourceFile:
    """Read a jsonl once; each line must be a JSON object with the keys of `data`'s samples.

    Raises:
        ValueError: A line is not, or there is none; names the file and the line.
    """
    if not os.path.isfile(path):
        raise ValueError(f"data.file_names: expected jsonl files, found no {path}")
    if not os.path.getsize(path):
        raise ValueError(f"{path}: expected samples, found an empty file")
    with open(path, "rb") as lines:
        blank = None  # the first of a row of blank lines, which only the end of a file may have
        for number, line in enumerate(lines, 1):
            if not line.strip():
                blank = blank or number
                continue
            fault = _fault_of_line(line, data)
            if blank:
                number, fault = blank, "expected a JSON object, got a blank line"
            if fault:
                raise ValueError(f"{path}, line {number}: {fault}")
    return fingerprint_file(path)


def _fault_of_line(line: bytes, data: DataConfig) -> str | None:
    try:
        record = json.loads(line)
    except ValueError as error:
        return f"not JSON: {error}"
    missing = [key for key in data.keys if not isinstance(record, dict) or key not in record]
    if missing:
        return (
            f"expected the keys {', '.join(data.keys)}, found no {', '.join(missing)}; mend the "
            "line, or set data.prompt_template and data.label_key to the file's keys"
        )
    return fault_of_conversation(record) if data.chat else None


def fault_of_conversation(record: dict[str, Any]) -> str | None:
    """Say what NeMo's chat dataset would fail at in the middle of the run; None if at nothing."""
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
    # NeMo never learns from the first turn. It learns from the start of each masked turn after the
    # second (TEXT_TO_VALUE: the first), and from the end of the last turn unless that is masked.
    if len(turns) < (2 if kind == "TEXT_TO_VALUE" else 3) and speakers[-1] in masked:
        return f"expected a turn to learn from, but mask {masked!r} leaves none"
    return None


def build_samples(model: Any, data: DataConfig, sources: list[SourceFile]) -> ConcatDataset[Any]:
    """The samples of all files in their order, by NeMo's own dataset."""
    if data.index_mapping_dir is None:
        # NeMo keeps an index of the lines, and uses it even if the file has changed since. In a
        # directory named by the content, an index is always that of the file.
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
        dataset.is_test = False  # when true, a missing label counts as an empty one
    warn_of_missing_begin(model.tokenizer, datasets)
    return ConcatDataset(datasets)


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
