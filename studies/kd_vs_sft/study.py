"""KD + SFT against SFT, and K, tail and bytes, on two cores: docs/study.md has the results.

    make study            # two hours on two cores; make study SMALL=1: eight minutes

The teacher answers questions. Students of six of its layers are then trained on these answers by
examples/train_kd_sft.py, two runs at a time. All files lie under outputs/study (SMALL=1:
outputs/study-small). A study that was interrupted resumes where it stopped.
"""

import argparse
import json
import random
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from demo import VOCAB_SIZE, dump, import_models, question_answer_pairs, teacher_gguf, train
from report import write_report
from steps import Steps, say, together

from nemo_kd.cache import TopKCache
from nemo_kd.cache.inspection import summarize

HERE = Path(__file__).parent
SEED = 1234
QUESTION_CHARACTERS = 60
MAX_SEQ_LENGTH = 64  # no sample is cut: a prompt has some 25 tokens, an answer at most 24
TAILS = ("renormalize", "bucket", "label", "drop")
SFT = {"kd_loss_weight": 0, "sft_loss_weight": 1}
RENORMALIZE = {"tail": "renormalize"}  # as NeMo-Aligner
LABEL = {"tail": "label"}
MAIN_CACHE = "top_k-100"
VALIDATION_BATCH = 16
VALIDATIONS = 10
CLAIM = 0.7  # the share of the steps after which KD + SFT is compared with SFT
# Each of these has a teacher run of its own; the caches of top_k are cut from one of K = 500.
SELECTIONS: dict[str, dict[str, Any]] = {
    "top_p-0.99": {"kind": "top_p", "p": 0.99, "k": 4096},
    "sample-50": {"kind": "sample", "num_draws": 50},
}


@dataclass(frozen=True)
class Scale:
    questions: dict[str, int]
    answers: dict[str, int]
    """answers of the teacher to each question"""
    batch: int
    steps: int
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    objectives: dict[str, dict[str, Any]]
    """settings of the main runs; there is one run per seed"""
    others: tuple[tuple[str, dict[str, Any]], ...]
    """caches and settings of the other runs; there is one run of each"""

    @property
    def fewer_steps(self) -> int:
        return round(CLAIM * self.steps)

    @property
    def caches(self) -> list[str]:
        return sorted({MAIN_CACHE, *(cache for cache, _ in self.others)})


FULL = Scale(
    questions={"train": 560, "heldout": 96},
    answers={"train": 2, "heldout": 1},
    batch=8,
    steps=100,
    learning_rates=(2.5e-4, 5e-4, 1e-3, 2e-3),
    seeds=(1, 2, 3),
    objectives={"SFT": SFT, "KD + SFT, renormalize": RENORMALIZE, "KD + SFT, label": LABEL},
    others=(
        *((f"top_k-{k}", {"tail": tail}) for k in (100, 20, 5) for tail in TAILS),
        ("sample-50", {"tail": "drop"}),
        ("top_p-0.99", {"tail": "label"}),
        ("top_k-500", {"tail": "label"}),
        ("top_k-100", {"tail": "renormalize", "temperature": 2.0}),
        ("top_k-100", {"tail": "renormalize", "divergence": "reverse_kl"}),
        ("top_k-100", {"tail": "bucket", "divergence": "reverse_kl"}),
        ("top_k-100", {"tail": "label", "sft_loss_weight": 0.0}),
        ("top_k-100", {"tail": "label", "sft_loss_weight": 1.0}),
    ),
)
SMALL = Scale(
    questions={"train": 32, "heldout": 16},
    answers={"train": 1, "heldout": 1},
    batch=4,
    steps=6,
    learning_rates=(5e-4,),
    seeds=(1,),
    objectives={"SFT": SFT, "KD + SFT, label": LABEL},
    others=(
        ("top_k-5", {"tail": "label"}),
        ("sample-50", {"tail": "drop"}),
        ("top_k-100", {"tail": "bucket", "divergence": "reverse_kl"}),
    ),
)


