"""The objective over time: the weights and the temperature of each step, and the step's loss."""

from pathlib import Path

import numpy as np
import pytest
import torch
from runs import run_example, scalars, train_arguments

from nemo_kd.cache import TopKCache
from nemo_kd.config import DistillationConfig, Schedule, read_settings


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("constant", [4, 4, 4, 4, 1, 1]),
        ("linear", [4, 3.25, 2.5, 1.75, 1, 1]),
        ("cosine", [4, 3.560660, 2.5, 1.439340, 1, 1]),
    ],
)
def test_values(schedule: str, values: list[float]) -> None:
    own = Schedule(schedule, start=4.0, end=1.0, steps=4)
    np.testing.assert_allclose([own.at(step) for step in range(6)], values, rtol=1e-6)
    # Exact where it matters: a weight that ends at 0 turns its term off.
    assert own.at(0) == 4.0
    assert own.at(4) == own.at(10**9) == 1.0


def read(**settings: object) -> DistillationConfig:
    return read_settings(DistillationConfig, settings, "kd")


def schedule(name: str, start: float, end: float, steps: int) -> dict[str, object]:
    return {"schedule": name, "start": start, "end": end, "steps": steps}


def test_each_steps_objective_is_numbers() -> None:
    config = read(
        kd_loss_weight=schedule("linear", 1, 0, 10),
        sft_loss_weight=schedule("constant", 0, 0.5, 2),
        temperature=schedule("cosine", 3, 1, 4),
        tail="renormalize",
        divergence="jsd",
    )
    first, third, last = (config.at(step) for step in (0, 2, 10))
    assert (first.kd_loss_weight, first.sft_loss_weight, first.temperature) == (1, 0, 3)
    assert (third.kd_loss_weight, third.sft_loss_weight, third.temperature) == (0.8, 0.5, 2)
    assert (last.kd_loss_weight, last.sft_loss_weight, last.temperature) == (0, 0.5, 1)
    assert {config.at(step).divergence for step in range(12)} == {"jsd"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": schedule("linear", 2, 1, 9), "tail": "bucket"}, "tail=renormalize with a"),
        (
            {"temperature": schedule("linear", 2, 0, 9), "tail": "renormalize"},
            r"temperature > 0, got 0.0.*at step 9",
        ),
        ({"kd_loss_weight": schedule("linear", 1, -1, 9)}, r"kd_loss_weight >= 0, got -1"),
        (
            {"kd_loss_weight": schedule("linear", 1, 0, 9), "sft_loss_weight": 0},
            r"got 0 for both.*at step 9",
        ),
        (
            {
                "kd_loss_weight": schedule("linear", 0, 1, 9),
                "sft_loss_weight": schedule("cosine", 0, 1, 5),
            },
            r"got 0 for both.*at step 0",
        ),
        (
            # Both weights are 0 at step 5, between the ends of their schedules.
            {
                "kd_loss_weight": schedule("constant", 1, 0, 5),
                "sft_loss_weight": schedule("constant", 0, 1, 7),
            },
            r"got 0 for both.*at step 5",
        ),
        ({"kd_loss_weight": schedule("square", 1, 0, 9)}, "kd.kd_loss_weight: expected schedule"),
        ({"kd_loss_weight": schedule("linear", 1, 0, 0)}, "expected steps >= 1, got 0"),
        ({"kd_loss_weight": {"schedule": "linear", "start": 1, "steps": 5}}, "expected end"),
        ({"kd_loss_weight": schedule("linear", 1, 0, 5) | {"stop": 1}}, "kd_loss_weight.stop is a"),
        ({"kd_loss_weight": schedule("linear", 1, 0, 2.5)}, "steps: expected int, got 2.5"),
        ({"jsd_beta": schedule("linear", 1, 0, 9)}, "kd.jsd_beta: expected float"),
    ],
)
def test_what_has_no_meaning_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(**settings)


def test_weights_may_pass_through_0_one_after_the_other() -> None:
    config = read(
        kd_loss_weight=schedule("linear", 1, 0, 10), sft_loss_weight=schedule("linear", 0, 1, 5)
    )
    for step in range(20):
        config.at(step)


def test_a_run_follows_its_schedules(
    nemos: dict[str, Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step sees all ten samples and lr=0 keeps the student: only the objective changes.

    NeMo's order is epoch by epoch, except for a remainder, which its seed puts at the end here.
    """
    monkeypatch.setenv("WANDB_MODE", "offline")
    output = run_example(
        "train_kd_sft.py",
        *train_arguments(nemos["tied"], cache, cache, tmp_path / "logs"),
        "trainer.max_steps=5",
        "trainer.val_check_interval=5",
        "model.optim.lr=0",
        *(
            f"model.data.{name}_ds.{key}"
            for name in ("train", "validation")
            for key in ("global_batch_size=10", "micro_batch_size=1")
        ),
        "model.knowledge_distillation.tail=renormalize",
        "model.knowledge_distillation.temperature={schedule:linear,start:3.0,end:1.0,steps:4}",
        "model.knowledge_distillation.kd_loss_weight={schedule:linear,start:1,end:0,steps:4}",
        "model.knowledge_distillation.sft_loss_weight={schedule:constant,start:0,end:1,steps:2}",
        "exp_manager.create_wandb_logger=true",
        f"save_to={tmp_path / 'kd.nemo'}",
    )
    curves = scalars(tmp_path / "logs")
    temperatures, kd_weights = [3, 2.5, 2, 1.5, 1], [1, 0.75, 0.5, 0.25, 0]
    np.testing.assert_allclose(curves["temperature"], temperatures)
    np.testing.assert_allclose(curves["kd_loss_weight"], kd_weights)
    np.testing.assert_allclose(curves["sft_loss_weight"], [0, 0, 1, 1, 1])
    np.testing.assert_allclose(
        curves["reduced_train_loss"],
        np.multiply(curves["kd_loss_weight"], curves["kd_loss"])
        + np.multiply(curves["sft_loss_weight"], curves["sft_loss"]),
        rtol=1e-5,
    )
    samples = list(TopKCache.open(cache))
    for step, temperature in enumerate(temperatures):
        entropies = []
        for sample in samples:
            teacher = torch.from_numpy(sample.topk_log_probs / temperature).log_softmax(-1)
            entropies.append(-(teacher.exp() * teacher).sum(-1).mean())
        np.testing.assert_allclose(
            curves["teacher_entropy"][step], np.mean(entropies), rtol=1e-4, err_msg=str(step)
        )
    # The next step's objective, at temperature 1, on the same samples and the same student.
    np.testing.assert_allclose(
        curves["validation_kd_loss_dataloader0"][-1], curves["kd_loss"][-1], rtol=1e-4
    )

    # What the run says of itself at its end.
    num_tokens = sum(len(sample.tokens) for sample in samples)
    num_supervised = sum(int(sample.loss_mask.sum()) for sample in samples)
    assert "trained 5 steps, to step 5" in output
    assert f"50 samples, {5 * num_tokens:,} tokens, {5 * num_supervised:,} of them" in output
    assert f"sft_loss {curves['sft_loss'][-1]:.5g}" in output
    assert f"sft_loss_dataloader0 {curves['validation_loss'][-1]:.5g}" in output
    assert f".nemo: {tmp_path / 'kd.nemo'}" in output
    bar = output.replace("\r", "\n").splitlines()
    assert any(" kd=" in line and " sft=" in line for line in bar), "the progress bar"
    assert list((tmp_path / "logs").rglob("offline-run-*/run-*.wandb"))
