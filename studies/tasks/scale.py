"""What the study on tasks runs: students, objectives, and how much of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# A student by its number of layers: those that it has of the teacher's 30.
STUDENTS = {6: (0, 6, 12, 18, 24, 29), 12: (0, 3, 5, 8, 11, 13, 16, 18, 21, 24, 26, 29)}
COLD_RATE = 5e-4  # of students without their first training: that of make study
SFT = {"kd_loss_weight": 0, "sft_loss_weight": 1}
# What the student's second training is: its cache, and keys of knowledge_distillation.
OBJECTIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "SFT": ("cache", SFT),
    "KD + SFT, renormalize": ("cache", {"tail": "renormalize"}),
    "KD + SFT, label": ("cache", {"tail": "label"}),
    "KD + SFT, sampled": ("sampled", {"tail": "drop"}),
}
# The same in rounds of student rollouts: their label is the student's own token.
ROLLOUTS = {"divergence": "reverse_kl", "tail": "bucket", "sft_loss_weight": 0}


@dataclass(frozen=True)
class Scale:
    questions: dict[str, int]
    students: tuple[int, ...]
    teacher_steps: int
    warm_steps: int
    legs: tuple[int, ...]
    """steps after which a student is judged: 70% of all, as NVIDIA's KD + SFT had, and all"""
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    objectives: tuple[str, ...]
    rounds: tuple[int, int] | None = None
    """rounds of rollouts of the last student, and the steps of each; None: without them"""
    cold: tuple[str, ...] = ()
    """objectives that the first student has without its first training too, with the first seed"""


FULL = Scale(
    questions={"sft": 1200, "prompts": 1200, "validation": 48, "test": 160},
    students=(6, 12),
    teacher_steps=100,
    warm_steps=180,
    legs=(42, 60),
    learning_rates=(2.5e-5, 7e-5),
    seeds=(1, 2, 3),
    objectives=tuple(OBJECTIVES),
    rounds=(3, 20),
    cold=("KD + SFT, renormalize", "KD + SFT, label"),
)
SMALL = Scale(
    questions={"sft": 64, "prompts": 32, "validation": 8, "test": 8},
    students=(6,),
    teacher_steps=12,
    warm_steps=8,
    legs=(2, 3),
    learning_rates=(2e-4,),
    seeds=(1,),
    objectives=("SFT", "KD + SFT, sampled"),
    rounds=(1, 2),
    cold=("KD + SFT, label",),
)


@dataclass(frozen=True)
class Run:
    """A second training of a student, or of a cold one, which had no first."""

    layers: int
    objective: str
    learning_rate: float
    seed: int
    is_cold: bool = False

    @property
    def student(self) -> str:
        return f"{'cut' if self.is_cold else 'warm'}-{self.layers}-hf"

    @property
    def name(self) -> str:
        words = self.objective.replace(" + ", "-").replace(", ", "-").lower()
        name = f"{self.layers}-layers-{words}-lr-{self.learning_rate:g}-seed-{self.seed}"
        return f"cold-{name}" if self.is_cold else name
