"""The Triton kernels: interpreted against the float64 reference, and compiled for three GPUs."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed import run_distributed
from kernel_runs import (
    FAR,
    LONG_K,
    LONG_V,
    ONE_OF_EACH,
    SHARDED,
    TYPED,
    WHOLE,
    long_case,
    run_alone,
    run_sharded,
    run_whole,
)
from loss_cases import MODES, random_case
from loss_checks import assert_matches, expected_of, run
from reference import reference_loss
from test_linear_loss import assert_same

from nemo_kd.loss import KDLossConfig
from nemo_kd.loss.fused import engine_for


@pytest.fixture(scope="module")
def whole() -> dict[Any, Any]:
    first, second = run_distributed(run_whole, 2, timeout=240)
    return first | second


@pytest.fixture(scope="module")
def sharded() -> list[dict[Any, Any]]:
    return run_distributed(run_sharded, 2, timeout=240)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return run_distributed(run_alone, 1)[0]


@pytest.mark.parametrize(("edge", "mode"), [case[:2] for case in WHOLE])
def test_interpreted_matches_reference(whole: dict[Any, Any], edge: str, mode: str) -> None:
    assert_matches(expected_of(edge, mode), *whole[edge, mode])


@pytest.mark.parametrize(("edge", "mode"), SHARDED)
def test_interpreted_shards_match_reference(sharded: list[Any], edge: str, mode: str) -> None:
    results = [rank[edge, mode] for rank in sharded]
    gradient = torch.cat([gradient for _, gradient in results], dim=-1)
    for out, _ in results:
        assert_matches(expected_of(edge, mode), out, gradient)


@pytest.mark.parametrize(("dtype", "mode", "strides"), TYPED, ids=str)
def test_interpreted_half_precision_of_any_strides(
    whole: dict[Any, Any], dtype: torch.dtype, mode: str, strides: str
) -> None:
    out, gradient = whole[dtype, mode, strides]
    case = random_case()
    case.logits = case.logits.to(dtype)
    expected = reference_loss(*case.flat(), MODES[mode])
    assert gradient.dtype == dtype
    torch.testing.assert_close(out.loss.double().flatten(), expected["loss"], rtol=1e-5, atol=1e-6)
    # Rounded once. Triton's interpreter cuts off where a GPU rounds bfloat16 to the nearest.
    torch.testing.assert_close(
        gradient.double().reshape(expected["gradient"].shape),
        expected["gradient"],
        rtol=torch.finfo(dtype).eps * (1.01 if dtype == torch.bfloat16 else 0.505),
        atol=1e-6,
    )


@pytest.mark.parametrize("mode", ONE_OF_EACH)
def test_interpreted_rows_of_several_tiles(whole: dict[Any, Any], mode: str) -> None:
    out, gradient = whole["long", mode]
    assert_matches(reference_loss(*long_case().flat(), MODES[mode]), out, gradient)


def test_interpreted_random_inputs(whole: dict[Any, Any], sharded: list[Any]) -> None:
    wrong = [*whole["fuzz", 0], *whole["fuzz", 1], *(line for r in sharded for line in r["fuzz"])]
    assert not wrong, "\n".join(wrong[:10])


@pytest.mark.parametrize("mode", ONE_OF_EACH)
def test_interpreted_output_layer(
    alone: dict[str, Any], sharded: list[dict[Any, Any]], mode: str
) -> None:
    assert_same(mode, *alone["linear"][mode])
    results = [rank["linear", mode] for rank in sharded]
    weight_grad = torch.cat([weight_grad for _, _, weight_grad in results])
    for out, hidden_grad, _ in results:
        assert_same(mode, out, hidden_grad, weight_grad)


@pytest.mark.parametrize("mode", ONE_OF_EACH)
def test_bytes_a_logit(alone: dict[str, Any], mode: str) -> None:
    """2 in forward, 2 + 2 in backward; beside them each class is read once and written once."""
    seen = alone["traffic"][mode]
    num_logits, case = 2 * LONG_V, long_case()
    entries = int((case.ids >= 0).sum())
    new_labels = int((case.ids != case.labels[:, None]).all(-1).sum())
    assert entries == LONG_K + 150
    assert seen["loaded"] == {"forward": 2 * (num_logits + entries + 2), "backward": 2 * num_logits}
    assert seen["stored"] == {"forward": 0, "backward": 2 * (num_logits + entries + new_labels)}


@pytest.mark.parametrize("along", FAR)
def test_offsets_beyond_32_bits(alone: dict[str, Any], along: str) -> None:
    far, near = alone["far"][along]
    assert torch.equal(far, near)


def test_a_second_backward_in_place_is_refused(alone: dict[str, Any]) -> None:
    said = alone["refusals"]
    assert "expected one backward with inplace=True, got a second" in said["again"]
    assert "modified by an inplace operation" in said["stranger"]


def test_float64_logits_take_plain_torch(alone: dict[str, Any]) -> None:
    assert alone["float64"] == torch.float64


def test_the_device_chooses_and_the_variable_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    config = KDLossConfig()

    def name_for(device: str, dtype: torch.dtype = torch.float32) -> str:
        logits: Any = SimpleNamespace(
            device=torch.device(device), is_cuda=device == "cuda", dtype=torch.bfloat16
        )
        return type(engine_for(logits, config, dtype, overwrites=True)).__name__

    assert name_for("cuda") == "TritonEngine"
    assert name_for("cuda", torch.float64) == "EagerEngine"
    assert name_for("cpu") == "EagerEngine"
    monkeypatch.setenv("NEMO_KD_KERNELS", "eager")
    assert name_for("cuda") == "EagerEngine"
    monkeypatch.setenv("NEMO_KD_KERNELS", "triton")
    with pytest.raises(ValueError, match="expected CUDA logits with NEMO_KD_KERNELS=triton, got"):
        name_for("cpu")
    # As where triton is not installed.
    monkeypatch.setitem(sys.modules, "nemo_kd.loss.triton_kernels", None)
    with pytest.raises(ValueError, match="expected an importable triton with NEMO_KD_KERNELS"):
        name_for("cuda")
    monkeypatch.delenv("NEMO_KD_KERNELS")
    assert name_for("cuda") == "EagerEngine"


def test_another_value_of_the_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case, config = random_case(), MODES["forward_kl-label-T1"]
    monkeypatch.setenv("NEMO_KD_KERNELS", "cuda")
    with pytest.raises(ValueError, match="expected NEMO_KD_KERNELS eager or triton, got 'cuda'"):
        KDLossConfig()
    with pytest.raises(ValueError, match="expected NEMO_KD_KERNELS eager or triton, got 'cuda'"):
        run(case, config)


def test_the_loss_does_not_import_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch, nemo_kd.loss as loss;"
        "z = torch.randn(2, 9, requires_grad=True); i = torch.zeros(2, dtype=torch.long);"
        "out = loss.vocab_parallel_kd_sft_loss(z, i, -torch.ones(2, 1), i[:, None], i - 1.0,"
        " config=loss.KDLossConfig()); out.loss.sum().backward(); print(z.grad.shape)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout == "torch.Size([2, 9])\n", run.stderr


TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
SIGNATURES = {
    "_measure": "logits, column *i64, foreign *i1, entries *i32, own *fp32, peak *fp32, "
    "total *fp32, total_t *fp32, row_stride, vocab_size, num_classes i32, log2_e_over_t fp32",
    "_spread": "logits, out, factors *fp32, row_stride, out_row_stride, vocab_size, "
    "num_blocks i32, log2_e_over_t fp32",
    "_place": "out, factors *fp32, column *i64, foreign *i1, own *fp32, sparse *fp32, row_stride, "
    "num_classes i32, log2_e_over_t fp32",
}


def compile_kernel(name: str, architecture: int, dtype: str, tempered: bool, excludes: bool) -> Any:
    """The kernel as it is launched for V = 128,256 and K = 100, with the alignments of a launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nemo_kd.loss import triton_kernels

    kernel, v = getattr(triton_kernels, name), 128_256
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    aligned = []
    for argument in SIGNATURES[name].split(", "):
        argument, _, kind = argument.partition(" ")
        is_size = argument in ("row_stride", "out_row_stride", "vocab_size")
        signature[argument] = kind or ("i32" if is_size else TYPES[dtype])
        if is_size or signature[argument].startswith("*"):
            aligned.append(argument)
    constants = {
        "column_stride": 1, "out_column_stride": 1, "TEMPERED": tempered, "EXCLUDES": excludes,
        "CLASSES": 128, "BLOCK": triton_kernels.spread_size(v),
        **triton_kernels.measure_sizes(v, excludes),
    }  # fmt: skip
    return triton.compile(
        ASTSource(
            kernel,
            signature,
            {k: value for k, value in constants.items() if signature.get(k) == "constexpr"},
            {(kernel.arg_names.index(a),): [["tt.divisibility", 16]] for a in aligned},
        ),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": 1 if name == "_place" else triton_kernels.NUM_WARPS},
    )


