"""A chain of commands, each in a process of its own, that goes on where it was interrupted."""

import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any


class Steps:
    """The commands whose files lie under `out`: a log of each, and a mark on those completed."""

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        """Go on in `out`, or begin anew if what lies there is of other settings.

        Ends the process if another is at work there, or a step that outlived one.
        """
        self._logs = out / "logs"
        out.parent.mkdir(parents=True, exist_ok=True)
        self._lock = open(out.with_suffix(".lock"), "w")  # noqa: SIM115, held as long as this is
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"{out}: another process is at work there; wait for it, or end it")
        record, content = out / "settings.json", json.dumps(settings)
        if not (record.exists() and record.read_text() == content):
            shutil.rmtree(out, ignore_errors=True)
            self._logs.mkdir(parents=True)
            write(record, content)

    def run(
        self,
        step: str,
        script: Path,
        *arguments: str,
        directory: Path | None = None,
        alone: bool = False,
    ) -> None:
        """Run a script on half of the cores, unless this very command was completed before.

        Args:
            directory: what an attempt that was interrupted left, removed before another.
            alone: no other step runs beside it, all cores are its own.
        """
        command = [sys.executable, str(script), *arguments]
        shown = shlex.join(["python", *command[1:]])
        log, done = self._logs / f"{step}.log", self._logs / f"{step}.done"
        if done.exists() and done.read_text() == shown:
            say(f"{step}: done before")
            return
        say(f"{step}: {shown}")
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)
        start = time.monotonic()
        cores = max(1, (os.cpu_count() or 1) // (1 if alone else 2))
        environment = os.environ | {"OMP_NUM_THREADS": str(cores)}
        with open(log, "w") as file:
            code = subprocess.run(
                command,
                stdout=file,
                stderr=file,
                env=environment,
                # held for as long as the step lives, were this process killed
                pass_fds=[self._lock.fileno()],
            ).returncode
        if code:
            tail = "\n".join(log.read_text().splitlines()[-15:])
            sys.exit(f"{tail}\n{step} failed with exit code {code}; all of its output: {log}")
        write(done, shown)
        say(f"{step}: {time.monotonic() - start:.0f} s")


def together(steps: Iterable[Callable[[], Any]]) -> list[Any]:
    """Call steps two at a time, in this order: their start takes one core alone."""
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(step) for step in steps]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # after one that failed, the rest need not begin
            pool.shutdown(cancel_futures=True)
        return [future.result() for future in futures]


def write(path: Path, content: str) -> None:
    """Write all of it or nothing."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(content)
    os.replace(temporary, path)


def say(line: str) -> None:
    """One write, so that the lines of two steps stay lines."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def validation_curves(logs: Path) -> dict[str, list[tuple[int, float]]]:
    """The validation scalars of a run's TensorBoard file: tag to (steps done, value) pairs."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(logs.rglob("events.out.tfevents.*"))))
    events.Reload()
    return {
        # TensorBoard's are counted from 0
        tag: [(event.step + 1, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag.startswith("validation")
    }
