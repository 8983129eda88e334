"""Lines of SFT data as prompts, and lines with a new answer in the place of the old one."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from nemo_kd.chat.files import as_jsonl, read_object
from nemo_kd.chat.formats import checked_text, read_conversation
from nemo_kd.chat.lines import GENERATION, REFERENCE, check_tokens
from nemo_kd.chat.render import begin_token
from nemo_kd.chat.samples import (
    fingerprint_source,
    index_directory,
    renderer_of,
    with_found_format,
)
from nemo_kd.config import DataConfig
from nemo_kd.process import say

# NeMo's own tokens around turns, where chat_prompt_tokens is null.
_NEMO_TOKENS = {
    "system_turn_start": "<extra_id_0>",
    "turn_start": "<extra_id_1>",
    "label_start": "<extra_id_2>",
    "end_of_turn": "\n",
    "end_of_name": "\n",
}
# How a line names who answers: format -> key of the speaker, key of the text, default speaker.
_TURNS = {
    "messages": ("role", "content", "assistant"),
    "sharegpt": ("from", "value", "gpt"),
    "nemo_chat": ("from", "value", "Assistant"),
}
# Speakers of messages and ShareGPT whose turn at the end of a line is its answer.
_ANSWERING = ("assistant", "gpt", "chatgpt", "bard", "bing", "model", "function_call")


class Prompt(NamedTuple):
    """A line of the files."""

    record: dict[str, Any]  # the line
    ids: list[int]  # tokens of its prompt


def answered(
    record: dict[str, Any], data: DataConfig, answer: str, generation: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A line whose last answer is `answer`. Its own one, if there is one, is kept as `reference`.

    Args:
        record: The line. One that is malformed stays so, for its reader to say how.
        data: The settings, with the format of the files.
        answer: The text.
        generation: What the line says of how the answer was made.
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
        key = {"alpaca": "output", "prompt_completion": "completion"}.get(
            data.format, data.label_key
        )
        old, line[key] = line.get(key), answer
    if old:
        line.setdefault(REFERENCE, old)
    return line if generation is None else line | {GENERATION: generation}


def _key_of_turns(record: dict[str, Any], kind: str) -> str:
    if kind == "prompt_completion":
        return "completion"
    return "messages" if kind == "messages" and "messages" in record else "conversations"


def _answers(speaker: Any, record: dict[str, Any], kind: str) -> bool:
    if kind == "nemo_chat":
        return speaker not in str(record.get("mask", "User")).split(",")
    return speaker in _ANSWERING


class Prompts:
    """The prompts of all files, in their order. Each line is read, and checked, when it is opened.

    Args:
        data: The settings.
        tokenizer: Of the model that answers.
        max_tokens: Of an answer.

    Raises:
        ValueError: A line or a setting does not fit, or no prompt leaves room for an answer; names
            the file and the line.
    """

    def __init__(self, data: DataConfig, tokenizer: Any, max_tokens: int) -> None:
        optional = (data.label_key, "output", "completion")
        self.data = with_found_format(data, optional=optional)
        self._tokenizer, self._renderer = tokenizer, renderer_of(self.data, tokenizer)
        check_tokens(self.data, tokenizer, "data")
        template = self.data.escaped_template.encode().decode("unicode_escape")
        self._pieces = [piece for piece in re.split("( *?{.+?})", template) if piece]
        self._chat_tokens = self.data.chat_prompt_tokens or _NEMO_TOKENS
        self.sources = tuple(map(fingerprint_source, data.file_names))
        directory = index_directory(data.index_mapping_dir, self.sources)
        self._files = [as_jsonl(path, directory) for path in data.file_names]
        self._places: list[tuple[int, int]] = []  # file and offset of each line
        lengths: list[int] = []
        for number in range(len(self._files)):
            lengths += self._read(number)
        if not lengths:
            raise ValueError(f"{data.file_names[0]}: expected prompts, found only empty lines")
        # [prompts] bool: no answer of max_tokens fits behind the prompt.
        self.is_too_long = np.array(lengths) + max_tokens > data.max_seq_length
        if self.is_too_long.all():
            raise ValueError(
                f"data.max_seq_length: expected room for the shortest prompt ({min(lengths)} "
                f"tokens) and sampling.max_tokens={max_tokens}, got {data.max_seq_length}"
            )
        self._warn_of_missing_begin()

    def _read(self, number: int) -> list[int]:
        """Check a file's lines, and return how many tokens their prompts have."""
        lengths, offset, blank = [], 0, 0
        with open(self._files[number], "rb") as file:
            lines = tqdm(file, f"checking {self._files[number]}", delay=2, disable=None)
            for line_number, line in enumerate(lines, 1):
                try:
                    if not line.strip(b"\r\n"):
                        blank = blank or line_number
                    elif blank:
                        raise ValueError(f"expected a JSON object, line {blank} is empty")
                    else:
                        lengths.append(len(self._ids(read_object(line))))
                        self._places.append((number, offset))
                except ValueError as error:
                    path = self.data.file_names[number]
                    raise ValueError(f"{path}, line {line_number}: {error}") from error
                offset += len(line)
        return lengths

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Prompt:
        number, offset = self._places[index]
        with open(self._files[number], "rb") as file:
            file.seek(offset)
            record = read_object(file.readline())
        return Prompt(record, self._ids(record))

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer by the format, which no token of the model does."""
        if self.data.format != "nemo_chat":
            return ()
        end = self._chat_tokens["end_of_turn"].strip()
        return (*([end] if end else []), self._chat_tokens["turn_start"])

    def clean(self, text: str) -> str:
        """An answer without what the format itself writes around it."""
        if self.data.format == "nemo_chat":
            return text.removesuffix(self._chat_tokens["end_of_turn"])
        if self.data.format == "prompt":  # the template has the blank already
            piece = self._pieces[-1]
            return text.removeprefix(piece[: len(piece) - len(piece.lstrip(" "))])
        return text

    @property
    def shaping(self) -> dict[str, Any]:
        """The settings that shape the prompts' tokens."""
        data, renderer = self.data, self._renderer
        shown: dict[str, Any] = {
            "format": data.format,
            "max_seq_length": data.max_seq_length,
            "files": [source.xxh3_128 for source in self.sources],
        }
        if renderer is not None:
            shown["chat_template"] = renderer.fingerprint
            return shown | {"chat_template_kwargs": data.chat_template_kwargs}
        if data.format == "nemo_chat":
            return shown | {"chat_prompt_tokens": data.chat_prompt_tokens}
        names = ("prompt_template", "label_key", "add_bos")
        return shown | {name: getattr(data, name) for name in names}

    def _ids(self, record: dict[str, Any]) -> list[int]:
        line = answered(record, self.data, "")
        if self._renderer is not None:
            return self._renderer.prompt(read_conversation(line, self.data.format)[0])
        if self.data.format == "nemo_chat":
            return list(self._tokenizer.text_to_ids(self._nemo_chat(line)))
        return self._plain(line)

    def _plain(self, record: dict[str, Any]) -> list[int]:
        """The prompt template up to the label, piece by piece, as NeMo's GPTSFTDataset."""
        texts = {
            f"{{{key}}}": checked_text(record.get(key), key).strip(" ") for key in self.data.keys
        }
        ids = [self._tokenizer.bos_id] if self.data.add_bos else []
        for piece in self._pieces[:-1]:
            if not self._tokenizer.space_sensitive:
                piece = piece.removeprefix(" ")
            name = piece.lstrip(" ")
            blanks = piece[: len(piece) - len(name)]
            ids += self._tokenizer.text_to_ids(blanks + texts.get(name, name))
        return ids

    def _nemo_chat(self, record: dict[str, Any]) -> str:
        """The text of NeMo's chat format up to the last turn's value."""
        tokens, turns = self._chat_tokens, record.get("conversations")
        if record.get("type") is not None:
            raise ValueError(f"expected a line without type, got {record['type']!r:.60}")
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError(f"expected conversations to be a list of turns, got {turns!r:.60}")
        system = checked_text(record.get("system"), "system")
        end, name_end = tokens["end_of_turn"], tokens["end_of_name"]
        text = f"{tokens['system_turn_start']}System{name_end}{system}{end}"
        for number, turn in enumerate(turns, 1):
            speaker, value = (checked_text(turn.get(key), key, number) for key in ("from", "value"))
            text += f"{tokens['turn_start']}{speaker}{name_end}{value}{end}"
        return text.removesuffix(end)

    def _warn_of_missing_begin(self) -> None:
        own = self._tokenizer.tokenizer
        if begin_token(own) and self[0].ids[:1] != [own.bos_token_id]:
            say(
                f"warning: {self.data.file_names[0]}: its prompts lack {own.bos_token}, which the "
                "model expects before each text; set data.add_bos=true"
            )
