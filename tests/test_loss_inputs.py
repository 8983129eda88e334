"""Inputs that a caller passes by mistake, or with strides of their own."""

from dataclasses import replace

import pytest
import torch
from loss_cases import MODES, V, random_case
from loss_checks import assert_matches_reference, run

import nemo_kd.loss.eager
from nemo_kd.loss import KDLossConfig, vocab_parallel_kd_sft_loss

GATHERS = ["topk", "full"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inplace", [False, True])
def test_half_precision_logits_without_a_flat_view(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, inplace: bool
) -> None:
    """Each of the 3 sequences is walked in a chunk of 4 tokens and a chunk of 1."""
    monkeypatch.setitem(nemo_kd.loss.eager.CHUNK_BYTES, "cpu", 4 * V * 4)
    case, config = random_case(shape=(3, 5)), MODES["forward_kl-label-T2"]
    memory = case.logits.transpose(0, 1).contiguous().to(dtype)
    gradients = []
    for logits in (memory.transpose(0, 1), memory.transpose(0, 1).contiguous()):
        leaf = logits.detach().requires_grad_()
        out = vocab_parallel_kd_sft_loss(
            leaf.view_as(leaf) if not inplace else leaf * 1,
            *(case.labels, case.log_probs, case.ids, case.tails),
            config=config,
            inplace=inplace,
        )
        gradients += torch.autograd.grad(out.loss.sum(), leaf)
    # The vectors of a CPU end at other tokens, which moves the last bit of the computing type.
    torch.testing.assert_close(gradients[0], gradients[1], rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("gather", GATHERS)
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.endswith("T1")])
def test_a_nan_of_the_teacher_shows_in_its_row_only(mode: str, gather: str) -> None:
    case = random_case()
    case.log_probs[1, 1, 2] = torch.nan
    out, gradient = run(case, replace(MODES[mode], logits_gather=gather))
    is_nan = torch.zeros(3, 2, dtype=torch.bool)
    is_nan[1, 1] = True
    assert torch.equal(out.kd_loss.isnan(), is_nan)
    assert torch.equal(out.loss.isnan(), is_nan)
    assert torch.equal(gradient.isnan().any(-1), is_nan)


@pytest.mark.parametrize("gather", GATHERS)
@pytest.mark.parametrize(
    "mode", [mode for mode in MODES if "renormalize" in mode or "bucket" in mode]
)
def test_classes_far_below_the_largest_logit_are_exact(mode: str, gather: str) -> None:
    """Relative to the largest logit of the vocabulary, KD was off by 1.6e-4 here."""
    case = random_case()
    outside = next(i for i in range(V) if i not in case.ids[0, 0].tolist())
    case.logits[0, 0, outside] = 1e4
    if "bucket" in mode:
        case.tails[0, 0] = -torch.inf
    config = replace(MODES[mode], sft_loss_weight=0, logits_gather=gather)
    out, gradient = run(case, config)
    assert_matches_reference(case, config, out, gradient)


@pytest.mark.parametrize("gather", GATHERS)
def test_a_weight_of_0_turns_its_term_off(gather: str) -> None:
    case = random_case()
    ordinary, _ = run(case, KDLossConfig(tail="drop", logits_gather=gather))
    case.log_probs[0, 0, 0] = torch.nan
    config = KDLossConfig(tail="drop", kd_loss_weight=0, sft_loss_weight=1, logits_gather=gather)
    out, gradient = run(case, config)
    assert torch.equal(out.loss, ordinary.sft_loss)
    assert gradient.isfinite().all()

    case = random_case()
    case.labels[0, 0] = next(i for i in range(V) if i not in case.ids[0, 0].tolist())
    case.logits[0, 0, case.labels[0, 0]] = -torch.inf
    out, gradient = run(case, replace(config, kd_loss_weight=1, sft_loss_weight=0))
    assert torch.equal(out.loss, out.kd_loss)
    assert out.sft_loss[0, 0] == torch.inf
    assert gradient.isfinite().all()


def test_labels_of_minus_100_name_the_remedy() -> None:
    case = random_case()
    case.labels[1, 1] = -100
    with pytest.raises(ValueError, match="where the loss is masked, use any id instead of -100"):
        run(case, MODES["forward_kl-label-T1"])


@pytest.mark.parametrize("gather", GATHERS)
@pytest.mark.parametrize("dtype", [torch.int16, torch.uint16, torch.uint8, torch.int64])
def test_every_integer_type_of_ids_and_labels(dtype: torch.dtype, gather: str) -> None:
    case, config = random_case(), replace(MODES["forward_kl-label-T1"], logits_gather=gather)
    expected, _ = run(case, config)
    case.ids, case.labels = case.ids.to(dtype), case.labels.to(dtype)
    assert torch.equal(run(case, config)[0].loss, expected.loss)


@pytest.mark.parametrize("gather", GATHERS)
@pytest.mark.parametrize("name", ["ids", "labels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_ids_and_labels_that_are_no_integers_are_refused(
    name: str, dtype: torch.dtype, gather: str
) -> None:
    case = random_case()
    setattr(case, name, getattr(case, name).to(dtype))
    with pytest.raises(ValueError, match=f"{name} of an integer type, got {dtype}"):
        run(case, replace(MODES["forward_kl-label-T1"], logits_gather=gather))
