"""Fills a cache: any number of processes at once; each shard is published whole or not at all."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemo_kd.cache.check import check_sample
from nemo_kd.cache.codec import codec_for
from nemo_kd.cache.layout import (
    CHECKSUMS_NAME,
    MANIFEST_NAME,
    SAMPLE_PAIRS,
    SHARD_RECORD_NAME,
    Array,
    Sample,
    checksum,
    shard_name,
)
from nemo_kd.cache.lease import Lease, is_alive, is_free, this_host
from nemo_kd.cache.manifest import (
    Manifest,
    ShardRecord,
    fingerprint_file,
    read_record,
    record_bytes,
)
from nemo_kd.cache.pair import PairWriter, sync

_TEMPORARY = ".tmp"
_LEASE = ".tmp-claim-"


@dataclass(frozen=True)
class CacheWriter:
    """A cache open for writing, made by `CacheWriter.open`."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, manifest: Manifest) -> CacheWriter:
        """Create the cache, or resume one that has the same manifest.

        Also removes what dead processes of this host left unfinished.

        Raises:
            ValueError: the directory holds a cache with another manifest, or no cache at all;
                nothing in it is touched.
        """
        cls.check(path, manifest)
        path = Path(path).absolute()
        path.mkdir(parents=True, exist_ok=True)
        if not (path / MANIFEST_NAME).exists():
            _create_manifest(path, manifest)
        # Compared again, because another process may have created the cache since.
        existing = _compare(path, manifest)
        _remove_leftovers(path)
        # The stored one, not its equal: it may have 1 for 1.0, and the shards carry its seal.
        return cls(path, existing)

    @staticmethod
    def check(path: str | Path, manifest: Manifest) -> None:
        """Refuse what `open` would refuse. Writes nothing.

        Raises:
            ValueError: as `open`; or the directory cannot be written.
        """
        path = Path(path).absolute()
        there = next(each for each in (path, *path.parents) if each.exists())
        if not there.is_dir():
            raise ValueError(f"{path}: expected a directory for the cache, found the file {there}")
        if not os.access(there, os.W_OK | os.X_OK):
            raise ValueError(f"{path}: expected to write the cache, but {there} is not writable")
        names = os.listdir(path) if there == path else []
        foreign = [name for name in names if not name.startswith(_TEMPORARY)]
        if MANIFEST_NAME in foreign:
            _compare(path, manifest)
        elif foreign:
            raise ValueError(
                f"{path}: expected an empty directory or a cache, found {min(foreign)} and no "
                f"{MANIFEST_NAME}; choose another cache.path"
            )

    def missing_shards(self, shards: Iterable[int] | None = None) -> list[int]:
        """Those of `shards`, by default of all shards, that are not there yet; ascending."""
        wanted = sorted(set(range(self.manifest.num_shards) if shards is None else shards))
        for index in wanted:
            self.manifest.shard_samples(index)  # refuses a shard that the cache does not have
        present = set(os.listdir(self.path))
        return [index for index in wanted if shard_name(index) not in present]

    def claim_shards(
        self, shards: Iterable[int] | None = None, *, wait: Callable[[], object] | None = None
    ) -> Iterator[int]:
        """Yield the missing shards, of `shards` or of all, that no other process has claimed.

        A shard is this process's until the next one is asked for or the iterator is closed. It must
        be written by then. A claim of a dead process is free at once on the same host, and after
        ten minutes without a heartbeat elsewhere.

        Args:
            wait: sleeps for a moment, or raises to stop. With it, the iterator also waits for the
                shards that others have claimed, and yields those that they give up. Without it, it
                leaves them to the others.
        """
        wanted = self.missing_shards(shards)
        while wanted:
            for index in wanted:
                final = self.path / shard_name(index)
                if final.exists():  # published since the shards were listed
                    continue
                lease = Lease(self.path / f"{_LEASE}{index:05d}")
                with _full_disk_named(self.path, index), lease as held:
                    # Looked at again, because another may have published it before the claim.
                    if held and not final.exists():
                        yield index
            if wait is None:
                return
            if wanted := self.missing_shards(wanted):
                wait()

    def fill(self, samples: Iterable[Sample]) -> None:
        """Write the missing shards of all of the cache's samples, which come in their order."""
        missing, rest = set(self.missing_shards()), iter(samples)
        for index in range(self.manifest.num_shards):
            own = itertools.islice(rest, len(self.manifest.shard_samples(index)))
            if index not in missing:
                deque(own, maxlen=0)  # passed over
                continue
            with self.shard(index) as shard:
                for sample in own:
                    shard.add(**sample._asdict())

    def copy(self, stored: Callable[[int], dict[str, Array]]) -> None:
        """Write the missing shards with samples of another cache, byte for byte.

        Args:
            stored: the arrays of this cache's sample i, as `TopKCache.stored` gives them.
        """
        for index in self.missing_shards():
            with self.shard(index) as shard:
                for number in self.manifest.shard_samples(index):
                    shard.add_stored(stored(number))

    @contextmanager
    def shard(self, index: int) -> Iterator[ShardWriter]:
        """Write one shard. It is published at a clean exit, and removed after an exception.

        Raises:
            ValueError: at the exit, if it did not get exactly its samples.
            OSError: for example, the disk is full; the cache is as it was.
        """
        temporary = _temporary_path(self.path)
        try:
            with _full_disk_named(self.path, index):
                temporary.mkdir()
                with closing(ShardWriter(temporary, self.manifest, index)) as writer:
                    yield writer
                    writer.finish()
                _publish(temporary, self.path / shard_name(index))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


