"""The study on tasks: its questions, its judge, and that docs/study.md shows its results."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nemo_kd.sandbox import check_can_be_alone

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def study_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "studies" / "tasks"))


@pytest.fixture
def lines(tmp_path: Path) -> list[dict[str, Any]]:
    from questions import write_questions

    sizes = {"train": 80, "test": 40}
    write_questions(tmp_path, sizes, seed=1)
    written = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()] for name in sizes
    }
    assert {name: len(found) for name, found in written.items()} == sizes
    for found in written.values():
        assert len(set(Counter(line["kind"] for line in found).values())) == 1
    return [*written["train"], *written["test"]]


def test_no_question_is_asked_twice(lines: list[dict[str, Any]]) -> None:
    assert len({line["input"] for line in lines}) == len(lines)


def test_the_judge(lines: list[dict[str, Any]]) -> None:
    """It takes every written answer, and none to another question."""
    from questions import is_right

    try:
        check_can_be_alone()
    except ValueError as error:
        pytest.skip(str(error))
    for line in lines[:40]:
        assert is_right(line), line
        other = next(
            each
            for each in lines
            if each["kind"] == line["kind"] and each["right"] != line["right"]
        )
        assert not is_right(line | {"output": other["output"]}), (line, other)
        assert not is_right(line | {"output": "I do not know."})
    last = {"kind": "sums", "output": "The answer is 4. No: The answer is 5.", "right": "5"}
    assert is_right(last)


def test_a_sum_is_what_its_text_says(lines: list[dict[str, Any]]) -> None:
    for line in (each for each in lines if each["kind"] == "sums"):
        for step in line["output"].split(". ")[:-1]:
            term, result = step.split(" = ")
            assert eval(term) == int(result)


def test_the_docs_show_the_results() -> None:
    from tables import claim_table, main_table, sft_table, sweep_table

    results = json.loads((ROOT / "docs/study/tasks/results.json").read_text())
    docs = (ROOT / "docs/study.md").read_text()
    for part in (main_table, claim_table, sweep_table, sft_table):
        assert part(results) in docs, part.__name__
