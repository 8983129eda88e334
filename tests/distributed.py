"""Runs a function in real gloo processes, because tests of parallelism test collectives."""

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import warm


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120
) -> list[Any]:
    """`[fn(rank, world_size, *args) for rank]`, one process a rank in one gloo world.

    `fn` is importable (top-level in its module); what it returns goes through torch.save. A rank
    that raises fails the call with its traceback, one that hangs is killed after `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as directory:
        processes = [
            warm.start(_run_rank, fn, rank, world_size, directory, timeout, args)
            for rank in range(world_size)
        ]
        codes = warm.wait(processes, timeout)
        for rank, code in enumerate(codes):
            if code and not Path(directory, f"{rank}.error").exists():
                raise RuntimeError(f"rank {rank} of {world_size}: ended with exit code {code}")
        # The oldest, because the other ranks fail when the first one is gone.
        errors = sorted(Path(directory).glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
        if errors:
            raise RuntimeError(f"rank {errors[0].stem} of {world_size}: {errors[0].read_text()}")
        if None in codes:
            running = [rank for rank, code in enumerate(codes) if code is None]
            raise TimeoutError(f"ranks {running} of {world_size} did not end in time")
        return [
            torch.load(Path(directory) / f"{rank}.pt", weights_only=False)
            for rank in range(world_size)
        ]


def _run_rank(
    fn: Callable[..., Any], rank: int, world_size: int, directory: str, timeout: float, args: Any
) -> None:
    torch.set_num_threads(1)  # ranks share the machine; more threads only wait for each other
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{directory}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        torch.save(fn(rank, world_size, *args), f"{directory}/{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(directory, f"{rank}.error").write_text(traceback.format_exc())
        raise
