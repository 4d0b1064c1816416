"""What a second run of a block needs of its state: what the first run met, where that has been changed since.

State is buffers, and the tensors and plain values that modules have as attributes. What they keep elsewhere, such as in
lists, dictionaries, or outside of modules, cannot be seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vpipe.errors import ModelError

__all__ = ["ChangingState", "Place", "Snapshot", "meeting"]

Place = tuple[str, str]
"""A module's path, and the name of its buffer or attribute."""

_SMALL_BYTES = 4096
"""Tensors up to this size are always kept until it is known that a forward left them alone: that takes no time."""
_PLAIN = (int, float, complex, bool, str, type(None))
_ABSENT = object()


class ChangingState:
    """The state of a block that its forwards change, found out with the first one.

    Of this alone a forward leaves copies behind. A larger tensor that is changed later for the first time is told.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._changing: set[Place] | None = None
        self._made: set[Place] = set()
        """What the last forward made: from the next one it is known whether it is changed ever again."""
        self._has_tensors = False

    @contextmanager
    def keeping(self, module: nn.Module, kept: dict[Place, Any]) -> Iterator[None]:
        """Put into `kept` what a first run met where it changes it; while it runs, where it may change it.

        Raises:
            ModelError: it changed a tensor that it never changed before, and that is too large to be kept every time.
        """
        is_first = self._changing is None
        if not (is_first or self._changing or self._has_tensors):
            yield
            return
        before = self._look(module, is_first)
        for place, (value, _) in before.items():
            if (
                is_first
                or place in (self._changing or ())
                or (isinstance(value, Tensor) and value.nbytes <= _SMALL_BYTES)
            ):
                kept[place] = value.detach().clone() if isinstance(value, Tensor) else value
        yield
        after = self._look(module, is_first)
        changed = {
            place
            for place, was in before.items()
            if _is_changed(was, after.get(place, (_ABSENT, 0)))
            # Batch norm's own update goes past autograd's version counter.
            or (is_first and isinstance(was[0], Tensor) and not _are_equal(was[0], kept[place]))
        }
        if unkept := sorted(changed - kept.keys()):
            raise ModelError(
                f"block '{self._name}' changed '{'.'.join(filter(None, unkept[0]))}' in this forward and in none "
                "before, so it cannot be computed again; let it keep its activations, or change that in every forward"
            )
        made = after.keys() - before.keys()
        self._changing = ((self._changing or set()) - (self._made - changed)) | changed | made
        self._made = made
        self._has_tensors = any(isinstance(value, Tensor) for value, _ in after.values())
        for place in kept.keys() - self._changing:
            del kept[place]
        kept.update(dict.fromkeys(made, _ABSENT))

    def _look(self, module: nn.Module, is_first: bool) -> dict[Place, tuple[Any, int]]:
        """Return state and versions; of plain values, after the first time, those that are known to change."""
        known = self._changing or ()
        return {
            place: (value, value._version if isinstance(value, Tensor) else 0)
            for place, _, value in _state(module)
            if is_first or isinstance(value, Tensor) or place in known
        }


def _is_changed(was: tuple[Any, int], now: tuple[Any, int]) -> bool:
    if isinstance(was[0], Tensor):
        return was[0] is not now[0] or was[1] != now[1]
    return type(was[0]) is not type(now[0]) or bool(was[0] != now[0])


def _are_equal(tensor: Tensor, value: Tensor) -> bool:
    return tensor.shape == value.shape and torch.equal(tensor, value)


def _state(module: nn.Module) -> Iterator[tuple[Place, MutableMapping[str, Any], Any]]:
    """Yield all places of state with the mapping that holds them, and what is there."""
    for path, part in module.named_modules():
        for name, buffer in part._buffers.items():
            if buffer is not None:
                yield (path, name), part._buffers, buffer
        for name, value in vars(part).items():
            if isinstance(value, (Tensor, *_PLAIN)):
                yield (path, name), part.__dict__, value


@contextmanager
def meeting(module: nn.Module, kept: Mapping[Place, Any]) -> Iterator[None]:
    """Let a run meet the state in `kept` as it was, and keep what it does to it to itself."""
    now: list[tuple[MutableMapping[str, Any], str, Any]] = []
    others: dict[int, Any] = {}
    for (path, name), value in kept.items():
        part = module.get_submodule(path)
        holder: MutableMapping[str, Any] = part._buffers if name in part._buffers else part.__dict__
        present = holder.get(name, _ABSENT)
        now.append((holder, name, present))
        if value is _ABSENT:
            holder.pop(name, None)
        elif isinstance(value, Tensor):
            # One tensor may have several names.
            known = others.setdefault(id(present), value.clone())
            holder[name] = known if isinstance(present, Tensor) else value.clone()
        else:
            holder[name] = value
    try:
        yield
    finally:
        for holder, name, present in now:
            if present is _ABSENT:
                holder.pop(name, None)
            else:
                holder[name] = present


class Snapshot:
    """All state of a module as it is when this is made."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._kept = [
            (place, holder, value, value.detach().clone() if isinstance(value, Tensor) else value)
            for place, holder, value in _state(module)
        ]

    @property
    def has_tensors(self) -> bool:
        """Tell whether there is more than plain values."""
        return any(isinstance(value, Tensor) for _, _, value, _ in self._kept)

    def restore(self) -> None:
        """Make it so again."""
        known = {place for place, *_ in self._kept}
        for place, holder, _ in list(_state(self._module)):
            if place not in known:
                del holder[place[1]]
        for (_, name), holder, value, copy in self._kept:
            holder[name] = value
            if isinstance(value, Tensor):
                # As batch norm's own update does, this goes past autograd's version counter.
                value.data.copy_(copy)
