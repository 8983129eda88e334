"""What a run did, in a few lines at its end."""

import time
from typing import Any

from lightning.pytorch import Callback


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
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        for name in ("reduced_train_loss", "kd_loss", "sft_loss", *sorted(metrics)):
            if name in metrics and (name.startswith("validation_") or "loss" in name):
                lines.append(f"{name}: {metrics.pop(name):.5g}")
        checkpoints = trainer.checkpoint_callback
        for kind in ("best", "last") if checkpoints is not None else ():
            path = getattr(checkpoints, f"{kind}_model_path")
            lines += [f"{kind} checkpoint: {path}"] if path else []
        lines += [f".nemo: {save_to}"] if save_to is not None else []
        return "\n  ".join(lines)
