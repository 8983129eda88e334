"""One replica of the teacher: its ranks work on the same shard, and stop together."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn

import torch
from torch.distributed import ProcessGroup

from nemo_kd.cache import CacheWriter
from nemo_kd.process import exit_stopped

# How long the ranks of a replica wait for their leader, which waits for the shards of other jobs.
PATIENCE = timedelta(days=7)
# Seconds between two looks at the shards that other jobs work on. A look reads every claim file.
_POLL_S = 5
# The leader sends this instead of a shard's number when it was asked to stop while it waited.
_STOP = -1


class Replica:
    """The ranks of one copy of the teacher, seen from one of them: they fill the same shards.

    The leader, the one rank of the last pipeline stage that writes, claims for all of them.

    On SIGTERM, which Slurm sends to preempt a job, all ranks stop at the same point; otherwise the
    others would hang in a collective. The signal's handler only takes a note: if the handler ended
    the process, it could do so after a claim file is made and before the owner is written into it,
    and the file would stay.

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
            made = torch.distributed.new_group(replica, timeout=PATIENCE, backend="gloo")
            if list(replica) == ranks:
                self._group = made
        self._asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def claim_shards(
        self, writer: CacheWriter, shards: list[int], on_wait: Callable[[], None]
    ) -> Iterator[int]:
        """The shards that this replica is to fill. It ends when all of `shards` are published.

        Each time that all the missing ones are claimed by others, the leader calls `on_wait`.
        """
        with closing(writer.claim_shards(shards, wait=partial(self._wait, on_wait))) as claims:
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
        """Ends all ranks if one was asked to. The exit removes the open shard and its claim."""
        asked = torch.tensor(int(self._asked))
        # A maximum: no rank enters the next forward pass when another rank has stopped.
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX, group=self._group)
        if asked:
            self._stop()

    def stop_if_asked_alone(self) -> None:
        """Ends this rank if it was asked to, at a point that has no collectives left."""
        if self._asked:
            self._stop()

    def _stop(self) -> NoReturn:
        exit_stopped(
            "stopped by SIGTERM; the finished shards stay, and the same command resumes from them"
            if self.leads
            else None
        )

    def _next(self, claims: Iterator[int]) -> int | None:
        """On the leader, the next shard, None when there is none, or _STOP."""
        if not self.leads:
            return None
        try:
            return next(claims, None)
        except InterruptedError:
            return _STOP

    def _wait(self, on_wait: Callable[[], None]) -> None:
        """Waits for _POLL_S seconds while other jobs work on the missing shards."""
        on_wait()
        for _ in range(_POLL_S):
            if self._asked:
                raise InterruptedError
            time.sleep(1)
