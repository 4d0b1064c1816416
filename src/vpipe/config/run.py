"""One run: all sections together, and what follows from several of them."""

from __future__ import annotations

from collections.abc import Sized
from pathlib import Path

from vpipe.config.fields import Natural
from vpipe.config.sections import (
    DataConfig,
    LaunchConfig,
    ModelConfig,
    OptimizerConfig,
    PipelineConfig,
    PlanConfig,
    Section,
    TrainConfig,
)
from vpipe.errors import ConfigError
from vpipe.plan.recipe import OPTIONS

__all__ = ["RunConfig"]


class RunConfig(Section):
    """One run. `load_config` and `build_config` make it and check that its parts fit each other."""

    seed: Natural = 0
    """Seed of weights, data order, masks and dropout; it gives the same run on any number of stages."""
    log_directory: Path = Path("runs")
    """Folder where each run makes one named by its time."""
    model: ModelConfig = ModelConfig()
    """What is trained."""
    data: DataConfig = DataConfig()
    """What it is trained on."""
    pipeline: PipelineConfig = PipelineConfig()
    """How microbatches flow."""
    plan: PlanConfig = PlanConfig()
    """What is cut where."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How weights are updated."""
    train: TrainConfig = TrainConfig()
    """How long, and what is told on the way."""
    launch: LaunchConfig = LaunchConfig()
    """Where the ranks run."""

    @property
    def num_ranks(self) -> int:
        """Count the ranks: as given, else the machines, else from whatever lists one value per stage, else 1."""
        if self.pipeline.num_ranks is not None:
            return self.pipeline.num_ranks
        options = [getattr(self.pipeline, option.key) for option in OPTIONS if option.per_stage]
        per_stage = (self.plan.partition, self.pipeline.recompute_ratio, *options)
        lists: list[Sized] = [values for values in per_stage if isinstance(values, list)]
        num_stages = len(lists[0]) if lists else self.pipeline.stages_per_rank
        return len(self.launch.machines) or max(1, num_stages // self.pipeline.stages_per_rank)

    @property
    def num_stages(self) -> int:
        """Count the stages."""
        return self.num_ranks * self.pipeline.stages_per_rank

    @property
    def num_blocks(self) -> int | None:
        """Count the model's blocks, or return None where only building the model tells (`custom`)."""
        more = {"bert": 1, "gpt": 2, "llama": 2}.get(self.model.type)
        return None if more is None else 2 * self.model.num_layers + more

    @property
    def needs_plan(self) -> bool:
        """Tell whether something is left to the planner, so that the model has to be measured first."""
        is_open = "auto" in (self.plan.partition, self.pipeline.schedule, self.pipeline.num_microbatches)
        return is_open or self.plan.partition == "compute" or self.plan.memory_limit is not None

    @property
    def num_microbatches(self) -> int:
        """Slices of a batch.

        Raises:
            ConfigError: the planner has not chosen it yet.
        """
        if self.pipeline.num_microbatches == "auto":
            raise ConfigError("pipeline.num_microbatches is auto, and the run has not been planned")
        return self.pipeline.num_microbatches

    @property
    def microbatch_size(self) -> int:
        """Samples in the largest microbatch; others have one less where the batch is no multiple."""
        return -(-self.train.batch_size // self.num_microbatches)

    @property
    def is_even(self) -> bool:
        """Tell whether all microbatches of a whole batch have the same size."""
        return self.train.batch_size % self.num_microbatches == 0

    @property
    def eval_batch_size(self) -> int:
        """Samples in one batch of an evaluation."""
        return self.train.eval_batch_size or self.train.batch_size

    @property
    def recompute_ratios(self) -> list[float]:
        """Recompute ratio of every stage; `except_last` counts as 1, its exception is the executor's business."""
        if self.pipeline.recompute is not None:
            return [0.0 if self.pipeline.recompute == "never" else 1.0] * self.num_stages
        ratio = self.pipeline.recompute_ratio
        return ratio if isinstance(ratio, list) else [ratio] * self.num_stages
