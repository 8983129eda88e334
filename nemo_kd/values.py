"""What a value of the YAML may be: by the kind of its default, or by a rule of its own."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from enum import Enum
from typing import Any, NamedTuple

from omegaconf import OmegaConf

_MISSING = "???"
_NULL_SECTIONS = ("exp_manager", "model.optim.sched")  # null turns them off


class Rule(NamedTuple):
    """What a value must be, in words and as a test."""

    expected: str
    holds: Callable[[Any], bool]


def whole(low: int) -> Rule:
    return Rule(
        f"an integer of at least {low}", lambda value: type(value) is int and low <= value < 2**31
    )


def number(low: float = 0, high: float = math.inf) -> Rule:
    """A finite number from low to high."""
    return Rule(
        f"a number of at least {low}" if high == math.inf else f"a number from {low} to {high}",
        lambda value: type(value) in (int, float) and low <= value <= high and value < math.inf,
    )


def one_of(*choices: Any) -> Rule:
    return Rule(
        "one of " + ", ".join(map(_shown, choices)),
        # True equals 1, and 1 equals 1.0.
        lambda value: any(type(value) is type(choice) and value == choice for choice in choices),
    )


def either(*rules: Rule) -> Rule:
    return Rule(
        ", or ".join(rule.expected for rule in rules),
        lambda value: any(rule.holds(value) for rule in rules),
    )


def list_of(rule: Rule, length: int | None = None) -> Rule:
    """A list, not empty, of values that a rule allows."""
    return Rule(
        f"a list [...] of {length or 'one or more'} values, each {rule.expected}",
        lambda value: (
            isinstance(value, list)
            and len(value) in (length or len(value) or 1,)
            and all(map(rule.holds, value))
        ),
    )


FLAG = Rule("true or false", lambda value: type(value) is bool)
TEXT = Rule("a text", lambda value: type(value) is str and value not in ("", _MISSING))
TEXTS = list_of(TEXT)
NULL = Rule("null", lambda value: value is None)
ANY = Rule("anything", lambda value: value != _MISSING)


def rule_of(default: Any) -> Rule:
    """The rule that a default implies: its type, and for numbers its sign.

    A count whose default is 1 or more must be at least 1, and a default of 0 or -1 is the lowest.
    """
    if type(default) is bool:
        return FLAG
    if type(default) is int:
        return whole(min(default, 1))
    if type(default) is float:
        return number()
    if type(default) is str:
        return TEXT
    if isinstance(default, list) and default:
        return list_of(rule_of(default[0]))
    raise TypeError(f"a default of {default!r} implies no rule; give one")


def check_values(config: Any, defaults: Any, rules: Mapping[str, Rule]) -> None:
    """Check every leaf of a config whose key is one of `defaults`.

    Args:
        config: The run's.
        defaults: The YAML.
        rules: Of the keys whose default does not say what a value may be. `a.*` stands for all
            keys under a.

    Raises:
        ValueError: A value is missing, or no such value.
    """
    values: Any = OmegaConf.to_container(config, resolve=True)
    for path, default in _leaves(OmegaConf.to_container(defaults, resolve=True)):
        section = path.rpartition(".")[0]
        rule = rules.get(path) or rules.get(f"{section}.*") or rule_of(default)
        value, is_there = _select(values, path)
        if is_there and not rule.holds(value):
            got = "nothing" if value == _MISSING else _shown(value)
            raise ValueError(f"{path}: expected {rule.expected}, got {got}")


def _leaves(section: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        path = f"{above}{key}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}.")
        elif not path.startswith(("defaults", "hydra.")):
            yield path, value


def _select(values: Any, path: str) -> tuple[Any, bool]:
    """The value at a path, and whether there is one: a section may be left out."""
    keys = path.split(".")
    for depth, key in enumerate(keys):
        if not isinstance(values, dict):
            section = ".".join(keys[:depth])
            if values is None and section in _NULL_SECTIONS:
                return None, False
            raise ValueError(f"{section}: expected a section of keys, got {_shown(values)}")
        if key not in values:
            return None, False
        values = values[key]
    return values, True


def _shown(value: Any) -> str:
    """As YAML has it, so that it can be typed."""
    if value is None or type(value) is bool:
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def set_fields(target: Any, section: Any, name: str, leave_out: tuple[str, ...] = ()) -> Any:
    """Set the keys of a YAML section on a host's config, a dataclass, and return it.

    Raises:
        ValueError: The config has no such field.
    """
    values: Any = OmegaConf.to_container(section, resolve=True)
    known = [field.name for field in fields(target)]
    for key in values.keys() - set(leave_out):
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {name}.{close[0]}?" if close else ""
            raise ValueError(f"{name}.{key} is no key of {type(target).__name__}{hint}")
        setattr(target, key, _as_type_of(getattr(target, key, None), values[key], f"{name}.{key}"))
    return target


def _as_type_of(default: Any, value: Any, key: str) -> Any:
    """A YAML's text as the enum or the torch dtype that the host has there."""
    import torch

    try:
        if isinstance(default, Enum) and isinstance(value, str):
            return type(default)[value]
        return getattr(torch, value) if isinstance(default, torch.dtype) else value
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{key}: expected a value like {default}, got {value!r}") from error
