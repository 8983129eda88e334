"""What a line of SFT data means: each format's line becomes one `Conversation`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from nemo_kd.config import FORMATS

# How ShareGPT's files name a speaker -> the role of a chat template.
_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


_DEFAULT_KEYS = ["input", "output"]  # of DataConfig.prompt_template


class Conversation(NamedTuple):
    """One sample before it is rendered: messages for a chat template, or a plain text.

    A plain text has no messages: `prompt` and `completion` are the text, as they stand.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    # For each message, whether the student learns it. Only those of the assistant can be learnt.
    learnt: tuple[bool, ...] = ()
    prompt: str = ""
    completion: str = ""


def detect(record: dict[str, Any], template_keys: list[str]) -> str:
    """The format of a file, by its first line.

    Args:
        record: The line.
        template_keys: The keys of `prompt_template`. One that the user has written goes before any
            other format.

    Raises:
        ValueError: It has no format's keys.
    """
    turns = record.get("conversations")
    if set(template_keys) <= record.keys() and template_keys != _DEFAULT_KEYS:
        return "prompt"
    if isinstance(record.get("messages"), list):
        return "messages"
    if isinstance(turns, list) and turns and isinstance(turns[0], dict):
        if "role" in turns[0]:
            return "messages"
        known = str(turns[0].get("from")) in _SPEAKERS
        return "sharegpt" if known or "system" not in record else "nemo_chat"
    # An Alpaca line has the keys of the default template too, which would drop its instruction.
    is_alpaca = {"instruction", "output"} <= record.keys()
    if set(template_keys) <= record.keys() and ("instruction" in template_keys or not is_alpaca):
        return "prompt"
    if is_alpaca:
        return "alpaca"
    if {"prompt", "completion"} <= record.keys():
        return "prompt_completion"
    raise ValueError(
        f"expected the keys of a known format, or those of prompt_template "
        f"({', '.join(template_keys)}), found {', '.join(sorted(map(str, record))) or 'no key'}; "
        f"set data.format to one of {', '.join(FORMATS)}, or data.prompt_template to the file's "
        "keys"
    )


def read_conversation(record: dict[str, Any], kind: str) -> tuple[Conversation, set[str]]:
    """One line as a conversation, and those of its keys that nothing reads.

    Args:
        record: The line.
        kind: One of nemo_kd.config.RENDERED.

    Raises:
        ValueError: The line is none of that format; names the turn, counted from 1.
    """
    conversation, read = _READERS[kind](record)
    if conversation.messages and not any(conversation.learnt):
        raise ValueError("expected a turn of the assistant to learn from, found none")
    return conversation, record.keys() - read


def _messages(record: dict[str, Any]) -> tuple[Conversation, set[str]]:
    key = "messages" if "messages" in record else "conversations"
    messages = _message_list(record, key)
    return _conversation(messages, _tools(record)), {key, "tools"}


def _sharegpt(record: dict[str, Any]) -> tuple[Conversation, set[str]]:
    turns = _list_of(record, "conversations")
    messages: list[dict[str, Any]] = []
    if system := record.get("system"):
        messages.append({"role": "system", "content": checked_text(system, "system")})
    for number, turn in enumerate(turns, 1):
        speaker = turn.get("from")
        if speaker not in (*_SPEAKERS, "function_call"):
            raise ValueError(
                f"turn {number}: expected from to be one of {', '.join(_SPEAKERS)}, "
                f"function_call, got {speaker!r:.60}"
            )
        text = checked_text(turn.get("value"), "value", number)
        if speaker == "function_call":
            call = {"type": "function", "function": _function(_json(text, number), number)}
            message = {"role": "assistant", "content": "", "tool_calls": [call]}
        else:
            message = {"role": _SPEAKERS[speaker], "content": text}
        messages.append(message | ({"weight": turn["weight"]} if "weight" in turn else {}))
    return _conversation(messages, _tools(record)), {"conversations", "system", "tools"}


def _alpaca(record: dict[str, Any]) -> tuple[Conversation, set[str]]:
    question = checked_text(record.get("instruction"), "instruction")
    if more := record.get("input"):
        question += "\n\n" + checked_text(more, "input")
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": checked_text(record.get("output"), "output")},
    ]
    if system := record.get("system"):
        messages.insert(0, {"role": "system", "content": checked_text(system, "system")})
    return _conversation(messages), {"instruction", "input", "output", "system"}


