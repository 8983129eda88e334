"""Filters between writing and training: what each removes, the kept file, and its cache."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generation import files_of, lines
from runs import run_example, scalars, train_arguments, write_jsonl
from test_cache import as_version_1

from nemo_kd.cache import CacheWriter, Manifest, Sample, TopKCache
from nemo_kd.cache.manifest import fingerprint_file
from nemo_kd.cli import main
from nemo_kd.sandbox import check_can_be_alone

STOPPED_RUN = Path(__file__).parent / "stopped_run.py"


def line(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"input": question, "output": answer, **more}


def run_filter(data: Path | str, output: Path, filters: str, *more: str, **how: Any) -> str:
    given = (f"data.file_names=[{data}]", f"output={output}", f"filters=[{filters}]")
    return run_example("filter_answers.py", *given, *more, **how)


def kept(directory: Path, records: list[dict[str, Any]], filters: str, *more: str) -> list[int]:
    """The numbers of the lines that stay, of lines that two files share out."""
    numbered = [{**record, "number": i} for i, record in enumerate(records)]
    half = len(records) // 2
    write_jsonl(directory / "a.jsonl", numbered[:half] or numbered)
    write_jsonl(directory / "b.jsonl", numbered[half:])
    files = f"{directory}/a.jsonl,{directory}/b.jsonl" if half else f"{directory}/a.jsonl"
    run_filter(files, directory / "kept.jsonl", filters, *more)
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


def test_votes_of_a_prompt_may_lie_apart(tmp_path: Path) -> None:
    """As where two runs wrote an answer each, and in a shuffled file."""
    answers = [("q", "1"), ("p", "2"), ("q", "3"), ("p", "2"), ("q", "1"), ("p", "5")]
    assert kept(tmp_path, [line(*each) for each in answers], "majority") == [0, 1, 3, 4]


def test_majority_by_reference(tmp_path: Path) -> None:
    """A reference may be bare LaTeX."""
    root = r"\boxed{2\sqrt{3}}"
    references = {"#### 4": ["so 4", "so 5", "none", "4.0"], r"2\sqrt{3}": [root, "so 2"]}
    records = [
        line("2 + 2?", text, reference=reference)
        for reference, answers in references.items()
        for text in answers
    ]
    assert kept(tmp_path, records, "{name:majority,by:reference}") == [0, 3, 4]


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
        {"question": "What is it", "answer": f"It is: {thirteen} fourteen", "reference": "4"},
        {"question": "", "answer": "nothing"},
        {"question": "12 + 3?", "answer": "15"},
    ]
    write_jsonl(tmp_path / "heldout.jsonl", held_out)
    records = [
        line("clean", "short"),
        line("clean", f"as {thirteen}."),
        line(thirteen, "x"),
        line(thirteen.removesuffix(" thirteen"), "twelve words alone"),
        line("what is IT", "a short question"),
        line("what is it now", "a longer question"),
        line("+", "a question without words"),
        line("12 - 3?", "not 12 + 3"),
        line("clean", f"“{thirteen}” in other quotes"),
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
    assert kept(tmp_path, records, held_out_filter) == [0, 3, 5, 6, 7]
    (tmp_path / "chats").mkdir()
    assert kept(tmp_path / "chats", chats, held_out_filter) == [0, 3, 5, 6, 7]


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
        ("fails", "b.jsonl, line 1: own_filters:fails fails: KeyError"),
        ("says_nothing", "True or False, got None"),
        ("at_least", "missing a required argument: 'length'"),
        ("other", "no attribute 'other'"),
    ):
        data, output = tmp_path / "b.jsonl", tmp_path / f"{function}.jsonl"
        assert message in run_filter(data, output, f"'own_filters:{function}'", status=1)
        assert not output.exists()
    (tmp_path / "own_filters.py").write_text(OWN.replace(">=", ">"))
    again = "{name:'own_filters:at_least',length:3}"
    files = f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl"
    output = run_filter(files, tmp_path / "kept.jsonl", again, status=1)
    assert "was begun with other settings" in output


@pytest.mark.parametrize(
    ("asks", "answers"),
    [
        ({"instruction": "a"}, {"output": "b"}),
        ({"prompt": "a"}, {"completion": "b"}),
        (
            {"prompt": [{"role": "user", "content": "a"}]},
            {"completion": [{"role": "assistant", "content": "b"}]},
        ),
        ({"mask": "User", "system": ""}, None),
        ({}, {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}),
    ],
    ids=["alpaca", "prompt_completion", "turns", "nemo_chat", "sharegpt"],
)
def test_formats(asks: dict[str, Any], answers: dict[str, Any] | None, tmp_path: Path) -> None:
    if answers is None:
        turns = [{"from": name, "value": name} for name in ("User", "Assistant")]
        answers = {"conversations": turns}
    one = asks | answers
    other = json.loads(json.dumps(one).replace('"b"', '"c"').replace('"Assistant"}', '"other"}'))
    assert one != other
    assert kept(tmp_path, [one, other, one], "duplicates") == [0, 1]


def test_calls_of_tools_are_part_of_an_answer(tmp_path: Path) -> None:
    call = '{"name": "add", "arguments": {"a": 1}}'
    chats = [
        {
            "conversations": [
                {"from": "human", "value": "add"},
                {"from": "function_call", "value": call.replace("1", number)},
            ]
        }
        for number in ("1", "2", "1")
    ]
    assert kept(tmp_path, chats, "duplicates") == [0, 1]


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ("cutt", "filters.0: expected one of cut, duplicates"),
        ("duplicates,{name:cut,limit:3}", "filters.1.limit is a key that nothing reads"),
        ("cut", "answers.jsonl, line 2: expected generation.finish_reason"),
        ("{name:majority,by:reference}", "answers.jsonl, line 2: expected reference"),
        ("{name:code,time_limit_s:0}", "set run_untrusted_code=true"),
        ("{name:majority,by:mean}", "filters.0: expected by=votes or by=reference"),
        ("code", "set run_untrusted_code=true"),
        ("{name:decontaminate}", "filters.0: expected file_names=["),
        (
            "{name:decontaminate,file_names:[nowhere.jsonl]}",
            "filters.0: file_names: expected held-out files, found no",
        ),
        ("", "filters: expected a list [...] of one or more values"),
    ],
)
def test_a_bad_setting_or_line_is_named(filters: str, message: str, tmp_path: Path) -> None:
    whole = line("q", "a", generation={"finish_reason": "stop"}, reference="4")
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
    """Three blocks, of a prompt each."""
    records = [line(f"question {i % 3}", f"answer {i % 200}") for i in range(900)]
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
    assert "600 of 900 answers" in output
    whole = tmp_path / "whole.jsonl"
    assert (tmp_path / "kept.jsonl").read_bytes() == whole.read_bytes()
    counts = json.loads((tmp_path / "kept.jsonl.parts" / "done.json").read_text())
    assert counts == {
        "answers": 900,
        "kept": 600,
        "filters": [
            {"filter": "own:stays", "removed": 0},
            {"filter": "duplicates", "removed": 300},
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
    assert main(["verify", str(filtered / "cache"), *files]) in (None, 0), capsys.readouterr().out


def test_a_finished_run_misses_its_cache(filtered: Path, cache: Path, jsonl: Path) -> None:
    caches = (f"cache.source={cache}", f"cache.path={filtered}/other")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(filtered)
        output = run_filter(jsonl, filtered / "kept.jsonl", "'parity:even'", *caches, status=1)
    assert "expected a cache directory" in output


@pytest.mark.parametrize("version", [1, 2])
def test_rows_of_any_length_are_copied(version: int, tmp_path: Path) -> None:
    """Ragged rows, and a cache of version 1, whose files are checked first."""
    data = write_jsonl(tmp_path / "answers.jsonl", [line("q", text) for text in "abab"])
    manifest = Manifest(
        selection={"kind": "top_p", "p": 0.9, "k": 4, "temperature": 1.0},
        vocab_size=50,
        tokenizer_fingerprint="tokenizer",
        teacher_fingerprint="teacher",
        sources=(fingerprint_file(data),),
        dataset={},
        num_samples=4,
        samples_per_shard=3,
    )
    rng = np.random.default_rng(1)

    def sample() -> Sample:
        log_probs = np.sort(np.log(rng.dirichlet(np.ones(5), 2)).astype(np.float32))[:, :0:-1]
        ids = np.array([[3, 1, 4, -1], [7, 8, -1, -1]])
        return Sample(np.arange(4), np.array([0, 0, 1, 1]), ids, log_probs, log_probs[:, -1], 2)

    CacheWriter.open(tmp_path / "cache", manifest).fill(sample() for _ in range(4))
    if version == 1:
        as_version_1(tmp_path / "cache")
    caches = (f"cache.source={tmp_path}/cache", f"cache.path={tmp_path}/kept")
    run_filter(data, tmp_path / "kept.jsonl", "duplicates", *caches)
    before, after = TopKCache.open(tmp_path / "cache"), TopKCache.open(tmp_path / "kept")
    assert (len(after), after.manifest.format_version) == (2, 2)
    for number in (0, 1):
        old, new = before.stored(number), after.stored(number)
        assert all(np.array_equal(old[name], new[name]) for name in old)
    if version == 1:
        path = tmp_path / "cache" / "shard-00000" / "packed_rows.bin"
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
        more = (caches[0], f"cache.path={tmp_path}/again")
        output = run_filter(data, tmp_path / "again.jsonl", "duplicates", *more, status=1)
        assert "its checksum differs" in output


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
