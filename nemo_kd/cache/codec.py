"""Teacher rows of one sample <-> the arrays that its pairs hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from nemo_kd.cache.bits import (
    num_bytes,
    pack,
    pack_sorted,
    rows_and_ranks,
    sorted_sizes,
    unpack,
    unpack_sorted,
)
from nemo_kd.cache.check import check_ids
from nemo_kd.cache.layout import Array
from nemo_kd.cache.manifest import Manifest

_LOWEST_FLOAT16 = np.float32(np.finfo(np.float16).min)


class Rows(NamedTuple):
    """P rows, the entries of all in one line: E = sum of lengths."""

    lengths: Array
    """int64 [P], entries of each row"""
    ids: Array
    """integer [E]"""
    log_probs: Array
    """float32 [E]"""
    tail_log_probs: Array
    """float32 [P]"""


class RowCodec(Protocol):
    """Rows of known lengths <-> one array for each of `pair_dtypes`."""

    @property
    def pair_dtypes(self) -> dict[str, type[np.generic]]:
        """The pairs that hold the rows, each with the element type of its .bin."""

    def encode(self, rows: Rows) -> dict[str, Array]: ...

    def decode(self, arrays: Mapping[str, Array], lengths: Array) -> Rows:
        """Raises ValueError where the arrays do not make rows of these lengths."""


@dataclass(frozen=True)
class Codec:
    """Padded rows, as samples have them, <-> arrays: the lengths, if rows are ragged, and the rest.

    Args:
        rows: what turns the entries into bytes.
        max_entries: entries of the longest row that the selection makes.
        ragged: rows may be shorter, and the pair `row_lengths` says by how much.
    """

    rows: RowCodec
    max_entries: int
    ragged: bool

    @property
    def pair_dtypes(self) -> dict[str, type[np.generic]]:
        """The pairs that hold the rows, each with the element type of its .bin."""
        lengths = {"row_lengths": _smallest_dtype(self.max_entries)} if self.ragged else {}
        return lengths | self.rows.pair_dtypes

    def encode(
        self, topk_ids: Array, topk_log_probs: Array, tail_log_probs: Array
    ) -> dict[str, Array]:
        """Rows [P, K], [P, K], [P], padded by id -1, as one array for each of `pair_dtypes`."""
        kept = topk_ids >= 0
        lengths = kept.sum(axis=1)
        rows = Rows(lengths, topk_ids[kept], topk_log_probs[kept], tail_log_probs)
        return ({"row_lengths": lengths} if self.ragged else {}) | self.rows.encode(rows)

    def decode(self, arrays: Mapping[str, Array], num_rows: int) -> tuple[Array, Array, Array]:
        """topk_ids int32 [P, K], topk_log_probs float32 [P, K], tail_log_probs float32 [P].

        Raises:
            ValueError: the arrays do not make `num_rows` rows.
        """
        if not self.ragged:
            rows = self.rows.decode(arrays, np.full(num_rows, self.max_entries))
            shape = (num_rows, self.max_entries)
            ids = rows.ids.astype(np.int32).reshape(shape)
            return ids, rows.log_probs.reshape(shape), rows.tail_log_probs
        lengths = arrays["row_lengths"].astype(np.int64)
        if lengths.size != num_rows or lengths.max(initial=0) > self.max_entries:
            raise ValueError(f"expected {num_rows} rows of at most {self.max_entries} entries")
        rows = self.rows.decode(arrays, lengths)
        kept = np.arange(lengths.max(initial=1)) < lengths[:, None]
        ids = np.full(kept.shape, -1, np.int32)
        log_probs = np.full(kept.shape, -np.inf, np.float32)
        ids[kept], log_probs[kept] = rows.ids, rows.log_probs
        return ids, log_probs, rows.tail_log_probs


@dataclass(frozen=True)
class RawCodec:
    """Ids as they are, log-probs as float16 bits: 4 bytes an entry up to 65,536 ids, else 6."""

    vocab_size: int

    @property
    def pair_dtypes(self) -> dict[str, type[np.generic]]:
        return {
            "topk_ids": np.uint16 if self.vocab_size <= 2**16 else np.int32,
            "topk_log_probs": np.uint16,
            "tail_log_probs": np.uint16,
        }

    def encode(self, rows: Rows) -> dict[str, Array]:
        return {
            "topk_ids": rows.ids,
            "topk_log_probs": _to_float16_bits(rows.log_probs),
            "tail_log_probs": _to_float16_bits(rows.tail_log_probs),
        }

    def decode(self, arrays: Mapping[str, Array], lengths: Array) -> Rows:
        ids, log_probs, tails = (arrays[name] for name in self.pair_dtypes)
        if (ids.size, log_probs.size, tails.size) != (lengths.sum(), lengths.sum(), lengths.size):
            raise ValueError(f"expected {lengths.size} rows of {lengths.sum()} entries in all")
        check_ids("topk_ids", ids, self.vocab_size)
        rows = Rows(lengths, ids, _from_float16_bits(log_probs), _from_float16_bits(tails))
        if np.isnan(rows.log_probs).any() or np.isnan(rows.tail_log_probs).any():
            raise ValueError("expected log-probs, got NaN")
        return rows


@dataclass(frozen=True)
class PackedCodec:
    """Bit-packed: ids ascending in Elias-Fano code, log-probs finest where the mass is.

    A sample is one string of bytes: high and low bits of the ids, then the log-probs by `values`,
    then the tails as float16 bits.

    Args:
        vocab_size: V, every id is in [0, V).
        values: how log-probs are stored.
    """

    vocab_size: int
    values: LogProbs | Counts

    @property
    def pair_dtypes(self) -> dict[str, type[np.generic]]:
        return {"packed_rows": np.uint8}

    def encode(self, rows: Rows) -> dict[str, Array]:
        row_of_entry, _ = rows_and_ranks(rows.lengths)
        order = np.lexsort((rows.ids, row_of_entry))
        ids, log_probs = rows.ids[order].astype(np.int64), rows.log_probs[order]
        parts = [
            *pack_sorted(ids, rows.lengths, self.vocab_size),
            *self.values.encode(log_probs, rows.lengths),
        ]
        if self.values.has_tail:
            parts.append(_to_float16_bits(rows.tail_log_probs).view(np.uint8))
        return {"packed_rows": np.concatenate(parts)}

    def decode(self, arrays: Mapping[str, Array], lengths: Array) -> Rows:
        data = arrays["packed_rows"]
        sizes = [
            *sorted_sizes(lengths, self.vocab_size),
            *self.values.sizes(lengths),
            2 * lengths.size * self.values.has_tail,
        ]
        if data.size != sum(sizes):
            raise ValueError(f"expected {sum(sizes)} bytes for its rows, got {data.size}")
        high, low, *values, tail_bits = np.split(data, np.cumsum(sizes[:-1]))
        if self.values.has_tail:
            # a copy: the bytes of a sample may start at an odd address
            tails = _from_float16_bits(tail_bits.copy().view(np.uint16))
        else:
            tails = np.full(lengths.size, -np.inf, np.float32)
        ids = unpack_sorted(high, low, lengths, self.vocab_size)
        return Rows(lengths, ids, self.values.decode(values, lengths), tails)


@dataclass(frozen=True)
class LogProbs:
    """12 bits for each of the 10 largest of a row, which carry most of its mass, 5 for the others.

    The list holds the 12 bits of the 10 largest of each row, or of all entries of a row that has
    no more, and after these the lowest of each longer row. Before the list, each entry of a longer
    row has a code of 5 bits: 31, its value is in the list; 0, its value is -inf; c from 1 to 30,
    its value is `high - (high - low) * (c - 1/2) / 30`, with high the row's smallest in the list
    and low its smallest finite one.
    """

    has_tail = True

    def encode(self, log_probs: Array, lengths: Array) -> list[Array]:
        rows, ranks = rows_and_ranks(lengths)
        listed = np.empty(log_probs.size, bool)
        listed[np.lexsort((-log_probs, rows))] = ranks < _NUM_LISTED
        fine = _to_12_bits(log_probs[listed])
        rest, num_rest = log_probs[~listed], _num_rest(lengths)
        starts = np.cumsum(num_rest) - num_rest
        infinite = np.isneginf(rest)
        finite = np.where(infinite, np.float32(0), rest)
        low = _to_12_bits(np.minimum.reduceat(finite, starts) if starts.size else finite)
        high, span = _high_and_span(_from_12_bits(fine), _from_12_bits(low), lengths)
        per_step = np.divide(_NUM_STEPS, span, out=np.zeros_like(span), where=span > 0)
        below = np.where(infinite, 0, np.repeat(high, num_rest) - finite)
        steps = np.clip(below * np.repeat(per_step, num_rest), 0, _NUM_STEPS - 1)
        coarse = np.full(log_probs.size, _IN_LIST)
        coarse[~listed] = np.where(infinite, 0, 1 + steps.astype(np.int64))
        in_long = np.repeat(lengths > _NUM_LISTED, lengths)
        return [pack(coarse[in_long], _CODE_BITS), pack(np.concatenate([fine, low]), 12)]

    def sizes(self, lengths: Array) -> list[int]:
        num_long = int((lengths > _NUM_LISTED).sum())
        num_coarse = int(lengths[lengths > _NUM_LISTED].sum())
        return [
            num_bytes(_CODE_BITS * num_coarse),
            num_bytes(12 * (_num_listed(lengths) + num_long)),
        ]

    def decode(self, arrays: list[Array], lengths: Array) -> Array:
        is_long = lengths > _NUM_LISTED
        num_listed = _num_listed(lengths)
        codes = unpack(arrays[1], 12, num_listed + int(is_long.sum()))
        fine, low = np.split(_from_12_bits(codes), [num_listed])
        in_long = np.repeat(is_long, lengths)
        coarse = np.full(in_long.size, _IN_LIST)
        coarse[in_long] = unpack(arrays[0], _CODE_BITS, int(in_long.sum()))
        listed = coarse == _IN_LIST
        up_to = np.concatenate([[0], np.cumsum(listed)])[np.concatenate([[0], np.cumsum(lengths)])]
        if (np.diff(up_to) != np.minimum(lengths, _NUM_LISTED)).any():
            raise ValueError(f"expected the {_NUM_LISTED} largest of each row in the list")
        high, span = _high_and_span(fine, low, lengths)
        num_rest = _num_rest(lengths)
        rest = coarse[~listed]
        levels = np.repeat(high, num_rest) - _LEVELS[rest] * np.repeat(span, num_rest)
        log_probs = np.empty(coarse.size, np.float32)
        log_probs[listed] = fine
        log_probs[~listed] = np.where(rest == 0, -np.inf, levels)
        return log_probs


@dataclass(frozen=True)
class Counts:
    """log(count / num_draws), stored as count - 1: sampled rows, whose tail is empty."""

    num_draws: int
    has_tail = False

    @property
    def _width(self) -> int:
        return (self.num_draws - 1).bit_length()

    def encode(self, log_probs: Array, lengths: Array) -> list[Array]:
        counts = np.rint(np.exp(log_probs.astype(np.float64)) * self.num_draws).astype(np.int64)
        if not ((counts >= 1) & (counts <= self.num_draws)).all():
            raise ValueError(f"expected log-probs of 1 to {self.num_draws} draws, got others")
        return [pack(counts - 1, self._width)]

    def sizes(self, lengths: Array) -> list[int]:
        return [num_bytes(self._width * int(lengths.sum()))]

    def decode(self, arrays: list[Array], lengths: Array) -> Array:
        counts = unpack(arrays[0], self._width, int(lengths.sum())) + 1
        log_probs: Array = np.log(counts / self.num_draws).astype(np.float32)
        return log_probs


def codec_for(manifest: Manifest) -> Codec:
    """The codec that a manifest names; the manifest has refused names nobody knows."""
    rows: RowCodec
    if manifest.codec == "raw":
        rows = RawCodec(manifest.vocab_size)
    elif manifest.selection["kind"] == "sample":
        rows = PackedCodec(manifest.vocab_size, Counts(manifest.selection["num_draws"]))
    else:
        rows = PackedCodec(manifest.vocab_size, LogProbs())
    return Codec(rows, manifest.max_entries, manifest.ragged)


def _to_float16_bits(log_probs: Array) -> Array:
    """Finite stays finite: a log-prob below float16's range becomes its lowest value, -65504."""
    clamped = np.where(np.isneginf(log_probs), log_probs, np.maximum(log_probs, _LOWEST_FLOAT16))
    bits: Array = clamped.astype(np.float16).view(np.uint16)
    return bits


