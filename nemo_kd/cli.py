"""nemo-kd: runs the teacher and the student, looks at a cache, checks it, and imports one.

`dump`, `train`, `import-hf` and `export-hf` call what the examples call, with the same keys.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from tqdm import tqdm

from nemo_kd.cache import CacheWriter, Manifest, Sample, TopKCache
from nemo_kd.cache.codec import codec_for
from nemo_kd.cache.importing import read_samples
from nemo_kd.cache.manifest import fingerprint_file

CONF = Path(__file__).parent / "conf"
# Command: its YAML in CONF, which also names the function; the module of nemo_kd.nemo; help.
RUNS = {
    "dump": ("dump_teacher_topk", "dump", "run the teacher once: a cache of its top-K"),
    "train": ("train_kd_sft", "train", "train a student on a cache"),
    "import-hf": ("import_hf_llama", "hf_import", "turn a Hugging Face checkpoint into a .nemo"),
    "export-hf": ("export_hf_llama", "hf_export", "turn a .nemo into a Hugging Face checkpoint"),
}

# Kept mass is a mean over rows: some thousand samples give it to three digits, in seconds.
_NUM_MASS_SAMPLES = 4096


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 1 for a fault or an error."""
    given = sys.argv[1:] if argv is None else list(argv)
    if given and given[0] in RUNS:
        # Hydra, not argparse, reads what follows, --help and --cfg job among it.
        _run(given[0], given[1:])
        return 0
    arguments = _parser().parse_args(given)
    try:
        return int(arguments.run(arguments))
    except (ValueError, OSError) as error:
        print(f"nemo-kd {arguments.command}: {error}", file=sys.stderr)
        return 1


def _run(command: str, overrides: list[str]) -> None:
    """Call a run's function with its YAML and the overrides, as the example of its name does."""
    import hydra
    from omegaconf import DictConfig

    from nemo_kd.process import user_errors

    name, module, _ = RUNS[command]

    @hydra.main(version_base=None, config_path=str(CONF), config_name=name)
    def run(config: DictConfig) -> None:
        with user_errors():
            getattr(importlib.import_module(f"nemo_kd.nemo.{module}"), name)(config)

    sys.argv = [f"nemo-kd {command}", *overrides]  # where Hydra looks for them
    run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nemo-kd",
        description="Run the teacher and the student; look at, check and import a "
        "cache of teacher rows.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, (name, _, text) in RUNS.items():  # for --help; main never lets one come here
        commands.add_parser(command, help=f"{text}; keys: {name}.yaml", add_help=False)

    inspect = commands.add_parser(
        "inspect",
        help="say what a cache holds",
        description="Say what a cache holds: samples, tokens, bytes, what shaped it, and how much "
        "of the teacher's mass the first K entries of a row keep.",
    )
    inspect.add_argument("cache", metavar="CACHE", help="the directory that the dump wrote")
    inspect.add_argument("--json", action="store_true", help="print one JSON object instead")
    inspect.add_argument(
        "--plot", metavar="FILE.png", help="draw kept mass and bytes a token against K"
    )
    inspect.set_defaults(run=_inspect)

    verify = commands.add_parser(
        "verify",
        help="read every file of a cache and check it",
        description="Read every file of a cache and compare it with the size and the checksum "
        "that were stored with it. Each fault is one line on stdout; exit code 1 if there is any.",
    )
    verify.add_argument("cache", metavar="CACHE", help="the directory that the dump wrote")
    verify.add_argument(
        "--against",
        metavar="FILE.jsonl",
        nargs="+",
        help="also tokenise the source files, in the dump's order, and compare (needs NeMo)",
    )
    verify.add_argument(
        "--tokenizer", metavar="PATH", help="with --against: the teacher's or the student's .nemo"
    )
    verify.set_defaults(run=_verify)

    importer = commands.add_parser(
        "import",
        help="make a cache of rows that another engine computed",
        description="Make a cache of jsonl with token ids, loss mask and top log-probs for each "
        "supervised token, as vLLM and API servers give them: docs/format.md has the form. Every "
        "line is checked before anything is written.",
    )
    importer.add_argument("cache", metavar="CACHE", help="the directory to make")
    importer.add_argument("files", metavar="FILE.jsonl", nargs="+", help="samples, in this order")
    importer.add_argument(
        "--tokenizer",
        metavar="PATH",
        required=True,
        help="the tokenizer of the token ids: a .nemo or a Hugging Face directory",
    )
    importer.add_argument("--k", type=int, required=True, help="entries to keep of each row")
    importer.add_argument("--temperature", type=float, default=1.0, help="of the log-probs")
    importer.add_argument("--teacher", default="imported", help="a name for who computed them")
    importer.add_argument("--codec", default="packed", help="packed (default) or raw")
    importer.add_argument("--samples-per-shard", type=int, default=1024)
    importer.set_defaults(run=_import)
    return parser


