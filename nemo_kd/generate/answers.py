"""What goes to an engine and what comes back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from nemo_kd.cache.layout import Array
from nemo_kd.generate.settings import SamplingConfig
from nemo_kd.hf_tokenizer import HfTokenizer


class Rows(NamedTuple):
    """The rows of an answer's P tokens, K entries each."""

    topk_ids: Array  # int32 [P, K]
    topk_log_probs: Array  # float32 [P, K]
    tail_log_probs: Array  # float32 [P]


class Request(NamedTuple):
    """One answer to be written."""

    prompt: int  # the prompt's number, over all files
    answer: int  # 0 to n - 1
    ids: list[int]  # of the prompt
    seed: int


class Answer(NamedTuple):
    """One answer, or why there is none."""

    prompt: int
    answer: int
    text: str = ""
    ids: list[int] = []  # noqa: RUF012  # as written, the end token included; never changed
    finish_reason: str = ""  # stop | length
    failure: str = ""
    may_succeed_later: bool = False  # the server did not answer, or it was too busy
    rows: Rows | None = None


def pack(answers: list[Answer]) -> dict[str, Array]:
    """A block of answers as arrays."""
    lines = [answer._replace(rows=None)._asdict() for answer in answers]
    arrays: dict[str, Array] = {"answers": np.frombuffer(json.dumps(lines).encode(), np.uint8)}
    if rows := [answer.rows for answer in answers if answer.rows is not None]:
        joined = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        arrays |= dict(zip(Rows._fields, joined, strict=True))
    return arrays


def unpack(arrays: dict[str, Array]) -> Iterator[Answer]:
    """The answers of a block, in their order."""
    rows = [arrays[name] for name in Rows._fields if name in arrays]
    end = 0
    for line in json.loads(arrays["answers"].tobytes()):
        answer = Answer(**line)
        start, end = end, end + len(answer.ids)
        yield answer._replace(rows=Rows(*(part[start:end] for part in rows)) if rows else None)


# Numbered ranges of answers, and what is called with each range's answers, in their order.
Blocks = Iterable[tuple[int, list[Request]]]
Done = Callable[[int, list[Answer]], None]


class Wanted(NamedTuple):
    """How every answer of a run is written."""

    tokenizer: HfTokenizer  # the model's
    sampling: SamplingConfig
    stops: tuple[str, ...]  # the texts that end an answer
    k: int  # entries of a row; 0 captures none


class Engine(Protocol):
    """Writes answers."""

    @property
    def fingerprint(self) -> str:
        """Of what shapes the model's distributions."""

    def open(self, max_seq_length: int) -> None:
        """Make ready to write, and refuse what does not fit."""

    def fill(self, blocks: Blocks, done: Done) -> None:
        """Write the blocks, in any order."""
