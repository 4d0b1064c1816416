"""All ranks compare what they are about to do before they do it."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from vpipe.errors import ConfigError
from vpipe.runtime.comm.world import World

__all__ = ["agree", "agree_on_batch", "agree_on_weights", "checksum"]

logger = logging.getLogger(__name__)

_LARGEST_OF_PEOPLE = 1 << 40
"""Seeds that torch takes from the system are nearly always larger than this, those that somebody writes are not."""

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
    """Let the ranks of `world` begin with the same weights of a model that all of them hold; collective.

    Where no rank has seeded torch, which then draws other numbers in every process, all take those of rank 0.

    Raises:
        ConfigError: they have others although they did; raised on every rank, naming the first weight that differs and
            two ranks.
    """
    if world.num_ranks == 1:
        return
    mine = torch.initial_seed(), {name: checksum(tensor) for name, tensor in weights.items()}
    seeds, sums = zip(*world.gather(mine, _WHAT), strict=True)
    if all(item == sums[0] for item in sums):
        return
    other = [name for name in sums[0] if any(item.get(name) != sums[0][name] for item in sums)]
    is_unseeded = min(seeds) > _LARGEST_OF_PEOPLE and len(set(seeds)) == len(seeds)
    if is_unseeded and all(name in weights and 0 not in weights[name].stride() for name in other):
        _take_from_first({name: weights[name] for name in other}, world)
        return
    first, *others = sums
    for rank, theirs in enumerate(others, start=1):
        for name in first:
            if theirs.get(name) != first[name]:
                raise ConfigError(
                    f"rank 0 and rank {rank} were given different weights: '{name}' is not the same. Each rank trains "
                    "its part of the model that it was given, so make the same on all of them: draw it with the same "
                    "seed (torch.manual_seed), and read a checkpoint on every rank"
                )


def _take_from_first(weights: Mapping[str, Tensor], world: World) -> None:
    """Write the weights of rank 0 into those of all ranks."""
    if world.rank == 0:
        logger.warning(
            "Weights were drawn without a seed, which gives other ones on every rank: those of rank 0 are taken; "
            "torch.manual_seed makes them the same, and the run one that can be repeated"
        )
    for name, tensor in weights.items():
        sent = tensor.detach().cpu().contiguous()
        world.broadcast(sent.flatten().view(torch.uint8), 0, f"the weight '{name}' of rank 0")
        with torch.no_grad():
            tensor.copy_(sent)


def checksum(tensor: Tensor) -> int:
    """Return a number that is the same for equal tensors, and nearly always another one for others."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg()
    plain = plain.to_dense() if plain.layout is not torch.strided else plain
    return zlib.crc32(plain.contiguous().flatten().view(torch.uint8).numpy().data)
