"""KD + SFT against SFT on tasks: the teacher writes, the students are judged by right answers.

    make study-tasks            # on two cores; make study-tasks SMALL=1: the same chain in minutes

A teacher and its students learn the tasks of questions.py by SFT. Then the teacher answers new
questions, and the students go on with its right answers, by SFT or by KD + SFT; the last student
also by rounds of its own answers. All of it are the commands of examples/, on the host
Megatron-Bridge. docs/study.md has the results. All files lie under outputs/study-tasks (SMALL=1:
outputs/study-tasks-small); an interrupted study resumes.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from demo import VOCAB_SIZE, teacher_gguf
from demo_hosts import EXAMPLES, HOSTS
from questions import is_right, write_questions
from scale import COLD_RATE, FULL, OBJECTIVES, ROLLOUTS, SFT, SMALL, STUDENTS, Run, Scale
from steps import Steps, last_values, say, together, validation_curves
from tables import write_report

from nemo_kd.sandbox import check_can_be_alone

HOST = HOSTS["bridge"]
SEED = 1234
LENGTH = 96  # tokens; no sample is cut
TEMPLATE = "'Question: {input}\\nAnswer: {output}'"
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--small", action="store_true", help="the same in minutes; its figures mean nothing"
    )
    small = parser.parse_args().small
    check_can_be_alone()  # the programs of the answers run in the sandbox
    out = Path("outputs/study-tasks-small" if small else "outputs/study-tasks")
    study = Study(out, SMALL if small else FULL)
    study.prepare()
    (out / "results.json").write_text(json.dumps(study.results(), indent=1) + "\n")
    write_report(out)
    say(f"\n{(out / 'report.md').read_text()}\n{out}/report.md, results.json, tasks.png")


def answers_of(name: str, model: str) -> str:
    """The name of a model's greedy answers to NAME.jsonl."""
    return f"{name}-{model.replace('/', '-')}"


