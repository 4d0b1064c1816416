"""All ranks compare what they are about to do before they do it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vpipe.errors import ConfigError
from vpipe.runtime.comm.wait import telling_losses

__all__ = ["agree", "agree_on_batch", "checksum"]

T = TypeVar("T")


def agree(facts: Mapping[str, object], group: dist.ProcessGroup | None) -> None:
    """Check that every rank of `group` has the same `facts`; collective. None means one process.

    Raises:
        ConfigError: they differ; raised on every rank, naming the fact and who has what.
    """
    if group is None:
        return
    mine = {name: str(value) for name, value in facts.items()}
    everyone = _gather(mine, group)
    for name in mine:
        holders: dict[str, list[int]] = {}
        for rank, theirs in enumerate(everyone):
            holders.setdefault(theirs.get(name, "nothing"), []).append(rank)
        if len(holders) > 1:
            rows = "; ".join(f"rank {', '.join(map(str, ranks))}: {value}" for value, ranks in holders.items())
            raise ConfigError(
                f"ranks do not agree on the {name}: {rows}. Start all ranks with the same code, configuration and data"
            )


def agree_on_batch(fields: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Check that the ranks of `group` were given the same batch, in those fields that several have; collective.

    Raises:
        ConfigError: they were not; raised on every rank, naming the field and two ranks.
    """
    if group is None:
        return
    first: dict[str, tuple[int, int]] = {}
    for rank, theirs in enumerate(_gather({name: checksum(tensor) for name, tensor in fields.items()}, group)):
        for name, found in theirs.items():
            other, expected = first.setdefault(name, (rank, found))
            if found != expected:
                raise ConfigError(
                    f"rank {other} and rank {rank} were given different batches: the field '{name}' is not the same. "
                    "Every rank needs the same batches in the same order, so draw them with the same seed on all ranks "
                    "(torch.manual_seed); a rank may leave out fields that are not in its pipeline.fields"
                )


def checksum(tensor: Tensor) -> int:
    """Return a number that is the same for equal tensors, and nearly always another one for others."""
    return zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _gather(mine: dict[str, T], group: dist.ProcessGroup) -> list[dict[str, T]]:
    everyone: list[dict[str, T]] = [{} for _ in range(dist.get_world_size(group))]
    with telling_losses("all ranks to compare their plans"):
        dist.all_gather_object(everyone, mine, group=group)
    return everyone
