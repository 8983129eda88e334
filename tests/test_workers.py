"""A data loader's workers survive SIGTERM, but never outlive the process that started them."""

import subprocess
import sys

CRASH = """
import os, signal, sys
from torch.utils.data import DataLoader
from nemo_kd.process import shield_workers

def main():
    loader = DataLoader(range(8), num_workers=1, persistent_workers=True)
    shield_workers(loader)
    items = iter(loader)
    next(items)
    os.kill(items._workers[0].pid, signal.SIGTERM)
    assert [int(item) for item in items] == list(range(1, 8))
    sys.kept = items  # as a trainer does when its validation fails
    raise RuntimeError("out of memory")

if __name__ == "__main__":
    main()
"""


def test_a_crash_ends_the_process() -> None:
    result = subprocess.run(
        [sys.executable, "-c", CRASH], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1
    assert "RuntimeError: out of memory" in result.stderr
