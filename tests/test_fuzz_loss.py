"""Some thousand of the cases of `make fuzz`: the loss against its formula in long double."""

import pytest
from fuzz_loss import fuzz


@pytest.mark.parametrize(("tp_size", "num_cases"), [(1, 3000), (2, 500), (4, 500)])
def test_random_inputs_match_the_formula(tp_size: int, num_cases: int) -> None:
    wrong = fuzz(range(num_cases), tp_size, timeout=300)
    assert not wrong, "\n".join(wrong[:10])
