"""What goes to an engine and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from nemo_kd.cache.layout import Array


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
    rows: Rows | None = None
    failure: str = ""
    may_succeed_later: bool = False  # the server did not answer, or it was too busy


class Engine(Protocol):
    """Writes answers. Blocks are numbered; each is a fixed range of answers."""

    def fill(
        self,
        blocks: Sequence[int],
        requests_of: Callable[[int], list[Request]],
        done: Callable[[int, list[Answer]], None],
    ) -> None:
        """Call `done` with each block's answers, in the order of its requests."""
