"""A cache in the place of a host's SFT jsonl: its batches, and the teacher's rows beside them."""

from __future__ import annotations

from typing import Any

from nemo_kd.cache import TopKCache
from nemo_kd.loss import KDLossConfig
from nemo_kd.student.fit import check_fits
from nemo_kd.student.rows import collate_rows, sample_rows
from nemo_kd.student.vocabulary import with_student_ids


class CacheSamples:
    """What makes a host's GPTSFTDataset read a cache directory instead of a jsonl file.

    A host's dataset inherits from this class first and from its own GPTSFTDataset second, whose
    methods of these names are the same in every host. A batch has the host's keys with the host's
    values, and the teacher's rows as `collate_rows` makes them; `scatter_rows` puts them beside the
    tokens. The row at position s is the teacher's distribution for labels[s], tokens[s + 1] of the
    sample.

    Args:
        file_path: The cache directory.
        tokenizer: The student's tokenizer.
        kd_config: The objective that the rows are for.
        reads_rows: Whether batches have rows: false on a pipeline stage that has no loss.
        **host_settings: GPTSFTDataset's; those that shape the tokens are the cache's own.

    Raises:
        ValueError: The cache does not fit the tokenizer, the sequence length or the objective.
    """

    file_path: str
    tokenizer: Any
    max_seq_length: int
    sample_mapping_class: type  # of the host: the order of the samples, epoch by epoch, by the seed

    def __init__(
        self,
        file_path: str,
        tokenizer: Any,
        *,
        kd_config: KDLossConfig,
        reads_rows: bool = True,
        **host_settings: Any,
    ) -> None:
        self.kd_config, self.reads_rows = kd_config, reads_rows
        super().__init__(file_path, tokenizer, **host_settings)  # type: ignore[call-arg]

    def _load_dataset(self) -> None:
        """Opens the cache, where the host's opens the jsonl."""
        self.cache = self.indexed_dataset = TopKCache.open(self.file_path)
        self.student_ids = check_fits(
            self.cache,
            self.kd_config,
            tokenizer=self.tokenizer,
            max_seq_length=self.max_seq_length,
        )

    def _maybe_validate_prompt_template(self) -> None:
        """Does nothing: the cache has the tokens already."""

    def _build_samples_mapping(self) -> None:
        """The host's order, by `seed`: NeMo's own leaves it at 1 whatever data.train_ds.seed is."""
        self.samples_mapping = samples_mapping(self, self.sample_mapping_class)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Makes a sample of the cache what the host makes of a line of the jsonl."""
        if self.samples_mapping is not None:
            index, _, _ = self.samples_mapping[index]
        sample, manifest = self.cache.read(index, self.reads_rows), self.cache.manifest
        if self.student_ids is not None:
            sample = with_student_ids(sample, self.student_ids)
        tokens = sample.tokens.tolist()
        context, answer = tokens[: sample.context_length], tokens[sample.context_length :]
        settings = manifest.dataset
        if settings["add_eos"] and not settings["chat"] and answer[-1:] == [self.tokenizer.eos_id]:
            del answer[-1]  # the host's answers stop before the end token
        return {
            "input_ids": tokens,
            "answer_start_idx": sample.context_length,
            "context_ids": context,
            "context_length": sample.context_length,
            "answer_ids": answer,
            "metadata": {},
            "token_count": len(tokens),
            "loss_mask": sample.loss_mask,
            "rows": sample_rows(sample, self.kd_config, manifest.selection["temperature"]),
        }

    def _build_loss_mask(self, processed_example: dict[str, Any]) -> list[int]:
        mask: list[int] = processed_example["loss_mask"].tolist()
        return mask

    def collate_fn(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        processed: dict[str, Any] = super().collate_fn(batch)  # type: ignore[misc]
        return processed | collate_rows([[item["rows"]] for item in batch])


def samples_mapping(dataset: Any, mapping_class: type) -> Any:
    """The order of max_num_samples out of `dataset`, epoch by epoch, by the dataset's seed."""
    if dataset.max_num_samples is None:
        return None
    return mapping_class(len(dataset.indexed_dataset), dataset.max_num_samples, seed=dataset.seed)


def padding_multiple(model: Any) -> int:
    """What a host pads a batch's length to a multiple of, by the parallel sizes of its config."""
    multiple = 16
    if model.get("sequence_parallel", False):
        multiple = 8 * model.get("tensor_model_parallel_size", 1)
    return int(multiple * model.get("context_parallel_size", 1))
