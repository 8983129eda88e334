"""A stopped run resumes as if it had not been stopped, whatever stopped it, at any layout."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from runs import run_example, train_arguments

STOPPED_RUN = str(Path(__file__).parent / "stopped_run.py")
SCRIPT = "train_kd_sft.py"
STEPS = 8  # of two samples each, so that the cache's ten samples are begun a second time
VALIDATE_EVERY = 3
KD_CURVES = ("reduced_train_loss", "kd_loss", "sft_loss", "teacher_entropy", "top1_agreement")
RUN_CURVES = ("lr", "global_step", "consumed_samples", "grad_norm")
VALIDATED = ("validation_loss", "validation_kd_loss_dataloader0")


def arguments(student: Path, cache: Path, logs: Path, *more: str) -> list[str]:
    return [
        *train_arguments(student, cache, cache, logs),
        f"trainer.max_steps={STEPS}",
        f"trainer.val_check_interval={VALIDATE_EVERY}",
        *(f"model.data.{name}.global_batch_size=2" for name in ("train_ds", "validation_ds")),
        # Only at 1 is the order of the samples the same at every layout.
        *(f"model.data.{name}.micro_batch_size=1" for name in ("train_ds", "validation_ds")),
        "model.data.train_ds.num_workers=1",
        "exp_manager.create_checkpoint_callback=true",
        *more,
    ]


def curves(logs: Path) -> dict[str, dict[int, float]]:
    """Values by tag and step, from all of the run's TensorBoard files; a later file wins."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read: dict[str, dict[int, float]] = {}
    for file in sorted(logs.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime):
        events = EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            read.setdefault(tag, {}).update({e.step: e.value for e in events.Scalars(tag)})
    return read


def assert_same(resumed: Path, uninterrupted: Path, rtol: float) -> None:
    own, expected = curves(resumed), curves(uninterrupted)
    for name in (*KD_CURVES, *RUN_CURVES, *VALIDATED):
        assert own[name].keys() == expected[name].keys(), name
        np.testing.assert_allclose(
            list(own[name].values()), list(expected[name].values()), rtol=rtol, err_msg=name
        )


def checkpoints(logs: Path) -> list[str]:
    """The steps of the checkpoints that are marked as last."""
    names = sorted(path.name for path in (logs / "checkpoints").iterdir())
    return [
        name.split("step=")[1].split("-consumed_samples=")[0] for name in names if "last" in name
    ]


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, nemos: dict[str, Path], cache: Path
) -> Path:
    logs = tmp_path_factory.mktemp("uninterrupted")
    run_example("train_kd_sft.py", *arguments(nemos["tied"], cache, logs))
    read = curves(logs)
    assert list(read["reduced_train_loss"]) == list(range(STEPS))
    assert list(read["validation_loss"]) == [2, 5, 7], "every third, and the last"
    return logs


@pytest.fixture(scope="module")
def preempted(
    tmp_path_factory: pytest.TempPathFactory, nemos: dict[str, Path], cache: Path
) -> Path:
    """A run that got SIGTERM in its second step."""
    logs = tmp_path_factory.mktemp("preempted") / "run"
    output = run_example(
        STOPPED_RUN, "SIGTERM", 2, 0, SCRIPT, *arguments(nemos["tied"], cache, logs), status=143
    )
    assert "stopped by SIGTERM after step 2; the same command goes on from there" in output
    assert "Traceback" not in output
    assert checkpoints(logs) == ["2"]
    return logs


def test_sigterm_then_sigkill(
    preempted: Path, uninterrupted: Path, nemos: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    """The last of three jobs writes the .nemo. After SIGKILL it resumes at the last validation."""
    logs = tmp_path / "run"
    shutil.copytree(preempted, logs)  # to another place, as under another mount
    run = arguments(nemos["tied"], cache, logs, f"save_to={tmp_path / 'kd.nemo'}")
    run_example(STOPPED_RUN, "SIGKILL", 5, 0, SCRIPT, *run, succeeds=False)
    assert checkpoints(logs) == ["3"]
    torn = logs / "checkpoints" / "kd_sft--validation_loss=0.000-step=5-consumed_samples=10.0-last"
    torn.mkdir()
    Path(f"{torn}-unfinished").touch()  # what SIGKILL leaves during a checkpoint
    run_example("train_kd_sft.py", *run)
    assert_same(logs, uninterrupted, rtol=1e-6)
    assert checkpoints(logs) == [str(STEPS)]
    assert (tmp_path / "kd.nemo").exists()


def test_at_another_layout(
    preempted: Path, uninterrupted: Path, nemos: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    """Stopped at TP=1, resumed at TP=2, where one rank gets SIGTERM, and then resumed at PP=2."""
    logs = tmp_path / "run"
    shutil.copytree(preempted, logs)
    run = arguments(nemos["tied"], cache, logs)
    output = run_example(
        *(STOPPED_RUN, "SIGTERM", 6, 1, SCRIPT),
        *(*run, "model.tensor_model_parallel_size=2"),
        processes=2,
        cold=True,
        succeeds=False,
    )
    assert "stopped by SIGTERM after step 6" in output
    assert checkpoints(logs) == ["6"]
    run_example("train_kd_sft.py", *run, "model.pipeline_model_parallel_size=2", processes=2)
    assert_same(logs, uninterrupted, rtol=1e-4)


def test_a_time_limit_is_not_an_end(nemos: dict[str, Path], cache: Path, tmp_path: Path) -> None:
    """As long as steps are left, the status is 143 and there is no .nemo."""
    run = arguments(nemos["tied"], cache, tmp_path / "logs", f"save_to={tmp_path / 'kd.nemo'}")
    limit = "+exp_manager.max_time_per_run=00:00:00:01"
    output = run_example("train_kd_sft.py", *run, limit, "trainer.max_steps=10000", status=143)
    assert "stopped by its time limit after step" in output
    assert not (tmp_path / "kd.nemo").exists()


def test_names_without_a_place_in_the_data(
    nemos: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    run = arguments(nemos["tied"], cache, tmp_path / "logs")
    key = "exp_manager.checkpoint_callback_params.filename"
    output = run_example("train_kd_sft.py", *run, f"{key}='{{step}}'", succeeds=False)
    assert f"{key}: expected {{consumed_samples}} in it" in output
    assert "Traceback" not in output
