"""The JSON files beside a run: its partition, and the original's stage maps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard, get_args

from vpipe.config.fields import show
from vpipe.config.text import parse_json, read_text
from vpipe.errors import ConfigError
from vpipe.plan.plan import RecomputeMode
from vpipe.plan.plan_file import DERIVED_KEYS, PLAN_KEYS
from vpipe.plan.recipe import BESIDES, OPTIONS
from vpipe.words.near import did_you_mean

__all__ = ["PartitionFile", "StageMaps", "read_partition_file", "read_stage_maps"]


_PER_STAGE = tuple(option.key for option in OPTIONS if option.per_stage)
_SAME_NAME = ("schedule", "num_microbatches", "stages_per_rank", *(option.key for option in OPTIONS))


@dataclass(frozen=True)
class PartitionFile:
    """Blocks per stage, and recompute ratio per stage, where the file has them.

    What blocks do with activations is None where it does not say, and else what it says, unchecked.
    """

    partition: list[int] | None
    recompute_ratio: list[float] | None
    policies: Any = None
    recompute: Any = None
    besides: Mapping[str, Any] = field(default_factory=dict)
    """What stages do besides, by the name of the key in the section `plan`."""
    run: Mapping[str, Any] = field(default_factory=dict)
    """Of a plan, what it says of the run's other keys, by 'section.key', unchecked."""
    predicted: Any = None


@dataclass(frozen=True)
class StageMaps:
    """What the original's `config_file` says about stages; None where it says nothing."""

    num_stages: int | None
    num_ranks: int | None
    options: Mapping[str, Any]
    """What it lists by stage beside them, by the key of the section `pipeline`."""


def read_partition_file(path: Path) -> PartitionFile:
    """Read ``{"partition": [12, 13, 13, 11], "recompute_ratio": [0.3, 0, 0, 0]}``; one of the two may be left out.

    A run's own ``plan.json`` is such a file too, and what ``vpipe plan`` writes: these say more of the run.

    Raises:
        ConfigError: the file is missing or is not of this form; the message has a line per mistake.
    """
    content = _read_object(path, ("partition", "recompute_ratio"), ignored=(*PLAN_KEYS, *DERIVED_KEYS))
    partition, ratios = content.get("partition"), content.get("recompute_ratio")
    if "partition" not in content and ratios is None:
        raise ConfigError(f"{path}: has no 'partition', a list of blocks per stage, e.g. [12, 13, 13, 11]")
    if "partition" in content and not (
        isinstance(partition, list) and partition and all(_is_int(size) and size > 0 for size in partition)
    ):
        raise ConfigError(
            f"{path}: partition = {show(partition)} is not a list with a whole number of at least 1 per stage"
        )
    if (mode := content.get("recompute")) is not None and mode not in get_args(RecomputeMode):
        near = did_you_mean(str(mode), get_args(RecomputeMode))
        raise ConfigError(f"{path}: recompute = {show(mode)} is none of {', '.join(get_args(RecomputeMode))}{near}")
    besides = {name: content[name] for name in BESIDES if content.get(name) is not None}
    policies = content.get("policies")
    if mode == "never":
        ratios = None
        if isinstance(policies, list):
            policies = ["keep" if policy == "recompute" else policy for policy in policies]
    more = (
        *(policies, mode, besides),
        *(_run_keys(content, len(partition or [])), content.get("predicted")),
    )
    if ratios is None:
        return PartitionFile(partition, None, *more)
    if not (isinstance(ratios, list) and all(_is_ratio(ratio) for ratio in ratios)):
        raise ConfigError(f"{path}: recompute_ratio = {show(ratios)} is not a list with a number from 0 to 1 per stage")
    if partition is not None and len(ratios) != len(partition):
        raise ConfigError(
            f"{path}: recompute_ratio has {len(ratios)} entries and partition has {len(partition)}; give one per stage"
        )
    return PartitionFile(partition, [float(ratio) for ratio in ratios], *more)


def _run_keys(content: Mapping[str, Any], num_stages: int) -> dict[str, Any]:
    """Return what a plan says of the keys of a run; without a schedule the file is no plan."""
    if content.get("schedule") is None:
        return {}
    keys = {f"pipeline.{key}": content[key] for key in _SAME_NAME if content.get(key) is not None}
    per_rank, count, size = (content.get(key) for key in ("stages_per_rank", "num_microbatches", "microbatch_size"))
    if _is_int(per_rank) and per_rank > 0 and num_stages % per_rank == 0:
        keys["pipeline.num_ranks"] = num_stages // per_rank
    if _is_int(count) and _is_int(size):
        keys["train.batch_size"] = count * size
    return keys


