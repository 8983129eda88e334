"""Make the study's tables and plots from its results: results.json -> report.md, *.png.

python studies/kd_vs_sft/report.py docs/study
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Row = dict[str, Any]
MEASURES = {
    "ce": "CE",
    "kl": "KL to the teacher",
    "top1_agreement": "top-1 agreement",
    "ece": "ECE",
    "exact_match": "exact match",
}
TOKEN_MEASURES = ("ce", "kl", "top1_agreement", "ece")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="has results.json; the files are written here")
    write_report(parser.parse_args().directory)


def write_report(directory: Path) -> None:
    results = json.loads((directory / "results.json").read_text())
    (directory / "report.md").write_text(report(results))
    plot_curves(results, directory / "curves.png")
    plot_storage(results, directory / "storage.png")


def report(results: dict[str, Any]) -> str:
    """The tables, in the order of docs/study.md."""
    parts = (sweep_table, main_table, claim_table, storage_table, other_table)
    return "\n\n".join(part(results) for part in parts) + "\n"


def sweep_table(results: dict[str, Any]) -> str:
    """The learning rate of the SFT baseline, one seed."""
    rows = sorted(results["sweep"], key=lambda row: row["learning_rate"])
    return table(
        ["learning rate", "steps", "CE", "KL to the teacher"],
        [
            [f"{row['learning_rate']:g}", str(row["steps"]), number(row["ce"]), number(row["kl"])]
            for row in rows
        ],
    )


def main_table(results: dict[str, Any]) -> str:
    """Each objective after 70% and after all of the steps; mean and deviation over seeds."""
    lines = [
        [name, "", *(number(results[key][measure]) for measure in MEASURES)]
        for key, name in (("teacher", "the teacher"), ("student", "the student before"))
    ]
    for objective, rows in results["main"].items():
        for steps in sorted({row["steps"] for row in rows}):
            chosen = [row for row in rows if row["steps"] == steps]
            cells = [spread([row[measure] for row in chosen]) for measure in MEASURES]
            lines.append([objective, str(steps), *cells])
    return table(["objective", "steps", *MEASURES.values()], lines)


def claim_table(results: dict[str, Any]) -> str:
    """KD + SFT with 70% of the steps minus SFT with all steps, for each seed."""
    sft, *distilled = results["main"]
    baseline = {row["seed"]: row for row in longest(results["main"][sft])}
    lines = []
    for objective in distilled:
        rows = results["main"][objective]
        differences = {
            row["seed"]: [row[name] - baseline[row["seed"]][name] for name in TOKEN_MEASURES]
            for row in rows
            if row["steps"] == min(row["steps"] for row in rows)
        }
        for seed, values in differences.items():
            lines.append([objective, str(seed), *(f"{value:+.3f}" for value in values)])
        columns = zip(*differences.values(), strict=True)
        lines.append([objective, "all", *(spread(column, sign="+") for column in columns)])
    return table(["objective", "seed", *(MEASURES[name] for name in TOKEN_MEASURES)], lines)


def storage_table(results: dict[str, Any]) -> str:
    """Each K and tail with its bytes per supervised token; one seed, 70% of the steps."""
    lines = []
    for row in storage_rows(results):
        cache = results["caches"][row["cache"]]
        lines.append(
            [
                row["cache"],
                row["settings"]["tail"],
                f"{cache['bytes']:.1f}",
                f"{cache['entries']:.1f}",
                "drawn" if cache["mass"] is None else number(cache["mass"]),
                *(number(row[measure]) for measure in TOKEN_MEASURES),
            ]
        )
    head = ["selection", "tail", "bytes a token", "entries", "mass kept"]
    return table([*head, "CE", "KL to the teacher", "top-1 agreement", "ECE"], lines)


def other_table(results: dict[str, Any]) -> str:
    """The other settings beside the run without them; K = 100, one seed, 70% of the steps."""
    changed = [row for row in results["others"] if set(row["settings"]) > {"tail"}]
    tails = {row["settings"]["tail"] for row in changed}
    plain = [
        row
        for row in results["others"]
        if row["cache"] == changed[0]["cache"]
        and list(row["settings"].values()) in [[t] for t in tails]
    ]
    lines = []
    for row in sorted([*plain, *changed], key=lambda row: row["settings"]["tail"]):
        settings = ", ".join(f"{key} {value}" for key, value in row["settings"].items())
        lines.append([settings, *(number(row[measure]) for measure in TOKEN_MEASURES)])
    return table(["settings", *(MEASURES[name] for name in TOKEN_MEASURES)], lines)


def longest(rows: list[Row]) -> list[Row]:
    """The runs that have all the steps."""
    return [row for row in rows if row["steps"] == max(row["steps"] for row in rows)]


def storage_rows(results: dict[str, Any]) -> list[Row]:
    """The runs that differ in what is stored and in the tail."""
    rows = [row for row in results["others"] if set(row["settings"]) == {"tail"}]
    return sorted(rows, key=lambda row: results["caches"][row["cache"]]["bytes"])


def number(value: float) -> str:
    return f"{value:.3f}"


def spread(values: Sequence[float], sign: str = "") -> str:
    """The mean and, of several values, the standard deviation."""
    text = f"{mean(values):{sign}.3f}"
    return f"{text} ± {stdev(values):.3f}" if len(values) > 1 else text


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def mean_curve(rows: list[Row]) -> list[tuple[int, float, float, float]]:
    """Step, mean, lowest and highest CE over seeds."""
    curve = []
    for points in zip(*(row["curve"] for row in rows), strict=True):
        values = [value for _, value in points]
        curve.append((points[0][0], mean(values), min(values), max(values)))
    return curve


def crossing(sft: list[Row], distilled: list[Row]) -> tuple[float, int | None]:
    """SFT's best mean CE, and the first step at which the mean of `distilled` is at most that."""
    best = min(value for _, value, *_ in mean_curve(sft))
    curve = mean_curve(distilled)
    return best, next((step for step, value, *_ in curve if value <= best), None)


