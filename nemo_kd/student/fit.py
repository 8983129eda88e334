"""Whether a cache is one that this student, at this objective, can be trained on."""

from nemo_kd.cache import TopKCache
from nemo_kd.cache.inspection import unsupervised
from nemo_kd.loss import KDLossConfig


def check_fits(
    cache: TopKCache,
    config: KDLossConfig,
    *,
    vocab_size: int,
    tokenizer_fingerprint: str,
    max_seq_length: int,
) -> None:
    """Compare what shaped the cache with the student and the objective.

    Args:
        vocab_size: of the student's tokenizer, without padding.
        tokenizer_fingerprint: of the student's tokenizer, as the dump computed the teacher's.
        max_seq_length: of this run, in tokens.

    Raises:
        ValueError: The cache was made with another tokenizer, longer sequences or another
            temperature, holds sampled rows and the tail is not drop, or has no supervised token;
            names both sides.
    """
    manifest = cache.manifest
    path = cache.path
    # Mostly one record is read: that of a shard with nothing to learn from is rare.
    if not any(cache.shard_record(i).num_supervised_tokens for i in range(cache.num_shards)):
        raise ValueError(
            f"{path}: {unsupervised(len(cache), len(cache))}; dump again with a larger "
            "data.max_seq_length, or with data.truncation_field naming the prompt's keys"
        )
    dumped_with = (manifest.vocab_size, manifest.tokenizer_fingerprint)
    if dumped_with != (vocab_size, tokenizer_fingerprint):
        raise ValueError(
            f"{path} was dumped with another tokenizer (vocabulary {manifest.vocab_size}, "
            f"fingerprint {manifest.tokenizer_fingerprint}) than the student's (vocabulary "
            f"{vocab_size}, fingerprint {tokenizer_fingerprint}); dump again with a "
            "teacher that shares the student's tokenizer"
        )
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
