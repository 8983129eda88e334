"""The entry: prompts to answers, and with `capture.path` their rows to a cache."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from tqdm import tqdm

from nemo_kd.cache import CacheWriter
from nemo_kd.cache.importing import answer_sample, manifest_of
from nemo_kd.cache.lease import Lease
from nemo_kd.cache.manifest import tokenizer_fingerprint
from nemo_kd.chat.answers import GENERATION, answered
from nemo_kd.chat.prompts import Prompts
from nemo_kd.generate.answers import Answer, Engine, Request, Wanted, pack, unpack
from nemo_kd.generate.settings import CaptureConfig, ServerConfig, Settings, read_all
from nemo_kd.hf_tokenizer import HfTokenizer
from nemo_kd.parts import Parts

_TOO_LONG = "the prompt leaves no room for sampling.max_tokens in data.max_seq_length"
_NUM_LISTED = 10


def generate_answers(config: DictConfig) -> None:
    """Write the answers that `config` describes: see examples/conf/generate_answers.yaml.

    Raises:
        ValueError: A setting, a line, the model, the server or what an earlier run wrote does not
            fit; what was written stays.
    """
    settings = read_all(config)
    tokenizer = HfTokenizer(config.model.hf_path, "model.hf_path")
    _check_capture(settings.capture, tokenizer.vocab_size, config.output)
    prompts = Prompts(settings.data, tokenizer)
    stops = (*settings.sampling.stop, *prompts.stops)
    k = settings.capture.k if settings.capture.path else 0
    wanted = Wanted(tokenizer, settings.sampling, stops, k)
    engine = _engine(config, settings.server, wanted)
    record = {  # what the answers are made of
        "engine": config.engine,
        "model": engine.fingerprint,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "data": prompts.shaping,
        "sampling": asdict(settings.sampling),
        "batch_size": config.batch_size,  # a part is a block
        "capture": asdict(settings.capture) if settings.capture.path else None,
    }
    run = Run(Parts(config.output), prompts, settings, tokenizer, record)
    parts = run.parts
    parts.check(record)
    if (summary := parts.done()) is not None:
        parts.clean()
        print(f"{parts.output}: whole already; {_told(summary)}")
        return
    if missing := parts.missing(run.num_blocks):
        engine.open(settings.data.max_seq_length)
    parts.begin(record)
    with Lease(parts.claim) as held:
        if not held:
            raise ValueError(f"output: another process is writing {parts.output}")
        if missing:
            run.fill(engine, missing)
        run.finish()


def _engine(config: DictConfig, server: ServerConfig, wanted: Wanted) -> Engine:
    if config.engine == "server":
        if find_spec("openai") is None:
            raise ValueError("engine=server: found no openai; pip install 'nemo-kd[generate]'")
        from nemo_kd.generate.server import Server

        return Server(server, wanted)
    from nemo_kd.generate.embedded import Transformers

    return Transformers(config.model, config.device, wanted)


def _check_capture(capture: CaptureConfig, vocab_size: int, output: str) -> None:
    """Refuse a cache that cannot be written, before anything is generated.

    Raises:
        ValueError: The vocabulary has fewer tokens than a row entries, or the directory is used.
    """
    if capture.path is None:
        return
    if capture.k > vocab_size:
        raise ValueError(
            f"capture.k: expected at most {vocab_size}, the vocabulary's size, got {capture.k}"
        )
    path, resumes = Path(capture.path), Path(f"{output}.parts").exists()
    if path.exists() and not resumes and any(path.iterdir() if path.is_dir() else [path]):
        raise ValueError(f"capture.path: expected a new directory, but {path} exists")


class Run:
    """The answers of a run: `batch_size` of them are a block, which is a part of the output.

    Raises:
        ValueError: No prompt leaves room for an answer.
    """

    def __init__(
        self,
        parts: Parts,
        prompts: Prompts,
        settings: Settings,
        tokenizer: HfTokenizer,
        record: dict[str, Any],
    ) -> None:
        self.parts = parts
        self._prompts, self._settings = prompts, settings
        self._tokenizer, self._record = tokenizer, record
        num_tokens, most = settings.sampling.max_tokens, settings.data.max_seq_length
        has_room = prompts.lengths + num_tokens <= most
        if not has_room.any():
            raise ValueError(
                f"data.max_seq_length: expected room for the shortest prompt "
                f"({prompts.lengths.min()} tokens) and sampling.max_tokens={num_tokens}, got {most}"
            )
        self._answered, self._too_long = np.flatnonzero(has_room), np.flatnonzero(~has_room)
        self._num_answers = len(self._answered) * settings.sampling.n
        self._block_size = record["batch_size"]
        self.num_blocks = -(-self._num_answers // self._block_size)

    def _requests(self, block: int) -> list[Request]:
        start, sampling = block * self._block_size, self._settings.sampling
        requests = []
        for number in range(start, min(start + self._block_size, self._num_answers)):
            place, answer = divmod(number, sampling.n)
            prompt = int(self._answered[place])
            seed = sampling.seed_of(prompt, answer)
            requests.append(Request(prompt, answer, self._prompts[prompt][1], seed))
        return requests

    def fill(self, engine: Engine, missing: list[int]) -> None:
        """Write the missing blocks.

        Those in which a request failed that may succeed later come last: if the run stops, because
        the server does not answer any more, they are asked again.
        """
        held: list[tuple[int, list[Answer]]] = []
        num_tokens, start_s = 0, time.monotonic()
        bar = tqdm(
            desc=self.parts.output.name,
            total=self._num_answers,
            initial=max(0, self._num_answers - len(missing) * self._block_size),
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} answers [{elapsed}<{remaining}{postfix}]",
            disable=None,
            dynamic_ncols=True,
            smoothing=0,
        )

        def done(block: int, answers: list[Answer]) -> None:
            nonlocal num_tokens
            num_tokens += sum(len(answer.ids) for answer in answers)
            rate = num_tokens / (time.monotonic() - start_s)
            bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            bar.update(len(answers))
            if any(answer.may_succeed_later for answer in answers):
                held.append((block, answers))
            else:
                self.parts.write(block, pack(answers))

        with bar:
            engine.fill(((block, self._requests(block)) for block in missing), done)
        for block, answers in held:
            self.parts.write(block, pack(answers))

    def _answers(self) -> Iterator[Answer]:
        """All answers; those without text are failures."""
        blocks = (unpack(self.parts.read(block)) for block in range(self.num_blocks))
        for answer in chain.from_iterable(blocks):
            text = self._prompts.clean(answer.text)
            is_empty = not answer.failure and not text.strip()
            failure = "an empty answer" if is_empty else answer.failure
            yield answer._replace(text=text, failure=failure)

    def finish(self) -> None:
        """Join the blocks to the output, write the cache, and say what there is."""
        output, n = self.parts.output, self._settings.sampling.n
        failures = [[int(prompt), i, _TOO_LONG] for prompt in self._too_long for i in range(n)]
        reasons: Counter[str] = Counter()
        lengths: list[int] = []
        with self.parts.new(output) as file:
            for answer in self._answers():
                if answer.failure:
                    failures.append([answer.prompt, answer.answer, answer.failure])
                    continue
                record, ids = self._prompts[answer.prompt]
                told = {name: getattr(answer, name) for name in ("prompt", "answer")}
                told |= {"finish_reason": answer.finish_reason, "num_tokens": len(answer.ids)}
                line = answered(record, self._prompts.data, answer.text) | {GENERATION: told}
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                reasons[answer.finish_reason] += 1
                lengths.append(len(ids) + len(answer.ids))
            if not reasons:
                raise ValueError(f"{output}: there is no answer: {_told_failures(failures)}")
        if self._settings.capture.path:
            self._write_cache(lengths)
        summary = {"reasons": dict(reasons), "failures": sorted(failures)}
        self.parts.finish(summary)
        print(f"{output}: {_told(summary)}")

    def _write_cache(self, lengths: list[int]) -> None:
        """Sample i is line i of the output, which has `lengths[i]` tokens."""
        capture = self._settings.capture
        manifest = manifest_of(
            self._tokenizer,
            [self.parts.output],
            lengths,
            selection={"kind": "top_k", "k": capture.k, "temperature": 1.0},
            teacher_fingerprint=self._record["model"],
            # Where rows and tokens come from: no dataset has made them of the lines.
            dataset={"captured": {k: v for k, v in self._record.items() if k != "capture"}},
            samples_per_shard=capture.samples_per_shard,
            codec=capture.codec,
        )
        samples = (
            answer_sample(self._prompts[answer.prompt][1], answer.ids, answer.rows)
            for answer in self._answers()
            if not answer.failure and answer.rows is not None
        )
        CacheWriter.open(str(capture.path), manifest).fill(samples)
        print(f"{capture.path}: a cache of {len(lengths)} samples")


def _told(summary: dict[str, Any]) -> str:
    reasons, failures = Counter(summary["reasons"]), summary["failures"]
    text = f"{reasons.total()} answers, {reasons['length']} of them cut at sampling.max_tokens"
    return f"{text}; {_told_failures(failures)}" if failures else f"{text}; no failures"


def _told_failures(failures: list[Any]) -> str:
    shown = "".join(
        f"\n  prompt {prompt}, answer {answer}: {failure}"
        for prompt, answer, failure in failures[:_NUM_LISTED]
    )
    more = f"\n  ... and {len(failures) - _NUM_LISTED} more" if failures[_NUM_LISTED:] else ""
    return f"{len(failures)} failures, which are not in the data:{shown}{more}"
