"""The command nemo-kd.

`dump`, `train` and the other commands of runs.py call the functions of the scripts in examples/.
`inspect`, `verify` and `import` are about a cache; `show` is about a cache or a file of SFT data.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nemo_kd.cache import CacheWriter, Sample, TopKCache, inspection
from nemo_kd.cache.importing import manifest_of, read_samples
from nemo_kd.cache.layout import MANIFEST_NAME
from nemo_kd.runs import RUNS, installed_host, run


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 1 for a fault or an error."""
    given = sys.argv[1:] if argv is None else list(argv)
    if given and given[0] in RUNS:
        # Hydra reads what follows, also --cfg job; argparse does not see it.
        run(given[0], given[1:])
        return 0
    # Libraries fork after a tokenizer has run, and would warn of its threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = _parser()
    # argparse takes no list of words after an option.
    arguments, rest = parser.parse_known_args(given)
    arguments.overrides = [word for word in rest if re.match(r"\w[\w.]*=", word)]
    if rest != arguments.overrides or (rest and arguments.command != "show"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return int(arguments.run(arguments))
    except (ValueError, OSError) as error:
        print(f"nemo-kd {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nemo-kd",
        description="Run the teacher and the student. Inspect, verify and import a cache of "
        "teacher rows.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, own in RUNS.items():  # only for --help: `main` calls them itself
        more = ", or bridge/ with --host bridge" if "bridge" in own.hosts else ""
        text = f"{own.text}; keys: {own.name}.yaml{more}"
        commands.add_parser(command, help=text, add_help=False)
    _add_inspect(commands)
    _add_verify(commands)
    _add_show(commands)
    _add_import(commands)
    return parser


# --- inspect


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="say what a cache holds",
        description="Say what a cache holds: samples, tokens, bytes, what it was made of, and how "
        "much of the teacher's mass the first K entries of a row keep.",
    )
    parser.set_defaults(run=_inspect)
    parser.add_argument("cache", metavar="CACHE", help="the directory that the dump wrote")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument(
        "--plot", metavar="FILE.png", help="draw kept mass and bytes a token against K"
    )


def _inspect(arguments: argparse.Namespace) -> int:
    cache = TopKCache.open(arguments.cache)
    summary = inspection.summarize(cache)
    if arguments.plot is not None:
        inspection.plot(cache.manifest, summary["teacher_mass_kept"], arguments.plot)
    print(json.dumps(summary, indent=2) if arguments.json else inspection.as_text(summary))
    return 0


# --- verify


def _add_verify(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        help="read every file of a cache and check it",
        description="Read every file of a cache and compare it with the size and the checksum "
        "that were stored with it. Each fault is one line on stdout; exit code 1 if there is any.",
    )
    parser.set_defaults(run=_verify)
    parser.add_argument("cache", metavar="CACHE", help="the directory that the dump wrote")
    parser.add_argument(
        "--against",
        metavar="FILE.jsonl",
        nargs="+",
        help="also tokenise the source files, in the dump's order, and compare (needs a host)",
    )
    parser.add_argument(
        "--chat-template",
        metavar="FILE",
        help="with --against: the file that the dump had as data.chat_template",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="with --against: the teacher's or the student's .nemo or Hugging Face directory",
    )


def _verify(arguments: argparse.Namespace) -> int:
    if (arguments.against is None) != (arguments.tokenizer is None):
        raise ValueError("--against and --tokenizer need each other: give both or none")
    if arguments.chat_template is not None and arguments.against is None:
        raise ValueError("--chat-template is read with --against alone: give both or none")
    cache = TopKCache(arguments.cache)
    num_faults = 0
    size_bytes = sum(path.stat().st_size for path in cache.path.glob("shard-*/*.*"))
    with tqdm(total=size_bytes, unit="B", unit_scale=True, disable=None) as progress:
        faults = cache.verify(progress.update)
        if arguments.against is not None:
            from nemo_kd.compare import differences

            against = (arguments.against, arguments.tokenizer, arguments.chat_template)
            faults = chain(faults, differences(installed_host(), cache, *against))
        for fault in faults:
            num_faults += 1
            progress.write(fault, file=sys.stdout)
    if num_faults:
        print(f"{cache.path}: faults found: {num_faults}", file=sys.stderr)
        return 1
    also = ", and every sample as in its source" if arguments.against else ""
    print(f"{cache.path}: {cache.num_shards} shards, every file as it was written{also}")
    return 0


# --- show


def _add_show(commands: Any) -> None:
    parser = commands.add_parser(
        "show",
        usage="nemo-kd show FILE|CACHE --tokenizer PATH [-n N] [data.KEY=VALUE ...]",
        help="print samples, with what is learnt in colour",
        description="Print samples of a file as the dump would make them, with the tokens that the "
        "student learns in colour, before a teacher is run; or samples of a cache, with the "
        "teacher's most probable choices. data.KEY=VALUE are keys of the dump, e.g. "
        "data.train_on=last_assistant.",
    )
    parser.set_defaults(run=_show)
    parser.add_argument("path", metavar="FILE|CACHE", help="a file of SFT data, or a cache")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        required=True,
        help="a .nemo or a Hugging Face directory",
    )
    parser.add_argument("-n", type=int, default=3, metavar="N", help="samples; default 3")


