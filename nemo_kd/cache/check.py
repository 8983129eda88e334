"""Checks of a sample that the writer and the importer share.

Each raises a ValueError that names what was expected and what was given.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nemo_kd.cache.layout import Array, Sample
from nemo_kd.cache.manifest import Manifest

# The log_softmax of logits near 1e4 may round to 1e-3 above zero. More than this is no log-prob.
_HIGHEST_LOG_PROB = 0.01


def check_sample(sample: Sample, manifest: Manifest) -> None:
    """Check all of a sample: that a cache of this manifest can hold it."""
    num_tokens = len(sample.tokens)
    _check_array("tokens", sample.tokens, "iu", (num_tokens,))
    _check_array("loss_mask", sample.loss_mask, "iub", (num_tokens,))
    check_mask(sample.loss_mask)
    check_context_length(sample.context_length, num_tokens)
    num_columns = sample.topk_ids.shape[-1] if manifest.ragged else manifest.max_entries
    shape = (int(sample.loss_mask.sum()), num_columns)
    _check_array("topk_ids", sample.topk_ids, "iu", shape)
    _check_array("topk_log_probs", sample.topk_log_probs, "f", shape)
    _check_array("tail_log_probs", sample.tail_log_probs, "f", shape[:1])
    kept = sample.topk_ids != -1 if manifest.ragged else np.full(shape, True)
    longest = kept.sum(axis=1).max(initial=0)
    if longest > manifest.max_entries:
        raise ValueError(
            f"topk_ids: expected at most {manifest.max_entries} entries a row, got {longest}"
        )
    check_ids("tokens", sample.tokens, manifest.vocab_size)
    check_ids("topk_ids", sample.topk_ids[kept], manifest.vocab_size)
    check_distinct("topk_ids", sample.topk_ids)
    check_log_probs("topk_log_probs", sample.topk_log_probs)
    check_log_probs("tail_log_probs", sample.tail_log_probs)


def check_ids(name: str, ids: npt.ArrayLike, vocab_size: int) -> None:
    ids = np.asarray(ids)
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        outside = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise ValueError(
            f"{name}: expected ids from 0 to {vocab_size - 1} (vocabulary of {vocab_size}), "
            f"got {outside}"
        )


def check_distinct(name: str, ids: Array) -> None:
    """Check ids [P, K]. Negative ones, which pad a row, may occur more than once."""
    ordered = np.sort(ids, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        raise ValueError(
            f"{name}: expected each id at most once a row, got {ordered[:, 1:][twice][0]} twice"
        )


def check_mask(loss_mask: npt.ArrayLike) -> None:
    loss_mask = np.asarray(loss_mask)
    if ((loss_mask != 0) & (loss_mask != 1)).any():
        raise ValueError(f"loss_mask: expected zeros and ones, got {np.unique(loss_mask)}")
    if loss_mask[:1].any():
        raise ValueError("loss_mask: expected 0 at the first token, which nothing predicts, got 1")


def check_context_length(context_length: int, num_tokens: int) -> None:
    if not 0 <= context_length <= num_tokens:
        raise ValueError(f"context_length: expected 0 to {num_tokens} tokens, got {context_length}")


def check_log_probs(name: str, log_probs: npt.ArrayLike) -> None:
    log_probs = np.asarray(log_probs)
    if not (log_probs <= _HIGHEST_LOG_PROB).all():  # false for NaN as well
        raise ValueError(f"{name}: expected log-probs, at most 0, got {log_probs.max()}")


def _check_array(name: str, array: Array, kinds: str, shape: tuple[int, ...]) -> None:
    if array.dtype.kind not in kinds or array.shape != shape:
        expected = "float" if kinds == "f" else "integer"
        raise ValueError(
            f"{name}: expected {expected} {list(shape)}, got {array.dtype} {list(array.shape)}"
        )
