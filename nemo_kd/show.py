"""`nemo-kd show`: samples as text, with what is learnt in colour, and the teacher's choices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nemo_kd.cache import Sample

_NUM_CHOICES = 3
_MOST_ROWS = 20

Decode = Callable[[list[int]], str]


def sample_text(tokens: Any, loss_mask: Any, decode: Decode, in_colour: bool) -> Text:
    """A sample's text; the learnt tokens are green, or stand in ⟦ ⟧ where there is no colour.

    Args:
        tokens: int [T].
        loss_mask: [T], 1 where the token is learnt.
        decode: Token ids -> text.
        in_colour: Whether the text is for a terminal with colours.
    """
    text = Text()
    pairs = zip(np.asarray(tokens).tolist(), np.asarray(loss_mask).tolist(), strict=True)
    for is_learnt, run in groupby(pairs, key=lambda pair: bool(pair[1])):
        piece = decode([token for token, _ in run])
        if is_learnt and not in_colour:
            piece = f"⟦{piece}⟧"
        text.append(piece, style="bold green" if is_learnt else "")
    return text


def show_sample(console: Console, number: int, tokens: Any, loss_mask: Any, decode: Decode) -> None:
    """Print one sample."""
    num_learnt = int(np.asarray(loss_mask).sum())
    console.rule(f"sample {number}: {len(tokens)} tokens, {num_learnt} of them learnt")
    console.print(sample_text(tokens, loss_mask, decode, bool(console.color_system)))


def show_choices(console: Console, sample: Sample, decode: Decode) -> None:
    """Print the teacher's most probable choices at the first learnt tokens of a cache's sample."""
    table = Table("learnt", *(f"choice {n + 1}" for n in range(_NUM_CHOICES)), "outside the kept")
    learnt = np.flatnonzero(sample.loss_mask)
    for row, position in enumerate(learnt[:_MOST_ROWS]):
        ids, log_probs = sample.topk_ids[row], sample.topk_log_probs[row]
        best = [i for i in np.argsort(-log_probs)[:_NUM_CHOICES] if ids[i] >= 0]
        choices = [f"{decode([int(ids[i])])!r} {np.exp(log_probs[i]):.3f}" for i in best]
        tail = f"{np.exp(sample.tail_log_probs[row]):.3f}"
        cells = [repr(decode([int(sample.tokens[position])])), *_filled(choices), tail]
        table.add_row(*map(Text, cells))
    console.print(table)
    if len(learnt) > _MOST_ROWS:
        console.print(f"... and {len(learnt) - _MOST_ROWS} more learnt tokens")


def _filled(choices: Sequence[str]) -> Iterator[str]:
    yield from choices
    yield from [""] * (_NUM_CHOICES - len(choices))