def _show(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    host = installed_host()
    from nemo_kd.compare import samples_of, token_decoder
    from nemo_kd.show import show_choices, show_sample

    tokenizer = host.read_tokenizer(arguments.tokenizer, "--tokenizer")
    decode, console = token_decoder(tokenizer), Console(highlight=False, soft_wrap=True)
    if (Path(arguments.path) / MANIFEST_NAME).exists():
        if arguments.overrides:
            raise ValueError(f"expected no data.KEY for a cache, got {arguments.overrides[0]}")
        cache = TopKCache.open(arguments.path)
        for number in range(min(arguments.n, len(cache))):
            sample = cache[number]
            show_sample(console, number, sample.tokens, sample.loss_mask, decode)
            show_choices(console, sample, decode)
        return 0
    samples = samples_of(host, arguments.path, arguments.overrides, tokenizer)
    for number, (tokens, loss_mask, _) in zip(range(arguments.n), samples, strict=False):
        show_sample(console, number, tokens, loss_mask, decode)
    return 0


# --- import


def _add_import(commands: Any) -> None:
    parser = commands.add_parser(
        "import",
        help="make a cache of rows that another engine computed",
        description="Make a cache of jsonl files with token ids, loss mask and top log-probs for "
        "each supervised token, as vLLM and API servers give them. docs/format.md describes the "
        "lines. Every line is checked before anything is written.",
    )
    parser.set_defaults(run=_import)
    parser.add_argument("cache", metavar="CACHE", help="the directory to make")
    parser.add_argument("files", metavar="FILE.jsonl", nargs="+", help="samples, in this order")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        required=True,
        help="the tokenizer of the token ids: a .nemo or a Hugging Face directory",
    )
    parser.add_argument("--k", type=int, required=True, help="entries to keep of each row")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="temperature of the log-probs; default 1"
    )
    parser.add_argument(
        "--teacher", default="imported", help="a name for the model that computed the log-probs"
    )
    parser.add_argument("--codec", default="packed", help="packed (default) or raw")
    parser.add_argument("--samples-per-shard", type=int, default=1024, help="default 1024")


def _import(arguments: argparse.Namespace) -> int:
    tokenizer = installed_host().read_tokenizer(arguments.tokenizer, "--tokenizer")

    def samples(unit: str) -> Iterator[Sample]:
        files = (
            read_samples(Path(file), arguments.k, tokenizer.vocab_size) for file in arguments.files
        )
        return iter(tqdm(chain.from_iterable(files), unit=unit, disable=None))

    # The files are read twice, so that every line is checked before anything is written, and no
    # more than a shard is held in memory.
    lengths, num_unsupervised = [], 0
    for sample in samples(" samples checked"):
        lengths.append(len(sample.tokens))
        num_unsupervised += not sample.loss_mask.any()
    if num_unsupervised == len(lengths):
        found = inspection.unsupervised(num_unsupervised, len(lengths)) if lengths else "none"
        raise ValueError(f"{arguments.files[0]}: expected samples to learn from, found {found}")
    manifest = manifest_of(
        tokenizer,
        arguments.files,
        lengths,
        selection={"kind": "top_k", "k": arguments.k, "temperature": arguments.temperature},
        teacher_fingerprint=arguments.teacher,
        samples_per_shard=arguments.samples_per_shard,
        codec=arguments.codec,
    )
    writer = CacheWriter.open(arguments.cache, manifest)
    writer.fill(samples(" samples written"))
    found = inspection.unsupervised(num_unsupervised, len(lengths))
    print(f"{writer.path}: {len(lengths)} samples in {manifest.num_shards} shards; {found}")
    return 0
