"""Packed sequences out of a cache: several samples in one sequence, with their teacher rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from nemo_kd.loss import KDLossConfig
from nemo_kd.student.dataset import CacheSamples, samples_mapping
from nemo_kd.student.rows import Rows, collate_rows

# First fit takes time by the square of its samples, so that they are packed in windows. Windows of
# this size fill packs to 98% in seconds for a million samples: benchmarks/scale.py.
_SAMPLES_PER_PACKING = 512
PACK_KEYS = ("pack_bounds", "pack_ends")


class PackedCacheSamples:
    """What makes a host's GPTSFTPackedDataset pack a cache's samples, up to max_seq_length.

    A host's dataset inherits from this class first and from its own GPTSFTPackedDataset second,
    whose methods of these names are the same in every host. The samples are shuffled by the seed
    and packed by first fit when the dataset is made, which reads only their lengths. A batch is
    that of the host, with the rows of CacheSamples at the tokens they are for.

    Args:
        file_path: The cache directory.
        tokenizer: The student's tokenizer.
        kd_config: The objective that the rows are for.
        reads_rows: As CacheSamples'.
        context_parallel_size: If over 1, each sample is padded as NeMo's
            prepare_packed_ft_dataset.py pads it, so that it divides among the ranks.
        **host_settings: GPTSFTPackedDataset's.

    Raises:
        ValueError: as CacheSamples.
    """

    samples_class: type[CacheSamples]  # of the host: its dataset of samples that are not packed
    file_path: str
    tokenizer: Any
    max_seq_length: int
    seed: int

    def __init__(
        self,
        file_path: str,
        tokenizer: Any,
        *,
        kd_config: KDLossConfig,
        reads_rows: bool = True,
        context_parallel_size: int = 1,
        **host_settings: Any,
    ) -> None:
        self.kd_config, self.reads_rows = kd_config, reads_rows
        self.context_parallel_size = context_parallel_size
        super().__init__(file_path, tokenizer, **host_settings)  # type: ignore[call-arg]

    def _load_dataset(self) -> None:
        """Packs the cache's samples, where the host's unpickles a .npy of packs."""
        self.samples = self.samples_class(
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
        self.samples_mapping = samples_mapping(self, self.samples_class.sample_mapping_class)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.samples_mapping is not None:
            index, _, _ = self.samples_mapping[index]
        input_ids: list[int] = []
        loss_mask: list[int] = []  # at a token, whether the next one is supervised
        boundaries, num_tokens = [0], []
        rows: list[Rows] = []
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
        if index < 0:  # a host fills a batch up with sample -1
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
        processed: dict[str, Any] = super().collate_fn(batch)  # type: ignore[misc]
        # Bridge leaves out what an end token predicts, which a chat may have in its turns.
        length, masks = (
            processed["tokens"].shape[1],
            [self._build_loss_mask(item) for item in batch],
        )
        mask = torch.tensor(np.stack([np.pad(own, (0, length - len(own))) for own in masks]))
        processed["loss_mask"] = mask.to(processed["loss_mask"].dtype)
        if "cu_seqlens_unpadded" in processed:
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


def bounds_of_packs(batch: list[dict[str, Any]], length: int) -> dict[str, Tensor]:
    """Where the samples of each pack end: PACK_KEYS, int32 [B, n].

    Bridge has this under other names in every release.

    Args:
        batch: Items of PackedCacheSamples.
        length: S, of the collated batch.

    Returns:
        pack_bounds, with the padding of each sample, and pack_ends, of the tokens alone: 0, the
        sums of the lengths, the end of what fills the pack up, and then -1.
    """
    bounds, ends = [], []
    for item in batch:
        each = [end - 1 - start for start, end in pairwise(item["seq_boundaries"])]
        filling = [length - sum(each)] if sum(each) < length else []
        # Where no sample is padded, what fills the pack up is one more sequence, as in the host.
        closing = filling if each == item["num_tokens"] else [0] * len(filling)
        bounds.append([0, *accumulate(each + filling)])
        ends.append([0, *accumulate(item["num_tokens"] + closing)])
    width = max(map(len, bounds))
    filled = ([[*own, *[-1] * (width - len(own))] for own in rows] for rows in (bounds, ends))
    return {
        name: torch.tensor(rows, dtype=torch.int32)
        for name, rows in zip(PACK_KEYS, filled, strict=True)
    }


def attention_of_packs(batch: Mapping[str, Tensor], device: torch.device) -> PackedSeqParams:
    """What Megatron's attention asks for, so that no sample of a pack sees another.

    Args:
        batch: Has PACK_KEYS of one pack, [1, n], on the host.
        device: Of the attention.
    """
    bounds, ends = (batch[name][0] for name in PACK_KEYS)
    longest, is_padded = int(bounds.diff().max()), not torch.equal(bounds, ends)
    bounds, ends = (each[each >= 0].to(device, non_blocking=True) for each in (bounds, ends))
    # Told of padding, Transformer Engine takes a slower kernel.
    padded = {"cu_seqlens_q_padded": bounds, "cu_seqlens_kv_padded": bounds} if is_padded else {}
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        **padded,
    )


def pack_samples(num_inputs: Sequence[int], pack_size: int, seed: int) -> list[list[int]]:
    """The samples' numbers, shuffled by the seed, in packs of at most `pack_size` inputs.

    Each sample goes to the first pack that has room for it, as by the hosts' `first_fit`.

    Args:
        num_inputs: Of each sample, [samples].
    """
    order = np.random.default_rng(seed).permutation(len(num_inputs))
    packs: list[list[int]] = []
    for start in range(0, len(order), _SAMPLES_PER_PACKING):
        window: list[list[int]] = []
        rooms: list[int] = []
        for sample in order[start : start + _SAMPLES_PER_PACKING].tolist():
            length = int(num_inputs[sample])
            number = next((i for i, room in enumerate(rooms) if length <= room), len(rooms))
            if number == len(rooms):
                rooms.append(pack_size)
                window.append([])
            rooms[number] -= length
            window[number].append(sample)
        packs += window
    return packs
