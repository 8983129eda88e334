"""Files of SFT data: jsonl, compressed jsonl, parquet, and what Hugging Face datasets saves."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash
from tqdm import tqdm

from nemo_kd.chat.formats import detect

_COMPRESSED = (".gz", ".zst", ".bz2")


def is_dataset_directory(path: str | Path) -> bool:
    """Whether Hugging Face datasets saved a dataset there."""
    return any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def require(path: str) -> None:
    """Raise a ValueError if there is no such file or directory."""
    if not os.path.exists(path):
        raise ValueError(f"data.file_names: expected files, found no {path}")


def as_jsonl(path: str, directory: str) -> str:
    """A plain jsonl with the samples of `path`: the file itself, or one made in `directory`.

    Any number of processes may call this at once.

    Args:
        path: A jsonl; one compressed as .gz, .zst or .bz2; a parquet file; or a directory that
            Hugging Face datasets saved.
        directory: Where the jsonl is made. It should be named by the content of `path`.

    Raises:
        ValueError: There is no such file, or it cannot be read.
    """
    require(path)
    if _is_plain(path):
        return path
    place = xxhash.xxh3_64_hexdigest(os.path.abspath(path).encode())  # two may have one name
    made = os.path.join(directory, f"{os.path.basename(os.path.normpath(path))}-{place}.jsonl")
    if not os.path.exists(made):
        descriptor, temporary = tempfile.mkstemp(dir=directory)
        try:
            with os.fdopen(descriptor, "wb") as file:
                bar = tqdm(desc=f"reading {path}", unit=" samples", delay=2, disable=None)
                with bar:
                    for line in _lines(path):
                        file.write(line)
                        bar.update()
            os.replace(temporary, made)
        except BaseException:
            os.unlink(temporary)
            raise
    return made


def format_of(paths: Sequence[str], template_keys: list[str], optional: Sequence[str] = ()) -> str:
    """The format of files, by the first line of each.

    Args:
        paths: The files, of any kind that `as_jsonl` takes.
        template_keys: The keys of `prompt_template`.
        optional: Keys that a line may lack, as the answer of a prompt.

    Raises:
        ValueError: A first line has no format's keys, or the formats differ; names the file.
    """
    found: dict[str, str] = {}
    for path in paths:
        line = _first_line(path)
        try:
            record = dict.fromkeys(optional, "") | read_object(line)
            found[path] = detect(record, template_keys)
        except ValueError as error:
            raise ValueError(f"{path}, line 1: {error}") from error
    kinds = set(found.values())
    if len(kinds) > 1:
        shown = ", ".join(f"{path} ({kind})" for path, kind in found.items())
        raise ValueError(f"expected files of one format, got {shown}; dump them to several caches")
    return kinds.pop()


def _first_line(path: str) -> bytes:
    if not _is_plain(path):
        line = next(_lines(path), b"")
    elif os.path.getsize(path):
        with open(path, "rb") as file:
            line = file.readline()
    else:
        raise ValueError(f"{path}: expected samples, found an empty file")
    if not line.strip(b"\n"):
        raise ValueError(f"{path}, line 1: expected a JSON object, got an empty line")
    return line


def read_object(line: bytes) -> dict[str, Any]:
    """One line of a jsonl.

    Raises:
        ValueError: It is not UTF-8, or no JSON object.
    """
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8, got {error}; convert the file") from error
    except (ValueError, RecursionError) as error:
        if line.startswith(b"\xef\xbb\xbf"):
            raise ValueError(
                "expected a JSON object, got a byte order mark before it; remove the file's first "
                "three bytes"
            ) from error
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {record!r:.60}")
    return record


def _is_plain(path: str) -> bool:
    return os.path.isfile(path) and not path.endswith((*_COMPRESSED, ".parquet"))


def _lines(path: str) -> Iterator[bytes]:
    """The samples of a file that is no plain jsonl, each a line."""
    if path.endswith(_COMPRESSED):
        yield from _compressed_lines(path)
        return
    for number, record in enumerate(_records(path), 1):
        try:
            yield json.dumps(_without_nulls(record), ensure_ascii=False).encode() + b"\n"
        except (TypeError, UnicodeEncodeError) as error:
            raise ValueError(
                f"{path}, sample {number}: expected texts, numbers and lists, got {error}"
            ) from error


def _compressed_lines(path: str) -> Iterator[bytes]:
    import pyarrow

    try:
        # A text that is cut off, or damaged, raises OSError or EOFError.
        with pyarrow.input_stream(path, compression="detect") as stream:
            rest = b""
            while block := stream.read(2**20):
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    yield line + b"\n"
            if rest:
                yield rest
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path}: cannot be decompressed: {error}") from error


def _records(path: str) -> Iterator[dict[str, Any]]:
    try:
        if os.path.isdir(path):
            yield from _saved_dataset(path)
            return
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
        raise ValueError(f"{path}: cannot be read: {error}") from error


def _saved_dataset(path: str) -> Any:
    import datasets

    if not is_dataset_directory(path):
        raise ValueError("expected a file, or a directory that Hugging Face datasets saved")
    dataset = datasets.load_from_disk(path)
    if isinstance(dataset, datasets.DatasetDict):
        raise ValueError(f"expected one split, found {', '.join(dataset)}; name {path}/SPLIT")
    return dataset


def _without_nulls(value: Any) -> Any:
    """Without the keys that Arrow adds to an object because another object of the set has them."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