class Study:
    def __init__(self, out: Path, scale: Scale) -> None:
        self.out, self.scale = out, scale
        # What is measured does not show in the commands of what follows from it.
        decides = ("questions", "teacher_steps", "warm_steps")
        self.steps = Steps(out, {"seed": SEED} | {key: getattr(scale, key) for key in decides})

    def prepare(self) -> None:
        """Make teacher and students, the teacher's right answers, and the caches."""
        out, scale = self.out, self.scale
        write_questions(out, scale.questions, SEED)
        gguf = (EXAMPLES / "bridge" / "gguf_to_hf.py", str(teacher_gguf()))
        self.steps.run("import-base", *gguf, f"{out}/base-hf")
        for layers in scale.students:
            keep = ("--keep-layers", *map(str, STUDENTS[layers]))
            self.steps.run(f"import-cut-{layers}", *gguf, f"{out}/cut-{layers}-hf", *keep)
        # SFT reads a cache too, of whose rows it uses none.
        self.dump("base-hf", "sft.jsonl", "sft-cache", "selection.k=1", alone=True)
        teacher, warm = scale.teacher_steps, scale.warm_steps
        given = partial(self.train, caches=("sft-cache",), settings=SFT, seed=1)
        files = f"dataset.validation_files=[{out}/validation.jsonl]"
        data = (f"data.prompt_template={TEMPLATE}", f"train.eval_interval={max(1, warm // 8)}")
        together(
            [
                partial(given, "teacher", "base-hf", teacher, 1e-4, files, *data),
                *(
                    partial(given, f"warm-{layers}", f"cut-{layers}-hf", warm, 1e-3, files, *data)
                    for layers in scale.students
                ),
            ]
        )
        together(
            [partial(self.generate, "teacher-hf", name, 1) for name in ("prompts", "validation")]
        )
        self.steps.run(
            "filter",
            EXAMPLES / "filter_answers.py",
            f"data.file_names=[{out}/prompts-answers.jsonl]",
            f"output={out}/kept.jsonl",
            "filters=[cut,duplicates,'studies.tasks.questions:is_right']",
            f"data.prompt_template={TEMPLATE}",
            f"cache.source={out}/prompts-cache",
            f"cache.path={out}/cache",
            alone=True,
        )
        whole = (f"selection.k={VOCAB_SIZE}", "cache.codec=raw")
        draws = ("selection.kind=sample", "selection.num_draws=50")
        # The whole distribution, so that the KL is over the whole vocabulary.
        dumps = [partial(self.dump, "teacher-hf", "validation-answers.jsonl", "heldout", *whole)]
        if any(OBJECTIVES[each][0] == "sampled" for each in scale.objectives):
            dumps.append(partial(self.dump, "teacher-hf", "kept.jsonl", "sampled", *draws))
        together(dumps)

    def dump(self, model: str, data: str, cache: str, *more: str, alone: bool = False) -> None:
        self.steps.run(
            f"dump-{cache}",
            EXAMPLES / "bridge" / "dump_teacher_topk.py",
            "device=cpu",
            f"model.hf_path={self.out}/{model}",
            f"data.file_names=[{self.out}/{data}]",
            f"data.prompt_template={TEMPLATE}",
            f"data.max_seq_length={LENGTH}",
            f"cache.path={self.out}/{cache}",
            *more,
            alone=alone,
        )

    def train(
        self,
        name: str,
        student: str,
        steps: int,
        learning_rate: float,
        *more: str,
        caches: tuple[str, ...],
        settings: dict[str, Any],
        seed: int,
    ) -> str:
        """Train for so many steps in all, and return the name of the trained model's directory.

        After ten steps the rate is constant. A run of more steps goes on where one of fewer ended.
        """
        trained = f"{name}-hf"
        self.steps.run(
            f"train-{name}",
            EXAMPLES / "bridge" / "train_kd_sft.py",
            "device=cpu",
            f"model.hf_path={self.out}/{student}",
            f"model.seq_length={LENGTH}",
            f"dataset.train_caches=[{','.join(f'{self.out}/{cache}' for cache in caches)}]",
            f"dataset.seed={seed}",
            "dataset.num_workers=0",
            f"train.train_iters={steps}",
            f"train.global_batch_size={BATCH}",
            f"train.micro_batch_size={BATCH}",
            f"optimizer.lr={learning_rate}",
            "scheduler.lr_decay_style=constant",
            "scheduler.lr_decay_iters=1000000",  # the same for all legs
            "scheduler.lr_warmup_iters=10",
            f"save_hf={self.out}/{trained}",
            *(f"knowledge_distillation.{key}={value}" for key, value in settings.items()),
            f"logger.tensorboard_dir={self.out}/runs/{name}",
            *more,
            directory=self.out / trained,
        )
        return trained

    def generate(self, model: str, name: str, temperature: float) -> None:
        """Let a model answer NAME.jsonl; with a temperature the rows are captured too."""
        out, answers = self.out, f"{name}-answers" if temperature else answers_of(name, model)
        capture = [f"capture.path={out}/{name}-cache"] if temperature else []
        self.steps.run(
            f"generate-{answers}",
            EXAMPLES / "generate_answers.py",
            "device=cpu",
            "model.dtype=float32",
            f"model.hf_path={out}/{model}",
            f"data.file_names=[{out}/{name}.jsonl]",
            f"data.prompt_template={TEMPLATE}",
            f"data.max_seq_length={LENGTH}",
            f"sampling.temperature={temperature}",
            "sampling.max_tokens=48",
            f"output={out}/{answers}.jsonl",
            *capture,
        )

    def judge(self, model: str) -> list[int]:
        """For each test question, 1 if the model's greedy answer is right, else 0."""
        path = self.out / "measures" / f"{answers_of('test', model)}.json"
        if not path.exists():
            self.generate(model, "test", 0)
            right = [0] * self.scale.questions["test"]
            for line in map(json.loads, (self.out / f"{answers_of('test', model)}.jsonl").open()):
                right[line["generation"]["prompt"]] = int(is_right(line))
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(right))
        return list(json.loads(path.read_text()))

    def results(self) -> dict[str, Any]:
        scale, out = self.scale, self.out
        names = ["teacher", *(f"warm-{layers}" for layers in scale.students)]
        teacher, *before = together([partial(self.judge, f"{name}-hf") for name in names])
        students = {
            layers: {"before": right, **self.second_trainings(layers)}
            for layers, right in zip(scale.students, before, strict=True)
        }
        kept, written = (
            len((out / name).read_text().splitlines())
            for name in ("kept.jsonl", "prompts-answers.jsonl")
        )
        curves = {name: validation_curves(out / "runs" / name, HOST) for name in names}
        return {
            "kinds": [json.loads(line)["kind"] for line in (out / "test.jsonl").open()],
            "teacher": teacher,
            "sft_curves": {name: found["heldout_ce"] for name, found in curves.items()},
            "answers": {"written": written, "kept": kept},
            "students": students,
        }

    def second_trainings(self, layers: int) -> dict[str, Any]:
        """The sweep of rates, the other seeds, cold students and rounds of rollouts, all judged."""
        scale, (first, *others) = self.scale, self.scale.seeds
        runs = [
            Run(layers, each, rate, first)
            for each in scale.objectives
            for rate in scale.learning_rates
        ]
        rows = together([partial(self.run, run) for run in runs])
        best: dict[str, list[dict[str, Any]]] = {}
        for objective in scale.objectives:
            swept = [row for row in rows if row["objective"] == objective]
            best[objective] = [min(swept, key=lambda row: row["legs"][-1]["heldout_ce"])]
            rate = best[objective][0]["learning_rate"]
            say(f"{layers} layers, {objective}: best learning rate {rate:g}")
        more = [
            Run(layers, each, best[each][0]["learning_rate"], seed)
            for each in scale.objectives
            for seed in others
        ]
        for row in together([partial(self.run, run) for run in more]):
            best[row["objective"]].append(row)
        last = best[scale.objectives[-1]]  # the rounds take the rate of this one, KD + SFT
        cold = []
        if layers == scale.students[0]:
            cold = [Run(layers, each, COLD_RATE, first, is_cold=True) for each in scale.cold]
        rollouts = []
        if scale.rounds and layers == scale.students[-1]:
            rollouts = self.rollouts(layers, *scale.rounds, last[0]["learning_rate"])
        return {
            "sweep": rows,
            "main": best,
            "cold": together([partial(self.run, run) for run in cold]),
            "rollouts": rollouts,
        }

    def run(self, run: Run) -> dict[str, Any]:
        """Train in legs, and judge the student after each."""
        cache, settings = OBJECTIVES[run.objective]
        checkpoints, legs = self.out / "checkpoints" / run.name, []
        for steps in self.scale.legs:
            name = f"{run.name}-{steps}"
            trained = self.train(
                name,
                run.student,
                steps,
                run.learning_rate,
                f"dataset.validation_caches=[{self.out}/heldout]",
                f"train.eval_interval={steps + 1}",  # Bridge validates at the end in any case
                f"checkpoint.save={checkpoints}",  # where the next leg begins
                "checkpoint.most_recent_k=1",
                caches=(cache,),
                settings=settings,
                seed=run.seed,
            )
            right = self.judge(trained)
            shutil.rmtree(self.out / trained, ignore_errors=True)
            legs.append({"steps": steps, **self.validated(name), "right": right})
        shutil.rmtree(checkpoints, ignore_errors=True)
        return {**asdict(run), "legs": legs}

    def rollouts(
        self, layers: int, rounds: int, steps: int, learning_rate: float
    ) -> list[dict[str, Any]]:
        """Rounds in which the student writes, the teacher scores, and the student trains."""
        out, chain = self.out, f"rounds-{layers}-layers-{steps}-steps-lr-{learning_rate:g}"
        trained = {
            "model.seq_length": LENGTH,
            "train.train_iters": steps,
            "train.global_batch_size": BATCH,
            "train.micro_batch_size": BATCH,
            "optimizer.lr": learning_rate,
            "scheduler.lr_decay_style": "constant",
            "scheduler.lr_warmup_iters": 10,
            "dataset.num_workers": 0,
            **{f"knowledge_distillation.{key}": value for key, value in ROLLOUTS.items()},
        }
        self.steps.run(
            chain,
            EXAMPLES / "rounds.py",
            "device=cpu",
            f"teacher={out}/teacher-hf",
            f"student={out}/warm-{layers}-hf",
            f"prompts=[{out}/prompts.jsonl]",
            f"output={out}/{chain}",
            f"rounds={rounds}",
            f"sft.caches=[{out}/cache]",
            f"+data.prompt_template={TEMPLATE}",
            f"+data.max_seq_length={LENGTH}",
            "+generate.model.dtype=float32",
            "+generate.sampling.max_tokens=48",
            "+filter.filters=[cut,duplicates]",
            *(f"+train.{key}={value}" for key, value in trained.items()),
            alone=True,
        )
        return [
            {"round": number, "steps": number * steps, **self.measure(f"{chain}/round-{number}")}
            for number in range(1, rounds + 1)
        ]

    def measure(self, directory: str) -> dict[str, Any]:
        """Judge a round's student, and validate it with forward KL, as the other runs are."""
        name, student = directory.replace("/", "-"), f"{directory}/student-hf"
        data = f"dataset.validation_caches=[{self.out}/heldout]"
        # No step: it only validates.
        self.train(name, student, 0, 0, data, caches=("cache",), settings={}, seed=SEED)
        return {**self.validated(name), "right": self.judge(student)}

    def validated(self, name: str) -> dict[str, float]:
        """The last validation of a run."""
        return last_values(validation_curves(self.out / "runs" / name, HOST))


if __name__ == "__main__":
    main()