def plot_curves(results: dict[str, Any], path: Path) -> None:
    """Draw held-out CE against steps, with the step at which KD + SFT passes the best of SFT."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    sft, *distilled = (longest(rows) for rows in results["main"].values())
    labels = [f"SFT, best {min(value for _, value, *_ in mean_curve(sft)):.3f}"]
    for objective, rows in zip(list(results["main"])[1:], distilled, strict=True):
        best, step = crossing(sft, rows)
        labels.append(objective + (f", at most that from step {step}" if step else ", never"))
    for label, rows in zip(labels, [sft, *distilled], strict=True):
        x, middle, low, high = zip(*mean_curve(rows), strict=True)
        (line,) = axes.plot(x, middle, "o-", label=label)
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2)
    axes.axhline(best, color="gray", linestyle=":")
    axes.set(xlabel="steps", ylabel="held-out cross entropy, nats")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_storage(results: dict[str, Any], path: Path) -> None:
    """Draw quality against bytes: each run, and a line through those that no run beats in both."""
    from matplotlib.figure import Figure

    rows = storage_rows(results)
    tails = list(dict.fromkeys(row["settings"]["tail"] for row in rows))
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    measures = {"ce": "held-out cross entropy, nats", "kl": "KL to the teacher, nats"}
    for axes, (measure, title) in zip(figure.subplots(1, 2), measures.items(), strict=True):
        points = [(results["caches"][row["cache"]]["bytes"], row[measure]) for row in rows]
        for tail, marker in zip(tails, "osD^v", strict=False):
            chosen = [
                point
                for row, point in zip(rows, points, strict=True)
                if row["settings"]["tail"] == tail
            ]
            axes.plot(*zip(*chosen, strict=True), marker, label=tail)
        for cache in {row["cache"] for row in rows}:
            lowest = min(row[measure] for row in rows if row["cache"] == cache)
            place = (results["caches"][cache]["bytes"], lowest)
            axes.annotate(cache, place, (0, -12), textcoords="offset points", fontsize=8)
        front, lowest = [], float("inf")
        for size, value in sorted(points):
            if value < lowest:
                front.append((size, value))
                lowest = value
        axes.step(*zip(*front, strict=True), where="post", color="gray", linestyle=":")
        axes.set(xscale="log", xlabel="bytes a supervised token", ylabel=title)
        axes.grid(alpha=0.3)
    axes.legend(title="tail")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
