"""nemo-kd: looks at a cache and checks it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nemo_kd.cache import Sample, TopKCache
from nemo_kd.cache.codec import codec_for

# Kept mass is a mean over rows: some thousand samples give it to three digits, in seconds.
_NUM_MASS_SAMPLES = 4096


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 1 for a fault or an error."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ValueError, OSError) as error:
        print(f"nemo-kd {arguments.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nemo-kd", description="Look at and check a cache of teacher rows."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    inspect = commands.add_parser(
        "inspect",
        help="say what a cache holds",
        description="Say what a cache holds: samples, tokens, bytes, what shaped it, and how much "
        "of the teacher's mass the first K entries of a row keep.",
    )
    inspect.add_argument("cache", metavar="CACHE", help="the directory that the dump wrote")
    inspect.add_argument("--json", action="store_true", help="print one JSON object instead")
    inspect.set_defaults(run=_inspect)

    verify = commands.add_parser(
        "verify",
        help="read every file of a cache and check it",
        description="Read every file of a cache and compare it with the size and the checksum "
        "that were stored with it. Each fault is one line on stdout; exit code 1 if there is any.",
    )
    verify.add_argument("cache", metavar="CACHE", help="the directory that the dump wrote")
    verify.set_defaults(run=_verify)
    return parser


def _inspect(arguments: argparse.Namespace) -> int:
    summary = summarize(TopKCache.open(arguments.cache))
    print(json.dumps(summary, indent=2) if arguments.json else _as_text(summary))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    cache = TopKCache(arguments.cache)
    num_faults = 0
    size_bytes = sum(path.stat().st_size for path in cache.path.glob("shard-*/*.*"))
    with tqdm(total=size_bytes, unit="B", unit_scale=True, disable=None) as progress:
        for fault in cache.verify(progress.update):
            num_faults += 1
            progress.write(fault, file=sys.stdout)
    if num_faults:
        print(f"{cache.path}: faults found: {num_faults}", file=sys.stderr)
        return 1
    print(f"{cache.path}: {cache.num_shards} shards, every file as it was written")
    return 0


def summarize(cache: TopKCache) -> dict[str, Any]:
    """What a cache holds, as plain JSON values; None where there is no supervised token.

    Counts and bytes are those of the whole cache; kept entries and mass are means over the rows
    of some thousand samples, evenly spaced.
    """
    manifest = cache.manifest
    records = [cache.shard_record(index) for index in range(cache.num_shards)]
    row_pairs = codec_for(manifest).pair_dtypes
    files = [file for record in records for file in record.files]
    size_bytes = sum(file.size_bytes for file in files)
    row_bytes = sum(file.size_bytes for file in files if Path(file.name).stem in row_pairs)
    num_supervised_tokens = sum(record.num_supervised_tokens for record in records)
    stride = -(-len(cache) // _NUM_MASS_SAMPLES)
    numbers = tqdm(range(0, len(cache), stride), unit=" samples", leave=False, disable=None)
    return {
        "path": str(cache.path),
        "num_samples": len(cache),
        "num_shards": cache.num_shards,
        "num_tokens": sum(record.num_tokens for record in records),
        "num_supervised_tokens": num_supervised_tokens,
        "size_bytes": size_bytes,
        "bytes_per_supervised_token": _ratio(size_bytes, num_supervised_tokens),
        "row_bytes_per_supervised_token": _ratio(row_bytes, num_supervised_tokens),
        **_kept((cache[number] for number in numbers), manifest.selection["k"]),
        "selection": manifest.selection,
        "codec": manifest.codec,
        "vocab_size": manifest.vocab_size,
        "tokenizer_fingerprint": manifest.tokenizer_fingerprint,
        "teacher_fingerprint": manifest.teacher_fingerprint,
        "dataset": manifest.dataset,
        "sources": [asdict(source) for source in manifest.sources],
    }


def _kept(samples: Iterable[Sample], k: int) -> dict[str, Any]:
    """Mean entries a row, and mean teacher mass that its K most probable entries would keep."""
    steps = [step * 10**power for power in range(len(str(k))) for step in (1, 2, 5)]
    sizes = np.array([size for size in steps if size < k] + [k])
    num_rows, num_entries, mass = 0, 0, np.zeros(len(sizes))
    for sample in samples:
        probabilities = np.sort(np.exp(sample.topk_log_probs.astype(np.float64)))[:, ::-1]
        mass += probabilities.cumsum(axis=1)[:, sizes - 1].sum(axis=0)
        num_rows += len(sample.topk_ids)
        num_entries += int((sample.topk_ids >= 0).sum())
    return {
        "mean_kept_entries": _ratio(num_entries, num_rows),
        "teacher_mass_kept": {
            str(size): _ratio(kept, num_rows) for size, kept in zip(sizes, mass, strict=True)
        },
    }


def _ratio(total: float, number: int) -> float | None:
    return float(total) / number if number else None


def _as_text(summary: dict[str, Any]) -> str:
    def number(value: float | None, form: str) -> str:
        return "none" if value is None else format(value, form)

    def settings(values: dict[str, Any]) -> str:
        return ", ".join(f"{name} {value!r}" for name, value in values.items())

    per_token = number(summary["bytes_per_supervised_token"], ".1f")
    rows_per_token = number(summary["row_bytes_per_supervised_token"], ".1f")
    lines = {
        "samples": f"{summary['num_samples']:,} in {summary['num_shards']:,} shards",
        "tokens": f"{summary['num_tokens']:,}",
        "supervised tokens": f"{summary['num_supervised_tokens']:,}",
        "bytes": f"{summary['size_bytes']:,}",
        "bytes a supervised token": f"{per_token}, of which rows {rows_per_token}",
        "selection": settings(summary["selection"]),
        "codec": summary["codec"],
        "vocabulary": f"{summary['vocab_size']:,}",
        "tokenizer": summary["tokenizer_fingerprint"],
        "teacher": summary["teacher_fingerprint"],
        "dataset": settings(summary["dataset"]),
        "sources": ", ".join(
            f"{source['name']} ({source['size_bytes']:,} bytes)" for source in summary["sources"]
        ),
        "kept entries a row": number(summary["mean_kept_entries"], ".1f"),
        "teacher mass kept": ", ".join(
            f"K={size} {number(mass, '.4f')}" for size, mass in summary["teacher_mass_kept"].items()
        ),
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())
