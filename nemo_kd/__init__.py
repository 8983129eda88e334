"""Offline top-K knowledge distillation for NeMo SFT; the loss's public names."""

from nemo_kd.loss import (
    KDLossConfig,
    KDLossOutput,
    vocab_parallel_kd_sft_loss,
    vocab_parallel_linear_kd_sft_loss,
)

__version__ = "0.1.0"

__all__ = [
    "KDLossConfig",
    "KDLossOutput",
    "vocab_parallel_kd_sft_loss",
    "vocab_parallel_linear_kd_sft_loss",
]
