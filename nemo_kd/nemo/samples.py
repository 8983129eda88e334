"""Samples of files without a model, for `nemo_kd.compare`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_chat_dataset import (
    GPTSFTChatDataset,
)
from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_dataset import GPTSFTDataset

from nemo_kd.cache import SourceFile
from nemo_kd.chat.samples import datasets_of
from nemo_kd.config import DataConfig
from nemo_kd.nemo.nemo_file import read_tokenizer
from nemo_kd.nemo.rendered import RenderedDataset

__all__ = ["file_datasets", "read_tokenizer"]


def file_datasets(data: DataConfig, tokenizer: Any, sources: Sequence[SourceFile]) -> list[Any]:
    """Each file of `data`, whose fingerprints are `sources`, as a dataset."""
    classes = (GPTSFTDataset, GPTSFTChatDataset, RenderedDataset)
    return datasets_of(data, tokenizer, sources, classes)
