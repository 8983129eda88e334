"""Samples of the formats that this package renders, as a dataset of NeMo's."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_chat_dataset import (
    GPTSFTChatDataset,
)
from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_dataset import GPTSFTDataset

from nemo_kd.chat import Renderer, read_conversation, template_of
from nemo_kd.config import DataConfig


def renderer_of(data: DataConfig, tokenizer: Any) -> Renderer | None:
    """What makes the samples of `data`; None if NeMo's own dataset does.

    Args:
        data: The settings, with the format of the files.
        tokenizer: NeMo's.

    Raises:
        ValueError: The tokenizer is none of Hugging Face's, or there is no chat template.
    """
    if not data.is_rendered:
        return None
    own = getattr(tokenizer, "tokenizer", None)
    is_plain = data.format == "prompt_completion" and not getattr(own, "chat_template", None)
    return Renderer(
        own,
        max_tokens=data.max_seq_length + 1,  # the last one is only predicted
        template=None
        if is_plain and not data.chat_template
        else template_of(own, data.chat_template),
        template_kwargs=data.chat_template_kwargs,
        train_on=data.train_on,
        add_eos=data.add_eos,
    )


class RenderedDataset(GPTSFTChatDataset):
    """NeMo's chat dataset with samples of a `Renderer`: the same items, and the same batches."""

    def __init__(
        self, path: str, tokenizer: Any, renderer: Renderer, kind: str, **nemo_settings: Any
    ) -> None:
        self.renderer, self.kind = renderer, kind
        super().__init__(path, tokenizer, **nemo_settings)

    def _build_samples_mapping(self) -> None:
        """Without the tokens of NeMo's chat format, which the base class prepares here."""
        GPTSFTDataset._build_samples_mapping(self)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return dict(super().__getitem__(index))
        except ValueError as error:
            raise ValueError(f"{self.file_path}, line {index % len(self) + 1}: {error}") from error

    def _process_example(self, example: dict[str, Any]) -> dict[str, Any]:
        conversation, _ = read_conversation(example, self.kind)
        sample = self.renderer(conversation)
        tokens = torch.from_numpy(sample.tokens)
        return {
            "input_ids": tokens,
            "mask": torch.from_numpy(sample.mask.astype(np.bool_)),
            "context_ids": tokens[: sample.context_length],
            "answer_ids": tokens[sample.context_length :],
            "metadata": {},
            "is_truncated": sample.is_truncated,
        }
