"""Whether the parts of a run fit each other. Each check yields `Problem`s and says in its line what would be legal."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator, Sequence

from vpipe.config.checks.model import check_family
from vpipe.config.checks.plan import check_planning
from vpipe.config.fields import show
from vpipe.config.planning.to_plan import to_recipe
from vpipe.config.problems import Problem
from vpipe.config.run import RunConfig
from vpipe.config.sections import ModelConfig
from vpipe.errors import ScheduleError
from vpipe.plan.partition import check_partition
from vpipe.plan.policy import check_ratios
from vpipe.plan.recipe import OPTIONS
from vpipe.schedule.csv_file import check_csv_run, is_csv_file
from vpipe.schedule.registry import SCHEDULES, find_entry, known_entry
from vpipe.words.near import did_you_mean

__all__ = ["check_config", "is_synchronous"]


def check_config(run: RunConfig) -> list[Problem]:
    """Return everything about `run` that does not fit together; empty when it can be trained."""
    return [problem for check in _CHECKS for problem in check(run)]


def is_synchronous(run: RunConfig) -> bool | None:
    """Return whether the run's schedule updates all stages at once, or None when there is no such schedule."""
    entry = known_entry(run.pipeline.schedule)
    return None if entry is None else entry.synchronous


def _check_schedule(run: RunConfig) -> Iterator[Problem]:
    pipeline = run.pipeline
    if is_csv_file(pipeline.schedule):
        yield from _check_schedule_file(pipeline.schedule)
    elif pipeline.schedule not in (*SCHEDULES, "auto"):
        near = did_you_mean(pipeline.schedule, [*SCHEDULES, "auto"])
        names = ", ".join(show(name) for name in (*SCHEDULES, "auto"))
        text = f"pipeline.schedule = {show(pipeline.schedule)} is not one of {names}{near}"
        yield Problem(("pipeline.schedule",), text)
    entry = known_entry(pipeline.schedule)
    if entry is None:
        return
    for option in OPTIONS:
        value = getattr(pipeline, option.key)
        if value and option.builder not in entry.options:
            able = " or ".join(name for name, other in SCHEDULES.items() if option.builder in other.options)
            yield Problem(
                (f"pipeline.{option.key}", "pipeline.schedule"),
                f"pipeline.{option.key} = {show(value)} needs pipeline.schedule = {able}, not "
                f"{show(pipeline.schedule)}",
            )


def _check_schedule_file(name: str) -> Iterator[Problem]:
    try:
        reasons = check_csv_run(name, synchronous=find_entry(name).synchronous)
    except ScheduleError as error:
        reasons = [str(error)]
    for reason in reasons:
        yield Problem(("pipeline.schedule",), f"pipeline.{reason}")


def _check_flow(run: RunConfig) -> Iterator[Problem]:
    """Build the schedule when nothing is known against it: it has rules of its own about ranks and microbatches.

    A huge one is left to the run itself, which needs it anyway: here the answer has to come at once.
    """
    pipeline, count = run.pipeline, run.pipeline.num_microbatches
    known = (_check_schedule, _check_partition, _check_asynchronous, _check_depths)
    if count == "auto" or pipeline.schedule == "auto" or run.num_stages * count > _MAX_BUILT:
        return
    if any(problem for check in known for problem in check(run)):
        return
    try:
        to_recipe(run).bare().build()
    except ScheduleError as error:
        keys = ["schedule", "num_ranks", "stages_per_rank", "num_microbatches", *(option.key for option in OPTIONS)]
        yield Problem(tuple(f"pipeline.{key}" for key in keys), f"pipeline: {error}")


