"""Small immutable values that are made on every request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar, cast, dataclass_transform

_Class = TypeVar("_Class", bound=type)


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def record(cls: _Class) -> _Class:
    """A slotted dataclass that type checkers hold to be frozen.

    Frozen by the checker and not by the interpreter: `dataclass(frozen=True)` sets each field
    through `object.__setattr__`, which makes a value cost five times as much.
    """
    made: Any = dataclass(slots=True, unsafe_hash=True)
    return cast(_Class, made(cls))
