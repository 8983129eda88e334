"""`nemo-kd evaluate`: each task of the table with tiny models and data, resuming, errors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_llama
from hydra import compose, initialize_config_dir
from transformers import LlamaForCausalLM

pytest.importorskip("lm_eval")

from nemo_kd.evaluate import run, students
from nemo_kd.evaluate.run import evaluate

CONF = Path(__file__).parent.parent / "examples" / "conf"
SUBJECTS = Path(__import__("lm_eval").__file__).parent / "tasks" / "mmlu" / "default"
TASKS = ["mmlu@1", "mmlu@0", "humaneval", "mbpp", "gsm8k@1", "minerva_math"]
LETTERS = "ABCD"


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def question(subject: str, number: int) -> dict[str, Any]:
    choices = [f"the {word}" for word in ("student", "teacher", "model", "cache")]
    text = f"What learns {number} of {subject}?"
    return {"question": text, "subject": subject, "choices": choices, "answer": number % 4}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each dataset in its published fields, with a few rows."""
    path = tmp_path_factory.mktemp("data")
    for file in SUBJECTS.glob("mmlu_*.yaml"):
        subject = file.stem.removeprefix("mmlu_")
        for split in ("dev", "test"):
            rows = [question(subject, number) for number in range(2)]
            write_lines(path / "cais/mmlu" / subject / f"{split}.jsonl", rows)
    rows = [
        {"question": f"What is {n} plus 2?", "answer": f"Add them: <<{n}+2={n + 2}>>\n#### {n + 2}"}
        for n in range(2)
    ]
    for split in ("train", "test"):
        write_lines(path / "openai/gsm8k/main" / f"{split}.jsonl", rows)
    (MINERVA := path / "EleutherAI/hendrycks_math").mkdir(parents=True)
    for name in (
        *("algebra", "counting_and_probability", "geometry", "intermediate_algebra"),
        *("number_theory", "prealgebra", "precalculus"),
    ):
        row = {"problem": "What is half of $1$?", "level": "Level 1", "type": name}
        write_lines(
            MINERVA / name / "test.jsonl", [{**row, "solution": r"It is $\boxed{\frac{1}{2}}$."}]
        )
    program = {
        "task_id": 11,
        "text": "Write a function to add two numbers.",
        "code": "def add(a, b):\n    return a + b",
        "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(5, 1) == 6"],
        "test_setup_code": "",
        "challenge_test_list": [],
    }
    write_lines(path / "google-research-datasets/mbpp/full/test.jsonl", [program] * 2)
    return path


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, hf_tokenizer: Any) -> Path:
    path = tmp_path_factory.mktemp("students") / "kd-hf"
    save_llama(path, hf_tokenizer, tied=True, layers=1, vocab_size=len(hf_tokenizer))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return path


@pytest.fixture(scope="module")
def judge(data_dir: Path, student: Path) -> Callable[..., dict[str, Any]]:
    """Runs the entry; returns results.json."""

    def call(output: Path, tasks: list[str], *overrides: str) -> dict[str, Any]:
        entry = f"{{name: kd, hf_path: {student}, objective: KD + SFT, steps: 700}}"
        arguments = [f"students=[{entry}]", f"tasks=[{','.join(tasks)}]", f"output={output}"]
        arguments += [f"data_dir={data_dir}", "device=cpu", *overrides]
        with initialize_config_dir(str(CONF), version_base=None):
            evaluate(compose("evaluate", arguments))
        return dict(json.loads((output / "results.json").read_text()))

    return call


@pytest.fixture(scope="module")
def output(judge: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of all tasks of the table."""
    path = tmp_path_factory.mktemp("results")
    judge(path, TASKS, "run_untrusted_code=true", "limit=2")
    return path


def test_the_table_has_every_task(output: Path) -> None:
    (row,) = json.loads((output / "results.json").read_text())["students"]
    counts = {title: score["num_questions"] for title, score in row["scores"].items()}
    assert counts == {
        "MMLU 1-shot": 114,
        "MMLU 0-shot": 114,
        "HumanEval": 2,
        "MBPP": 2,
        "GSM8K 1-shot": 2,
        "MATH": 7,
    }
    print((output / "results.md").read_text())
    lines = (output / "results.md").read_text().splitlines()
    assert lines[2].startswith("| kd | KD + SFT | 700 |")
    assert "±" in lines[2]
