"""Rounds of student rollouts: the student writes, the teacher scores, and the student trains.

    python examples/rounds.py teacher=teacher-hf student=student-hf prompts=[prompts.jsonl] \\
        output=rounds

conf/rounds.yaml lists the keys. Each step is one of the other examples, in a process of its own.
Its command is printed, and its log lies in OUTPUT/logs. After an interruption call the same command
again: steps that are done are not done again.
"""

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
from demo_hosts import HOSTS
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf
from steps import Steps, last_values, validation_curves, write

from nemo_kd.config import DataConfig, DistillationConfig, SelectionConfig, read_settings
from nemo_kd.filters.kinds import read_filters
from nemo_kd.generate.settings import SamplingConfig
from nemo_kd.process import announce, answer_help, user_errors
from nemo_kd.yaml_rules import check_yaml_values

EXAMPLES = Path(__file__).parent
HOST = HOSTS["bridge"]
CONF = EXAMPLES / "conf"
# Of rounds.yaml: the YAML of the command that gets the section's keys.
SECTIONS = {
    "data": "bridge/dump_teacher_topk",
    "generate": "generate_answers",
    "filter": "filter_answers",
    "dump": "bridge/dump_teacher_topk",
    "train": "bridge/train_kd_sft",
}
# Parts of those sections, and what their values must fit.
PARTS = {
    ("generate", "sampling"): SamplingConfig,
    ("dump", "selection"): SelectionConfig,
    ("train", "knowledge_distillation"): DistillationConfig,
}
SHAPE = ("format", "prompt_template", "label_key")  # keys of data that filter_answers.yaml has too
# Columns of results.json, and their heads in results.md.
COLUMNS = {
    "heldout_ce": "held-out CE",
    "divergence": "divergence from the teacher",
    "top1_agreement": "top-1 agreement",
}
SEED = 1234  # that of generate_answers.yaml


@hydra.main(version_base=None, config_path="conf", config_name="rounds")
def main(config: DictConfig) -> None:
    with user_errors():
        check_yaml_values(config, "rounds")
        announce(config)
        settings: Any = OmegaConf.to_container(config, resolve=True)
        Rounds(settings).run()


