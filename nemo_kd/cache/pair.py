"""A pair: one .bin and one .idx, a Megatron IndexedDataset with one sequence a sample."""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from nemo_kd.cache.layout import Array, pair_paths

_HEADER_BYTES = 34  # magic 9, version 8, element type 1, number of sequences 8, of documents 8


class PairWriter:
    """Appends one sequence a sample through Megatron's own builder."""

    def __init__(self, directory: Path, name: str, dtype: type[np.generic]) -> None:
        self._bin_path, self._idx_path = pair_paths(directory, name)
        self._dtype = dtype
        self._builder = IndexedDatasetBuilder(str(self._bin_path), dtype)

    def add(self, sequence: Array) -> None:
        self._builder.add_document(sequence, [sequence.size])

    def finish(self) -> None:
        """Write the .idx and bring both files to the disk."""
        if not any(self._builder.sequence_lengths):
            # Megatron cannot map an empty file: one element that no sequence refers to.
            self._builder.data_file.write(self._dtype().tobytes())
        self._builder.finalize(str(self._idx_path))
        for path in (self._bin_path, self._idx_path):
            sync(path)

    def close(self) -> None:
        """Let go of an unfinished .bin; what it still buffers may not fit a full disk."""
        with suppress(OSError):
            self._builder.data_file.close()


class PairReader:
    """A mapped pair. The .idx is compared with what its lengths imply before it is trusted.

    Raises:
        ValueError: the .idx is not what Megatron writes for `num_sequences` sequences of `dtype`,
            or the .bin has another size than the .idx implies.
    """

    def __init__(
        self, directory: Path, name: str, dtype: type[np.generic], num_sequences: int
    ) -> None:
        bin_path, idx_path = pair_paths(directory, name)
        raw = idx_path.read_bytes()
        # Zeros stand in for what a cut file lacks: the comparison below refuses it.
        padded = raw.ljust(_HEADER_BYTES + 4 * num_sequences, b"\0")
        lengths = np.frombuffer(padded, "<i4", num_sequences, _HEADER_BYTES)
        if (lengths < 0).any() or raw != _index_bytes(lengths, dtype):
            raise ValueError(
                f"{idx_path}: expected the index of {num_sequences} sequences of "
                f"{dtype.__name__}, got something else; run nemo-kd verify"
            )
        self._ends = np.cumsum(lengths, dtype=np.int64)
        num_elements = max(int(self._ends[-1]), 1)
        size_bytes = num_elements * dtype().itemsize
        if bin_path.stat().st_size != size_bytes:
            raise ValueError(
                f"{bin_path}: expected {size_bytes} bytes as its .idx says, "
                f"got {bin_path.stat().st_size}; run nemo-kd verify"
            )
        self._elements = np.asarray(np.memmap(bin_path, dtype, mode="r"))
        self.lengths = lengths

    def __getitem__(self, index: int) -> Array:
        end = self._ends[index]
        return self._elements[end - self.lengths[index] : end]


def sync(path: Path) -> None:
    """fsync of a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _index_bytes(lengths: Array, dtype: type[np.generic]) -> bytes:
    """The whole .idx for sequences of these lengths, each a document of its own."""
    lengths = lengths.astype(np.int64)
    pointers = (np.cumsum(lengths) - lengths) * dtype().itemsize
    code = DType.code_from_dtype(dtype)
    header = struct.pack("<9sQBQQ", b"MMIDIDX", 1, code, lengths.size, lengths.size + 1)
    documents = np.arange(lengths.size + 1, dtype=np.int64)
    return header + lengths.astype("<i4").tobytes() + pointers.tobytes() + documents.tobytes()