def _inspect(arguments: argparse.Namespace) -> int:
    cache = TopKCache.open(arguments.cache)
    summary = summarize(cache)
    if arguments.plot is not None:
        _plot(cache.manifest, summary["teacher_mass_kept"], arguments.plot)
    print(json.dumps(summary, indent=2) if arguments.json else _as_text(summary))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    if (arguments.against is None) != (arguments.tokenizer is None):
        raise ValueError("--against and --tokenizer need each other: give both or none")
    cache = TopKCache(arguments.cache)
    num_faults = 0
    size_bytes = sum(path.stat().st_size for path in cache.path.glob("shard-*/*.*"))
    with tqdm(total=size_bytes, unit="B", unit_scale=True, disable=None) as progress:
        faults = cache.verify(progress.update)
        if arguments.against is not None:
            faults = chain(faults, _differences(cache, arguments.against, arguments.tokenizer))
        for fault in faults:
            num_faults += 1
            progress.write(fault, file=sys.stdout)
    if num_faults:
        print(f"{cache.path}: faults found: {num_faults}", file=sys.stderr)
        return 1
    also = ", and every sample as in its source" if arguments.against else ""
    print(f"{cache.path}: {cache.num_shards} shards, every file as it was written{also}")
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from nemo_kd.nemo.dataset import tokenizer_fingerprint

    tokenizer = _read_tokenizer(Path(arguments.tokenizer))

    def samples(unit: str) -> Iterator[Sample]:
        files = (
            read_samples(Path(file), arguments.k, tokenizer.vocab_size) for file in arguments.files
        )
        return iter(tqdm(chain.from_iterable(files), unit=unit, disable=None))

    lengths = [len(sample.tokens) for sample in samples(" samples checked")]
    if not lengths:
        raise ValueError(f"{arguments.files[0]}: expected a sample a line, found none")
    manifest = Manifest(
        selection={"kind": "top_k", "k": arguments.k, "temperature": arguments.temperature},
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        teacher_fingerprint=arguments.teacher,
        sources=tuple(fingerprint_file(file) for file in arguments.files),
        # What the dataset asks of a cache; the tokens are the file's, whatever shaped them.
        dataset={"max_seq_length": max(1, max(lengths) - 1), "chat": False, "add_eos": False},
        num_samples=len(lengths),
        samples_per_shard=arguments.samples_per_shard,
        codec=arguments.codec,
    )
    writer = CacheWriter.open(arguments.cache, manifest)
    missing = set(writer.missing_shards())
    rest = samples(" samples written")
    for index in range(manifest.num_shards):
        shard_samples = [next(rest) for _ in manifest.shard_samples(index)]
        if index in missing:
            with writer.shard(index) as shard:
                for sample in shard_samples:
                    shard.add(**sample._asdict())
    print(f"{writer.path}: {len(lengths)} samples in {manifest.num_shards} shards")
    return 0