@dataclass(frozen=True)
class Run:
    """A training run. Its name contains all its settings."""

    cache: str
    settings: dict[str, Any]
    """keys of model.knowledge_distillation"""
    steps: int
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        settings = [f"{key}-{value}" for key, value in self.settings.items()]
        numbers = f"lr-{self.learning_rate:g}-seed-{self.seed}-steps-{self.steps}"
        return "-".join([self.cache, *settings, numbers])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--small", action="store_true", help="the same in minutes; its figures mean nothing"
    )
    small = parser.parse_args().small
    study = Study(
        Path("outputs/study-small" if small else "outputs/study"), SMALL if small else FULL
    )
    study.prepare()
    (study.out / "results.json").write_text(json.dumps(study.results(), indent=1) + "\n")
    write_report(study.out)
    say(f"\n{(study.out / 'report.md').read_text()}\n{study.out}/report.md, results.json, *.png")


class Study:
    def __init__(self, out: Path, scale: Scale) -> None:
        self.out = out
        self.scale = scale
        # These settings do not show in any step's command. If one changes, the study begins again.
        settings = {
            "questions": scale.questions,
            "answers": scale.answers,
            "question_characters": QUESTION_CHARACTERS,
            "seed": SEED,
            "batch": scale.batch,
        }
        self.steps = Steps(out, settings)

    def prepare(self) -> None:
        """Make the teacher, the student, the teacher's answers and the caches."""
        out, run = self.out, self.steps.run
        self.write_questions()
        import_models(self.steps)
        for split, answers in self.scale.answers.items():
            run(
                f"answers-{split}",
                HERE / "sample_answers.py",
                str(teacher_gguf()),
                f"{out}/{split}-questions.json",
                f"{out}/{split}.jsonl",
                f"--answers={answers}",
                alone=True,
            )
        together(
            [
                # The whole distribution, so that the KL is over the whole vocabulary.
                partial(self.dump, "heldout", "heldout", "raw", k=VOCAB_SIZE),
                partial(self.dump, "train", "top_k-500-raw", "raw", k=500),
                *(
                    partial(self.dump, "train", cache, "packed", **selection)
                    for cache, selection in SELECTIONS.items()
                    if cache in self.scale.caches
                ),
            ]
        )
        together(
            [
                partial(self.cut, "heldout", "heldout-100", 100),
                *(
                    partial(self.cut, "top_k-500-raw", cache, int(cache.removeprefix("top_k-")))
                    for cache in self.scale.caches
                    if cache not in SELECTIONS
                ),
            ]
        )

    def write_questions(self) -> None:
        """Write questions of chatterbot-corpus (BSD), split, and answers to the held-out ones."""
        references: dict[str, list[str]] = {}
        for question, answer in sorted(set(question_answer_pairs())):
            if len(question) <= QUESTION_CHARACTERS:
                references.setdefault(question, []).append(answer)
        questions = list(references)
        random.Random(SEED).shuffle(questions)
        for split, number in self.scale.questions.items():
            selected, questions = questions[:number], questions[number:]
            path = self.out / f"{split}-questions.json"
            path.write_text(json.dumps(selected, indent=2) + "\n")
        # `selected` is now the last split, which is the held-out one
        (self.out / "references.json").write_text(
            json.dumps({question: references[question] for question in selected}, indent=2) + "\n"
        )

    def dump(self, split: str, cache: str, codec: str, **selection: Any) -> None:
        dump(
            self.steps,
            split,
            cache,
            "data.add_eos=false",  # the text of an answer that ended contains its end token
            f"data.max_seq_length={MAX_SEQ_LENGTH}",
            *(f"selection.{name}={value}" for name, value in selection.items()),
            f"cache.codec={codec}",
        )

    def cut(self, source: str, cache: str, k: int) -> None:
        paths = [f"{self.out}/{name}" for name in (source, cache)]
        self.steps.run(f"cut-{cache}", HERE / "cut_cache.py", *paths, f"--k={k}")

    def results(self) -> dict[str, Any]:
        """Train and measure: the sweep, the main runs, and one run of each other kind."""
        scale = self.scale
        first, *_ = scale.seeds
        teacher, student, *sweep = together(
            [
                partial(self.measure, "teacher"),
                partial(self.measure, "student"),
                *(
                    partial(self.train, Run(MAIN_CACHE, SFT, scale.steps, rate, first))
                    for rate in scale.learning_rates
                ),
            ]
        )
        best = min(sweep, key=lambda row: row["ce"])["learning_rate"]
        say(f"SFT's best learning rate: {best:g}")
        main = {
            objective: [
                Run(MAIN_CACHE, settings, steps, best, seed)
                for steps in (scale.fewer_steps, scale.steps)
                for seed in scale.seeds
            ]
            for objective, settings in scale.objectives.items()
        }
        others = [
            Run(cache, settings, scale.fewer_steps, best, first) for cache, settings in scale.others
        ]
        # by name, because some of the other runs are main runs too
        runs = {run.name: run for run in [*chain.from_iterable(main.values()), *others]}
        rows = dict(
            zip(runs, together([partial(self.train, run) for run in runs.values()]), strict=True)
        )
        return {
            "teacher": teacher,
            "student": student,
            "sweep": sweep,
            "main": {
                objective: [rows[run.name] for run in wanted] for objective, wanted in main.items()
            },
            "others": [rows[run.name] for run in others],
            "caches": {name: self.cache_size(name) for name in scale.caches},
        }

    def cache_size(self, name: str) -> dict[str, float | None]:
        """Means over the supervised tokens of a cache: bytes, entries and their probability."""
        summary = summarize(TopKCache.open(self.out / name))
        *_, mass = summary["teacher_mass_kept"].values()
        return {
            "bytes": summary["row_bytes_per_supervised_token"],
            "entries": summary["mean_kept_entries"],
            # drawn entries sum to one, which says nothing about the teacher's probability
            "mass": None if summary["selection"]["kind"] == "sample" else mass,
        }

    def train(self, run: Run) -> dict[str, Any]:
        """Train, measure, and return the run's results. The student itself is deleted."""
        data = "model.data"
        whole = run.steps == self.scale.steps  # only these runs' curves are drawn
        interval = max(1, run.steps // VALIDATIONS) if whole else run.steps
        curves = train(
            self.steps,
            run.name,
            run.name,
            (run.cache, "heldout-100"),
            f"trainer.max_steps={run.steps}",
            f"trainer.val_check_interval={interval}",
            f"{data}.train_ds.seed={run.seed}",
            *(
                f"{data}.{split}_ds.{key}={value}"
                for split, batch in (("train", self.scale.batch), ("validation", VALIDATION_BATCH))
                for key, value in {
                    "global_batch_size": batch,
                    "micro_batch_size": batch,
                    "max_seq_length": MAX_SEQ_LENGTH,
                }.items()
            ),
            *(f"model.knowledge_distillation.{k}={v}" for k, v in run.settings.items()),
            # a constant rate, so that a shorter run is the beginning of a longer one
            "model.optim.sched.name=WarmupPolicy",
            "~model.optim.sched.constant_steps",
            "model.optim.sched.warmup_steps=10",
            f"model.optim.lr={run.learning_rate}",
            f"save_to={self.out}/{run.name}.nemo",
        )
        measures = self.measure(run.name)
        (self.out / f"{run.name}.nemo").unlink(missing_ok=True)
        return {**asdict(run), **measures, "curve": curves["heldout_ce"]}

    def measure(self, name: str) -> dict[str, Any]:
        """The measures of a model under `out`, without its answers; see measure.py."""
        output = self.out / "measures" / f"{name}.json"
        self.steps.run(
            f"measure-{name}",
            HERE / "measure.py",
            *(f"{self.out}/{file}" for file in (f"{name}.nemo", "heldout", "references.json")),
            str(output),
        )
        return {key: v for key, v in json.loads(output.read_text()).items() if key != "answers"}


if __name__ == "__main__":
    main()
