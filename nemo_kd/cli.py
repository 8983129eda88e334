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
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from tqdm import tqdm

from nemo_kd.cache import CacheWriter, Manifest, Sample, TopKCache, inspection
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
    summary = inspection.summarize(cache)
    if arguments.plot is not None:
        inspection.plot(cache.manifest, summary["teacher_mass_kept"], arguments.plot)
    print(json.dumps(summary, indent=2) if arguments.json else inspection.as_text(summary))
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
