"""A cache in the place of NeMo's SFT jsonl: its batches, and the teacher's rows beside them."""

import json
from collections import defaultdict
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
import xxhash
from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_dataset import (
    GPTSFTDataset,
    GPTSFTPackedDataset,
)
from nemo.collections.nlp.data.language_modeling.text_memmap_dataset import OnlineSampleMapping
from nemo.utils.sequence_packing_utils import first_fit
from torch import Tensor

from nemo_kd.cache import Sample, TopKCache
from nemo_kd.loss import KDLossConfig
from nemo_kd.student.rows import Rows, collate_rows


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a hash of a NeMo tokenizer's vocabulary and end token.

    Equal for tokenizers that give each id the same meaning, wherever their files lie.
    """
    tokens = tokenizer.ids_to_tokens(list(range(tokenizer.vocab_size)))
    content = json.dumps([tokens, tokenizer.eos_id], default=str)
    return xxhash.xxh3_128_hexdigest(content.encode())


class GPTSFTKDDataset(GPTSFTDataset):
    """NeMo's SFT dataset over a cache directory instead of a jsonl file.

    A batch has NeMo's keys with NeMo's values, and with K the longest row of its samples:

        topk_ids         [B, S, K] int32    -1 where there is no entry
        topk_log_probs   [B, S, K] float32  -inf there
        tail_log_probs   [B, S]    float32  -inf where there is no row

    The row at s is the teacher's distribution for labels[s], tokens[s + 1] of the sample.

    Args:
        file_path: The cache directory.
        tokenizer: The student's tokenizer.
        kd_config: The objective that the rows are for.
        **nemo_settings: GPTSFTDataset's; those that shape the tokens are the cache's own.

    Raises:
        ValueError: The cache does not fit the tokenizer, the sequence length or the objective.
    """

    def __init__(
        self, file_path: str, tokenizer: Any, *, kd_config: KDLossConfig, **nemo_settings: Any
    ) -> None:
        self.kd_config = kd_config
        super().__init__(file_path, tokenizer, **nemo_settings)

    def _load_dataset(self) -> None:  # NeMo opens the jsonl here
        self.cache = TopKCache.open(self.file_path)
        self._check_fits()
        self.indexed_dataset = _AsDicts(self.cache)

    def _maybe_validate_prompt_template(self) -> None:
        """The tokens are there already."""

    def _build_samples_mapping(self) -> None:
        # NeMo builds the same mapping, but leaves its seed at 1 whatever data.train_ds.seed is.
        self.samples_mapping = _samples_mapping(self)

    def _process_example(self, example: dict[str, Any]) -> dict[str, Any]:
        tokens = example["tokens"].tolist()
        context_length = example["context_length"]
        answer = tokens[context_length:]
        settings = self.cache.manifest.dataset
        if settings["add_eos"] and not settings["chat"] and answer[-1:] == [self.tokenizer.eos_id]:
            answer = answer[:-1]  # NeMo's answers end before it
        return {
            "input_ids": tokens,
            "answer_start_idx": context_length,
            "context_ids": tokens[:context_length],
            "context_length": context_length,
            "answer_ids": answer,
            "metadata": {key: example[key] for key in example if key not in Sample._fields},
            "token_count": len(tokens),
            "loss_mask": example["loss_mask"],
            "rows": Rows(
                torch.from_numpy(example["loss_mask"]).nonzero()[:, 0] - 1,
                torch.from_numpy(example["topk_ids"]),
                self._untempered(torch.from_numpy(example["topk_log_probs"])),
                torch.from_numpy(example["tail_log_probs"]),
            ),
        }

    def _build_loss_mask(self, processed_example: dict[str, Any]) -> list[int]:
        mask: list[int] = processed_example["loss_mask"].tolist()
        return mask

    def collate_fn(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        processed: dict[str, Any] = super().collate_fn(batch)
        length = processed["tokens"].shape[1]
        return processed | collate_rows([[item["rows"]] for item in batch], length)

    def _untempered(self, log_probs: Tensor) -> Tensor:
        """For renormalize, which tempers the teacher itself, log-probs at temperature 1.

        log p = T_d * (log p at T_d) + a constant of the row, which that softmax cancels; this one
        keeps the row's stored mass.
        """
        dumped_at = self.cache.manifest.selection["temperature"]
        if self.kd_config.tail != "renormalize" or dumped_at == 1:
            return log_probs
        scaled = log_probs * dumped_at
        return scaled + log_probs.logsumexp(-1, True) - scaled.logsumexp(-1, True)

    def _check_fits(self) -> None:
        manifest = self.cache.manifest
        path = self.cache.path
        fingerprint = tokenizer_fingerprint(self.tokenizer)
        if (manifest.vocab_size, manifest.tokenizer_fingerprint) != (
            self.tokenizer.vocab_size,
            fingerprint,
        ):
            raise ValueError(
                f"{path} was dumped with another tokenizer (vocabulary {manifest.vocab_size}, "
                f"fingerprint {manifest.tokenizer_fingerprint}) than the student's (vocabulary "
                f"{self.tokenizer.vocab_size}, fingerprint {fingerprint}); dump again with a "
                "teacher that shares the student's tokenizer"
            )
        longest = manifest.dataset["max_seq_length"]
        if longest > self.max_seq_length:
            raise ValueError(
                f"{path} was dumped with data.max_seq_length={longest}, this run has "
                f"max_seq_length={self.max_seq_length}; set it to {longest} or more, or dump again"
            )
        dumped_at = manifest.selection["temperature"]
        config = self.kd_config
        if manifest.selection["kind"] == "sample" and config.tail != "drop":
            raise ValueError(
                f"{path} holds sampled rows (selection.kind=sample), whose entries stand for the "
                f"whole distribution: expected knowledge_distillation.tail=drop, got {config.tail}"
            )
        if config.tail != "renormalize" and config.temperature != dumped_at:
            raise ValueError(
                f"{path} was dumped with selection.temperature={dumped_at}; "
                f"knowledge_distillation.tail={config.tail} takes the teacher as stored, so "
                f"expected knowledge_distillation.temperature={dumped_at}, got "
                f"{config.temperature}; dump again at that temperature, or set tail=renormalize"
            )


# NeMo's first_fit takes time by the square of the samples. Windows of so many fill packs to 98% and
# take 4 to 9 s a million samples.
_SAMPLES_PER_PACKING = 512


class GPTSFTKDPackedDataset(GPTSFTPackedDataset):
    """NeMo's packed SFT dataset over a cache directory: packs of samples, up to max_seq_length.

    The samples are shuffled by the seed and packed by NeMo's first_fit, its first_fit_shuffle,
    when the dataset is made: of the cache that reads the lengths alone. A batch is
    GPTSFTPackedDataset's, with GPTSFTKDDataset's rows at the tokens they are for.

    Args:
        file_path: The cache directory.
        tokenizer: The student's tokenizer.
        kd_config: The objective that the rows are for.
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
        context_parallel_size: int = 1,
        **nemo_settings: Any,
    ) -> None:
        self.kd_config = kd_config
        self.context_parallel_size = context_parallel_size
        super().__init__(file_path, tokenizer, **nemo_settings)

    def _load_dataset(self) -> None:  # NeMo unpickles a .npy here
        self.samples = GPTSFTKDDataset(
            self.file_path,
            self.tokenizer,
            kd_config=self.kd_config,
            max_seq_length=self.max_seq_length,
        )
        num_inputs = self._num_inputs(self.samples.cache.num_tokens())
        self.indexed_dataset = _Packs(num_inputs, self.max_seq_length, self.seed)

    def _num_inputs(self, num_tokens: Any) -> Any:
        """How many inputs a sample of so many tokens has in its pack."""
        if self.context_parallel_size == 1:
            return num_tokens - 1  # the last one is a label alone
        multiple = max(16, 2 * self.context_parallel_size)
        return np.minimum(-(-num_tokens // multiple) * multiple, self.max_seq_length)

    def _maybe_validate_prompt_template(self) -> None:
        """The tokens are there already."""

    def _build_samples_mapping(self) -> None:
        self.samples_mapping = _samples_mapping(self)

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
            start = boundaries[-1] - len(rows)  # among the inputs: each sample has one token more
            rows.append(sample["rows"]._replace(positions=sample["rows"].positions + start))
            input_ids += tokens + [self.tokenizer.eos_id] * num_padding
            loss_mask += [*sample["loss_mask"][1:].tolist(), *[0] * (num_padding + 1)]
            boundaries.append(len(input_ids))
            num_tokens.append(min(len(tokens), num_inputs))
        if index < 0:  # NeMo's padding of a batch
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
        length = processed["tokens"].shape[1]
        return processed | collate_rows([item["rows"] for item in batch], length)


class _Packs:
    """Packs of samples: `packs[i]` is a list of the samples' numbers."""

    def __init__(self, num_inputs: Any, pack_size: int, seed: int) -> None:
        order = np.random.default_rng(seed).permutation(len(num_inputs))
        packed: list[int] = []
        self._ends = [0]
        for start in range(0, len(order), _SAMPLES_PER_PACKING):
            window = order[start : start + _SAMPLES_PER_PACKING]
            lengths = num_inputs[window].tolist()
            of_length: defaultdict[int, list[int]] = defaultdict(list)
            for number, length in zip(reversed(window.tolist()), reversed(lengths), strict=True):
                of_length[length].append(number)
            for pack in first_fit(lengths, pack_size):
                packed += [of_length[length].pop() for length in pack]
                self._ends.append(len(packed))
        self._packed = np.array(packed)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> list[int]:
        number = index + len(self) if index < 0 else index
        samples: list[int] = self._packed[self._ends[number] : self._ends[number + 1]].tolist()
        return samples


def _samples_mapping(dataset: Any) -> OnlineSampleMapping | None:
    """NeMo's order of max_num_samples out of `dataset`, epoch by epoch, by the dataset's seed."""
    if dataset.max_num_samples is None:
        return None
    return OnlineSampleMapping(
        dataset_size=len(dataset.indexed_dataset),
        num_samples=dataset.max_num_samples,
        seed=dataset.seed,
    )


class _AsDicts:
    """The cache's samples as NeMo's dataset takes them: dicts that it may add a key to."""

    def __init__(self, cache: TopKCache) -> None:
        self._cache = cache

    def __len__(self) -> int:
        return len(self._cache)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._cache[index]._asdict()
