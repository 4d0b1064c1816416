"""A user's own data are the same on all ranks: each reads its own fields, so nothing later would show a difference."""

from __future__ import annotations

from vpipe.data.source import BatchSource
from vpipe.runtime.comm.agreement import agree, checksum
from vpipe.runtime.comm.world import World
from vpipe.workload.setup import Setup

__all__ = ["agree_on_data"]

_NUM_SAMPLES = 4


def agree_on_data(setup: Setup, world: World) -> None:
    """Check that all ranks of `world` got the same first samples from a user's function, in all fields; collective.

    What VPipe prepared or draws itself needs no check.

    Raises:
        ConfigError: they differ; raised on every rank, naming the field and who has what.
    """
    if setup.config.data.type != "custom":
        return
    sources = {"training data": setup.source, "held-out data": setup.held_out}
    facts = {
        f"field '{name}' of the {what} (data.entry must seed every generator that it makes)": description
        for what, source in sources.items()
        if source is not None
        for name, description in _describe(source).items()
    }
    agree(facts, world)


def _describe(source: BatchSource) -> dict[str, str]:
    first = source.batch(range(min(_NUM_SAMPLES, source.num_samples)), tuple(source.fields))
    return {
        name: f"{source.num_samples} samples, checksum {checksum(tensor):08x} of the first {len(tensor)}"
        for name, tensor in first.items()
    }
