"""What a run that writes a jsonl has done so far: one file for each block, beside the output.

answers.jsonl.parts/
  settings.json   what the output is made of; no other run may continue it
  00000.npz ...   what was found for a block, as arrays; published by one rename
  done.json       once the output is whole: its counts; the blocks are removed
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nemo_kd.cache.layout import Array
from nemo_kd.cache.pair import sync
from nemo_kd.student.run_record import changes

_SETTINGS, _DONE, _CLAIM = "settings.json", "done.json", ".tmp-claim"


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
        before = self._read(_SETTINGS)
        again = f"delete {self.path} and the output, or choose another output"
        if before is None:
            if self.output.exists():
                raise ValueError(
                    f"output: expected a new file, but {self.output} exists and {self.path} does "
                    "not say how it was made; choose another output"
                )
            there = next(each for each in self.output.parents if each.exists())
            if not os.access(there, os.W_OK | os.X_OK):
                raise ValueError(f"output: expected a directory to write in, got {self.output}")
        elif changed := changes(before, settings):
            raise ValueError(f"{self.output} was begun with other settings: {changed}; {again}")
        elif self.done() is not None and not self.output.exists():
            raise ValueError(
                f"{self.path} says that {self.output} is whole, but it is gone; {again}"
            )

    def begin(self, settings: dict[str, Any]) -> None:
        """Make the directory, and record the settings."""
        self.path.mkdir(parents=True, exist_ok=True)
        if self._read(_SETTINGS) is None:
            self._publish(_SETTINGS, settings)

    def done(self) -> dict[str, Any] | None:
        """What `finish` was told; None if the output is not whole."""
        return self._read(_DONE)

    def finish(self, summary: dict[str, Any]) -> None:
        """Record that the output is whole, and remove the blocks."""
        self._publish(_DONE, summary)
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

    def write(self, block: int, arrays: dict[str, Array]) -> None:
        """Publish a block, whole or not at all."""
        with self.new(self._path_of(block)) as file:
            np.savez(file, **arrays)

    def read(self, block: int) -> dict[str, Array]:
        """The arrays of a block."""
        with np.load(self._path_of(block), allow_pickle=False) as file:
            return dict(file)

    @contextmanager
    def new(self, path: Path) -> Iterator[BinaryIO]:
        """A file that stands at `path`, whole, once the context has ended without an exception."""
        temporary = self.path / f"{path.name}.tmp"
        with open(temporary, "wb") as file:
            yield file
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)

    def _path_of(self, block: int) -> Path:
        return self.path / f"{block:05d}.npz"

    def _publish(self, name: str, content: dict[str, Any]) -> None:
        with self.new(self.path / name) as file:
            file.write(json.dumps(content, indent=2, sort_keys=True).encode() + b"\n")

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        try:
            return dict(json.loads(path.read_bytes())) if path.exists() else None
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged: {error}; delete {self.path} to begin anew"
            ) from error
