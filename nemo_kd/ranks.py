"""Work of one rank for all ranks of a job."""

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
