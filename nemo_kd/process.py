"""How a process of this package ends: exit status, error line, data loader workers."""

import atexit
import multiprocessing
import multiprocessing.util  # registers its exit handler now, so that ours runs before it
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

# The exit status of a run that SIGTERM stopped, as a shell reports it. The same command resumes it.
STOPPED = 128 + signal.SIGTERM
_EXIT_S = 10  # what an exit on SIGTERM may take


def exit_stopped(message: str | None) -> NoReturn:
    """Ends the process with status STOPPED. One process of a run says why."""
    if message is not None:
        print(message, file=sys.stderr)
    sys.exit(STOPPED)


def shield_workers(loader: Any) -> None:
    """Makes the workers of a data loader ignore SIGTERM, which Slurm sends to them too.

    Losing a worker would crash a run that is shutting down cleanly. The workers are killed at exit,
    before multiprocessing sends them a SIGTERM that they ignore and waits for them to end.
    """
    loader.worker_init_fn = _ignore_sigterm
    # The teacher run has one loader a shard, and one handler is enough.
    atexit.unregister(_kill_workers)
    atexit.register(_kill_workers)


def _ignore_sigterm(worker: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _kill_workers() -> None:
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def end_on_sigterm() -> None:
    """Makes SIGTERM end this process with status STOPPED, until a run takes the signal over."""
    owner = os.getpid()

    def end(*_: Any) -> None:
        if os.getpid() != owner:  # a forked child, which inherits the handler
            os._exit(STOPPED)
        # A library may catch the exit, and the exit may wait for a rank that has ended already.
        timer = threading.Timer(_EXIT_S, os._exit, [STOPPED])
        timer.daemon = True
        timer.start()
        leads = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
        exit_stopped("stopped by SIGTERM; the same command starts again" if leads else None)

    signal.signal(signal.SIGTERM, end)


@contextmanager
def user_errors() -> Iterator[None]:
    """Ends the process with one line, not a traceback, on an error that a user can mend.

    HYDRA_FULL_ERROR=1, Hydra's own switch, shows the traceback. SIGTERM ends it with one line too.
    """
    end_on_sigterm()
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        sys.exit(f"error: {error}  (HYDRA_FULL_ERROR=1 shows where)")
