"""Lines of SFT data with a new answer in the place of the old one."""

from __future__ import annotations

from typing import Any

from nemo_kd.config import DataConfig

# What `nemo-kd generate` adds to a line: how the answer was made, and the one that it replaces.
GENERATION, REFERENCE = "generation", "reference"
# How a line names who answers: format -> key of the speaker, key of the text, default speaker.
_TURNS = {
    "messages": ("role", "content", "assistant"),
    "sharegpt": ("from", "value", "gpt"),
    "nemo_chat": ("from", "value", "Assistant"),
}
# Speakers of messages and ShareGPT whose turn at the end of a line is its answer.
_ANSWERING = ("assistant", "gpt", "chatgpt", "bard", "bing", "model", "function_call")
_KEYS = {"alpaca": "output", "prompt_completion": "completion"}


def answered(record: dict[str, Any], data: DataConfig, answer: str) -> dict[str, Any]:
    """A line whose last answer is `answer`. Its own one, if there is one, is kept as `reference`.

    Args:
        record: The line. One that is malformed stays so, for its reader to say how.
        data: The settings, with the format of the files.
        answer: The text.
    """
    line, old = dict(record), None
    if data.format in _TURNS or isinstance(record.get("prompt"), list):
        kind = data.format if data.format in _TURNS else "messages"
        key = _key_of_turns(record, data.format)
        turns = record.get(key, [] if key == "completion" else None)
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            return line
        speaker, text, name = _TURNS[kind]
        if turns and _answers(turns[-1].get(speaker), record, kind):
            *turns, last = turns
            old, name = last.get(text) or last, last[speaker]
        line[key] = [*turns, {speaker: name, text: answer}]
    else:
        key = _KEYS.get(data.format, data.label_key)
        old, line[key] = line.get(key), answer
    if old:
        line.setdefault(REFERENCE, old)
    return line


def _key_of_turns(record: dict[str, Any], kind: str) -> str:
    if kind == "prompt_completion":
        return "completion"
    return "messages" if kind == "messages" and "messages" in record else "conversations"


def _answers(speaker: Any, record: dict[str, Any], kind: str) -> bool:
    if kind == "nemo_chat":
        return speaker not in str(record.get("mask", "User")).split(",")
    return speaker in _ANSWERING
