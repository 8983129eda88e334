"""A jsonl is checked before a model is read; an error names the file and the line."""

import json
from pathlib import Path
from typing import Any

import pytest
from runs import dump_arguments, run_example, train_arguments, write_jsonl

from nemo_kd.cache import TopKCache
from nemo_kd.chat.lines import check_lines, check_tokens
from nemo_kd.config import DataConfig, read_settings

GOOD = b'{"input": "a", "output": "b"}\n'


def check(path: Path, **settings: Any) -> int:
    return check_lines(str(path), DataConfig(file_names=(str(path),), **settings))


def line(value: object) -> bytes:
    return json.dumps({"input": value, "output": "b"}).encode() + b"\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + line(5), "line 2: expected a text as input, got 5"),
        (GOOD + line(None), "line 2: expected a text as input, got null"),
        (GOOD + line(True), "line 2: expected a text as input, got true"),
        (GOOD + line(["a"]), 'line 2: expected a text as input, got ["a"]'),
        (GOOD + line({"a": 1}), 'line 2: expected a text as input, got {"a": 1}'),
        (GOOD + line("a\ud83d"), r"line 2: expected whole characters in input, got '\ud83d'"),
        (b"\xef\xbb\xbf" + GOOD, "line 1: expected a JSON object, got a byte order mark"),
        (GOOD.decode().encode("utf-16"), "line 1: expected UTF-8"),
        (GOOD + b'{"input": "\xe4", "output": "b"}\n', "line 2: expected UTF-8"),
        (GOOD + b"   \n" + GOOD, "line 2: not JSON"),
        (GOOD + b"   \n", "line 2: not JSON"),
        (GOOD + b"\r\n", "line 2: not JSON"),
        (GOOD + b"  ", "line 2: not JSON"),
        (GOOD + b"\n\n" + GOOD, "line 2: expected a JSON object, got an empty line"),
        (b"\n\n\n", "expected samples, found only empty lines"),
        (b"", "expected samples, found an empty file"),
        (GOOD + b"[" * 100_000, "line 2: not JSON"),
        (GOOD + b'["input", "output"]\n', "line 2: expected a JSON object, got ['input'"),
        (GOOD + b"7\n", "line 2: expected a JSON object, got 7"),
        (GOOD + b'{"input": "a"}\n', "line 2: expected the keys input, output, found no output"),
    ],
)
def test_a_bad_line_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        check(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


@pytest.mark.parametrize("end", ["\n", "", "\n\n\n"])
def test_lines_are_counted_as_nemo_counts_them(end: str, tmp_path: Path) -> None:
    from nemo.collections.nlp.data.language_modeling.text_memmap_dataset import JSONLMemMapDataset

    path = tmp_path / "train.jsonl"
    path.write_text('{"input": "ä\U0001f600", "output": ""}\r\n{"input": "", "output": "b"}' + end)
    nemos = JSONLMemMapDataset([str(path)], index_mapping_dir=str(tmp_path / "index"), workers=1)
    assert check(path) == len(nemos) == 2
    assert nemos[0]["input"] == "ä\U0001f600"


def test_keys_that_nothing_reads_are_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alpaca = {"instruction": "add", "input": "1 2", "output": "3"}
    path = write_jsonl(tmp_path / "alpaca.jsonl", [alpaca] * 3)
    assert check(path) == 3
    assert capsys.readouterr().err.count("nothing reads instruction of its lines") == 1
    assert check(path, prompt_template="{instruction} {input} {output}") == 3
    assert capsys.readouterr().err == ""
    turns = [
        {"from": "User", "value": "a", "id": 1},
        {"from": "Assistant", "value": "b", "label": "good"},
    ]
    chat = {"system": "", "conversations": turns, "source": "web"}
    path = write_jsonl(tmp_path / "chat.jsonl", [chat])
    check(path, chat=True)
    assert "nothing reads id, label, source of its lines" in capsys.readouterr().err
    path = write_jsonl(tmp_path / "chat.jsonl", [chat | {"type": "VALUE_TO_TEXT"}])
    check(path, chat=True)
    assert "nothing reads id, source of its lines" in capsys.readouterr().err


TOKENS = {
    "system_turn_start": "<s>",
    "turn_start": "<t>",
    "label_start": "<l>",
    "end_of_turn": "\n",
    "end_of_name": "\n",
}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_seq_length": 1}, "expected max_seq_length >= 2, got 1"),
        ({"truncation_field": ""}, "expected truncation_field to name keys"),
        ({"truncation_field": "text"}, "expected truncation_field to name keys"),
        (
            {"prompt_template": "{input} or {input}: {output}"},
            "truncation_field to name keys that prompt_template has once, of input, input, output",
        ),
        ({"prompt_template": "\\x {input} {output}"}, "whose backslashes are escapes"),
        ({"chat": True, "chat_prompt_tokens": {}}, "got no system_turn_start"),
        (
            {"chat": True, "chat_prompt_tokens": TOKENS | {"end": "x"}},
            "got an unknown end",
        ),
        (
            {"chat": True, "chat_prompt_tokens": TOKENS | {"label_start": ""}},
            "got no text as label_start",
        ),
    ],
)
def test_settings_that_nemo_would_fail_with(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="data: ") as error:
        read_settings(DataConfig, {"file_names": ["a"], **settings}, "data")
    assert message in str(error.value)


