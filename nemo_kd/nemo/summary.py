"""What a training shows of itself: a bar, and at its end a few lines about what it did."""

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from megatron.core import parallel_state
from nemo.collections.nlp.parts.nlp_overrides import CustomProgressBar

# Beside the bar: the metrics, and what they are called there.
SHOWN = {
    "reduced_train_loss": "loss",
    "kd_loss": "kd",
    "sft_loss": "sft",
    "validation_loss": "val",
}
TRAINED = ("reduced_train_loss", "kd_loss", "sft_loss", "top1_agreement")


class ClosingSummary(Callback):
    """Measures a training run, and says in `report` what it did.

    Tokens are those of the samples, without padding. A pack counts as one sample. The rate leaves
    out validation and the checkpoints that follow it.
    """

    def __init__(self) -> None:
        self._first_step = self._last_step = 0
        self._start_s = self._validation_start_s = self._validation_s = 0.0
        self._lines: list[str] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._first_step = trainer.global_step
        self._start_s, self._validation_s = time.monotonic(), 0.0

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self._last_step = trainer.global_step  # that of the best checkpoint, once it is loaded

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._validation_start_s = time.monotonic()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._validation_s += time.monotonic() - self._validation_start_s

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        consumed = pl_module.consumed.totals()  # waits for the last step, on a GPU too
        total_s = time.monotonic() - self._start_s
        rate = consumed["tokens"] / (total_s - self._validation_s)
        self._lines = [
            f"{consumed['samples']:,} samples, {consumed['tokens']:,} tokens, "
            f"{consumed['supervised_tokens']:,} of them supervised",
            f"{total_s:,.1f} s, {self._validation_s:,.1f} s of them validation and checkpoints; "
            f"{rate:,.0f} tokens/s in training",
        ]

    def rate(self, consumed: "Consumed") -> float:
        """Tokens per second so far, if all replicas' batches are as long as this one's."""
        seconds = time.monotonic() - self._start_s - self._validation_s
        return consumed.tokens * parallel_state.get_data_parallel_world_size() / seconds

    def report(self, trainer: Any, save_to: str | None) -> str:
        """What was done, the last metrics, and where the weights lie: after the save."""
        last_step = self._last_step or trainer.global_step
        steps = last_step - self._first_step if self._lines else 0
        lines = [f"trained {steps:,} steps, to step {last_step:,}", *self._lines]
        if not steps:
            lines.append("nothing was left to train: an earlier run of this name did all the steps")
        metrics = trainer.callback_metrics
        names = {
            "training: ": [name for name in TRAINED if name in metrics],
            "validation: ": [name for name in metrics if name.startswith("validation_")],
        }
        for title, shown in names.items():
            values = [f"{name.removeprefix('validation_')} {metrics[name]:.5g}" for name in shown]
            if values:
                lines.append(title + ", ".join(values))
        callback = trainer.checkpoint_callback
        paths = {
            "best checkpoint": _on_disk(getattr(callback, "best_model_path", "")),
            "last checkpoint": _on_disk(getattr(callback, "last_model_path", "")),
            ".nemo": save_to,
        }
        lines += [f"{name}: {path}" for name, path in paths.items() if path]
        return "\n  ".join(lines)


class FittingBar(CustomProgressBar):
    """NeMo's bar of a training, with few enough numbers for a line."""

    def __init__(self, summary: ClosingSummary) -> None:
        super().__init__()
        self._summary = summary

    def init_train_tqdm(self) -> Any:
        bar = super().init_train_tqdm()
        bar.bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        return bar

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        metrics = trainer.callback_metrics
        shown = {short: f"{metrics[name]:.4g}" for name, short in SHOWN.items() if name in metrics}
        return shown | {"tokens/s": f"{self._summary.rate(pl_module.consumed):,.0f}"}


def follow(trainer: Any) -> ClosingSummary:
    """Put our bar in the place of NeMo's, and return the summary that it reads."""
    summary, bar = ClosingSummary(), trainer.progress_bar_callback
    callbacks = [FittingBar(summary) if each is bar else each for each in trainer.callbacks]
    trainer.callbacks = [*callbacks, summary]
    return summary


class Consumed:
    """Counts on the host, batch by batch, what this process has trained on."""

    names = ("samples", "tokens", "supervised_tokens")

    def __init__(self) -> None:
        self._counts = torch.zeros(len(self.names), dtype=torch.int64)

    def add(self, batch: dict[str, Any]) -> None:
        """Count a batch of NeMo's collate_fn, this replica's share of a global batch."""
        lengths = batch["token_count"]  # without padding
        self._counts += torch.tensor([len(lengths), sum(lengths), int(batch["loss_mask"].sum())])

    @property
    def tokens(self) -> int:
        """Of this process alone."""
        return int(self._counts[1])

    def totals(self) -> dict[str, int]:
        """The sums over the student's replicas, on every rank; a collective of all ranks."""
        counts = self._counts.to(torch.cuda.current_device())
        # Over replicas only: the ranks of one replica have counted the same batches.
        torch.distributed.all_reduce(counts, group=parallel_state.get_data_parallel_group())
        return dict(zip(self.names, counts.tolist(), strict=True))


def _on_disk(checkpoint: str) -> str:
    """NeMo names a distributed checkpoint as a file; it is a directory without the suffix."""
    directory = checkpoint.removesuffix(".ckpt")
    return directory if Path(directory).is_dir() else checkpoint
