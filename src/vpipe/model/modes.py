"""Modules as they are in an evaluation, for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluating"]


@contextmanager
def evaluating(modules: Iterable[nn.Module], *, calling: bool = False) -> Iterator[None]:
    """Switch dropout off and running statistics on; afterwards every part is in the mode that it was in.

    With `calling` parts whose class has a `train` or `eval` of its own are told by these, too: they may do more than to
    note the mode, such as to merge weights.
    """
    modes = [(part, part.training) for module in modules for part in module.modules()]
    told = [(part, mode) for part, mode in modes if calling and _has_own_switch(part)]
    try:
        for part, _ in modes:
            part.training = False
        for part, _ in told:
            part.eval()
        yield
    finally:
        for part, mode in told:
            part.train(mode)
        for part, mode in modes:
            part.training = mode


def _has_own_switch(part: nn.Module) -> bool:
    return type(part).train is not nn.Module.train or type(part).eval is not nn.Module.eval
