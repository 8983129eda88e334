"""What `nemo-kd inspect` shows of a cache: as a dict, as text and as a plot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nemo_kd.cache.codec import codec_for
from nemo_kd.cache.layout import Sample
from nemo_kd.cache.manifest import Manifest
from nemo_kd.cache.reader import TopKCache

# The kept mass is a mean over rows: some thousand samples give three digits of it, in seconds.
_NUM_MASS_SAMPLES = 4096


def summarize(cache: TopKCache) -> dict[str, Any]:
    """What a cache holds, as plain JSON values; None for a mean over no supervised tokens.

    Counts and bytes are those of the whole cache. Kept entries and kept mass are means over the
    rows of at most 4,096 samples, evenly spaced.
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
        "num_unsupervised_samples": cache.num_unsupervised_samples(),
        "size_bytes": size_bytes,
        "bytes_per_supervised_token": _ratio(size_bytes, num_supervised_tokens),
        "row_bytes_per_supervised_token": _ratio(row_bytes, num_supervised_tokens),
        **_kept((cache[number] for number in numbers), manifest.max_entries),
        "selection": manifest.selection,
        "codec": manifest.codec,
        "vocab_size": manifest.vocab_size,
        "tokenizer_fingerprint": manifest.tokenizer_fingerprint,
        "teacher_fingerprint": manifest.teacher_fingerprint,
        "dataset": manifest.dataset,
        "sources": [asdict(source) for source in manifest.sources],
    }


def as_text(summary: dict[str, Any]) -> str:
    """A summary as lines of a name and a value."""

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
        "without supervision": unsupervised(
            summary["num_unsupervised_samples"], summary["num_samples"]
        ),
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


def unsupervised(number: int, num_samples: int) -> str:
    """ "3 of 896 samples have no supervised token", as every command says it."""
    return f"{number:,} of {num_samples:,} samples have no supervised token"


def plot(manifest: Manifest, mass_kept: dict[str, float | None], path: str) -> None:
    """Draw the kept mass and the bytes of a row against K, to help choose K.

    Args:
        mass_kept: a summary's `teacher_mass_kept`.
    """
    from matplotlib.figure import Figure

    sizes = [int(size) for size in mass_kept]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    mass_axes = figure.subplots()
    mass_axes.plot(sizes, [mass or 0.0 for mass in mass_kept.values()], "o-", color="tab:blue")
    mass_axes.set(xscale="log", xlabel="K, entries kept of a row", ylim=(0, 1.02))
    mass_axes.set_ylabel("teacher mass kept", color="tab:blue")
    mass_axes.grid(alpha=0.3)
    bytes_axes = mass_axes.twinx()
    bytes_axes.plot(sizes, [_row_bytes(manifest, k) for k in sizes], "s--", color="tab:orange")
    bytes_axes.set_ylabel(f"bytes a supervised token, codec {manifest.codec}", color="tab:orange")
    bytes_axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=150)


def _kept(samples: Iterable[Sample], k: int) -> dict[str, Any]:
    """Mean entries a row, and mean mass of its most probable 1, 2, 5, ..., k entries."""
    steps = [step * 10**power for power in range(len(str(k))) for step in (1, 2, 5)]
    sizes = np.array([size for size in steps if size < k] + [k])
    num_rows, num_entries, mass = 0, 0, np.zeros(len(sizes))
    for sample in samples:
        probabilities = np.sort(np.exp(sample.topk_log_probs.astype(np.float64)))[:, ::-1]
        kept = np.minimum(sizes, probabilities.shape[1])
        mass += probabilities.cumsum(axis=1)[:, kept - 1].sum(axis=0)
        num_rows += len(sample.topk_ids)
        num_entries += int((sample.topk_ids >= 0).sum())
    return {
        "mean_kept_entries": _ratio(num_entries, num_rows),
        "teacher_mass_kept": {
            str(size): _ratio(kept, num_rows) for size, kept in zip(sizes, mass, strict=True)
        },
    }


def _row_bytes(manifest: Manifest, k: int) -> float:
    """Bytes of a row of top_k in this cache's codec: they depend on K and the vocabulary only."""
    selection = {"kind": "top_k", "k": k, "temperature": 1.0}
    codec = codec_for(replace(manifest, selection=selection))
    num_rows = 64
    ids = np.tile(np.arange(k), (num_rows, 1))
    arrays = codec.encode(ids, np.zeros(ids.shape, np.float32), np.zeros(num_rows, np.float32))
    size_bytes = sum(
        array.size * np.dtype(codec.pair_dtypes[name]).itemsize for name, array in arrays.items()
    )
    return size_bytes / num_rows


def _ratio(total: float, number: int) -> float | None:
    return float(total) / number if number else None
