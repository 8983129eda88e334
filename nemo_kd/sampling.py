"""The random generator of sampled rows: SplitMix64 as a hash, so that any token can be drawn alone.

A draw depends on the seed, the token's row key and the number of the draw. It does not depend on
the order of the tokens or on how they are spread over processes, so a resumed run draws the same.
"""

import torch
from torch import Tensor

_STEP = -0x61C8864680B583EB  # 2^64 divided by the golden ratio, as an int64


def uniform(row_keys: Tensor, seed: int, num_draws: int) -> Tensor:
    """`[N, num_draws]` float64 in [0, 1), from row keys `[N]` int64."""
    states = _mix(row_keys + _mix(torch.full_like(row_keys, seed) + _STEP))
    numbers = torch.arange(1, num_draws + 1, device=row_keys.device)
    return _shift_right(_mix(states[:, None] + numbers * _STEP), 11).double() * 2.0**-53


def _mix(state: Tensor) -> Tensor:
    """The output function of SplitMix64. It needs products modulo 2^64, as int64 has them."""
    state = (state ^ _shift_right(state, 30)) * -0x40A7B892E31B1A47
    state = (state ^ _shift_right(state, 27)) * -0x6B2FB644ECCEEE15
    return state ^ _shift_right(state, 31)


def _shift_right(state: Tensor, bits: int) -> Tensor:
    """Shift as an unsigned number: `>>` of an int64 would fill up with copies of the sign bit."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
