"""LoRA by Bridge's PEFT: what is trained, what is saved, and what a resumed run goes on with."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import run_example, scalars
from safetensors.torch import load_file
from test_hosts import (
    TRAIN,
    cache,  # noqa: F401
    cross_entropy,
    curves,
    train_arguments,
)

LORA = (
    *("peft.peft_scheme=lora", "peft.dim=4", "peft.alpha=8", "train.micro_batch_size=2"),
    *("train.train_iters=4", "checkpoint.save_interval=2", "train.eval_interval=4"),
)


def saved(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
    cache: Path,  # noqa: F811
    wide_llamas: dict[str, Path],
) -> Path:
    logs = tmp_path_factory.mktemp("lora")
    arguments = train_arguments(wide_llamas["tied"], cache, logs, *LORA)
    run_example(TRAIN, *arguments, f"save_hf={logs / 'kd-hf'}")
    return logs


def test_the_merged_student_is_the_one_that_was_trained(
    trained: Path,
    cache: Path,  # noqa: F811
    wide_llamas: dict[str, Path],
) -> None:
    (validated,) = scalars(trained)["sft_loss validation"][-1:]
    assert cross_entropy(trained / "kd-hf", cache) == pytest.approx(validated, rel=1e-4)
    before, after = saved(wide_llamas["tied"]), saved(trained / "kd-hf")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        if "proj" in name:
            difference = after[name] - weight
            assert 1 <= torch.linalg.matrix_rank(difference, atol=1e-4) <= 4, name
        else:  # the embedding and the norms
            assert torch.equal(after[name], weight), name


def test_a_checkpoint_has_adapters_alone_and_resumes(
    trained: Path,
    cache: Path,  # noqa: F811
    wide_llamas: dict[str, Path],
    tmp_path: Path,
) -> None:
    arguments = train_arguments(wide_llamas["tied"], cache, tmp_path, *LORA)
    run_example(TRAIN, *arguments, "+train.exit_interval=2")
    files = sorted((tmp_path / "checkpoints" / "iter_0000002").glob("*.distcp"))
    model_bytes = (wide_llamas["tied"] / "model.safetensors").stat().st_size
    assert files
    assert sum(file.stat().st_size for file in files) < model_bytes
    logs = tmp_path / "resumed"
    run_example(TRAIN, *arguments, f"logger.tensorboard_dir={logs}", f"save_hf={tmp_path / 'hf'}")
    for name, values in curves(trained).items():
        np.testing.assert_allclose(curves(logs)[name], values[2:], rtol=1e-4, err_msg=name)
    for name, weight in saved(trained / "kd-hf").items():
        torch.testing.assert_close(saved(tmp_path / "hf")[name], weight, rtol=0, atol=1e-4)


def test_two_tensor_parallel_ranks_have_the_same_curve(
    trained: Path,
    cache: Path,  # noqa: F811
    wide_llamas: dict[str, Path],
    tmp_path: Path,
) -> None:
    arguments = train_arguments(wide_llamas["tied"], cache, tmp_path, *LORA)
    more = ("model.tensor_model_parallel_size=2", f"save_hf={tmp_path / 'hf'}")
    run_example(TRAIN, *arguments, *more, processes=2)
    (validated,) = scalars(tmp_path)["sft_loss validation"][-1:]
    assert cross_entropy(tmp_path / "hf", cache) == pytest.approx(validated, rel=1e-4)


WHOLE = "peft.target_modules=[output_layer]"
FUSED = "knowledge_distillation.fuse_output_layer=true"


@pytest.mark.parametrize(
    ("model", "overrides", "message"),
    [
        (
            "tied",
            ("peft.target_modules=[q_proj]",),
            "expected names of linear layers, got ['q_proj']",
        ),
        (
            "tied",
            ("peft.peft_scheme=dora",),
            "peft.peft_scheme: expected one of 'lora', or null",
        ),
        ("tied", (WHOLE,), "expected no output_layer, got one: its weight is the embedding's"),
        (
            "untied",
            ("peft.target_modules=[linear_qkv,'*_layer']", FUSED),
            "expected no output_layer, got one: knowledge_distillation.fuse_output_layer=true",
        ),
    ],
)
def test_adapters_that_cannot_be_are_refused(
    model: str,
    overrides: tuple[str, ...],
    message: str,
    cache: Path,  # noqa: F811
    wide_llamas: dict[str, Any],
    tmp_path: Path,
) -> None:
    arguments = train_arguments(wide_llamas[model], cache, tmp_path, *LORA, *overrides)
    output = run_example(TRAIN, *arguments, succeeds=False)
    assert message in output, output[-2000:]
    assert "Traceback" not in output


def test_the_output_layer_has_an_adapter(
    cache: Path,  # noqa: F811
    wide_llamas: dict[str, Path],
    tmp_path: Path,
) -> None:
    arguments = train_arguments(wide_llamas["untied"], cache, tmp_path, *LORA, WHOLE)
    run_example(TRAIN, *arguments, f"save_hf={tmp_path / 'hf'}")
    (validated,) = scalars(tmp_path)["sft_loss validation"][-1:]
    assert cross_entropy(tmp_path / "hf", cache) == pytest.approx(validated, rel=1e-4)
    before, after = saved(wide_llamas["untied"]), saved(tmp_path / "hf")
    assert [name for name in before if not torch.equal(before[name], after[name])] == [
        "lm_head.weight"
    ]