class ShardWriter:
    """Takes the samples of one shard in order. Each is written at once."""

    def __init__(self, directory: Path, manifest: Manifest, index: int) -> None:
        self._directory = directory
        self._manifest = manifest
        self._index = index
        self._samples = manifest.shard_samples(index)
        self._codec = codec_for(manifest)
        self._pairs = {
            name: PairWriter(directory, name, dtype)
            for name, dtype in (SAMPLE_PAIRS | self._codec.pair_dtypes).items()
        }
        self._checksums: list[int] = []
        self._num_tokens = self._num_supervised_tokens = 0

    def add(
        self,
        tokens: Array,
        loss_mask: Array,
        context_length: int,
        topk_ids: Array,
        topk_log_probs: Array,
        tail_log_probs: Array,
    ) -> None:
        """Append the next sample.

        Args:
            tokens: integer [T], each in [0, V).
            loss_mask: integer or bool [T], 1 where the token is to be predicted, never at t = 0.
            context_length: tokens of the prompt, 0 to T.
            topk_ids: integer [P, K], P the ones of loss_mask; each in [0, V), and at most once a
                row. Ragged rows are padded by -1.
            topk_log_probs: float [P, K], log of the teacher's softmax; -inf is allowed.
            tail_log_probs: float [P], log of the mass outside the kept entries; -inf is allowed.

        Raises:
            ValueError: the sample is anything else; nothing of it is written.
        """
        number = self._samples.start + len(self._checksums)
        sample = Sample(tokens, loss_mask, topk_ids, topk_log_probs, tail_log_probs, context_length)
        try:
            check_sample(sample, self._manifest)
        except ValueError as error:
            raise ValueError(f"sample {number}: {error}") from error
        sequences = {
            "tokens": tokens,
            "loss_mask": loss_mask,
            "context_length": np.array([context_length]),
            **self._codec.encode(topk_ids, topk_log_probs, tail_log_probs),
        }
        self.add_stored(sequences)

    def add_stored(self, sequences: dict[str, Array]) -> None:
        """Append the next sample, which has been checked and encoded.

        Raises:
            ValueError: the shard has all of its samples.
        """
        if len(self._checksums) == len(self._samples):
            raise ValueError(f"{self._holds()}, got one more")
        written = {name: pair.add(sequences[name]) for name, pair in self._pairs.items()}
        self._checksums.append(checksum(written))
        self._num_tokens += len(written["tokens"])
        self._num_supervised_tokens += int(written["loss_mask"].sum())

    def finish(self) -> None:
        """Complete the files and flush them to the disk."""
        if len(self._checksums) != len(self._samples):
            raise ValueError(f"{self._holds()}, got {len(self._checksums)}")
        for pair in self._pairs.values():
            pair.finish()
        _write(self._directory / CHECKSUMS_NAME, np.array(self._checksums, "<u8").tobytes())
        record = ShardRecord(
            index=self._index,
            manifest_fingerprint=self._manifest.fingerprint,
            num_samples=len(self._checksums),
            num_tokens=self._num_tokens,
            num_supervised_tokens=self._num_supervised_tokens,
            files=tuple(fingerprint_file(path) for path in sorted(self._directory.iterdir())),
        )
        _write(self._directory / SHARD_RECORD_NAME, record_bytes(record))
        sync(self._directory)

    def close(self) -> None:
        """Close the files, finished or not."""
        for pair in self._pairs.values():
            pair.close()

    def _holds(self) -> str:
        return (
            f"shard {self._index} holds samples {self._samples.start} to {self._samples.stop - 1}: "
            f"expected {len(self._samples)} samples"
        )


@contextmanager
def _full_disk_named(path: Path, index: int) -> Iterator[None]:
    """Raise the error of a full disk as one that says what became of the cache."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"{os.strerror(error.errno)}: shard {index} of {path} was not written, the "
            "cache is as it was before; free some space and run again, which resumes there",
        ) from error


def _compare(path: Path, manifest: Manifest) -> Manifest:
    """The manifest of the cache at `path`, which must equal this run's."""
    existing = read_record(Manifest, path / MANIFEST_NAME)
    if differences := existing.differences(manifest):
        raise ValueError(
            f"{path} was written with other settings (the cache's against this run's): "
            f"{'; '.join(differences)}. Delete it or choose another cache.path"
        )
    return existing


def _create_manifest(path: Path, manifest: Manifest) -> None:
    """Publish the manifest, unless another process is first."""
    temporary = _temporary_path(path)
    try:
        _write(temporary, record_bytes(manifest))
        # A link, because a rename would replace the manifest of another process.
        try:
            os.link(temporary, path / MANIFEST_NAME)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            os.rename(temporary, path / MANIFEST_NAME)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    sync(path)


def _publish(temporary: Path, final: Path) -> None:
    """Rename, which is atomic. A shard that is there already has the same bytes and stays."""
    try:
        os.rename(temporary, final)
    except OSError:
        if not final.exists():
            raise
    sync(final.parent)


_temporary_numbers = itertools.count()


def _temporary_path(directory: Path) -> Path:
    return directory / f"{_TEMPORARY}+{this_host()}+{os.getpid()}+{next(_temporary_numbers)}"


def _remove_leftovers(path: Path) -> None:
    """Remove what dead processes of this host left, free claims, and claims on finished shards."""
    of_this_host = f"{_TEMPORARY}+{this_host()}+"
    for entry in path.iterdir():
        if entry.name.startswith(_LEASE):
            index = int(entry.name.removeprefix(_LEASE))
            if (path / shard_name(index)).exists() or is_free(entry):
                entry.unlink(missing_ok=True)
        elif entry.name.startswith(of_this_host) and not is_alive(int(entry.name.split("+")[2])):
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
