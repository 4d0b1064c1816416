"""The runs that must give the bits of one process, and what their ranks do: `run_cases` is started in every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flat_pipeline import flat_pipeline
from torch import Tensor
from toy_models import MODELS, make_batch

from vpipe.model.chain import Chain
from vpipe.runtime.comm.world import World
from vpipe.runtime.hooks import Hooks

SEED = 3
HELD_OUT = (4, 4, 3, 1)
"""Sizes of the batches of an evaluation."""


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1)


def warmup(iterations: float) -> float:
    return 0.02 * min(1.0, (iterations + 0.5) / 3)


OPTIMIZERS = {"adam": adam, "adamw": adamw, "sgd": sgd}


@dataclass(frozen=True)
class Case:
    """One training run: a model, how it is cut, and the arguments of `Pipeline`."""

    model: str
    partition: tuple[int, ...]
    schedule: str
    num_microbatches: int
    options: Mapping[str, Any] = field(default_factory=dict)
    optimizer: str = "adam"
    num_ranks: int = 0
    """0: one per stage."""
    calls: tuple[int, ...] = (2, 1)
    """Batches of each call of `train`; between two calls there is an evaluation."""
    samples_per_microbatch: int = 2

    @property
    def ranks(self) -> int:
        return self.num_ranks or len(self.partition)

    @property
    def batch_size(self) -> int:
        return self.num_microbatches * self.samples_per_microbatch

    def batches(self, chain: Chain) -> list[dict[str, Tensor]]:
        return [make_batch(chain, number, self.batch_size) for number in range(sum(self.calls))]

    def held_out(self, chain: Chain) -> list[dict[str, Tensor]]:
        return [make_batch(chain, 50 + number, size) for number, size in enumerate(HELD_OUT)]


GPIPE = {"recompute_ratio": 1.0}
CLIP = {"clip_grad_norm": 0.1}

CASES: dict[str, Case] = {
    # One rank.
    "naive-1": Case("skipping", (7,), "naive", 3, {"recompute_ratio": 0.5}),
    "naive-1x3": Case("tied", (2, 1, 4), "naive", 2, CLIP | {"stages_per_rank": 3}, num_ranks=1),
    "gpipe-1": Case("normalised", (7,), "gpipe", 4, GPIPE),
    "1f1b-1": Case("tied", (7,), "1f1b", 2, CLIP, "sgd"),
    "pipedream-1": Case("skipping", (7,), "pipedream", 4, {"learning_rate": warmup}),
    "pipedream-1-tied": Case("tied", (7,), "pipedream", 2, CLIP, "sgd"),
    "macrobatch-1": Case("plain", (7,), "pipedream", 3, {"macrobatch": True}),
    # Two ranks.
    "gpipe-2-torch": Case("seeded", (4, 3), "gpipe", 4, GPIPE, "sgd"),
    "naive-2": Case("plain", (2, 5), "naive", 2, optimizer="sgd"),
    "naive-2x2": Case("skipping", (1, 2, 3, 1), "naive", 3, CLIP | {"stages_per_rank": 2}, num_ranks=2),
    "naive-2x3-tied": Case("tied", (1, 1, 1, 2, 1, 1), "naive", 2, CLIP | {"stages_per_rank": 3}, num_ranks=2),
    "gpipe-2-always": Case("plain", (3, 4), "gpipe", 4, GPIPE | {"recompute": "always"}),
    "gpipe-2-except-last": Case("plain", (5, 2), "gpipe", 4, GPIPE | {"recompute": "except_last"}, "sgd"),
    "gpipe-2-never": Case("plain", (4, 3), "gpipe", 4, GPIPE | {"recompute": "never"}),
    "gpipe-2-one": Case("skipping", (4, 3), "gpipe", 1, GPIPE),
    "1f1b-2-norm": Case("normalised", (3, 4), "1f1b", 4, {"recompute_ratio": [0.7, 0.5]}),
    "1f1b-2-frozen": Case("frozen", (2, 5), "1f1b", 4, optimizer="adamw"),
    "1f1b-2-many": Case("plain", (4, 3), "1f1b", 11, {"learning_rate": warmup}, calls=(3, 3), samples_per_microbatch=1),
    "pipedream-2": Case("plain", (2, 5), "pipedream", 4, optimizer="sgd"),
    "pipedream-2-clip": Case("skipping", (4, 3), "pipedream", 4, CLIP | {"learning_rate": warmup}),
    "pipedream-2-one": Case("skipping", (2, 5), "pipedream", 1, calls=(5, 1)),
    "pipedream-2-norm": Case("normalised", (5, 2), "pipedream", 4, {"recompute_ratio": 1.0}),
    "pipedream-2-frozen": Case("frozen", (2, 5), "pipedream", 3, optimizer="adamw"),
    "macrobatch-2": Case("plain", (3, 4), "pipedream", 4, CLIP | {"macrobatch": True}, calls=(4, 2)),
    "zb-h1-2": Case("skipping", (4, 3), "zb-h1", 4, {"recompute_ratio": 0.5}),
    "zb-h2-2": Case("normalised", (3, 4), "zb-h2", 4, CLIP, "sgd"),
    "zb-v-2": Case("tied", (2, 1, 2, 2), "zb-v", 4, {"recompute_ratio": 0.5, "stages_per_rank": 2}, num_ranks=2),
    "v-half-2": Case("skipping", (1, 2, 3, 1), "v-half", 5, CLIP | {"stages_per_rank": 2}, num_ranks=2),
    "v-min-2": Case("frozen", (2, 2, 1, 2), "v-min", 3, {"stages_per_rank": 2}, optimizer="adamw", num_ranks=2),
    "dualpipe-v-2": Case("plain", (2, 1, 2, 2), "dualpipe-v", 6, {"stages_per_rank": 2}, optimizer="sgd", num_ranks=2),
    "naive-1x7-nested": Case("nested", (1,) * 7, "naive", 3, {"stages_per_rank": 7}, num_ranks=1),
    "gpipe-2-nested": Case("nested", (2, 5), "gpipe", 4, GPIPE, optimizer="sgd"),
    "1f1b-3-nested": Case("nested", (3, 2, 2), "1f1b", 4, CLIP | {"recompute_ratio": 0.6}),
    "zb-h1-2-nested": Case("nested", (4, 3), "zb-h1", 4),
    "pipedream-2-nested": Case("nested", (2, 5), "pipedream", 4, {"recompute_ratio": 0.5}),
    "zb-v-2-nested": Case("nested", (2, 1, 2, 2), "zb-v", 4, {"stages_per_rank": 2}, num_ranks=2),
    "1f1b-2-moded": Case("moded", (2, 5), "1f1b", 4, {"recompute_ratio": 1.0}),
    "zb-h1-2-moded": Case("moded", (4, 3), "zb-h1", 4, CLIP),
    "zb-v-2-moded": Case("moded", (1, 2, 1, 3), "zb-v", 4, {"stages_per_rank": 2}, num_ranks=2),
    "pipedream-2-moded": Case("moded", (3, 4), "pipedream", 4, optimizer="sgd"),
    "pipedream-2-moded-again": Case("moded", (4, 3), "pipedream", 3, {"recompute_ratio": 1.0}),
    "gpipe-2-peculiar": Case("peculiar", (2, 5), "gpipe", 4, optimizer="sgd"),
    "1f1b-2-peculiar": Case("peculiar", (1, 6), "1f1b", 4, CLIP | {"recompute_ratio": 0.6}),
    "zb-h1-2-peculiar": Case("peculiar", (5, 2), "zb-h1", 4),
    "pipedream-2-peculiar": Case("peculiar", (3, 4), "pipedream", 4, optimizer="sgd"),
    "pipedream-2-peculiar-clip": Case("peculiar", (5, 2), "pipedream", 3, CLIP | {"recompute_ratio": 1.0}),
    "zb-v-2-peculiar": Case("peculiar", (2, 1, 2, 2), "zb-v", 4, {"stages_per_rank": 2}, num_ranks=2),
    "looped-2x3": Case("tied", (1, 1, 1, 2, 1, 1), "looped-bfs", 4, CLIP | {"stages_per_rank": 3}, num_ranks=2),
    # Three ranks.
    "1f1b-3-torch": Case("seeded", (1, 3, 3), "1f1b", 4),
    "naive-3": Case("tied", (2, 3, 2), "naive", 2, CLIP),
    "gpipe-3": Case("skipping", (1, 2, 4), "gpipe", 5, {"recompute_ratio": [0, 1.0, 0.5]}, "sgd"),
    "gpipe-3-few": Case("normalised", (1, 4, 2), "gpipe", 2, GPIPE | {"recompute": "except_last"}),
    "1f1b-3": Case("stopped", (2, 1, 2), "1f1b", 4, CLIP, "adamw"),
    "1f1b-3-few": Case("tied", (2, 4, 1), "1f1b", 2, {"recompute_ratio": 0.6}),
    "1f1b-3-deep": Case("skipping", (3, 1, 3), "1f1b", 8, {"depths": [5, 3, 1]}),
    "1f1b-3-weightless": Case("weightless", (2, 1, 4), "1f1b", 3, CLIP),
    "1f1b-3-frozen-ties": Case("tied_frozen", (2, 3, 2), "1f1b", 3, CLIP),
    "pipedream-3": Case("skipping", (1, 2, 4), "pipedream", 3, {"recompute_ratio": [0, 0.5, 1.0]}, "sgd"),
    "pipedream-3-deep": Case("plain", (2, 2, 3), "pipedream", 3, {"depths": [5, 3, 1]}, calls=(4, 2)),
    "pipedream-3-vertical": Case("plain", (1, 3, 3), "pipedream", 4, {"vertical_sync": True}, "sgd", calls=(3, 2)),
    "pipedream-3-stopped": Case("stopped", (2, 1, 2), "pipedream", 4, CLIP, "adamw"),
    "pipedream-3-weightless": Case("weightless", (2, 1, 4), "pipedream", 3),
    "macrobatch-3": Case("normalised", (1, 4, 2), "pipedream", 3, {"macrobatch": True}, calls=(4, 3)),
    "zb-v-3": Case("skipping", (1, 1, 1, 2, 1, 1), "zb-v", 5, {"stages_per_rank": 2}, num_ranks=3),
    "interleaved-3x2": Case("normalised", (1, 1, 1, 2, 1, 1), "interleaved", 7, {"stages_per_rank": 2}, num_ranks=3),
    "zb-h1-3": Case("stopped", (2, 1, 2), "zb-h1", 6, CLIP | {"recompute_ratio": [0.5, 1.0, 0.0]}, "adamw"),
    # Four ranks.
    "zb-h1-4": Case("normalised", (2, 1, 2, 2), "zb-h1", 6, {"recompute_ratio": [1.0, 0, 0.5, 0]}),
    "zb-h2-4": Case("skipping", (1, 3, 1, 2), "zb-h2", 8, CLIP),
    "pipedream-2bw-4": Case("plain", (2, 1, 2, 2), "pipedream-2bw", 4, calls=(4, 2)),
    "naive-4-torch": Case("seeded", (2, 1, 3, 1), "naive", 2, optimizer="adamw"),
    "naive-4": Case("skipping", (1, 2, 2, 2), "naive", 1, CLIP),
    "gpipe-4": Case("plain", (1, 2, 1, 3), "gpipe", 8, GPIPE | CLIP, "sgd"),
    "1f1b-4": Case("skipping", (2, 1, 1, 3), "1f1b", 8, CLIP | {"recompute_ratio": [1, 0.5, 0, 0.3]}),
    "1f1b-4-tied": Case("tied", (1, 2, 3, 1), "1f1b", 6, CLIP, "sgd"),
    "1f1b-4-few": Case("weightless", (1, 1, 1, 4), "1f1b", 2),
    "1f1b-4-deep": Case("plain", (2, 1, 2, 2), "1f1b", 8, {"depths": [6, 4, 2, 0], "learning_rate": warmup}),
    "pipedream-4": Case("plain", (2, 1, 3, 1), "pipedream", 4, CLIP | {"learning_rate": warmup}, calls=(4, 2)),
    "pipedream-4-few": Case("skipping", (1, 2, 3, 1), "pipedream", 2, calls=(1, 1)),
    "pipedream-4-deep": Case("skipping", (1, 2, 3, 1), "pipedream", 4, {"depths": [6, 4, 2, 0]}, calls=(4, 1)),
    "pipedream-4-vertical": Case("skipping", (1, 2, 3, 1), "pipedream", 5, CLIP | {"vertical_sync": True}),
    "pipedream-4-vertical-deep": Case(
        "plain", (2, 1, 2, 2), "pipedream", 5, {"vertical_sync": True, "depths": [5, 4, 2, 1]}, "sgd"
    ),
    "macrobatch-4": Case("plain", (1, 3, 1, 2), "pipedream", 4, CLIP | {"macrobatch": True}, "sgd", calls=(4, 2)),
    "macrobatch-4-deep": Case("skipping", (1, 2, 3, 1), "pipedream", 7, {"macrobatch": True, "depths": [6, 4, 2, 0]}),
}


def run_cases(arguments: Sequence[str]) -> None:
    """Run all cases of this number of ranks; leave what each computed in the folder `arguments[0]`."""
    with World.join(timeout_seconds=60, backend="gloo") as group:
        for name, case in CASES.items():
            if case.ranks == group.num_ranks:
                torch.save(_run(case), result_path(Path(arguments[0]), name, group.rank))


def result_path(directory: Path, name: str, rank: int) -> Path:
    return directory / f"{name}.{rank}.pt"


def _run(case: Case) -> dict[str, Any]:
    chain = MODELS[case.model]()
    gradients: dict[int, list[dict[str, Tensor]]] = {}
    actions: list[str] = []
    programs: list[int] = []

    def keep(stage: int, microbatch: int, named: Mapping[str, Tensor]) -> None:
        gradients.setdefault(stage, []).append({name: gradient.clone() for name, gradient in named.items()})

    pipeline = flat_pipeline(
        chain,
        optimizer=OPTIMIZERS[case.optimizer],
        schedule=case.schedule,
        num_microbatches=case.num_microbatches,
        partition=case.partition,
        seed=SEED,
        hooks=Hooks(record=lambda action, start, end: actions.append(str(action)), gradients=keep),
        **case.options,
    )
    batches = iter(case.batches(chain))
    results, held_out = [], []
    for count in case.calls:
        held_out.append(pipeline.evaluate(case.held_out(chain), case.samples_per_microbatch))
        programs.append(len(actions))  # an evaluation is recorded as well
        results += list(pipeline.train(batches, count))
        programs.append(len(actions))
    return {
        "losses": [dict(result.parts) for result in results],
        "loss": [result.loss for result in results],
        "norms": [result.gradient_norm for result in results],
        "iterations": [result.iteration for result in results],
        "held_out": held_out,
        "gradients": gradients,
        "state": {name: tensor.clone() for name, tensor in pipeline.state_dict().items()},
        "num_sets": {stage: item.weights.num_sets for stage, item in pipeline.held.items()},
        "num_saved": [item.stage.num_saved for item in pipeline.held.values()],
        "actions": [actions[start:stop] for start, stop in zip(programs[::2], programs[1::2], strict=True)],
        "moved": (pipeline.host_link.bytes_offloaded, pipeline.host_link.bytes_fetched) if pipeline.host_link else None,
        "traffic": (pipeline.transport.bytes_sent, pipeline.transport.bytes_received),
    }
