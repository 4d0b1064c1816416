"""Models of users by their structure, and what two ranks do with the states of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flat_pipeline import flat_pipeline
from torch import Tensor, nn

from vpipe.errors import VPipeError
from vpipe.model.modules import Modules
from vpipe.runtime.comm.world import World
from vpipe.runtime.pipeline import Pipeline

WIDTH = 4


class Counting(nn.Module):
    """Has a weight, buffers of both kinds, and state that is no tensor."""

    seen: Tensor
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WIDTH))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("shift", torch.ones(WIDTH), persistent=False)
        self.label = "new"

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        return x * self.scale + self.shift

    def get_extra_state(self) -> dict[str, str]:
        return {"label": self.label}

    def set_extra_state(self, state: dict[str, str]) -> None:
        self.label = state["label"]


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


def nested() -> nn.Sequential:
    inner = nn.Sequential(OrderedDict(norm=nn.BatchNorm1d(WIDTH), deep=nn.Sequential(linear(), nn.Tanh())))
    return nn.Sequential(OrderedDict(stem=linear(), act=nn.Tanh(), body=nn.Sequential(linear(), inner), head=linear()))


def tied() -> nn.Sequential:
    model = nn.Sequential(linear(), nn.Tanh(), nn.Sequential(linear(), nn.Tanh()), linear())
    model[2][0].weight = model[3].weight = model[0].weight
    return model


def twice() -> nn.Sequential:
    shared = linear()
    return nn.Sequential(shared, nn.Tanh(), shared, linear())


def cut_off() -> nn.Sequential:
    return nn.Sequential(linear(), nn.Tanh(), linear(), nn.BatchNorm1d(WIDTH), linear())[1:]


STRUCTURES: dict[str, Callable[[], Any]] = {
    "plain": lambda: nn.Sequential(linear(), nn.BatchNorm1d(WIDTH), nn.ReLU(), linear()),
    "nested": nested,
    "list": lambda: [linear(), nn.Tanh(), linear(), nn.BatchNorm1d(WIDTH)],
    "modules": lambda: nn.ModuleList([linear(), nn.BatchNorm1d(WIDTH), nn.Tanh(), linear()]),
    "counting": lambda: nn.Sequential(linear(), Counting(), linear(), Counting()),
    "tied": tied,
    "twice": twice,
    "cut off": cut_off,
    "parametrized": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(linear()),
        nn.Tanh(),
        nn.utils.parametrizations.spectral_norm(linear()),
        linear(),
    ),
    "compiled": lambda: nn.Sequential(torch.compile(linear(), backend="eager"), nn.Tanh(), linear(), linear()),
}


def make(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return STRUCTURES[name]()


def batches(number: int, first: int = 0) -> list[tuple[Tensor, Tensor]]:
    made = []
    for seed in range(first, first + number):
        generator = torch.Generator().manual_seed(seed)
        made.append((torch.randn(8, WIDTH, generator=generator), torch.randn(8, WIDTH, generator=generator)))
    return made


def sequential_of(model: Modules) -> nn.Sequential:
    """Return the module that computes what the pipeline does, of the same modules."""
    return model if isinstance(model, nn.Sequential) else nn.Sequential(*model)  # type: ignore[arg-type]


def pipeline_of(model: Modules, **options: Any) -> Pipeline:
    options = {"num_microbatches": 4, "schedule": "1f1b", **options}
    return flat_pipeline(model, nn.functional.mse_loss, optimizer=partial(torch.optim.SGD, lr=0.1), **options)


def _told(load: Callable[[], object]) -> str:
    try:
        load()
    except VPipeError as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


def _whole(pipeline: Pipeline) -> dict[str, Any]:
    parts: list[dict[str, Any]] = pipeline.world.gather(pipeline.state_dict(), "the states")
    return {name: item for part in parts for name, item in part.items()}


OPTIONS: dict[str, dict[str, Any]] = {
    "1f1b": {},
    "zb-v": {"schedule": "zb-v"},
    "pipedream": {"schedule": "pipedream"},
    "moved": {"schedule": "pipedream", "swap_versions": True},
}


def run_states(arguments: Sequence[str]) -> None:
    """Go on from a state in another pipeline, from the whole and from the own part, and load what does not fit."""
    folder, found = Path(arguments[0]), {}
    with World.join(timeout_seconds=60) as world:
        for name in STRUCTURES:
            for row, options in OPTIONS.items():
                if row != "1f1b" and name not in ("nested", "counting"):
                    continue
                found[name, row] = _go_on(name, world, options)
        found["refused"] = _refused(world)
    torch.save(found, folder / f"states.{world.rank}.pt")


def _go_on(name: str, world: World, options: dict[str, Any]) -> dict[str, Any]:
    first = pipeline_of(make(name), world=world, **options)
    list(first.train(batches(3)))
    whole, part = _whole(first), first.state_dict()
    losses = [[result.loss for result in first.train(batches(3, 5))]]
    states = [_whole(first)]
    for state in (whole, part):
        other = pipeline_of(make(name, seed=1), world=world, **options)
        list(other.train(batches(2, 20)))  # so that there are several versions
        other.load_state_dict(state)
        other.iteration = 3
        losses.append([result.loss for result in other.train(batches(3, 5))])
        states.append(_whole(other))
    own = sequential_of(make(name)).state_dict()
    return {"losses": losses, "states": states, "names": list(own), "labels": [list(state) for state in states]}


def _refused(world: World) -> dict[str, str]:
    pipeline = pipeline_of(make("plain"), world=world)
    whole = _whole(pipeline)
    told = {"in one go": _told(lambda: pipeline.load_state_dict(whole))}
    own = pipeline.state_dict()
    other = {**whole, "0.weight": whole["0.weight"] + world.rank}
    told["different"] = _told(lambda: pipeline.load_state_dict(other))
    backbone = {name: item for name, item in whole.items() if not name.startswith("3.")}
    told["backbone"] = _told(lambda: pipeline.load_state_dict(backbone))
    turned = {**whole, "3.weight": torch.zeros(WIDTH, 7)}
    told["shape"] = _told(lambda: pipeline.load_state_dict(turned, strict=False))
    told["unchanged"] = str(all(torch.equal(item, own[name]) for name, item in pipeline.state_dict().items()))
    shared = pipeline_of(make("twice"), world=world)
    apart = shared.state_dict()
    if world.rank == 1:
        apart = {name: item + 1 for name, item in apart.items()}
    told["apart"] = _told(lambda: shared.load_state_dict(apart))
    one = {"0.weight": torch.full((WIDTH, WIDTH), 0.5)}
    told["one name"] = _told(lambda: shared.load_state_dict(one, strict=False))
    told["everywhere"] = str(
        {item[0, 0].item() for name, item in _whole(shared).items() if name in ("0.weight", "2.weight")}
    )
    return told
