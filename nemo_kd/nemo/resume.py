"""A stopped run resumes as if it had not been stopped: what NeMo's resume leaves undone.

exp_manager (`resume_if_exists`) restores weights, optimizer, schedule and the place in the data.
This file adds a checkpoint on SIGTERM wherever NeMo runs, and the counts by which Lightning
validates, logs and ends.
"""

import signal
import time
from contextlib import nullcontext
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.pytorch import Callback, Trainer
from megatron.core.dist_checkpointing.strategies.filesystem_async import _get_write_results_queue
from nemo.collections.nlp.data.language_modeling.megatron.megatron_batch_samplers import (
    MegatronPretrainingBatchSampler,
)
from nemo.utils.callbacks.dist_ckpt_io import AsyncFinalizerCallback
from nemo.utils.exp_manager import StatelessTimer, exp_manager
from omegaconf import DictConfig

from nemo_kd.nemo.disk import one_line_if_full
from nemo_kd.nemo.integrity import check_files, one_line, seal_directory
from nemo_kd.nemo.nemo_file import is_checkpoint
from nemo_kd.nemo.run_directory import (
    checked_before_resuming,
    checkpoint_directory,
    files_of_checkpoint,
    prepare,
    what_remains,
)
from nemo_kd.process import exit_stopped, say
from nemo_kd.ranks import on_rank_zero

_REMEDY = (
    "move it away, and the same command resumes from the newest other checkpoint in its directory, "
    "or from the start"
)


def start_exp_manager(
    trainer: Trainer,
    config: DictConfig | None,
    settings: dict[str, Any] | None = None,
    allow_changes: bool = False,
) -> None:
    """Call NeMo's exp_manager, with StopOnSigterm in the place of its own preemption callback.

    Every rank calls it, once the process groups are up.

    Args:
        settings: What the run trains, see `settings_of`; None for a run that only validates.
        allow_changes: Resume also a run with other settings.

    Raises:
        ValueError: The names of the checkpoints would leave out the place in the data, or the
            run's directory has the checkpoints of a run with other settings, or a damaged one.
    """
    if config is None:
        return
    config = config.copy()
    names = config.get("checkpoint_callback_params", {}).get("filename")
    if config.get("create_checkpoint_callback", True) and "{consumed_samples}" not in str(names):
        raise ValueError(
            "exp_manager.checkpoint_callback_params.filename: expected {consumed_samples} in it, "
            f"from which a resumed run reads its place in the data, got {names}"
        )
    directory = checkpoint_directory(config)
    given = config.get("resume_from_checkpoint")  # NeMo takes it if the run has no checkpoint
    own: list[Path] = []
    if directory is not None and settings is not None:
        # The other ranks wait, so that they find the directory as rank 0 leaves it.
        say(on_rank_zero(lambda: prepare(directory, settings, allow_changes, given)))
        own = checked_before_resuming(directory)
        for path in own:
            check_files(path, "the checkpoint to resume from", remedy=_REMEDY)
    elif not any(config.get(key) for key in ("resume_if_exists", "explicit_log_dir", "version")):
        # NeMo names the directory by the time, which differs among ranks.
        config.version = on_rank_zero(lambda: time.strftime("%Y-%m-%d_%H-%M-%S"))
    if given is not None and not own:
        for path in files_of_checkpoint(given):
            check_files(path, "exp_manager.resume_from_checkpoint")
    trainer.callbacks.append(ExactCounts())
    trainer.callbacks.append(LastCheckpoint())
    if config.get("create_preemption_callback", True):
        trainer.callbacks.append(StopOnSigterm())
    config.create_preemption_callback = False
    exp_manager(trainer, config)
    checkpoint: Any = trainer.checkpoint_callback
    if checkpoint is not None:
        _seal_checkpoints(checkpoint)
    if checkpoint is not None and trainer.ckpt_path not in (None, given):
        # The next checkpoint then replaces the one resumed from: NeMo refuses to resume from two.
        # One that was given is another run's, and stays.
        checkpoint.last_model_path = trainer.ckpt_path.removesuffix(".ckpt") + ".ckpt"


def _seal_checkpoints(callback: Any) -> None:
    """Let NeMo's callback write the checksums of a checkpoint before it marks it as whole."""
    mark = callback.remove_checkpoint_unfinished_marker

    def seal_and_mark(path: Any, barrier_before: bool = False) -> None:
        directory = Path(str(path).removesuffix(".ckpt"))
        if torch.distributed.get_rank() == 0 and is_checkpoint(str(directory)):
            seal_directory(directory)  # of files that this rank has written
        mark(path, barrier_before=barrier_before)

    callback.remove_checkpoint_unfinished_marker = seal_and_mark


def fit(trainer: Trainer, model: Any) -> None:
    """Train; a full disk, or a checkpoint that does not fit the model, ends it with one line.

    Raises:
        OSError: A checkpoint could not be written. The run resumes from the newest whole one.
        ValueError: The checkpoint that the run resumes from is not one of this model.
    """
    callback: Any = trainer.checkpoint_callback
    directory = Path(getattr(callback, "dirpath", None) or trainer.default_root_dir)
    reads = one_line(trainer.ckpt_path, "the checkpoint to resume from")
    # Without one, nothing of it can fail.
    with (
        reads if trainer.ckpt_path else nullcontext(),
        one_line_if_full(directory, lambda: what_remains(directory)),
    ):
        trainer.fit(model)


