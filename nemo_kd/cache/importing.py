"""Reads rows that another engine computed: jsonl, as vLLM and API servers give them.

A line is one sample:

    {"token_ids": [9, 4, 7], "loss_mask": [0, 0, 1], "logprobs": [null, null, ROW]}

`logprobs` has a ROW for each token, or only for each supervised token. Other rows are not read. A
row says which token it is for, in one of two forms:

    {"7": {"logprob": -0.2}, "3": {"logprob": -1.9}}
    {"token": "token_id:7", "top_logprobs": [{"token": "token_id:7", "logprob": -0.2}, ...]}

The first is vLLM's prompt_logprobs, where the token is among the entries; a number may stand in
place of {"logprob": number}. The second is a chat completion's, from a server that returns tokens
as ids. `context_length` may say how many tokens the prompt has. Its default is the number of tokens
before the first supervised one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_kd.cache.check import (
    check_context_length,
    check_distinct,
    check_ids,
    check_log_probs,
    check_mask,
)
from nemo_kd.cache.layout import Array, Sample
from nemo_kd.cache.manifest import (
    Manifest,
    fingerprint_file,
    tokenizer_fingerprint,
    vocabulary_of,
)

_TOKEN_ID = "token_id:"
# Engines round log-probs, some to bfloat16. A larger sum is no distribution.
_MOST_MASS = 1.02


def manifest_of(
    tokenizer: Any, files: Iterable[str | Path], lengths: Sequence[int], **fields: Any
) -> Manifest:
    """The manifest of a cache whose tokens no dataset has made.

    Args:
        tokenizer: of the token ids.
        files: what the rows come from.
        lengths: of each sample, in tokens.
        **fields: the other ones of Manifest; what `dataset` has is added to what the student's
            dataset reads of it.
    """
    read = {"max_seq_length": max(1, max(lengths) - 1), "chat": False, "add_eos": False}
    return Manifest(
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        vocabulary=vocabulary_of(tokenizer),
        sources=tuple(fingerprint_file(file) for file in files),
        dataset=read | fields.pop("dataset", {}),
        num_samples=len(lengths),
        **fields,
    )


def answer_sample(
    prompt: Sequence[int], answer: Sequence[int], rows: tuple[Array, Array, Array]
) -> Sample:
    """The sample whose tokens are prompt and answer, the answer's learnt.

    Args:
        prompt: token ids.
        answer: token ids.
        rows: of the answer's tokens: ids [P, K], log-probs [P, K] and the tails' log-probs [P].
    """
    tokens = np.array([*prompt, *answer], np.int32)
    mask = (np.arange(len(tokens)) >= len(prompt)).astype(np.uint8)
    return Sample(tokens, mask, *rows, len(prompt))


def read_samples(path: Path, k: int, vocab_size: int) -> Iterator[Sample]:
    """Yield the samples of a file, with the k most probable entries of every row.

    The tail is 1 less their mass, and so as exact as the engine's log-probs.

    Raises:
        ValueError: a line has another form, a row is for another token than `token_ids` has there
            or has fewer than k entries, an id is outside the vocabulary; names the line.
    """
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield _sample(json.loads(line), k, vocab_size)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error


def _sample(record: Any, k: int, vocab_size: int) -> Sample:
    keys = ("token_ids", "loss_mask", "logprobs")
    if not isinstance(record, dict) or any(not isinstance(record.get(key), list) for key in keys):
        raise ValueError(f"expected an object with the lists {', '.join(keys)}")
    tokens, mask, rows = (record[key] for key in keys)
    check_ids("token_ids", _integers("token_ids", tokens), vocab_size)
    check_mask(_integers("loss_mask", mask))
    if len(mask) != len(tokens):
        raise ValueError(
            f"loss_mask: expected 0 or 1 for each of {len(tokens)} tokens, got {len(mask)} numbers"
        )
    positions = [position for position, bit in enumerate(mask) if bit]
    if len(rows) == len(tokens):
        rows = [rows[position] for position in positions]
    if len(rows) != len(positions):
        raise ValueError(
            f"logprobs: expected {len(tokens)} rows, one a token, or {len(positions)}, one a "
            f"supervised token, got {len(rows)}"
        )
    made = top_rows(rows, [tokens[position] for position in positions], k, vocab_size, positions)
    context_length = record.get("context_length", positions[0] if positions else len(tokens))
    _integers("context_length", [context_length])
    check_context_length(context_length, len(tokens))
    return Sample(np.array(tokens, np.int32), np.array(mask, np.uint8), *made, context_length)


def top_rows(
    rows: Sequence[Any],
    tokens: Sequence[int],
    k: int,
    vocab_size: int,
    positions: Sequence[int] | None = None,
) -> tuple[Array, Array, Array]:
    """ids [P, k] and log-probs [P, k] of the k most probable entries, and the tails' log-probs [P].

    Args:
        rows: P of them, each of one of the two forms above.
        tokens: the id that each row is for.
        positions: of the tokens, for the errors; by default from 0 up.

    Raises:
        ValueError: as `read_samples`.
    """
    ids = np.zeros((len(tokens), k), np.int32)
    log_probs = np.zeros((len(tokens), k), np.float32)
    tails = np.zeros(len(tokens), np.float32)
    for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        try:
            ids[index], log_probs[index], tails[index] = _top_row(row, token, k, vocab_size)
        except ValueError as error:
            position = positions[index] if positions is not None else index
            raise ValueError(f"logprobs of token {position}: {error}") from error
    return ids, log_probs, tails


def _top_row(row: Any, token: int, k: int, vocab_size: int) -> tuple[list[int], list[float], float]:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {row!r}")
    if isinstance(row.get("top_logprobs"), list):
        top: list[Any] = [entry for entry in row["top_logprobs"] if isinstance(entry, dict)]
        entries = [(token_id(entry.get("token")), entry.get("logprob")) for entry in top]
        named = [token_id(row.get("token"))]
    else:
        entries = [
            (token_id(key), value.get("logprob") if isinstance(value, dict) else value)
            for key, value in row.items()
        ]
        named = [number for number, _ in entries]
    if token not in named:
        raise ValueError(
            f"expected the row of token id {token}, as token_ids has it, got one for "
            f"{', '.join(map(str, named[:5]))}; was it made with another tokenizer, or is it of "
            "the position before or after?"
        )
    ids = [number for number, _ in entries]
    check_ids("ids", ids, vocab_size)
    check_distinct("ids", np.array([ids]))
    if len(ids) < k:
        raise ValueError(f"expected at least {k} distinct ids, got {len(ids)}; lower --k")
    for _, value in entries:
        if type(value) not in (int, float):
            raise ValueError(f"expected log-probs, at most 0, got {value!r}")
    check_log_probs("logprob", [value for _, value in entries])
    entries.sort(key=lambda entry: (-entry[1], entry[0]))
    mass = math.fsum(math.exp(value) for _, value in entries[:k])
    if mass > _MOST_MASS:
        raise ValueError(f"expected log-probs of one distribution, got a mass of {mass:.3f}")
    tail = math.log1p(-mass) if mass < 1 else -math.inf
    return [number for number, _ in entries[:k]], [value for _, value in entries[:k]], tail


def token_id(value: Any) -> int:
    """The id of a token that an engine wrote as 7, "7" or "token_id:7".

    Raises:
        ValueError: it wrote anything else.
    """
    if type(value) is int:
        return value
    text = value.removeprefix(_TOKEN_ID) if isinstance(value, str) else ""
    if not text.isdecimal():
        raise ValueError(
            f"expected a token id such as 7 or {_TOKEN_ID}7, got {value!r}; have the server return "
            "tokens as token ids"
        )
    return int(text)


def _integers(name: str, values: list[Any]) -> list[int]:
    """The values of a JSON list, where neither true nor 7.0 stands for an integer."""
    for value in values:
        if type(value) is not int:
            raise ValueError(f"{name}: expected integers, got {value!r}")
    return values
