"""The names of a cache's files, and Sample: what it holds for one sample."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

Array = npt.NDArray[Any]

MANIFEST_NAME = "manifest.json"
SHARD_RECORD_NAME = "shard.json"
# One little-endian uint64 for each sample of the shard: `checksum` of its sequences.
CHECKSUMS_NAME = "checksums.xxh3"
# The pairs that every cache has. The codec names the others, which hold the rows.
SAMPLE_PAIRS: dict[str, type[np.generic]] = {
    "tokens": np.int32,
    "loss_mask": np.uint8,
    "context_length": np.int32,
}


class Sample(NamedTuple):
    """One sample of T tokens, P of them supervised, with K kept entries a row.

    Row j belongs to the j-th supervised token t and holds the teacher's distribution at t - 1.
    """

    tokens: Array
    """int32 [T]"""
    loss_mask: Array
    """uint8 [T], 1 where the token is to be predicted, never at t = 0"""
    topk_ids: Array
    """int32 [P, K]"""
    topk_log_probs: Array
    """float32 [P, K], log of the teacher's softmax at the selection's temperature"""
    tail_log_probs: Array
    """float32 [P], log of the mass outside the kept entries"""
    context_length: int
    """tokens of the prompt"""


def checksum(sequences: Mapping[str, Array]) -> int:
    """XXH3 64-bit hash of a sample: of each pair, by name, the length as an int64 and the bytes.

    Args:
        sequences: the sample's sequence in each pair, contiguous and of the pair's element type.
    """
    digest = xxhash.xxh3_64()
    for name in sorted(sequences):
        digest.update(sequences[name].size.to_bytes(8, "little"))
        digest.update(sequences[name].data)
    return digest.intdigest()


def shard_name(index: int) -> str:
    return f"shard-{index:05d}"


def pair_paths(directory: Path, name: str) -> tuple[Path, Path]:
    """The .bin and the .idx of a pair."""
    return directory / f"{name}.bin", directory / f"{name}.idx"
