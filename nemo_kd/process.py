"""How a process of this package ends: exit status, error line, data loader workers."""

import atexit
import multiprocessing
import multiprocessing.util  # registers its exit handler now, so that ours runs before it
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

# Exit status of a run that was stopped, as a shell has it after SIGTERM: no fault, and the same
# command goes on.
STOPPED = 128 + signal.SIGTERM


def exit_stopped(message: str | None) -> NoReturn:
    """End the process with status STOPPED, and a line if it is the one to say it."""
    if message is not None:
        print(message, file=sys.stderr)
    sys.exit(STOPPED)


def shield_workers(loader: Any) -> None:
    """Let a data loader's workers outlive SIGTERM, which Slurm sends them too.

    The loss of one would be an error in the process that is about to end as it should. At its end
    multiprocessing would then send them SIGTERM in vain and wait: they are killed before.
    """
    loader.worker_init_fn = _ignore_sigterm
    atexit.unregister(_kill_workers)  # once is enough: the teacher run has a loader a shard
    atexit.register(_kill_workers)


def _ignore_sigterm(worker: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _kill_workers() -> None:
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


@contextmanager
def user_errors() -> Iterator[None]:
    """End the process with one line, not a traceback, for what a user can mend.

    HYDRA_FULL_ERROR=1, Hydra's own switch, shows the traceback.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        sys.exit(f"error: {error}  (HYDRA_FULL_ERROR=1 shows where)")
