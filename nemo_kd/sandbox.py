"""Runs a program that a model wrote: by itself, for a limited time and in limited memory.

With `unshare` of Linux the program also has no network, sees no other process, and can write in an
empty folder of its own alone. Where that is not allowed, one warning says so.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from typing import NamedTuple

from nemo_kd.process import say

# The root becomes read-only, and what programs usually write to becomes an empty disk in memory.
_ALONE = """
mount -o remount,bind,ro / && mount -t tmpfs -o size=64m tmpfs "$0" &&
for place in /tmp /var/tmp /dev/shm; do
  [ "$0" = "${0#$place/}" ] && mount -t tmpfs tmpfs $place
done
cd "$0" && exec "$@"
"""
_UNSHARE = ("unshare", "--user", "--map-root-user", "--net", "--ipc", "--mount")
_UNSHARE_PROCESSES = ("--pid", "--fork", "--kill-child", "--mount-proc")
# What was written proves that the program came to its end: sys.exit(0) and os._exit(0) do not.
_RUN = """
import os, resource, sys
token, program = sys.stdin.buffer.read(32), sys.stdin.buffer.read()
memory, end = int(sys.argv[1]), int(sys.argv[2])
for limit, value in (("AS", memory), ("FSIZE", 1 << 26), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (value, value))
sys.argv = ["program.py"]
exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
os.write(end, token)
"""


class Outcome(NamedTuple):
    """How a program ended."""

    passed: bool  # it came to its end without an error
    reason: str  # otherwise why not


def run_untrusted(code: str, *, time_limit_s: float = 10, memory_limit_mb: int = 1024) -> Outcome:
    """Run a Python program in a process of its own.

    Args:
        code: The program, its tests included.
        time_limit_s: Wall-clock time for all of it, the start of Python included.
        memory_limit_mb: Of address space.
    """
    return _run(code, time_limit_s, memory_limit_mb, _can_be_alone())


@cache
def _can_be_alone() -> bool:
    if _run("pass", 30, 1024, alone=True).passed:
        return True
    say(
        "warning: this machine allows no namespaces (unshare), so that programs of a student are "
        "limited in time and memory, but can read and write what you can; use a container"
    )
    return False


def _run(code: str, time_limit_s: float, memory_limit_mb: int, alone: bool) -> Outcome:
    token, (seen, end) = secrets.token_hex(16).encode(), os.pipe()
    with (
        tempfile.TemporaryDirectory() as directory,
        tempfile.TemporaryFile() as errors,  # not a pipe: a program may write without end
        open(seen, "rb") as reached,
    ):
        python = [sys.executable, "-I", "-c", _RUN, str(memory_limit_mb << 20), str(end)]
        shell = [*_UNSHARE, *_UNSHARE_PROCESSES, "sh", "-c", _ALONE, directory]
        try:
            process = subprocess.Popen(
                [*shell, *python] if alone else python,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                cwd=directory,
                env={"PATH": os.environ.get("PATH", os.defpath), "OMP_NUM_THREADS": "1"},
                pass_fds=(end,),
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(False, str(error))
        finally:
            os.close(end)
        reason = ""
        try:
            process.communicate(token + code.encode(errors="replace"), time_limit_s)
        except subprocess.TimeoutExpired:
            reason = f"took over {time_limit_s} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        os.set_blocking(reached.fileno(), False)
        if reached.read() == token:
            return Outcome(True, "")
        errors.seek(max(0, errors.tell() - 1000))
        last = errors.read().decode(errors="replace").strip().splitlines()
        return Outcome(False, reason or (last or ["ended before its end"])[-1])
