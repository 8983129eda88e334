"""Each format through the real teacher run and a training step."""

from pathlib import Path
from typing import Any

import pytest
from runs import MAX_SEQ_LENGTH, dump_arguments, run_example, scalars, train_arguments, write_jsonl

from nemo_kd.cache import TopKCache
from nemo_kd.cli import main

# The tiny models have no other special tokens.
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
QUESTION, ANSWER = "river one?", "  two stone"
RENDERED = f"<s>user\n{QUESTION}</s>\n<s>assistant\n⟦{ANSWER}</s>⟧\n"
LINES: dict[str, dict[str, Any]] = {
    "messages": {
        "messages": [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": ANSWER},
        ]
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
    },
    "alpaca": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "prompt_completion": {"prompt": QUESTION + "\n", "completion": ANSWER},
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "small.jinja"
    path.write_text(TEMPLATE)
    return path


def shown(cache: Path, number: int, tokenizer: Any) -> str:
    sample = TopKCache.open(cache)[number]
    text, inside = "", False
    for token, learnt in zip(sample.tokens.tolist(), sample.loss_mask.tolist(), strict=True):
        text += ("⟦" if learnt else "⟧") if learnt != inside else ""
        text, inside = text + tokenizer.decode([token]), bool(learnt)
    return text + ("⟧" if inside else "")


@pytest.mark.parametrize("kind", LINES)
def test_a_file_becomes_a_cache_that_trains(
    kind: str, nemos: dict[str, Path], template: Path, hf_tokenizer: Any, tmp_path: Path
) -> None:
    lines = [LINES[kind], LINES[kind] | {"id": 7}] * 2
    file = write_jsonl(tmp_path / "data.jsonl", lines)
    if kind == "messages":  # another kind of file too
        import datasets

        datasets.Dataset.from_list([LINES[kind]] * 4).to_parquet(str(tmp_path / "data.parquet"))
        file = tmp_path / "data.parquet"
    cache = tmp_path / "cache"
    given = (f"data.chat_template={template}",)
    dump = dump_arguments(nemos["untied"], file, cache)
    dump = [each for each in dump if not each.startswith("data.prompt_template")]
    output = run_example("dump_teacher_topk.py", *dump, *given)
    assert f"{file}: the format is {kind}, by the first line" in output
    assert ("nothing reads id of its lines" in output) == (kind != "messages")
    expected = RENDERED if kind != "prompt_completion" else f"{QUESTION}\n⟦{ANSWER}</s>⟧"
    assert shown(cache, 3, hf_tokenizer) == expected
    assert TopKCache.open(cache).manifest.dataset["format"] == kind
    against = ["--against", str(file), "--tokenizer", str(nemos["untied"])]
    assert main(["verify", str(cache), *against, "--chat-template", str(template)]) == 0

    logs = tmp_path / "logs"
    validation = [f"model.data.validation_ds.chat_template={template}"]
    train = train_arguments(nemos["tied"], cache, file, logs, *validation)
    output = run_example("train_kd_sft.py", *train)
    assert output.count(f"{file}: the format is {kind}, by the first line") == 1
    curves = scalars(logs)
    assert curves["kd_loss"][-1] < curves["kd_loss"][0]
    # The set is the training data: its cross entropy falls with that of the training.
    assert (
        curves["validation_sft_loss_dataloader0"][-1] < curves["validation_sft_loss_dataloader0"][0]
    )


def test_a_validation_file_is_as_its_cache(
    nemos: dict[str, Path], template: Path, tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", [LINES["alpaca"], LINES["alpaca"] | {"input": "a"}])
    cache = tmp_path / "cache"
    dump = dump_arguments(nemos["untied"], file, cache)
    dump = [each for each in dump if not each.startswith("data.prompt_template")]
    run_example("dump_teacher_topk.py", *dump, f"data.chat_template={template}")
    losses = []
    for number, path in enumerate((file, cache)):
        logs = tmp_path / f"logs{number}"
        more = [f"model.data.validation_ds.chat_template={template}", "trainer.max_steps=0"]
        run_example("train_kd_sft.py", *train_arguments(nemos["tied"], cache, path, logs, *more))
        losses.append(scalars(logs)["validation_sft_loss_dataloader0"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_long_chats_are_cut_and_counted(
    nemos: dict[str, Path], template: Path, hf_tokenizer: Any, tmp_path: Path
) -> None:
    (ask, answer) = LINES["messages"]["messages"]
    chats = [{"messages": [ask, answer] * 4}, {"messages": [ask, answer]}]
    file = write_jsonl(tmp_path / "data.jsonl", chats)
    dump = dump_arguments(nemos["untied"], file, tmp_path / "cache")
    dump = [each for each in dump if not each.startswith("data.prompt_template")]
    output = run_example("dump_teacher_topk.py", *dump, f"data.chat_template={template}")
    assert f"truncated samples in this run: 1 (data.max_seq_length={MAX_SEQ_LENGTH}; " in output
    text = shown(tmp_path / "cache", 0, hf_tokenizer)
    assert text.endswith("stone</s>⟧")
    assert text.count("⟦") == text.count("⟧")


def test_bad_input_is_one_clear_line(
    nemos: dict[str, Path], template: Path, tmp_path: Path
) -> None:
    (ask, answer) = LINES["messages"]["messages"]
    good, given = LINES["messages"], f"data.chat_template={template}"
    dropping = tmp_path / "dropping.jinja"  # a template that drops the answers before the last one
    dropping.write_text(
        "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}<s>{{ m.content }}</s>"
        "{% endif %}{% endfor %}"
    )
    for lines, overrides, message in (
        ([good], [], "the tokenizer has no chat template: set data.chat_template to a file"),
        ([good], ["data.chat_template=nowhere"], "data.chat_template: expected a file, found no"),
        ([good], ["data.format=mail"], "data.format: expected one of 'auto', 'prompt'"),
        (
            [good],
            ["data.format=alpaca", given],
            "data.jsonl, line 1: expected a text as instruction",
        ),
        ([good], ["data.format=prompt"], "line 1: expected the keys input, output, found no input"),
        ([{"text": "a"}], [], "data.jsonl, line 1: expected the keys of a known format"),
        ([good], ["data.train_on=first"], "data.train_on: expected one of 'all_assistant'"),
        ([good], ["data.chat=true", "data.format=messages"], "expected chat=false with format=me"),
        (
            [good, {"messages": [ask]}],
            [given],
            "data.jsonl, line 2: expected a turn of the assistant to learn from, found none",
        ),
        (
            [good, {"messages": [ask, answer, ask, answer]}],
            [f"data.chat_template={dropping}"],
            "data.jsonl, line 2: turn 2: the chat template writes what stands before it in",
        ),
    ):
        file = write_jsonl(tmp_path / "data.jsonl", lines)
        dump = dump_arguments(nemos["untied"], file, tmp_path / "cache")
        dump = [each for each in dump if not each.startswith("data.prompt_template")]
        output = run_example("dump_teacher_topk.py", *dump, *overrides, succeeds=False)
        assert message in output, output
        assert "Traceback" not in output
    assert not (tmp_path / "cache").exists()


def test_show_prints_what_is_learnt(
    nemos: dict[str, Path], template: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a file as the dump makes it, and of a cache, with the teacher's choices."""
    lines = [LINES["alpaca"] | {"output": f"{n} [b]"} for n in ("one", "two", "three", "four")]
    file = write_jsonl(tmp_path / "data.jsonl", lines)
    tokenizer = ["--tokenizer", str(nemos["untied"])]
    show = ["show", str(file), "-n", "2", *tokenizer]
    assert main([*show, f"data.chat_template={template}"]) == 0
    output = capsys.readouterr().out
    texts = [f"<s>user\n{QUESTION}</s>\n<s>assistant\n⟦{n} [b]</s>⟧\n" for n in ("one", "two")]
    assert all(text in output for text in texts)
    assert "three" not in output
    assert main(show) == 1
    assert "the tokenizer has no chat template" in capsys.readouterr().err
    assert main([*show, "train_on=last_assistant"]) == 1
    assert "expected keys of data, as in data.train_on=..." in capsys.readouterr().err

    dump = dump_arguments(nemos["untied"], file, tmp_path / "cache")
    dump = [each for each in dump if not each.startswith("data.prompt_template")]
    run_example("dump_teacher_topk.py", *dump, f"data.chat_template={template}")
    shown = ["show", str(tmp_path / "cache"), "-n", "1", *tokenizer]
    assert main([*shown, "data.train_on=last_assistant"]) == 1
    assert "expected no data.KEY for a cache" in capsys.readouterr().err
    assert main(shown) == 0
    output = capsys.readouterr().out
    assert texts[0] in output
    (sample, *_) = TopKCache.open(tmp_path / "cache")
    for row in (0, -1):
        probability = f"{2.718281828 ** float(sample.topk_log_probs[row].max()):.3f}"
        assert probability in output
