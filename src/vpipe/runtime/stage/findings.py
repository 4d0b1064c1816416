"""What is found out about the blocks of a stage while they run: some have to be run otherwise than others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from vpipe.errors import ModelError
from vpipe.model.rng import seeding_others
from vpipe.runtime.stage.state import ChangingState

__all__ = ["Findings", "RunAgain", "are_hooks_refused", "telling_refused_hooks"]


T = TypeVar("T")


class RunAgain(Exception):
    """Ends a forward that has to run once more, now that it is known how a block of it has to be run."""


class Findings:
    """What is known of the blocks of a stage, by their index in the chain."""

    def __init__(self) -> None:
        self.whole: set[int] = set()
        """Those whose backward is not split: they differentiate their own gradients, and that graph would be another
        one."""
        self.unseen: set[int] = set()
        """Those of which no saved tensor can be seen: they use function transforms, where torch allows no hooks."""
        self._draws: dict[tuple[int, bool], bool] = {}
        self._state: dict[int, ChangingState] = {}
        self.may_repeat = False
        """Whether a forward may end with `RunAgain`."""

    def run_seeded(
        self, block: int, seed_of: Callable[[int], int], module: nn.Module | None, call: Callable[[], T]
    ) -> T:
        """Run what belongs to a block with `random` and numpy under its seed, unless it is known to draw nothing there.

        That is found out when it runs for the first time in training, and in evaluation. The state of both is as before
        afterwards: what a loader draws is the same on ranks that run other blocks.
        """
        if self.draws_nothing(block, module):
            return call()
        key = block, _trains(module)
        with seeding_others(seed_of(block)) as was_drawn:
            result = call()
            if key not in self._draws:
                self._draws[key] = was_drawn()
        return result

    def draws_nothing(self, block: int, module: nn.Module | None) -> bool:
        """Tell whether a block is known to draw nothing from `random` and numpy in the mode that `module` is in."""
        return self._draws.get((block, _trains(module))) is False

    def state_of(self, block: int, name: str) -> ChangingState:
        """Return what is known of the state of a block called `name`."""
        return self._state.setdefault(block, ChangingState(name))

    def add(self, blocks: set[int], block: int) -> None:
        """Enter a block into one of these sets; what runs now goes on as it is if it cannot be repeated.

        Raises:
            RunAgain: it can.
        """
        blocks.add(block)
        if self.may_repeat:
            raise RunAgain


def _trains(module: nn.Module | None) -> bool:
    # A block in evaluation mode may have parts in training mode, which a training alone switches on.
    return module is None or module.training or torch.is_grad_enabled()


def are_hooks_refused(error: RuntimeError) -> bool:
    """Tell whether torch refuses hooks for saved tensors, as it does inside of function transforms."""
    return "saved tensor hooks" in str(error)


@contextmanager
def telling_refused_hooks(name: str, what: str) -> Iterator[None]:
    """Say in the user's words why the block called `name` cannot be what it is planned to be.

    Raises:
        ModelError: torch refuses hooks; the text says `what` cannot be done with the block.
    """
    try:
        yield
    except RuntimeError as error:
        if are_hooks_refused(error):
            raise ModelError(
                f"block '{name}' uses a transform of torch.func, inside of which torch does not tell what it saves, so "
                f"its activations cannot be {what}; let it keep them"
            ) from error
        raise
