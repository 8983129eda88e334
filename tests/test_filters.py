"""Filters between writing and training: what each removes, the kept file, and its cache."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generation import files_of, lines
from runs import run_example, scalars, train_arguments, write_jsonl

from nemo_kd.cache import TopKCache
from nemo_kd.cli import main
from nemo_kd.sandbox import check_can_be_alone

STOPPED_RUN = Path(__file__).parent / "stopped_run.py"


def line(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"input": question, "output": answer, **more}


def run_filter(data: Path, output: Path, filters: str, *more: str, **how: Any) -> str:
    given = (f"data.file_names=[{data}]", f"output={output}", f"filters=[{filters}]")
    return run_example("filter_answers.py", *given, *more, **how)


def kept(directory: Path, records: list[dict[str, Any]], filters: str, *more: str) -> list[int]:
    """The numbers of the lines that stay."""
    numbered = [{**record, "number": i} for i, record in enumerate(records)]
    data = write_jsonl(directory / "answers.jsonl", numbered)
    run_filter(data, directory / "kept.jsonl", filters, *more)
    return [each["number"] for each in lines(directory / "kept.jsonl")]


def test_cut(tmp_path: Path) -> None:
    reasons = ("stop", "length", "stop")
    records = [line("q", "a", generation={"finish_reason": reason}) for reason in reasons]
    assert kept(tmp_path, records, "cut") == [0, 2]


def test_duplicates(tmp_path: Path) -> None:
    """Of the same prompt alone, wherever in the files, and whatever the white space."""
    pairs = [("q", "a b"), ("q", "a  b\n"), ("q", "c"), ("p", "a b"), ("q", "a b"), ("q", "ab")]
    assert kept(tmp_path, [line(*pair) for pair in pairs], "duplicates") == [0, 2, 3, 5]


def test_majority_by_votes(tmp_path: Path) -> None:
    """Equal are numbers however they are written; no final answer is no vote; a tie keeps none."""
    half = ["so 0.5", r"thus \boxed{\frac{1}{2}}", "it is 1/2", "the answer is 2", "I do not know"]
    tie = ["1", "2", "then 1", "then 2"]
    records = [line("half of one?", text) for text in half] + [line("tie?", text) for text in tie]
    records += [line("alone?", "7"), line("none?", "perhaps")]
    assert kept(tmp_path, records, "majority") == [0, 1, 2, 9]


def test_majority_by_reference(tmp_path: Path) -> None:
    references = {"#### 4": ["so 4", "so 5", "none", "4.0"], "no number": ["4"]}
    records = [
        line("2 + 2?", text, reference=reference)
        for reference, answers in references.items()
        for text in answers
    ]
    assert kept(tmp_path, records, "{name:majority,by:reference}") == [0, 3]


def test_code(tmp_path: Path) -> None:
    """Programs in a block, in several, and bare; a list of tests, and one text."""
    try:
        check_can_be_alone()
    except ValueError as error:
        pytest.skip(str(error))
    right, wrong = ("def add(a, b):\n    return a + b", "def add(a, b):\n    return a - b")
    tests = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]
    answers = [
        f"Here:\n```python\n{right}\n```\nprints\n```\nNone of Python\n```",
        f"```\n{right}\n```",
        right,
        f"```python\n{wrong}\n```",
        "I cannot.",
        f"{right}\nimport sys; sys.exit(0)",
        f"{right}\nwhile True: pass",
    ]
    records = [line("add", text, checks=tests) for text in answers]
    records.append(line("add", right, checks="\n".join(tests)))
    code = "{name:code,tests_key:checks,time_limit_s:2}"
    assert kept(tmp_path, records, code, "run_untrusted_code=true") == [0, 1, 2, 7]


def test_decontaminate(tmp_path: Path) -> None:
    """Thirteen words in a row, in question or answer; a short question as a whole."""
    thirteen = "one two three four five six seven eight nine ten eleven twelve thirteen"
    held_out = [
        {"question": f"zero, {thirteen.upper()}!", "answer": "short"},
        {"question": "What is it?", "answer": f"It is: {thirteen} fourteen"},
    ]
    write_jsonl(tmp_path / "heldout.jsonl", held_out)
    records = [
        line("clean", "short"),
        line("clean", f"as {thirteen}."),
        line(thirteen, "x"),
        line(thirteen.removesuffix(" thirteen"), "twelve words alone"),
        line("what is IT", "a short question"),
        line("what is it now", "a longer question"),
    ]
    chats = [
        {
            "messages": [
                {"role": "system", "content": thirteen},
                {"role": "user", "content": record["input"]},
                {"role": "assistant", "content": record["output"]},
            ]
        }
        for record in records
    ]
    files = f"file_names:[{tmp_path}/heldout.jsonl],prompt_template:'{{question}} {{answer}}'"
    held_out_filter = f"{{name:decontaminate,{files},label_key:answer}}"
    assert kept(tmp_path, records, held_out_filter) == [0, 3, 5]
    (tmp_path / "chats").mkdir()
    assert kept(tmp_path / "chats", chats, held_out_filter) == [0, 3, 5]


OWN = """
def at_least(line, length):
    return len(line["output"]) >= length

def fails(line):
    return line["missing"]

def says_nothing(line):
    return None
