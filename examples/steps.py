"""Runs a chain of commands, each in its own process; an interrupted chain can be resumed."""

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

Curves = dict[str, list[tuple[int, float]]]
"""A column of the results to its points: the steps done, and the value."""


class Steps:
    """Runs commands whose files lie under `out`; keeps a log of each, and marks completed ones."""

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        """Resume in `out`, or empty it first if its files were made with other settings.

        Ends the process if another process works there, or if a step of a killed one still runs.
        """
        self.out = out
        self._logs = out / "logs"
        out.parent.mkdir(parents=True, exist_ok=True)
        self._lock = open(f"{out}.lock", "w")  # noqa: SIM115, the lock lasts as long as this object
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"{out}: another process is at work there; wait for it, or end it")
        record, content = out / "settings.json", json.dumps(settings)
        # As values: another order of the same keys is no other setting.
        if not (record.exists() and json.loads(record.read_text()) == json.loads(content)):
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
        """Run a script on half of the cores, unless the same command was completed before.

        Args:
            directory: removed before the script starts; an interrupted attempt may have left it.
            alone: no other step runs at the same time, so the script gets all cores.
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
                # the step keeps the lock if this process is killed
                pass_fds=[self._lock.fileno()],
            ).returncode
        if code:
            tail = "\n".join(log.read_text().splitlines()[-15:])
            sys.exit(f"{tail}\n{step} failed with exit code {code}; all of its output: {log}")
        write(done, shown)
        say(f"{step}: {time.monotonic() - start:.0f} s")


def together(steps: Iterable[Callable[[], Any]]) -> list[Any]:
    """Call steps in this order, two at a time, because a step's start uses only one core."""
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(step) for step in steps]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # after a failure no further step begins
            pool.shutdown(cancel_futures=True)
        return [future.result() for future in futures]


def write(path: Path, content: str) -> None:
    """Write the whole file or, if interrupted, nothing."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(content)
    os.replace(temporary, path)


def say(line: str) -> None:
    """Print a line in one write, so that lines of two steps do not mix."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def validation_curves(logs: Path, host: Any) -> Curves:
    """What a run's TensorBoard files, of which each start wrote one, have of the host's columns.

    Args:
        logs: their directory.
        host: one of demo_hosts.HOSTS.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {column: {} for column in host.tags}
    for file in sorted(logs.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime):
        events = EventAccumulator(str(file))
        events.Reload()
        written = events.Tags()["scalars"]
        for column, tag in host.tags.items():
            for each in events.Scalars(tag) if tag in written else ():
                # A later start repeats some of the steps.
                found[column][each.step + 1 - host.first_step] = each.value
    return {column: sorted(points.items()) for column, points in found.items() if points}


def last_values(curves: Curves) -> dict[str, float]:
    return {column: points[-1][1] for column, points in curves.items()}
