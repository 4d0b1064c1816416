"""All ranks compare what they are about to do before they do it."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist

from vpipe.errors import ConfigError
from vpipe.runtime.wait import telling_losses

__all__ = ["agree"]


def agree(facts: Mapping[str, object], group: dist.ProcessGroup | None) -> None:
    """Check that every rank of `group` has the same `facts`; collective. None means one process.

    Raises:
        ConfigError: they differ; raised on every rank, naming the fact and who has what.
    """
    if group is None:
        return
    mine = {name: str(value) for name, value in facts.items()}
    everyone: list[dict[str, str]] = [{} for _ in range(dist.get_world_size(group))]
    with telling_losses("all ranks to compare their plans"):
        dist.all_gather_object(everyone, mine, group=group)
    for name in mine:
        holders: dict[str, list[int]] = {}
        for rank, theirs in enumerate(everyone):
            holders.setdefault(theirs.get(name, "nothing"), []).append(rank)
        if len(holders) > 1:
            rows = "; ".join(f"rank {', '.join(map(str, ranks))}: {value}" for value, ranks in holders.items())
            raise ConfigError(
                f"ranks do not agree on the {name}: {rows}. Start all ranks with the same code, configuration and data"
            )
