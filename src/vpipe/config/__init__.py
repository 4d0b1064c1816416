"""One run's YAML, validated.

Read `sections` for the keys, `load` for the way from a file to a `RunConfig`, `flat` for the original's keys and
`checks` for what has to fit together.
"""

from vpipe.config.load import LoadedConfig, build_config, dump_config, load_config, read_config
from vpipe.config.run import RunConfig
from vpipe.config.sections import (
    DataConfig,
    LaunchConfig,
    ModelConfig,
    OptimizerConfig,
    PipelineConfig,
    PlanConfig,
    TrainConfig,
)

__all__ = [
    "DataConfig",
    "LaunchConfig",
    "LoadedConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PipelineConfig",
    "PlanConfig",
    "RunConfig",
    "TrainConfig",
    "build_config",
    "dump_config",
    "load_config",
    "read_config",
]