def read_stage_maps(path: Path) -> StageMaps:
    """Read the original's maps: ``{"module_to_stage_map": ..., "stage_to_rank_map": ...}`` and options of each stage.

    Modules are the entries of the partition and, after them, the loss.

    Raises:
        ConfigError: the file is missing, of another form, or asks for what VPipe does not have yet.
    """
    content = _read_object(path, ("module_to_stage_map", "stage_to_rank_map", *_PER_STAGE, "mp_size"))
    if content.get("mp_size", 1) != 1:
        raise ConfigError(
            f"{path}: mp_size = {show(content['mp_size'])}: tensor parallelism is not supported yet; use 1"
        )
    num_stages, num_ranks = None, None
    if content.get("module_to_stage_map") is not None:
        num_stages = _count_module_stages(path, content["module_to_stage_map"])
    if content.get("stage_to_rank_map") is not None:
        rank_stages, num_ranks = _count_ranks(path, content["stage_to_rank_map"])
        if num_stages is not None and num_stages != rank_stages:
            raise ConfigError(
                f"{path}: module_to_stage_map has {num_stages} stages and stage_to_rank_map has {rank_stages}"
            )
        num_stages = rank_stages
    options = {key: content[key] for key in _PER_STAGE if content.get(key) is not None}
    return StageMaps(num_stages, num_ranks, options)


def _count_module_stages(path: Path, modules: Any) -> int:
    """Count the stages of a module_to_stage_map, which must give each module a stage of its own, the loss excepted."""
    start = f"{path}: module_to_stage_map = {show(modules)}"
    if not (isinstance(modules, list) and modules and all(_is_int(stage) and stage >= 0 for stage in modules)):
        raise ConfigError(f"{start} is not a list of stages, e.g. [0, 1, 2, 3, 3]")
    num_stages = int(modules[-1]) + 1
    expected = list(range(min(num_stages, len(modules) + 1)))  # a mistyped number may be huge
    if modules in (expected, [*expected, num_stages - 1]):
        return num_stages
    likely = list(range(min(max(modules), len(modules)) + 1))
    raise ConfigError(
        f"{start} does not count stages up, one per entry of the partition and the last again for the loss; write "
        f"{[*likely, likely[-1]]} and join what shares a stage in the partition"
    )


def _count_ranks(path: Path, ranks_of: Any) -> tuple[int, int]:
    """Count stages and ranks of a stage_to_rank_map, which must lay stages over ranks in order."""
    start = f"{path}: stage_to_rank_map = {show(ranks_of)}"
    num_stages = len(ranks_of) if isinstance(ranks_of, Mapping) else 0
    stages = [str(stage) for stage in range(num_stages)]
    if not num_stages or set(ranks_of) != set(stages) or not all(_is_ranks(ranks_of[stage]) for stage in stages):
        raise ConfigError(f'{start} does not give every stage from 0 up its ranks, e.g. {{"0": [0], "1": [1]}}')
    for stage in stages:
        if len(ranks_of[stage]) > 1:
            raise ConfigError(
                f"{path}: stage_to_rank_map gives stage {stage} the ranks {ranks_of[stage]}: replicated stages are not "
                "supported yet; give each stage one rank"
            )
    given = [ranks_of[stage][0] for stage in stages]
    num_ranks = len(set(given))
    even = num_stages % num_ranks == 0
    expected = [stage % num_ranks if even else stage for stage in range(num_stages)]
    if given != expected:
        wrong = next(stage for stage in range(num_stages) if given[stage] != expected[stage])
        raise ConfigError(
            f"{path}: stage_to_rank_map puts stage {wrong} on rank {given[wrong]}; stages lie on ranks in order, here "
            f"{expected}; reorder 'machines' to choose devices"
        )
    return num_stages, num_ranks


def _read_object(path: Path, keys: tuple[str, ...], ignored: tuple[str, ...] = ()) -> dict[str, Any]:
    content = parse_json(read_text(path), str(path))
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: is not a JSON object with the keys {', '.join(keys)}")
    for key in content:
        if key not in (*keys, *ignored):
            near = did_you_mean(key, keys) or f"; known here: {', '.join(keys)}"
            raise ConfigError(f"{path}: {key} = {show(content[key])} is not a known key{near}")
    return content


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_ratio(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_ranks(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(_is_int(rank) for rank in value)
