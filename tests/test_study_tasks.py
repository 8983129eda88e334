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


def test_the_tables() -> None:
    """Shares of all and of a kind; and the difference of two students on the same questions."""
    from tables import claim_table, main_table

    def runs(*right: list[int]) -> list[dict[str, Any]]:
        legs = ({"steps": 7, "heldout_ce": 2.0, "kl_to_teacher": 1.0, "right": r} for r in right)
        return [{"legs": [leg]} for leg in legs]

    results = {
        "kinds": ["sums", "units", "days", "programs"],
        "teacher": [1, 1, 1, 1],
        "students": {
            "6": {
                "before": [0, 0, 0, 1],
                "main": {
                    "SFT": runs([1, 0, 0, 0], [1, 1, 0, 0]),
                    "KD": runs([1, 1, 1, 0], [1, 1, 1, 0]),
                },
            }
        },
    }
    shown = main_table(results, "6")
    assert "| the student before |  | 25.0 | 0.0 | 0.0 | 0.0 | 100.0 |  |  |" in shown
    assert "| SFT | 7 | 37.5 ± 17.7 | 100.0 ± 0.0 | 50.0 ± 70.7 | 0.0 ± 0.0 |" in shown
    assert (
        "| KD | 7 | +37.5 (+0.0 to +75.0) | +16.7 (+0.0 to +50.0) | +0.000, +0.000 |"
        in claim_table(results, "6")
    )


def test_the_docs_show_the_results() -> None:
    from tables import claim_table, cold_table, main_table, rollout_table, sft_table, sweep_table

    results = json.loads((ROOT / "docs/study/tasks/results.json").read_text())
    docs = (ROOT / "docs/study.md").read_text()
    assert sft_table(results) in docs
    for layers in results["students"]:
        for part in (main_table, claim_table, cold_table, rollout_table, sweep_table):
            assert part(results, layers) in docs, (part.__name__, layers)
