"""A cache in the place of NeMo's SFT jsonl: its batches, and the teacher's rows beside them."""

import json
from typing import Any

import torch
import xxhash
from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_dataset import GPTSFTDataset
from nemo.collections.nlp.data.language_modeling.text_memmap_dataset import OnlineSampleMapping
from torch import Tensor

from nemo_kd.cache import Sample, TopKCache
from nemo_kd.loss import KDLossConfig


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
        self.samples_mapping = (
            None
            if self.max_num_samples is None
            else OnlineSampleMapping(
                dataset_size=len(self.cache), num_samples=self.max_num_samples, seed=self.seed
            )
        )

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
            "topk_ids": torch.from_numpy(example["topk_ids"]),
            "topk_log_probs": self._untempered(torch.from_numpy(example["topk_log_probs"])),
            "tail_log_probs": torch.from_numpy(example["tail_log_probs"]),
        }

    def _build_loss_mask(self, processed_example: dict[str, Any]) -> list[int]:
        mask: list[int] = processed_example["loss_mask"].tolist()
        return mask

    def collate_fn(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        processed: dict[str, Any] = super().collate_fn(batch)
        num_samples, length = processed["tokens"].shape
        num_entries = max(1, *(item["topk_ids"].shape[1] for item in batch))
        ids = torch.full((num_samples, length, num_entries), -1, dtype=torch.int32)
        log_probs = torch.full((num_samples, length, num_entries), -torch.inf)
        tails = torch.full((num_samples, length), -torch.inf)
        for index, item in enumerate(batch):
            positions = torch.from_numpy(item["loss_mask"]).nonzero()[:, 0] - 1
            kept = item["topk_ids"].shape[1]
            ids[index, positions, :kept] = item["topk_ids"]
            log_probs[index, positions, :kept] = item["topk_log_probs"]
            tails[index, positions] = item["tail_log_probs"]
        return processed | {
            "topk_ids": ids,
            "topk_log_probs": log_probs,
            "tail_log_probs": tails,
        }

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


class _AsDicts:
    """The cache's samples as NeMo's dataset takes them: dicts that it may add a key to."""

    def __init__(self, cache: TopKCache) -> None:
        self._cache = cache

    def __len__(self) -> int:
        return len(self._cache)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._cache[index]._asdict()