def _read_tokenizer(path: Path) -> Any:
    """NeMo's tokenizer of a .nemo, whose weights stay unread, or of a Hugging Face directory."""
    from nemo.collections.nlp.modules.common.tokenizer_utils import get_nmt_tokenizer
    from omegaconf import OmegaConf

    if not path.exists():
        raise ValueError(f"--tokenizer: expected a .nemo or a directory, found no {path}")
    if path.is_dir() and not (path / "model_config.yaml").exists():
        return get_nmt_tokenizer(library="huggingface", model_name=str(path), use_fast=True)
    with tempfile.TemporaryDirectory() as directory:
        if path.is_file():
            with tarfile.open(path) as archive:
                small = [member for member in archive if "model_weights" not in member.name]
                archive.extractall(directory, small, filter="data")
        unpacked = path if path.is_dir() else Path(directory)
        settings = OmegaConf.load(unpacked / "model_config.yaml").tokenizer

        def artifact(name: str) -> str | None:
            """A file of the tokenizer: `nemo:` stands before one that lies in the .nemo."""
            value = settings.get(name)
            inside = isinstance(value, str) and value.startswith("nemo:")
            return str(unpacked / value.removeprefix("nemo:")) if inside else value

        return get_nmt_tokenizer(
            library=settings.library,
            model_name=artifact("type"),
            tokenizer_model=artifact("model"),
            vocab_file=artifact("vocab_file"),
            merges_file=artifact("merge_file"),
            use_fast=settings.get("use_fast", False),
            special_tokens=settings.get("special_tokens"),
            legacy=settings.get("sentencepiece_legacy", settings.library == "sentencepiece"),
        )


def _differences(cache: TopKCache, files: list[str], tokenizer_path: str) -> Iterator[str]:
    """Where NeMo's dataset makes other samples of the source files than the cache holds."""
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
        MegatronGPTSFTModel,
    )
    from omegaconf import OmegaConf

    from nemo_kd.config import DataConfig, read_settings
    from nemo_kd.nemo.dataset import tokenizer_fingerprint
    from nemo_kd.nemo.sources import build_samples, cut_sample

    manifest = cache.manifest
    tokenizer = _read_tokenizer(Path(tokenizer_path))
    if tokenizer_fingerprint(tokenizer) != manifest.tokenizer_fingerprint:
        yield f"{tokenizer_path}: another tokenizer than the one that the cache was made with"
        return
    sources = [fingerprint_file(file) for file in files]
    for number, (file, source) in enumerate(zip(files, sources, strict=True)):
        if source not in manifest.sources[number : number + 1]:
            yield f"{file}: not the file that was number {number} of the dump's sources"
    data = read_settings(DataConfig, manifest.dataset | {"file_names": files}, "manifest.dataset")
    # What NeMo's model needs to build a dataset, and no model.
    model = SimpleNamespace(
        tokenizer=tokenizer,
        sep_id=data.sep_id,
        virtual_tokens=0,
        cfg=OmegaConf.create(
            {
                "position_embedding_type": "rope",
                "answer_only_loss": data.answer_only_loss,
                "data": {"chat": data.chat, "chat_prompt_tokens": data.chat_prompt_tokens},
            }
        ),
    )
    model._build_dataset = partial(MegatronGPTSFTModel._build_dataset, model)
    samples = build_samples(model, data, sources)
    if len(samples) != len(cache):
        yield f"{cache.path}: {len(cache)} samples, in the source files {len(samples)}"
    for number in tqdm(range(min(len(samples), len(cache))), unit=" samples", disable=None):
        expected = cut_sample(samples[number], samples.datasets[0])
        try:
            stored = cache[number]
        except (ValueError, OSError) as error:
            yield str(error)
            continue
        for name, value in zip(("tokens", "loss_mask", "context_length"), expected, strict=True):
            if not np.array_equal(getattr(stored, name), value):
                yield f"{cache.path}: sample {number}: {name} is not what the source gives"


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
        **_kept((cache[number] for number in numbers), manifest.max_entries),
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


def _plot(manifest: Manifest, mass_kept: dict[str, float | None], path: str) -> None:
    """Kept mass and bytes a row against K, for a user who chooses K."""
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


def _row_bytes(manifest: Manifest, k: int) -> float:
    """Bytes of a row of top_k in this cache's codec: they depend on K and the vocabulary alone."""
    selection = {"kind": "top_k", "k": k, "temperature": 1.0}
    codec = codec_for(replace(manifest, selection=selection, value_type=""))
    num_rows = 64
    ids = np.tile(np.arange(k), (num_rows, 1))
    arrays = codec.encode(ids, np.zeros(ids.shape, np.float32), np.zeros(num_rows, np.float32))
    size_bytes = sum(
        array.size * np.dtype(codec.pair_dtypes[name]).itemsize for name, array in arrays.items()
    )
    return size_bytes / num_rows


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
