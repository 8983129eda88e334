"""What the tests of generation share: prompts, and the command."""

import json
from pathlib import Path
from typing import Any

from runs import run_example, write_jsonl

K = 8
RECORDS: list[dict[str, Any]] = [
    {"input": "the student learns", "output": "gold", "tests": ["assert True"]},
    {"input": "entropy", "output": ""},
    {"input": "a large teacher of small data and of every token", "output": "more gold"},
    {"input": "label answer"},
    {"input": "parallel pipeline micro batch shard cache"},
]
# The tiny models have no other special tokens.
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def arguments(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    return [
        "device=cpu",
        "batch_size=4",
        f"model.hf_path={model}",
        "model.dtype=float32",
        f"data.file_names=[{data}]",
        "data.max_seq_length=128",
        "data.prompt_template='Q: {input} A: {output}'",
        "sampling.n=2",
        "sampling.max_tokens=12",
        f"output={output}",
        *more,
    ]


def capture(cache: Path) -> list[str]:
    return [f"capture.path={cache}", f"capture.k={K}", "capture.codec=raw"]


def write_prompts(directory: Path) -> Path:
    return write_jsonl(directory / "prompts.jsonl", RECORDS)


def generate(*given: str, **how: Any) -> str:
    return run_example("generate_answers.py", *given, **how)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
