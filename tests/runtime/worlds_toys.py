"""Four ranks of one process group in several worlds, in turn and at once: these functions are started in each."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from flat_pipeline import flat_pipeline
from toy_models import MODELS, make_batch

from vpipe.errors import ConfigError
from vpipe.runtime.comm.world import World

# A model with tied weights makes more groups of torch than one without, one with clipping talks more.
CASES: dict[str, dict[str, Any]] = {
    "tied": {"model": "tied", "schedule": "1f1b", "clip_grad_norm": 0.05},
    "skipping": {"model": "skipping", "schedule": "gpipe", "clip_grad_norm": 0.05},
    "plain": {"model": "plain", "schedule": "zb-h1"},
}


def train(name: str, world: World) -> dict[str, Any]:
    options = dict(CASES[name])
    chain = MODELS[options.pop("model")]()
    pipeline = flat_pipeline(
        chain, optimizer=partial(torch.optim.SGD, lr=0.1), num_microbatches=4, world=world, seed=3, **options
    )
    losses = [result.loss for result in pipeline.train([make_batch(chain, number, 8) for number in range(3)])]
    losses.append(pipeline.evaluate([make_batch(chain, 9, 8)])["loss"])
    return {
        "losses": losses,
        "state": {key: value.clone() for key, value in pipeline.state_dict().items()},
        "position": world.position,
        "num_ranks": world.num_ranks,
    }


def run_worlds(arguments: Sequence[str]) -> None:
    """Train alone, in pairs at once, in all four, in other pairs, and in three of the four, with one process group."""
    folder = Path(arguments[0])
    dist.init_process_group("gloo")
    process = dist.get_rank()
    join = partial(World.join, timeout_seconds=60)
    found: list[tuple[str, dict[str, Any]]] = []
    with join(ranks=[process]) as alone:
        found += [(name, train(name, alone)) for name in CASES]
    own, name = ([0, 1], "tied") if process < 2 else ([2, 3], "skipping")
    with join(ranks=own) as pair:
        found += [(name, train(name, pair)), ("plain", train("plain", pair))]
        dist.barrier()  # of the caller, who has a process group of his own
    with join() as everyone:
        found += [(name, train(name, everyone)) for name in ("tied", "plain")]
    own, name = ([2, 0], "skipping") if process % 2 == 0 else ([3, 1], "plain")
    with join(ranks=own) as crossed:
        found.append((name, train(name, crossed)))
    if process != 1:
        with join(ranks=[3, 0, 2]) as three:
            found.append(("tied", train("tied", three)))
    with join() as everyone:
        found.append(("skipping", train("skipping", everyone)))
    dist.barrier()
    torch.save(found, folder / f"worlds.{process}.pt")
    dist.destroy_process_group()


def run_orders(arguments: Sequence[str]) -> None:
    """Give two ranks of three another order of the same world, then make groups as the caller of torch would."""
    folder = Path(arguments[0])
    dist.init_process_group("gloo")
    process = dist.get_rank()
    found = ""
    if process < 2:
        try:
            World.join(ranks=[0, 1] if process == 0 else [1, 0], timeout_seconds=30)
        except ConfigError as error:
            found = str(error)
        with World.join(ranks=[0, 1], timeout_seconds=30) as pair:
            pair.meet("each other")
    # Rank 2 knows nothing of the world of the others, and has fewer groups.
    group = dist.new_group([0, 2])
    if process != 1:
        total = torch.ones(1)
        dist.all_reduce(total, group=group)
        assert total.item() == 2
    with World.join(ranks=[2, 1, 0], timeout_seconds=30) as everyone:
        assert everyone.gather(process, "ranks") == [2, 1, 0]
    (folder / f"order.{process}").write_text(found)
    dist.barrier()
    dist.destroy_process_group()


def run_parts(arguments: Sequence[str]) -> None:
    """Join as two worlds without a process group of one's own: the first is done long before the second."""
    folder = Path(arguments[0])
    process = int(os.environ["RANK"])
    own = [0] if process == 0 else [2, 1]
    for turn in range(3):
        with World.join(ranks=own, timeout_seconds=30) as world:
            if process:
                time.sleep(1 if turn == 0 else 0)
            (folder / f"part.{turn}.{process}").write_text(str(world.gather(process, "ranks")))
    with World.join(timeout_seconds=30, device="cpu") as everyone:
        (folder / f"part.3.{process}").write_text(str(everyone.gather(process, "ranks")))
