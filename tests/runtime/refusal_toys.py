"""What two ranks do that disagree, go wrong or are left alone: functions of `CHECKS` run in both, in turn."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flat_pipeline import flat_pipeline
from torch import Tensor, nn
from toy_models import MODELS, WIDTH, make_batch

from vpipe.errors import DataError, VPipeError
from vpipe.model.chain import Chain
from vpipe.model.loss import CallableLoss
from vpipe.runtime import pipeline as front_door
from vpipe.runtime.batch import Batch
from vpipe.runtime.comm.transport import Transport
from vpipe.runtime.comm.world import World
from vpipe.runtime.pipeline import Pipeline

RANK = int(os.environ.get("RANK", "0"))
MSE = CallableLoss(nn.functional.mse_loss)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def build(model: Chain | None = None, **options: Any) -> Pipeline:
    chain = MODELS["plain"]() if model is None else model
    return flat_pipeline(chain, **({"optimizer": sgd, "num_microbatches": 2, "partition": [3, 4]} | options))


def batch(size: int = 4) -> dict[str, Tensor]:
    return make_batch(MODELS["plain"](), 0, size)


def other_partition() -> None:
    build(partition=[3, 4] if RANK else [4, 3])


def other_seed() -> None:
    build(seed=RANK)


def other_blocks() -> None:
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(7 + RANK)]
    build(Chain.from_modules(layers, MSE), partition=[3, 4 + RANK])


def _other_part(change: Callable[[nn.Module], object]) -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)) for _ in range(7)]
    if RANK:
        change(layers[5][1 if change is nn.Module.eval else 0])
    build(Chain.from_modules(layers, MSE))


def other_modes() -> None:
    _other_part(nn.Module.eval)


def other_frozen() -> None:
    _other_part(lambda part: part.requires_grad_(False))


def other_clipping() -> None:
    build(clip_grad_norm=1.0 if RANK else None)


def other_depths() -> None:
    build(schedule="pipedream", num_microbatches=1, depths=[9, 1] if RANK else [8, 1])


def other_number_of_batches() -> None:
    list(build(schedule="pipedream").train([batch()] * (2 + RANK)))


def other_batch_size() -> None:
    build().step(**batch(4 + 2 * RANK))


def other_batches() -> None:
    build().step(**(batch() | {"target": batch()["target"] + RANK}))


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, given: dict[str, Any]) -> Tensor:
        return torch.as_tensor(self.linear(given["hidden"]) * given["scale"])


def other_constants() -> None:
    torch.manual_seed(0)
    layers = [_Scaled(), *(nn.Linear(WIDTH, WIDTH) for _ in range(6))]
    given = batch()
    nested = {"input": {"hidden": given["input"], "scale": 1.0 + RANK}, "target": given["target"]}
    build(Chain.from_modules(layers, MSE)).step(nested)


def drifting_batches() -> int:
    """Train until it is noticed that the ranks' batches differ since the fourth."""
    pipeline = build()
    try:
        for number in range(16):
            pipeline.step(**(batch() | {"target": batch()["target"] + (RANK if number >= 3 else 0)}))
    except VPipeError as error:
        return pipeline.iteration if "different batches" in str(error) else -1
    return 16


class Ragged(nn.Module):
    """Writes another shape than inference saw, once there are data."""

    def forward(self, value: Tensor) -> Tensor:
        return value if value.is_meta else value[:, :3]


def wrong_shape() -> None:
    chain = Chain.from_modules([nn.Linear(WIDTH, WIDTH), Ragged(), nn.Linear(WIDTH, WIDTH)], MSE)
    pipeline = build(chain, partition=[2, 1])
    for inbox in pipeline.transport._inboxes.values():
        inbox._peer._seconds = 2  # for messages alone: a busy machine may need longer to build
    pipeline.step(**batch())


def not_a_number(schedule: str) -> str:
    pipeline = build(schedule=schedule)
    data = [batch(), batch(), batch()]
    data[1] = data[1] | {"input": data[1]["input"] * math.inf}
    losses = []
    try:
        losses += [result.loss for result in pipeline.train(data)]
    except VPipeError as error:
        # The next pipeline of the same processes does not hear what is left of this one.
        again = [result.loss for result in build(schedule=schedule).train([batch(), batch()])]
        return f"{type(error).__name__}: {error} {again}"
    return f"no error: {losses}"


def other_weights() -> None:
    torch.manual_seed(100 + RANK)  # a script that forgot to seed its ranks equally
    build(Chain.from_modules([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)], MSE), partition=[1, 1])


def unseeded_weights() -> list[bool]:
    torch.seed()  # as in a process that nobody has seeded
    layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH, dtype=torch.float64))
    own = {name: tensor.clone() for name, tensor in layers.state_dict().items()}
    with build(Chain.from_modules(layers, MSE), partition=[1, 2]) as pipeline:
        first = pipeline.world.gather(own, "weights")[0]
        state = pipeline.state_dict()
    return [
        all(torch.equal(tensor, first[name]) for name, tensor in (state | dict(layers.state_dict())).items()),
        all(torch.equal(tensor, own[name]) for name, tensor in layers.state_dict().items()),
    ]