def exit_if_stopped(trainer: Trainer) -> None:
    """End the process if its time limit ended the training, or SIGTERM came in its last step.

    Lightning returns from a training that exp_manager.max_time_per_run ended as from a finished
    one.
    """
    asked = any(getattr(callback, "asked", False) for callback in trainer.callbacks)
    asked = torch.tensor(asked, dtype=torch.int32, device=torch.cuda.current_device())
    # A maximum, because what follows has collectives, and one rank may have got the signal alone.
    torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
    if asked:
        _exit(trainer, "SIGTERM", "the same command does what follows the training")
    timers = [timer for timer in trainer.callbacks if isinstance(timer, StatelessTimer)]
    is_over = any(timer.time_remaining() <= 0 for timer in timers)
    # Clocks differ, so that rank 0's decides. If some ranks went on to the save without the others,
    # they would hang in its collectives.
    if trainer.strategy.broadcast(is_over and trainer.global_step < trainer.max_steps):
        _exit(trainer, "its time limit", "the same command resumes from the last checkpoint")


def _exit(trainer: Trainer, cause: str, advice: str) -> NoReturn:
    message = f"stopped by {cause} after step {trainer.global_step}; {advice}"
    exit_stopped(message if trainer.is_global_zero else None)


def _finish_writing(trainer: Trainer) -> None:
    """Wait for a checkpoint that is written in the background."""
    for callback in trainer.callbacks:
        if isinstance(callback, AsyncFinalizerCallback):
            callback.on_train_end(trainer)


class StopOnSigterm(Callback):
    """On SIGTERM, with which Slurm preempts, writes a checkpoint and ends the run.

    NeMo's PreemptionCallback does so on a GPU, if rank 0 has the signal, and with the status of
    success. This one runs on a CPU too, reacts to a signal of any rank, waits for the validation
    that a step may end in, and exits with a status that no scheduler takes for success.
    """

    def __init__(self) -> None:
        self.asked = False
        self._first_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._first_step = trainer.global_step
        # Replaces the handlers of start-up and of Lightning, which would end each rank at another
        # step, without a checkpoint. Lightning puts that of start-up back after the training.
        signal.signal(signal.SIGTERM, self._ask)
        if trainer.checkpoint_callback is not None:
            # Slurm signals the children too. Megatron's checkpoint writer starts one at the first
            # checkpoint and keeps it. Started now, the child inherits that SIGTERM is blocked; a
            # signal that this process gets meanwhile waits for the end of the block. The start of
            # multiprocessing's tracker would end the block, so that it comes before.
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            _get_write_results_queue()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        asked = torch.tensor(self.asked, dtype=torch.int32, device=torch.cuda.current_device())
        # All ranks stop before the same step; otherwise the others would hang in a collective.
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        if not asked:
            return
        step, saved = trainer.global_step, "no checkpoint"
        checkpoint: Any = trainer.checkpoint_callback
        if checkpoint is not None and checkpoint.save_last:
            if step not in (self._first_step, checkpoint._last_global_step_saved):
                checkpoint._save_last_checkpoint(trainer, checkpoint._monitor_candidates(trainer))
            _finish_writing(trainer)
            saved = f"the same command goes on from there: {checkpoint.dirpath}"
        _exit(trainer, "SIGTERM", saved)


class LastCheckpoint(Callback):
    """Writes a checkpoint after the last step, if none was.

    NeMo writes one only if the last step is no multiple of val_check_interval: without a validation
    there would be none.
    """

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        checkpoint: Any = trainer.checkpoint_callback
        if checkpoint is None or not checkpoint.save_last:
            return
        _finish_writing(trainer)
        if checkpoint._last_global_step_saved != trainer.global_step:
            checkpoint._save_last_checkpoint(trainer, checkpoint._monitor_candidates(trainer))


class ExactCounts(Callback):
    """Sets a resumed run's counts to the number of steps that were taken.

    Checkpoints are written inside a step, before Lightning has counted all of it. A run resumed
    from one would log a step's number twice, and might validate one step late. NeMo has one batch a
    step and one pass over the samples of all steps, so that every count is the number of steps.
    """

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        loop = trainer.fit_loop.epoch_loop
        loop._batches_that_stepped = trainer.global_step
        for count in (loop.batch_progress.current, loop.batch_progress.total):
            count.ready = count.started = count.processed = count.completed = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        # While it is set, NeMo's SkipResumeTrainingValidationLoop skips validations: not only a
        # repeated one before the first step, but that after the first step too.
        trainer.fit_loop.epoch_loop.restarting = False


class WholePassSampler(MegatronPretrainingBatchSampler):
    """NeMo's sampler, with the length of the whole pass that a resumed run continues.

    NeMo's own has the length of what is left of the pass. Lightning counts the batches before the
    resume too, so that the pass would end too early and begin again at the place of the resume.
    """

    def __len__(self) -> int:
        incomplete = 0 if self.drop_last else self.global_batch_size - 1
        return (self.total_samples + incomplete) // self.global_batch_size
