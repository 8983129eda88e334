"""The article's table: a row a student, a column a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_HALF_WIDTH = 1.96  # standard errors on each side of the mean: 95% of a normal distribution


def as_markdown(rows: Sequence[dict[str, Any]], limit: int | None, version: str) -> str:
    """The table with its foot.

    Args:
        rows: The students of results.json, all with the same columns.
        limit: The YAML's.
        version: Of lm-evaluation-harness.
    """
    first = rows[0]["scores"]
    lines = [["student", "objective", "steps", *first], ["---"] * (3 + len(first))]
    for row in rows:
        steps = "" if row["steps"] is None else str(row["steps"])
        lines.append([row["name"], row["objective"], steps, *map(cell, row["scores"].values())])
    counts = [f"{title} {score['num_questions']} ({_of(score)})" for title, score in first.items()]
    foot = (
        f"Percent of the questions, ± half the width of the 95% confidence interval: {_HALF_WIDTH} "
        f"times the standard error of lm-evaluation-harness {version}. The error is 0 where all "
        "answers are right or all are wrong, and unknown where a task has one question. Questions "
        f"(metric): {', '.join(counts)}."
    )
    if limit is not None:
        foot += f" Only the first {limit} of each task were asked, and of each task of a group."
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines]) + f"\n\n{foot}\n"


def cell(score: dict[str, Any]) -> str:
    """A score as the table shows it, e.g. `45.2 ± 3.1`; a metric that is no share as it is."""
    if not 0 <= score["value"] <= 1:
        return f"{score['value']:.4g} ({_of(score)})"
    ci95 = half_width(score["stderr"])
    return f"{100 * score['value']:.1f}" + ("" if ci95 is None else f" ± {100 * ci95:.1f}")


def half_width(stderr: float | None) -> float | None:
    """Half the width of the 95% confidence interval of a mean, None if its error is unknown."""
    return None if stderr is None else _HALF_WIDTH * stderr


def _of(score: dict[str, Any]) -> str:
    """The metric, and the filter if it has one."""
    return str(score["metric"]).removesuffix(",none").replace(",", ", ")
