"""The configurations whose peak is predicted and measured: two models, all policies, schedules of every kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

from vpipe.config import RunConfig, build_config

__all__ = ["CONFIGURATIONS", "OTHERS", "Configuration", "base_config"]

MODELS: dict[str, dict[str, Any]] = {
    "bert": {"type": "bert", "hidden_size": 256, "num_layers": 4, "vocab_size": 8000},
    "gpt": {"type": "gpt", "hidden_size": 256, "num_layers": 4, "vocab_size": 8000, "max_position_embeddings": 128},
}
NUM_BLOCKS = {"bert": 9, "gpt": 10}
NUM_TOKENS = 128
MICROBATCH_SIZE = 4

MIXED = ("keep", "recompute", "swap")


@dataclass(frozen=True)
class Configuration:
    """One run: a model, a schedule, and what blocks do (repeated along the chain)."""

    model: str
    schedule: str
    num_ranks: int
    num_microbatches: int
    policies: Sequence[str] = ("keep",)
    ahead: Sequence[int] = ()
    pipeline: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Say it in a line."""
        words = [self.model, self.schedule, f"{self.num_ranks} ranks", f"{self.num_microbatches} microbatches"]
        words += [f"{key} {value}" for key, value in self.pipeline.items()]
        words.append("/".join(self.policies) + (" ahead" if self.ahead else ""))
        return ", ".join(words)

    def config(self) -> RunConfig:
        """Return the run."""
        tree = base_config(self.model, self.num_microbatches)
        tree["pipeline"] |= {"schedule": self.schedule, "num_ranks": self.num_ranks, **self.pipeline}
        tree["plan"] = {
            "policies": list(islice(cycle(self.policies), NUM_BLOCKS[self.model])),
            "recompute_ahead": list(self.ahead),
        }
        return build_config(tree)


def base_config(model: str, num_microbatches: int) -> dict[str, Any]:
    """Return what all runs of a model share."""
    return {
        "seed": 1,
        "model": {**MODELS[model], "dropout": 0.1, "attention_dropout": 0.1},
        "data": {"synthetic_data": True, "sequence_length": NUM_TOKENS},
        "train": {"batch_size": MICROBATCH_SIZE * num_microbatches, "iterations": 4, "eval_batches": 0},
        "optimizer": {"name": "adamw", "learning_rate": 1e-4},
        "pipeline": {"num_microbatches": num_microbatches},
        "launch": {"device": "cpu", "threads_per_rank": 1},
    }


CONFIGURATIONS = (
    Configuration("bert", "gpipe", 2, 6),
    Configuration("bert", "gpipe", 2, 6, ("recompute",)),
    Configuration("bert", "gpipe", 2, 6, ("swap",)),
    Configuration("bert", "gpipe", 4, 8, MIXED),
    Configuration("bert", "1f1b", 4, 8),
    Configuration("bert", "1f1b", 4, 8, ("recompute",), (0, 1, 2)),
    Configuration("bert", "zb-h1", 4, 8),
    Configuration("bert", "interleaved", 2, 4, ("recompute",), pipeline={"stages_per_rank": 2}),
    Configuration("bert", "pipedream", 4, 4),
    Configuration("bert", "pipedream", 4, 4, ("swap",)),
    Configuration("bert", "pipedream", 4, 4, ("keep", "recompute"), pipeline={"macrobatch": True}),
    Configuration("gpt", "gpipe", 2, 6),
    Configuration("gpt", "gpipe", 2, 6, ("recompute",)),
    Configuration("gpt", "1f1b", 2, 6, ("swap",), pipeline={"stage_to_depth_map": [5, 3]}),
    Configuration("gpt", "1f1b", 4, 8, MIXED),
    Configuration("gpt", "1f1b", 4, 8, ("recompute",)),
    Configuration("gpt", "zb-h2", 2, 6, ("keep", "swap")),
    Configuration("gpt", "zb-v", 2, 4),
    Configuration("gpt", "pipedream", 4, 4, ("recompute",)),
    Configuration("gpt", "pipedream", 2, 4, ("swap", "keep"), pipeline={"stage_to_depth_map": [5, 3]}),
    Configuration("gpt", "pipedream", 4, 4, MIXED, pipeline={"vertical_sync": True}),
    Configuration("gpt", "pipedream-2bw", 2, 4),
)

OTHERS = (
    Configuration("bert", "1f1b", 3, 9, ("swap",)),
    Configuration("bert", "zb-h2", 3, 6, ("swap",)),
    Configuration("bert", "pipedream-2bw", 3, 6, ("recompute", "keep")),
    Configuration("gpt", "gpipe", 3, 7, ("swap", "recompute")),
    Configuration("gpt", "interleaved", 2, 4, ("swap", "keep"), pipeline={"stages_per_rank": 2}),
    Configuration("gpt", "zb-h1", 4, 8, ("recompute",)),
    Configuration("gpt", "zb-v", 2, 4, ("recompute", "swap")),
)
"""Combinations that the model of what is held was not made with."""
