"""A cache in the place of NeMo's SFT jsonl: its batches, and the teacher's rows beside them."""

from typing import Any

from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_dataset import GPTSFTDataset
from nemo.collections.nlp.data.language_modeling.text_memmap_dataset import OnlineSampleMapping

from nemo_kd.cache import Sample, TopKCache
from nemo_kd.cache.manifest import tokenizer_fingerprint
from nemo_kd.loss import KDLossConfig
from nemo_kd.student.fit import check_fits
from nemo_kd.student.rows import collate_rows, sample_rows


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
        check_fits(
            self.cache,
            self.kd_config,
            vocab_size=self.tokenizer.vocab_size,
            tokenizer_fingerprint=tokenizer_fingerprint(self.tokenizer),
            max_seq_length=self.max_seq_length,
        )
        self.indexed_dataset = _AsDicts(self.cache)

    def _maybe_validate_prompt_template(self) -> None:
        """The tokens are there already."""

    def _build_samples_mapping(self) -> None:
        # NeMo builds the same mapping, but leaves its seed at 1 whatever data.train_ds.seed is.
        self.samples_mapping = samples_mapping(self)

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
            "rows": sample_rows(
                Sample(**{name: example[name] for name in Sample._fields}),
                self.kd_config,
                self.cache.manifest.selection["temperature"],
            ),
        }

    def _build_loss_mask(self, processed_example: dict[str, Any]) -> list[int]:
        mask: list[int] = processed_example["loss_mask"].tolist()
        return mask

    def collate_fn(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        processed: dict[str, Any] = super().collate_fn(batch)
        length = processed["tokens"].shape[1]
        return processed | collate_rows([[item["rows"]] for item in batch], length)


def samples_mapping(dataset: Any) -> OnlineSampleMapping | None:
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
