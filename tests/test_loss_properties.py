"""What holds for any input, by hypothesis."""

import math
from dataclasses import replace
from random import Random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import MODES, Case, random_case
from loss_checks import run

MODE = st.sampled_from(sorted(MODES))
IS_DIVERGENCE = st.sampled_from([name for name in sorted(MODES) if "drop" not in name])
# Derandomised: every run of a commit draws the same inputs, so that only a change can fail CI.
any_input = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Rows of any raggedness over a small vocabulary, with logits from flat to certain."""
    v = draw(st.integers(2, 30))
    seed = draw(st.integers(0, 2**31))
    case = random_case(
        seed=seed,
        shape=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        k=draw(st.integers(1, v)),
        v=v,
    )
    case.logits *= 10 ** draw(st.floats(-3, 2))
    generator = torch.Generator().manual_seed(seed)
    num_kept = torch.randint(case.ids.shape[-1] + 1, case.labels.shape, generator=generator)
    case.ids[torch.arange(case.ids.shape[-1]) >= num_kept[..., None]] = -1
    if draw(st.booleans()):
        case.labels = case.ids[..., 0].clamp(min=0).long()
    return case


@any_input
@given(cases(), IS_DIVERGENCE)
def test_kd_loss_is_not_negative(case: Case, mode: str) -> None:
    out, _ = run(case, MODES[mode])
    # The divergence of two normalised float32 distributions, to their rounding; T^2 is in it.
    assert (out.kd_loss >= -1e-6 * MODES[mode].temperature ** 2).all()


@any_input
@given(cases(), MODE)
def test_everything_is_finite(case: Case, mode: str) -> None:
    out, gradient = run(case, MODES[mode])
    assert gradient.isfinite().all()
    assert all(value.isfinite().all() for value in (out.loss, out.kd_loss, *out.metrics.values()))


@any_input
@given(cases(), IS_DIVERGENCE)
def test_zero_when_student_equals_teacher(case: Case, mode: str) -> None:
    config = MODES[mode]
    if config.tail == "label":  # equal to the target only if the outside's mass is on the label
        case.ids = case.ids[..., :1].clone()
    q = (case.logits / config.temperature).double().log_softmax(-1)
    kept = case.ids.long().clamp(min=0)
    scale = config.temperature if config.tail == "renormalize" else 1
    case.log_probs = (q.gather(-1, kept) * scale).masked_fill(case.ids < 0, -math.inf)
    is_kept = torch.zeros_like(q).scatter_add_(-1, kept, (case.ids >= 0).double()) > 0
    case.tails = q.masked_fill(is_kept, -math.inf).logsumexp(-1)
    if config.tail == "label":
        case.logits = case.logits.masked_fill(~is_kept, -1e4)  # nothing outside but the label
        case.labels, case.log_probs = kept[..., 0], torch.zeros_like(case.log_probs)
        case.tails = torch.full_like(case.tails, -math.inf)
    out, gradient = run(case, replace(config, sft_loss_weight=0.0, kd_loss_weight=1.0))
    # Logits up to 1e3 carry 6e-5 of rounding into each log-prob; the divergence is of second order.
    assert (out.kd_loss.abs() <= 1e-5).all()
    assert (gradient.abs() <= 3e-4).all()


@any_input
@given(cases(), MODE, st.randoms())
def test_order_of_a_row_changes_nothing(case: Case, mode: str, random: Random) -> None:
    out, gradient = run(case, MODES[mode])
    order = list(range(case.ids.shape[-1]))
    random.shuffle(order)
    case.ids, case.log_probs = case.ids[..., order], case.log_probs[..., order]
    shuffled, shuffled_gradient = run(case, MODES[mode])
    # Sums of the same float32 terms in another order.
    torch.testing.assert_close(shuffled.loss, out.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shuffled_gradient, gradient, rtol=1e-5, atol=1e-5)


@any_input
@given(cases(), MODE, st.integers(-64, 64))
def test_constant_on_the_logits_changes_nothing(case: Case, mode: str, constant: int) -> None:
    case.logits = (case.logits * 2**10).round() / 2**10  # so that adding an integer is exact
    out, gradient = run(case, MODES[mode])
    case.logits = case.logits + constant
    shifted, shifted_gradient = run(case, MODES[mode])
    torch.testing.assert_close(shifted.loss, out.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shifted_gradient, gradient, rtol=1e-6, atol=1e-6)


@any_input
@given(cases(), MODE)
def test_topk_and_full_agree(case: Case, mode: str) -> None:
    out, gradient = run(case, MODES[mode])
    full, full_gradient = run(case, replace(MODES[mode], logits_gather="full"))
    # "full" takes log_softmax over V first, which rounds at the size of the log-probs: up to 1e3.
    torch.testing.assert_close(full.loss, out.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(full_gradient, gradient, rtol=1e-4, atol=3e-4)


@any_input
@given(cases(), MODE)
def test_gradient_sums_to_zero_over_the_vocabulary(case: Case, mode: str) -> None:
    """softmax does not see a constant, so no loss of it has a gradient along one."""
    _, gradient = run(case, MODES[mode])
    largest = gradient.abs().amax(-1)
    assert (gradient.double().sum(-1).abs() <= 1e-5 * largest.clamp(min=1)).all()
