"""examples/train_kd_sft.py, which gets a signal in one of its steps.

    python stopped_run.py SIGNAL STEP RANK arguments of the example

At the end of step STEP, SIGNAL goes to the process of rank RANK and to its children, as Slurm sends
it.
"""

import os
import runpy
import signal
import sys
from typing import Any

from runs import EXAMPLES


def main() -> None:
    from nemo_kd.nemo import resume

    name, step, rank = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    del sys.argv[1:4]
    if os.getpgrp() != os.getpid():  # torchrun's processes lead a group already
        os.setpgrp()

    def send(self: Any, trainer: Any, *_: Any) -> None:
        if trainer.global_step == step and os.environ.get("RANK", "0") == rank:
            os.killpg(0, signal.Signals[name])

    resume.ExactCounts.on_train_batch_end = send  # type: ignore[method-assign]
    runpy.run_path(str(EXAMPLES / "train_kd_sft.py"), run_name="__main__")


if __name__ == "__main__":
    main()
