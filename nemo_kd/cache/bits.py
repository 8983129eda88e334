"""Arrays of numbers <-> bytes that hold each in as many bits as it needs.

Bits fill each byte from its lowest up; an array ends at a whole byte.
"""

from __future__ import annotations

import numpy as np

from nemo_kd.cache.layout import Array

_WINDOW_BYTES = 8


def pack(values: Array, widths: Array | int) -> Array:
    """Each value in its width of bits, one after the other; uint8."""
    widths = np.broadcast_to(widths, values.shape)
    places = np.arange(widths.max(initial=0))
    bits = values[:, None] >> places & 1
    return np.packbits(bits[places < widths[:, None]].astype(bool), bitorder="little")


def unpack(data: Array, widths: Array | int, count: int) -> Array:
    """The `count` values that `pack` put into `data`; int64. A width is at most 56."""
    offsets = np.cumsum(np.broadcast_to(widths, count)) - widths
    # A number of up to 56 bits lies within the 8 bytes from the byte that it starts in.
    padded = np.concatenate([data, np.zeros(_WINDOW_BYTES, np.uint8)])
    windows: Array = np.ndarray(data.size + 1, "<i8", padded, strides=(1,))
    values: Array = windows[offsets >> 3] >> (offsets & 7) & ((1 << widths) - 1)
    return values


def pack_sorted(values: Array, lengths: Array, universe: int) -> list[Array]:
    """Elias-Fano: rows of n ascending numbers below `universe`, near 2 + log2(universe / n) bits.

    Of a number, the low bits stand as they are; the high ones, of all rows, make a string of bits
    in which the j-th number of a row sets bit `high + j` of that row's stretch. Two uint8 arrays:
    that string, then the low bits.
    """
    low_widths, starts, num_bits = _elias_fano(lengths, universe)
    rows, ranks = rows_and_ranks(lengths)
    widths = low_widths[rows]
    bits = np.zeros(num_bits, bool)
    bits[starts[rows] + (values >> widths) + ranks] = True
    return [np.packbits(bits, bitorder="little"), pack(values & ((1 << widths) - 1), widths)]


def sorted_sizes(lengths: Array, universe: int) -> list[int]:
    """Bytes of each array that `pack_sorted` makes for rows of these lengths."""
    low_widths, _, num_bits = _elias_fano(lengths, universe)
    return [num_bytes(num_bits), num_bytes(int((low_widths * lengths).sum()))]


def unpack_sorted(high: Array, low: Array, lengths: Array, universe: int) -> Array:
    """The numbers that `pack_sorted` packed; int64.

    Raises:
        ValueError: the bytes cannot come from `pack_sorted`.
    """
    low_widths, starts, num_bits = _elias_fano(lengths, universe)
    rows, ranks = rows_and_ranks(lengths)
    ones = np.flatnonzero(np.unpackbits(high, count=num_bits, bitorder="little"))
    if ones.size != rows.size:
        raise ValueError(f"expected {rows.size} ids, got {ones.size}")
    widths = low_widths[rows]
    values: Array = (ones - starts[rows] - ranks << widths) + unpack(low, widths, rows.size)
    if values.size and not 0 <= values.min() <= values.max() < universe:
        raise ValueError(f"expected ids below {universe}, got {values.min()} to {values.max()}")
    return values


def num_bytes(num_bits: int) -> int:
    return -(-num_bits // 8)


def rows_and_ranks(lengths: Array) -> tuple[Array, Array]:
    """Of each entry of rows that follow each other: its row, and its place in the row."""
    rows = np.repeat(np.arange(lengths.size), lengths)
    return rows, np.arange(rows.size) - (np.cumsum(lengths) - lengths)[rows]


def _elias_fano(lengths: Array, universe: int) -> tuple[Array, Array, int]:
    """Low bits a number and start in the string of high bits for each row; bits of that string."""
    # floor(log2(universe / n)), by the exponent of the quotient: exact below 2^53.
    low_widths = np.frexp(universe // np.maximum(lengths, 1))[1].astype(np.int64) - 1
    high_bits = lengths + ((universe - 1) >> low_widths)
    ends = np.cumsum(high_bits)
    return low_widths, ends - high_bits, int(ends[-1]) if ends.size else 0
