"""Renders a conversation by the tokenizer's chat template: its tokens, and which are learnt.

The learnt tokens are those that the assistant writes, its end-of-turn token included. A template
with `{% generation %}` marks them itself. For any other the text before a turn is rendered alone,
with the generation prompt, and must be how the whole text begins.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from nemo_kd.chat.formats import Conversation

_GENERATION = re.compile(r"\{%-?\s*generation\b")


class Rendered(NamedTuple):
    """One sample."""

    tokens: NDArray[Any]  # [T] int64
    mask: NDArray[Any]  # [T] uint8, 1 where the token is learnt
    context_length: int  # tokens before the last turn that is learnt
    is_truncated: bool


class _Text(NamedTuple):
    """A rendered text and its learnt spans `(start, end)`, in characters, in order."""

    text: str
    spans: list[tuple[int, int]]


def template_of(tokenizer: Any, path: str | None) -> str:
    """The chat template: of a file, or the tokenizer's own.

    Args:
        tokenizer: A Hugging Face tokenizer.
        path: The file; None takes the tokenizer's.

    Raises:
        ValueError: There is no such file, or the tokenizer has no template.
    """
    if path is not None:
        if not Path(path).is_file():
            raise ValueError(f"data.chat_template: expected a file, found no {path}")
        return Path(path).read_text(encoding="utf-8")
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):  # several, by name
        template = template.get("default")
    if not template:
        raise ValueError(
            "the tokenizer has no chat template: set data.chat_template to a file with one, or "
            "data.format=prompt and data.prompt_template"
        )
    return str(template)


def begin_token(tokenizer: Any) -> str | None:
    """The token that a Hugging Face tokenizer puts before each text; a host puts none there."""
    begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token if begins else None


class Renderer:
    """Makes samples of conversations.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        max_tokens: A sample's most tokens. A longer one is cut after the last learnt turn that
            fits; if none fits, at this length.
        template: The chat template, as `template_of` gives it; None if no sample has messages.
        template_kwargs: More arguments of the template, e.g. `{"enable_thinking": False}`.
        train_on: "all_assistant" or "last_assistant".
        add_eos: Whether a plain text ends with the end token.

    Raises:
        ValueError: The tokenizer is not a fast one, or the template writes today's date.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_tokens: int,
        template: str | None = None,
        template_kwargs: dict[str, Any] | None = None,
        train_on: str = "all_assistant",
        add_eos: bool = True,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                "expected a fast Hugging Face tokenizer (a tokenizer.json), which says where in "
                f"the text a token stands, got {type(tokenizer).__name__}"
            )
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.template, self.template_kwargs = template, dict(template_kwargs or {})
        self.train_on, self.add_eos = train_on, add_eos
        if "strftime_now" in (template or "") and "date_string" not in self.template_kwargs:
            raise ValueError(
                "the chat template writes today's date, so that the samples would depend on the "
                "day: set data.chat_template_kwargs={date_string:'26 Jul 2024'}, the date that "
                "all samples are to have, or data.chat_template to a template without it"
            )
        self._marks_itself = template is not None and _GENERATION.search(template) is not None
        added = tokenizer.added_tokens_decoder
        self._special = {i for i, token in added.items() if token.special}
        self._begin = begin_token(tokenizer) or ""

    @property
    def fingerprint(self) -> str:
        """Of the template; "" if there is none."""
        return xxhash.xxh3_64_hexdigest(self.template.encode()) if self.template else ""

    def __call__(self, conversation: Conversation) -> Rendered:
        """One sample of a conversation.

        Raises:
            ValueError: As `check`.
        """
        if self._marks_itself and conversation.messages:
            tokens, mask = self._by_marks(conversation)
        else:
            text, spans = self._text(conversation)
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            tokens = np.array(encoded.input_ids, dtype=np.int64)
            mask = self._mask(tokens, np.array(encoded.offset_mapping).reshape(-1, 2), spans)
        return self._cut(tokens, mask)

    def prompt(self, conversation: Conversation) -> list[int]:
        """The tokens before the last turn, with the generation prompt; of a plain text, its prompt.

        Raises:
            ValueError: The template refuses the turns before the last one.
        """
        if conversation.messages:
            text = self._render(
                conversation, len(conversation.messages) - 1, add_generation_prompt=True
            )
        else:
            text = self._with_begin(conversation.prompt)
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _with_begin(self, text: str) -> str:
        return text if text.startswith(self._begin) else self._begin + text

    def check(self, conversation: Conversation) -> None:
        """Check that a conversation can be rendered, without tokenising it where that is possible.

        Raises:
            ValueError: The template refuses it, or does not tell what the assistant writes; names
                the turn, counted from 1.
        """
        if self._marks_itself and conversation.messages:
            self._by_marks(conversation)
        else:
            self._text(conversation)

    def left_out(self, conversation: Conversation) -> set[str]:
        """Of `tools` and `tool_calls`, what a conversation has and the template does not write."""
        messages = conversation.messages
        parts = {"tools": conversation._replace(tools=None)} if conversation.tools else {}
        if any(each.get("tool_calls") for each in messages):
            without_calls = [{**each, "tool_calls": None} for each in messages]
            parts["tool_calls"] = conversation._replace(messages=without_calls)
        if not parts:
            return set()
        whole = self._render(conversation, len(messages))
        return {n for n, without in parts.items() if self._render(without, len(messages)) == whole}

    def _text(self, conversation: Conversation) -> _Text:
        """The text and the learnt spans, by rendering what stands before and after each turn."""
        if not conversation.messages:
            end = self.tokenizer.eos_token if self.add_eos and self.tokenizer.eos_token else ""
            prompt, completion = self._with_begin(conversation.prompt), conversation.completion
            completion = completion if end and completion.endswith(end) else completion + end
            return _Text(prompt + completion, [(len(prompt), len(prompt + completion))])
        messages = conversation.messages
        whole = self._render(conversation, len(messages))
        spans = []
        for turn in self._learnt_turns(conversation):
            before = self._render(conversation, turn, add_generation_prompt=True)
            until = whole if turn + 1 == len(messages) else self._render(conversation, turn + 1)
            if not (whole.startswith(until) and until.startswith(before)):
                raise ValueError(
                    f"turn {turn + 1}: the chat template writes what stands before it in another "
                    "way once the chat goes on, so that its tokens cannot be told (templates that "
                    "drop earlier reasoning do so). Set data.train_on=last_assistant, or "
                    "data.chat_template to a template with {% generation %}"
                )
            spans.append((len(before), len(until)))
        return _Text(whole, spans)

    def _render(self, conversation: Conversation, num_turns: int, **more: Any) -> str:
        """The text of the first turns."""
        return str(self._apply(conversation, num_turns, tokenize=False, **more))

    def _apply(self, conversation: Conversation, num_turns: int, **more: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                conversation.messages[:num_turns],
                tools=conversation.tools,
                chat_template=self.template,
                **(self.template_kwargs | more),
            )
        except Exception as error:  # a template raises what it likes
            raise ValueError(
                f"turn {max(1, num_turns)}: the chat template refuses the chat up to here: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _learnt_turns(self, conversation: Conversation) -> list[int]:
        turns = [turn for turn, is_learnt in enumerate(conversation.learnt) if is_learnt]
        return turns[-1:] if self.train_on == "last_assistant" else turns

    def _mask(
        self, tokens: NDArray[Any], offsets: NDArray[Any], spans: list[tuple[int, int]]
    ) -> NDArray[Any]:
        """1 at the tokens of the spans, without the blanks after an end-of-turn token."""
        mask = np.zeros(len(tokens), dtype=np.uint8)
        starts, ends = offsets[:, 0], offsets[:, 1]
        for start, end in spans:
            # A token without a width, or one that begins before the span, counts by its end.
            inside = (starts < end) & ((ends > start) | ((starts == ends) & (starts >= start)))
            span = np.flatnonzero(inside)
            special = [i for i in span if int(tokens[i]) in self._special]
            if (
                special
                and not self.tokenizer.decode(tokens[special[-1] + 1 : span[-1] + 1]).strip()
            ):
                span = span[span <= special[-1]]
            mask[span] = 1
        return mask

    def _by_marks(self, conversation: Conversation) -> tuple[NDArray[Any], NDArray[Any]]:
        """Tokens and mask as transformers gives them for a template with `{% generation %}`."""
        encoded = self._apply(
            conversation,
            len(conversation.messages),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        tokens = np.array(encoded["input_ids"], dtype=np.int64)
        mask = np.array(encoded["assistant_masks"], dtype=np.uint8)
        by_assistant = [i for i, each in enumerate(conversation.messages) if _is_assistant(each)]
        learnt = self._learnt_turns(conversation)
        if learnt != by_assistant:
            runs = _runs(mask)
            if len(runs) != len(by_assistant):
                raise ValueError(
                    f"the chat template marks {len(runs)} spans as the assistant's, but the chat "
                    f"has {len(by_assistant)} turns of the assistant, not all of which are to be "
                    "learnt: which are, cannot be told"
                )
            for turn, (start, end) in zip(by_assistant, runs, strict=True):
                mask[start:end] &= turn in learnt
        return tokens, mask

    def _cut(self, tokens: NDArray[Any], mask: NDArray[Any]) -> Rendered:
        is_truncated = len(tokens) > self.max_tokens
        if is_truncated:
            fitting = [end for _, end in _runs(mask) if end <= self.max_tokens]
            length = fitting[-1] if fitting else self.max_tokens
            tokens, mask = tokens[:length], mask[:length]
        runs = _runs(mask)
        return Rendered(tokens, mask, runs[-1][0] if runs else len(tokens), is_truncated)


def _is_assistant(message: dict[str, Any]) -> bool:
    return bool(message["role"] == "assistant")


def _runs(mask: NDArray[Any]) -> list[tuple[int, int]]:
    """Where ones begin and end."""
    edges = np.flatnonzero(np.diff(mask, prepend=0, append=0))
    return [(int(start), int(end)) for start, end in zip(edges[::2], edges[1::2], strict=True)]
