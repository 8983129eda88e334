"""What a cache says about itself: the manifest of the whole and the record of each shard."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from dataclasses import field as dataclass_field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, get_origin

import xxhash

FORMAT_VERSION = 2
# Version 1 has no checksums of the samples.
READABLE_VERSIONS = (1, 2)
_SELECTION_KINDS = ("top_k", "top_p", "sample")
_CODECS = ("raw", "packed")
_SEAL_KEY = "xxh3_128"
_OPTIONAL = "vocabulary"  # a key that caches of earlier releases do not have
_VOCABULARY_TYPES: dict[str, type | tuple[type, ...]] = {
    "base_fingerprint": str,
    "added_tokens": dict,
    "end_id": (int, type(None)),
}
_READ_BYTES = 1 << 20

Record = TypeVar("Record", "Manifest", "ShardRecord")


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file by name, size and content. The name has no directory, so that files may move."""

    name: str
    size_bytes: int
    xxh3_128: str

    def __post_init__(self) -> None:
        _check_types(self)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that shaped a cache. Two runs with equal manifests write equal bytes.

    Args:
        selection: how the kept entries were chosen: `kind` ("top_k", "top_p", "sample"),
            `temperature` (of the teacher's softmax), `k` (top_k: entries a row; top_p: at most),
            `p` (top_p), `num_draws` and `seed` (sample).
        vocab_size: the tokenizer's own size, without padding.
        tokenizer_fingerprint, teacher_fingerprint: equal for equal tokenizers and teachers.
        sources: the files the samples came from, in the order they were read.
        dataset: the settings that shaped the tokens (prompt template, max_seq_length, ...).
        num_samples: samples in the cache, all shards together.
        samples_per_shard: samples in every shard but the last.
        codec: how rows are stored, "raw" or "packed", see nemo_kd.cache.codec.
        vocabulary: of `vocabulary_of`; empty if nothing is known. It follows from the tokenizer and
            shapes no row, so that manifests are compared without it.

    Raises:
        ValueError: a field of the wrong type, out of range, or unknown to this release.
    """

    selection: dict[str, Any]
    vocab_size: int
    tokenizer_fingerprint: str
    teacher_fingerprint: str
    sources: tuple[SourceFile, ...]
    dataset: dict[str, Any]
    num_samples: int
    samples_per_shard: int
    codec: str = "packed"
    format_version: int = FORMAT_VERSION
    vocabulary: dict[str, Any] = dataclass_field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        _check_types(self)
        # Through JSON and back, where a tuple becomes a list: so a manifest equals its stored self.
        for name in ("selection", "dataset"):
            object.__setattr__(self, name, json.loads(json.dumps(getattr(self, name))))
        _check_choice("format_version", self.format_version, READABLE_VERSIONS)
        _check_choice("codec", self.codec, _CODECS)
        _check_range("num_samples", self.num_samples, 2**63 - 1)
        _check_range("samples_per_shard", self.samples_per_shard, 2**31 - 1)
        _check_range("vocab_size", self.vocab_size, 2**31 - 1)
        self._check_selection()
        self._check_vocabulary()

    def _check_vocabulary(self) -> None:
        found: Any = {name: self.vocabulary.get(name) for name in _VOCABULARY_TYPES}
        if not self.vocabulary:
            return
        typed = all(isinstance(found[name], kind) for name, kind in _VOCABULARY_TYPES.items())
        if not typed or self.vocabulary.keys() - found.keys():
            raise ValueError(
                f"vocabulary: expected {', '.join(found)}, got {self.vocabulary!r:.80}"
            )
        for number in (*found["added_tokens"].values(), found["end_id"] or 0):
            if type(number) is not int or not 0 <= number < self.vocab_size:
                raise ValueError(
                    f"vocabulary: expected ids below {self.vocab_size}, got {number!r}"
                )

    def _check_selection(self) -> None:
        kind: Any = self.selection.get("kind")
        _check_choice("selection.kind", kind, _SELECTION_KINDS)
        if kind == "sample":
            _check_range("selection.num_draws", self.selection.get("num_draws"), 2**31 - 1)
        else:
            _check_range("selection.k", self.selection.get("k"), self.vocab_size)
        temperature: Any = self.selection.get("temperature")
        if type(temperature) not in (int, float) or not 0 < temperature < float("inf"):
            raise ValueError(f"selection.temperature: expected a number > 0, got {temperature!r}")
        p: Any = self.selection.get("p")
        if kind == "top_p" and (type(p) not in (int, float) or not 0 < p <= 1):
            raise ValueError(f"selection.p: expected a number above 0, at most 1, got {p!r}")

    @property
    def value_type(self) -> str:
        """A key of manifest.json that follows from the others: how a log-prob is stored."""
        if self.codec == "raw":
            return "float16"
        return "count" if self.selection["kind"] == "sample" else "12 and 5 bits"

    @property
    def ragged(self) -> bool:
        """Rows differ in length."""
        return bool(self.selection["kind"] != "top_k")

    @property
    def max_entries(self) -> int:
        """Entries of the longest row that the selection makes; of every row, unless ragged."""
        if self.selection["kind"] == "sample":
            return min(int(self.selection["num_draws"]), self.vocab_size)
        return int(self.selection["k"])

    @property
    def num_shards(self) -> int:
        return -(-self.num_samples // self.samples_per_shard)

    def shard_samples(self, index: int) -> range:
        """The samples that shard `index` holds."""
        if not 0 <= index < self.num_shards:
            raise ValueError(f"expected a shard from 0 to {self.num_shards - 1}, got {index}")
        start = index * self.samples_per_shard
        return range(start, min(start + self.samples_per_shard, self.num_samples))

    @cached_property
    def fingerprint(self) -> str:
        """The seal of manifest.json; each shard's record carries it."""
        return _hash(_dump(self, seal=""))

    def differences(self, other: "Manifest") -> list[str]:
        """Each field that differs, as "selection.k: 100 against 64"; empty for equal manifests."""
        mine, theirs = (
            _flatten({f.name: getattr(each, f.name) for f in fields(each) if f.compare})
            for each in (self, other)
        )
        return [
            f"{key}: {mine.get(key, 'nothing')!r} against {theirs.get(key, 'nothing')!r}"
            for key in sorted(mine.keys() | theirs.keys())
            if (key in mine, mine.get(key)) != (key in theirs, theirs.get(key))
        ]


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What one shard holds: its counts, and size and checksum of each of its files."""

    index: int
    manifest_fingerprint: str
    num_samples: int
    num_tokens: int
    num_supervised_tokens: int
    files: tuple[SourceFile, ...]
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        _check_types(self)


def fingerprint_file(
    path: str | Path, progress: Callable[[int], object] | None = None
) -> SourceFile:
    """Name, size and xxh3_128 of a file, read in pieces.

    Args:
        progress: called with the number of bytes of each piece read.
    """
    digest, size_bytes = xxhash.xxh3_128(), 0
    with open(path, "rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
            size_bytes += len(piece)
            if progress is not None:
                progress(len(piece))
    return SourceFile(name=Path(path).name, size_bytes=size_bytes, xxh3_128=digest.hexdigest())


def fingerprint_model(files: Iterable[Path], settings: str = "") -> str:
    """Hash a model's files in this order, after `settings`.

    Of each file the size and some blocks are read, so that 700 GB take no longer than 1 GB.
    """
    block, num_blocks = 1 << 16, 64
    digest = xxhash.xxh3_128(settings.encode())
    for file in files:
        size = file.stat().st_size
        digest.update(str(size).encode())
        with open(file, "rb") as stream:
            for number in range(num_blocks):
                stream.seek(number * max(0, size - block) // (num_blocks - 1))
                digest.update(stream.read(block))
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any, size: int | None = None) -> str:
    """Hash of what each id of a tokenizer stands for, and of its end token.

    Equal for equal tokenizers, wherever their files lie.

    Args:
        tokenizer: has `vocab_size`, `eos_id` and `ids_to_tokens`, as NeMo's tokenizers.
        size: the fingerprint of a tokenizer that has the first `size` tokens alone.
    """
    tokens = tokenizer.ids_to_tokens(list(range(size or tokenizer.vocab_size)))
    return _hash_json([tokens, tokenizer.eos_id])


def vocabulary_of(tokenizer: Any) -> dict[str, Any]:
    """What tells by which text a student finds the tokens of a tokenizer.

    Returns:
        `added_tokens`: the id of each added token, special ones too, by its text;
        `base_fingerprint`: hash of all other ids and their texts; `end_id`: of the end token.
        Empty if the tokenizer has no added tokens, as those of sentencepiece.

    Args:
        tokenizer: has `vocab_size`, `eos_id`, `ids_to_tokens`, and as `tokenizer` Hugging Face's.
    """
    texts = tokenizer.ids_to_tokens(list(range(tokenizer.vocab_size)))
    added = set(getattr(getattr(tokenizer, "tokenizer", None), "added_tokens_decoder", ()))
    if not added:
        return {}
    base = [pair for pair in enumerate(texts) if pair[0] not in added]
    return {
        "base_fingerprint": _hash_json(base),
        "added_tokens": {texts[number]: number for number in added if number < len(texts)},
        "end_id": tokenizer.eos_id,
    }


def _hash_json(content: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, default=str).encode())


def record_bytes(record: Manifest | ShardRecord) -> bytes:
    """The record as sealed JSON: one of its keys is the hash of the same text without the hash."""
    return _dump(record, seal=_hash(_dump(record, seal="")))


def read_record(cls: type[Record], path: Path) -> Record:
    """Read what `record_bytes` wrote.

    Raises:
        ValueError: not JSON, a format version this release does not know, a missing or unknown
            key, a wrong type, or bytes that do not match the seal; names the file and the key.
    """
    raw = path.read_bytes()
    try:
        content = json.loads(raw)
        if not isinstance(content, dict):
            raise ValueError(f"expected a JSON object, got {type(content).__name__}")
        version = content.get("format_version")
        if version not in READABLE_VERSIONS:
            known = " and ".join(map(str, READABLE_VERSIONS))
            raise ValueError(f"format version {version}; this release reads {known}")
        seal = content.pop(_SEAL_KEY, None)
        value_type = content.pop("value_type", None) if cls is Manifest else None
        record: Record = _from_json(cls, content)
        if isinstance(record, Manifest):
            _check_choice("value_type", value_type, (record.value_type,))
        # The bytes as they are: to write the record anew would take thrice the time of reading it.
        if not isinstance(seal, str) or _hash(raw.replace(seal.encode(), b"")) != seal:
            raise ValueError("its content does not match its own checksum: damaged or edited")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    return record


def _dump(record: Manifest | ShardRecord, seal: str) -> bytes:
    content = asdict(record) | {_SEAL_KEY: seal}
    if isinstance(record, Manifest):
        content["value_type"] = record.value_type
        if not record.vocabulary:
            del content[_OPTIONAL]
    return (json.dumps(content, sort_keys=True, indent=2, allow_nan=False) + "\n").encode()


def _hash(unsealed: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(unsealed)


def _from_json(cls: type[Any], content: Any, where: str = "") -> Any:
    """A record from parsed JSON; the record's own checks do the rest."""
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected an object, got {content!r}")
    names = {field.name for field in fields(cls)}
    missing = names - content.keys() - {_OPTIONAL}
    for problem, keys in (("missing", missing), ("unknown", content.keys() - names)):
        if keys:
            raise ValueError(f"{problem} key {', '.join(where + key for key in sorted(keys))}")
    values = dict(content)
    for name in ("sources", "files"):
        if isinstance(values.get(name), list):
            values[name] = tuple(
                _from_json(SourceFile, item, f"{name}.{number}.")
                for number, item in enumerate(values[name])
            )
    return cls(**values)


def _check_types(record: Any) -> None:
    for field in fields(record):
        expected: Any = get_origin(field.type) or field.type
        value = getattr(record, field.name)
        if type(value) is not expected:  # isinstance would let True pass for an int
            raise ValueError(f"{field.name}: expected {expected.__name__}, got {value!r}")


def _check_choice(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        choices = ", ".join(map(str, known))
        raise ValueError(f"{name}: expected one that this release knows ({choices}), got {value!r}")


def _check_range(name: str, value: object, highest: int) -> None:
    if type(value) is not int or not 1 <= value <= highest:
        raise ValueError(f"{name}: expected an integer from 1 to {highest}, got {value!r}")


def _flatten(value: Any, key: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; an empty container stays a value."""
    items: Any = enumerate(value) if isinstance(value, (list, tuple)) else ()
    flat: dict[str, Any] = {}
    for name, item in value.items() if isinstance(value, dict) else items:
        flat |= _flatten(item, f"{key}.{name}" if key else str(name))
    return flat or {key: value}
