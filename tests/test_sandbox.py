"""Programs that a model wrote: what they can do, and how they end."""

import os
import socket
import time
from pathlib import Path

import pytest

from nemo_kd.sandbox import _can_be_alone, _run, run_untrusted


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "limited"])
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
def test_an_end(code: str, reason: str, alone: bool) -> None:
    if alone and not _can_be_alone():
        pytest.skip("this machine allows no namespaces")
    outcome = _run(code, 2, 512, alone)
    assert outcome.passed == (reason == "")
    assert reason in outcome.reason


def test_a_program_cannot_reach_out(tmp_path: Path) -> None:
    if not _can_be_alone():
        pytest.skip("this machine allows no namespaces")
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
        for alone in {False, _can_be_alone()}:
            _run(code, 2, 512, alone)
            commands = [
                path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()
            ]
            assert not any(mark.encode() in command for command in commands)
