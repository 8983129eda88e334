"""Typed settings out of Hydra's YAML, checked when read: a key that nothing reads is an error."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from nemo_kd.loss import KDLossConfig
from nemo_kd.selection import SelectionConfig

Settings = TypeVar("Settings", KDLossConfig, SelectionConfig)


def read_settings(cls: type[Settings], section: Mapping[str, Any], where: str) -> Settings:
    """Return the dataclass `cls` filled from one section of the YAML.

    Args:
        section: The section; a key it lacks takes the dataclass's default.
        where: The section's path in the YAML, for the error.

    Raises:
        ValueError: A key that `cls` lacks, a value of another type, or one out of its range.
    """
    refuse_unknown_keys(section, [field.name for field in fields(cls)], where)
    values: dict[str, Any] = dict(section)
    for field in fields(cls):
        if field.name not in values:
            continue
        value, default = values[field.name], field.default
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(default, float) and number:
            values[field.name] = float(value)
        elif type(value) is not type(default):
            raise ValueError(
                f"{where}.{field.name}: expected {type(default).__name__}, got {value!r}"
            )
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def refuse_unknown_keys(section: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Refuse the first key of `section` that is not `known`, and name the nearest that is.

    Raises:
        ValueError: There is such a key.
    """
    known = list(known)
    for key in section:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {where}.{near[0]}?" if near else ""
            raise ValueError(f"{where}.{key} is a key that nothing reads{hint}")