class Rounds:
    """The chain of commands.

    Args:
        settings: conf/rounds.yaml with the user's values.

    Raises:
        ValueError: A directory is missing, or `output` has rounds of other settings.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        check_inputs(settings)
        self.settings, self.out = settings, Path(settings["output"])
        # More rounds may follow those that are done.
        self.chain = Steps(self.out, {**settings, "rounds": None})

    def run(self) -> None:
        rows, student = [], self.settings["student"]
        if self.settings["heldout_caches"]:
            rows.append({"round": 0} | self.validate(student))
        for number in range(1, self.settings["rounds"] + 1):
            row, student = self.round(number, student)
            rows.append({"round": number} | row)
        report(self.out, rows)

    def round(self, number: int, student: str) -> tuple[dict[str, float], str]:
        """One round; returns the row of the results, and the student that it has trained."""
        given, here, name = self.settings, self.out / f"round-{number}", f"round-{number}"
        device = f"device={given['device']}"
        answers, cache, trained = here / "answers.jsonl", here / "cache", here / "student-hf"
        sampling = given["generate"].get("sampling", {})
        sampling = sampling | {
            "seed": sampling.get("seed", SEED) + number
        }  # other draws in each round
        self.step(
            f"{name}-generate",
            "generate_answers.py",
            *(device, f"model.hf_path={student}", f"output={answers}"),
            *as_overrides({"data": given["data"] | {"file_names": given["prompts"]}}),
            *as_overrides(given["generate"] | {"sampling": sampling}),
        )
        shape = {key: given["data"][key] for key in SHAPE if key in given["data"]}
        if given["filter"]:
            written, answers = answers, here / "kept.jsonl"
            self.step(
                f"{name}-filter",
                "filter_answers.py",
                f"output={answers}",
                *as_overrides({"data": shape | {"file_names": [str(written)]}}),
                *as_overrides(given["filter"]),
            )
        self.step(
            f"{name}-dump",
            "bridge/dump_teacher_topk.py",
            *(device, f"model.hf_path={given['teacher']}", f"cache.path={cache}"),
            *as_overrides({"data": given["data"] | {"file_names": [str(answers)]}}),
            *as_overrides(given["dump"]),
            processes=given["processes"],
        )
        caches, weights = [str(cache)], None
        if mixed := given["sft"]["caches"]:
            share = given["sft"]["share"]
            caches, weights = [*caches, *mixed], [1 - share, *[share / len(mixed)] * len(mixed)]
        self.train(
            name,
            student,
            {"dataset": {"train_caches": caches, "weights": weights}},
            f"save_hf={trained}",
            f"checkpoint.save={here / 'checkpoints'}",
            directory=trained,  # of an attempt that ended before it was marked as done
        )
        return self.validated(name), str(trained)

    def validate(self, student: str) -> dict[str, float]:
        caches = {"dataset": {"train_caches": self.settings["heldout_caches"]}}
        self.train("before", student, caches, last=("train.train_iters=0",))
        return self.validated("before")

    def train(
        self,
        name: str,
        student: str,
        caches: dict[str, Any],
        *arguments: str,
        directory: Path | None = None,
        last: tuple[str, ...] = (),
    ) -> None:
        given = self.settings
        self.step(
            f"{name}-train",
            "bridge/train_kd_sft.py",
            *(f"device={given['device']}", f"model.hf_path={student}", *arguments),
            f"logger.tensorboard_dir={self.out / 'runs' / name}",
            *as_overrides({"dataset": {"validation_caches": given["heldout_caches"]}}),
            *as_overrides(caches),
            *as_overrides(given["train"]),
            *last,
            processes=given["processes"],
            directory=directory,
        )

    def step(
        self,
        name: str,
        script: str,
        *arguments: str,
        processes: int = 1,
        directory: Path | None = None,
    ) -> None:
        words = [str(EXAMPLES / script), *arguments]
        if processes > 1:
            torchrun = ("torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
            words = ["-m", *torchrun, *words]
        self.chain.run(name, Path(words[0]), *words[1:], directory=directory, alone=processes == 1)

    def validated(self, name: str) -> dict[str, float]:
        """The last validation of a run, if there are caches to validate on."""
        if not self.settings["heldout_caches"]:
            return {}
        found = last_values(validation_curves(self.out / "runs" / name, HOST))
        # The host's column has the divergence that the rounds train with, which may be another.
        found["divergence"] = found.pop("kl_to_teacher")
        return found


def check_inputs(settings: dict[str, Any]) -> None:
    """Raise a ValueError if a path is missing, or `output` has rounds of other settings."""
    for key, name in SECTIONS.items():
        if not isinstance(settings[key], dict):
            raise ValueError(f"{key}: expected a section of keys, got {settings[key]!r}")
        section = {"data": settings[key]} if key == "data" and settings[key] else settings[key]
        check_yaml_values(OmegaConf.create(section), name)
        known = [*as_overrides(OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml")))]
        check_keys([*as_overrides(section)], known, name, allows_more=key == "train")
    read_settings(DataConfig, settings["data"] | {"file_names": settings["prompts"]}, "data")
    for (key, part), kind in PARTS.items():
        read_settings(kind, settings[key].get(part, {}), f"{key}.{part}")
    if settings["filter"]:
        given = settings["filter"]
        [*read_filters(given.get("filters", []), given.get("run_untrusted_code", False))]
    caches = {"heldout_caches": settings["heldout_caches"], "sft.caches": settings["sft"]["caches"]}
    needed = [
        *((key, f"{settings[key]}/config.json") for key in ("teacher", "student")),
        *((key, f"{path}/manifest.json") for key, paths in caches.items() for path in paths),
        *(("prompts", path) for path in settings["prompts"]),
    ]
    for key, path in needed:
        if not Path(path).exists():
            raise ValueError(f"{key}: found no {path}")
    out = Path(settings["output"])
    if not (out / "settings.json").exists():
        if out.is_dir() and any(out.iterdir()):
            raise ValueError(f"output: expected a new directory or one of rounds, got {out}")
        return
    before = json.loads((out / "settings.json").read_text())
    for key in sorted({*before, *settings} - {"rounds"}):
        if before.get(key) != settings.get(key):
            raise ValueError(
                f"{out} has rounds of other settings: {key} was {before.get(key)} and is "
                f"{settings.get(key)}. Give the new ones another output"
            )


def check_keys(given: list[str], known: list[str], name: str, allows_more: bool) -> None:
    """Raise a ValueError for a key that NAME.yaml does not have, unless its host may have it."""
    keys = [word.removeprefix("++").partition("=")[0] for word in known]
    for word in given:
        key = word.removeprefix("++").partition("=")[0]
        is_known = any(key == each or key.startswith(f"{each}.") for each in keys)
        if not is_known and not allows_more:
            near = difflib.get_close_matches(key, keys, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{key} is no key of {name}.yaml{hint}")


def as_overrides(section: dict[str, Any], above: str = "") -> Iterator[str]:
    """The keys and values of a section as words that Hydra reads.

    The keys are sorted: the same settings in another order make the same command, and a step
    whose command has changed is run again.
    """
    for key, value in in_order(section):
        if isinstance(value, dict) and value:
            yield from as_overrides(value, f"{above}{key}.")
        else:
            yield f"++{above}{key}={as_word(value)}"


def in_order(section: dict[Any, Any]) -> list[tuple[Any, Any]]:
    return sorted(section.items(), key=lambda item: str(item[0]))  # a key may be a number


def as_word(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ",".join(map(as_word, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{as_word(own)}" for key, own in in_order(value)) + "}"
    if isinstance(value, str):
        return QuotedString(value, Quote.single).with_quotes()
    return json.dumps(value)  # a number, true, false or null


def report(out: Path, rows: list[dict[str, Any]]) -> None:
    """Write results.json and results.md, and print the table if something was validated."""
    write(out / "results.json", json.dumps(rows, indent=2) + "\n")
    if "divergence" not in rows[-1]:
        print(f"{out}/round-{rows[-1]['round']}/student-hf")
        return
    lines = [
        f"| round | {' | '.join(COLUMNS.values())} |",
        "| --- | --- | --- | --- |",
        *(
            f"| {row['round']} | " + " | ".join(f"{row[column]:.3f}" for column in COLUMNS) + " |"
            for row in rows
        ),
    ]
    text = "\n".join(lines)
    write(out / "results.md", f"{text}\n")
    print(f"\n{text}\n\n{out}/round-{rows[-1]['round']}/student-hf, results.md, results.json")


if __name__ == "__main__":
    answer_help(EXAMPLES / "conf" / "rounds.yaml")
    main()
