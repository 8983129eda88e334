"""The filters: each is called with all answers to some prompts, and says which of them stay."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from typing import Any, NamedTuple, Protocol

from nemo_kd.cache.manifest import fingerprint_file
from nemo_kd.chat.answers import GENERATION, REFERENCE, Exchange
from nemo_kd.chat.samples import fingerprint_source
from nemo_kd.config import read_settings
from nemo_kd.filters.overlap import Decontaminate
from nemo_kd.sandbox import check_can_be_alone, run_untrusted

_PYTHON_BLOCK = re.compile(r"```(?:python|py)[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_ANY_BLOCK = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_NUM_AT_ONCE = len(os.sched_getaffinity(0))  # the cores of this job


class Answered(NamedTuple):
    """One line of a file of answers."""

    place: str  # its file and number, for errors
    record: dict[str, Any]
    exchange: Exchange


class Filter(Protocol):
    """Says of each line whether it stays. It is called with all answers to a prompt together."""

    def __call__(self, lines: Sequence[Answered]) -> list[bool]: ...

    def check(self, record: dict[str, Any]) -> None:
        """Raise a ValueError for a line without what the filter looks at. All are checked first."""
        return


@dataclass(frozen=True)
class Cut(Filter):
    """Leaves out answers that the limit of tokens has cut."""

    def __call__(self, lines: Sequence[Answered]) -> list[bool]:
        return [_finish_reason(line.record) != "length" for line in lines]

    def check(self, record: dict[str, Any]) -> None:
        _finish_reason(record)


@dataclass(frozen=True)
class Duplicates(Filter):
    """Leaves out an answer that was given to the same prompt before, whatever its white space."""

    def __call__(self, lines: Sequence[Answered]) -> list[bool]:
        first: dict[tuple[Any, ...], int] = {}  # where each prompt and answer is first
        return [
            first.setdefault((line.exchange.turns, *line.exchange.answer.split()), number) == number
            for number, line in enumerate(lines)
        ]


@dataclass(frozen=True)
class Majority(Filter):
    """Keeps the answers whose final answer, as math-verify reads it, is the right one.

    Right is, with by=votes, the one that more answers to the prompt give than any other
    (self-consistency, arXiv 2203.11171), and none in a tie; with by=reference that of the line's
    `reference`. An answer without a final answer has no vote and does not stay.
    """

    by: str = "votes"

    def __post_init__(self) -> None:
        if self.by not in ("votes", "reference"):
            raise ValueError(f"expected by=votes or by=reference, got {self.by!r}")
        try:
            import math_verify  # noqa: F401
        except ImportError as error:
            raise ValueError(
                "found no math-verify, which reads final answers: pip install 'nemo-kd[filter]'"
            ) from error

    def __call__(self, lines: Sequence[Answered]) -> list[bool]:
        if self.by == "reference":
            return [_same(_right(line.record), _final(line.exchange.answer)) for line in lines]
        kept: list[bool] = []
        for _, group in groupby(lines, key=lambda line: line.exchange.turns):
            kept += _most_frequent([_final(line.exchange.answer) for line in group])
        return kept

    def check(self, record: dict[str, Any]) -> None:
        if self.by == "reference" and not _right(record):
            raise ValueError(
                f"expected {REFERENCE} with a final answer that math-verify reads, a number, an "
                f"expression or LaTeX, got {record[REFERENCE]!r:.60}"
            )


@dataclass(frozen=True)
class Code(Filter):
    """Keeps the answers whose program passes the tests of its line, in nemo_kd.sandbox."""

    tests_key: str = "tests"
    time_limit_s: float = 10.0
    memory_limit_mb: int = 1024

    def __post_init__(self) -> None:
        for name, lowest in ("time_limit_s", 1), ("memory_limit_mb", 64):
            if getattr(self, name) < lowest:
                raise ValueError(f"expected {name} >= {lowest}, got {getattr(self, name)}")

    def __call__(self, lines: Sequence[Answered]) -> list[bool]:
        programs = [
            f"{program_of(line.exchange.answer)}\n\n{_tests(line.record, self.tests_key)}\n"
            for line in lines
        ]
        with ThreadPoolExecutor(_NUM_AT_ONCE) as pool:
            return [*pool.map(self._passes, programs)]

    def check(self, record: dict[str, Any]) -> None:
        _tests(record, self.tests_key)

    def _passes(self, program: str) -> bool:
        ran = run_untrusted(
            program, time_limit_s=self.time_limit_s, memory_limit_mb=self.memory_limit_mb
        )
        return ran.passed


class Own(Filter):
    """A user's function: it is called with a line as a dict, and with the filter's settings.

    Raises:
        ValueError: There is no such function, or it does not take such settings.
    """

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        module, _, function = name.partition(":")
        if os.getcwd() not in sys.path:  # the command nemo-kd does not look there by itself
            sys.path.insert(0, os.getcwd())
        try:
            self._function: Callable[..., Any] = getattr(importlib.import_module(module), function)
            inspect.signature(self._function).bind({}, **settings)
        except (ImportError, AttributeError, TypeError, SyntaxError) as error:
            raise ValueError(f"{name}: {error}") from error
        self._name, self._settings = name, settings
        path = getattr(sys.modules[module], "__file__", None)
        self.fingerprint = path and fingerprint_file(path).xxh3_128  # of the module's text

    def __call__(self, lines: Sequence[Answered]) -> list[bool]:
        return [*map(self._stays, lines)]

    def _stays(self, line: Answered) -> bool:
        try:
            stays = self._function(line.record, **self._settings)
        except Exception as error:  # whatever it does
            raise ValueError(
                f"{line.place}: {self._name} fails: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(stays, bool):
            raise ValueError(
                f"{line.place}: expected {self._name} to return whether the line stays, True or "
                f"False, got {stays!r:.60}"
            )
        return stays


_KINDS: dict[str, Any] = {
    "cut": Cut,
    "duplicates": Duplicates,
    "majority": Majority,
    "code": Code,
    "decontaminate": Decontaminate,
}


class Named(NamedTuple):
    """A filter of the YAML."""

    name: str
    keeps: Filter
    record: dict[str, Any]  # what decides its verdicts


def read_filters(given: Sequence[Any], run_untrusted_code: bool) -> Iterator[Named]:
    """Yield the filters that the YAML lists.

    Args:
        given: Each a name, or a mapping of `name` and the settings.
        run_untrusted_code: Whether programs of a model may be run.

    Raises:
        ValueError: There is no such filter, or it has no such setting; names its place.
    """
    for number, each in enumerate(given):
        where = f"filters.{number}"
        settings = {"name": each} if isinstance(each, str) else dict(each)
        name = settings.pop("name", None)
        if name == "code":
            if not run_untrusted_code:
                raise ValueError(
                    f"{where}: the filter code runs programs that a model wrote; set "
                    "run_untrusted_code=true to let it"
                )
            check_can_be_alone()
        record = {"name": name, **settings}
        if name in _KINDS:
            keeps = read_settings(_KINDS[name], settings, where)
            if name == "majority":
                record["math-verify"] = version("math-verify")
            elif name == "decontaminate":
                files = map(fingerprint_source, settings["file_names"])
                record["file_names"] = [file.xxh3_128 for file in files]
            yield Named(name, keeps, record)
        elif isinstance(name, str) and ":" in name:
            try:
                own = Own(name, settings)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            yield Named(name, own, record | {"module": own.fingerprint})
        else:
            raise ValueError(
                f"{where}: expected one of {', '.join(_KINDS)}, or MODULE:FUNCTION, got {name!r}"
            )


def program_of(answer: str) -> str:
    """The program of an answer: its first block of Python, else its first block, else all of it."""
    found = _PYTHON_BLOCK.search(answer) or _ANY_BLOCK.search(answer)
    return found[1] if found else answer


def _finish_reason(record: dict[str, Any]) -> str:
    generation = record.get(GENERATION)
    reason = generation.get("finish_reason") if isinstance(generation, dict) else None
    if not isinstance(reason, str):
        raise ValueError(
            "expected generation.finish_reason, which nemo-kd generate writes, "
            "found none; leave out the filter cut"
        )
    return reason


def _reference(record: dict[str, Any]) -> str:
    reference = record.get(REFERENCE)
    if not isinstance(reference, str):
        raise ValueError(
            f"expected {REFERENCE}, a text with the right answer, got "
            f"{reference!r:.60}; nemo-kd generate keeps the answer of a prompt's line there"
        )
    return reference


def _tests(record: dict[str, Any], key: str) -> str:
    tests = record.get(key)
    if isinstance(tests, list) and tests and all(isinstance(each, str) for each in tests):
        return "\n".join(tests)
    if not isinstance(tests, str) or not tests.strip():
        raise ValueError(
            f"expected tests as {key}, a text or a list of texts, got {tests!r:.60}; "
            "set tests_key of the filter code to the key that has them"
        )
    return tests


def _final(text: str) -> list[Any]:
    """The final answer in the forms that math-verify reads it in; none if there is none."""
    from math_verify import parse

    found: list[Any] = parse(text)
    return found


def _right(record: dict[str, Any]) -> list[Any]:
    """The final answer of a reference. Many data sets have there nothing but LaTeX."""
    text = _reference(record)
    is_bare = "\\" in text and not re.search(r"\$|\\boxed|\\\(|\\\[", text)
    return _final(f"${text}$" if is_bare else text)


def _same(right: list[Any], found: list[Any]) -> bool:
    from math_verify import verify

    return bool(right and found and verify(right, found))


def _most_frequent(finals: list[list[Any]]) -> list[bool]:
    """Which of the final answers are the one that is given most often; none in a tie."""
    alike: list[list[int]] = []  # the numbers of answers that are equal
    for number, final in enumerate(finals):
        place = next((same for same in alike if _same(finals[same[0]], final)), None)
        if place is not None:
            place.append(number)
        elif final:
            alike.append([number])
    alike.sort(key=len, reverse=True)
    is_tie = len(alike) > 1 and len(alike[0]) == len(alike[1])
    most = set() if is_tie or not alike else set(alike[0])
    return [number in most for number in range(len(finals))]
