"""A script of examples/ on a disk where no file may be larger than so many bytes.

    python limited_run.py BYTES SCRIPT arguments of the script

The kernel then refuses a write as it does on a full disk: the system call fails in the middle of a
file.
"""

import resource
import runpy
import signal
import sys

from runs import EXAMPLES

if __name__ == "__main__":
    num_bytes, script = sys.argv[1:3]
    del sys.argv[1:3]
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails, and the process goes on
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(num_bytes), resource.RLIM_INFINITY))
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
