"""One row's training, in a pipeline and in the plain loop, on the same batches."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from benchmarks.equality.loop import Loop, Result, digest
from benchmarks.equality.losses import TwoParts
from benchmarks.equality.models import MODELS, Model
from benchmarks.equality.options import OPTIMIZERS, UPDATES, warmup
from benchmarks.equality.rows import FLOATS, Row
from torch import Tensor, nn

from vpipe.errors import NonFiniteLossError
from vpipe.model.block import Block
from vpipe.model.chain import Chain
from vpipe.model.loss import CallableLoss, Loss
from vpipe.runtime.comm.world import World
from vpipe.runtime.hooks import Hooks
from vpipe.runtime.pipeline import Pipeline
from vpipe.runtime.weights.update import Update

__all__ = ["differences", "train_loop", "train_pipeline"]

SEED = 11
HELD_OUT = (5, 4, 1)
"""Samples of the held-out batches."""

Batch = dict[str, Tensor]


def batches_of(row: Row) -> tuple[list[list[Batch]], list[Batch]]:
    """Return the batches of every call of training, and the held-out ones."""
    model, update = MODELS[row.model], UPDATES[row.update]
    made = [_batch(model, number, row.num_microbatches * row.rows) for number in range(3)]
    if update.has_nan:
        name = next(name for name in made[1] if name in FLOATS)
        made[1][name][-1, 0, 0] = float("nan")
    stops = update.has_nan and update.on_non_finite == "stop"
    calls = [[item] for item in made] if stops else [made[:2], made[2:]]
    return calls, [_batch(model, 50 + number, size) for number, size in enumerate(HELD_OUT)]


def _batch(model: Model, number: int, size: int) -> Batch:
    return model.batch(torch.Generator().manual_seed(100 + number), size)


def train_loop(row: Row) -> Result:
    """Train in the plain loop."""
    update = UPDATES[row.update]
    loop = Loop(
        MODELS[row.model].task(),
        OPTIMIZERS[row.optimizer],
        row.num_microbatches,
        seed=SEED,
        delays=row.delays(),
        clip=update.clip,
        learning_rate=warmup if update.schedules_rate else None,
        skips=update.on_non_finite == "skip",
        measures=update.measures,
    )
    calls, held_out = batches_of(row)
    for batches in calls:
        loop.train(batches)
        loop.evaluate(held_out, row.evaluated)
    return loop.finish()


def train_pipeline(row: Row) -> tuple[Result, int]:
    """Train in a pipeline, as one of its ranks; return what all ranks computed, and the bytes that they moved."""
    model, update = MODELS[row.model], UPDATES[row.update]
    given, loss = _given(model)
    calls, held_out = batches_of(row)
    result = Result()
    per_update = 0 if (delays := row.delays()) is None else delays.per_update
    num_done = 0

    def keep(stage: int, microbatch: int, named: Mapping[str, Tensor]) -> None:
        first = num_done if not per_update else num_done * row.num_microbatches // per_update
        number = first + (len(result.losses) - num_done if not per_update else microbatch // per_update)
        result.gradients.update({f"update {number}: {name}": digest(item) for name, item in named.items()})

    with World.join(shared_memory=row.shared_memory, timeout_seconds=60) as world:
        pipeline = Pipeline(
            given,
            loss,
            plan=row.plan(),
            optimizer=OPTIMIZERS[row.optimizer],
            update=Update(
                clip_grad_norm=update.clip,
                learning_rate=warmup if update.schedules_rate else None,
                on_non_finite="skip" if update.on_non_finite == "skip" else "stop",
                measure_norm=update.measures,
            ),
            world=world,
            seed=SEED,
            hooks=Hooks(gradients=keep),
        )
        with pipeline:
            for batches in calls:
                _train(pipeline, batches, result)
                num_done += len(batches)
                means = pipeline.evaluate(held_out, row.evaluated)
                result.evaluations.append([means[part] for part in pipeline.chain.loss.parts])
            result.state = {name: digest(item) for name, item in pipeline.state_dict().items()}
            moved = 0 if pipeline.host_link is None else pipeline.host_link.bytes_offloaded
            found = world.gather((result, moved), "what all ranks computed")
    return _joined([item for item, _ in found], row.is_synchronous), sum(number for _, number in found)


def _train(pipeline: Pipeline, batches: list[Batch], result: Result) -> None:
    try:
        for step in pipeline.train(batches, len(batches)):
            result.losses.append(list(step.parts.values()))
            result.norms.append([step.gradient_norm])
            result.skipped.append([step.num_skipped])
    except NonFiniteLossError:
        result.losses.append([])
        result.norms.append([])
        result.skipped.append([])


def _joined(ranks: list[Result], is_synchronous: bool) -> Result:
    first, own = ranks[0], ranks[:1] if is_synchronous else ranks
    return Result(
        first.losses,
        [[number for rank in own for number in rank.norms[index]] for index in range(len(first.norms))],
        [[number for rank in own for number in rank.skipped[index]] for index in range(len(first.skipped))],
        first.evaluations,
        {name: item for rank in ranks for name, item in rank.gradients.items()},
        {name: item for rank in ranks for name, item in rank.state.items()},
    )


def _given(model: Model) -> tuple[nn.Sequential | Chain, Loss | Any]:
    """Return the model and the loss as a user gives them to a pipeline."""
    task = model.task()
    loss = task.ending if task.ending is not None else model.loss()
    if isinstance(task.model, nn.Sequential):
        return task.model, CallableLoss(loss, **model.said) if model.said else loss
    wires = model.wires_of(task.model)
    blocks = tuple(
        Block(name, _copies_of(task.model.get_submodule(name)), inputs, outputs) for name, inputs, outputs in wires
    )
    if not isinstance(loss, TwoParts):
        loss = CallableLoss(loss, (wires[-1][2][-1], "target"))
    return Chain(blocks, model.fields, loss, whole_fields=model.whole), None


def _copies_of(module: nn.Module) -> Any:
    return lambda: copy.deepcopy(module)


def differences(found: Result, expected: Result) -> list[str]:
    """Name everything that has other bits."""
    one, other = _flat(found), _flat(expected)
    return [
        f"{name}: {one.get(name, 'missing')} instead of {other.get(name, 'nothing')}"
        for name in dict.fromkeys((*other, *one))
        if one.get(name) != other.get(name)
    ]


def _flat(result: Result) -> dict[str, str]:
    """Return all numbers by name, as text that is equal where their bits are."""
    flat: dict[str, str] = {}
    for kind, values in asdict(result).items():
        if isinstance(values, dict):
            flat.update({f"{kind}, {name}": item for name, item in values.items()})
        else:
            flat.update({f"{kind}, {index}": " ".join(map(_text, item)) for index, item in enumerate(values)})
    return flat


def _text(number: float | None) -> str:
    return "none" if number is None else float(number).hex()
