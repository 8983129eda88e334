"""Teacher rows of one sample <-> the arrays that its pairs hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nemo_kd.cache.bits import (
    as_matrix,
    num_bytes,
    pack,
    pack_sorted,
    sorted_sizes,
    unpack,
    unpack_sorted,
)
from nemo_kd.cache.check import check_ids
from nemo_kd.cache.layout import Array
from nemo_kd.cache.manifest import Manifest

_LOWEST_FLOAT16 = np.float32(np.finfo(np.float16).min)

# The 10 largest of a row are listed in 12 bits each. Every entry of a longer row has a code of 5
# bits: 31 for a listed one, 0 for -inf, and otherwise one of 30 steps.
_NUM_LISTED = 10
_LISTED_BITS = 12
_CODE_BITS = 5
_IN_LIST = 31
_NUM_STEPS = 30
# By code: how far the middle of the step lies between high (0) and low (1).
_LEVELS = ((np.arange(32) - 0.5) / _NUM_STEPS).astype(np.float32)

# A log-prob x in 12 bits: the float32 of 1/32 - x without its sign and its last 15 bits, counted
# from that of 1/32. So a step is 2^-13 near 0 and then a 256th of x's power of two, and the lowest
# finite value is -2040. 4095 is -inf.
_OFFSET = np.float32(1 / 32)
_DROPPED_BITS = 15
_FIRST = int(_OFFSET.view(np.uint32)) >> _DROPPED_BITS
_INFINITE = 4095
_LARGEST = np.iinfo(np.int64).max


class Rows(NamedTuple):
    """P rows, whose entries follow each other in one line: E = sum of lengths."""

    lengths: Array
    """int64 [P], entries of each row"""
    ids: Array
    """integer [E]"""
    log_probs: Array
    """float32 [E]"""
    tail_log_probs: Array
    """float32 [P]"""


def codec_for(manifest: Manifest) -> Codec:
    """The codec that a manifest names; the manifest has refused unknown names."""
    rows: RawCodec | PackedCodec
    if manifest.codec == "raw":
        rows = RawCodec(manifest.vocab_size)
    elif manifest.selection["kind"] == "sample":
        rows = PackedCodec(manifest.vocab_size, Counts(manifest.selection["num_draws"]))
    else:
        rows = PackedCodec(manifest.vocab_size, LogProbs())
    return Codec(rows, manifest.max_entries, manifest.ragged)


@dataclass(frozen=True)
class Codec:
    """Rows padded to one length, as samples have them, <-> one array for each pair.

    Args:
        rows: turns the entries into bytes.
        max_entries: entries of the longest row that the selection makes.
        ragged: rows may be shorter; the pair `row_lengths` then holds their lengths.
    """

    rows: RawCodec | PackedCodec
    max_entries: int
    ragged: bool

    @property
    def pair_dtypes(self) -> dict[str, type[np.generic]]:
        """The pairs that hold the rows, each with the element type of its .bin."""
        if not self.ragged:
            return self.rows.pair_dtypes
        # The smallest of Megatron's element types that holds the longest length.
        longest = self.max_entries
        dtype = np.uint8 if longest < 2**8 else np.uint16 if longest < 2**16 else np.int32
        return {"row_lengths": dtype} | self.rows.pair_dtypes

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

        K is the longest row's length, and at least 1, if rows are ragged.

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
        """Raises ValueError where the arrays do not make rows of these lengths."""
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
    """Bit-packed: ids ascending in Elias-Fano code, log-probs most exact where the mass is.

    A sample is one string of bytes: high and low bits of the ids, the log-probs as `values` packs
    them, the tails as float16 bits.
    """

    vocab_size: int
    values: LogProbs | Counts

    @property
    def pair_dtypes(self) -> dict[str, type[np.generic]]:
        return {"packed_rows": np.uint8}

    def encode(self, rows: Rows) -> dict[str, Array]:
        ids, log_probs = _by_id(rows)
        parts = [
            *pack_sorted(ids, rows.lengths, self.vocab_size),
            *self.values.encode(log_probs, rows.lengths),
        ]
        if self.values.has_tail:
            parts.append(_to_float16_bits(rows.tail_log_probs).view(np.uint8))
        return {"packed_rows": np.concatenate(parts)}

    def decode(self, arrays: Mapping[str, Array], lengths: Array) -> Rows:
        """Raises ValueError where the array does not make rows of these lengths."""
        data = arrays["packed_rows"]
        sizes = [
            *sorted_sizes(lengths, self.vocab_size),
            *self.values.sizes(lengths),
            2 * lengths.size * self.values.has_tail,
        ]
        if data.size != sum(sizes):
            raise ValueError(f"expected {sum(sizes)} bytes for its rows, got {data.size}")
        high, low, *values, tail_bits = np.split(data, np.cumsum(sizes[:-1]))
        tails = np.full(lengths.size, -np.inf, np.float32)
        if self.values.has_tail:
            # A copy, because the tails may start at an odd address.
            tails = _from_float16_bits(tail_bits.copy().view(np.uint16))
        ids = unpack_sorted(high, low, lengths, self.vocab_size)
        return Rows(lengths, ids, self.values.decode(values, lengths), tails)


@dataclass(frozen=True)
class LogProbs:
    """12 bits for each of the 10 largest of a row, which carry most of its mass, 5 for the others.

    Two arrays. The first has a code of 5 bits for each entry of each row longer than 10: 31, its
    value is listed; 0, its value is -inf; c from 1 to 30, its value is
    `high - (high - low) * (c - 1/2) / 30`. The second lists values in 12 bits: the 10 largest of
    each row, or all of a shorter one; then the `low` of each longer row, its smallest finite value
    that is not listed. `high` is the row's smallest listed value.
    """

    has_tail = True

    def encode(self, log_probs: Array, lengths: Array) -> list[Array]:
        listed = _largest(log_probs, lengths)
        fine = _to_12_bits(log_probs[listed])
        rest, num_rest = log_probs[~listed], _num_rest(lengths)
        starts = np.cumsum(num_rest) - num_rest
        infinite = np.isneginf(rest)
        finite = np.where(infinite, np.float32(0), rest)
        low = _to_12_bits(np.minimum.reduceat(finite, starts) if starts.size else finite)
        # From the rounded values, which are those that the reader has.
        high, span = _high_and_span(_from_12_bits(fine), _from_12_bits(low), lengths)
        per_step = np.divide(_NUM_STEPS, span, out=np.zeros_like(span), where=span > 0)
        below = np.where(infinite, 0, np.repeat(high, num_rest) - finite)
        steps = np.clip(below * np.repeat(per_step, num_rest), 0, _NUM_STEPS - 1)
        codes = np.full(log_probs.size, _IN_LIST)
        codes[~listed] = np.where(infinite, 0, 1 + steps.astype(np.int64))
        in_long = np.repeat(lengths > _NUM_LISTED, lengths)
        return [pack(codes[in_long], _CODE_BITS), pack(np.concatenate([fine, low]), _LISTED_BITS)]

    def sizes(self, lengths: Array) -> list[int]:
        """Bytes of each array that `encode` makes of rows of these lengths."""
        is_long = lengths > _NUM_LISTED
        num_listed = int(np.minimum(lengths, _NUM_LISTED).sum() + is_long.sum())
        num_codes = int(lengths[is_long].sum())
        return [num_bytes(_CODE_BITS * num_codes), num_bytes(_LISTED_BITS * num_listed)]

    def decode(self, arrays: list[Array], lengths: Array) -> Array:
        is_long, num_rest = lengths > _NUM_LISTED, _num_rest(lengths)
        num_listed = int(np.minimum(lengths, _NUM_LISTED).sum())
        values = _from_12_bits(unpack(arrays[1], _LISTED_BITS, num_listed + num_rest.size))
        fine, low = np.split(values, [num_listed])
        in_long = np.repeat(is_long, lengths)
        codes = np.full(in_long.size, _IN_LIST)
        codes[in_long] = unpack(arrays[0], _CODE_BITS, int(in_long.sum()))
        listed = codes == _IN_LIST
        up_to = np.concatenate([[0], np.cumsum(listed)])[np.concatenate([[0], np.cumsum(lengths)])]
        if (np.diff(up_to) != np.minimum(lengths, _NUM_LISTED)).any():
            raise ValueError(f"expected the {_NUM_LISTED} largest of each row in the list")
        high, span = _high_and_span(fine, low, lengths)
        rest = codes[~listed]
        levels = np.repeat(high, num_rest) - _LEVELS[rest] * np.repeat(span, num_rest)
        log_probs = np.empty(codes.size, np.float32)
        log_probs[listed] = fine
        log_probs[~listed] = np.where(rest == 0, -np.inf, levels)
        return log_probs


@dataclass(frozen=True)
class Counts:
    """log(count / num_draws), stored as count - 1: for sampled rows, which have no tail."""

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
        """Bytes of the array that `encode` makes of rows of these lengths."""
        return [num_bytes(self._width * int(lengths.sum()))]

    def decode(self, arrays: list[Array], lengths: Array) -> Array:
        counts = unpack(arrays[0], self._width, int(lengths.sum())) + 1
        log_probs: Array = np.log(counts / self.num_draws).astype(np.float32)
        return log_probs


def _to_float16_bits(log_probs: Array) -> Array:
    """Finite stays finite: a log-prob below float16's range becomes its lowest value, -65504."""
    clamped = np.where(np.isneginf(log_probs), log_probs, np.maximum(log_probs, _LOWEST_FLOAT16))
    bits: Array = clamped.astype(np.float16).view(np.uint16)
    return bits


