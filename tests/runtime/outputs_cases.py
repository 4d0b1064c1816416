"""Runs whose metrics, outputs and predictions are looked at; `run_outputs` is started in every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flat_pipeline import flat_pipeline
from torch import Tensor
from toy_models import MODELS, WIDTH, make_batch

from vpipe.data.source import FieldSpec
from vpipe.model.loss import Metric
from vpipe.runtime.batch import Batch
from vpipe.runtime.comm.world import World
from vpipe.runtime.pipeline import Pipeline

SEED = 3
NUM_BATCHES = 3
HELD_OUT = (4, 7, 3, 1, 4)
"""Sizes of the batches to predict, of which most are cut unevenly."""


@dataclass(frozen=True)
class Case:
    """One training run: a model, how it is cut, and the arguments of `Pipeline`."""

    model: str
    partition: tuple[int, ...]
    schedule: str
    num_microbatches: int = 4
    options: Mapping[str, Any] = field(default_factory=dict)
    num_ranks: int = 0

    @property
    def ranks(self) -> int:
        return self.num_ranks or len(self.partition)


SPECS = {name: FieldSpec((WIDTH,), torch.float32) for name in ("input", "target")}
V = {"stages_per_rank": 2}
CASES = {
    "1f1b-1": Case("plain", (7,), "1f1b"),
    "pipedream-1": Case("plain", (7,), "pipedream"),
    "zb-v-1": Case("skipping", (3, 4), "zb-v", options=V, num_ranks=1),
    "gpipe-1-learned": Case("peculiar", (7,), "gpipe"),
    "gpipe-2": Case("normalised", (3, 4), "gpipe", options={"recompute_ratio": 1.0}),
    "zb-v-2": Case("skipping", (2, 1, 2, 2), "zb-v", options=V, num_ranks=2),
    "pipedream-2": Case("plain", (4, 3), "pipedream"),
    "1f1b-2-learned": Case("peculiar", (3, 4), "1f1b"),
    "pipedream-2-sockets": Case("skipping", (4, 3), "pipedream", 2, {"shared_memory": False}),
    "1f1b-2-own-fields": Case("plain", (4, 3), "1f1b", options={"field_specs": SPECS}),
    "1f1b-2-torch": Case("seeded", (4, 3), "1f1b"),
    "1f1b-3": Case("tied", (2, 4, 1), "1f1b"),
    "dualpipe-v-3": Case("plain", (1, 1, 1, 1, 2, 1), "dualpipe-v", 6, V, num_ranks=3),
    "pipedream-3": Case("skipping", (1, 2, 4), "pipedream", 3),
}


def largest(hidden: Tensor, target: Tensor) -> Tensor:
    """A mean over samples."""
    return hidden.flatten(1).amax(1).mean()


def right(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Right answers and questions, of which samples have different numbers; draws something, as nobody should."""
    torch.rand(3)
    counted = labels >= 0
    return (logits.argmax(-1) == labels)[counted].sum(), counted.sum()


def same_sign(hidden: Tensor, target: Tensor) -> float:
    """A number of Python's."""
    torch.rand(3)
    return (hidden.sign() == target.sign()).double().mean().item()


def metrics_of(fields: Sequence[str]) -> dict[str, Any]:
    """Return metrics for a chain with these batch fields."""
    if fields == ("input", "target"):
        return {"largest": Metric(largest, ("hidden", "target")), "same_sign": same_sign}
    return {"largest": Metric(largest, ("logits", "labels")), "right": Metric(right, ("logits", "labels"))}


def run_outputs(arguments: Sequence[str]) -> None:
    """Run all cases of this number of ranks; leave what each gave in the folder `arguments[0]`."""
    with World.join(timeout_seconds=60, backend="gloo") as world:
        for name, case in CASES.items():
            if case.ranks == world.num_ranks:
                torch.save(run(case), Path(arguments[0]) / f"{name}.{world.rank}.pt")


def run(case: Case) -> dict[str, Any]:
    """Train without and with metrics and outputs, evaluate and predict."""
    chain = MODELS[case.model]()
    size = 2 * case.num_microbatches
    batches = [make_batch(chain, number, size) for number in range(NUM_BATCHES)]
    held_out = [make_batch(chain, 50 + number, size) for number, size in enumerate(HELD_OUT)]
    plain, _ = _train(case, batches, outputs=False, metrics={})
    results, pipeline = _train(case, batches, outputs=True, metrics=metrics_of(chain.fields))
    batches, held_out = _given(case, pipeline, batches), _given(case, pipeline, held_out)
    inputs = [
        Batch({name: item for name, item in batch.items() if name in ("input", "tokens")}, size)
        for size, batch in zip(HELD_OUT, held_out, strict=True)
    ]
    state = {name: tensor.clone() for name, tensor in pipeline.state_dict().items()}
    found = {
        "plain": plain,
        "losses": [(result.loss, dict(result.parts)) for result in results],
        "metrics": [dict(result.metrics) for result in results],
        "outputs": [result.outputs for result in results],
        "state": state,
        "evaluated": pipeline.evaluate(held_out, 2),
        "predicted": list(pipeline.predict(inputs, 2)),
        "with targets": list(pipeline.predict(held_out, 2)),
        "everywhere": list(pipeline.predict(inputs, 2, everywhere=True)),
        "usual size": list(pipeline.predict(inputs)),
    }
    list(pipeline.train(batches))
    found["later"] = pipeline.state_dict()
    return found


def _given(case: Case, pipeline: Pipeline, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return what a rank gives of batches: where fields are described those that it reads, or else all."""
    names = pipeline.fields if "field_specs" in case.options else pipeline.chain.fields
    return [{name: batch[name] for name in names} for batch in batches]


def _train(case: Case, batches: list[dict[str, Tensor]], *, outputs: bool, metrics: dict[str, Any]) -> tuple[Any, Any]:
    pipeline = flat_pipeline(
        MODELS[case.model](),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
        schedule=case.schedule,
        num_microbatches=case.num_microbatches,
        partition=case.partition,
        seed=SEED,
        metrics=metrics,
        **case.options,
    )
    batches = _given(case, pipeline, batches)
    results = list(pipeline.train(batches, outputs=outputs))
    if outputs:
        return results, pipeline
    held_out = [make_batch(pipeline.chain, 50 + number, size) for number, size in enumerate(HELD_OUT)]
    held_out = _given(case, pipeline, held_out)
    found = {
        "losses": [(result.loss, dict(result.parts)) for result in results],
        "state": pipeline.state_dict(),
        "evaluated": pipeline.evaluate(held_out, 2),
        "beside": [(result.metrics, result.outputs) for result in results],
    }
    list(pipeline.train(batches))
    return found | {"later": pipeline.state_dict()}, pipeline
