"""The loss on a whole vocabulary: every mode and edge against the float64 reference."""

import gc
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_cases import EDGES, GRID, MODES, Case, V, random_case
from loss_checks import assert_matches, assert_matches_reference, expected_of, run
from reference import reference_loss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nemo_kd.loss.eager
import nemo_kd.loss.fused
from nemo_kd.loss import KDLossConfig, vocab_parallel_kd_sft_loss


@pytest.mark.parametrize(("edge", "mode", "gather"), GRID)
def test_matches_reference(edge: str, mode: str, gather: str) -> None:
    out, gradient = run(EDGES[edge](), replace(MODES[mode], logits_gather=gather))
    assert_matches(expected_of(edge, mode), out, gradient)


@pytest.mark.parametrize("mode", MODES)
def test_inplace_gradient_lies_where_the_logits_were(mode: str) -> None:
    case = random_case()
    _, expected = run(case, MODES[mode])
    logits = (case.logits * 1).requires_grad_()
    out = vocab_parallel_kd_sft_loss(
        logits, case.labels, case.log_probs, case.ids, case.tails, config=MODES[mode], inplace=True
    )
    (gradient,) = torch.autograd.grad(out.loss.sum(), logits)
    assert gradient.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_default_leaves_the_logits_untouched(mode: str) -> None:
    case = random_case()
    logits = case.logits.clone().requires_grad_()
    out = vocab_parallel_kd_sft_loss(
        logits, case.labels, case.log_probs, case.ids, case.tails, config=MODES[mode]
    )
    out.loss.sum().backward()
    assert torch.equal(logits, case.logits)


@pytest.mark.parametrize("mode", MODES)
def test_without_gradient_nothing_is_written(mode: str) -> None:
    case = random_case()
    expected, _ = run(case, MODES[mode])
    logits = case.logits.clone().requires_grad_()
    with torch.no_grad():
        out = vocab_parallel_kd_sft_loss(
            logits,
            case.labels,
            case.log_probs,
            case.ids,
            case.tails,
            config=MODES[mode],
            inplace=True,
        )
    assert torch.equal(logits, case.logits)
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, expected.loss.detach(), rtol=0, atol=0)


def test_inplace_logits_that_need_no_gradient_stay() -> None:
    case = random_case()
    before = case.logits.clone()
    vocab_parallel_kd_sft_loss(
        case.logits, case.labels, case.log_probs, case.ids, case.tails,
        config=MODES["forward_kl-label-T1"], inplace=True,
    )  # fmt: skip
    assert torch.equal(case.logits, before)


@pytest.mark.parametrize("gather", ["topk", "full"])
@pytest.mark.parametrize("mode", ["forward_kl-label-T1", "reverse_kl-bucket-T2"])
def test_the_teacher_gets_no_gradient(mode: str, gather: str) -> None:
    case = random_case()
    case.log_probs.requires_grad_(), case.tails.requires_grad_()
    run(case, replace(MODES[mode], logits_gather=gather))
    assert case.log_probs.grad is None
    assert case.tails.grad is None


