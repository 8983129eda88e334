"""The ranks of a job: how they find each other, and the work of one of them for all."""

import os
import shutil
import socket
from collections.abc import Callable
from typing import Any

import torch


def on_rank_zero(function: Any, group: Any = None) -> Any:
    """Call `function` on global rank 0 and return its result on every rank.

    Its ValueError or OSError is raised on every rank, so that no rank waits for rank 0.
    """
    outcome: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            outcome[0] = function()
        except (ValueError, OSError) as error:
            outcome[1] = error
    # The other ranks wait here until rank 0 is done.
    torch.distributed.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def start(device: str) -> None:
    """Start torch.distributed, by torchrun's variables, by those of srun, or for one process.

    Args:
        device: "gpu" or "cpu".

    Raises:
        ValueError: Under srun the job has not said where rank 0 is.
    """
    in_job = int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ
    if "RANK" not in os.environ and in_job:
        if "MASTER_ADDR" not in os.environ:
            raise ValueError(
                "under srun expected MASTER_ADDR, the node of rank 0, found none; in the job "
                "script: export MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head "
                "-n 1)"
            )
        for name, slurms in ("RANK", "PROCID"), ("WORLD_SIZE", "NTASKS"), ("LOCAL_RANK", "LOCALID"):
            os.environ[name] = os.environ[f"SLURM_{slurms}"]
        os.environ.setdefault("MASTER_PORT", "29500")
    alone = ("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "localhost")
    for name, value in (*alone, ("MASTER_PORT", str(_free_port()))):
        os.environ.setdefault(name, value)
    if device == "gpu":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if device == "gpu" else "gloo")


def write_whole(path: str, write: Callable[[str], Any]) -> None:
    """Let all ranks write a directory, which has its name only when it is whole.

    Args:
        path: The directory.
        write: Is given the name that it has until then.
    """
    unfinished = f"{path}.unfinished"
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed here
    torch.distributed.barrier()
    write(unfinished)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        os.rename(unfinished, path)


def _free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def check_batches(num_replicas: int, micro_batch_size: int, global_batch_size: int) -> None:
    """Check how samples divide.

    Args:
        num_replicas: Of the model, among which a step's samples are divided.
        micro_batch_size: Samples of a replica's forward pass.
        global_batch_size: Samples of a step.

    Raises:
        ValueError: The samples of a step are no whole number of micro batches of all replicas.
    """
    samples = micro_batch_size * num_replicas
    if global_batch_size % samples:
        raise ValueError(
            f"expected train.global_batch_size divisible by {samples}, train.micro_batch_size "
            f"times the {num_replicas} replicas, got {global_batch_size}"
        )
