"""Offline top-K knowledge distillation for NeMo supervised fine-tuning."""

__version__ = "0.1.0"
