"""What a user may write for a field of a plan: checked where it is given, and told by name, value and fix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import TypeGuard

from vpipe.errors import PlanError

__all__ = ["as_count", "as_flag", "as_number", "as_numbers", "as_whole_numbers", "is_number"]


def as_count(name: str, value: object) -> int | None:
    """Return a whole number of at least 1, or None where nothing is said.

    Raises:
        PlanError: it is none.
    """
    if value is None:
        return None
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise PlanError(f"{name} is {value!r}; give a whole number from 1 on")
    return int(value)


def as_flag(name: str, value: object) -> bool:
    """Return True or False.

    Raises:
        PlanError: it is neither.
    """
    if not isinstance(value, bool):
        raise PlanError(f"{name} is {value!r}; give True or False")
    return value


def as_whole_numbers(name: str, value: object, of: str) -> tuple[int, ...]:
    """Return a list of whole numbers of at least 0, such as stages.

    Raises:
        PlanError: it is none; the text says what the list is `of`.
    """
    if _is_list(value):
        items = list(value)
        whole = [item for item in items if isinstance(item, Integral) and not isinstance(item, bool) and int(item) >= 0]
        if len(whole) == len(items):
            return tuple(map(int, whole))
    raise PlanError(f"{name} is {value!r}; give a list of {of}, each a whole number from 0 on")


def as_number(name: str, value: object) -> float:
    """Return a number.

    Raises:
        PlanError: it is none.
    """
    if not is_number(value):
        raise PlanError(f"{name} is {value!r}; give a number, or a list of numbers")
    return float(value)


def as_numbers(name: str, value: object) -> float | tuple[float, ...]:
    """Return a number, or a list of numbers.

    Raises:
        PlanError: it is neither.
    """
    if _is_list(value):
        return tuple(as_number(name, item) for item in value)
    return as_number(name, value)


def is_number(value: object) -> TypeGuard[Real]:
    """Tell whether a value is a number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_list(value: object) -> TypeGuard[Iterable[object]]:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)