class Unused(torch.autograd.Function):
    """Gives its input back, and no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> None:
        return None


def test_a_loss_without_a_gradient_gives_none() -> None:
    case = random_case()
    logits = case.logits.requires_grad_()
    out = vocab_parallel_kd_sft_loss(
        logits, case.labels, case.log_probs, case.ids, config=KDLossConfig(tail="renormalize")
    )
    (Unused.apply(out.loss).sum() + 0 * logits[0, 0, 0]).backward()
    assert (logits.grad == 0).all()


class StorageSizes(TorchDispatchMode):
    """The size of every storage that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes_at: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                self.bytes_at[storage.data_ptr()] = storage.nbytes()
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_gradient", [True, False], ids=["inplace", "no_grad"])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_larger_than_a_chunk_is_allocated(
    mode: str, with_gradient: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = random_case(shape=(16, 4), v=512)
    chunk_bytes = 8 * 512 * 4
    monkeypatch.setitem(nemo_kd.loss.eager.CHUNK_BYTES, "cpu", chunk_bytes)
    logits = case.logits.to(dtype).requires_grad_(with_gradient)
    with StorageSizes() as sizes:
        out = vocab_parallel_kd_sft_loss(
            logits,
            case.labels,
            case.log_probs,
            case.ids,
            case.tails,
            config=MODES[mode],
            inplace=True,
        )
        if with_gradient:
            out.loss.sum().backward()
    del sizes.bytes_at[logits.data_ptr()]
    assert max(sizes.bytes_at.values()) <= chunk_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_not_inplace_allocates_one_tensor_of_all_the_logits(
    mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the gradient, and it is allocated in backward."""
    case = random_case(shape=(16, 4), v=512)
    monkeypatch.setitem(nemo_kd.loss.eager.CHUNK_BYTES, "cpu", 8 * 512 * 4)
    logits = case.logits.to(dtype).requires_grad_()
    rows = (case.labels, case.log_probs, case.ids, case.tails)
    with StorageSizes() as forward:
        out = vocab_parallel_kd_sft_loss(logits, *rows, config=MODES[mode])
    with StorageSizes() as backward:
        out.loss.sum().backward()
    for sizes, expected in ((forward, 0), (backward, 1)):
        sizes.bytes_at.pop(logits.data_ptr(), None)
        large = [size for size in sizes.bytes_at.values() if size > 8 * 512 * 4]
        assert large == [logits.nbytes] * expected


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_gradient_asks_for_huge_pages(dtype: torch.dtype) -> None:
    """And has the values of the gradient that takes the memory of the logits."""
    case, config = random_case(shape=(32, 4), v=65536), MODES["forward_kl-label-T1"]
    case = replace(case, logits=case.logits.to(dtype))
    _, gradient = run(case, config)
    assert gradient.nbytes >= nemo_kd.loss.fused.HUGE_BYTES
    mappings = re.findall(
        r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags: (.*?)$",
        Path("/proc/self/smaps").read_text(),
        re.DOTALL | re.MULTILINE,
    )
    flags = [
        words.split()
        for begin, end, words in mappings
        if int(begin, 16) <= gradient.data_ptr() < int(end, 16)
    ]
    assert "hg" in flags[0]  # MADV_HUGEPAGE
    assert torch.equal(gradient, run(case, config, inplace=True)[1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [1, 4, 5])
def test_chunks_that_do_not_divide_the_tokens(
    mode: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = random_case(shape=(3, 3))
    monkeypatch.setitem(nemo_kd.loss.eager.CHUNK_BYTES, "cpu", rows * V * 4)
    for inplace in (False, True):
        out, gradient = run(case, MODES[mode], inplace=inplace)
        assert_matches_reference(case, MODES[mode], out, gradient)


def test_no_chunk_is_kept_between_forward_and_backward() -> None:
    """Saved are the logits and a few numbers a token; pipeline stages hold many micro batches."""
    case = random_case(shape=(2, 2), v=4096)
    logits = case.logits.requires_grad_()
    rows = (case.labels, case.log_probs, case.ids, case.tails)
    config = MODES["forward_kl-label-T2"]
    out = vocab_parallel_kd_sft_loss(logits, *rows, config=config)
    gc.collect()
    assert out.loss.requires_grad
    engines = [x for x in gc.get_objects() if type(x) is nemo_kd.loss.eager.EagerEngine]
    assert engines
    assert not any(engine._memory for engine in engines)


def test_a_row_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    case, config = random_case(), MODES["jsd-bucket-T2"]
    monkeypatch.setitem(nemo_kd.loss.eager.CHUNK_BYTES, "cpu", 1)
    assert_matches_reference(case, config, *run(case, config))


@pytest.mark.parametrize(
    ("inplace", "huge_bytes"), [(False, 2**23), (False, 1), (True, 2**23)], ids=str
)
@pytest.mark.parametrize("strides", ["transposed", "sliced", "vocabulary_strided"])
def test_non_contiguous_logits(
    strides: str, inplace: bool, huge_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(nemo_kd.loss.eager.CHUNK_BYTES, "cpu", 2 * V * 4)
    monkeypatch.setattr(nemo_kd.loss.fused, "HUGE_BYTES", huge_bytes)
    case, config = random_case(shape=(3, 4)), MODES["forward_kl-bucket-T2"]
    base, view = {
        "transposed": (case.logits.transpose(0, 1).contiguous(), lambda x: x.transpose(0, 1)),
        "sliced": (case.logits.repeat(1, 2, 1), lambda x: x[:, :4]),
        "vocabulary_strided": (case.logits.repeat_interleave(2, -1), lambda x: x[..., ::2]),
    }[strides]
    logits = view(base.requires_grad_())
    assert not logits.is_contiguous()
    out = vocab_parallel_kd_sft_loss(
        logits, case.labels, case.log_probs, case.ids, case.tails, config=config, inplace=inplace
    )
    out.loss.sum().backward()
    assert_matches_reference(case, config, out, view(base.grad))


@pytest.mark.parametrize(("gather", "inplace"), [("topk", False), ("topk", True), ("full", False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_half_precision_logits(mode: str, dtype: torch.dtype, gather: str, inplace: bool) -> None:
    case, config = random_case(), replace(MODES[mode], logits_gather=gather)
    case.logits = case.logits.to(dtype)
    out, gradient = run(case, config, inplace=inplace)
    assert out.loss.dtype == torch.float32
    assert gradient.dtype == dtype
    expected = reference_loss(*case.flat(), config)
    # The logits are exact in float32, so the values are as for float32 input.
    torch.testing.assert_close(out.loss.double().flatten(), expected["loss"], rtol=1e-5, atol=1e-6)
    # The gradient is rounded once, when stored: half a unit in the last place of each element.
    torch.testing.assert_close(
        gradient.double().reshape(expected["gradient"].shape),
        expected["gradient"],
        rtol=torch.finfo(dtype).eps / 2 * 1.01,
        atol=1e-6,
    )


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.endswith("-T2")])
def test_gradcheck(mode: str) -> None:
    case = random_case(shape=(4,), k=3, v=9)
    case.ids[1, 1:] = -1
    case.ids[2] = -1

    def loss(logits: torch.Tensor) -> torch.Tensor:
        arguments = (case.labels, case.log_probs.double(), case.ids, case.tails.double())
        return vocab_parallel_kd_sft_loss(logits, *arguments, config=MODES[mode]).loss

    assert torch.autograd.gradcheck(loss, case.logits.double().requires_grad_())


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grad_output_that_is_not_one(dtype: torch.dtype, inplace: bool) -> None:
    case, config = random_case(), MODES["forward_kl-label-T1"]
    case.logits = case.logits.to(dtype)
    weights = torch.linspace(-2, 3, case.labels.numel()).view(case.labels.shape)
    weights[0, 0] = 0
    logits = case.logits.clone().requires_grad_()
    case.logits = case.logits.float()
    _, unweighted = run(case, config)
    out = vocab_parallel_kd_sft_loss(
        logits, case.labels, case.log_probs, case.ids, case.tails, config=config, inplace=inplace
    )
    (gradient,) = torch.autograd.grad((weights * out.loss).sum(), logits)
    # Rounded once, when it is stored: the weight is multiplied in float32.
    rtol = 2**-21 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 * 1.01
    expected = weights[..., None] * unweighted
    torch.testing.assert_close(gradient.float(), expected, rtol=rtol, atol=1e-9)
    assert (gradient[0, 0] == 0).all()


def test_masked_batch_has_no_loss_and_no_gradient() -> None:
    case = EDGES["all_rows_empty"]()
    logits = case.logits.clone().requires_grad_()
    out = vocab_parallel_kd_sft_loss(
        logits,
        case.labels,
        case.log_probs,
        case.ids,
        case.tails,
        config=KDLossConfig(tail="renormalize"),
    )
    loss = (out.loss * torch.zeros_like(out.loss)).sum()
    loss.backward()
    assert loss == 0
    assert (out.kd_loss == 0).all()
    assert (logits.grad == 0).all()
    assert all((value == 0).all() for value in out.metrics.values())


def test_no_tokens() -> None:
    case = random_case(shape=(0, 2))
    out, gradient = run(case, KDLossConfig(tail="renormalize"))
    assert out.loss.shape == (0, 2)
    assert gradient.shape == case.logits.shape


def test_graph_may_be_walked_again_unless_inplace() -> None:
    case = random_case()
    for inplace in (False, True):
        logits = case.logits.clone().requires_grad_()
        out = vocab_parallel_kd_sft_loss(
            logits,
            case.labels,
            case.log_probs,
            case.ids,
            config=KDLossConfig(tail="renormalize"),
            inplace=inplace,
        )
        loss = 2 * out.loss.sum()
        (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
        if inplace:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(loss, logits)
        else:
            assert torch.equal(first, torch.autograd.grad(loss, logits)[0])


def test_gradient_of_a_row_does_not_depend_on_the_micro_batch() -> None:
    case, config = random_case(shape=(6,)), KDLossConfig(tail="renormalize")
    _, together = run(case, config)
    for i in range(6):
        row = slice(i, i + 1)
        alone = Case(*(getattr(case, name)[row] for name in Case.__dataclass_fields__))
        # Only the last bits differ: torch computes the exponentials at a tensor's end one by one,
        # not by vector.
        torch.testing.assert_close(run(alone, config)[1], together[row], rtol=2**-21, atol=0)


@pytest.mark.parametrize(
    "mode", ["forward_kl-renormalize-T2", "jsd-bucket-T2", "forward_kl-drop-T2"]
)
def test_gradient_does_not_grow_with_k(mode: str) -> None:
    """|dKD/dz|_1 <= 2 T for a difference of two distributions, however many entries they have."""
    config = replace(MODES[mode], kd_loss_weight=1.0, sft_loss_weight=0.0)
    for k in (1, 6, 24, V):
        _, gradient = run(random_case(k=k), config)
        assert gradient.abs().sum(-1).max() <= 2 * config.temperature * 1.0001


@pytest.mark.parametrize("gather", ["topk", "full"])
def test_bucket_tail_is_exact_for_a_certain_student(gather: str) -> None:
    """1 - sum clamped at 1e-8 read 11.85 where the loss is 15.11 and gave the tail no gradient."""
    case = random_case(shape=(1,), k=2, v=8)
    case.ids = torch.tensor([[0, 1]])
    case.log_probs = torch.tensor([[0.3, 0.3]]).log()
    case.tails = torch.tensor([0.4]).log()
    case.logits = torch.tensor([[30.0, 30.0, -10.0, -10.0, -10.0, -10.0, -10.0, -10.0]])
    case.labels = torch.tensor([0])
    config = KDLossConfig(tail="bucket", sft_loss_weight=0, logits_gather=gather)
    out, gradient = run(case, config)
    assert_matches_reference(case, config, out, gradient)
    assert gradient[0, 2:].sum() == pytest.approx(-0.4, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergence": "kl"}, "expected divergence one of forward_kl, reverse_kl, jsd; got 'kl'"),
        ({"tail": "ghost"}, "expected tail one of"),
        ({"logits_gather": "all"}, "expected logits_gather one of"),
        ({"temperature": 0.0}, "expected temperature > 0, got 0.0"),
        ({"temperature": float("nan")}, "expected temperature > 0, got nan"),
        ({"jsd_beta": 1.0}, "expected 0 < jsd_beta < 1, got 1.0"),
        ({"kd_loss_weight": -1.0}, "expected kd_loss_weight >= 0, got -1.0"),
        ({"kd_loss_weight": 0.0, "sft_loss_weight": 0.0}, "got 0 for both"),
        ({"divergence": "reverse_kl", "tail": "label"}, "use tail renormalize or bucket"),
        ({"divergence": "reverse_kl", "tail": "drop"}, "use tail renormalize or bucket"),
        ({"divergence": "jsd", "tail": "label"}, "use tail renormalize or bucket"),
        ({"divergence": "jsd", "tail": "drop"}, "use tail renormalize or bucket"),
    ],
)
def test_config_refuses_what_has_no_meaning(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KDLossConfig(**{"tail": "renormalize", **change})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ids", V, "expected teacher_topk_ids from -1 to 47, got 48; the student's .* V=48"),
        ("ids", -2, "expected teacher_topk_ids from -1 to 47, got -2"),
        ("labels", V, "expected labels from 0 to 47, got 48"),
        ("labels", -100, "expected labels from 0 to 47, got -100"),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(name: str, value: int, message: str) -> None:
    case = random_case()
    getattr(case, name)[1, 1] = value
    with pytest.raises(ValueError, match=message):
        run(case, KDLossConfig(tail="renormalize"))


def test_an_id_twice_in_a_row_is_refused() -> None:
    case = random_case()
    case.ids[1, 1, 5] = case.ids[1, 1, 0]
    with pytest.raises(
        ValueError, match=rf"each id at most once a row, got {case.ids[1, 1, 0]} twice"
    ):
        run(case, KDLossConfig(tail="renormalize"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("labels", r"expected labels of shape \(3, 2\)"),
        ("log_probs", "expected teacher_topk_log_probs of the ids' shape"),
        ("ids", r"expected teacher_topk_ids of shape \(3, 2\) \+ \(K,\)"),
        ("tails", r"expected teacher_tail_log_probs of shape \(3, 2\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name: str, message: str) -> None:
    case = random_case()
    setattr(case, name, getattr(case, name)[:2])
    with pytest.raises(ValueError, match=message):
        run(case, KDLossConfig(tail="bucket"))


@pytest.mark.parametrize("tail", ["bucket", "label"])
def test_missing_tail_is_refused(tail: str) -> None:
    case = random_case()
    with pytest.raises(ValueError, match=f"expected teacher_tail_log_probs with tail={tail}"):
        vocab_parallel_kd_sft_loss(
            case.logits, case.labels, case.log_probs, case.ids, config=KDLossConfig(tail=tail)
        )
