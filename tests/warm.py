"""Starts processes that have imported the host already: NeMo's import takes ten seconds of a core.

The fork server of multiprocessing imports it once for all tests of a pytest worker. Each process is
a fork of the server, and in the state of a new process that has just done the imports.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

# Triton reads TRITON_INTERPRET when it is imported, which may be the server's doing.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
# The server finds import_bridge there: it does not get this process's sys.path.
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
)
_CONTEXT = multiprocessing.get_context("forkserver")
_NEMO = [
    f"nemo_kd.nemo.{name}" for name in ("dump", "train", "model", "hf.importer", "hf.exporter")
]
# One environment has one host.
_CONTEXT.set_forkserver_preload(_NEMO if find_spec("nemo") else ["import_bridge"])


def start(fn: Callable[..., Any], *args: Any, environment: dict[str, str] | None = None) -> Any:
    """A started process that calls `fn(*args)`; `fn` is importable (top-level in its module)."""
    # The server reads ENVIRONMENT in its imports, and a child would be too late to set it.
    with patch.dict(os.environ, ENVIRONMENT):
        forkserver.ensure_running()
        variables = os.environ | (environment or {})
    process = _CONTEXT.Process(target=_enter, args=(fn, args, os.getcwd(), variables))
    process.start()
    return process


def wait(processes: list[Any], timeout: float) -> list[int | None]:
    """The exit codes, once all have ended, one has failed, or `timeout` seconds are over.

    A process that still runs then is killed, and its code is None.
    """
    deadline = time.monotonic() + timeout
    codes: list[int | None] = [None]
    try:
        while None in codes and not any(codes) and time.monotonic() < deadline:
            time.sleep(0.02)
            codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    return codes


def _enter(fn: Callable[..., Any], args: Any, directory: str, variables: dict[str, str]) -> None:
    """Call `fn(*args)` in the caller's directory and environment, not in those of the server."""
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(variables)
    fn(*args)


def run_script(script: str, arguments: list[str], output: Path) -> None:
    """Do what `python script arguments >output 2>&1` does, in this process, and end it."""
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        # A process of multiprocessing ends without the exit handlers of a script.
        atexit._run_exitfuncs()
