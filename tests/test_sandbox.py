"""Programs that a model wrote: what they can do, and how they end."""

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from nemo_kd import sandbox
from nemo_kd.sandbox import check_can_be_alone, run_untrusted


@pytest.fixture(autouse=True)
def _enclosed() -> None:
    """No program of this file may run where it is not alone."""
    try:
        check_can_be_alone()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("assert 1 + 1 == 2", ""),
        ("open('here', 'w').write('x')", ""),
        ("assert 1 + 1 == 3", "AssertionError"),
        ("import sys; sys.exit(0)", "ended before its end"),
        ("import os; os._exit(0)", "ended before its end"),
        ("\0", "null bytes"),
        ("\ud800", "SyntaxError"),
        ("while True: pass", "took over 2 s"),
        ("import os\nwhile True: os.write(2, b'x' * 10000)", "x"),
        ("x = [0] * 10**9", "MemoryError"),
    ],
)
def test_an_end(code: str, reason: str) -> None:
    outcome = run_untrusted(code, time_limit_s=2, memory_limit_mb=512)
    assert outcome.passed == (reason == "")
    assert reason in outcome.reason


def test_a_program_cannot_reach_out(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connect = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
        assert "unreachable" in run_untrusted(connect).reason
    for place in (tmp_path, Path(__file__).parent):
        assert "Read-only" in run_untrusted(f"open({str(place / 'made')!r}, 'w')").reason
        assert not (place / "made").exists()
    see = f"import os; assert not os.path.exists('/proc/{os.getpid()}/status')"
    assert run_untrusted(see).passed or os.getpid() < 10


def test_nothing_is_left_running() -> None:
    mark = f"left-{time.monotonic_ns()}"
    sleep = f"import subprocess; subprocess.Popen(['sh', '-c', 'sleep 60; : {mark}'])"
    for code in (sleep, f"{sleep}\nwhile True: pass"):
        run_untrusted(code, time_limit_s=2, memory_limit_mb=512)
        assert not is_running(mark), code


def test_a_program_that_cannot_begin_is_no_failing_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where the machine has no namespaces left after the first program ran."""
    sandbox.check_can_be_alone()
    monkeypatch.setattr(sandbox, "_UNSHARE", ("unshare", "--no-such-option"))
    with pytest.raises(OSError, match="could not be run alone: unshare: unrecognized option"):
        run_untrusted("pass")


def test_a_program_ends_with_a_killed_caller() -> None:
    call = "from nemo_kd.sandbox import _run; _run('import time; time.sleep(60)', 60, 1024)"
    caller = subprocess.Popen([sys.executable, "-c", call])
    end = time.monotonic() + 30
    while not is_alone(caller.pid) and time.monotonic() < end:
        time.sleep(0.1)
    inside = is_alone(caller.pid)
    assert inside
    caller.kill()
    caller.wait()
    while any(map(exists, inside)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(exists, inside))


def is_alone(pid: int) -> list[int]:
    """All processes under this one, once the program itself runs."""
    found, last = [], [pid]
    while last:
        children = [child for each in last for child in sandbox._children(each)]
        found, last = found + children, children
    return found if len(found) >= 3 else []


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def is_running(mark: str) -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended meanwhile
            if mark.encode() in path.read_bytes():
                return True
    return False


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os\nwhile True: os.fork()", "processes"),
        (
            "import os, time\nfor _ in range(8):\n  if os.fork() == 0:\n"
            "    x = b'x' * (100 << 20); time.sleep(9)\ntime.sleep(9)",
            "took over 512 MiB",
        ),
        (f"import os; os.kill({os.getpid()}, 9)", "No such process"),
        ("open('/proc/sys/kernel/hostname', 'w')", "Read-only"),
        ("import os; os.mknod('disk', 0o60666, os.makedev(8, 0))", "not permitted"),
        (
            "import subprocess; subprocess.run(['mount', '-o', 'remount,rw', '/'], check=True)",
            "Err",
        ),
    ],
    ids=["fork bomb", "memory of all", "parent", "settings", "device", "mount"],
)
def test_a_hostile_program_alone(code: str, reason: str) -> None:
    outcome = run_untrusted(code, time_limit_s=5, memory_limit_mb=512)
    assert not outcome.passed
    assert reason in outcome.reason


def test_every_file_system_is_read_only() -> None:
    code = (
        "places = [line.split() for line in open('/proc/self/mountinfo')]\n"
        "import os\n"
        "wrong = [p[4] for p in places if 'rw' in p[5].split(',')"
        " and p[4] not in ('/dev/shm', os.getcwd())]\n"
        "assert not wrong, wrong"
    )
    assert run_untrusted(code).reason == ""


def test_nothing_runs_where_no_program_can_be_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sandbox, "_UNSHARE", ("false",))
    sandbox.check_can_be_alone.cache_clear()
    with pytest.raises(ValueError, match="lets no program have namespaces"):
        run_untrusted(f"open({str(tmp_path / 'made')!r}, 'w')")
    assert not any(tmp_path.iterdir())
