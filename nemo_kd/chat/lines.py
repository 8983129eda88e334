"""Checks each line of a jsonl before a model is read: it must be what NeMo's datasets take."""

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from nemo_kd.cache import SourceFile
from nemo_kd.chat.answers import GENERATION, REFERENCE
from nemo_kd.chat.files import as_jsonl, read_object
from nemo_kd.chat.formats import checked_text, read_conversation
from nemo_kd.chat.render import Renderer
from nemo_kd.chat.samples import fingerprint_source, index_directory, renderer_of
from nemo_kd.config import DataConfig
from nemo_kd.process import say

# What NeMo's chat dataset reads of a line, and of each of its turns.
_CHAT_KEYS = ("system", "conversations", "mask", "type")
_TURN_KEYS = ("from", "value")

Made = TypeVar("Made")


def check_lines(path: str, data: DataConfig, renderer: Renderer | None = None) -> int:
    """Read a jsonl once; each line must be a JSON object that gives one of `data`'s samples.

    Warns of keys that nothing reads.

    Args:
        path: The file.
        data: The settings that its samples are made with.
        renderer: Of the samples, if their format is one that this package renders.

    Returns:
        The number of samples.

    Raises:
        ValueError: A line is no such object, or there is none; names the file and the line.
    """
    if not os.path.getsize(path):
        raise ValueError(f"{path}: expected samples, found an empty file")
    unread: set[str] = set()
    num_samples = 0
    for _, of_line in read_lines(path, lambda record: _check_record(record, data, renderer)):
        unread |= of_line
        num_samples += 1
    if not num_samples:
        raise ValueError(f"{path}: expected samples, found only empty lines")
    if unread:
        say(
            f"warning: {path}: nothing reads {', '.join(sorted(unread))} of its lines"
            + ("" if renderer else f"; the samples have only {', '.join(data.keys)}")
        )
    return num_samples


def read_lines(
    path: str, read: Callable[[dict[str, Any]], Made], name: str | None = None
) -> Iterator[tuple[int, Made]]:
    """Yield where each line of a jsonl begins, in bytes, and what `read` makes of its object.

    Args:
        path: The file. Empty lines at its end are ignored.
        read: What may raise a ValueError for a line.
        name: The file's in errors; by default `path`.

    Raises:
        ValueError: A line is no JSON object, or `read` refuses it; names the file and the line.
    """
    offset, blank = 0, None  # the first of a row of empty lines, which NeMo ignores at the end
    for number, line in enumerate(_lines(path), 1):
        if line == b"\n":  # NeMo counts any other, blank or not, as a sample
            blank = blank or number
        elif blank:
            raise ValueError(
                f"{name or path}, line {blank}: expected a JSON object, got an empty line"
            )
        else:
            try:
                made = read(read_object(line))
            except ValueError as error:
                raise ValueError(f"{name or path}, line {number}: {error}") from error
            yield offset, made
        offset += len(line)


def _lines(path: str) -> Iterator[bytes]:
    size = os.path.getsize(path)
    bar = tqdm(
        total=size, desc=f"checking {path}", unit="B", unit_scale=True, delay=2, disable=None
    )
    with open(path, "rb") as lines, bar:
        for line in lines:
            yield line
            bar.update(len(line))


def _check_record(record: dict[str, Any], data: DataConfig, renderer: Renderer | None) -> set[str]:
    """Check one line, and return its keys that nothing reads."""
    own = {GENERATION, REFERENCE} if GENERATION in record else set()
    if renderer is None:
        unread = _check_conversation(record) if data.chat else _check_fields(record, data)
        return unread - own
    conversation, unread = read_conversation(record, data.format)
    renderer.check(conversation)
    return (unread | renderer.left_out(conversation)) - own


def _check_fields(record: dict[str, Any], data: DataConfig) -> set[str]:
    """Check what the prompt template takes of a line, and return the other keys."""
    remedy = "mend the line, or set prompt_template and label_key to the file's keys"
    _refuse_missing(record, data.keys, remedy)
    for key in data.keys:
        checked_text(record[key], key)
    return record.keys() - data.keys