def _from_float16_bits(bits: Array) -> Array:
    log_probs: Array = bits.view(np.float16).astype(np.float32)
    return log_probs


_NUM_LISTED = 10
_CODE_BITS = 5
_IN_LIST = 31
_NUM_STEPS = 30
# The middle of each of the 30 steps from high to low, at its code.
_LEVELS = ((np.arange(32) - 0.5) / _NUM_STEPS).astype(np.float32)

# A log-prob x in 12 bits: the float32 of 1/32 - x without its sign and its last 15 bits, counted
# from that of 1/32. So a step is 2^-13 near 0, a 256th of x's power of two beyond, and the lowest
# finite value is -2040; 4095 is -inf.
_OFFSET = np.float32(1 / 32)
_DROPPED_BITS = 15
_FIRST = int(_OFFSET.view(np.uint32)) >> _DROPPED_BITS
_INFINITE = 4095


def _to_12_bits(log_probs: Array) -> Array:
    bits = (_OFFSET - np.minimum(log_probs.astype(np.float32), 0)).view(np.uint32).astype(np.int64)
    rounded = (bits + (1 << _DROPPED_BITS - 1) >> _DROPPED_BITS) - _FIRST
    return np.where(np.isneginf(log_probs), _INFINITE, np.minimum(rounded, _INFINITE - 1))


