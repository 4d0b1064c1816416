"""What modules keep in plain attributes, such as a count of their calls: one for all versions of a stage's weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["PlainState", "written_to"]

_OF_TORCH = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, complex, str, bytes, list, tuple, dict, set, Tensor)


class PlainState:
    """Carries what forwards have bound to attributes from the modules of one version to those of another.

    `sets` are the modules of each, alike, and grow. Nothing is carried until some attribute is seen to have changed,
    which is looked for when a set is added, and by `look`.
    """

    def __init__(self, sets: Sequence[nn.ModuleList]) -> None:
        self._sets = sets
        self._latest = 0
        self._begun = _attributes(sets[0])
        self._moving: list[tuple[int, str]] = []

    def look(self) -> None:
        """Look for attributes that forwards have changed."""
        now = _attributes(self._sets[self._latest])
        self._moving = [
            (place, name)
            for place, (before, after) in enumerate(zip(self._begun, now, strict=True))
            for name in after
            if name not in before or before[name] is not after[name]
        ]

    def enter(self, index: int) -> None:
        """Say that the next forward is that of a set, which goes on from where the latest one has ended."""
        if self._moving and index != self._latest:
            source, target = (list(self._sets[place].modules()) for place in (self._latest, index))
            for place, name in self._moving:
                setattr(target[place], name, getattr(source[place], name))
        self._latest = index


def _attributes(modules: nn.ModuleList) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in vars(part).items() if name not in _OF_TORCH and _is_plain(value)}
        for part in modules.modules()
    ]


def _is_plain(value: Any) -> bool:
    """Tell whether a value is of the kinds that state is kept in, and holds no part of which each version has its own.

    Such parts are modules, weights, and methods, which a scripted module binds when it is called first.
    """
    if type(value).__module__ == "numpy":
        return True
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    return (value is None or (isinstance(value, _PLAIN) and not isinstance(value, nn.Parameter))) and not any(
        isinstance(item, nn.Module | nn.Parameter) or callable(item) for item in items
    )


def written_to(modules: nn.Module) -> Iterator[object]:
    """Yield what modules keep and may write to in place, which copies of them share: lists, dictionaries, tensors."""
    for part in modules.modules():
        for name, value in vars(part).items():
            if name not in _OF_TORCH and isinstance(value, list | dict | set | Tensor) and _is_plain(value):
                yield value