def _from_float16_bits(bits: Array) -> Array:
    log_probs: Array = bits.view(np.float16).astype(np.float32)
    return log_probs


def _to_12_bits(log_probs: Array) -> Array:
    bits = (_OFFSET - np.minimum(log_probs.astype(np.float32), 0)).view(np.uint32).astype(np.int64)
    rounded = (bits + (1 << _DROPPED_BITS - 1) >> _DROPPED_BITS) - _FIRST
    return np.where(np.isneginf(log_probs), _INFINITE, np.minimum(rounded, _INFINITE - 1))


def _from_12_bits(codes: Array) -> Array:
    values = _OFFSET - (codes + _FIRST << _DROPPED_BITS).astype(np.uint32).view(np.float32)
    return np.where(codes == _INFINITE, np.float32(-np.inf), values)


def _by_id(rows: Rows) -> tuple[Array, Array]:
    """Ids int64 [E] and log-probs [E] of the entries, of each row by ascending id."""
    places = np.arange(rows.ids.size)
    # An id and the place of its entry in one number, because values sort faster than by a key.
    keys = as_matrix(rows.ids.astype(np.int64) << 32 | places, rows.lengths, _LARGEST)
    keys = np.sort(keys, axis=1)
    keys = keys[keys < _LARGEST]
    return keys >> 32, rows.log_probs[keys & 0xFFFFFFFF]