def _from_12_bits(codes: Array) -> Array:
    values = _OFFSET - (codes + _FIRST << _DROPPED_BITS).astype(np.uint32).view(np.float32)
    return np.where(codes == _INFINITE, np.float32(-np.inf), values)


def _num_listed(lengths: Array) -> int:
    return int(np.minimum(lengths, _NUM_LISTED).sum())


def _num_rest(lengths: Array) -> Array:
    """Entries of each longer row that are not in the list."""
    return lengths[lengths > _NUM_LISTED] - _NUM_LISTED


def _high_and_span(fine: Array, low: Array, lengths: Array) -> tuple[Array, Array]:
    """The smallest in the list, and how far the smallest of all lies below; of each longer row."""
    in_long = np.repeat(lengths > _NUM_LISTED, np.minimum(lengths, _NUM_LISTED))
    high = fine[in_long].reshape(-1, _NUM_LISTED).min(axis=1)
    # A high of -inf has nothing finite below it.
    return high, np.maximum(np.where(np.isneginf(high), 0, high) - low, 0)


def _smallest_dtype(highest: int) -> type[np.generic]:
    """The smallest element type of Megatron's that holds 0 to `highest`."""
    if highest < 2**8:
        return np.uint8
    return np.uint16 if highest < 2**16 else np.int32
