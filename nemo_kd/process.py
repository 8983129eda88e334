"""How a process of this package begins and ends: its first lines, its help, its exit and errors."""

import atexit
import importlib.util
import multiprocessing
import multiprocessing.util  # registers its exit handler now, so that ours runs before it
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import DictConfig, ListConfig, OmegaConf
from tqdm import tqdm

# The exit status of a run that SIGTERM stopped, as a shell reports it. The same command resumes it.
STOPPED = 128 + signal.SIGTERM
_EXIT_S = 10  # what an exit on SIGTERM may take
# Seconds in which torchrun and srun end the other ranks after the first one has ended.
_PRECEDENCE_S = 6

# Keys of the runs' YAML files that name what is read and what is written.
_READ = (
    *("source", "teacher.restore_from_path", "data.file_names", "model.restore_from_path"),
    *("model.data.train_ds.file_names", "model.data.validation_ds.file_names"),
    *("model.hf_path", "dataset.train_caches", "dataset.validation_caches"),
    *("students", "data_dir", "include_path", "cache.source"),
    *("teacher", "student", "prompts", "heldout_caches", "sft.caches"),
)
_WRITTEN = (
    *("output", "cache.path", "save_to", "exp_manager.explicit_log_dir"),
    *("save_hf", "checkpoint.save", "capture.path"),
)


def rank() -> int:
    """This process's number in its job, before torch.distributed knows it."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    return int(next((os.environ[name] for name in names if name in os.environ), 0))


def say(text: str) -> None:
    """Prints a line about the run, once a job; results go to stdout."""
    if rank() == 0:
        tqdm.write(text, file=sys.stderr)


def announce(config: Any) -> None:
    """Says what a run reads, how large that is, and what it writes, before seconds of imports."""
    for title, keys in (("reads", _READ), ("writes", _WRITTEN)):
        values = (OmegaConf.select(config, key) for key in keys)
        lists = (value if isinstance(value, ListConfig) else [value] for value in values)
        for name in chain.from_iterable(lists):
            if isinstance(name, DictConfig):  # a student
                name = name.get("hf_path") or name.get("server")
            if name and isinstance(name, str):
                say(f"{title:6} {name}" + (_size(Path(name)) if title == "reads" else ""))


def _size(path: Path) -> str:
    files = [path, *path.glob("*"), *path.glob("*/*")] if path.is_dir() else [path]
    num_bytes = sum(each.stat().st_size for each in files if each.is_file())
    unit, scale = ("MB", 1e6) if num_bytes >= 1e5 else ("kB", 1e3)
    return f" ({num_bytes / scale:,.1f} {unit})" if num_bytes else ""


def check_installed(package: str, key: str, off: str) -> None:
    """Raise a ValueError if the package that `key` asks for is missing; `off` does without it."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"{key} needs the package {package}: pip install {package}, or set it to {off}"
        )


def check_new_directory(path: str, key: str) -> None:
    """Try that a directory can be made, before a run that ends with it.

    Raises:
        ValueError: It is there already, or what is above it cannot be written.
    """
    target = Path(path).absolute()
    if target.exists():
        raise ValueError(f"{key}: expected a new directory, but {path} exists")
    if not os.access(target.parent, os.W_OK):
        raise ValueError(f"{key}: expected a directory to write in, got {target.parent}")


def answer_help(yaml: Path) -> None:
    """Ends the process with the YAML and its comments if it was called with --help.

    Hydra's own --help leaves the comments out.
    """
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(yaml.read_text())
        sys.exit()


def close_bars() -> None:
    """Ends the line of each bar, so that what follows begins a new one."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def exit_stopped(message: str | None) -> NoReturn:
    """Ends the process with status STOPPED. One process of a run says why."""
    close_bars()
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
    """Makes SIGTERM end this process with status STOPPED, until a run takes the signal over.

    Ctrl-C sends it to this process, which then stops in the same orderly way. Worker processes get
    Ctrl-C too, and treat it as they treat SIGTERM. A second Ctrl-C ends the process at once.
    """
    owner = os.getpid()

    def end(*_: Any) -> None:
        if os.getpid() != owner:  # a forked child, which inherits the handler
            os._exit(STOPPED)
        # A library may catch the exit, and the exit may wait for a rank that has ended already.
        timer = threading.Timer(_EXIT_S, os._exit, [STOPPED])
        timer.daemon = True
        timer.start()
        exit_stopped("stopped by SIGTERM; the same command starts again" if rank() == 0 else None)

    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if os.getpid() == owner and rank() == 0:
            os.write(2, b"\nCtrl-C: stopping as on SIGTERM; once more ends at once\n")
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, interrupt)


@contextmanager
def user_errors() -> Iterator[None]:
    """Ends the process with one line, not a traceback, on an error that a user can mend.

    In a job of many ranks rank 0 says it, and its end takes the others along. An error of another
    rank alone is said by that rank, some seconds later.

    HYDRA_FULL_ERROR=1, Hydra's own switch, shows the traceback. SIGTERM ends it with one line too.
    """
    end_on_sigterm()
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        if rank() > 0:
            time.sleep(_PRECEDENCE_S)
        where = f" on rank {rank()}" if rank() > 0 else ""
        text = str(error)
        if "Original Traceback" in text:  # from a data loader's worker: the last line is its error
            text = text.strip().splitlines()[-1].partition(": ")[2]
        sys.exit(f"error{where}: {text}  (HYDRA_FULL_ERROR=1 shows where)")
    finally:
        close_bars()
