"""Runs a program that a model wrote: by itself, for a limited time and in limited memory.

With `unshare` of Linux the program also has no network, sees no other process, can write in an
empty folder of its own alone, and has few processes. Where that is not allowed, nothing is run.
This keeps broken and careless programs from doing damage; it is no defence against a determined
attacker, who may read files or use faults of the kernel.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

# The first process of the namespaces. Every file system becomes read-only and every device closed,
# but for an empty disk in memory to work in; /run has the sockets of daemons. mount(8) does this to
# all file systems at once only from util-linux 2.39 on. The program has no right to undo any of it.
_ALONE = """
import ctypes, os, subprocess, sys
READ_ONLY, NO_DEVICES, BIND, RECURSIVE, MOUNT_SETATTR = 1, 4, 0x1000, 0x8000, 442
libc, work = ctypes.CDLL(None, use_errno=True), sys.argv[1]
def done(status):
    if status:
        sys.exit(os.strerror(ctypes.get_errno()))
def mount(source, target, kind=None, flags=0):
    done(libc.mount(source, os.fsencode(target), kind, flags, None))
def change(path, flags, on, off):
    wanted = (ctypes.c_uint64 * 4)(on, off, 0, 0)
    done(libc.syscall(MOUNT_SETATTR, -100, path, flags, ctypes.byref(wanted), 32))
devices = [b"/dev/null", b"/dev/zero", b"/dev/random", b"/dev/urandom"]
for device in devices:
    mount(device, device, None, BIND)
mount(b"proc", "/proc", b"proc")
if os.path.isdir("/run"):
    mount(b"tmpfs", "/run", b"tmpfs")
change(b"/", RECURSIVE, READ_ONLY | NO_DEVICES, 0)
for device in devices:
    change(device, 0, 0, NO_DEVICES)
for place in filter(os.path.isdir, ("/dev/shm", work)):
    done(libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", NO_DEVICES, b"size=64m"))
os.chdir(work)
without_rights = ["setpriv", "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", "--"]
sys.exit(subprocess.call([*without_rights, *sys.argv[2:]], close_fds=False))
"""
# The program ends with the thread that started it, however that ends: unshare takes its namespaces
# along.
_UNSHARE = (
    *("setpriv", "--pdeathsig", "KILL", "--"),
    *("unshare", "--user", "--map-root-user", "--net", "--ipc", "--mount"),
    *("--pid", "--fork", "--kill-child"),
)
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_MOST_PROCESSES = 64  # RLIMIT_NPROC does not bind root
_WATCH_S = 0.02
# One half of the token proves that the program began, the other that it came to its end, which
# sys.exit(0) and os._exit(0) do not.
_RUN = """
import os, resource, sys
token, program = sys.stdin.buffer.read(32), sys.stdin.buffer.read()
memory, end = int(sys.argv[1]), int(sys.argv[2])
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
for limit, value in (("AS", memory), ("FSIZE", 1 << 26), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (value, value))
sys.argv = ["program.py"]
os.write(end, token[:16])
exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
os.write(end, token[16:])
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
        memory_limit_mb: Of address space of each process, and of memory of all.

    Raises:
        ValueError: This machine does not let a program be alone.
        OSError: It did so before and does not any more, or the memory is too little to begin with.
    """
    check_can_be_alone()
    return _run(code, time_limit_s, memory_limit_mb)


@cache
def check_can_be_alone() -> None:
    """Try once whether a program can have namespaces of its own, and raise a ValueError if not.

    Without them a program of one line ends all processes of the user who runs it.
    """
    try:
        found = _run("pass", 30, 1024).reason
    except OSError as error:
        found = str(error)
    if found:
        raise ValueError(
            "this machine lets no program have namespaces of its own (unshare of Linux: "
            f"{found}), and programs of a model are not run without them. Run it outside "
            "a container, or in one that allows unshare and mount, as docker run --privileged"
        )


def _run(code: str, time_limit_s: float, memory_limit_mb: int) -> Outcome:
    token, (seen, end) = secrets.token_hex(16).encode(), os.pipe()
    with (
        tempfile.TemporaryDirectory() as directory,
        tempfile.TemporaryFile() as program,
        tempfile.TemporaryFile() as errors,  # not a pipe: a program may write without end
        open(seen, "rb") as reached,
    ):
        program.write(token + code.encode(errors="replace"))
        program.seek(0)
        python = [sys.executable, "-I", "-c", _RUN, str(memory_limit_mb << 20), str(end)]
        enclosed = [*_UNSHARE, sys.executable, "-I", "-S", "-c", _ALONE, directory, *python]
        try:
            process = subprocess.Popen(
                enclosed,
                stdin=program,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                cwd=directory,
                env={"PATH": os.environ.get("PATH", os.defpath), "TMPDIR": directory} | _ONE_THREAD,
                pass_fds=(end,),
                start_new_session=True,
            )
        finally:
            os.close(end)
        try:
            reason = _watch(process, time_limit_s, memory_limit_mb)
        finally:
            _end(process)
        os.set_blocking(reached.fileno(), False)
        written = reached.read() or b""
        if written == token:
            return Outcome(True, "")
        errors.seek(max(0, errors.tell() - 1000))
        lines = errors.read().decode(errors="replace").strip().splitlines()
        if not written and not reason:
            why = " ".join(lines[-2:]) or "it ended before it began"
            raise OSError(f"a program could not be run alone: {why}")
        return Outcome(False, reason or (lines or ["ended before its end"])[-1])


def _watch(process: subprocess.Popen[bytes], time_limit_s: float, memory_limit_mb: int) -> str:
    """Wait for the process that makes the namespaces; returns which limit was passed, if any."""
    end = time.monotonic() + time_limit_s
    while time.monotonic() < end:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_WATCH_S)
            return ""
        memory_mb = _memory_mb(process.pid)
        if len(memory_mb) > _MOST_PROCESSES:
            return f"started over {_MOST_PROCESSES} processes"
        if sum(memory_mb) > memory_limit_mb:
            return f"took over {memory_limit_mb} MiB"
    return f"took over {time_limit_s} s"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what still runs. The first process of a namespace ends after all others of it."""
    for first in _children(process.pid) if process.poll() is None else []:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.kill(first, signal.SIGKILL)
            process.wait(5)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _children(pid: int) -> list[int]:
    with suppress(OSError):
        return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    return []


def _memory_mb(pid: int) -> list[float]:
    """Memory in MiB, without that of files, of each process in the namespaces that `pid` made."""
    found: list[float] = []
    with suppress(OSError, ValueError):
        (first,) = _children(pid)
        proc = Path(f"/proc/{first}/root/proc")  # that of the namespaces, once it is mounted
        if not (proc / str(pid)).exists():
            for entry in proc.iterdir():
                if entry.name.isdigit():
                    with suppress(OSError, ValueError):
                        resident, shared = (entry / "statm").read_text().split()[1:3]
                        pages = int(resident) - int(shared)
                        found.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
    return found
