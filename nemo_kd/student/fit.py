"""Whether a cache is one that this student, at this objective, can be trained on."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemo_kd.cache import TopKCache
from nemo_kd.cache.inspection import unsupervised
from nemo_kd.cache.layout import MANIFEST_NAME, Array
from nemo_kd.loss import KDLossConfig
from nemo_kd.process import say
from nemo_kd.student.vocabulary import check_lacking, student_ids


def check_there(paths: Iterable[str], key: str) -> None:
    """Raise a ValueError if there is no cache at one of `paths`, the values of `key`."""
    for path in paths:
        if not (Path(path) / MANIFEST_NAME).is_file():
            raise ValueError(f"{key}: expected cache directories, found none at {path}")


def check_caches(
    paths: Iterable[str], config: KDLossConfig, tokenizer: Any, max_seq_length: int
) -> list[int]:
    """Check each cache, say which tokens the student lacks, and return the numbers of samples.

    Raises:
        ValueError: One does not fit, as `check_fits` says.
    """
    sizes = []
    for path in paths:
        cache = TopKCache.open(path)
        ids = check_fits(cache, config, tokenizer=tokenizer, max_seq_length=max_seq_length)
        if line := check_lacking(cache, ids):
            say(line)
        sizes.append(len(cache))
    return sizes


def check_fits(
    cache: TopKCache, config: KDLossConfig, *, tokenizer: Any, max_seq_length: int
) -> Array | None:
    """Compare what shaped the cache with the student and the objective.

    Args:
        tokenizer: the student's, as NeMo's tokenizers are.
        max_seq_length: of this run, in tokens.

    Returns:
        The student's ids of the cache's, as `student_ids` has them.

    Raises:
        ValueError: The cache was made with a tokenizer that does not fit, longer sequences or
            another temperature, holds sampled rows and the tail is not drop, or has no supervised
            token; names both sides.
    """
    manifest = cache.manifest
    path = cache.path
    # Mostly one record is read: that of a shard with nothing to learn from is rare.
    if not any(cache.shard_record(i).num_supervised_tokens for i in range(cache.num_shards)):
        raise ValueError(
            f"{path}: {unsupervised(len(cache), len(cache))}; dump again with a larger "
            "data.max_seq_length, or with data.truncation_field naming the prompt's keys"
        )
    ids = student_ids(cache, tokenizer)
    longest = manifest.dataset["max_seq_length"]
    if longest > max_seq_length:
        raise ValueError(
            f"{path} was dumped with data.max_seq_length={longest}, this run has "
            f"max_seq_length={max_seq_length}; set it to {longest} or more, or dump again"
        )
    dumped_at = manifest.selection["temperature"]
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
    return ids
