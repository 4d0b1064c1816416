"""What two ranks do that do not call the same, or not as quickly: functions of `CASES` run in both, in turn.

Each has a world of its own, as some end with connections that are closed.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from flat_pipeline import flat_pipeline
from torch import Tensor
from toy_models import MODELS, make_batch

from vpipe.errors import VPipeError
from vpipe.runtime.comm.waits import lookout, verdict
from vpipe.runtime.comm.world import World
from vpipe.runtime.pipeline import Pipeline

RANK = int(os.environ.get("RANK", "0"))
LATE_SECONDS = 2.5


def build(world: World, **options: Any) -> Pipeline:
    usual = {"optimizer": partial(torch.optim.SGD, lr=0.1), "num_microbatches": 2, "partition": [3, 4]}
    return flat_pipeline(MODELS["plain"](), world=world, **(usual | options))


def batch(number: int = 0, size: int = 4) -> dict[str, Tensor]:
    return make_batch(MODELS["plain"](), number, size)


def trained(world: World, num_steps: int = 3, **options: Any) -> Pipeline:
    """Make a pipeline whose next step compares no batches, so that its first wait is for a message."""
    pipeline = build(world, **options)
    for number in range(num_steps):
        pipeline.step(batch(number))
    return pipeline


def late_evaluation(world: World) -> dict[str, float]:
    pipeline = build(world)
    if RANK:
        time.sleep(LATE_SECONDS)
    return pipeline.evaluate([batch()])


def late_step(world: World) -> float:
    pipeline = trained(world)
    if RANK:
        time.sleep(LATE_SECONDS)
    return pipeline.step(batch()).loss


def late_data(world: World) -> list[float]:
    def batches() -> Iterator[Any]:
        for number in range(4):
            if RANK and number == 3:
                time.sleep(LATE_SECONDS)
            yield batch(number)

    return [result.loss for result in build(world).train(batches(), 4)]


def late_pipeline(world: World) -> None:
    if RANK:
        time.sleep(LATE_SECONDS)
    build(world)


def evaluate_against_step(world: World, **options: Any) -> None:
    pipeline = trained(world, **options)
    if RANK:
        pipeline.step(batch())
    else:
        pipeline.evaluate([batch()])


def compared_step_against_evaluate(world: World) -> None:
    pipeline = build(world)
    if RANK:
        pipeline.evaluate([batch()])
    else:
        pipeline.step(batch())


def step_against_close(world: World) -> None:
    pipeline = trained(world)
    if RANK:
        pipeline.close()
        time.sleep(1)  # with connections that are open
    else:
        pipeline.step(batch())


def fewer_batches(world: World, number: int) -> list[float]:
    """Train on one batch less on rank 1, which does other things then."""
    losses = [result.loss for result in build(world).train([batch(n) for n in range(number - RANK)])]
    if RANK:
        time.sleep(1)
    return losses


def fewer_batches_and_evaluate(world: World) -> None:
    pipeline = build(world)
    list(pipeline.train([batch(n) for n in range(4 - RANK)]))
    pipeline.evaluate([batch()])


def fewer_held_out(world: World, number: int) -> None:
    build(world).evaluate([batch(n) for n in range(number + 3 * RANK)])


def another_order(world: World) -> None:
    pipeline = build(world)
    for call in ("train", "evaluate") if RANK else ("evaluate", "train"):
        list(pipeline.train([batch(), batch()])) if call == "train" else pipeline.evaluate([batch()])


def steps_and_trains(world: World) -> list[float]:
    """Train on the same batches in other calls, which is no mistake."""
    pipeline, batches, losses = build(world), [batch(n) for n in range(6)], []
    for start, stop in pairwise([0, 1, 4, 6] if RANK else [0, 3, 4, 5, 6]):
        part = batches[start:stop]
        losses += [pipeline.step(part[0])] if stop - start == 1 else list(pipeline.train(part))
    return [result.loss for result in losses]


def caught_error(world: World) -> None:
    pipeline = trained(world)
    if RANK:
        for held in pipeline.held.values():
            held.stage.forward = None  # type: ignore[assignment]
    try:
        pipeline.step(batch())
    except TypeError:
        time.sleep(2)


WAYS = {"shared memory": True, "sockets": False}

CASES: dict[str, Callable[[World], Any]] = {
    "late_evaluation": late_evaluation,
    "late_step": late_step,
    "late_data": late_data,
    "late_pipeline": late_pipeline,
    "evaluate_against_step": evaluate_against_step,
    "evaluate_against_clipped_step": partial(evaluate_against_step, clip_grad_norm=0.1),
    "evaluate_against_asynchronous_step": partial(evaluate_against_step, schedule="pipedream", num_microbatches=1),
    "compared_step_against_evaluate": compared_step_against_evaluate,
    "step_against_close": step_against_close,
    "fewer_batches": partial(fewer_batches, number=4),
    "fewer_compared_batches": partial(fewer_batches, number=3),
    "fewer_batches_and_evaluate": fewer_batches_and_evaluate,
    "fewer_held_out": partial(fewer_held_out, number=2),
    "many_fewer_held_out": partial(fewer_held_out, number=16),
    "another_order": another_order,
    "steps_and_trains": steps_and_trains,
    "caught_error": caught_error,
}


class _Told(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def run_cases(arguments: Sequence[str]) -> None:
    """Run every case both ways; leave what each returned or raised, what was told, and how long it took."""
    lookout._LOOK_SECONDS, lookout._LONG_SECONDS, lookout._FIRST_WORD_SECONDS = 0.1, 0.3, 1.0
    verdict._LATE_SECONDS = 0.5
    dist.init_process_group("gloo")
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for way, shared_memory in WAYS.items():
        for name, case in CASES.items():
            told = _Told()
            logging.getLogger("vpipe").addHandler(told)
            world = World.join(timeout_seconds=60, shared_memory=shared_memory)
            dist.barrier()
            start, result = time.monotonic(), None
            try:
                result = case(world)
            except VPipeError as error:
                result = f"{type(error).__name__}: {error}"
            seconds = time.monotonic() - start
            logging.getLogger("vpipe").removeHandler(told)
            found[name, way] = {"result": result, "told": [line for line in told.lines if line.startswith("Rank")]}
            found[name, way]["seconds"] = seconds
            logging.warning("%s, %s: %s", name, way, found[name, way])
            dist.barrier()
    torch.save(found, Path(arguments[0]) / f"waits.{RANK}.pt")


def run_alone(arguments: Sequence[str]) -> None:
    """Make a step more on rank 0, the one of this number, as a script does that joined by its pipeline."""
    with flat_pipeline(
        MODELS["plain"](), optimizer=partial(torch.optim.SGD, lr=0.1), num_microbatches=2, partition=[3, 4]
    ) as pipeline:
        for number in range(int(arguments[0]) - RANK):
            pipeline.step(batch(number))


def run_chain(arguments: Sequence[str]) -> None:
    """Let the last of three ranks come late."""
    lookout._LOOK_SECONDS, lookout._LONG_SECONDS, lookout._FIRST_WORD_SECONDS = 0.1, 0.3, 1.0
    with World.join(timeout_seconds=60) as world:
        pipeline = trained(world, partition=[3, 2, 2])
        if RANK == 2:
            time.sleep(LATE_SECONDS)
        pipeline.step(batch())
