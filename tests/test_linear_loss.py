"""The output layer fused in, against the layer and the loss one after the other."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from loss_cases import MODES, Case, V, random_case

import nemo_kd.loss.eager
import nemo_kd.loss.linear
from nemo_kd.loss import (
    KDLossConfig,
    KDLossOutput,
    vocab_parallel_kd_sft_loss,
    vocab_parallel_linear_kd_sft_loss,
)

S, B, H = 6, 2, 16


def make(
    dtype: torch.dtype = torch.float32,
) -> tuple[Case, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A case, hidden `[S, B, H]`, weight `[V, H]` and token weights that mask a third."""
    generator = torch.Generator().manual_seed(3)
    case = random_case(shape=(S, B))
    case.ids[2, 1] = -1
    hidden = torch.randn(S, B, H, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64)
    token_weights = (torch.rand(S, B, generator=generator) < 0.66) / 7
    return case, hidden.to(dtype), weight.to(dtype), token_weights


def two_steps(
    mode: str, dtype: torch.dtype = torch.float32
) -> tuple[KDLossOutput, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output per token, and the scalar loss with the gradients of hidden and weight, times 3."""
    case, hidden, weight, token_weights = make(dtype)
    hidden.requires_grad_(), weight.requires_grad_()
    out = vocab_parallel_kd_sft_loss(
        hidden @ weight.t(), case.labels, case.log_probs, case.ids, case.tails, config=MODES[mode]
    )
    loss = (token_weights * out.loss).sum()
    (3 * loss).backward()
    return out, loss.detach(), hidden.grad, weight.grad


def fused(
    mode: str,
    rank: int = 0,
    world_size: int = 1,
    sequence_parallel: bool = False,
    dtype: torch.dtype = torch.float32,
    prepare: Any = lambda weight: None,
) -> tuple[KDLossOutput, torch.Tensor | None, torch.Tensor | None]:
    """This rank's output and gradients, the loss times 3."""
    case, hidden, weight, token_weights = make(dtype)
    if sequence_parallel:
        hidden = hidden[rank * S // world_size : (rank + 1) * S // world_size].clone()
    weight = weight[rank * V // world_size : (rank + 1) * V // world_size].clone()
    hidden.requires_grad_(), weight.requires_grad_()
    prepare(weight)
    out = vocab_parallel_linear_kd_sft_loss(
        hidden,
        weight,
        case.labels,
        case.log_probs,
        case.ids,
        case.tails,
        token_weights=token_weights,
        config=MODES[mode],
        tp_group=dist.group.WORLD if world_size > 1 else None,
        sequence_parallel=sequence_parallel,
    )
    (3 * out.loss).backward()
    return out._replace(loss=out.loss.detach()), hidden.grad, weight.grad


def assert_same(
    mode: str,
    out: KDLossOutput,
    hidden_grad: torch.Tensor,
    weight_grad: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Matrix products sum 48 terms in another order: 1e-5 of the largest in float32, 1e-12 in
    float64. In bfloat16 each way rounds the gradient of the logits and its products: four units in
    the last place of the largest."""
    expected, loss, expected_hidden, expected_weight = two_steps(mode, dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-6}[dtype]
    torch.testing.assert_close(out.loss, loss, rtol=tolerance, atol=1e-6)
    assert out.loss.shape == ()
    for got, want in ((out.kd_loss, expected.kd_loss), (out.sft_loss, expected.sft_loss)):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for name, value in expected.metrics.items():
        torch.testing.assert_close(out.metrics[name], value, rtol=1e-5, atol=1e-5)
    for got, want in ((hidden_grad, expected_hidden), (weight_grad, expected_weight)):
        assert got.dtype == want.dtype
        assert (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.fixture(params=[5, 100], ids=lambda tokens: f"{tokens}_tokens_a_block")
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(nemo_kd.loss.linear._BLOCK_BYTES, "cpu", request.param * V * 4)
    monkeypatch.setitem(nemo_kd.loss.eager.CHUNK_BYTES, "cpu", 2 * V * 4)
    monkeypatch.setattr(nemo_kd.loss.linear, "_IDS_PER_PRODUCT", 7)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_equals_output_layer_and_loss(mode: str, dtype: torch.dtype) -> None:
    assert_same(mode, *fused(mode, dtype=dtype), dtype=dtype)


@pytest.mark.parametrize("mode", ["forward_kl-renormalize-T1", "forward_kl-label-T1"])
def test_small_token_weights_in_float16(mode: str) -> None:
    """One over the tokens of a long micro batch: before any loss scale, float16 has no bits for it.

    0.2% of the norm, where its own rounding takes some 0.05% and denormals took all.
    """
    generator = torch.Generator().manual_seed(4)
    case = random_case(shape=(8, 2), v=2048)
    hidden = torch.randn(8, 2, H, generator=generator).half()
    weight = (torch.randn(2048, H, generator=generator) / 4).half()
    token_weights, scale = torch.full((8, 2), 2.0**-17), 2.0**16
    rows = (case.labels, case.log_probs, case.ids, case.tails)

    def gradients(*leaves: torch.Tensor, dtype: torch.dtype, fuse: bool) -> list[torch.Tensor]:
        h, w = (leaf.to(dtype).requires_grad_() for leaf in leaves)
        if fuse:
            loss = vocab_parallel_linear_kd_sft_loss(
                h, w, *rows, token_weights=token_weights, config=MODES[mode]
            ).loss
        else:
            out = vocab_parallel_kd_sft_loss(h @ w.t(), *rows, config=MODES[mode])
            loss = (token_weights * out.loss).sum()
        return [g.double() for g in torch.autograd.grad(loss * scale, (h, w))]

    expected = gradients(hidden, weight, dtype=torch.float64, fuse=False)
    actual = gradients(hidden, weight, dtype=torch.float16, fuse=True)
    for got, want in zip(actual, expected, strict=True):
        assert (got - want).norm() <= 2e-3 * want.norm()


def on_every_rank(rank: int, world_size: int) -> dict[tuple[str, bool], Any]:
    nemo_kd.loss.linear._BLOCK_BYTES["cpu"] = 5 * V // world_size * 4
    nemo_kd.loss.eager.CHUNK_BYTES["cpu"] = 2 * V // world_size * 4
    return {
        (mode, sequence_parallel): fused(mode, rank, world_size, sequence_parallel)
        for mode in MODES
        for sequence_parallel in (False, True)
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[tuple[str, bool], Any]]:
    return run_distributed(on_every_rank, 2)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole_S", "sequence_parallel"])
@pytest.mark.parametrize("mode", MODES)
def test_tensor_parallel(ranks: list[Any], mode: str, sequence_parallel: bool) -> None:
    results = [rank[mode, sequence_parallel] for rank in ranks]
    weight_grad = torch.cat([weight_grad for _, _, weight_grad in results])
    for out, hidden_grad, _ in results:
        if sequence_parallel:
            hidden_grad = torch.cat([hidden_grad for _, hidden_grad, _ in results])
        assert_same(mode, out, hidden_grad, weight_grad)


@pytest.mark.parametrize("zero_out", [False, True], ids=["untied", "tied"])
def test_main_grad(zero_out: bool) -> None:
    """Added to what is there, marked as Megatron's layers mark it; a tied weight gets zeros."""
    mode, kept = "forward_kl-label-T1", {}

    def prepare(weight: torch.Tensor) -> None:
        weight.main_grad = torch.ones(weight.shape)
        weight.grad_added_to_main_grad = False
        weight.zero_out_wgrad = zero_out
        kept["weight"] = weight

    _, hidden_grad, stand_in = fused(mode, prepare=prepare)
    _, _, expected_hidden, expected_weight = two_steps(mode)
    weight = kept["weight"]
    assert weight.grad_added_to_main_grad
    torch.testing.assert_close(weight.main_grad, 1 + expected_weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hidden_grad, expected_hidden, rtol=1e-5, atol=1e-6)
    assert stand_in.shape == weight.shape
    if zero_out:
        assert (stand_in == 0).all()


@pytest.mark.parametrize("lacks", ["main_grad", "grad_added_to_main_grad"])
def test_without_megatrons_gradient_buffer_autograd_gets_the_gradient(lacks: str) -> None:
    """As with Megatron's DDP off, or another optimizer: one of the two attributes is missing."""
    mode, kept = "forward_kl-label-T1", {}

    def prepare(weight: torch.Tensor) -> None:
        weight.main_grad = None if lacks == "main_grad" else torch.ones(weight.shape)
        if lacks != "grad_added_to_main_grad":
            weight.grad_added_to_main_grad = False
        kept["weight"] = weight

    out, hidden_grad, weight_grad = fused(mode, prepare=prepare)
    assert_same(mode, out, hidden_grad, weight_grad)
    if lacks == "main_grad":
        assert not kept["weight"].grad_added_to_main_grad
    else:
        assert (kept["weight"].main_grad == 1).all()


def test_no_supervised_token_has_no_loss_and_no_gradient() -> None:
    case, hidden, weight, token_weights = make()
    hidden.requires_grad_(), weight.requires_grad_()
    out = vocab_parallel_linear_kd_sft_loss(
        hidden, weight, case.labels, case.log_probs, case.ids,
        token_weights=torch.zeros_like(token_weights), config=KDLossConfig(tail="renormalize"),
    )  # fmt: skip
    out.loss.backward()
    assert out.loss == 0
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


def test_no_tokens() -> None:
    case, hidden, weight, token_weights = make()
    hidden = hidden[:0].requires_grad_()
    out = vocab_parallel_linear_kd_sft_loss(
        hidden, weight, case.labels[:0], case.log_probs[:0], case.ids[:0],
        token_weights=token_weights[:0], config=KDLossConfig(tail="renormalize"),
    )  # fmt: skip
    out.loss.backward()
    assert out.loss == 0
    assert out.kd_loss.shape == (0, B)
    assert hidden.grad.shape == (0, B, H)


def test_a_weight_of_another_type_than_the_hidden_states() -> None:
    """The logits have the type of the hidden states, and each gradient the type of its tensor."""
    mode = "forward_kl-label-T1"
    case, hidden, weight, token_weights = make(torch.bfloat16)
    _, expected, expected_hidden, expected_weight = two_steps(mode, torch.bfloat16)
    weight = weight.float().requires_grad_()
    out = vocab_parallel_linear_kd_sft_loss(
        hidden.requires_grad_(), weight, case.labels, case.log_probs, case.ids, case.tails,
        token_weights=token_weights, config=MODES[mode],
    )  # fmt: skip
    (3 * out.loss).backward()
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)
    for got, want, dtype in (
        (hidden.grad, expected_hidden, torch.bfloat16),
        (weight.grad, expected_weight, torch.float32),
    ):
        assert got.dtype == dtype
        assert (got - want).abs().max() <= 2**-6 * want.abs().max()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_input_has_no_gradient(frozen: str) -> None:
    case, hidden, weight, token_weights = make()
    (weight if frozen == "hidden" else hidden).requires_grad_()
    out = vocab_parallel_linear_kd_sft_loss(
        hidden, weight, case.labels, case.log_probs, case.ids,
        token_weights=token_weights, config=KDLossConfig(tail="renormalize"),
    )  # fmt: skip
    (3 * out.loss).backward()
    assert (hidden.grad is None) == (frozen == "hidden")
    assert (weight.grad is None) == (frozen == "weight")


def test_without_gradient() -> None:
    mode = "jsd-bucket-T2"
    case, hidden, weight, token_weights = make()
    weight.requires_grad_()
    with torch.no_grad():
        out = vocab_parallel_linear_kd_sft_loss(
            hidden, weight, case.labels, case.log_probs, case.ids, case.tails,
            token_weights=token_weights, config=MODES[mode],
        )  # fmt: skip
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, two_steps(mode)[1], rtol=1e-5, atol=1e-6)


def test_full_gather_is_refused() -> None:
    case, hidden, weight, token_weights = make()
    with pytest.raises(ValueError, match=r"expected logits_gather=topk .* got full"):
        vocab_parallel_linear_kd_sft_loss(
            hidden, weight, case.labels, case.log_probs, case.ids,
            token_weights=token_weights,
            config=KDLossConfig(tail="renormalize", logits_gather="full"),
        )  # fmt: skip


def test_token_weights_of_another_shape_are_refused() -> None:
    case, hidden, weight, token_weights = make()
    with pytest.raises(ValueError, match=r"expected token_weights of shape \(6, 2\)"):
        vocab_parallel_linear_kd_sft_loss(
            hidden, weight, case.labels, case.log_probs, case.ids,
            token_weights=token_weights[:3], config=KDLossConfig(tail="renormalize"),
        )  # fmt: skip