def _largest(log_probs: Array, lengths: Array) -> Array:
    """Whether an entry is one of its row's 10 largest; of equal ones, the first are. Bool [E]."""
    matrix = as_matrix(log_probs, lengths, -np.inf)
    in_row = np.arange(matrix.shape[1]) < lengths[:, None]
    if matrix.shape[1] <= _NUM_LISTED:
        return in_row[in_row]
    least = -np.partition(-matrix, _NUM_LISTED - 1, axis=1)[:, _NUM_LISTED - 1, None]
    above = matrix > least
    equal = (matrix == least) & in_row
    room = _NUM_LISTED - above.sum(axis=1, keepdims=True)
    listed: Array = (above | equal & (equal.cumsum(axis=1) <= room))[in_row]
    return listed


def _num_rest(lengths: Array) -> Array:
    """Entries of each longer row that are not listed."""
    return lengths[lengths > _NUM_LISTED] - _NUM_LISTED


def _high_and_span(fine: Array, low: Array, lengths: Array) -> tuple[Array, Array]:
    """Of each longer row: its smallest listed value, and how far below that its `low` lies."""
    in_long = np.repeat(lengths > _NUM_LISTED, np.minimum(lengths, _NUM_LISTED))
    high = fine[in_long].reshape(-1, _NUM_LISTED).min(axis=1)
    # A high of -inf has nothing finite below it.
    return high, np.maximum(np.where(np.isneginf(high), 0, high) - low, 0)
