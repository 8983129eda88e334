"""Decontamination: which lines share a run of words with held-out data."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from tempfile import TemporaryDirectory
from typing import Any

import xxhash

from nemo_kd.chat.answers import REFERENCE, answered, read_exchange
from nemo_kd.chat.files import as_jsonl
from nemo_kd.chat.lines import read_lines
from nemo_kd.chat.samples import with_found_format
from nemo_kd.config import DataConfig


@dataclass(frozen=True)
class Decontaminate:
    """Leaves out a line whose question or answer shares `n` words in a row with held-out data.

    Words are compared in lower case and without punctuation, as GPT-3's (arXiv 2005.14165, appendix
    C, where n is 8 to 13). A held-out question of fewer than n words is compared as a whole, and
    with its punctuation. What the system says is not compared, because most prompts of a data set
    have the same.

    Args:
        file_names: The held-out files, in any format of the data.
        n: Words in a row.
        format, prompt_template, label_key: Of the held-out files, as in `data`.

    Raises:
        ValueError: A file is not there, or a line of it is none of its format.
    """

    file_names: tuple[str, ...] = ()
    n: int = 13
    format: str = "auto"
    prompt_template: str = "{input} {output}"
    label_key: str = "output"

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"expected n >= 1, got {self.n}")
        for path in self.file_names:
            if not os.path.exists(path):
                raise ValueError(f"file_names: expected held-out files, found no {path}")
        _ = self._held_out  # its files are read before a line is judged

    def check(self, record: dict[str, Any]) -> None:
        """Nothing: it looks at texts alone."""

    def __call__(self, lines: Sequence[Any]) -> list[bool]:
        grams, questions = self._held_out
        return [
            _plain(line.exchange.question) not in questions
            and not any(
                gram in grams
                for text in (line.exchange.question, line.exchange.answer)
                for gram in self._grams(text)
            )
            for line in lines
        ]

    @cached_property
    def _held_out(self) -> tuple[set[int], set[str]]:
        """Hashes of the n-grams, and the questions that are too short to have one."""
        data = DataConfig(
            file_names=self.file_names,
            format=self.format,
            prompt_template=self.prompt_template,
            label_key=self.label_key,
            truncation_field=self.label_key,
        )
        data = with_found_format(data, optional=(self.label_key, "output", "completion"))
        grams: set[int] = set()
        questions: set[str] = set()

        def read(record: dict[str, Any]) -> None:
            given = record.get(REFERENCE)
            # Without the line's own reference, so that its answer, if it has one, stands there.
            line = answered({k: v for k, v in record.items() if k != REFERENCE}, data, "")
            question = read_exchange(line, data).question
            for text in (question, line.get(REFERENCE), given):
                grams.update(self._grams(text) if isinstance(text, str) else ())
            if question.strip() and len(words(question)) < self.n:
                questions.add(_plain(question))

        with TemporaryDirectory() as directory:
            for path in self.file_names:
                for _ in read_lines(as_jsonl(path, directory), read, path):
                    pass
        return grams, questions

    def _grams(self, text: str) -> Iterator[int]:
        found = words(text)
        for start in range(len(found) - self.n + 1):
            yield xxhash.xxh3_64_intdigest(" ".join(found[start : start + self.n]).encode())


def words(text: str) -> list[str]:
    """The words of a text, in lower case and without punctuation."""
    return text.lower().translate(_punctuation()).split()


def _plain(text: str) -> str:
    """A text in lower case, with single blanks."""
    return " ".join(text.lower().split())


@cache
def _punctuation() -> dict[int, None]:
    """All of Unicode's, for str.translate to leave out."""
    codes = range(sys.maxunicode + 1)
    return dict.fromkeys(code for code in codes if unicodedata.category(chr(code))[0] == "P")
