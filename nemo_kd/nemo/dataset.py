"""A cache in the place of NeMo's SFT jsonl."""

from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_dataset import GPTSFTDataset
from nemo.collections.nlp.data.language_modeling.text_memmap_dataset import OnlineSampleMapping

from nemo_kd.student.dataset import CacheSamples


class GPTSFTKDDataset(CacheSamples, GPTSFTDataset):
    """NeMo's SFT dataset over a cache directory: see CacheSamples."""

    sample_mapping_class = OnlineSampleMapping
