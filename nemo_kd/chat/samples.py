"""Samples of SFT files for a host's datasets: their format, their lines, and rendered samples."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from nemo_kd.cache import SourceFile
from nemo_kd.cache.manifest import fingerprint_file
from nemo_kd.chat.files import as_jsonl, format_of, require
from nemo_kd.chat.formats import read_conversation
from nemo_kd.chat.render import Renderer, begin_token, template_of
from nemo_kd.config import DataConfig
from nemo_kd.process import say


def with_found_format(
    data: DataConfig, says: bool = True, optional: Sequence[str] = ()
) -> DataConfig:
    """`data` with the format of its files, which with "auto" is found by their first lines.

    Args:
        data: The settings.
        says: Whether to say what was found.
        optional: Keys that a line may lack.

    Raises:
        ValueError: A file is not there, or has no known format.
    """
    for path in data.file_names:
        require(path)
    if data.chat:
        return data.with_format("nemo_chat")
    if data.format != "auto":
        return data.with_format(data.format)
    found = format_of(data.file_names, data.keys, optional)
    if says and found != "prompt":
        say(f"{', '.join(data.file_names)}: the format is {found}, by the first line")
    return data.with_format(found)


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


def renderer_of(data: DataConfig, tokenizer: Any) -> Renderer | None:
    """What makes the samples of `data`; None if the host's own dataset does.

    Args:
        data: The settings, with the format of the files.
        tokenizer: The host's, which has a Hugging Face tokenizer as `tokenizer`.

    Raises:
        ValueError: The tokenizer is none of Hugging Face's, or there is no chat template.
    """
    if not data.is_rendered:
        return None
    own = getattr(tokenizer, "tokenizer", None)
    template = None
    has_template = data.chat_template or getattr(own, "chat_template", None)
    if has_template or data.format != "prompt_completion":  # whose samples may be plain texts
        template = template_of(own, data.chat_template)
    return Renderer(
        own,
        max_tokens=data.max_seq_length + 1,  # the last one is only predicted
        template=template,
        template_kwargs=data.chat_template_kwargs,
        train_on=data.train_on,
        add_eos=data.add_eos,
    )


def datasets_of(
    data: DataConfig,
    tokenizer: Any,
    sources: Sequence[SourceFile],
    classes: tuple[Any, Any, Any],
    **settings: Any,
) -> list[Any]:
    """Each file of `data` as a dataset of Megatron-Bridge's kind.

    Args:
        data: The settings, with the format of the files.
        tokenizer: The host's.
        sources: The files.
        classes: The host's, of plain samples, of NeMo's chats and of rendered samples.
        **settings: Of the datasets, beside those of `data`.
    """
    directory = index_directory(data.index_mapping_dir, sources)
    index = {"index_mapping_dir": directory, "memmap_workers": data.memmap_workers or 1}
    settings = data.host_settings | index | settings
    renderer = renderer_of(data, tokenizer)
    plain, chat, rendered = classes
    datasets: list[Any] = []
    for path in data.file_names:
        file = as_jsonl(path, directory)
        if renderer is not None:
            datasets.append(rendered(file, tokenizer, renderer, data.format, **settings))
            continue
        tokens, kind = data.chat_prompt_tokens, chat if data.chat else plain
        datasets.append(kind(file, tokenizer, special_tokens=tokens, **settings))
        name_line_in_errors(datasets[-1])
    return datasets


class RenderedSamples:
    """What makes a host's GPTSFTChatDataset take its samples from a `Renderer`.

    A host's dataset inherits from this class first and from its own GPTSFTChatDataset second, whose
    methods of these names are the same in every host. Items and batches have the host's keys.
    """

    file_path: str
    indexed_dataset: Any

    def __init__(
        self, path: str, tokenizer: Any, renderer: Renderer, kind: str, **host_settings: Any
    ) -> None:
        self.renderer, self.kind = renderer, kind
        super().__init__(path, tokenizer, **host_settings)  # type: ignore[call-arg]

    def _build_samples_mapping(self) -> None:
        """The order of the file: without the tokens of NeMo's chat format, prepared here."""
        self.samples_mapping = None

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            item: dict[str, Any] = super().__getitem__(index)  # type: ignore[misc]
            return item
        except ValueError as error:
            number = index % len(self.indexed_dataset) + 1
            raise ValueError(f"{self.file_path}, line {number}: {error}") from error

    def _process_example(self, example: dict[str, Any]) -> dict[str, Any]:
        conversation, _ = read_conversation(example, self.kind)
        sample = self.renderer(conversation)
        tokens = torch.from_numpy(sample.tokens)
        mask = torch.from_numpy(sample.mask.astype(np.bool_))
        return {
            "input_ids": tokens,
            "mask": mask,  # as NeMo names it
            "loss_mask": mask,  # as Megatron-Bridge does
            "context_ids": tokens[: sample.context_length],
            "answer_ids": tokens[sample.context_length :],
            "metadata": {},
            "is_truncated": sample.is_truncated,
        }


def warn_of_missing_begin(tokenizer: Any, datasets: list[Any]) -> None:
    """Warn, on rank 0, of datasets whose samples lack the model's begin token."""
    from transformers import PreTrainedTokenizerBase

    own = getattr(tokenizer, "tokenizer", None)
    if torch.distributed.get_rank() or not isinstance(own, PreTrainedTokenizerBase):
        return
    begin = begin_token(own)
    for dataset in datasets:
        if begin and list(dataset[0]["input_ids"][:1]) != [own.bos_token_id]:
            print(
                f"warning: {dataset.file_path}: its samples lack {begin}, which the model expects "
                "before each text, and without which its distributions are others: dump with "
                "data.add_bos=true, or begin system_turn_start of a chat with it",
                file=sys.stderr,
            )