def _check_conversation(record: dict[str, Any]) -> set[str]:
    """Check what NeMo's chat dataset takes of a line, and return the other keys."""
    _refuse_missing(record, ("system", "conversations"), "NeMo's chat format has both")
    turns, masked, kind = record["conversations"], record.get("mask", "User"), record.get("type")
    checked_text(record["system"], "system")
    if kind not in (None, "VALUE_TO_TEXT", "TEXT_TO_VALUE"):
        raise ValueError(
            f"expected a type of VALUE_TO_TEXT or TEXT_TO_VALUE, or none, got {kind!r:.60}"
        )
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"expected conversations to be a list of turns, got {turns!r:.60}")
    unread = record.keys() - _CHAT_KEYS
    for number, turn in enumerate(turns, 1):
        try:
            unread |= _check_turn(turn, has_labels=kind is not None)
        except ValueError as error:
            raise ValueError(f"turn {number}: {error}") from error
    speakers = [turn["from"] for turn in turns]
    if not isinstance(masked, str) or not set(masked.split(",")) <= set(speakers):
        raise ValueError(
            f"expected mask, the speakers that are not learnt from (default User), to name some of "
            f"{', '.join(sorted(set(speakers)))}, separated by commas, got {masked!r:.60}"
        )
    # NeMo never learns from the first turn. It learns from the start of each masked turn after the
    # second (TEXT_TO_VALUE: the first), and from the end of the last turn unless that is masked.
    if len(turns) < (2 if kind == "TEXT_TO_VALUE" else 3) and speakers[-1] in masked:
        raise ValueError(f"expected a turn to learn from, but mask {masked!r} leaves none")
    return unread


def _check_turn(turn: Any, has_labels: bool) -> set[str]:
    if not isinstance(turn, dict):
        raise ValueError(f"expected an object with from and value, got {turn!r:.60}")
    _refuse_missing(turn, _TURN_KEYS, "NeMo's chat format has both")
    for key in _TURN_KEYS:
        checked_text(turn[key], key)
    if has_labels and turn.get("label") is not None:
        checked_text(turn["label"], "label")
    return turn.keys() - _TURN_KEYS - ({"label"} if has_labels or not turn.get("label") else set())


def _refuse_missing(record: dict[str, Any], keys: Any, remedy: str) -> None:
    if missing := [key for key in keys if key not in record]:
        raise ValueError(
            f"expected the keys {', '.join(keys)}, found no {', '.join(missing)}; {remedy}"
        )


class CheckedFiles(NamedTuple):
    """Files of one section: their samples, what renders these, and the files' hashes."""

    num_samples: int
    renderer: Renderer | None  # None: the host's dataset makes the samples
    sources: tuple[SourceFile, ...]


def check_files(data: DataConfig, tokenizer: Any, section: str) -> CheckedFiles:
    """Check the files of `data`, line by line, and its settings against the tokenizer.

    Args:
        data: The settings, with the format of the files.
        tokenizer: The host's.
        section: The settings' place in the YAML, for the errors.

    Raises:
        ValueError: A line or a setting does not fit.
    """
    renderer = renderer_of(data, tokenizer)
    sources = tuple(map(fingerprint_source, data.file_names))
    directory = index_directory(data.index_mapping_dir, sources)
    files = [as_jsonl(path, directory) for path in data.file_names]
    num_samples = sum(check_lines(file, data, renderer) for file in files)
    check_tokens(data, tokenizer, section)
    return CheckedFiles(num_samples, renderer, sources)


def check_tokens(data: DataConfig, tokenizer: Any, section: str) -> None:
    """Check that the tokenizer has the tokens that `data` adds to a sample.

    Args:
        data: The settings.
        tokenizer: NeMo's.
        section: Their place in the YAML, for the errors.

    Raises:
        ValueError: It lacks one.
    """
    if data.is_rendered:
        return  # the chat template has the tokens
    for key, token in ("add_bos", "bos_id"), ("add_eos", "eos_id"):
        if getattr(data, key) and not data.chat and getattr(tokenizer, token) is None:
            raise ValueError(
                f"{section}.{key}: expected false, because the tokenizer has no such token, "
                "got true"
            )
    if data.add_sep and not data.chat and not 0 <= data.sep_id < tokenizer.vocab_size:
        raise ValueError(
            f"sep_id: expected an id below the vocabulary's {tokenizer.vocab_size} with "
            f"{section}.add_sep=true, got {data.sep_id}; set it to the token between prompt and "
            "answer, or add_sep=false"
        )
    if data.chat and data.chat_prompt_tokens is None:
        prefix = "\0"  # as NeMo has it, for tokenizers that add a space before a text
        num_tokens = len(tokenizer.text_to_ids(f"{prefix}<extra_id_1>")) - len(
            tokenizer.text_to_ids(prefix)
        )
        if num_tokens > 1:
            say(
                "warning: chat_prompt_tokens is null, so that NeMo's <extra_id_0>, <extra_id_1> "
                f"and <extra_id_2> stand around the turns; this tokenizer has no such tokens, and "
                f"writes each as {num_tokens}"
            )
