"""A stopped run resumes as if it had not been stopped, whatever stopped it, at any layout."""

import re
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


def write_checkpoints(directory: Path, *states: str) -> None:
    """Directories named as NeMo names checkpoints; "half" ones have NeMo's marker beside them."""
    for state in states:
        place, *kinds = state.split()
        last = "-last" if "last" in kinds else ""
        path = (
            directory / f"kd--validation_loss=1.000-step={place}-consumed_samples={place}.0{last}"
        )
        path.mkdir(parents=True)
        (path / "metadata.json").write_text(state)
        if "half" in kinds:
            Path(f"{path}-unfinished").touch()
        if "gone" in kinds:
            shutil.rmtree(path)


@pytest.mark.parametrize(
    ("states", "newest"),
    [
        ((), None),
        (("2 half",), None),
        (("2 last half",), None),
        (("2 gone half",), None),
        (("2", "2 last half"), "2"),
        (("2", "2 last"), "2 last"),
        (("2 last", "4"), "4"),
        (("2 last", "4", "4 last half"), "4"),
        (("2 last", "4 last"), "4 last"),
        (("2 last half", "4 last"), "4 last"),
        (("2 last", "4 half"), "2 last"),
        (("8", "10 last"), "10 last"),
    ],
)
def test_a_run_resumes_from_the_newest_whole_checkpoint(
    tmp_path: Path, states: tuple[str, ...], newest: str | None
) -> None:
    """Whatever SIGKILL leaves in the directory. NeMo takes the only one that ends in -last."""
    from nemo_kd.nemo.run_directory import prepare

    write_checkpoints(tmp_path, *states)
    line = prepare(tmp_path, {}, allow_changes=False)
    assert not list(tmp_path.glob("*-unfinished"))
    lasts = [path for path in tmp_path.iterdir() if path.name.endswith("-last")]
    if newest is None:
        assert not lasts
        assert line.endswith("no whole checkpoint, the run starts at step 0")
    else:
        assert [(path / "metadata.json").read_text() for path in lasts] == [newest]
        assert f"the run resumes from kd--validation_loss=1.000-step={newest.split()[0]}-" in line


def test_a_checkpoint_of_adapters_is_marked_too(tmp_path: Path) -> None:
    from nemo_kd.nemo.run_directory import prepare

    for rank in ("mp_rank_00", "mp_rank_01"):
        (tmp_path / rank).mkdir()
        (tmp_path / rank / "kd--step=2-consumed_samples=2.0.ckpt").write_text("2")
        (tmp_path / rank / "kd--step=2-consumed_samples=2.0-last.ckpt").write_text("half")
    (tmp_path / "kd--step=2-consumed_samples=2.0-last-unfinished").touch()
    prepare(tmp_path, {}, allow_changes=False)
    lasts = sorted(tmp_path.rglob("*-last.ckpt"))
    assert [path.read_text() for path in lasts] == ["2", "2"]


def test_killed_in_its_first_last_checkpoint(
    nemos: dict[str, Path], cache: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    """The best one of the same step is whole. NeMo alone refuses to resume and to start."""
    run = arguments(nemos["tied"], cache, tmp_path / "run")
    run_example(STOPPED_RUN, "SIGKILL", 4, 0, SCRIPT, *run, succeeds=False)
    directory = tmp_path / "run" / "checkpoints"
    (last,) = directory.glob("*-last")
    Path(f"{last}-unfinished").touch()
    output = run_example(SCRIPT, *run)
    assert "the run resumes from kd_sft--validation_loss=" in output
    assert_same(tmp_path / "run", uninterrupted, rtol=1e-6)
    # Nothing is left to train the next time, and this is said.
    output = run_example(SCRIPT, *run)
    assert "trained 0 steps, to step 8" in output
    assert "nothing was left to train" in output


CHANGES = {
    "model.knowledge_distillation.tail": ("label", "bucket"),
    "model.optim.lr": (0.001, 0.002),
    "model.data.train_ds.seed": (1, 2),
}


def test_another_run_under_the_same_name_is_refused(
    preempted: Path, nemos: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    logs = tmp_path / "run"
    shutil.copytree(preempted, logs)
    run = arguments(nemos["tied"], cache, logs)
    changed = [f"{key}={now}" for key, (_, now) in CHANGES.items()]
    output = run_example(SCRIPT, *run, *changed, succeeds=False)
    for key, (before, now) in CHANGES.items():
        assert f"{key} was {before!r} and is {now!r}" in output
    assert "Traceback" not in output
    other = arguments(nemos["untied"], cache, logs)
    output = run_example(SCRIPT, *other, succeeds=False)
    assert "model.restore_from_path was " in output
    assert checkpoints(logs) == ["2"], "nothing was touched"
    output = run_example(SCRIPT, *run, *changed, "resume_changed=true", "trainer.max_steps=3")
    assert "trained 1 steps, to step 3" in output


def test_without_validation_the_last_weights_are_kept(
    nemos: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    run = arguments(nemos["tied"], cache, tmp_path / "logs", "trainer.max_steps=3")
    run_example(SCRIPT, *run, "trainer.limit_val_batches=0")
    assert checkpoints(tmp_path / "logs") == ["3"]


def test_save_to_takes_the_best_checkpoint(
    nemos: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    """The best is that of step 3 where the highest loss is the best."""
    import torch

    from nemo_kd.nemo.nemo_file import load_weights

    run = arguments(
        nemos["tied"],
        cache,
        tmp_path / "logs",
        "exp_manager.checkpoint_callback_params.mode=max",
        "trainer.max_steps=6",
        f"save_to={tmp_path / 'best.nemo'}",
        "save_checkpoint=best",
    )
    output = run_example(SCRIPT, *run)
    assert "trained 6 steps, to step 6" in output
    assert checkpoints(tmp_path / "logs") == ["6"]
    # A run that is stopped after step 3, and whose schedule is the same.
    again = [part.replace("logs", "again").replace("best.nemo", "third.nemo") for part in run]
    run_example(STOPPED_RUN, "SIGTERM", 3, 0, SCRIPT, *again, status=143)
    run_example(SCRIPT, *again, "trainer.max_steps=3", "save_checkpoint=last")
    saved, third = (
        load_weights(str(tmp_path / name), str(tmp_path)) for name in ("best.nemo", "third.nemo")
    )
    assert all(torch.equal(saved[name], third[name]) for name in third)


BAD_TARGETS = {
    "''": "save_to: expected a path that ends in .nemo, got ''",
    "kd.ckpt": "save_to: expected a path that ends in .nemo, got 'kd.ckpt'",
    "directory.nemo": "save_to: expected a file to write, got the directory directory.nemo",
    "STUDENT": "save_to: expected another file than model.restore_from_path",
    "file/kd.nemo": "save_to: cannot write file/kd.nemo: ",
    "/proc/kd.nemo": "save_to: cannot write /proc/kd.nemo: ",
}


@pytest.mark.parametrize("target", BAD_TARGETS)
def test_a_target_that_cannot_be_written_is_refused_at_the_start(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_kd.nemo.nemo_file import check_target

    monkeypatch.chdir(tmp_path)
    (tmp_path / "directory.nemo").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "student.nemo").touch()
    path = {"STUDENT": "student.nemo", "''": ""}.get(target, target)
    with pytest.raises(ValueError, match=re.escape(BAD_TARGETS[target])):
        check_target(path, "student.nemo")
    check_target("new/kd.nemo", "student.nemo")
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "student.nemo").write_bytes(b"x" * 5_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 1))
    with pytest.raises(ValueError, match=re.escape("expected 0.01 GB free")):
        check_target("kd.nemo", "student.nemo")
