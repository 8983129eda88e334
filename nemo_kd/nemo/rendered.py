"""Samples that chat/ renders, as a dataset of NeMo's."""

from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_chat_dataset import (
    GPTSFTChatDataset,
)

from nemo_kd.chat.samples import RenderedSamples


class RenderedDataset(RenderedSamples, GPTSFTChatDataset):
    """NeMo's chat dataset with samples of a `Renderer`: see RenderedSamples."""
