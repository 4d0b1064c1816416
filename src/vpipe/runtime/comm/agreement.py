"""All ranks compare what they are about to do before they do it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from vpipe.errors import ConfigError
from vpipe.runtime.comm.world import World

__all__ = ["agree", "agree_on_batch", "agree_on_weights", "checksum"]

_WHAT = "all ranks to compare their plans"


def agree(facts: Mapping[str, object], world: World) -> None:
    """Check that every rank of `world` has the same `facts`; collective.

    Raises:
        ConfigError: they differ; raised on every rank, naming the fact and who has what.
    """
    mine = {name: str(value) for name, value in facts.items()}
    everyone = world.gather(mine, _WHAT)
    for name in mine:
        holders: dict[str, list[int]] = {}
        for rank, theirs in enumerate(everyone):
            holders.setdefault(theirs.get(name, "nothing"), []).append(rank)
        if len(holders) > 1:
            rows = "; ".join(f"rank {', '.join(map(str, ranks))}: {value}" for value, ranks in holders.items())
            raise ConfigError(
                f"ranks do not agree on the {name}: {rows}. Start all ranks with the same code, configuration and data"
            )


def agree_on_batch(fields: Mapping[str, Tensor], world: World) -> None:
    """Check that the ranks of `world` were given the same batch, in those fields that several have; collective.

    Raises:
        ConfigError: they were not; raised on every rank, naming the field and two ranks.
    """
    if world.num_ranks == 1:
        return
    sums = {name: checksum(tensor) for name, tensor in fields.items()}
    first: dict[str, tuple[int, int]] = {}
    for rank, theirs in enumerate(world.gather(sums, _WHAT)):
        for name, found in theirs.items():
            other, expected = first.setdefault(name, (rank, found))
            if found != expected:
                raise ConfigError(
                    f"rank {other} and rank {rank} were given different batches: the field '{name}' is not the same. "
                    "Every rank needs the same batches in the same order, so draw them with the same seed on all ranks "
                    "(torch.manual_seed); a rank may leave out fields that are not in its pipeline.fields"
                )


def agree_on_weights(weights: Mapping[str, Tensor], world: World) -> None:
    """Check that the ranks of `world` begin with the same weights of a model that all of them hold; collective.

    Raises:
        ConfigError: they do not; raised on every rank, naming the first weight that differs and two ranks.
    """
    if world.num_ranks == 1:
        return
    first, *others = world.gather({name: checksum(tensor) for name, tensor in weights.items()}, _WHAT)
    for rank, theirs in enumerate(others, start=1):
        for name in first:
            if theirs.get(name) != first[name]:
                raise ConfigError(
                    f"rank 0 and rank {rank} were given different weights: '{name}' is not the same. Each rank trains "
                    "its part of the model that it was given, so make the same on all of them: draw it with the same "
                    "seed (torch.manual_seed), and read a checkpoint on every rank"
                )


def checksum(tensor: Tensor) -> int:
    """Return a number that is the same for equal tensors, and nearly always another one for others."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg()
    plain = plain.to_dense() if plain.layout is not torch.strided else plain
    return zlib.crc32(plain.contiguous().flatten().view(torch.uint8).numpy().data)
