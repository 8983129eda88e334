"""The answer of a line of SFT data: a new one in the place of the old one, and what it answers."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from nemo_kd.chat.formats import checked_text, read_conversation
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


class Exchange(NamedTuple):
    """What a line says."""

    turns: tuple[tuple[str, str], ...]  # before the answer: who speaks, and the text
    answer: str  # calls of tools are part of a text, as JSON

    @property
    def question(self) -> str:
        """The text before the answer, without what the system says and which tools there are."""
        hidden = ("system", "tools")
        return "\n".join(text for speaker, text in self.turns if speaker not in hidden)


def read_exchange(record: dict[str, Any], data: DataConfig) -> Exchange:
    """What a line says, in any format.

    Args:
        record: The line.
        data: The settings, with the format of the files.

    Raises:
        ValueError: The line is none of that format, or does not end with an answer.
    """
    if data.format == "prompt":
        *before, answer = (checked_text(record.get(key), key) for key in data.keys)
        return Exchange(tuple(("user", text) for text in before), answer)
    if data.format == "nemo_chat":
        turns = record.get("conversations")
        if not isinstance(turns, list) or not turns or not all(isinstance(t, dict) for t in turns):
            raise ValueError(f"expected conversations to be a list of turns, got {turns!r:.60}")
        said = [("system", checked_text(record.get("system"), "system"))]
        for number, turn in enumerate(turns, 1):
            who, text = (checked_text(turn.get(key), key, number) for key in ("from", "value"))
            said.append((who, text))
        ends = _answers(said[-1][0], record, "nemo_chat")
    else:
        conversation, _ = read_conversation(record, data.format)
        if not conversation.messages:
            return Exchange((("user", conversation.prompt),), conversation.completion)
        said = [("tools", json.dumps(conversation.tools))] if conversation.tools else []
        for message in conversation.messages:
            calls = json.dumps(message["tool_calls"]) if "tool_calls" in message else ""
            said.append((message["role"], message["content"] + calls))
        ends = said[-1][0] == "assistant"
    if not ends:
        raise ValueError(f"expected an answer as the last turn, got one of {said[-1][0]}")
    return Exchange(tuple(said[:-1]), said[-1][1])


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
