"""What a value may be: the types of the config's fields, and the words that say so in an error or a reference."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import BeforeValidator, Field
from pydantic.fields import FieldInfo

from vpipe.errors import PlanError
from vpipe.words.units import parse_bytes

__all__ = [
    "Allowed",
    "Count",
    "Machine",
    "Natural",
    "NonNegative",
    "PerStage",
    "Port",
    "Positive",
    "Ratio",
    "Share",
    "Size",
    "describe_field",
    "describe_type",
    "show",
]


@dataclass(frozen=True)
class Allowed:
    """Words for what a field takes; put into its `Annotated` beside the validators that enforce them."""

    text: str


def _refuse_bool(value: object) -> object:
    """Keep pydantic from reading true as 1."""
    if isinstance(value, bool):
        raise ValueError("true and false are not numbers")
    return value


def _stages_to_list(value: object) -> object:
    """Turn ``{"0": 3, "1": 2}`` (the original's form) into ``[3, 2]``; leave everything else to pydantic."""
    if not isinstance(value, Mapping):
        return value
    values = {int(stage): each for stage, each in value.items()}
    return [values[stage] for stage in range(len(values))] if set(values) == set(range(len(values))) else value


def _size_to_bytes(value: object) -> object:
    """Turn ``4GiB`` into bytes; leave everything else to pydantic."""
    try:
        return parse_bytes(value) if isinstance(value, str) else value
    except PlanError as error:
        raise ValueError(str(error)) from error


_NoBool = BeforeValidator(_refuse_bool)

Count = Annotated[int, _NoBool, Field(ge=1), Allowed("a whole number of at least 1")]
Natural = Annotated[int, _NoBool, Field(ge=0), Allowed("a whole number of at least 0")]
Positive = Annotated[float, _NoBool, Field(gt=0), Allowed("a number above 0")]
NonNegative = Annotated[float, _NoBool, Field(ge=0), Allowed("a number of at least 0")]
Ratio = Annotated[float, _NoBool, Field(ge=0, le=1), Allowed("a number from 0 to 1")]
Share = Annotated[float, _NoBool, Field(ge=0, lt=1), Allowed("a number from 0 to below 1")]
Port = Annotated[int, _NoBool, Field(ge=1, le=65535), Allowed("a port number from 1 to 65535")]
Size = Annotated[int, _NoBool, BeforeValidator(_size_to_bytes), Field(ge=1), Allowed("a size such as 4GiB, or bytes")]
Machine = Annotated[str, Field(pattern=r"^[^\s:]+:\d+$"), Allowed("'host:device', e.g. 'localhost:0'")]
PerStage = Annotated[
    list[Natural],
    BeforeValidator(_stages_to_list),
    Allowed("a list with one whole number of at least 0 per stage, or a mapping from every stage to one"),
]

_PLAIN: dict[object, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
    type(None): "null",
}


def describe_field(field: FieldInfo) -> str:
    """Say in words what a field takes."""
    return describe_type(field.annotation, field.metadata)


def describe_type(annotation: Any, metadata: Sequence[object] = ()) -> str:
    """Say in words what a type annotation takes; an `Allowed` in its metadata has the last word."""
    for item in metadata:
        if isinstance(item, Allowed):
            return item.text
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return describe_type(arguments[0], arguments[1:])
    if origin is Literal:
        return "one of " + ", ".join(show(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return ", or ".join(describe_type(argument) for argument in arguments)
    if origin is list:
        return f"a list (each entry: {describe_type(arguments[0])})"
    if origin is tuple:
        return f"a list of {len(arguments)} (each entry: {describe_type(arguments[0])})"
    return "a mapping" if origin is dict else _PLAIN[annotation]


def show(value: object, width: int = 80) -> str:
    """Write a value as the user would in YAML, cut to `width` characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = f"'{value}'" if isinstance(value, Path) else repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."
