"""Packed sequences: the steps of a run are those of the same samples unpacked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import config_of, save_model
from runs import run_example
from test_hosts import (
    TRAIN,
    cache,  # noqa: F401
    curves,
    train_arguments,
)

from nemo_kd.cache import TopKCache
from nemo_kd.student.packing import pack_samples

LENGTH, SEED, STEPS = 128, 5, 3
# Each step has the whole cache: of the order's blocks this seed leaves the rest to the end.
WHOLE_CACHE = (
    f"model.seq_length={LENGTH}",
    f"dataset.seed={SEED}",
    f"train.train_iters={STEPS}",
    "model.calculate_per_token_loss=true",
    "optimizer.lr=1e-4",  # rounding grows with each update
)

Run = Callable[..., dict[str, list[float]]]


def packed(cache: Path) -> list[str]:  # noqa: F811
    """The settings of packs, all of which are a step."""
    lengths = TopKCache.open(cache).num_tokens() - 1
    packs = pack_samples(lengths, LENGTH, SEED)
    assert 2 < len(packs) < len(lengths) / 2
    return [
        "dataset.packed_sequence=true",
        "train.micro_batch_size=1",
        f"train.global_batch_size={len(packs)}",
    ]


def unpacked(cache: Path) -> list[str]:  # noqa: F811
    return ["train.micro_batch_size=2", f"train.global_batch_size={len(TopKCache.open(cache))}"]


@pytest.fixture
def run(cache: Path, tmp_path: Path) -> Run:  # noqa: F811
    """The curves of a training."""

    def curves_of(student: Path, name: str, *more: str, processes: int = 1) -> Any:
        arguments = train_arguments(student, cache, tmp_path / name, *WHOLE_CACHE, *more)
        run_example(TRAIN, *arguments, processes=processes)
        return curves(tmp_path / name)

    return curves_of


@pytest.mark.parametrize("family", ["llama3", "mistral", "gemma3"])
def test_packs_have_the_steps_of_their_samples(
    family: str,
    run: Run,
    cache: Path,  # noqa: F811
    hf_tokenizer: Any,
    tmp_path: Path,
) -> None:
    """No sample sees another, and each row stands at its token; also with windows of attention."""
    student = save_model(tmp_path / family, config_of(family), hf_tokenizer)
    expected = run(student, "unpacked", *unpacked(cache))
    found = run(student, "packed", *packed(cache))
    for name, values in expected.items():
        assert len(values) == STEPS
        np.testing.assert_allclose(found[name], values, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("layout", ["tensor", "pipeline", "fused"])
def test_packs_at_another_layout(
    layout: str,
    run: Run,
    cache: Path,  # noqa: F811
    wide_llamas: dict[str, Path],
) -> None:
    more = f"model.{layout}_model_parallel_size=2"
    if layout == "fused":
        more = "knowledge_distillation.fuse_output_layer=true"
    student, processes = wide_llamas["tied"], 1 if layout == "fused" else 2
    expected = run(student, "unpacked", *unpacked(cache))
    found = run(student, "packed", *packed(cache), more, processes=processes)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, err_msg=name)


def test_a_resumed_run_goes_on_with_the_packs(
    run: Run,
    cache: Path,  # noqa: F811
    wide_llamas: dict[str, Path],
    tmp_path: Path,
) -> None:
    """One pack a step, so that the order of the packs shows; and packing is part of the run."""
    student, one = wide_llamas["tied"], "train.global_batch_size=1"
    whole = run(student, "whole", *packed(cache), one)
    assert len(set(whole["kd_loss"])) == STEPS
    first = run(student, "stopped", *packed(cache), one, "+train.exit_interval=1")
    assert len(first["kd_loss"]) == 1
    logs = f"logger.tensorboard_dir={tmp_path / 'resumed'}"
    run_again = train_arguments(student, cache, tmp_path / "stopped", *WHOLE_CACHE, logs)
    plain = ("dataset.packed_sequence=false", "train.micro_batch_size=1", one)
    output = run_example(TRAIN, *run_again, *plain, succeeds=False)
    assert "dataset.packed_sequence was True and is False" in output, output[-2000:]
    run_example(TRAIN, *run_again, *packed(cache), one)
    for name, values in whole.items():
        found = curves(tmp_path / "resumed")[name]
        np.testing.assert_allclose(found, values[1:], rtol=1e-5, err_msg=name)


def test_a_micro_batch_is_one_pack(
    cache: Path,  # noqa: F811
    wide_llamas: dict[str, Path],
    tmp_path: Path,
) -> None:
    arguments = train_arguments(wide_llamas["tied"], cache, tmp_path, *packed(cache))
    output = run_example(TRAIN, *arguments, "train.micro_batch_size=2", succeeds=False)
    expected = "expected train.micro_batch_size=1 with dataset.packed_sequence=true"
    assert expected in output, output[-2000:]
    assert "Traceback" not in output
