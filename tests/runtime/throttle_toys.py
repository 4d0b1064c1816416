"""Two ranks that train over slow links and over ordinary ones: `run_both` is started in each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from flat_pipeline import flat_pipeline
from toy_models import MODELS, make_batch

from vpipe.runtime.comm.throttle import SlowLink, emulate_slow_links
from vpipe.runtime.comm.world import World


def run_both(arguments: Sequence[str]) -> None:
    with World.join(timeout_seconds=60.0, backend="gloo") as group:
        found = {schedule: [train(schedule, link) for link in (None, SLOW)] for schedule in ("1f1b", "pipedream")}
        torch.save(found, Path(arguments[0]) / f"slow.{group.rank}.pt")


SLOW = SlowLink(latency_ms=2.0, bandwidth_bytes_per_ms=100.0)


def train(schedule: str, link: SlowLink | None) -> tuple[list[float], list[torch.Tensor]]:
    chain = MODELS["plain"]()
    pipeline = flat_pipeline(
        chain,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        schedule=schedule,
        num_microbatches=4,
        partition=[3, 4],
    )
    if link is not None:
        emulate_slow_links(pipeline.transport, link)
    losses = [result.loss for result in pipeline.train([make_batch(chain, number, 8) for number in range(3)])]
    return losses, [tensor.clone() for tensor in pipeline.state_dict().values()]
