"""Runs the examples as a user does: in real processes, with torchrun for more than one."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import warm

EXAMPLES = Path(__file__).parent.parent / "examples"
PROMPT = "Q: {input} A: {output}"
MAX_SEQ_LENGTH = 48


def run_example(
    script: str,
    *arguments: object,
    processes: int = 1,
    cold: bool = False,
    succeeds: bool = True,
    status: int | None = None,
    timeout: float = 240,
) -> str:
    """Return what the example printed; fail if it does not end as it should, or with `status`.

    Its processes start warm (see warm.py), in torchrun's environment where there are several. A
    `cold` run has its imports in a user's order, and a real torchrun.
    """
    path, words = str(EXAMPLES / script), [str(argument) for argument in arguments]
    run = _run_cold if cold else _run_warm
    returncode, output = run(path, words, processes, timeout)
    assert (returncode == 0) == (succeeds and not status), output[-6000:]
    assert status in (None, returncode), output[-6000:]
    return output


def _run_cold(script: str, arguments: list[str], processes: int, timeout: float) -> tuple[int, str]:
    """The exit status and the output of a new Python, started by torchrun if there are several."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    result = subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else []), script, *arguments],
        env=os.environ | warm.ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    return result.returncode, result.stdout


def _run_warm(script: str, arguments: list[str], processes: int, timeout: float) -> tuple[int, str]:
    """The first exit status that is not 0, or 0, and the output of all ranks, one after another."""
    with tempfile.TemporaryDirectory() as directory:
        outputs = [Path(directory, str(rank)) for rank in range(processes)]
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        ranks = [
            warm.start(
                warm.run_script,
                *(script, arguments, output),
                environment=torchrun_environment(rank, processes, port) if processes > 1 else {},
            )
            for rank, output in enumerate(outputs)
        ]
        codes = warm.wait(ranks, timeout)
        output = "".join(path.read_text() for path in outputs if path.exists())
        failed = [code for code in codes if code]
        if None in codes and not failed:
            raise TimeoutError(f"{script} did not end in {timeout} s: {output[-6000:]}")
        return next(iter(failed), 0), output


def torchrun_environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun tells a process of one node, as far as Lightning, NeMo and nemo_kd read it."""
    return {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "TORCHELASTIC_RUN_ID": "tests",
    }


def dump_arguments(teacher: Path, data: Path, cache: Path, *more: str) -> list[str]:
    return [
        "trainer.accelerator=cpu",
        f"teacher.restore_from_path={teacher}",
        f"data.file_names=[{data}]",
        f"data.prompt_template='{PROMPT}'",
        f"data.max_seq_length={MAX_SEQ_LENGTH}",
        "data.micro_batch_size=2",
        "data.num_workers=0",
        "selection.k=8",
        "cache.codec=raw",
        "cache.samples_per_shard=4",
        f"cache.path={cache}",
        *more,
    ]


def train_arguments(
    student: Path, train: Path, validation: Path, logs: Path, *more: str
) -> list[str]:
    return [
        "trainer.accelerator=cpu",
        "trainer.max_steps=4",
        "trainer.val_check_interval=2",
        "trainer.log_every_n_steps=1",
        f"model.restore_from_path={student}",
        f"model.data.train_ds.file_names=[{train}]",
        f"model.data.validation_ds.file_names=[{validation}]",
        *(
            f"model.data.{name}.{key}={value}"
            for name in ("train_ds", "validation_ds")
            for key, value in {
                "global_batch_size": 4,
                "micro_batch_size": 2,
                "max_seq_length": MAX_SEQ_LENGTH,
                "num_workers": 0,
            }.items()
        ),
        f"model.data.validation_ds.prompt_template='{PROMPT}'",
        "model.optim.lr=1e-3",
        "model.optim.sched.warmup_steps=1",
        f"exp_manager.explicit_log_dir={logs}",
        "exp_manager.create_checkpoint_callback=false",
        *more,
    ]


def scalars(logs: Path) -> dict[str, list[float]]:
    """The run's TensorBoard scalars, step by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(logs.rglob("events.out.tfevents.*"))))
    events.Reload()
    return {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
