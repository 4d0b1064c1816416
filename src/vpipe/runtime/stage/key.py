"""What the random numbers of a microbatch depend on."""

from __future__ import annotations

from dataclasses import dataclass, field

from vpipe.model.rng import derive_seeds, seed_everything

__all__ = ["MicrobatchKey"]


@dataclass(frozen=True)
class MicrobatchKey:
    """Where in the training a microbatch is: everything its random numbers depend on, besides the block."""

    seed: int
    iteration: int
    microbatch: int
    _seeds: dict[int, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def seed_of(self, block: int) -> int:
        """Return the seed of a block; what comes after the last one is the loss."""
        if block not in self._seeds:
            self.prepare(range(block, block + 1))
        return self._seeds[block]

    def prepare(self, blocks: range) -> None:
        """Derive the seeds of `blocks` ahead of their use, while there is nothing else to do."""
        place = self.seed, "dropout", self.iteration, self.microbatch
        self._seeds.update(zip(blocks, derive_seeds(*place, last=blocks), strict=True))

    def seed_block(self, block: int) -> None:
        """Set the random state in which `block` runs for this microbatch."""
        seed_everything(self.seed_of(block))
