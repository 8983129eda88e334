"""Context parallelism: a rank's part of a batch, as each release of Megatron Core cuts it."""

from typing import Any

import pytest
import torch
from distributed import run_distributed


def parts(rank: int, world_size: int, asks: bool) -> list[list[int]]:
    from megatron.core import utils

    from nemo_kd.student.slices import part_of_sequence

    own = utils.get_batch_on_this_cp_rank
    asked: list[bool] = []

    def core_0_19(batch: Any, is_hybrid_cp: bool, cp_group: Any = None) -> Any:
        asked.append(is_hybrid_cp)
        return own(batch, cp_group=cp_group)

    if asks:
        utils.get_batch_on_this_cp_rank = core_0_19
    positions = torch.arange(16).view(2, 8)
    rows = positions[..., None].expand(2, 8, 3)
    batch = {"tokens": positions, "topk_ids": rows}
    part = part_of_sequence(batch, torch.distributed.group.WORLD)
    assert asked == ([False] if asks else [])
    assert torch.equal(part["topk_ids"][..., 0], part["tokens"]), "the rows go with their tokens"
    return part["tokens"].tolist()


@pytest.mark.parametrize("asks", [False, True], ids=["core 0.16", "core 0.19"])
def test_a_rank_has_two_chunks_of_each_sequence(asks: bool) -> None:
    outer, inner = run_distributed(parts, 2, asks)
    assert outer == [[0, 1, 6, 7], [8, 9, 14, 15]]
    assert inner == [[2, 3, 4, 5], [10, 11, 12, 13]]
