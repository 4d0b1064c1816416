"""All ranks compare what they are about to do before they do it."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist

from vpipe.errors import ConfigError

__all__ = ["agree"]


def agree(facts: Mapping[str, object], group: dist.ProcessGroup | None) -> None:
    """Check that every rank has the same `facts`; collective.

    Raises:
        ConfigError: they differ; raised on every rank, naming the fact and who has what.
    """
    if group is None:
        return
    mine = {name: str(value) for name, value in facts.items()}
    everyone: list[dict[str, str]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(everyone, mine, group=group)
    for name in mine:
        values = [theirs.get(name, "(nothing)") for theirs in everyone]
        if len(set(values)) > 1:
            rows = "; ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
            raise ConfigError(
                f"ranks do not agree on the {name}: {rows}. Start all ranks with the same code and configuration"
            )