"""


def test_a_function_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_filters.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    records = [line("q", "a"), line("q", "abc")]
    assert kept(tmp_path, records, "{name:'own_filters:at_least',length:3}") == [1]
    for function, message in (
        ("fails", "answers.jsonl, line 1: own_filters:fails fails: KeyError"),
        ("says_nothing", "True or False, got None"),
        ("at_least", "missing a required argument: 'length'"),
        ("other", "no attribute 'other'"),
    ):
        data, output = tmp_path / "answers.jsonl", tmp_path / f"{function}.jsonl"
        assert message in run_filter(data, output, f"'own_filters:{function}'", status=1)
        assert not output.exists()


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ("cutt", "filters.0: expected one of cut, duplicates"),
        ("duplicates,{name:cut,limit:3}", "filters.1.limit is a key that nothing reads"),
        ("cut", "answers.jsonl, line 2: expected generation.finish_reason"),
        ("{name:majority,by:reference}", "answers.jsonl, line 2: expected reference"),
        ("{name:majority,by:mean}", "filters.0: expected by=votes or by=reference"),
        ("code", "set run_untrusted_code=true"),
        ("{name:decontaminate}", "filters.0: expected file_names=["),
        ("{name:decontaminate,file_names:[nowhere.jsonl]}", "found no nowhere.jsonl"),
        ("", "filters: expected a list [...] of one or more values"),
    ],
)
def test_a_bad_setting_or_line_is_named(filters: str, message: str, tmp_path: Path) -> None:
    whole = line("q", "a", generation={"finish_reason": "stop"}, reference="a")
    data = write_jsonl(tmp_path / "answers.jsonl", [whole, line("q", "b")])
    assert message in run_filter(data, tmp_path / "kept.jsonl", filters, status=1)
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    records = [line("q", "a", generation={"finish_reason": "length"})]
    data = write_jsonl(tmp_path / "answers.jsonl", records)
    output = run_filter(data, tmp_path / "kept.jsonl", "cut", status=1)
    assert "no answer would stay" in output
    assert not (tmp_path / "kept.jsonl").exists()


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_an_interrupted_run_ends_with_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three blocks, of a prompt each; the last has answers of a prompt that comes before."""
    records = [line(f"question {i // 300 % 2}", f"answer {i % 200}") for i in range(900)]
    data = write_jsonl(tmp_path / "answers.jsonl", records)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text("def stays(line):\n    return True\n")
    filters = "'own:stays',duplicates"
    run_filter(data, tmp_path / "whole.jsonl", filters)
    given = (f"data.file_names=[{data}]", f"output={tmp_path}/kept.jsonl", f"filters=[{filters}]")
    status = {"SIGKILL": -9, "SIGTERM": 143}[name]
    for moment in ("nemo_kd.parts:Parts.write#3", "nemo_kd.parts:Parts.finish"):
        run_example(STOPPED_RUN, name, moment, 0, "filter_answers.py", *given, status=status)
    assert len([*(tmp_path / "kept.jsonl.parts").glob("*.npz")]) == 3
    output = run_filter(data, tmp_path / "kept.jsonl", filters)
    assert "400 of 900 answers" in output
    whole = tmp_path / "whole.jsonl"
    assert (tmp_path / "kept.jsonl").read_bytes() == whole.read_bytes()
    counts = json.loads((tmp_path / "kept.jsonl.parts" / "done.json").read_text())
    assert counts == {
        "answers": 900,
        "kept": 400,
        "filters": [
            {"filter": "own:stays", "removed": 0},
            {"filter": "duplicates", "removed": 500},
        ],
    }
    before = files_of(tmp_path)
    assert "whole already" in run_filter(data, tmp_path / "kept.jsonl", filters)
    assert files_of(tmp_path) == before
    other = run_filter(data, tmp_path / "kept.jsonl", "duplicates", status=1)
    assert "was begun with other settings" in other


@pytest.fixture(scope="module")
def filtered(cache: Path, jsonl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with every second line of a dumped file, and the cache of these."""
    path = tmp_path_factory.mktemp("filtered")
    (path / "parity.py").write_text(
        "count = iter(range(10**6))\ndef even(line):\n    return next(count) % 2 == 0\n"
    )
    caches = (f"cache.source={cache}", f"cache.path={path}/cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        run_filter(jsonl, path / "kept.jsonl", "'parity:even'", *caches)
    return path


def test_the_cache_of_the_kept_lines_has_their_bytes(
    filtered: Path, cache: Path, nemos: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = TopKCache.open(cache), TopKCache.open(filtered / "cache")
    assert len(after) == -(-len(before) // 2) == len(lines(filtered / "kept.jsonl"))
    for number in range(len(after)):
        old, new = before.stored(2 * number), after.stored(number)
        assert old.keys() == new.keys()
        for name in old:
            assert np.array_equal(old[name], new[name])
    files = ["--against", f"{filtered}/kept.jsonl", "--tokenizer", str(nemos["tied"])]
    main(["verify", str(filtered / "cache"), *files])
    assert "damaged" not in capsys.readouterr().out


def test_a_student_trains_on_it(filtered: Path, nemos: dict[str, Path], tmp_path: Path) -> None:
    run = train_arguments(nemos["tied"], filtered / "cache", filtered / "cache", tmp_path)
    run_example("train_kd_sft.py", *run, "trainer.max_steps=2")
    assert len(scalars(tmp_path)["kd_loss"]) == 2


def test_a_cache_of_other_files_is_refused(cache: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "answers.jsonl", [line("q", "a")])
    caches = (f"cache.source={cache}", f"cache.path={tmp_path}/cache")
    output = run_filter(data, tmp_path / "kept.jsonl", "duplicates", *caches, status=1)
    assert f"cache.source: expected the cache of {data}" in output
    output = run_filter(data, tmp_path / "kept.jsonl", "duplicates", caches[0], status=1)
    assert "or neither" in output
