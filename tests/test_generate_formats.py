"""Each data format as prompts: the tokens before the answer are those of the host's datasets."""

from pathlib import Path
from typing import Any

import pytest
from generation import TEMPLATE
from runs import write_jsonl

from nemo_kd.chat.answers import answered
from nemo_kd.chat.prompts import Prompts
from nemo_kd.compare import samples_of
from nemo_kd.config import DataConfig
from nemo_kd.hf_tokenizer import HfTokenizer

QUESTION, ANSWER = "the large student", "label of data"
# The line with its answer, and without.
LINES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "prompt": ({"input": QUESTION, "output": ANSWER}, {"input": QUESTION}),
    "messages": (
        {
            "messages": [
                {"role": "user", "content": QUESTION},
                {"role": "assistant", "content": ANSWER},
            ]
        },
        {"messages": [{"role": "user", "content": QUESTION}]},
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
        {"conversations": [{"from": "human", "value": QUESTION}]},
    ),
    "alpaca": (
        {"instruction": QUESTION, "input": "entropy", "output": ANSWER},
        {"instruction": QUESTION, "input": "entropy"},
    ),
    "prompt_completion": (
        {"prompt": QUESTION + "\n", "completion": ANSWER},
        {"prompt": QUESTION + "\n"},
    ),
    "nemo_chat": (
        {
            "system": "teacher",
            "mask": "User",
            "conversations": [
                {"from": "User", "value": QUESTION},
                {"from": "Assistant", "value": ANSWER},
            ],
        },
        {
            "system": "teacher",
            "mask": "User",
            "conversations": [{"from": "User", "value": QUESTION}],
        },
    ),
}


@pytest.mark.parametrize("kind", LINES)
def test_a_prompt_is_what_stands_before_the_answer(
    kind: str, hf_llamas: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("nemo")
    from nemo_kd.nemo import samples

    template = tmp_path / "small.jinja"
    template.write_text(TEMPLATE)
    whole = write_jsonl(tmp_path / "whole.jsonl", [LINES[kind][0]])
    bare = write_jsonl(tmp_path / "bare.jsonl", [LINES[kind][1]])
    given = {} if kind in ("prompt", "nemo_chat") else {"chat_template": str(template)}
    tokenizer = HfTokenizer(str(hf_llamas["tied"]), "model.hf_path")
    overrides = [f"data.{key}={value}" for key, value in given.items()]
    own = samples.read_tokenizer(hf_llamas["tied"], "--tokenizer")
    ((tokens, mask, _),) = samples_of(samples, str(whole), overrides, own)
    expected = tokens[: int(mask.argmax())].tolist()
    assert len(expected) > 3
    for path in (whole, bare):
        prompts = Prompts(DataConfig(file_names=(str(path),), **given), tokenizer)
        record, ids = prompts[0]
        assert ids == expected, tokenizer.ids_to_text(ids)
        assert prompts.lengths.tolist() == [len(expected)]
    # With the answer the bare line is the whole one again.
    assert answered(record, prompts.data, ANSWER) == LINES[kind][0]
    again = answered(LINES[kind][0], prompts.data, "entropy")
    assert ANSWER in str(again.pop("reference"))
    assert str(again) == str(LINES[kind][0]).replace(ANSWER, "entropy")
