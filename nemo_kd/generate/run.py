"""The entry: prompts to answers, and with `capture.path` their rows to a cache."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from tqdm import tqdm

from nemo_kd.cache import Sample
from nemo_kd.cache.layout import MANIFEST_NAME
from nemo_kd.cache.lease import Lease
from nemo_kd.cache.manifest import tokenizer_fingerprint
from nemo_kd.cache.pair import sync
from nemo_kd.generate.answers import Answer, Request
from nemo_kd.generate.capture import manifest_of, sample_of, write_cache
from nemo_kd.generate.parts import Parts
from nemo_kd.generate.prompts import Prompts, answered
from nemo_kd.generate.settings import Settings, read_all
from nemo_kd.generate.tokenizer import HfTokenizer

_TOO_LONG = "the prompt leaves no room for sampling.max_tokens in data.max_seq_length"
_NUM_LISTED = 10


def generate_answers(config: DictConfig) -> None:
    """Write the answers that `config` describes: see examples/conf/generate_answers.yaml.

    Raises:
        ValueError: A setting, a line, the model, the server or what an earlier run wrote does not
            fit; what was written stays.
    """
    settings = read_all(config)
    tokenizer = HfTokenizer(config.model.hf_path)
    _check_capture(settings, tokenizer, str(config.output))
    prompts = Prompts(settings.data, tokenizer, settings.sampling.max_tokens)
    stops = (*settings.sampling.stop, *prompts.stops)
    k = settings.capture.k if settings.capture.path else 0
    engine = _engine(config, settings, tokenizer, stops, k)
    record = _record(config, settings, prompts, tokenizer, engine.fingerprint)
    parts = Parts(config.output)
    parts.check(record)
    run = Run(parts, prompts, settings, tokenizer, record)
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


def _check_capture(settings: Settings, tokenizer: HfTokenizer, output: str) -> None:
    capture = settings.capture
    if capture.path is None:
        return
    if capture.k > tokenizer.vocab_size:
        raise ValueError(
            f"capture.k: expected at most {tokenizer.vocab_size}, the vocabulary's size, got "
            f"{capture.k}"
        )
    path = Path(capture.path)
    resumes = (path / MANIFEST_NAME).exists() and Path(f"{output}.parts").exists()
    if path.exists() and not resumes and any(path.iterdir() if path.is_dir() else [path]):
        raise ValueError(f"capture.path: expected a new directory, but {path} exists")


def _engine(
    config: DictConfig, settings: Settings, tokenizer: HfTokenizer, stops: tuple[str, ...], k: int
) -> Any:
    if config.engine == "server":
        if find_spec("openai") is None:
            raise ValueError(
                "engine=server: expected the package openai; pip install openai==3.57.0"
            )
        from nemo_kd.generate.server import Server

        return Server(settings.server, tokenizer, settings.sampling, stops, k)
    from nemo_kd.generate.embedded import Transformers

    return Transformers(config.model, config.device, tokenizer, settings.sampling, stops, k)


def _record(
    config: DictConfig,
    settings: Settings,
    prompts: Prompts,
    tokenizer: HfTokenizer,
    fingerprint: str,
) -> dict[str, Any]:
    """What the answers are made of. A part is made by one block, so its size belongs to it."""
    capture = settings.capture
    return {
        "engine": config.engine,
        "model": fingerprint,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "data": prompts.shaping,
        "sampling": asdict(settings.sampling) | {"stop": list(settings.sampling.stop)},
        "batch_size": config.batch_size,
        "capture": asdict(capture) if capture.path else None,
    }


class Run:
    """The answers of a run: `batch_size` of them are a block, which is a part of the output."""

    def __init__(
        self,
        parts: Parts,
        prompts: Prompts,
        settings: Settings,
        tokenizer: HfTokenizer,
        record: dict[str, Any],
    ) -> None:
        self._parts, self._prompts, self._settings = parts, prompts, settings
        self._tokenizer, self._record = tokenizer, record
        self._num_answers = len(prompts) * settings.sampling.n
        self._block_size = record["batch_size"]
        self.num_blocks = -(-self._num_answers // self._block_size)

    def _answers_of(self, block: int) -> range:
        start = block * self._block_size
        return range(start, min(start + self._block_size, self._num_answers))

    def _requests(self, block: int) -> list[Request]:
        """Those answers of a block whose prompt leaves room for them."""
        requests = []
        for number in self._answers_of(block):
            prompt, answer = divmod(number, self._settings.sampling.n)
            if not self._prompts.is_too_long[prompt]:
                seed = self._settings.sampling.seed_of(prompt, answer)
                requests.append(Request(prompt, answer, self._prompts[prompt].ids, seed))
        return requests

    def _with_too_long(self, block: int, answers: list[Answer]) -> list[Answer]:
        """All answers of a block, in their order; those without text are failures."""
        written = iter(answers)
        whole = []
        for number in self._answers_of(block):
            prompt, answer = divmod(number, self._settings.sampling.n)
            if self._prompts.is_too_long[prompt]:
                whole.append(Answer(prompt, answer, failure=_TOO_LONG))
                continue
            each = next(written)
            each = each._replace(text=self._prompts.clean(each.text))
            is_empty = not each.failure and not each.text.strip()
            whole.append(Answer(prompt, answer, failure="an empty answer") if is_empty else each)
        return whole

    def fill(self, engine: Any, missing: list[int]) -> None:
        """Write the missing blocks.

        Those in which a request failed that may succeed later come last: if the run stops, because
        the server does not answer any more, they are asked again.
        """
        held: list[tuple[int, list[Answer]]] = []
        num_tokens, start_s = 0, time.monotonic()
        bar = tqdm(
            desc=self._parts.output.name,
            total=self._num_answers,
            initial=self._num_answers - sum(len(self._answers_of(block)) for block in missing),
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} answers [{elapsed}<{remaining}{postfix}]",
            disable=None,
            dynamic_ncols=True,
            mininterval=1 if sys.stderr.isatty() else 30,
            smoothing=0,
        )

        def done(block: int, answers: list[Answer]) -> None:
            nonlocal num_tokens
            num_tokens += sum(len(answer.ids) for answer in answers)
            rate = num_tokens / (time.monotonic() - start_s)
            bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            bar.update(len(self._answers_of(block)))
            whole = self._with_too_long(block, answers)
            if any(answer.may_succeed_later for answer in whole):
                held.append((block, whole))
            else:
                self._parts.write(block, whole)

        with bar:
            engine.fill(missing, self._requests, done)
        for block, whole in held:
            self._parts.write(block, whole)

    def finish(self) -> None:
        """Join the blocks to the output, write the cache, and say what there is."""
        output = self._parts.output
        temporary = self._parts.path / f"{output.name}.tmp"
        failures, num_answers, longest = [], 0, 0
        reasons: Counter[str] = Counter()
        with open(temporary, "w", encoding="utf-8") as file:
            for answer in self._parts.read(self.num_blocks):
                if answer.failure:
                    failures.append([answer.prompt, answer.answer, answer.failure])
                    continue
                record, ids = self._prompts[answer.prompt]
                generation = {
                    "prompt": answer.prompt,
                    "answer": answer.answer,
                    "finish_reason": answer.finish_reason,
                    "num_tokens": len(answer.ids),
                }
                line = answered(record, self._prompts.data, answer.text, generation)
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                num_answers += 1
                reasons[answer.finish_reason] += 1
                longest = max(longest, len(ids) + len(answer.ids))
        if not num_answers:
            temporary.unlink()
            raise ValueError(f"{output}: there is no answer: {_told_failures(failures)}")
        sync(temporary)
        os.replace(temporary, output)
        capture = self._settings.capture
        if capture.path:
            made = (capture, self._tokenizer, self._record, output, num_answers, longest)
            write_cache(capture.path, manifest_of(*made), self._samples())
            print(f"{capture.path}: a cache of {num_answers} samples")
        summary = {"answers": num_answers, "reasons": dict(reasons), "failures": failures}
        self._parts.finish(summary)
        print(f"{output}: {_told(summary)}")

    def _samples(self) -> Iterator[Sample]:
        for answer in self._parts.read(self.num_blocks):
            if not answer.failure:
                yield sample_of(self._prompts[answer.prompt].ids, answer)


def _told(summary: dict[str, Any]) -> str:
    cut = summary["reasons"].get("length", 0)
    text = f"{summary['answers']} answers, {cut} of them cut at sampling.max_tokens"
    failures = summary["failures"]
    return f"{text}; {_told_failures(failures)}" if failures else f"{text}; no failures"


def _told_failures(failures: list[Any]) -> str:
    shown = "".join(
        f"\n  prompt {prompt}, answer {answer}: {failure}"
        for prompt, answer, failure in failures[:_NUM_LISTED]
    )
    more = f"\n  ... and {len(failures) - _NUM_LISTED} more" if failures[_NUM_LISTED:] else ""
    return f"{len(failures)} failures, which are not in the data:{shown}{more}"
