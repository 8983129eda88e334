"""Runs the loss on a whole vocabulary, and compares an output with the float64 reference."""

from functools import cache

import torch
from loss_cases import EDGES, MODES, Case
from reference import reference_loss

from nemo_kd.loss import KDLossConfig, KDLossOutput, vocab_parallel_kd_sft_loss


def run(
    case: Case, config: KDLossConfig, *, inplace: bool = False
) -> tuple[KDLossOutput, torch.Tensor]:
    """The output and dsum(loss)/dlogits."""
    logits = case.logits.clone().requires_grad_()
    out = vocab_parallel_kd_sft_loss(
        logits, case.labels, case.log_probs, case.ids, case.tails, config=config, inplace=inplace
    )
    out.loss.sum().backward()
    assert logits.grad is not None
    return out, logits.grad


@cache
def expected_of(edge: str, mode: str) -> dict[str, torch.Tensor]:
    """What `reference_loss` returns for a named edge and mode."""
    return reference_loss(*EDGES[edge]().flat(), MODES[mode])


def assert_matches_reference(
    case: Case, config: KDLossConfig, out: KDLossOutput, gradient: torch.Tensor
) -> None:
    assert_matches(reference_loss(*case.flat(), config), out, gradient)


def assert_matches(
    expected: dict[str, torch.Tensor], out: KDLossOutput, gradient: torch.Tensor
) -> None:
    """Values to 1e-5 relative, gradients to 1e-5 of the largest: float32 keeps seven digits, and
    sums of 48 terms and an exp cost about one. The values have 1e-6 beside it, because a KD loss
    near 0 is a difference of log-probs of order 1."""
    for name, value in {**out._asdict(), **out.metrics}.items():
        if name != "metrics":
            torch.testing.assert_close(
                value.double().flatten(),
                expected[name],
                rtol=1e-5,
                atol=1e-6,
                msg=lambda m, n=name: f"{n}: {m}",
            )
    largest = expected["gradient"].abs().max()
    error = (gradient.double().reshape(expected["gradient"].shape) - expected["gradient"]).abs()
    assert error.max() <= 1e-5 * largest
