"""Values that are more than a tensor: dictionaries, lists, tuples, dataclasses, and what else torch's pytrees know.

What crosses a cut is tensors. A nested value is taken apart in front of it and put together behind it; that it is put
together in the same way for every microbatch, and what stands in it beside tensors, is known from shape inference.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vpipe.errors import ModelError

__all__ = ["Nest", "map_tensors", "take_apart", "tensors_of"]

_PLAIN = (bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, torch.Size, slice, range, type)


@dataclass(frozen=True)
class Nest:
    """How a value is put together of tensors, which are called `names`, in their order."""

    names: tuple[str, ...]
    form: Any

    def put_together(self, tensors: Mapping[str, Tensor]) -> Any:
        """Return the value of which `tensors` are the parts."""
        return _close(self.form, iter([tensors[name] for name in self.names]))

    def __str__(self) -> str:
        return _text(self.form)


@dataclass(frozen=True)
class _Node:
    """A container: what makes it of its items, which is equal for equal containers, and the forms of these."""

    kind: Any
    items: tuple[Any, ...]


class _Registered(NamedTuple):
    """A type that torch knows, and what it needs beside its items."""

    type: type
    context: Any


class _Attributes(NamedTuple):
    """A dataclass, and its fields."""

    type: type
    names: tuple[str, ...]


@dataclass(frozen=True)
class _Constant:
    value: Any


_TENSOR = "a tensor"


def take_apart(name: str, value: Any) -> tuple[dict[str, Tensor], Nest | None]:
    """Return the tensors of the value called `name`, by names of their own, and how it is put together of them.

    A tensor has no nest.

    Raises:
        ModelError: there is something in it that is neither a tensor nor a plain constant.
    """
    if isinstance(value, Tensor):
        return {name: value}, None
    tensors: dict[str, Tensor] = {}
    form = _open(name, value, tensors)
    return tensors, Nest(tuple(tensors), form)


def _open(path: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value
        return _TENSOR
    if (opened := _items(value)) is not None:
        kind, items = opened
        return _Node(kind, tuple(_open(path + step, item, tensors) for step, item in items))
    if value is None or isinstance(value, _PLAIN) or callable(value):
        return _Constant(value)
    raise ModelError(
        f"'{path}' is of type {type(value).__name__} where it crosses a cut; what crosses is tensors and None, numbers "
        "and words in dictionaries, lists, tuples, dataclasses and types that torch.utils._pytree knows: hand one of "
        "these on, or cut somewhere else"
    )


def _items(value: Any) -> tuple[Any, list[tuple[str, Any]]] | None:
    """Return what makes such a container, and its items, each with its place; None for what is no container."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value), [(f".{name}", item) for name, item in zip(value._fields, value, strict=True)]
    if is_dataclass(value) and not isinstance(value, type) and type(value) not in pytree.SUPPORTED_NODES:
        names = tuple(item.name for item in fields(value) if hasattr(value, item.name))
        return _Attributes(type(value), names), [(f".{name}", getattr(value, name)) for name in names]
    if (node := pytree.SUPPORTED_NODES.get(type(value))) is None:
        return None
    # Not torch's own functions for trees: they leave cycles, which hold the tensors until they are collected.
    if node.flatten_with_keys_fn is None:
        items, context = node.flatten_fn(value)
        return _Registered(type(value), context), [(f"[{place}]", item) for place, item in enumerate(items)]
    named, context = node.flatten_with_keys_fn(value)
    return _Registered(type(value), context), [(pytree.keystr((key,)), item) for key, item in named]


def _close(form: Any, tensors: Iterator[Any]) -> Any:
    if isinstance(form, _Constant):
        return form.value
    if not isinstance(form, _Node):
        return next(tensors)
    items = [_close(item, tensors) for item in form.items]
    return _made(form.kind, items)


def _made(kind: Any, items: Sequence[Any]) -> Any:
    if isinstance(kind, _Registered):
        return pytree.SUPPORTED_NODES[kind.type].unflatten_fn(list(items), kind.context)
    if not isinstance(kind, _Attributes):
        return kind(*items)  # a namedtuple's
    made: Any = object.__new__(kind.type)
    for name, item in zip(kind.names, items, strict=True):
        object.__setattr__(made, name, item)  # also of a frozen dataclass
    return made


def _text(form: Any) -> str:
    """Show a form; it reads the same in every process."""
    if isinstance(form, _Constant):
        return form.value.__qualname__ if hasattr(form.value, "__qualname__") else repr(form.value)
    if not isinstance(form, _Node):
        return _TENSOR
    kind, items = form.kind, [_text(item) for item in form.items]
    if isinstance(kind, _Attributes):
        return f"{kind.type.__name__}({', '.join(map('{}={}'.format, kind.names, items))})"
    if not isinstance(kind, _Registered):
        return f"{kind.__name__}({', '.join(map('{}={}'.format, kind._fields, items))})"
    if kind.type is dict:
        return f"{{{', '.join(map('{!r}: {}'.format, kind.context, items))}}}"
    inside = ", ".join(items)
    if kind.type in (list, tuple):
        return f"[{inside}]" if kind.type is list else f"({inside})"
    return f"{kind.type.__name__}({kind.context}, {inside})"


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return `value` with `function` of each tensor in it; what is no container is the same object."""
    if isinstance(value, Tensor):
        return function(value)
    if value is None:
        return None
    if (opened := _items(value)) is None:
        return value
    kind, items = opened
    return _made(kind, [map_tensors(function, item) for _, item in items])


def tensors_of(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value."""
    if isinstance(values, Tensor):
        yield values
    elif type(values) in (tuple, list, dict):  # as below, and quicker
        for item in values.values() if type(values) is dict else values:
            yield from (item,) if isinstance(item, Tensor) else tensors_of(item)
    elif (opened := _items(values)) is not None:
        for _, item in opened[1]:
            yield from tensors_of(item)
