"""The entry: a file of answers, and the cache of their rows, without those that no filter keeps."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import xxhash
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from nemo_kd.cache import CacheWriter, SourceFile, TopKCache
from nemo_kd.cache.layout import Array
from nemo_kd.cache.lease import Lease
from nemo_kd.cache.manifest import FORMAT_VERSION, fingerprint_file
from nemo_kd.chat.answers import Exchange, read_exchange
from nemo_kd.chat.files import as_jsonl, read_object
from nemo_kd.chat.lines import read_lines
from nemo_kd.chat.samples import fingerprint_source, index_directory, with_found_format
from nemo_kd.config import DataConfig, read_settings, refuse_unknown_keys
from nemo_kd.filters.kinds import Answered, Duplicates, Filter, read_filters
from nemo_kd.parts import Parts
from nemo_kd.yaml_rules import check_yaml_values

_DATA = ("file_names", "format", "prompt_template", "label_key", "index_mapping_dir")
_BLOCK = 256  # lines that are judged together, or a few more: answers to one prompt stay together
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
        with_found_format(read_settings(DataConfig, data, "data")), [each for _, each in filters]
    )
    cache = _cache_of(given["cache"], lines)
    record = {
        "files": [source.xxh3_128 for source in lines.sources],
        "filters": [_record_of(each) for each in given["filters"]],
        "data": {name: getattr(lines.data, name) for name in ("format", *_DATA[2:4])},
        "cache": cache and cache.manifest.fingerprint,
    }
    parts.check(record)
    if (counts := parts.done()) is not None:
        parts.clean()
        print(f"{parts.output}: whole already\n{_table(counts)}")
        return
    parts.begin(record)
    with Lease(parts.claim) as held:
        if not held:
            raise ValueError(f"output: another process is writing {parts.output}")
        removed_by = _judge(lines, filters, parts)
        counts = _counts(removed_by, [name for name, _ in filters])
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
        ValueError: A line has no answer, is none of its format, or lacks what a filter looks at;
            names the file and the line.
    """

    def __init__(self, data: DataConfig, filters: list[Filter]) -> None:
        self.data, self._filters = data, filters
        self.sources = tuple(map(fingerprint_source, data.file_names))
        directory = index_directory(data.index_mapping_dir, self.sources)
        self._places: list[tuple[str, str, int]] = []  # file, name of the line, and offset
        prompts: list[int] = []
        for path in data.file_names:
            file = as_jsonl(path, directory)
            for number, (offset, prompt) in enumerate(read_lines(file, self._prompt_of, path), 1):
                self._places.append((file, f"{path}, line {number}", offset))
                prompts.append(prompt)
        if not prompts:
            raise ValueError(f"{data.file_names[0]}: expected answers, found only empty lines")
        self._prompts = np.array(prompts, np.uint64)

    def __len__(self) -> int:
        return len(self._places)

    def blocks(self) -> list[range]:
        """All lines, in ranges that never part answers to one prompt that follow each other."""
        # Where another prompt begins than that of the line before.
        begins = np.flatnonzero(self._prompts[1:] != self._prompts[:-1]) + 1
        bounds = [0]
        for begin in (*begins.tolist(), len(self)):
            if begin - bounds[-1] >= _BLOCK or begin == len(self):
                bounds.append(begin)
        return [range(*bound) for bound in pairwise(bounds)]

    def __getitem__(self, number: int) -> Answered:
        record = read_object(self.bytes_of(number))
        return Answered(self._places[number][1], record, self._read(record))

    def bytes_of(self, number: int) -> bytes:
        """The line as it is in its file, with its end."""
        file, _, offset = self._places[number]
        with open(file, "rb") as stream:
            stream.seek(offset)
            return stream.readline().rstrip(b"\r\n") + b"\n"

    def _read(self, record: dict[str, Any]) -> Exchange:
        exchange = read_exchange(record, self.data)
        if not exchange.answer.strip():
            raise ValueError("expected an answer, found none")
        return exchange

    def _prompt_of(self, record: dict[str, Any]) -> int:
        for each in self._filters:
            each.check(record)
        return xxhash.xxh3_64_intdigest(repr(self._read(record).turns).encode())


def _record_of(given: Any) -> Any:
    """A filter's settings, with the content of the files that it reads."""
    if isinstance(given, str) or "file_names" not in given:
        return given
    return {**given, "file_names": [fingerprint_source(p).xxh3_128 for p in given["file_names"]]}


def _judge(lines: Lines, filters: list[tuple[str, Filter]], parts: Parts) -> Array:
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
            if number not in missing:
                found = parts.read(number)["removed_by"]
                _remember([lines[i] for i in block], found, filters)
            else:
                found = _judge_block([lines[i] for i in block], filters)
                parts.write(number, {"removed_by": found})
            removed_by[block.start : block.stop] = found
            bar.update(len(block))
    return removed_by


def _judge_block(block: list[Answered], filters: list[tuple[str, Filter]]) -> Array:
    removed_by = np.full(len(block), _STAYS, np.int16)
    for number, (_, keeps) in enumerate(filters):
        left = np.flatnonzero(removed_by == _STAYS)
        kept = np.array(keeps([block[i] for i in left]), bool)
        removed_by[left[~kept]] = number
    return removed_by


def _remember(block: list[Answered], found: Array, filters: list[tuple[str, Filter]]) -> None:
    """Show a judged block to the filters that compare with earlier answers."""
    for number, (_, each) in enumerate(filters):
        if isinstance(each, Duplicates):
            reached = (found == _STAYS) | (found >= number)
            each([line for line, here in zip(block, reached, strict=True) if here])


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
    return cache


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
