"""Teacher rows of one sample <-> the flat arrays that its pairs hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nemo_kd.cache.layout import Array
from nemo_kd.cache.manifest import Manifest

_LOWEST_FLOAT16 = np.float32(np.finfo(np.float16).min)


@dataclass(frozen=True)
class RawCodec:
    """Ids as they are, log-probs as float16 bits: 4 bytes an entry up to 65,536 ids, else 6.

    Args:
        vocab_size: V, every id is in [0, V).
        k: K, the entries of every row.
    """

    vocab_size: int
    k: int

    @property
    def pair_dtypes(self) -> dict[str, type[np.generic]]:
        """The pairs that hold the rows, each with the element type of its .bin."""
        return {
            "topk_ids": np.uint16 if self.vocab_size <= 2**16 else np.int32,
            "topk_log_probs": np.uint16,
            "tail_log_probs": np.uint16,
        }

    def encode(
        self, topk_ids: Array, topk_log_probs: Array, tail_log_probs: Array
    ) -> dict[str, Array]:
        """Rows [P, K], [P, K], [P] as one flat array for each of `pair_dtypes`."""
        return {
            "topk_ids": topk_ids.astype(self.pair_dtypes["topk_ids"]).ravel(),
            "topk_log_probs": _to_float16_bits(topk_log_probs).ravel(),
            "tail_log_probs": _to_float16_bits(tail_log_probs),
        }

    def decode(self, arrays: Mapping[str, Array]) -> tuple[Array, Array, Array]:
        """topk_ids int32 [P, K], topk_log_probs float32 [P, K], tail_log_probs float32 [P].

        Raises:
            ValueError: the arrays' sizes do not make rows of K entries.
        """
        tail_log_probs = _from_float16_bits(arrays["tail_log_probs"])
        shape = (tail_log_probs.size, self.k)
        topk_ids = arrays["topk_ids"].astype(np.int32).reshape(shape)
        return topk_ids, _from_float16_bits(arrays["topk_log_probs"]).reshape(shape), tail_log_probs


def codec_for(manifest: Manifest) -> RawCodec:
    """The codec that a manifest names; the manifest has refused names nobody knows."""
    return RawCodec(vocab_size=manifest.vocab_size, k=manifest.selection["k"])


def _to_float16_bits(log_probs: Array) -> Array:
    """Finite stays finite: a log-prob below float16's range becomes its lowest value, -65504."""
    clamped = np.where(np.isneginf(log_probs), log_probs, np.maximum(log_probs, _LOWEST_FLOAT16))
    return clamped.astype(np.float16).view(np.uint16)


def _from_float16_bits(bits: Array) -> Array:
    return bits.view(np.float16).astype(np.float32)