def _check_microbatches(run: RunConfig) -> Iterator[Problem]:
    batch, count = run.train.batch_size, run.pipeline.num_microbatches
    if count == "auto" or batch % count == 0:
        return
    keys = ("train.batch_size", "pipeline.num_microbatches")
    if batch < count:
        yield Problem(
            keys,
            f"train.batch_size = {batch} cannot be cut into pipeline.num_microbatches = {count} microbatches with "
            f"samples; use a batch size of at least {count}, or at most {batch} microbatches",
        )
    elif run.needs_plan:
        sizes = [batch // count * count, (batch // count + 1) * count]
        yield Problem(
            (*keys, "plan.partition", "plan.memory_limit", "pipeline.schedule"),
            f"train.batch_size = {batch} cannot be cut into pipeline.num_microbatches = {count} equal microbatches, "
            f"and the planner counts with one size; use a batch size of {_or(sizes)}, or "
            f"{_or(_nearest_divisors(batch, count))} microbatches",
        )


def _check_partition(run: RunConfig) -> Iterator[Problem]:
    partition, num_blocks = run.plan.partition, run.num_blocks
    keys = ("plan.partition", "pipeline.num_ranks", "pipeline.stages_per_rank", "launch.machines", "model.num_layers")
    if isinstance(partition, list):
        blocks = sum(partition) if num_blocks is None else num_blocks
        # The planner looks for schedules with that many stages.
        is_open = run.pipeline.schedule == "auto" and len(partition) % run.num_ranks == 0
        for reason in check_partition(partition, blocks, len(partition) if is_open else run.num_stages):
            yield Problem(keys, f"plan.partition = {show(partition)}: {reason}{_layers_meant(run, partition, blocks)}")
    elif num_blocks is not None and run.num_stages > num_blocks:
        yield Problem(
            keys,
            f"pipeline.num_ranks = {run.num_ranks} with {_stages(run.pipeline.stages_per_rank)} each makes "
            f"{run.num_stages} stages out of {num_blocks} blocks; use at most {num_blocks} stages",
        )


def _layers_meant(run: RunConfig, partition: Sequence[int], num_blocks: int) -> str:
    """Say so where a partition adds up to the layers of a model, each of which is two blocks."""
    layers = run.model.num_layers
    if run.model.type == "custom" or sum(partition) != layers or num_blocks <= layers:
        return ""
    meant = [2 * size for size in partition]
    meant[0] += 1  # the embedding
    meant[-1] += num_blocks - 2 * layers - 1
    return (
        f" ({layers} is the number of layers: each is two blocks, attention and feed-forward, the first stage also has "
        f"the embedding{' and the last the output' * (num_blocks > 2 * layers + 1)}; in blocks this is {show(meant)})"
    )


def _check_recompute(run: RunConfig) -> Iterator[Problem]:
    pipeline = run.pipeline
    ratio, mode = pipeline.recompute_ratio, pipeline.recompute
    if isinstance(ratio, list):
        for reason in check_ratios(ratio, run.num_stages):
            keys = ("pipeline.recompute_ratio", "pipeline.num_ranks", "pipeline.stages_per_rank", "launch.machines")
            yield Problem(keys, f"pipeline.recompute_ratio = {show(ratio)}: {reason}")
    if mode is not None and any(ratio if isinstance(ratio, list) else [ratio]):
        yield Problem(
            ("pipeline.recompute", "pipeline.recompute_ratio"),
            f"pipeline.recompute = {show(mode)} and pipeline.recompute_ratio = {show(ratio)} say the same thing twice; "
            "keep one",
        )
    if mode == "except_last" and pipeline.schedule != "gpipe":
        yield Problem(
            ("pipeline.recompute", "pipeline.schedule"),
            f"pipeline.recompute = 'except_last' needs pipeline.schedule = gpipe, not {show(pipeline.schedule)}; "
            "elsewhere give the last stage, where each backward follows its forward, a recompute_ratio of 0",
        )


def _check_asynchronous(run: RunConfig) -> Iterator[Problem]:
    pipeline = run.pipeline
    count = pipeline.num_microbatches
    if pipeline.macrobatch and count != "auto" and count < run.num_stages:
        yield Problem(
            ("pipeline.macrobatch", "pipeline.num_microbatches", "pipeline.num_ranks"),
            f"pipeline.macrobatch = true needs at least as many microbatches as stages: pipeline.num_microbatches = "
            f"{count}, stages = {run.num_stages}",
        )
    if pipeline.macrobatch and pipeline.vertical_sync:
        yield Problem(
            ("pipeline.macrobatch", "pipeline.vertical_sync"),
            "pipeline.macrobatch = true and pipeline.vertical_sync = true rule weight versions differently; keep one",
        )
    if run.model.tie_weights and run.num_stages > 1 and is_synchronous(run) is False:
        yield Problem(
            ("model.tie_weights", "pipeline.schedule", "pipeline.num_ranks"),
            f"model.tie_weights = true ties stage 0 to stage {run.num_stages - 1}, and pipeline.schedule = "
            f"{show(pipeline.schedule)} updates them apart; use a synchronous schedule such as 1f1b, or false",
        )


def _check_depths(run: RunConfig) -> Iterator[Problem]:
    depths = run.pipeline.stage_to_depth_map
    keys = ("pipeline.stage_to_depth_map", "pipeline.num_ranks", "pipeline.stages_per_rank", "launch.machines")
    if depths is None:
        return
    start = f"pipeline.stage_to_depth_map = {show(depths)}"
    if len(depths) != run.num_stages:
        yield Problem(keys, f"{start} has {len(depths)} entries for {run.num_stages} stages; give one per stage")
    for stage in range(1, len(depths)):
        if depths[stage] > depths[stage - 1]:
            yield Problem(
                keys,
                f"{start}: stage {stage} is deeper ({depths[stage]}) than stage {stage - 1} ({depths[stage - 1]}) and "
                "would wait for ever; depths must not grow along the pipeline",
            )
            return


def _check_launch(run: RunConfig) -> Iterator[Problem]:
    launch, machines = run.launch, run.launch.machines
    if machines and len(machines) != run.num_ranks:
        yield Problem(
            ("launch.machines", "pipeline.num_ranks"),
            f"launch.machines = {show(machines)} lists {len(machines)} for {run.num_ranks} ranks (pipeline.num_ranks); "
            "give one 'host:device' per rank",
        )
    here = {"localhost", "127.0.0.1", socket.gethostname()}
    for host in dict.fromkeys(machine.partition(":")[0] for machine in machines):
        if host not in here:
            yield Problem(
                ("launch.machines",),
                f"launch.machines: {show(host)} is another machine; starting ranks over ssh is not supported yet; use "
                "'localhost:0', or start the ranks yourself with torchrun and leave launch.machines out",
            )
    if launch.distributed_backend != "nccl":
        return
    if launch.device == "cpu":
        yield Problem(
            ("launch.distributed_backend", "launch.device"),
            "launch.distributed_backend = 'nccl' needs GPUs and launch.device = 'cpu'; use 'gloo', or device 'cuda'",
        )
    shared = [machine for machine in dict.fromkeys(machines) if machines.count(machine) > 1]
    if shared:
        yield Problem(
            ("launch.distributed_backend", "launch.machines"),
            f"launch.distributed_backend = 'nccl' needs a GPU per rank and launch.machines gives {show(shared[0])} to "
            f"{machines.count(shared[0])} ranks; use 'gloo', or other devices",
        )


def _check_model(run: RunConfig) -> Iterator[Problem]:
    model = run.model
    yield from _check_entry("model", model.type, model.entry, bool(model.options))
    if model.type == "custom":
        defaults = ModelConfig()
        for key in _BUILT_IN_ONLY:
            if getattr(model, key) != getattr(defaults, key):
                value = show(getattr(model, key))
                text = f"model.{key} = {value} means nothing to model.type = 'custom'; put it under model.options"
                yield Problem((f"model.{key}", "model.type"), text)
        return
    yield from check_family(model)
    if model.hidden_size % model.num_heads:
        heads = _or(_nearest_divisors(model.hidden_size, model.num_heads))
        yield Problem(
            ("model.num_heads", "model.hidden_size", "model.size"),
            f"model.num_heads = {model.num_heads} does not divide model.hidden_size = {model.hidden_size}; use {heads}",
        )
    length = run.data.sequence_length
    if run.data.type == "bert" and length is not None and length > model.max_position_embeddings:
        yield Problem(
            ("data.sequence_length", "model.max_position_embeddings"),
            f"data.sequence_length = {length} is longer than model.max_position_embeddings = "
            f"{model.max_position_embeddings}; raise the latter",
        )


def _check_data(run: RunConfig) -> Iterator[Problem]:
    data = run.data
    yield from _check_entry("data", data.type, data.entry, bool(data.options))
    if data.type == "bert" and data.data_dir is None and not data.synthetic_data:
        yield Problem(
            ("data.data_dir", "data.synthetic_data"),
            "data.data_dir is missing; give the folder that `vpipe data prepare` wrote, or data.synthetic_data = true",
        )


def _check_entry(section: str, kind: str, entry: str | None, has_options: bool) -> Iterator[Problem]:
    """Check that custom models and data have an entry, and built-in ones none."""
    keys = (f"{section}.entry", f"{section}.type")
    if kind != "custom":
        given = [name for name, there in (("entry", entry is not None), ("options", has_options)) if there]
        for name in given:
            text = f"{section}.{name} is for {section}.type = 'custom', and the type is '{kind}'; change one of them"
            yield Problem((f"{section}.{name}", f"{section}.type"), text)
    elif entry is None:
        yield Problem(keys, f"{section}.entry is missing; {section}.type = 'custom' needs {_ENTRY_FORM}")
    elif not all(part.strip() for part in entry.rpartition(":")):
        yield Problem(keys, f"{section}.entry = {show(entry)} is not of the form {_ENTRY_FORM}")


def _check_length(run: RunConfig) -> Iterator[Problem]:
    epochs, iterations = run.train.epochs, run.train.iterations
    keys = ("train.epochs", "train.iterations")
    if epochs is None and iterations is None:
        yield Problem(keys, "train.epochs and train.iterations are both missing; give one of them")
    elif epochs is not None and iterations is not None:
        text = f"train.epochs = {epochs} and train.iterations = {iterations} both say how long to train; keep one"
        yield Problem(keys, text)


def _check_optimizer(run: RunConfig) -> Iterator[Problem]:
    iterations, epochs = run.optimizer.step_size_iterations, run.optimizer.step_size_epochs
    keys = ("optimizer.step_size_iterations", "optimizer.step_size_epochs", "optimizer.learning_rate_policy")
    if iterations is not None and epochs is not None:
        yield Problem(
            keys,
            f"optimizer.step_size_iterations = {iterations} and optimizer.step_size_epochs = {epochs} both say how far "
            "steps are apart; keep one",
        )
    elif run.optimizer.learning_rate_policy == "step" and iterations is None and epochs is None:
        yield Problem(
            keys,
            "optimizer.step_size_iterations and optimizer.step_size_epochs are both missing; "
            "optimizer.learning_rate_policy = 'step' needs one of them",
        )


def _stages(number: int) -> str:
    return f"{number} stage" + "s" * (number != 1)


def _nearest_divisors(number: int, near: int) -> list[int]:
    """Return the divisors of `number` next below and next above `near`, as far as a short search finds them."""
    top = min(near - 1, number)
    below = (divisor for divisor in range(top, max(0, top - _SEARCH), -1) if number % divisor == 0)
    above = (divisor for divisor in range(near + 1, min(number, near + _SEARCH) + 1) if number % divisor == 0)
    return [next(below, 1), *itertools.islice(above, 1)]


def _or(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))


_SEARCH = 10_000
_MAX_BUILT = 20_000
_ENTRY_FORM = "'file.py:function' or 'package.module:function'"
_BUILT_IN_ONLY = (
    "size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "dropout",
    "attention_dropout",
    "init_from",
)
_CHECKS = (
    _check_model,
    _check_data,
    _check_schedule,
    _check_microbatches,
    _check_partition,
    _check_recompute,
    _check_asynchronous,
    _check_depths,
    check_planning,
    _check_flow,
    _check_optimizer,
    _check_length,
    _check_launch,
)
