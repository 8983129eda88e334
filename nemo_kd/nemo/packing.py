"""Packed sequences out of a cache: several samples in one sequence, with their teacher rows."""

from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_dataset import (
    GPTSFTPackedDataset,
)

from nemo_kd.nemo.dataset import GPTSFTKDDataset
from nemo_kd.student.packing import PackedCacheSamples


class GPTSFTKDPackedDataset(PackedCacheSamples, GPTSFTPackedDataset):
    """NeMo's packed SFT dataset over a cache directory: see PackedCacheSamples."""

    samples_class = GPTSFTKDDataset
