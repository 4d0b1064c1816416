"""A model whose weights are frozen and trained again by turns: what one process and two ranks make of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from flat_pipeline import flat_pipeline
from torch import Tensor, nn

from vpipe.errors import VPipeError
from vpipe.model.chain import Chain
from vpipe.model.loss import CallableLoss
from vpipe.runtime.comm.world import World
from vpipe.runtime.pipeline import Pipeline

WIDTH = 6
TURNS: list[tuple[list[str], list[str]]] = [
    (["0", "1", "2", "3"], []),
    ([], ["2"]),
    (["4.weight"], ["0", "2.1.bias"]),
    (["2.1"], ["4", "1"]),
    (["0", "1", "2", "3", "4"], []),
    ([], ["0", "1", "2", "3", "4"]),
]
"""What is frozen and what is trained again, before each turn of training."""
OPTIONS: dict[str, dict[str, Any]] = {
    "1f1b": {"partition": [2, 3]},
    "gpipe": {"schedule": "gpipe", "recompute_ratio": 1.0, "partition": [2, 3], "clip_grad_norm": 0.1},
    "zb-h1": {"schedule": "zb-h1", "partition": [3, 2]},
    "zb-v": {"schedule": "zb-v", "partition": [1, 1, 1, 2]},
    "pipedream": {"schedule": "pipedream", "partition": [2, 3]},
    "moved": {"schedule": "pipedream", "partition": [2, 3], "swap_versions": True, "recompute_ratio": 1.0},
    "macrobatch": {"schedule": "pipedream", "partition": [3, 2], "macrobatch": True},
}


def modules() -> nn.Sequential:
    torch.manual_seed(1)
    inner = nn.Sequential(nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2))
    norm = nn.BatchNorm1d(WIDTH)
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), inner, nn.Sequential(norm), nn.Linear(WIDTH, WIDTH)
    )


def chain() -> Chain:
    return Chain.from_modules(modules(), CallableLoss(nn.functional.mse_loss))


def batches(turn: int) -> list[tuple[Tensor, Tensor]]:
    made = []
    for seed in range(2 * turn, 2 * turn + 2):
        generator = torch.Generator().manual_seed(seed)
        made.append((torch.randn(8, WIDTH, generator=generator), torch.randn(8, WIDTH, generator=generator)))
    return made


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1)


def pipeline_of(**options: Any) -> Pipeline:
    return flat_pipeline(chain(), optimizer=adamw, num_microbatches=4, **options)


def by_turns(pipeline: Pipeline) -> dict[str, Any]:
    found: dict[str, Any] = {"losses": [], "held_out": [], "states": [], "frozen": []}
    for turn, (freeze, unfreeze) in enumerate(TURNS):
        pipeline.freeze(freeze)
        found["frozen"].append(pipeline.unfreeze(unfreeze))
        found["losses"] += [result.loss for result in pipeline.train(batches(turn))]
        found["held_out"].append(pipeline.evaluate(batches(turn), 2)["loss"])
        found["states"].append(pipeline.state_dict())
    return found


def run_freezing(arguments: Sequence[str]) -> None:
    """Train by turns in two ranks, and freeze other weights on each."""
    folder, found = Path(arguments[0]), {}
    with World.join(timeout_seconds=60) as world:
        for name, options in OPTIONS.items():
            found[name] = by_turns(pipeline_of(world=world, **options))
        try:
            pipeline_of(world=world).freeze(str(world.rank))
        except VPipeError as error:
            found["told"] = {"text": str(error)}
    torch.save(found, folder / f"freezing.{world.rank}.pt")
