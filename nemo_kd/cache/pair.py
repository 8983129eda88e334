"""A pair, one .bin and one .idx: a Megatron IndexedDataset with one sequence for each sample."""

from __future__ import annotations

import os
import struct
import warnings
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from nemo_kd.cache.layout import Array, pair_paths

with warnings.catch_warnings():  # of extensions for which a cache has no use
    warnings.filterwarnings("ignore", message="(Transformer Engine and )?Apex (is|are) not")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

# The start of an .idx: magic, version, element type, number of sequences, number of documents.
_HEADER = struct.Struct("<9sQBQQ")
_LENGTH, _PLACE = np.dtype("<i4"), np.dtype("<i8")


class PairWriter:
    """Appends sequences through Megatron's own builder."""

    def __init__(self, directory: Path, name: str, dtype: type[np.generic]) -> None:
        self._bin_path, self._idx_path = pair_paths(directory, name)
        self._dtype = dtype
        self._builder = IndexedDatasetBuilder(str(self._bin_path), dtype)

    def add(self, sequence: Array) -> Array:
        """Append a sequence; returns it as it is stored, contiguous and of the element type."""
        stored = np.ascontiguousarray(sequence, self._dtype)
        self._builder.add_document(stored, [stored.size])
        return stored

    def finish(self) -> None:
        """Write the .idx and bring both files to the disk."""
        if not any(self._builder.sequence_lengths):
            # Megatron cannot map an empty file: one element that no sequence refers to.
            self._builder.data_file.write(self._dtype().tobytes())
        self._builder.finalize(str(self._idx_path))
        for path in (self._bin_path, self._idx_path):
            sync(path)

    def close(self) -> None:
        """Close an unfinished .bin."""
        with suppress(OSError):  # on a full disk its buffer cannot be written
            self._builder.data_file.close()


class PairReader:
    """Reads one sequence at a time, at the same cost for any number of sequences.

    The files are read with pread, not mapped. A process that reads a map of a file that is cut
    meanwhile dies, a map's pages count as the process's memory, and the bytes are copied anyway.
    Threads and forked processes may share it, because pread moves no position in a file.

    Raises:
        ValueError: the .idx is not one of `num_sequences` sequences of `dtype`.
    """

    def __init__(
        self, directory: Path, name: str, dtype: type[np.generic], num_sequences: int
    ) -> None:
        self._bin, self._idx = (FileIO(path) for path in pair_paths(directory, name))
        self._dtype = np.dtype(dtype)
        self._num_sequences = num_sequences
        self._bin_bytes = os.fstat(self._bin.fileno()).st_size
        code, num_documents = DType.code_from_dtype(dtype), num_sequences + 1
        header = _HEADER.pack(b"MMIDIDX", 1, code, num_sequences, num_documents)
        # A length and a place for each sequence follow, and an int64 for each document.
        index_bytes = _HEADER.size + (4 + 8) * num_sequences + 8 * num_documents
        if (
            os.fstat(self._idx.fileno()).st_size != index_bytes
            or os.pread(self._idx.fileno(), _HEADER.size, 0) != header
        ):
            raise ValueError(
                f"{self._idx.name}: expected the index of {num_sequences} sequences of "
                f"{dtype.__name__}, got something else; run nemo-kd verify"
            )

    def __getitem__(self, index: int) -> Array:
        """Sequence `index`, in memory of its own.

        Raises:
            ValueError: its length and its place contradict each other or the .bin's size.
        """
        (length,) = self._read(self._idx, _LENGTH, 1, _HEADER.size + 4 * index).tolist()
        is_last = index + 1 == self._num_sequences
        place = _HEADER.size + 4 * self._num_sequences + 8 * index
        start, *after = self._read(self._idx, _PLACE, 1 if is_last else 2, place).tolist()
        end = start + length * self._dtype.itemsize
        # The file ends after the last sequence, except if all are empty: then it has one element.
        is_empty = is_last and end == 0 and self._bin_bytes == self._dtype.itemsize
        expected_end = after[0] if after else 0 if is_empty else self._bin_bytes
        if not 0 <= start <= end == expected_end <= self._bin_bytes:
            raise ValueError(
                f"{self._idx.name}: sequence {index}: {length} elements from byte {start} "
                f"contradict what follows or the {self._bin_bytes} bytes of the .bin; run "
                "nemo-kd verify"
            )
        return self._read(self._bin, self._dtype, length, start)

    def lengths(self) -> Array:
        """Elements of each sequence, int32. Reads only the .idx."""
        return self._read(self._idx, _LENGTH, self._num_sequences, _HEADER.size)

    @staticmethod
    def _read(file: FileIO, dtype: np.dtype[Any], count: int, offset: int) -> Array:
        elements = bytearray(count * dtype.itemsize)
        if os.preadv(file.fileno(), [elements], offset) != len(elements):
            raise ValueError(f"{file.name}: it was cut while it was read; run nemo-kd verify")
        return np.frombuffer(elements, dtype)


def sync(path: Path) -> None:
    """fsync of a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
