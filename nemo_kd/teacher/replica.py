"""One replica of the teacher: its ranks take the same shards, and stop together."""

import signal
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch.distributed import ProcessGroup

from nemo_kd.cache import CacheWriter
from nemo_kd.process import exit_stopped

# How long replicas wait for each other's shards.
PATIENCE = timedelta(days=7)
# Seconds between looks at what other jobs have left: each look is a few operations a claim.
_POLL_S = 5
# Stands in the place of a shard's number: the leader was asked to stop while it waited.
_STOP = -1


class Replica:
    """This process's replica of the teacher: its ranks go through the same shards in step.

    The leader, the one rank of the last pipeline stage that writes, claims for all of them.

    On SIGTERM, with which Slurm preempts, all ranks stop at the same point; otherwise the others
    would hang in a collective. The signal's handler only takes a note: an exit that it raised could
    fall between the making of a claim file and the writing of its owner, and leave the file behind.

    Args:
        group: the ranks of this replica, over tensor and pipeline parallelism.
        leads: whether this rank is the one that claims shards and writes them.
    """

    def __init__(self, group: ProcessGroup, leads: bool) -> None:
        ranks = torch.distributed.get_process_group_ranks(group)
        self.leads = leads
        told: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(told, (ranks, self.leads))
        self._leader = next(rank for rank in ranks if told[rank][1])
        for replica in sorted({tuple(other) for other, _ in told}):
            # new_group is a collective: every rank takes part in the making of every group.
            group = torch.distributed.new_group(replica, timeout=PATIENCE, backend="gloo")
            if list(replica) == ranks:
                self._group = group
        self._asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def claim_shards(self, writer: CacheWriter, shards: list[int]) -> Iterator[int]:
        """The shards that this replica is to fill; ends when all of `shards` are there."""
        with closing(writer.claim_shards(shards, wait=self._wait)) as claims:
            while True:
                shard = [self._next(claims)]
                # The other ranks wait here until the leader has a shard for them.
                torch.distributed.broadcast_object_list(shard, self._leader, self._group)
                if shard[0] == _STOP:
                    self._stop()
                if shard[0] is None:
                    return
                yield shard[0]

    def stop_if_asked(self) -> None:
        """End all ranks if any was asked to: unwinding removes the open shard and its claim."""
        asked = torch.tensor(int(self._asked))
        # One rank's signal counts for all, so that no rank enters the next forward pass alone.
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX, group=self._group)
        if asked:
            self._stop()

    def stop_if_asked_alone(self) -> None:
        """The same, where the other ranks can no longer be told."""
        if self._asked:
            self._stop()

    def _stop(self) -> NoReturn:
        exit_stopped(
            "stopped by SIGTERM; the finished shards stay, and the same command goes on from them"
            if self.leads
            else None
        )

    def _next(self, claims: Iterator[int]) -> int | None:
        """On the leader the next shard, if there is one, or _STOP."""
        if not self.leads:
            return None
        try:
            return next(claims, None)
        except InterruptedError:
            return _STOP

    def _wait(self) -> None:
        """Pass some seconds, while other jobs are at work on what is left."""
        for _ in range(_POLL_S):
            if self._asked:
                raise InterruptedError
            time.sleep(1)
