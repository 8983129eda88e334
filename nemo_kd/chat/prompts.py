"""Lines of SFT data as prompts: the tokens before the answer, as each format's dataset has them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from nemo_kd.chat.answers import answered
from nemo_kd.chat.files import as_jsonl, read_object
from nemo_kd.chat.formats import checked_text, read_conversation
from nemo_kd.chat.lines import check_tokens, read_lines
from nemo_kd.chat.render import begin_token
from nemo_kd.chat.samples import (
    fingerprint_source,
    index_directory,
    renderer_of,
    with_found_format,
)
from nemo_kd.config import DataConfig
from nemo_kd.process import say

_SHAPING = (
    *("format", "max_seq_length", "prompt_template", "label_key", "add_bos"),
    *("chat_prompt_tokens", "chat_template_kwargs"),
)
# NeMo's own tokens around turns, where chat_prompt_tokens is null.
_NEMO_TOKENS = {
    "system_turn_start": "<extra_id_0>",
    "turn_start": "<extra_id_1>",
    "label_start": "<extra_id_2>",
    "end_of_turn": "\n",
    "end_of_name": "\n",
}


class Prompts:
    """The prompts of all files, in their order. Each line is read, and checked, when it is opened.

    Args:
        data: The settings.
        tokenizer: Of the model that answers.

    Raises:
        ValueError: A line or a setting does not fit; names the file and the line.
    """

    def __init__(self, data: DataConfig, tokenizer: Any) -> None:
        optional = (data.label_key, "output", "completion")
        self.data = with_found_format(data, optional=optional)
        self._tokenizer, self._renderer = tokenizer, renderer_of(self.data, tokenizer)
        check_tokens(self.data, tokenizer, "data")
        template = self.data.escaped_template.encode().decode("unicode_escape")
        self._pieces = [piece for piece in re.split("( *?{.+?})", template) if piece]
        self._chat_tokens = self.data.chat_prompt_tokens or _NEMO_TOKENS
        self._sources = tuple(map(fingerprint_source, data.file_names))
        directory = index_directory(data.index_mapping_dir, self._sources)
        self._places: list[tuple[str, int]] = []  # file and offset of each line
        lengths: list[int] = []
        for path in data.file_names:
            file = as_jsonl(path, directory)
            for offset, ids in read_lines(file, self._ids, path):
                self._places.append((file, offset))
                lengths.append(len(ids))
        if not lengths:
            raise ValueError(f"{data.file_names[0]}: expected prompts, found only empty lines")
        self.lengths = np.array(lengths)  # of each prompt, in tokens
        self._warn_of_missing_begin()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[dict[str, Any], list[int]]:
        """A line, and the tokens of its prompt."""
        path, offset = self._places[index]
        with open(path, "rb") as file:
            file.seek(offset)
            record = read_object(file.readline())
        return record, self._ids(record)

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
        """What shapes the prompts' tokens."""
        return {name: getattr(self.data, name) for name in _SHAPING} | {
            "files": [source.xxh3_128 for source in self._sources],
            "chat_template": self._renderer and self._renderer.fingerprint,
        }

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
        if begin_token(own) and self[0][1][:1] != [own.bos_token_id]:
            say(
                f"warning: {self.data.file_names[0]}: its prompts lack {own.bos_token}, which the "
                "model expects before each text; set data.add_bos=true"
            )