def _prompt_completion(record: dict[str, Any]) -> tuple[Conversation, set[str]]:
    read = {"prompt", "completion", "tools"}
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, list):
        context = _message_list(record, "prompt")
        messages = context + _message_list(record, "completion")
        whole = _conversation(messages, _tools(record))
        learnt = [is_learnt and i >= len(context) for i, is_learnt in enumerate(whole.learnt)]
        return whole._replace(learnt=tuple(learnt)), read
    texts = checked_text(prompt, "prompt"), checked_text(completion, "completion")
    return Conversation([], prompt=texts[0], completion=texts[1]), read


_READERS: Mapping[str, Callable[[dict[str, Any]], tuple[Conversation, set[str]]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
}


def _conversation(messages: list[dict[str, Any]], tools: list[Any] | None = None) -> Conversation:
    """OpenAI's `weight` of 0 says that a turn is not learnt; a template never sees the key.

    Nothing stands before the first turn, so that it is not learnt either.
    """
    learnt = [
        number > 0 and each["role"] == "assistant" and each.get("weight", 1) != 0
        for number, each in enumerate(messages)
    ]
    plain = [{k: v for k, v in each.items() if k != "weight"} for each in messages]
    return Conversation(plain, tools, tuple(learnt))


def _message_list(record: dict[str, Any], key: str) -> list[dict[str, Any]]:
    return [_message(turn, number) for number, turn in enumerate(_list_of(record, key), 1)]


def _message(turn: dict[str, Any], number: int) -> dict[str, Any]:
    """A message as chat templates take it: content is a text, arguments of a call an object."""
    message = {key: value for key, value in turn.items() if value is not None}
    checked_text(message.get("role"), "role", number)
    if "function_call" in message:  # how OpenAI wrote a call before tool_calls
        call = {"type": "function", "function": message.pop("function_call")}
        message["tool_calls"] = [*message.get("tool_calls", []), call]
    content, calls = message.get("content"), message.pop("tool_calls", None)
    if isinstance(content, list):  # OpenAI's parts
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(parts) != len(content):
            raise ValueError(
                f"turn {number}: expected only parts of type text, got {content!r:.60}"
            )
        content = "".join(checked_text(part.get("text"), "text", number) for part in parts)
    if content is None and calls:
        content = ""
    message["content"] = checked_text(content, "content", number)
    if calls:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise ValueError(f"turn {number}: expected tool_calls to be a list, got {calls!r:.60}")
        message["tool_calls"] = [
            call | {"function": _function(call.get("function"), number)} for call in calls
        ]
    return message


def _function(call: Any, number: int) -> dict[str, Any]:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ValueError(f"turn {number}: expected a function with a name, got {call!r:.60}")
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        arguments = _json(arguments, number) if arguments else {}
    return call | {"arguments": arguments}


def _tools(record: dict[str, Any]) -> list[Any] | None:
    tools = record.get("tools")
    if isinstance(tools, str) and tools:  # as a JSON text, because the tools of a set differ
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"expected tools to be a list, got no JSON: {error}") from error
    if tools and not isinstance(tools, list):
        raise ValueError(f"expected tools to be a list, got {tools!r:.60}")
    return tools or None


def _list_of(record: dict[str, Any], key: str) -> list[dict[str, Any]]:
    turns = record.get(key)
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"expected {key} to be a list of turns, got {turns!r:.60}")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise ValueError(f"turn {number}: expected an object, got {turn!r:.60}")
    return turns


def _json(text: str, number: int) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"turn {number}: expected the arguments of a call as JSON, got {text!r:.60}: {error}"
        ) from error


def checked_text(value: Any, key: str, number: int | None = None) -> str:
    """The value, a text that a tokenizer can encode.

    Args:
        value: Of a line.
        key: Its key, and `number` that of its turn, counted from 1, for the error.

    Raises:
        ValueError: It is another type, or has half a character.
    """
    where = "" if number is None else f"turn {number}: "
    if not isinstance(value, str):
        raise ValueError(f"{where}expected a text as {key}, got {json.dumps(value):.60}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}expected whole characters in {key}, got {value[error.start]!r}, one half of a "
            "surrogate pair, which no tokenizer can encode"
        ) from error
    return value
