"""A run that was stopped goes on as if it had not been: what NeMo's resume leaves undone.

exp_manager (`resume_if_exists`) restores weights, optimizer, schedule and the place in the data.
Added here: a checkpoint on SIGTERM wherever NeMo runs, and the counts by which Lightning validates,
logs and ends.
"""

import signal
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from megatron.core.dist_checkpointing.strategies.filesystem_async import _get_write_results_queue
from nemo.collections.nlp.data.language_modeling.megatron.megatron_batch_samplers import (
    MegatronPretrainingBatchSampler,
)
from nemo.utils.callbacks.dist_ckpt_io import AsyncFinalizerCallback
from nemo.utils.exp_manager import StatelessTimer, exp_manager
from omegaconf import DictConfig, OmegaConf

from nemo_kd.process import exit_stopped


def start_exp_manager(trainer: Trainer, config: DictConfig | None) -> None:
    """NeMo's exp_manager, with StopOnSigterm for its create_preemption_callback.

    Raises:
        ValueError: The checkpoints' names would not hold the place in the data.
    """
    if config is None:
        return
    config = OmegaConf.merge(config)  # a copy
    names = config.get("checkpoint_callback_params", {}).get("filename")
    if config.get("create_checkpoint_callback", True) and "{consumed_samples}" not in str(names):
        raise ValueError(
            "exp_manager.checkpoint_callback_params.filename: expected {consumed_samples} in it, "
            f"from which a resumed run reads its place in the data, got {names}"
        )
    trainer.callbacks.append(ExactCounts())
    if config.get("create_preemption_callback", True):
        trainer.callbacks.append(StopOnSigterm())
    config.create_preemption_callback = False
    exp_manager(trainer, config)
    checkpoint: Any = trainer.checkpoint_callback
    if checkpoint is not None and trainer.ckpt_path:
        # By this name it is removed for the next one: of two, NeMo would know none to resume from.
        checkpoint.last_model_path = trainer.ckpt_path.removesuffix(".ckpt") + ".ckpt"


def exit_if_out_of_time(trainer: Trainer) -> None:
    """End the process if exp_manager.max_time_per_run ended the training before its last step.

    Such a training returns as a finished one does. Rank 0's clock decides for all.
    """
    timers = [timer for timer in trainer.callbacks if isinstance(timer, StatelessTimer)]
    is_over = any(timer.time_remaining() <= 0 for timer in timers)
    if trainer.strategy.broadcast(is_over and trainer.global_step < trainer.max_steps):
        exit_stopped(
            f"stopped by its time limit after step {trainer.global_step}; the same command goes on "
            "from the last checkpoint"
            if trainer.is_global_zero
            else None
        )


class StopOnSigterm(Callback):
    """SIGTERM, with which Slurm preempts: the run ends before its next step, with a checkpoint.

    As NeMo's PreemptionCallback, but on a CPU too; when any rank has the signal; after a validation
    that the step ends in; and with an exit status that no scheduler takes for success.
    """

    def __init__(self) -> None:
        self._asked = False
        self._first_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._first_step = trainer.global_step
        if trainer.checkpoint_callback is not None:
            # Slurm signals the children too. That of Megatron's checkpoint writer, which it starts
            # at the first checkpoint and keeps, ignores what this process ignores at its start.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            _get_write_results_queue()
        # For Lightning's own handler, which would end each rank at another step, unsaved.
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        asked = torch.tensor(self._asked, dtype=torch.int32, device=torch.cuda.current_device())
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        if not asked:
            return
        step, saved = trainer.global_step, "no checkpoint"
        checkpoint: Any = trainer.checkpoint_callback
        if checkpoint is not None and checkpoint.save_last:
            if step not in (self._first_step, checkpoint._last_global_step_saved):
                checkpoint._save_last_checkpoint(trainer, checkpoint._monitor_candidates(trainer))
            for callback in trainer.callbacks:
                if isinstance(callback, AsyncFinalizerCallback):
                    callback.on_train_end(trainer)
            saved = f"the same command goes on from there: {checkpoint.dirpath}"
        exit_stopped(
            f"stopped by SIGTERM after step {step}; {saved}" if trainer.is_global_zero else None
        )


class ExactCounts(Callback):
    """Counts a resumed run's steps on from where they were.

    Checkpoints are written inside a step, before Lightning has counted all of it: what resumes from
    one would log under a step that was there, and might validate one step late. NeMo has one batch
    a step and one pass over all steps' samples, so that every count is the number of steps.
    """

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        loop = trainer.fit_loop.epoch_loop
        loop._batches_that_stepped = trainer.global_step
        for count in (loop.batch_progress.current, loop.batch_progress.total):
            count.ready = count.started = count.processed = count.completed = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        # NeMo's SkipResumeTrainingValidationLoop, which is not to repeat a validation before the
        # first step, would leave out that after it too.
        trainer.fit_loop.epoch_loop.restarting = False


class WholePassSampler(MegatronPretrainingBatchSampler):
    """NeMo's sampler, as long as the pass that a resumed run goes on with.

    NeMo's is as long as what is left of it, to which Lightning adds the batches before the resume:
    the pass would seem over too early, and begin again at the place of the resume.
    """

    def __len__(self) -> int:
        whole: int = self.total_samples // self.global_batch_size
        if not self.drop_last and self.total_samples % self.global_batch_size:
            whole += 1
        return whole