def disassembled(compiled: Any, directory: Path) -> tuple[dict[str, int], Counter[str]]:
    """Registers and memory of a thread; how often each instruction occurs."""
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    cubin = directory / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])

    def output(tool: str, *options: str) -> str:
        command = [str(tools / tool), *options, str(cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", output("cuobjdump", "-res-usage"))
    instructions = re.findall(
        r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", output("nvdisasm"), re.M
    )
    return {key: int(value) for key, value in usage}, Counter(instructions)


VARIANTS = ("T=1", "T", "T=1 without entries", "T without entries")
COMPILED = [(architecture, "bfloat16", v) for architecture in (80, 90, 100) for v in VARIANTS]
COMPILED += [(90, dtype, v) for dtype in ("float16", "float32") for v in (VARIANTS[0], VARIANTS[3])]


@pytest.mark.parametrize(("architecture", "dtype", "variant"), COMPILED)
def test_compiled_kernels_neither_spill_nor_load_piecemeal(
    architecture: int, dtype: str, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from nemo_kd.loss.triton_kernels import measure_sizes, spread_size

    tempered, excludes = variant.startswith("T without") or variant == "T", "without" in variant
    itemsize, tile = getattr(torch, dtype).itemsize, measure_sizes(128_256, excludes)
    widths = {
        "_measure": {"LDG.E.128": tile["LANES"] * tile["STEPS"]},
        "_spread": {"LDG.E.128": spread_size(128_256), "STG.E.128": spread_size(128_256)},
        "_place": {},
    }
    for name, wide in widths.items():
        usage, instructions = disassembled(
            compile_kernel(name, architecture, dtype, tempered, excludes), tmp_path
        )
        assert usage["STACK"] == usage["LOCAL"] == 0, name
        assert not [i for i in instructions if i.startswith(("STL", "LDL"))], name
        # At least 5 blocks of 128 threads on a multiprocessor, whose registers are 65,536.
        assert usage["REG"] <= 96, name
        for instruction, num_logits in wide.items():
            # 16 bytes for each of 128 threads, once in the code: no narrower load beside them.
            assert instructions[instruction] == num_logits * itemsize // (16 * 128), name
