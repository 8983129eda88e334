"""Arrays of integers <-> bytes that hold each in only as many bits as it needs.

Bits fill each byte from the lowest up. The last byte of an array is filled up with zeros.
"""

from __future__ import annotations

import numpy as np

from nemo_kd.cache.layout import Array

_WINDOW_BYTES = 8


def pack(values: Array, widths: Array | int) -> Array:
    """The lowest `widths` bits of each value, one after the other, as uint8."""
    widest = int(np.max(widths, initial=0))
    if widest == 0:
        return np.empty(0, np.uint8)
    octets = values.astype("<i8").view(np.uint8).reshape(-1, 8)[:, : num_bytes(widest)]
    bits = np.unpackbits(octets, axis=1, count=widest, bitorder="little")
    if np.min(widths) < widest:
        bits = bits[np.arange(widest) < np.broadcast_to(widths, values.shape)[:, None]]
    return np.packbits(bits, bitorder="little")


def unpack(data: Array, widths: Array | int, count: int) -> Array:
    """The `count` values that `pack` put into `data`, as int64. A width is at most 56."""
    offsets = np.cumsum(np.broadcast_to(widths, count)) - widths
    # A number of up to 56 bits lies within the 8 bytes from the byte that it starts in.
    padded = np.concatenate([data, np.zeros(_WINDOW_BYTES, np.uint8)])
    windows: Array = np.ndarray(data.size + 1, "<i8", padded, strides=(1,))
    values: Array = windows[offsets >> 3] >> (offsets & 7) & ((1 << widths) - 1)
    return values


def pack_sorted(values: Array, lengths: Array, universe: int) -> list[Array]:
    """Elias-Fano code of rows of ascending numbers, concatenated; two uint8 arrays.

    The first holds the high bits: each row has a stretch of it, and the row's j-th number sets bit
    `high + j` there. The second holds the low bits as they are. A number below `universe` in a row
    of n takes about 2 + log2(universe / n) bits.
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
    """The numbers that `pack_sorted` packed, as int64.

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
    """For each entry of concatenated rows: its row, and its place in the row."""
    rows = np.repeat(np.arange(lengths.size), lengths)
    return rows, np.arange(rows.size) - (np.cumsum(lengths) - lengths)[rows]


def as_matrix(values: Array, lengths: Array, filling: float) -> Array:
    """Concatenated rows as a matrix, each row filled up to the longest."""
    num_columns = int(lengths.max(initial=0))
    if values.size == lengths.size * num_columns:
        return values.reshape(lengths.size, num_columns)
    matrix = np.full((lengths.size, num_columns), filling, values.dtype)
    matrix[np.arange(num_columns) < lengths[:, None]] = values
    return matrix


def _elias_fano(lengths: Array, universe: int) -> tuple[Array, Array, int]:
    """Of each row: low bits of a number and start of its stretch; and the bits of all stretches."""
    # floor(log2(universe / n)) is the exponent of the quotient, which is exact below 2^53.
    low_widths = np.frexp(universe // np.maximum(lengths, 1))[1].astype(np.int64) - 1
    high_bits = lengths + ((universe - 1) >> low_widths)
    ends = np.cumsum(high_bits)
    return low_widths, ends - high_bits, int(ends[-1]) if ends.size else 0
