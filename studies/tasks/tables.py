"""Makes the study's tables and plot from its results: results.json -> report.md, tasks.png.

python studies/tasks/tables.py docs/study/tasks
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Results = dict[str, Any]
KINDS = ("all", "sums", "units", "days", "programs")
MEASURES = {"heldout_ce": "CE", "kl_to_teacher": "KL to the teacher"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="has results.json; the files are written here")
    write_report(parser.parse_args().directory)


def write_report(directory: Path) -> None:
    results = json.loads((directory / "results.json").read_text())
    parts = (main_table, claim_table, sweep_table, sft_table)
    (directory / "report.md").write_text("\n\n".join(part(results) for part in parts) + "\n")
    plot(results, directory / "tasks.png")


def main_table(results: Results) -> str:
    """Each objective after 70% and after all of the steps; mean and deviation over seeds."""
    lines = [
        [name, "", *(percent([results[key][kind]]) for kind in KINDS), "", ""]
        for key, name in (("teacher", "the teacher"), ("student", "the student before"))
    ]
    for objective, runs in results["main"].items():
        for legs in list(zip(*(run["legs"] for run in runs), strict=True))[-2:]:
            right = [percent([leg["right"][kind] for leg in legs]) for kind in KINDS]
            measures = [spread([leg[measure] for leg in legs]) for measure in MEASURES]
            lines.append([objective, str(legs[0]["steps"]), *right, *measures])
    for leg in results["rollouts"]:
        right = [percent([leg["right"][kind]]) for kind in KINDS]
        measures = [f"{leg[measure]:.3f}" for measure in MEASURES]
        lines.append(["student rollouts, reverse KL", str(leg["steps"]), *right, *measures])
    return table(["objective", "steps", *KINDS, *MEASURES.values()], lines)


def claim_table(results: Results) -> str:
    """KD + SFT with 70% and with all of the steps minus SFT with all steps, for each seed."""
    sft, *distilled = results["main"]
    baseline = [run["legs"][-1] for run in results["main"][sft]]
    lines = []
    for objective in distilled:
        for place in (-2, -1):
            legs = [run["legs"][place] for run in results["main"][objective]]
            pairs = [*zip(legs, baseline, strict=True)]
            right = [100 * (leg["right"]["all"] - base["right"]["all"]) for leg, base in pairs]
            ce = [leg["heldout_ce"] - base["heldout_ce"] for leg, base in pairs]
            each = [", ".join(f"{v:+.1f}" for v in right), ", ".join(f"{v:+.3f}" for v in ce)]
            lines.append([objective, str(legs[0]["steps"]), *each])
    return table(["objective", "steps", "right answers, points, by seed", "CE, by seed"], lines)


def sweep_table(results: Results) -> str:
    """The learning rates of each objective, one seed, all steps."""
    lines = []
    for run in results["sweep"]:
        leg = run["legs"][-1]
        measures = (f"{leg[measure]:.3f}" for measure in MEASURES)
        share = percent([leg["right"]["all"]])
        lines.append([run["objective"], f"{run['learning_rate']:g}", *measures, share])
    return table(["objective", "learning rate", *MEASURES.values(), "right answers"], lines)


def sft_table(results: Results) -> str:
    """How teacher and student learnt the tasks: the validation's cross entropy of SFT."""
    curves = results["sft_curves"]
    names = {"teacher": "the teacher", "warm": "the student"}
    lines = [
        [names[name], ", ".join(f"{value:.3f} ({steps})" for steps, value in curve)]
        for name, curve in curves.items()
    ]
    return table(["model", "CE (after steps)"], lines)


def plot(results: Results, path: Path) -> None:
    """Right answers against steps: the mean of the seeds, in a band from lowest to highest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    before = results["student"]["all"]
    for objective, runs in results["main"].items():
        steps = [0, *(leg["steps"] for leg in runs[0]["legs"])]
        shares = [[before, *(leg["right"]["all"] for leg in run["legs"])] for run in runs]
        columns = [*zip(*shares, strict=True)]
        axis.plot(steps, [100 * mean(column) for column in columns], marker="o", label=objective)
        low, high = ([100 * pick(column) for column in columns] for pick in (min, max))
        axis.fill_between(steps, low, high, alpha=0.15)
    axis.axhline(100 * results["teacher"]["all"], color="grey", linestyle=":", label="the teacher")
    axis.set(xlabel="steps", ylabel="right answers in percent")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


def percent(shares: Iterable[float]) -> str:
    return spread([100 * share for share in shares], digits=1)


def spread(values: list[float], digits: int = 3) -> str:
    """The mean and, of several values, the standard deviation."""
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    main()
