"""Runs the examples as a user does: real processes, and torchrun for more than one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parent.parent / "examples"
PROMPT = "Q: {input} A: {output}"
MAX_SEQ_LENGTH = 48


def run_example(
    script: str,
    *arguments: object,
    processes: int = 1,
    succeeds: bool = True,
    status: int | None = None,
    timeout: float = 240,
) -> str:
    """Return what the example printed; fail if it does not end as it should, or with `status`."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    result = subprocess.run(
        [
            sys.executable,
            *(torchrun if processes > 1 else []),
            str(EXAMPLES / script),
            *map(str, arguments),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert (result.returncode == 0) == (succeeds and not status), result.stdout[-6000:]
    assert status in (None, result.returncode), result.stdout[-6000:]
    return result.stdout


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
