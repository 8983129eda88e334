"""What a run has written so far: one file for each block of answers, beside the output.

answers.jsonl.parts/
  settings.json   what the answers are made of; no other run may continue them
  00000.npz ...   the answers of a block, and their rows; published by one rename
  done.json       once the output is whole: its counts and failures; the blocks are removed
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nemo_kd.cache.pair import sync
from nemo_kd.generate.answers import Answer, Rows
from nemo_kd.student.run_record import changes

_SETTINGS, _DONE, _CLAIM = "settings.json", "done.json", ".tmp-claim"
# The fields of an answer that stand in the JSON of its part.
_FIELDS = ("prompt", "answer", "text", "finish_reason", "failure")


class Parts:
    """The directory of a run's parts. Nothing is written before `begin`."""

    def __init__(self, output: str) -> None:
        self.output = Path(output).absolute()
        self.path = Path(f"{self.output}.parts")
        self.claim = self.path / _CLAIM

    def check(self, settings: dict[str, Any]) -> None:
        """Refuse what another run has written.

        Raises:
            ValueError: The output exists and no run is recorded beside it; the recorded run has
                other settings; or its output is gone.
        """
        record = self.path / _SETTINGS
        again = f"delete {self.path} and the output, or choose another output"
        if not record.exists():
            if self.output.exists():
                raise ValueError(
                    f"output: expected a new file, but {self.output} exists and {self.path} does "
                    "not say how it was made; choose another output"
                )
            if not os.access(_lowest(self.output.parent), os.W_OK | os.X_OK):
                raise ValueError(f"output: expected a directory to write in, got {self.output}")
            return
        if changed := changes(_read(record), settings):
            raise ValueError(f"{self.output} was begun with other settings: {changed}; {again}")
        if self.done() is not None and not self.output.exists():
            raise ValueError(
                f"{self.path} says that {self.output} is whole, but it is gone; {again}"
            )

    def begin(self, settings: dict[str, Any]) -> None:
        """Make the directory, and record the settings."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / _SETTINGS).exists():
            self._publish(_SETTINGS, json.dumps(settings, indent=2, sort_keys=True).encode())

    def done(self) -> dict[str, Any] | None:
        """What `finish` was told; None if the output is not whole."""
        return _read(self.path / _DONE) if (self.path / _DONE).exists() else None

    def finish(self, summary: dict[str, Any]) -> None:
        """Record that the output is whole, and remove the blocks."""
        self._publish(_DONE, json.dumps(summary, indent=2).encode())
        self.clean()

    def clean(self) -> None:
        """Remove the blocks, and what killed processes left."""
        for pattern in ("*.npz", "*.tmp"):
            for path in self.path.glob(pattern):
                path.unlink(missing_ok=True)

    def missing(self, num_blocks: int) -> list[int]:
        """The blocks that are not there."""
        there = {path.stem for path in self.path.glob("*.npz")}
        return [block for block in range(num_blocks) if f"{block:05d}" not in there]

    def write(self, block: int, answers: list[Answer]) -> None:
        """Publish a block, whole or not at all."""
        lines = [{name: getattr(answer, name) for name in _FIELDS} for answer in answers]
        arrays = {"lines": np.frombuffer(json.dumps(lines).encode(), np.uint8)}
        arrays["lengths"] = np.array([len(answer.ids) for answer in answers], np.int64)
        arrays["ids"] = np.array([i for answer in answers for i in answer.ids], np.int32)
        rows = [answer.rows for answer in answers if answer.rows is not None]
        if rows:
            arrays |= {
                name: np.concatenate([getattr(each, name) for each in rows])
                for name in Rows._fields
            }
        temporary = self.path / f"{block:05d}.tmp"
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        self._rename(temporary, f"{block:05d}.npz")

    def read(self, num_blocks: int) -> Iterator[Answer]:
        """The answers of all blocks, in their order."""
        for block in range(num_blocks):
            with np.load(self.path / f"{block:05d}.npz", allow_pickle=False) as file:
                arrays = dict(file)
            lines, ends = json.loads(arrays["lines"].tobytes()), arrays["lengths"].cumsum()
            has_rows = "topk_ids" in arrays
            for line, end, length in zip(lines, ends, arrays["lengths"], strict=True):
                part = slice(end - length, end)
                rows = Rows(*(arrays[name][part] for name in Rows._fields)) if has_rows else None
                yield Answer(**line, ids=arrays["ids"][part].tolist(), rows=rows)

    def _publish(self, name: str, content: bytes) -> None:
        temporary = self.path / f"{name}.tmp"
        temporary.write_bytes(content + b"\n")
        self._rename(temporary, name)

    def _rename(self, temporary: Path, name: str) -> None:
        sync(temporary)
        os.replace(temporary, self.path / name)
        sync(self.path)


def _lowest(path: Path) -> Path:
    return next(each for each in (path, *path.parents) if each.exists())


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged: {error}; delete {path.parent} to begin anew"
        ) from error
