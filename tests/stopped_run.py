"""A script of examples/, which gets a signal at one moment.

    python stopped_run.py SIGNAL MOMENT RANK SCRIPT arguments of the script

SIGNAL goes to the process of rank RANK and to its children, as Slurm sends it. MOMENT is the number
of a training step, at whose end it comes, or a function as MODULE:NAME or MODULE:CLASS.NAME, whose
first call it comes before; MODULE:NAME#2 means the second call.
"""

import functools
import importlib
import os
import runpy
import signal
import sys
from typing import Any

from runs import EXAMPLES


def main() -> None:
    name, moment, rank, script = sys.argv[1:5]
    del sys.argv[1:5]
    if os.getpgrp() != os.getpid():  # torchrun's processes lead a group already
        os.setpgrp()

    def send() -> None:
        if os.environ.get("RANK", "0") == rank:
            os.killpg(0, signal.Signals[name])

    if moment.isdecimal():
        from nemo_kd.nemo import resume

        def at_end(self: Any, trainer: Any, *_: Any) -> None:
            if trainer.global_step == int(moment):
                send()

        resume.ExactCounts.on_train_batch_end = at_end
    else:
        send_before(moment, send)
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def send_before(moment: str, send: Any) -> None:
    function_path, _, number = moment.partition("#")
    module_name, path = function_path.split(":")
    owner: Any = importlib.import_module(module_name)
    *classes, function_name = path.split(".")
    for name in classes:
        owner = getattr(owner, name)
    function, calls = getattr(owner, function_name), []

    @functools.wraps(function)
    def sends(*args: Any, **kwargs: Any) -> Any:
        calls.append(True)
        if len(calls) == int(number or 1):
            send()
        return function(*args, **kwargs)

    setattr(owner, function_name, sends)


if __name__ == "__main__":
    main()
