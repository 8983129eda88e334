"""The rows of the written tokens as a cache: sample i is line i of the answers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from nemo_kd.cache import CacheWriter, Manifest, Sample
from nemo_kd.cache.manifest import fingerprint_file, tokenizer_fingerprint, vocabulary_of
from nemo_kd.generate.answers import Answer
from nemo_kd.generate.settings import CaptureConfig
from nemo_kd.generate.tokenizer import HfTokenizer


def sample_of(prompt: list[int], answer: Answer) -> Sample:
    """The tokens of prompt and answer, the answer's learnt, with its rows."""
    assert answer.rows is not None
    tokens = np.array(prompt + answer.ids, np.int32)
    mask = np.zeros(len(tokens), np.uint8)
    mask[len(prompt) :] = 1
    return Sample(tokens, mask, *answer.rows, len(prompt))


def manifest_of(
    capture: CaptureConfig,
    tokenizer: HfTokenizer,
    settings: dict[str, Any],
    output: Path,
    num_samples: int,
    max_tokens: int,
) -> Manifest:
    """What the cache says of itself.

    Args:
        capture: The settings of the cache.
        tokenizer: The model's.
        settings: Of the run, as its record has them.
        output: The answers.
        num_samples: How many there are.
        max_tokens: Of the longest prompt with its answer.
    """
    return Manifest(
        selection={"kind": "top_k", "k": capture.k, "temperature": 1.0},
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        vocabulary=vocabulary_of(tokenizer),
        teacher_fingerprint=settings["model"],
        sources=(fingerprint_file(output),),
        # The first three are what the student's dataset reads. `captured` says where rows and
        # tokens come from: no dataset made them of the lines.
        dataset={
            "max_seq_length": max(1, max_tokens - 1),
            "chat": False,
            "add_eos": False,
            "captured": {key: value for key, value in settings.items() if key != "capture"},
        },
        num_samples=num_samples,
        samples_per_shard=capture.samples_per_shard,
        codec=capture.codec,
    )


def write_cache(path: str, manifest: Manifest, samples: Iterable[Sample]) -> None:
    """Write the shards that are missing.

    Raises:
        ValueError: The directory holds another cache, or none.
    """
    writer = CacheWriter.open(path, manifest)
    missing, rest = set(writer.missing_shards()), iter(samples)
    for index in range(manifest.num_shards):
        if index not in missing:
            for _ in manifest.shard_samples(index):
                next(rest)
            continue
        with writer.shard(index) as shard:
            for _ in manifest.shard_samples(index):
                shard.add(**next(rest)._asdict())
