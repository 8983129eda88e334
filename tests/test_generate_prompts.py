"""Each data format as prompts: a prompt's tokens are those that the dump sees before the answer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generation import TEMPLATE
from omegaconf import OmegaConf
from runs import write_jsonl

from nemo_kd.chat.answers import answered
from nemo_kd.chat.prompts import Prompts
from nemo_kd.compare import samples_of
from nemo_kd.config import DataConfig, read_settings
from nemo_kd.hf_tokenizer import HfTokenizer
from nemo_kd.runs import installed_host

ANSWER = "gold entropy"
USER, ASSISTANT = "a large question", "an old answer"


def chat(*turns: str, keys: tuple[str, str], names: tuple[str, str]) -> list[dict[str, str]]:
    return [{keys[0]: names[i % 2], keys[1]: text} for i, text in enumerate(turns)]


def openai(*turns: str) -> list[dict[str, str]]:
    return chat(*turns, keys=("role", "content"), names=("user", "assistant"))


def sharegpt(*turns: str) -> list[dict[str, str]]:
    return chat(*turns, keys=("from", "value"), names=("human", "gpt"))


def nemo(*turns: str) -> list[dict[str, str]]:
    return chat(*turns, keys=("from", "value"), names=("User", "Assistant"))


# format -> lines, one of which has no answer and one an old one; the last answer of a line
FORMATS: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "messages": (
        [{"messages": openai(USER)}, {"messages": openai(USER, ASSISTANT)}],
        lambda line: line["messages"][-1]["content"],
    ),
    "sharegpt": (
        [
            {"conversations": sharegpt(USER, "why", "and"), "system": "a student"},
            {"conversations": sharegpt(USER, ASSISTANT)},
        ],
        lambda line: line["conversations"][-1]["value"],
    ),
    "nemo_chat": (
        [
            {"system": "a student", "conversations": nemo(USER, "why", "and"), "mask": "User"},
            {"system": "", "conversations": nemo(USER, ASSISTANT), "mask": "User"},
        ],
        lambda line: line["conversations"][-1]["value"],
    ),
    "alpaca": (
        [{"instruction": USER, "input": "more"}, {"instruction": USER, "output": ASSISTANT}],
        lambda line: line["output"],
    ),
    "prompt_completion": (
        [{"prompt": USER + ":"}, {"prompt": USER + ":", "completion": ASSISTANT}],
        lambda line: line["completion"],
    ),
    "prompt_completion of messages": (
        [
            {"prompt": openai(USER)},
            {"prompt": openai(USER), "completion": openai(USER, ASSISTANT)[1:]},
        ],
        lambda line: line["completion"][-1]["content"],
    ),
    "prompt": (
        [{"question": USER}, {"question": USER, "reply": ASSISTANT}],
        lambda line: line["reply"],
    ),
}
TEMPLATED = (
    "data.prompt_template='Q: {question} A: {reply}'",
    "data.label_key=reply",
    "data.truncation_field=reply",
)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "template.jinja"
    path.write_text(TEMPLATE)
    return path


def overrides_of(name: str, template: Path) -> list[str]:
    if name in ("messages", "sharegpt", "alpaca", "prompt_completion of messages"):
        return [f"data.chat_template={template}", "data.train_on=last_assistant"]
    return list(TEMPLATED) if name == "prompt" else []


@pytest.mark.parametrize("name", FORMATS)
def test_a_prompt_is_what_the_dump_has_before_the_answer(
    name: str, hf_llamas: dict[str, Path], template: Path, tmp_path: Path
) -> None:
    """NeMo's own samples of the answered lines, cut where their last answer begins."""
    records, answer_of = FORMATS[name]
    tokenizer, overrides = (
        HfTokenizer(str(hf_llamas["tied"]), "model.hf_path"),
        overrides_of(name, template),
    )
    overrides.append("data.max_seq_length=256")
    given: Any = OmegaConf.to_container(OmegaConf.from_dotlist(overrides))
    given["data"]["file_names"] = [str(write_jsonl(tmp_path / "prompts.jsonl", records))]
    prompts = Prompts(read_settings(DataConfig, given["data"], "data"), tokenizer)
    assert prompts.data.format == name.split()[0]

    made = [answered(record, prompts.data, ANSWER) for record in records]
    assert [answer_of(line) for line in made] == [ANSWER, ANSWER]
    assert [line.get("reference") for line in made] == [None, ASSISTANT]
    assert [line.get("system") for line in made] == [line.get("system") for line in records]

    host = installed_host()
    path = write_jsonl(tmp_path / "answers.jsonl", made)
    own = host.read_tokenizer(hf_llamas["tied"], "--tokenizer")
    samples = list(samples_of(host, str(path), overrides, own))
    assert len(samples) == len(records)
    for number, (tokens, mask, _) in enumerate(samples):
        ids = prompts[number][1]
        assert tokens[: len(ids)].tolist() == ids
        learnt = np.flatnonzero(mask)
        assert learnt[-1] >= len(ids)
        text = tokenizer.ids_to_text(tokens[len(ids) :].tolist())
        assert text.strip().startswith(ANSWER), text
