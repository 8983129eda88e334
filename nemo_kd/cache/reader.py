"""Reads any sample of a cache, at the same cost wherever it lies."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from io import FileIO
from pathlib import Path

import numpy as np

from nemo_kd.cache.codec import codec_for
from nemo_kd.cache.layout import (
    CHECKSUMS_NAME,
    MANIFEST_NAME,
    SAMPLE_PAIRS,
    SHARD_RECORD_NAME,
    Array,
    Sample,
    checksum,
    pair_paths,
    shard_name,
)
from nemo_kd.cache.manifest import (
    Manifest,
    ShardRecord,
    SourceFile,
    fingerprint_file,
    read_record,
)
from nemo_kd.cache.pair import PairReader

# A shard has at most 15 files to open, so that a process holds at most 240: far from any limit.
_NUM_OPEN_SHARDS = 16


_NO_ROWS = (np.zeros((0, 1), np.int32), np.zeros((0, 1), np.float32), np.zeros(0, np.float32))


class TopKCache:
    """A sequence of samples: `len(cache)`, `cache[i]`, `for sample in cache`.

    Use `TopKCache.open(path)`. The constructor reads only the manifest, so that `verify` can name
    the faults of a cache that `open` refuses. An instance may be pickled, without its open files,
    and shared by threads and forked processes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.manifest = _read_manifest(self.path)
        pairs = _pair_dtypes(self.manifest)
        names = [path.name for pair in pairs for path in pair_paths(Path(), pair)]
        if self.manifest.format_version > 1:
            names.append(CHECKSUMS_NAME)
        self._file_names = sorted(names)
        self._shard: Callable[[int], _Shard] = lru_cache(_NUM_OPEN_SHARDS)(
            partial(_Shard, self.path, self.manifest)
        )

    @classmethod
    def open(cls, path: str | Path) -> TopKCache:
        """Open a cache and check that every shard is there and every file has its size.

        Reads one small record of each shard and opens no pair. `verify` compares checksums.

        Raises:
            ValueError: there is no cache, shards are missing, a record is damaged, or a file has
                another size.
        """
        cache = cls(path)
        present = {entry.name for entry in cache.path.iterdir()}
        missing = [i for i in range(cache.num_shards) if shard_name(i) not in present]
        if missing:
            numbers = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            raise ValueError(
                f"{cache.path}: {len(missing)} of {cache.num_shards} shards are missing "
                f"({numbers}); run the dump again, it writes only those"
            )
        for index in range(cache.num_shards):
            directory = cache.path / shard_name(index)
            for file in cache.shard_record(index).files:
                # A string, because making a Path would take half of the time.
                _check_size(f"{directory}/{file.name}", file)
        return cache

    @property
    def num_shards(self) -> int:
        return self.manifest.num_shards

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`, in arrays of its own. A negative index counts from the end.

        Raises:
            IndexError: there is no such sample.
            ValueError: the sample's bytes are not those that were written; names the file.
        """
        return self.read(index)

    def read(self, index: int, rows: bool = True) -> Sample:
        """The same; without `rows` it has none, as if no token were supervised but in its mask.

        Decoding the rows takes most of the time. Their bytes are read and checked all the same.
        """
        shard, position = self._place(index)
        return shard.sample(position, rows)

    def stored(self, index: int) -> dict[str, Array]:
        """The arrays of sample `index` as they are stored, for a copy of it; errors as `read`.

        In a cache of version 1, which has no checksums of samples, damage is not noticed.
        """
        shard, position = self._place(index)
        return shard.stored(position)

    def _place(self, index: int) -> tuple[_Shard, int]:
        """The shard of a sample, and the sample's place in it."""
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"sample {index} of a cache of {len(self)} samples")
        shard, position = divmod(number, self.manifest.samples_per_shard)
        return self._shard(shard), position

    def num_tokens(self) -> Array:
        """Tokens of each sample, int32 [samples]. Reads one .idx of each shard.

        Raises:
            ValueError: a shard's .idx is not what the manifest says.
        """
        return np.concatenate([*self._lengths("tokens")])

    def used_tokens(self) -> Array:
        """Whether the samples have each id of the vocabulary, bool [V]. Reads all tokens."""
        used = np.zeros(self.manifest.vocab_size, dtype=bool)
        for index in range(self.num_shards):
            path, _ = pair_paths(self.path / shard_name(index), "tokens")
            tokens = np.fromfile(path, dtype=np.int32)
            # Others are damage, which the samples' checksums name.
            used[tokens[(tokens >= 0) & (tokens < len(used))]] = True
        return used

    def num_unsupervised_samples(self) -> int:
        """Samples without a supervised token. Reads one .idx of each shard.

        Raises:
            ValueError: a shard's .idx is not what the manifest says.
        """
        *_, rows = codec_for(self.manifest).pair_dtypes
        return sum(np.count_nonzero(lengths == 0) for lengths in self._lengths(rows))

    def _lengths(self, name: str) -> Iterator[Array]:
        """The elements of each sample in one pair, shard by shard."""
        dtype = _pair_dtypes(self.manifest)[name]
        for index in range(self.num_shards):
            num_samples = len(self.manifest.shard_samples(index))
            yield PairReader(self.path / shard_name(index), name, dtype, num_samples).lengths()

    def __reduce__(self) -> tuple[type[TopKCache], tuple[Path]]:
        return TopKCache, (self.path,)

    def shard_record(self, index: int) -> ShardRecord:
        """The stored counts, sizes and checksums of one shard.

        Raises:
            ValueError: the shard or its record is missing, damaged or another cache's.
        """
        path = self.path / shard_name(index) / SHARD_RECORD_NAME
        if not path.is_file():
            raise ValueError(
                f"{path}: missing; delete {path.parent.name} if it is there and run the dump again"
            )
        record = read_record(ShardRecord, path)
        num_samples = len(self.manifest.shard_samples(index))
        for field, expected, actual in (
            ("format_version", self.manifest.format_version, record.format_version),
            ("index", index, record.index),
            ("manifest_fingerprint", self.manifest.fingerprint, record.manifest_fingerprint),
            ("num_samples", num_samples, record.num_samples),
            ("files", self._file_names, [file.name for file in record.files]),
        ):
            if actual != expected:
                raise ValueError(
                    f"{path}: {field}: expected {expected} by {MANIFEST_NAME}, got {actual}; "
                    "the shard belongs to another cache: delete it and run the dump again"
                )
        return record

    def verify(self, progress: Callable[[int], object] | None = None) -> Iterator[str]:
        """Read every file and yield each fault as a line that names the file.

        Args:
            progress: called with the number of bytes of each piece read.
        """
        for index in range(self.num_shards):
            try:
                record = self.shard_record(index)
            except (ValueError, OSError) as error:
                yield str(error)
                continue
            for file in record.files:
                path = self.path / shard_name(index) / file.name
                try:
                    _check_size(path, file)
                    if fingerprint_file(path, progress) != file:
                        raise ValueError(
                            f"{path}: its checksum differs from that in {SHARD_RECORD_NAME}; "
                            "delete the shard and run the dump again"
                        )
                except ValueError as error:
                    yield str(error)
                except OSError as error:
                    yield f"{path}: {error.strerror}"


class _Shard:
    """The open pairs of one shard."""

    def __init__(self, path: Path, manifest: Manifest, index: int) -> None:
        self._samples = manifest.shard_samples(index)
        self._codec = codec_for(manifest)
        self._directory = path / shard_name(index)
        self._pairs = {
            name: PairReader(self._directory, name, dtype, len(self._samples))
            for name, dtype in _pair_dtypes(manifest).items()
        }
        self._checksums = (
            FileIO(self._directory / CHECKSUMS_NAME) if manifest.format_version > 1 else None
        )

    def sample(self, position: int, with_rows: bool) -> Sample:
        arrays = self.stored(position)
        tokens, loss_mask, rows = arrays["tokens"], arrays["loss_mask"], _NO_ROWS
        if with_rows:
            with self._named(position):
                rows = self._codec.decode(arrays, int(loss_mask.sum()))
        return Sample(tokens, loss_mask, *rows, int(arrays["context_length"][0]))

    def stored(self, position: int) -> dict[str, Array]:
        arrays = {name: pair[position] for name, pair in self._pairs.items()}
        with self._named(position):
            if self._checksums is not None:
                written = os.pread(self._checksums.fileno(), 8, 8 * position)
                if checksum(arrays).to_bytes(8, "little") != written:
                    raise ValueError(f"its checksum differs: {self._changed()}")
            sizes = [arrays[name].size for name in ("loss_mask", "context_length")]
            if sizes != [arrays["tokens"].size, 1]:
                raise ValueError("its pairs do not belong together")
        return arrays

    @contextmanager
    def _named(self, position: int) -> Iterator[None]:
        """Name the sample in an error."""
        try:
            yield
        except ValueError as error:
            raise ValueError(
                f"{self._directory}: sample {self._samples[position]}: {error}; run nemo-kd verify"
            ) from error

    def _changed(self) -> str:
        """Which files are not those that the dump wrote; reads the whole shard."""
        record = read_record(ShardRecord, self._directory / SHARD_RECORD_NAME)
        changed = [f.name for f in record.files if fingerprint_file(self._directory / f.name) != f]
        return f"{', '.join(changed) or 'no file of the shard'} changed since the dump"


def _pair_dtypes(manifest: Manifest) -> dict[str, type]:
    return SAMPLE_PAIRS | codec_for(manifest).pair_dtypes


def _read_manifest(path: Path) -> Manifest:
    if not (path / MANIFEST_NAME).is_file():
        if not path.is_dir():
            found = "a file" if path.exists() else "nothing"
        else:
            names = sorted(entry.name for entry in path.iterdir())
            found = f"a directory with {', '.join(names[:3])}" if names else "an empty directory"
        raise ValueError(
            f"{path}: expected a cache directory with {MANIFEST_NAME}, found {found}; "
            "give the path that the dump had as cache.path"
        )
    return read_record(Manifest, path / MANIFEST_NAME)


def _check_size(path: str | Path, file: SourceFile) -> None:
    try:
        size_bytes = os.stat(path).st_size
    except FileNotFoundError:
        size_bytes = None
    if size_bytes != file.size_bytes:
        found = "nothing" if size_bytes is None else f"{size_bytes} bytes"
        raise ValueError(
            f"{path}: expected {file.size_bytes} bytes, found {found}; "
            "delete the shard and run the dump again"
        )