def other_buffers() -> None:
    torch.manual_seed(100)
    layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    if not RANK:  # as with data parallelism, where the first rank's weights are sent to all
        layers.load_state_dict(layers.state_dict() | {"1.running_mean": torch.ones(WIDTH)})
    build(Chain.from_modules(layers, MSE), partition=[1, 1])


def tied_weights() -> list[bool]:
    torch.manual_seed(100)
    shared = nn.Linear(WIDTH, WIDTH)
    chain = Chain.from_modules([shared, nn.Tanh(), shared], MSE)
    pipeline = build(chain, partition=[1, 2], schedule="gpipe")
    copies = []
    for _ in range(3):
        mine = pipeline.held[RANK].weights.parameters[0].detach()
        everyone = [torch.empty_like(mine) for _ in range(2)]
        torch.distributed.all_gather(everyone, mine)
        copies.append(torch.equal(*everyone))
        pipeline.step(**batch())
    return copies


WAYS = {"shared memory": (True, None), "sockets": (False, None), "sockets, by order": (True, True)}
"""Whether memory may be shared, and whether messages are matched by order."""


def ways_of_messages() -> dict[str, tuple[bool, bool]]:
    """Tell of each way whether memory was shared and whether the weights are those of the first.

    By order is as with NCCL: no tags, a communicator per link; two cuts share a link where a rank has two stages.
    """
    found, states = {}, []
    for way, (shared_memory, ordered) in WAYS.items():
        front_door.Transport = partial(Transport, ordered=ordered)  # type: ignore[misc]
        try:
            pipeline = build(
                MODELS["skipping"](),
                schedule="naive",
                stages_per_rank=2,
                partition=[1, 2, 3, 1],
                shared_memory=shared_memory,
            )
        finally:
            front_door.Transport = Transport  # type: ignore[misc]
        data = [make_batch(pipeline.chain, number, 6) for number in range(3)]
        list(pipeline.train(data))
        pipeline.evaluate(data)
        states.append(pipeline.state_dict())
        is_shared = bool(pipeline.transport._outboxes) and bool(pipeline.transport._inboxes)
        found[way] = is_shared, all(torch.equal(states[0][name], value) for name, value in states[-1].items())
    return found


def own_fields_only() -> tuple[tuple[str, ...], float]:
    whole = batch()
    pipeline = build(field_specs=front_door_specs(), schedule="pipedream")
    mine = Batch({name: whole[name] for name in pipeline.fields}, 4)
    (result,) = pipeline.train([mine])
    assert result.loss == build(schedule="pipedream").step(**whole).loss
    return pipeline.fields, result.loss


def front_door_specs() -> Any:
    from vpipe.data.source import FieldSpec

    return {name: FieldSpec((WIDTH,), torch.float32) for name in ("input", "target")}


def drawn_batches() -> list[float]:
    """Batches that are drawn while the pipeline runs are the same on both ranks, dropout or not."""
    torch.manual_seed(4)
    drawn = []

    def draw() -> Any:
        for _ in range(4):
            drawn.append(torch.randn(4, WIDTH))
            yield drawn[-1], drawn[-1]

    list(build(schedule="pipedream").train(draw(), 4))
    return [tensor.sum().item() for tensor in drawn]


CHECKS: dict[str, Callable[[], Any]] = {
    "drawn_batches": drawn_batches,
    "ways_of_messages": ways_of_messages,
    "not_a_number_asynchronous": partial(not_a_number, "pipedream"),
    "not_a_number_synchronous": partial(not_a_number, "1f1b"),
    "drifting_batches": drifting_batches,
    "other_batch_size": other_batch_size,
    "other_batches": other_batches,
    "other_blocks": other_blocks,
    "other_clipping": other_clipping,
    "other_constants": other_constants,
    "other_depths": other_depths,
    "other_number_of_batches": other_number_of_batches,
    "other_partition": other_partition,
    "other_modes": other_modes,
    "other_frozen": other_frozen,
    "other_seed": other_seed,
    "own_fields_only": own_fields_only,
    "other_buffers": other_buffers,
    "other_weights": other_weights,
    "tied_weights": tied_weights,
    "unseeded_weights": unseeded_weights,
    "wrong_shape": wrong_shape,
}


def run_checks(arguments: Sequence[str]) -> None:
    """Run every check; leave what each returned, or raised, in the folder `arguments[0]`."""
    found: dict[str, Any] = {}
    with World.join(timeout_seconds=60, backend="gloo"):
        for name, check in CHECKS.items():
            try:
                found[name] = check()
            except VPipeError as error:
                found[name] = f"{type(error).__name__}: {error}"
            torch.distributed.barrier()
    torch.save(found, Path(arguments[0]) / f"checks.{RANK}.pt")


def run_alone(arguments: Sequence[str]) -> None:
    """Join by making a pipeline, as a script under torchrun does; rank 1 runs out of data that rank 0 still has."""

    def batches() -> Any:
        yield batch()
        if RANK == 1:
            raise DataError("shard 7 is truncated")
        yield batch()

    with build(schedule="pipedream") as pipeline:
        list(pipeline.train(batches(), 2))
