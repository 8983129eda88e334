"""SIGTERM at any moment of a run ends it with 143 and one line; the same command finishes it."""

from pathlib import Path

import pytest
from runs import dump_arguments, run_example
from test_resume import STOPPED_RUN, arguments

from nemo_kd.cache import TopKCache

MODEL = "nemo_kd.nemo.model:MegatronGPTSFTKDModel"
CHECKPOINT = "nemo.utils.callbacks.nemo_model_checkpoint:NeMoModelCheckpoint"
TRAINING = [
    "nemo_kd.nemo.train:train_kd_sft",
    "nemo_kd.nemo.train:read_model_config",
    "nemo_kd.nemo.train:prepare_accelerator",
    "nemo_kd.nemo.train:build_trainer",
    "nemo_kd.nemo.train:initialize_model_parallel",
    "nemo_kd.nemo.resume:exp_manager",
    f"{MODEL}.restore_from",
    f"{MODEL}._build_dataset",
    "nemo_kd.nemo.resume:_get_write_results_queue",
    f"{MODEL}.fwd_bwd_step",
    f"{MODEL}.inference_epoch_end",
    f"{CHECKPOINT}._save_checkpoint",
    "3",
    f"{CHECKPOINT}.on_train_end",
    "nemo_kd.nemo.resume:exit_if_stopped",
    "nemo_kd.nemo.train:save_nemo",
    "nemo_kd.nemo.summary:ClosingSummary.report",
]
DUMP = [
    "nemo_kd.nemo.dump:dump_teacher_topk",
    "nemo_kd.nemo.dump:read_model_config",
    "nemo_kd.nemo.dump:prepare_accelerator",
    "nemo_kd.nemo.dump:initialize_model_parallel",
    "nemo_kd.teacher.plan:check_files",
    "nemo_kd.nemo.dump:fingerprint_teacher",
    "nemo_kd.nemo.dump:MegatronGPTSFTModel.restore_from",
    "nemo_kd.nemo.dump:build_samples",
    "nemo_kd.teacher.fill:CacheWriter.open",
    "nemo_kd.nemo.dump:Replica",
    "nemo_kd.teacher.run:TeacherRun.fill",
]


def assert_stopped(output: str) -> None:
    lines = [line for line in output.splitlines() if "stopped by SIGTERM" in line]
    assert len(lines) == 1, output[-3000:]
    assert "Traceback" not in output


@pytest.mark.parametrize("moment", TRAINING)
def test_sigterm_at_any_moment_of_a_training(
    moment: str, nemos: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "kd.nemo"
    steps = ("trainer.max_steps=3", "trainer.val_check_interval=2")
    run = arguments(nemos["tied"], cache, tmp_path / "logs", f"save_to={saved}", *steps)
    script = (STOPPED_RUN, "SIGTERM", moment, 0, "train_kd_sft.py")
    assert_stopped(run_example(*script, *run, status=143))
    assert saved.exists() == ("report" in moment)
    if moment in (f"{MODEL}.restore_from", f"{CHECKPOINT}._save_checkpoint", "3"):
        run_example("train_kd_sft.py", *run)
        assert saved.exists()


@pytest.mark.parametrize("moment", DUMP)
def test_sigterm_at_any_moment_of_a_dump(
    moment: str, nemos: dict[str, Path], jsonl: Path, tmp_path: Path
) -> None:
    run = dump_arguments(nemos["tied"], jsonl, tmp_path / "cache")
    script = (STOPPED_RUN, "SIGTERM", moment, 0, "dump_teacher_topk.py")
    assert_stopped(run_example(*script, *run, status=143))
    if moment == DUMP[-1]:
        run_example("dump_teacher_topk.py", *run)
        assert len(TopKCache.open(tmp_path / "cache")) == 10


# While a run starts, in a training step, while a checkpoint is written, and in a dump.
INTERRUPTED = [
    ("train_kd_sft.py", f"{MODEL}.restore_from"),
    ("train_kd_sft.py", "2"),
    ("train_kd_sft.py", f"{CHECKPOINT}._save_checkpoint"),
    ("dump_teacher_topk.py", DUMP[-1]),
]


@pytest.mark.parametrize(("script", "moment"), INTERRUPTED)
def test_ctrl_c_stops_in_the_same_way(
    script: str, moment: str, nemos: dict[str, Path], jsonl: Path, cache: Path, tmp_path: Path
) -> None:
    if script == "dump_teacher_topk.py":
        run = dump_arguments(nemos["tied"], jsonl, tmp_path / "cache")
    else:
        steps = ("trainer.max_steps=3", "trainer.val_check_interval=2")
        run = arguments(nemos["tied"], cache, tmp_path / "logs", *steps)
    output = run_example(STOPPED_RUN, "SIGINT", moment, 0, script, *run, status=143)
    assert_stopped(output)
    assert output.count("Ctrl-C: stopping as on SIGTERM") == 1
    run_example(script, *run)
