"""The reference of all keys, made from the docstrings under the fields."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from pydantic.fields import FieldInfo

from vpipe.config.fields import describe_field, show
from vpipe.config.original.flat import DIRECT, IGNORED, MEANT
from vpipe.config.problems import sections
from vpipe.config.run import RunConfig

__all__ = ["reference_lines"]


def reference_lines(width: int = 100) -> list[str]:
    """Return the reference of every native key, then of the original's flat keys, wrapped to `width`."""
    kinds = sections()
    lines: list[str] = []
    for name, field in RunConfig.model_fields.items():
        if name not in kinds:
            lines += _entry(name, field, width)
            continue
        lines += ["", f"{name}: {_plain(field.description)}"]
        for key, inner in kinds[name].model_fields.items():
            lines += _entry(f"{name}.{key}", inner, width)
    return [*lines, "", "Flat keys, as in the original:", *_flat_lines()]


def _entry(key: str, field: FieldInfo, width: int) -> Iterator[str]:
    default = field.get_default(call_default_factory=True)
    yield f"  {key}: {show(list(default) if isinstance(default, tuple) else default)}"
    wrapped = textwrap.TextWrapper(width, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)
    yield from wrapped.wrap(_plain(field.description))
    yield from wrapped.wrap(f"({describe_field(field)})")


def _flat_lines() -> Iterator[str]:
    for key, meaning in {**MEANT, **DIRECT}.items():
        yield f"  {key}: {meaning}"
    for key, instead in IGNORED.items():
        yield f"  {key}: ignored; {instead}"


def _plain(description: str | None) -> str:
    """Put a docstring on one line."""
    return " ".join((description or "").split())
