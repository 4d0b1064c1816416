"""Runs of batches that do not divide by their microbatches, or differ in size or length, and what their ranks do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from equality_cases import OPTIMIZERS, SEED, result_path
from flat_pipeline import flat_pipeline
from torch import Tensor
from toy_models import MODELS, WIDTH, make_batch

from vpipe.model.chain import Chain
from vpipe.runtime.comm.transport import Transport
from vpipe.runtime.comm.world import World
from vpipe.runtime.hooks import Hooks

MICROBATCHES = 4
SIZES = (1, 2, 3, 5, 7, 8)
"""Samples of a batch, in turn with those of a whole one."""


@dataclass(frozen=True)
class Uneven:
    """One run: a model, how it is cut, and the samples of each batch; of a length, where that is given."""

    model: str
    partition: tuple[int, ...]
    schedule: str
    sizes: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    optimizer: str = "adam"
    num_ranks: int = 0
    """0: one per stage."""
    lengths: tuple[int, ...] = ()
    num_microbatches: int = MICROBATCHES
    ordered: bool = False
    """Match messages by their order, as with nccl."""

    @property
    def ranks(self) -> int:
        return self.num_ranks or len(self.partition)

    def batches(self, chain: Chain) -> list[dict[str, Tensor]]:
        made = []
        for number, size in enumerate(self.sizes):
            if self.lengths:
                generator = torch.Generator().manual_seed(1000 + number)
                shape = size, self.lengths[number], WIDTH
                made.append({name: torch.randn(shape, generator=generator) for name in chain.fields})
            else:
                made.append(make_batch(chain, number, size))
        return made


CLIP = {"clip_grad_norm": 0.1}
TWO = {"stages_per_rank": 2}
SOCKETS = {"shared_memory": False}
MIXED = (8, 3, 5, 1, 8, 6)
LENGTHS = (3, 7, 3, 2, 9, 7)

CASES: dict[str, Uneven] = {}
for size in SIZES:
    sizes = (8, size, 8, size)
    CASES |= {
        f"1f1b-1-{size}": Uneven("peculiar", (7,), "1f1b", sizes),
        f"gpipe-2-{size}": Uneven("skipping", (4, 3), "gpipe", sizes, CLIP | {"recompute_ratio": 0.5}),
        f"1f1b-2-{size}": Uneven("plain", (3, 4), "1f1b", sizes, SOCKETS, "sgd"),
        f"zb-h1-2-{size}": Uneven("skipping", (4, 3), "zb-h1", sizes, {"recompute_ratio": 0.5}),
        f"interleaved-2-{size}": Uneven("plain", (1, 2, 3, 1), "interleaved", sizes, TWO, "adamw", 2),
        f"dualpipe-v-2-{size}": Uneven("plain", (2, 1, 2, 2), "dualpipe-v", sizes, TWO, "sgd", 2),
        f"1f1b-3-{size}": Uneven("tied", (2, 3, 2), "1f1b", sizes, CLIP),
        f"zb-v-3-{size}": Uneven("skipping", (1, 1, 1, 2, 1, 1), "zb-v", sizes, TWO, num_ranks=3),
        f"pipedream-1-{size}": Uneven("skipping", (7,), "pipedream", sizes, CLIP),
        f"pipedream-2-{size}": Uneven("plain", (2, 5), "pipedream", sizes, optimizer="sgd"),
        f"pipedream-3-{size}": Uneven("skipping", (1, 2, 4), "pipedream", sizes, {"recompute_ratio": [0, 0.5, 1.0]}),
        f"pipedream-2bw-2-{size}": Uneven("plain", (3, 4), "pipedream-2bw", sizes, SOCKETS),
        f"macrobatch-3-{size}": Uneven("plain", (1, 4, 2), "pipedream", sizes, {"macrobatch": True}),
    }
for size in (1, 2, 3):
    CASES[f"ending-3-{size}"] = Uneven("stopped", (2, 1, 2), "pipedream", (8, 8, size))
CASES |= {
    "lengths-sockets": Uneven("plain", (3, 4), "pipedream", MIXED, SOCKETS, lengths=LENGTHS),
    "lengths-ordered": Uneven("plain", (3, 2, 2), "pipedream", MIXED, SOCKETS, lengths=LENGTHS, ordered=True),
    "lengths": Uneven("plain", (2, 2, 3), "pipedream", MIXED, lengths=LENGTHS),
    "lengths-2bw": Uneven("plain", (2, 5), "pipedream-2bw", MIXED, lengths=LENGTHS[::-1]),
    "lengths-single": Uneven("plain", (2, 2, 3), "pipedream", MIXED, lengths=LENGTHS, num_microbatches=1),
    "lengths-sockets-single": Uneven(
        "plain", (2, 2, 3), "pipedream", MIXED, SOCKETS, lengths=LENGTHS, num_microbatches=1
    ),
    "lengths-1f1b": Uneven("plain", (2, 5), "1f1b", MIXED, SOCKETS, lengths=LENGTHS),
    "vertical": Uneven("plain", (1, 3, 3), "pipedream", MIXED, {"vertical_sync": True}),
    "deep": Uneven("plain", (2, 2, 3), "pipedream", MIXED, {"depths": [5, 3, 1]} | SOCKETS),
    "moving": Uneven("plain", (2, 2, 3), "pipedream", MIXED, {"swap_versions": True, "depths": [5, 4, 3]}),
    "limit": Uneven("plain", (2, 5), "pipedream", MIXED, {"limit": 1 << 20}, lengths=LENGTHS),
    "ahead": Uneven("skipping", (4, 3), "1f1b", MIXED, {"recompute_ratio": 1.0, "recompute_ahead": [0]}),
}


def run_cases(arguments: Sequence[str]) -> None:
    """Run all cases of this number of ranks; leave what each computed in the folder `arguments[0]`."""
    with World.join(timeout_seconds=60, backend="gloo") as group:
        for name, case in CASES.items():
            if case.ranks == group.num_ranks:
                with patch("vpipe.runtime.pipeline.Transport", partial(Transport, ordered=case.ordered or None)):
                    torch.save(_run(case), result_path(Path(arguments[0]), name, group.rank))


def _run(case: Uneven) -> dict[str, Any]:
    chain = MODELS[case.model]()
    gradients: dict[int, list[dict[str, Tensor]]] = {}

    def keep(stage: int, microbatch: int, named: Mapping[str, Tensor]) -> None:
        gradients.setdefault(stage, []).append({name: gradient.clone() for name, gradient in named.items()})

    pipeline = flat_pipeline(
        chain,
        optimizer=OPTIMIZERS[case.optimizer],
        schedule=case.schedule,
        num_microbatches=case.num_microbatches,
        partition=case.partition,
        seed=SEED,
        hooks=Hooks(gradients=keep),
        **case.options,
    )
    batches = iter(case.batches(chain))
    results = list(pipeline.train(batches, len(case.sizes)))
    return {
        "losses": [dict(result.parts) for result in results],
        "gradients": gradients,
        "state": {name: tensor.clone() for name, tensor in pipeline.state_dict().items()},
        "num_sets": {stage: item.weights.num_sets for stage, item in pipeline.held.items()},
        "num_saved": [item.stage.num_saved for item in pipeline.held.values()],
        "traffic": [pipeline.transport.bytes_sent, pipeline.transport.bytes_received],
        "moved": pipeline.host_link.bytes_offloaded if pipeline.host_link is not None else 0,
    }
