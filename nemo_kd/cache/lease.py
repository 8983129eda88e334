"""A claim file names the process that works on a shard; that of a dead or silent one is ignored.

A claim only saves time. Two processes that both believe they hold a shard do the same work and
publish equal bytes.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

HEARTBEAT_S = 30
# Twenty heartbeats, so that no process loses its claim to a file system that hangs for minutes.
STALE_S = 600
# For a claim without a name: its process is about to write it, or was killed before it could.
UNNAMED_S = 10


class Lease:
    """The claim at `path`: `with Lease(path) as held`, where `held` says whether it is ours.

    While it is held, a thread renews the file's time. At the end of the context it is removed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._owner = f"{this_host()} {os.getpid()}\n"
        self._released = threading.Event()
        self._held = False

    def __enter__(self) -> bool:
        if is_free(self._path):
            self._path.unlink(missing_ok=True)
        try:
            # "x" creates the file or fails: of several processes one gets the claim.
            with open(self._path, "x") as file:
                self._held = True
                file.write(self._owner)
        except FileExistsError:
            return False
        except OSError:  # a full disk: an empty claim would block the shard
            self.__exit__()
            raise
        threading.Thread(target=self._renew, daemon=True).start()
        return True

    def __exit__(self, *_: object) -> None:
        self._released.set()
        if self._held:
            self._path.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._released.wait(HEARTBEAT_S):
            with suppress(OSError):
                os.utime(self._path)


def is_free(path: Path) -> bool:
    """There is no claim, or its process is dead (which only its own host can see) or silent."""
    try:
        owner, renewed = path.read_text().split(), path.stat().st_mtime
    except FileNotFoundError:
        return True
    if len(owner) == 2 and owner[0] == this_host() and not is_alive(int(owner[1])):
        return True
    if owner and time.time() - renewed < STALE_S / 2:  # no clock is off by that much
        return False
    return _file_system_time(path.parent) - renewed > (STALE_S if owner else UNNAMED_S)


def this_host() -> str:
    """The host and its container, if any: within these a process id means one process."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()}-{namespace.stat().st_ino if namespace.exists() else 0}"


def is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs as another user
        return True
    return True


def _file_system_time(directory: Path) -> float:
    """Now, by the clock that sets the times of files. A host's own clock may differ."""
    probe = directory / f".tmp+{this_host()}+{os.getpid()}+clock"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
