"""Packed sequences out of a cache: several samples in one sequence, with their teacher rows."""

from collections import defaultdict, deque
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_dataset import (
    GPTSFTPackedDataset,
)
from nemo.utils.sequence_packing_utils import first_fit

from nemo_kd.loss import KDLossConfig
from nemo_kd.nemo.dataset import GPTSFTKDDataset
from nemo_kd.student.dataset import samples_mapping
from nemo_kd.student.rows import collate_rows

# NeMo's first_fit takes time by the square of its samples, so that they are packed in windows.
# Windows of this size fill packs to 98% in seconds for a million samples: benchmarks/scale.py.
_SAMPLES_PER_PACKING = 512


class GPTSFTKDPackedDataset(GPTSFTPackedDataset):
    """NeMo's packed SFT dataset over a cache directory: packs of samples, up to max_seq_length.

    The samples are shuffled by the seed and packed by NeMo's first_fit when the dataset is made,
    which reads only their lengths. A batch is GPTSFTPackedDataset's, with GPTSFTKDDataset's rows at
    the tokens they are for.

    Args:
        file_path: The cache directory.
        tokenizer: The student's tokenizer.
        kd_config: The objective that the rows are for.
        reads_rows: As GPTSFTKDDataset's.
        context_parallel_size: If over 1, each sample is padded as NeMo's
            prepare_packed_ft_dataset.py pads it, so that it divides among the ranks.
        **nemo_settings: GPTSFTPackedDataset's.

    Raises:
        ValueError: as GPTSFTKDDataset.
    """

    def __init__(
        self,
        file_path: str,
        tokenizer: Any,
        *,
        kd_config: KDLossConfig,
        reads_rows: bool = True,
        context_parallel_size: int = 1,
        **nemo_settings: Any,
    ) -> None:
        self.kd_config, self.reads_rows = kd_config, reads_rows
        self.context_parallel_size = context_parallel_size
        super().__init__(file_path, tokenizer, **nemo_settings)

    def _load_dataset(self) -> None:
        """Packs the cache's samples, where NeMo's unpickles a .npy of packs."""
        self.samples = GPTSFTKDDataset(
            self.file_path,
            self.tokenizer,
            kd_config=self.kd_config,
            reads_rows=self.reads_rows,
            max_seq_length=self.max_seq_length,
        )
        num_inputs = self._num_inputs(self.samples.cache.num_tokens())
        self.indexed_dataset = pack_samples(num_inputs, self.max_seq_length, self.seed)

    def _num_inputs(self, num_tokens: Any) -> Any:
        """How many inputs a sample of so many tokens has in its pack."""
        if self.context_parallel_size == 1:
            return num_tokens - 1  # the last token is only a label
        multiple = max(16, 2 * self.context_parallel_size)
        return np.minimum(-(-num_tokens // multiple) * multiple, self.max_seq_length)

    def _maybe_validate_prompt_template(self) -> None:
        """Does nothing: the cache has the tokens already."""

    def _build_samples_mapping(self) -> None:
        self.samples_mapping = samples_mapping(self, GPTSFTKDDataset.sample_mapping_class)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.samples_mapping is not None:
            index, _, _ = self.samples_mapping[index]
        input_ids: list[int] = []
        loss_mask: list[int] = []  # at a token, whether the next one is supervised
        boundaries, num_tokens, rows = [0], [], []
        for number in self.indexed_dataset[index]:
            sample = self.samples[number]
            tokens = sample["input_ids"]
            num_inputs = int(self._num_inputs(len(tokens)))
            num_padding = num_inputs + 1 - len(tokens)
            # Among the pack's inputs, of which each sample before has one less than tokens.
            start = boundaries[-1] - len(rows)
            rows.append(sample["rows"]._replace(positions=sample["rows"].positions + start))
            input_ids += tokens + [self.tokenizer.eos_id] * num_padding
            loss_mask += [*sample["loss_mask"][1:].tolist(), *[0] * (num_padding + 1)]
            boundaries.append(len(input_ids))
            num_tokens.append(min(len(tokens), num_inputs))
        if index < 0:  # NeMo fills a batch up with sample -1
            loss_mask = [0] * len(loss_mask)
        return {
            "input_ids": input_ids,
            "seq_boundaries": boundaries,
            "loss_mask": loss_mask,
            "num_tokens": num_tokens,
            "rows": rows,
        }

    def _build_loss_mask(self, processed_example: dict[str, Any]) -> Any:
        # The cache's mask, whatever answer_only_loss is.
        mask, boundaries = processed_example["loss_mask"], processed_example["seq_boundaries"]
        return np.concatenate([mask[start : end - 1] for start, end in pairwise(boundaries)])

    def collate_fn(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        processed: dict[str, Any] = super().collate_fn(batch)
        if self.return_cu_seqlen:
            # NeMo ends a sequence at its first end token, which a chat has after every turn.
            unpadded = torch.full_like(processed["cu_seqlens"], -1)
            for index, item in enumerate(batch):
                ends = [0, *accumulate(item["num_tokens"])]
                num_ends = int((processed["cu_seqlens"][index] >= 0).sum())
                unpadded[index, :num_ends] = ends[-1]
                unpadded[index, : len(ends)] = torch.tensor(ends)
            processed["cu_seqlens_unpadded"] = unpadded
            processed["cu_seqlens_unpadded_argmin"] = unpadded.argmin(1, keepdim=True)
        return processed | collate_rows([item["rows"] for item in batch])


def pack_samples(num_inputs: Any, pack_size: int, seed: int) -> list[list[int]]:
    """The samples' numbers, shuffled by the seed, in packs of at most `pack_size` inputs.

    Args:
        num_inputs: Of each sample, [samples].
    """
    order = np.random.default_rng(seed).permutation(len(num_inputs))
    packs: list[list[int]] = []
    for start in range(0, len(order), _SAMPLES_PER_PACKING):
        window = order[start : start + _SAMPLES_PER_PACKING].tolist()
        # first_fit packs lengths: each stands for the next of the window's samples of that length.
        lengths = [int(num_inputs[sample]) for sample in window]
        of_length: defaultdict[int, deque[int]] = defaultdict(deque)
        for sample, length in zip(window, lengths, strict=True):
            of_length[length].append(sample)
        for pack in first_fit(lengths, pack_size):
            packs.append([of_length[length].popleft() for length in pack])
    return packs