def test_the_tokenizer_has_the_tokens(
    hf_llamas: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    tokenizer = AutoTokenizer(str(hf_llamas["tied"]))
    size = tokenizer.vocab_size
    with pytest.raises(ValueError, match=rf"sep_id: expected an id below .* {size} .*got 49704"):
        check_tokens(DataConfig(file_names=("a",), add_sep=True), tokenizer, "data")
    check_tokens(DataConfig(file_names=("a",), add_sep=True, sep_id=size - 1), tokenizer, "data")
    check_tokens(DataConfig(file_names=("a",), chat=True), tokenizer, "data")
    pieces = tokenizer.tokenizer.tokenize("<extra_id_1>")
    assert f"writes each as {len(pieces)}" in capsys.readouterr().err
    tokenizer.bos_token = None  # as NeMo leaves it for a tokenizer without one
    with pytest.raises(ValueError, match=r"data.add_bos: expected false"):
        check_tokens(DataConfig(file_names=("a",), add_bos=True), tokenizer, "data")


def test_a_template_keeps_its_letters(
    nemos: dict[str, Path], tmp_path: Path, hf_llamas: dict[str, Path]
) -> None:
    """NeMo reads the template's bytes as Latin-1, so that its ü would be two letters."""
    jsonl = write_jsonl(tmp_path / "train.jsonl", [{"input": "a", "output": "b"}])
    arguments = dump_arguments(nemos["untied"], jsonl, tmp_path / "cache")
    run_example(
        "dump_teacher_topk.py", *arguments, "data.prompt_template='für\\n {input}: {output}'"
    )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf_llamas["untied"])
    (sample,) = TopKCache.open(tmp_path / "cache")
    pieces = ["für\n", "", " a", ":", "", " b"]
    expected = [i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False)]
    assert sample.tokens.tolist() == [*expected, tokenizer.eos_token_id]


def test_the_teacher_run_says_so_before_it_reads_weights(
    nemos: dict[str, Path], jsonl: Path, cache: Path, tmp_path: Path
) -> None:
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"input": "a", "output": None}])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    weightless = without_weights(nemos["untied"], tmp_path)
    arguments = dump_arguments(weightless, jsonl, tmp_path / "cache")
    for override, message in {
        f"data.file_names=[{bad}]": "bad.jsonl, line 1: expected a text as output, got null",
        "data.add_sep=true": "sep_id: expected an id below the vocabulary's 401",
        "selection.k=402": "selection.k: expected an integer from 1 to 401, got 402",
        f"cache.path={tmp_path / 'other'}": "expected an empty directory or a cache, found notes",
        f"cache.path={jsonl}": "expected a directory for the cache, found the file",
        f"cache.path={cache}": "teacher_fingerprint",
        "cache.shards=7": "expected shards from 0 to 2, got 7",
    }.items():
        output = run_example("dump_teacher_topk.py", *arguments, override, succeeds=False)
        assert message in output
        assert "Traceback" not in output
    assert not (tmp_path / "cache").exists()


def test_the_student_run_says_so_before_it_reads_weights(
    nemos: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"input": "a", "output": 5}])
    good = write_jsonl(tmp_path / "good.jsonl", [{"input": "a", "output": "b"}])
    weightless = without_weights(nemos["tied"], tmp_path)
    for validation, override, message in (
        (bad, "", "bad.jsonl, line 1: expected a text as output, got 5"),
        (good, "model.data.validation_ds.max_seq_length=1", "expected an integer of at least 2"),
        (good, "model.data.validation_ds.truncation_field=output,text", "truncation_field"),
        (good, "model.data.validation_ds.add_sep=true", "sep_id: expected an id below"),
        (good, "model.data.train_ds.max_seq_length=16", "was dumped with data.max_seq_length=48"),
        (good, "model.data.chat=true", "expected the keys system, conversations, found no system"),
    ):
        arguments = train_arguments(weightless, cache, validation, tmp_path / "logs")
        more = [override] if override else []
        output = run_example("train_kd_sft.py", *arguments, *more, succeeds=False)
        assert message in output
        assert "Traceback" not in output


def without_weights(nemo: Path, directory: Path) -> Path:
    """An unpacked .nemo that cannot be restored: a run with another error has not tried."""
    import tarfile

    unpacked = directory / nemo.stem
    with tarfile.open(nemo) as tar:
        tar.extractall(unpacked, filter="data")
    for file in (unpacked / "model_weights").rglob("*.distcp"):
        file.write_bytes(b"")
    return unpacked


def test_what_nemo_fails_at_is_named(nemos: dict[str, Path], tmp_path: Path) -> None:
    """A worker's error as well: one line, with the file and the start of the line."""
    chats = [
        {
            "system": f"{number}",
            "conversations": [
                {"from": "User", "value": "a"},
                # The start of a label in the middle of a turn, which NeMo asserts against.
                {"from": "Assistant", "value": "b<extra_id_2>b" if number == 7 else "b"},
            ],
            "type": "VALUE_TO_TEXT",
        }
        for number in range(8)
    ]
    jsonl = write_jsonl(tmp_path / "chat.jsonl", chats)
    arguments = dump_arguments(nemos["untied"], jsonl, tmp_path / "cache")
    output = run_example(
        "dump_teacher_topk.py", *arguments, "data.chat=true", "data.num_workers=1", succeeds=False
    )
    (error,) = (line for line in output.splitlines() if line.startswith("error"))
    assert f'{jsonl}: NeMo\'s dataset fails at the line that begins {{"system": "7"' in error
    assert "Traceback" not in output
