"""The entry: a file of answers, and the cache of their rows, without those that no filter keeps."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from nemo_kd.cache import CacheWriter, SourceFile, TopKCache
from nemo_kd.cache.layout import Array
from nemo_kd.cache.lease import Lease
from nemo_kd.cache.manifest import FORMAT_VERSION, fingerprint_file
from nemo_kd.chat.answers import read_exchange
from nemo_kd.chat.files import as_jsonl, read_object
from nemo_kd.chat.lines import read_lines
from nemo_kd.chat.samples import fingerprint_source, index_directory, with_found_format
from nemo_kd.config import DataConfig, read_settings, refuse_unknown_keys
from nemo_kd.filters.kinds import Answered, Filter, Named, read_filters
from nemo_kd.parts import Parts
from nemo_kd.yaml_rules import check_yaml_values

_DATA = ("file_names", "format", "prompt_template", "label_key", "index_mapping_dir")
_BLOCK = 256  # lines that are judged together, or more: answers to one prompt stay together
_STAYS = -1


def filter_answers(config: DictConfig) -> None:
    """Keep the answers that `config` describes: see examples/conf/filter_answers.yaml.

    Raises:
        ValueError: A setting, a line, the cache or what an earlier run wrote does not fit.
    """
    check_yaml_values(config, "filter_answers")
    given: Any = OmegaConf.to_container(config, resolve=True)
    refuse_unknown_keys(given["data"], _DATA, "data")
    parts = Parts(given["output"])
    data = given["data"] | {"truncation_field": given["data"]["label_key"]}
    filters = [*read_filters(given["filters"], given["run_untrusted_code"])]
    lines = Lines(
        with_found_format(read_settings(DataConfig, data, "data")),
        [each.keeps for each in filters],
    )
    cache = _cache_of(given["cache"], lines)
    record = {
        "files": [source.xxh3_128 for source in lines.sources],
        "filters": [each.record for each in filters],
        "data": {name: getattr(lines.data, name) for name in ("format", *_DATA[2:4])},
        "cache": cache and cache.manifest.fingerprint,
    }
    parts.check(record)
    if (counts := parts.done()) is not None:
        parts.clean()
        if cache is not None:
            TopKCache.open(given["cache"]["path"])
        print(f"{parts.output}: whole already\n{_table(counts)}")
        return
    if cache is not None and not parts.path.exists():
        _check_new(given["cache"]["path"])
    parts.begin(record)
    with Lease(parts.claim) as held:
        if not held:
            raise ValueError(f"output: another process is writing {parts.output}")
        removed_by = _judge(lines, filters, parts)
        counts = _counts(removed_by, [each.name for each in filters])
        kept = np.flatnonzero(removed_by == _STAYS)
        if not len(kept):
            raise ValueError(f"{parts.output}: no answer would stay:\n{_table(counts)}")
        with parts.new(parts.output) as file:
            for number in kept:
                file.write(lines.bytes_of(number))
        if cache is not None:
            _copy_cache(cache, given["cache"]["path"], kept, parts, record)
        parts.finish(counts)
    print(f"{parts.output}: {len(kept):,} of {len(lines):,} answers\n{_table(counts)}")


class Lines:
    """The lines of all files, in their order. Each is read, and checked, when this is made.

    Raises:
        ValueError: A line does not end with an answer, is none of its format, or lacks what a
            filter looks at; names the file and the line.
    """

    def __init__(self, data: DataConfig, filters: list[Filter]) -> None:
        self.data, self._filters = data, filters
        self.sources = tuple(map(fingerprint_source, data.file_names))
        directory = index_directory(data.index_mapping_dir, self.sources)
        self._files = [as_jsonl(path, directory) for path in data.file_names]
        found = [
            (number, offset, prompt)
            for number, path in enumerate(data.file_names)
            for offset, prompt in read_lines(self._files[number], self._prompt_of, path)
        ]
        if not found:
            raise ValueError(f"{data.file_names[0]}: expected answers, found only empty lines")
        self._of_file, self._offsets, self._prompts = (
            np.array(column, np.uint64) for column in zip(*found, strict=True)
        )

    def __len__(self) -> int:
        return len(self._offsets)

    def blocks(self) -> list[Array]:
        """The numbers of all lines, in blocks: all answers to a prompt are in one, in their order.

        The prompts are in the order of their first lines.
        """
        _, first, prompt = np.unique(self._prompts, return_index=True, return_inverse=True)
        order = np.argsort(first[prompt], kind="stable")
        begins = np.flatnonzero(np.diff(first[prompt][order], prepend=-1))  # of each prompt
        bounds = [0]
        for begin in (*begins.tolist(), len(self)):
            if begin - bounds[-1] >= _BLOCK or begin == len(self):
                bounds.append(begin)
        return [order[start:stop] for start, stop in pairwise(bounds)]

    def __getitem__(self, number: int) -> Answered:
        record = read_object(self.bytes_of(number))
        file = self._of_file[number]
        line = number - int(np.searchsorted(self._of_file, file)) + 1
        place = f"{self.data.file_names[file]}, line {line}"
        return Answered(place, record, read_exchange(record, self.data))

    def bytes_of(self, number: int) -> bytes:
        """The line as it is in its file, with a line feed at its end."""
        with open(self._files[self._of_file[number]], "rb") as stream:
            stream.seek(int(self._offsets[number]))
            return stream.readline().rstrip(b"\r\n") + b"\n"

    def _prompt_of(self, record: dict[str, Any]) -> int:
        for each in self._filters:
            each.check(record)
        return xxhash.xxh3_64_intdigest(repr(read_exchange(record, self.data).turns).encode())


def _judge(lines: Lines, filters: list[Named], parts: Parts) -> Array:
    """Which filter removes each line, by its number, or _STAYS; int16 [lines].

    Blocks that an interrupted run has judged are read.
    """
    blocks = lines.blocks()
    removed_by = np.full(len(lines), _STAYS, np.int16)
    missing = set(parts.missing(len(blocks)))
    bar = tqdm(
        total=len(lines), desc=parts.output.name, unit=" answers", dynamic_ncols=True, disable=None
    )
    with bar:
        for number, block in enumerate(blocks):
            if number in missing:
                found = _judge_block([lines[i] for i in block], filters)
                parts.write(number, {"removed_by": found})
            removed_by[block] = parts.read(number)["removed_by"]
            bar.update(len(block))
    return removed_by


def _judge_block(block: list[Answered], filters: list[Named]) -> Array:
    removed_by = np.full(len(block), _STAYS, np.int16)
    for number, each in enumerate(filters):
        left = np.flatnonzero(removed_by == _STAYS)
        kept = np.array(each.keeps([block[i] for i in left]), bool)
        removed_by[left[~kept]] = number
    return removed_by


def _cache_of(section: dict[str, Any], lines: Lines) -> TopKCache | None:
    """The cache of the rows, if there is one.

    Raises:
        ValueError: It was not made of these files.
    """
    if (section["source"] is None) != (section["path"] is None):
        raise ValueError(
            "cache: expected source, the cache of the rows, and path, a new directory, or neither"
        )
    if section["source"] is None:
        return None
    cache = TopKCache.open(section["source"])

    def contents(sources: tuple[SourceFile, ...]) -> list[tuple[str, int]]:
        return [(source.xxh3_128, source.size_bytes) for source in sources]

    if contents(cache.manifest.sources) != contents(lines.sources) or len(cache) != len(lines):
        names = ", ".join(source.name for source in cache.manifest.sources)
        raise ValueError(
            f"cache.source: expected the cache of {', '.join(lines.data.file_names)}, one sample a "
            f"line, got one of {len(cache)} samples that was made of {names}"
        )
    if cache.manifest.format_version == 1:  # a sample has no checksum, but a file has
        for fault in cache.verify():
            raise ValueError(fault)
    return cache


def _check_new(path: str) -> None:
    if Path(path).exists() and any(Path(path).iterdir()):
        raise ValueError(f"cache.path: expected a new directory, but {path} exists")
    there = next(each for each in Path(path).absolute().parents if each.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"cache.path: expected a directory to write in, got {path}")


def _copy_cache(
    cache: TopKCache, path: str, kept: Array, parts: Parts, record: dict[str, Any]
) -> None:
    """Write the cache of the kept lines: its sample i is line i of the output."""
    manifest = replace(
        cache.manifest,
        sources=(fingerprint_file(parts.output),),
        dataset=cache.manifest.dataset | {"filtered": record},
        num_samples=len(kept),
        format_version=FORMAT_VERSION,
    )
    CacheWriter.open(path, manifest).copy(lambda number: cache.stored(int(kept[number])))


def _counts(removed_by: Array, names: list[str]) -> dict[str, Any]:
    removed = Counter(removed_by.tolist())
    return {
        "answers": len(removed_by),
        "kept": removed[_STAYS],
        "filters": [
            {"filter": name, "removed": removed[number]} for number, name in enumerate(names)
        ],
    }


def _table(counts: dict[str, Any]) -> str:
    found = [tuple(each.values()) for each in counts["filters"]]
    left, width = counts["answers"], max(len(name) for name in ("filter", *dict(found)))
    rows = [f"{'filter':{width}}  {'looks at':>10}  {'removes':>10}  {'leaves':>10}"]
    for name, removed in found:
        rows.append(f"{name:{width}}  {left:>10,}  {removed:>10,}  {left - removed:>10,}")
        left -= removed
    return "\n".join(rows)
