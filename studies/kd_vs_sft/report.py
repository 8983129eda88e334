"""The study's tables and plots out of its results: results.json -> report.md, *.png.

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
    "ce": ("CE", 3),
    "kl": ("KL to the teacher", 3),
    "top1_agreement": ("top-1 agreement", 3),
    "ece": ("ECE", 3),
    "exact_match": ("exact match", 3),
}
TOKEN_MEASURES = ("ce", "kl", "top1_agreement", "ece")
OBJECTIVES = {"sft": "SFT", "kd": "KD + SFT"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="where results.json is and the rest goes")
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
    """NVIDIA's: objective by steps, mean and standard deviation over seeds."""
    lines = [
        [name, "", *(number(results[key][measure]) for measure in MEASURES)]
        for key, name in (("teacher", "the teacher"), ("student", "the student before"))
    ]
    for objective, steps in conditions(results):
        rows = seeds_of(results, objective, steps)
        cells = [spread([row[measure] for row in rows]) for measure in MEASURES]
        lines.append([OBJECTIVES[objective], str(steps), *cells])
    return table(["objective", "steps", *(title for title, _ in MEASURES.values())], lines)


def claim_table(results: dict[str, Any]) -> str:
    """KD + SFT at fewer steps less SFT at all, of the same seed."""
    *_, all_steps = sorted({row["steps"] for row in results["main"]})
    fewer_steps = min(row["steps"] for row in results["main"])
    sft = {row["seed"]: row for row in seeds_of(results, "sft", all_steps)}
    kd = {row["seed"]: row for row in seeds_of(results, "kd", fewer_steps)}
    differences = {
        seed: [kd[seed][measure] - sft[seed][measure] for measure in TOKEN_MEASURES] for seed in kd
    }
    lines = [[str(seed), *(f"{v:+.3f}" for v in values)] for seed, values in differences.items()]
    columns = zip(*differences.values(), strict=True)
    lines.append(["all", *(spread(list(column), sign="+") for column in columns)])
    return table(["seed", *(MEASURES[measure][0] for measure in TOKEN_MEASURES)], lines)


def storage_table(results: dict[str, Any]) -> str:
    """K by tail by bytes a supervised token, one seed, at fewer steps."""
    lines = []
    for row in storage_rows(results):
        cache = results["caches"][row["cache"]]
        lines.append(
            [
                row["cache"],
                row["settings"].get("tail", "renormalize"),
                f"{cache['bytes']:.1f}",
                f"{cache['entries']:.1f}",
                f"{cache['mass']:.3f}",
                *(number(row[measure]) for measure in TOKEN_MEASURES),
            ]
        )
    head = ["selection", "tail", "bytes a token", "entries", "mass kept"]
    return table([*head, "CE", "KL to the teacher", "top-1 agreement", "ECE"], lines)


def other_table(results: dict[str, Any]) -> str:
    """The other settings, K = 100, one seed, at fewer steps."""
    lines = []
    for row in [*default_rows(results), *results["others"]]:
        if row["cache"] == "top_k-100" and "tail" not in row["settings"]:
            changed = ", ".join(f"{key} {value}" for key, value in row["settings"].items())
            lines.append(
                [changed or "the defaults", *(number(row[measure]) for measure in TOKEN_MEASURES)]
            )
    return table(["changed", "CE", "KL to the teacher", "top-1 agreement", "ECE"], lines)


def conditions(results: dict[str, Any]) -> list[tuple[str, int]]:
    """Objective and steps, in the table's order."""
    found = {(row["objective"], row["steps"]) for row in results["main"]}
    return sorted(found, key=lambda key: (list(OBJECTIVES).index(key[0]), key[1]))


def seeds_of(results: dict[str, Any], objective: str, steps: int) -> list[Row]:
    return [
        row for row in results["main"] if (row["objective"], row["steps"]) == (objective, steps)
    ]


def default_rows(results: dict[str, Any]) -> list[Row]:
    """The run of the defaults that stands beside the one run of each other kind."""
    steps, seed = results["others"][0]["steps"], results["others"][0]["seed"]
    return [row for row in seeds_of(results, "kd", steps) if row["seed"] == seed]


def storage_rows(results: dict[str, Any]) -> list[Row]:
    """The runs that differ in what is stored and in the tail."""
    rows = [*default_rows(results), *results["others"]]
    rows = [row for row in rows if set(row["settings"]) <= {"tail"}]
    return sorted(rows, key=lambda row: results["caches"][row["cache"]]["bytes"])


def number(value: float) -> str:
    return f"{value:.3f}"


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and, of several, the standard deviation."""
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


def crossing(results: dict[str, Any]) -> tuple[float, int | None]:
    """SFT's best mean CE, and the first validation at which KD + SFT's mean is at most that."""
    steps = max(row["steps"] for row in results["main"])
    best = min(point[1] for point in mean_curve(seeds_of(results, "sft", steps)))
    kd = mean_curve(seeds_of(results, "kd", steps))
    return best, next((step for step, value, *_ in kd if value <= best), None)


def plot_curves(results: dict[str, Any], path: Path) -> None:
    """Held-out CE against steps, with the step at which KD + SFT passes SFT's best."""
    from matplotlib.figure import Figure

    steps = max(row["steps"] for row in results["main"])
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for objective, name in OBJECTIVES.items():
        curve = mean_curve(seeds_of(results, objective, steps))
        x, middle, low, high = zip(*curve, strict=True)
        (line,) = axes.plot(x, middle, "o-", label=name)
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2)
    best, step = crossing(results)
    axes.axhline(best, color="gray", linestyle=":")
    if step is not None:
        axes.axvline(step, color="gray", linestyle=":")
        axes.annotate(
            f"step {step}: SFT's best passed", (step, best), (5, 5), textcoords="offset points"
        )
    axes.axhline(results["teacher"]["ce"], color="black", linewidth=1, label="the teacher")
    axes.set(xlabel="steps", ylabel="held-out cross entropy, nats")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_storage(results: dict[str, Any], path: Path) -> None:
    """Quality against bytes: each run, and the line of those that no run beats in both."""
    from matplotlib.figure import Figure

    rows = storage_rows(results)
    tails = list(dict.fromkeys(row["settings"].get("tail", "renormalize") for row in rows))
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    measures = {"ce": "held-out cross entropy, nats", "kl": "KL to the teacher, nats"}
    for axes, (measure, title) in zip(figure.subplots(1, 2), measures.items(), strict=True):
        points = [(results["caches"][row["cache"]]["bytes"], row[measure]) for row in rows]
        for tail, marker in zip(tails, "osD^v", strict=False):
            chosen = [
                (row["cache"], point)
                for row, point in zip(rows, points, strict=True)
                if row["settings"].get("tail", "renormalize") == tail
            ]
            x, y = zip(*(point for _, point in chosen), strict=True)
            axes.plot(x, y, marker, label=tail)
            for cache, point in chosen:
                axes.annotate(cache, point, (4, 4), textcoords="offset points", fontsize=7)
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
