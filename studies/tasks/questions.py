"""Writes the study's questions, whose answers can be checked: sums, units, days, programs.

A line has `input`, `output` with the steps to the answer, `kind`, and `right`: the final answer, or
for a program its tests. No two lines, in whichever file, ask the same.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping
from itertools import permutations, product
from pathlib import Path
from typing import Any

from nemo_kd.sandbox import run_untrusted

KINDS = ("sums", "units", "days", "programs")
NAMES = ("Ann", "Ben", "Carla", "Dan", "Eva", "Finn")
THINGS = ("apples", "books", "coins", "stamps", "pens", "cards")
UNITS = {
    ("week", "days"): 7,
    ("day", "hours"): 24,
    ("hour", "minutes"): 60,
    ("minute", "seconds"): 60,
    ("year", "months"): 12,
    ("metre", "centimetres"): 100,
    ("kilogram", "grams"): 1000,
    ("dozen", "pieces"): 12,
}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
# What a step of a program does to s, in words and in Python.
STEPS = {
    "puts s in upper case": "s.upper()",
    "puts s in lower case": "s.lower()",
    "reverses s": "s[::-1]",
    "writes s twice": "s * 2",
    "keeps the first three characters of s": "s[:3]",
    "keeps the last two characters of s": "s[-2:]",
    "removes the spaces of s": 's.replace(" ", "")',
    "adds a question mark to s": 's + "?"',
    "takes every second character of s": "s[::2]",
    "puts s in brackets": '"(" + s + ")"',
}
TEXTS = ("Hello World", "a b c", "Study", "")


def write_questions(out: Path, sizes: Mapping[str, int], seed: int) -> None:
    """Write `out`/NAME.jsonl for each name of `sizes`: so many lines, of each kind alike many."""
    rng = random.Random(seed)
    makers = {"sums": sums(rng), "units": units(rng), "days": days(rng), "programs": programs(rng)}
    for name, size in sizes.items():
        lines = [
            {**next(makers[kind]), "kind": kind}
            for kind, _ in zip(KINDS * size, range(size), strict=False)
        ]
        rng.shuffle(lines)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (out / f"{name}.jsonl").write_text(text)


def sums(rng: random.Random) -> Iterator[dict[str, str]]:
    seen = set()
    while True:
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        has, more = rng.randint(2, 60), rng.randint(2, 40)
        less = rng.randint(1, has + more - 1)
        if (has, more, less) in seen:
            continue
        seen.add((has, more, less))
        both, rest = has + more, has + more - less
        yield {
            "input": f"{name} has {has} {thing}, gets {more} more and gives {less} away. "
            f"How many {thing} are left?",
            "output": f"{has} + {more} = {both}. {both} - {less} = {rest}. The answer is {rest}.",
            "right": str(rest),
        }


def units(rng: random.Random) -> Iterator[dict[str, str]]:
    asked = [*product(UNITS.items(), range(2, 90))]
    rng.shuffle(asked)
    for ((large, small), factor), number in asked:
        yield {
            "input": f"How many {small} are {number} {large}s?",
            "output": f"1 {large} is {factor} {small}. {number} * {factor} = {number * factor}. "
            f"The answer is {number * factor}.",
            "right": str(number * factor),
        }


def days(rng: random.Random) -> Iterator[dict[str, str]]:
    asked = [*product(range(7), range(8, 108))]
    rng.shuffle(asked)
    for first, number in asked:
        weeks, rest = divmod(number, 7)
        day = DAYS[(first + rest) % 7]
        yield {
            "input": f"Which day is {number} days after {DAYS[first]}?",
            "output": f"{number} = {weeks} * 7 + {rest}. {rest} days after {DAYS[first]} is {day}. "
            f"The answer is {day}.",
            "right": day,
        }


def programs(rng: random.Random) -> Iterator[dict[str, str]]:
    asked = [*permutations(STEPS, 2), *permutations(STEPS, 3)]
    rng.shuffle(asked)
    for chosen in asked:
        *before, last = (STEPS[each] for each in chosen)
        lines = ["def f(s):", *(f"    s = {step}" for step in before), f"    return {last}"]
        names: dict[str, Any] = {}
        exec("\n".join(lines), names)  # written above, by no model
        yield {
            "input": f"Write a Python function f(s) that {', then '.join(chosen)}.",
            "output": "\n".join(lines),
            "right": "\n".join(f"assert f({text!r}) == {names['f'](text)!r}" for text in TEXTS),
        }


def is_right(line: dict[str, Any]) -> bool:
    """Whether the answer of a line is right; also the filter `studies.tasks.questions:is_right`."""
    if line["kind"] == "programs":
        return run_untrusted(f"{line['output']}\n{line['right']}\n", time_limit_s=10).passed
    found = re.findall(r"The answer is (\w+(?:\.\d+)?)", line["output"])
    return bool(found) and found[-1] == line["right"]
