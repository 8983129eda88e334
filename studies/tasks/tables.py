"""Makes the study's tables and plot from its results: results.json -> report.md, tasks.png.

python studies/tasks/tables.py docs/study/tasks
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

Results = dict[str, Any]
KINDS = ("all", "sums", "units", "days", "programs")
MEASURES = {"heldout_ce": "CE", "kl_to_teacher": "KL to the teacher"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="has results.json; the files are written here")
    write_report(parser.parse_args().directory)


def write_report(directory: Path) -> None:
    results = json.loads((directory / "results.json").read_text())
    parts = [sft_table(results)]
    for layers in results["students"]:
        tables = (main_table, claim_table, cold_table, rollout_table, sweep_table)
        parts += [f"## {layers} layers", *(each(results, layers) for each in tables)]
    (directory / "report.md").write_text("\n\n".join(filter(None, parts)) + "\n")
    plot(results, directory / "tasks.png")


def main_table(results: Results, layers: str) -> str:
    """Each objective after 70% and after all of the steps; mean and deviation over seeds."""
    student = results["students"][layers]
    lines = [
        [name, "", *shares(results, [right]), "", ""]
        for name, right in (
            ("the teacher", results["teacher"]),
            ("the student before", student["before"]),
        )
    ]
    for objective, runs in student["main"].items():
        for legs in zip(*(run["legs"] for run in runs), strict=True):
            lines.append([objective, str(legs[0]["steps"]), *judged(results, *legs)])
    return table(["objective", "steps", *KINDS, *MEASURES.values()], lines)


def claim_table(results: Results, layers: str) -> str:
    """KD + SFT with 70% and with all of the steps minus SFT with all steps, on the same questions.

    The days are also left out: there the teacher itself guesses.
    """
    main = results["students"][layers]["main"]
    sft, *distilled = main
    baseline, lines = [run["legs"][-1] for run in main[sft]], []
    is_no_day = np.array([kind != "days" for kind in results["kinds"]])
    for objective in distilled:
        for legs in zip(*(run["legs"] for run in main[objective]), strict=True):
            won, base = (
                np.mean([leg["right"] for leg in each], axis=0) for each in (legs, baseline)
            )
            difference = 100 * (won - base)
            points = [with_interval(each) for each in (difference, difference[is_no_day])]
            pairs = zip(legs, baseline, strict=True)
            ce = ", ".join(f"{leg['heldout_ce'] - each['heldout_ce']:+.3f}" for leg, each in pairs)
            lines.append([objective, str(legs[0]["steps"]), *points, ce])
    measures = ["right answers, in points", "without the days", "CE, by seed"]
    return table(["objective", "steps", *measures], lines)


def with_interval(values: Any) -> str:
    """The mean, and the middle 95% of the means of 10,000 samples with replacement (bootstrap)."""
    picked = np.random.default_rng(0).integers(len(values), size=(10_000, len(values)))
    low, high = np.percentile(values[picked].mean(axis=1), [2.5, 97.5])
    return f"{values.mean():+.1f} ({low:+.1f} to {high:+.1f})"


def cold_table(results: Results, layers: str) -> str:
    """The student without its first training, one seed; empty without any."""
    lines = [
        [run["objective"], str(leg["steps"]), *judged(results, leg)]
        for run in results["students"][layers]["cold"]
        for leg in run["legs"]
    ]
    return table(["objective", "steps", *KINDS, *MEASURES.values()], lines) if lines else ""


def rollout_table(results: Results, layers: str) -> str:
    """Rounds of student rollouts, one seed; empty without any."""
    lines = [
        [str(leg["round"]), str(leg["steps"]), *judged(results, leg)]
        for leg in results["students"][layers]["rollouts"]
    ]
    if not lines:
        return ""
    return table(["rounds", "steps in all", *KINDS, *MEASURES.values()], lines)


def sweep_table(results: Results, layers: str) -> str:
    """The learning rates of each objective, one seed; CE after 70% and after all of the steps."""
    lines, sweep = [], results["students"][layers]["sweep"]
    steps = ", ".join(str(leg["steps"]) for leg in sweep[0]["legs"])
    for run in sweep:
        ce, last = ", ".join(f"{leg['heldout_ce']:.3f}" for leg in run["legs"]), run["legs"][-1]
        share, *_ = shares(results, [last["right"]])
        rate = f"{run['learning_rate']:g}"
        lines.append([run["objective"], rate, ce, f"{last['kl_to_teacher']:.3f}", share])
    measures = [f"CE after {steps} steps", "KL to the teacher", "right answers"]
    return table(["objective", "learning rate", *measures], lines)


def sft_table(results: Results) -> str:
    """How teacher and students learnt the tasks: the validation's cross entropy of SFT."""
    names = {"teacher": "the teacher"}
    names |= {f"warm-{layers}": f"the student of {layers} layers" for layers in results["students"]}
    lines = [
        [names[name], ", ".join(f"{value:.3f} ({steps})" for steps, value in curve)]
        for name, curve in results["sft_curves"].items()
    ]
    return table(["model", "CE (after steps)"], lines)


def plot(results: Results, path: Path) -> None:
    """Right answers against steps: the mean of the seeds, in a band from lowest to highest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    students = results["students"]
    size = (6 * len(students), 4)
    figure, axes = pyplot.subplots(
        1, len(students), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    teacher = 100 * mean(results["teacher"])
    for axis, (layers, student) in zip(axes[0], students.items(), strict=True):
        before = mean(student["before"])
        for objective, runs in student["main"].items():
            steps = [0, *(leg["steps"] for leg in runs[0]["legs"])]
            right = [[before, *(mean(leg["right"]) for leg in run["legs"])] for run in runs]
            columns = [*zip(*right, strict=True)]
            line = [100 * mean(column) for column in columns]
            axis.plot(steps, line, marker="o", label=objective)
            low, high = ([100 * pick(column) for column in columns] for pick in (min, max))
            axis.fill_between(steps, low, high, alpha=0.15)
        axis.axhline(teacher, color="grey", linestyle=":", label="the teacher")
        axis.set(xlabel="steps", title=f"student of {layers} layers")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("right answers in percent")
    axes[0][0].legend()
    figure.savefig(path, dpi=120)


def judged(results: Results, *legs: Any) -> list[str]:
    """The cells of KINDS and MEASURES: of a leg, or mean and deviation of some."""
    right = shares(results, [leg["right"] for leg in legs])
    return [*right, *(spread([leg[measure] for leg in legs]) for measure in MEASURES)]


def shares(results: Results, right: list[list[int]]) -> list[str]:
    """Percent of right answers, in all and by kind: of a student, or mean and deviation of some."""
    columns = []
    for kind in KINDS:
        asked = [number for number, own in enumerate(results["kinds"]) if kind in ("all", own)]
        columns.append(spread([100 * mean(each[i] for i in asked) for each in right], digits=1))
    return columns


def spread(values: list[float], digits: int = 3) -> str:
    """The mean and, of several values, the standard deviation."""
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    main()
