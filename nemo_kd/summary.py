"""What a run did, in a few lines at its end."""

import time
from typing import Any

from lightning.pytorch import Callback

TRAINED = ("reduced_train_loss", "kd_loss", "sft_loss", "top1_agreement")


class ClosingSummary(Callback):
    """Measures a training run; `report` says what it did.

    Tokens are those of the samples, without padding. The rate leaves validation out.
    """

    def __init__(self) -> None:
        self._first_step = 0
        self._start_s = self._validation_start_s = self._validation_s = 0.0
        self._lines: list[str] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._first_step = trainer.global_step
        self._start_s, self._validation_s = time.monotonic(), 0.0

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
            f"{total_s:,.1f} s, {self._validation_s:,.1f} s of them validation; "
            f"{rate:,.0f} tokens/s in training",
        ]

    def report(self, trainer: Any, save_to: str | None) -> str:
        """What was done, the last metrics, and where the weights lie; after fit and the save."""
        steps = trainer.global_step - self._first_step if self._lines else 0
        lines = [f"trained {steps:,} steps, to step {trainer.global_step:,}", *self._lines]
        metrics = trainer.callback_metrics
        validated = [name for name in metrics if name.startswith("validation_")]
        for title, names in (("training", TRAINED), ("validation", validated)):
            values = [f"{name} {metrics[name].item():.5g}" for name in names if name in metrics]
            lines += [f"{title}: {', '.join(values)}"] if values else []
        callback = trainer.checkpoint_callback
        paths = {
            "best checkpoint": getattr(callback, "best_model_path", None),
            "last checkpoint": getattr(callback, "last_model_path", None),
            ".nemo": save_to,
        }
        lines += [f"{name}: {path}" for name, path in paths.items() if path]
        return "\n  ".join(lines)
