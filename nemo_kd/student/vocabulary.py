"""The ids of a cache as those of the student, whose tokenizer may have other added tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from nemo_kd.cache import Sample, TopKCache
from nemo_kd.cache.layout import Array
from nemo_kd.cache.manifest import tokenizer_fingerprint, vocabulary_of

_MEASURED_SAMPLES = 1000  # enough for two digits, and read within a second


def student_ids(cache: TopKCache, tokenizer: Any) -> Array | None:
    """The student's id of each id of a cache, int32 [V], -1 where the student has no such token.

    None if all ids are the student's as they stand: the tokenizers are equal, or the student's has
    more tokens at its end. Otherwise tokens are found by their text, for which the two may differ
    in added tokens alone.

    Args:
        cache: The cache.
        tokenizer: The student's, as NeMo's tokenizers are.

    Raises:
        ValueError: The tokenizers differ in more, or in the end token, or the cache does not hold
            its added tokens; names both sides.
    """
    manifest, size = cache.manifest, tokenizer.vocab_size
    common = min(size, manifest.vocab_size)
    if common == manifest.vocab_size and (
        tokenizer_fingerprint(tokenizer, common) == manifest.tokenizer_fingerprint
    ):
        return None
    theirs, own = manifest.vocabulary, vocabulary_of(tokenizer)
    ids = np.arange(manifest.vocab_size, dtype=np.int32)
    end = None
    if theirs and theirs["base_fingerprint"] == own.get("base_fingerprint"):
        for text, number in theirs["added_tokens"].items():
            ids[number] = own["added_tokens"].get(text, -1)
        end = theirs["end_id"]
        if (None if end is None else ids[end]) == own["end_id"]:
            return ids
    differs = "in more than added tokens" if end is None else "in the end token"
    raise ValueError(
        f"{cache.path} was dumped with another tokenizer (vocabulary {manifest.vocab_size}, "
        f"fingerprint {manifest.tokenizer_fingerprint}) than the student's (vocabulary {size}, "
        f"fingerprint {tokenizer_fingerprint(tokenizer)}), which differs {differs}; dump again "
        "with a teacher that shares the student's tokenizer"
    )


def with_student_ids(sample: Sample, ids: Array) -> Sample:
    """A cache's sample in the student's ids; entries that it lacks are empty, and join the tail.

    Args:
        sample: As the cache has it.
        ids: Of `student_ids`.

    Raises:
        ValueError: The student lacks one of the sample's tokens.
    """
    tokens = ids[sample.tokens]
    if (tokens < 0).any():
        raise ValueError(
            f"the student's tokenizer lacks token {sample.tokens[tokens < 0][0]} of the sample"
        )
    entries = np.where(sample.topk_ids < 0, -1, ids[sample.topk_ids])
    lacking = entries < 0
    lost = np.logaddexp.reduce(np.where(lacking, sample.topk_log_probs, -np.inf), axis=1)
    tails = np.minimum(np.logaddexp(sample.tail_log_probs, lost), 0)
    return sample._replace(
        tokens=tokens,
        topk_ids=entries,
        topk_log_probs=np.where(lacking, -np.inf, sample.topk_log_probs).astype(np.float32),
        tail_log_probs=tails.astype(np.float32),
    )


def check_lacking(cache: TopKCache, ids: Array | None) -> str | None:
    """Check that the data uses no token that the student lacks, and say what the teacher loses.

    Reads the tokens of the whole cache, and the rows of some samples.

    Args:
        cache: The cache.
        ids: Of `student_ids`.

    Returns:
        One line, or None if the student lacks none of the cache's tokens.

    Raises:
        ValueError: A sample has such a token.
    """
    if ids is None or (ids >= 0).all():
        return None
    texts = {number: text for text, number in cache.manifest.vocabulary["added_tokens"].items()}
    lacking = np.flatnonzero(ids < 0)
    shown = ", ".join(texts[number] for number in lacking[:3].tolist())
    shown += ", ..." if len(lacking) > 3 else ""
    if (used := lacking[cache.used_tokens()[lacking]]).size:
        raise ValueError(
            f"{cache.path}: the data has {texts[int(used[0])]}, a token that the student's "
            "tokenizer lacks; dump data without it, or give the student the teacher's tokenizer"
        )
    step = -(-len(cache) // _MEASURED_SAMPLES)
    lost, num_rows = 0.0, 0
    for index in range(0, len(cache), step):
        sample = cache[index]
        entries = (sample.topk_ids >= 0) & (ids[sample.topk_ids] < 0)
        lost += float(np.exp(sample.topk_log_probs[entries]).sum())
        num_rows += len(sample.topk_ids)
    measured = f"{len(range(0, len(cache), step)):,} of {len(cache):,} samples"
    return (
        f"{cache.path}: the student's tokenizer lacks {len(lacking):,} of the teacher's tokens "
        f"({shown}), which the data does not use; {lost / max(1, num_rows):.3%} of the teacher's "
        f"probability is on them and joins the tail, which renormalize and drop leave out; "
        f"measured on {measured}"
    )
