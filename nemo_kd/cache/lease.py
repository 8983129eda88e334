"""A claim on a shard: a small file whose owner is alive, or it counts for nothing.

Two processes that both believe they hold a shard do the same work and publish equal bytes: a claim
saves time, and correctness does not rest on it.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

HEARTBEAT_S = 30
# Twenty missed heartbeats: a file system that hangs for minutes costs nobody a claim.
STALE_S = 600
# A claim without its owner's name: the process was killed between the two, or is about to write it.
UNNAMED_S = 10


class Lease:
    """The claim at `path`, for as long as the context: `with Lease(path) as held`.

    `held` says whether it is this process's. While it is, a thread renews the file's time.
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
            with open(self._path, "x") as file:
                self._held = True
                file.write(self._owner)
        except FileExistsError:
            return False
        except OSError:  # a full disk: an empty claim would bind the shard
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
    """Nobody holds the claim: its process, of this host, is dead, or has not renewed it in time.

    One that names no process is free after some seconds.
    """
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
    """Within which a process id means one process: the host, and the container on it if any."""
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
    """The clock that sets the times of files: those of the hosts may differ from it."""
    probe = directory / f".tmp+{this_host()}+{os.getpid()}+clock"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
