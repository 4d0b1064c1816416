"""A schedule family as the registry knows it: its builder, its kind of result, and its options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from vpipe.schedule.schedule import Schedule

__all__ = ["Entry"]


@dataclass(frozen=True)
class Entry:
    """A schedule family: how to build it, whether its result is that of one process, and what it does in a sentence."""

    builder: Callable[..., Schedule]
    synchronous: bool
    summary: str
    notes: tuple[str, ...] = ()
    """What whoever chooses it should know: of a file, what is not in the schedule that was read from it."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """Name the builder's keyword parameters, `stages_per_rank` included where it has it."""
        parameters = inspect.signature(self.builder).parameters.values()
        return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)

    @property
    def options(self) -> tuple[str, ...]:
        """Name the builder's options."""
        return tuple(name for name in self.parameters if name != "stages_per_rank")

    @property
    def default_stages_per_rank(self) -> int:
        """Return how many stages a rank holds where nobody says; 1 where the builder would choose."""
        parameter = inspect.signature(self.builder).parameters.get("stages_per_rank")
        return 1 if parameter is None or parameter.default is None else int(parameter.default)
