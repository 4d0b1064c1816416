"""Proof that a run computes what one process computes, bit for bit.

That is: losses, gradients, weights, buffers, what optimizers keep, the norms that are told, and the held-out loss.

The pipeline runs a few iterations and leaves what it computed in files; then one process, started in the same way and
with the same number of threads, runs the reference on the same batches and compares.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from vpipe.config import RunConfig, read_config
from vpipe.data.batches import microbatch_rows
from vpipe.errors import LaunchError
from vpipe.model.loss import exact_sum
from vpipe.report.metrics import MetricsWriter
from vpipe.runtime.batch import Batch
from vpipe.runtime.comm.joining import use_device
from vpipe.runtime.comm.world import World
from vpipe.runtime.pipeline import Hooks, Pipeline
from vpipe.schedule.weights import weight_usage
from vpipe.train.planning import plan_run
from vpipe.verify.comparison import Comparison, compare
from vpipe.verify.reference import Reference, ReferenceResult
from vpipe.workload.device import compute_reproducibly, device_of, join_world
from vpipe.workload.same_data import agree_on_data
from vpipe.workload.setup import Setup, build_setup, build_training_pipeline

__all__ = [
    "VerifyReport",
    "pipeline_directory",
    "pipeline_rank",
    "progress_path",
    "reference_directory",
    "reference_rank",
    "remove_computed",
    "report_path",
    "run_pipeline",
    "run_reference",
]


_HELD_OUT_BATCHES = 2


@dataclass(frozen=True)
class VerifyReport:
    """What `vpipe verify` found."""

    equal: bool
    max_abs_difference: dict[str, float | None]
    schedule: str
    synchronous: bool
    num_ranks: int
    iterations: int
    comparisons: dict[str, Comparison]


def report_path(run_directory: Path) -> Path:
    """Return the file that holds the report."""
    return run_directory / "verify.json"


def pipeline_directory(run_directory: Path) -> Path:
    """Return where the pipeline's ranks write."""
    return run_directory / "pipeline"


def reference_directory(run_directory: Path) -> Path:
    """Return where the one process writes."""
    return run_directory / "one_process"


def progress_path(directory: Path) -> Path:
    """Return the file in one of these two that says how far the training is."""
    return directory / "metrics.jsonl"


@dataclass
class _Computed:
    """What a training computed: per iteration the loss's parts, per applied update the gradients, the state in the end.

    `buffers` are what modules keep besides parameters, such as batch norm's statistics, `state` is what optimizers
    keep, `norms` are those that were told, and `evaluation` is the loss on the first held-out batches.
    """

    losses: list[dict[str, float]]
    gradients: dict[int, dict[str, Tensor]]
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    state: dict[str, Tensor]
    norms: dict[int, float]
    evaluation: dict[str, float]


def pipeline_rank(arguments: Sequence[str]) -> None:
    """Be one rank of the pipeline.

    `arguments` are a folder, a configuration file and the number of iterations.
    """
    directory, path, iterations = arguments
    config = read_config(path).config
    with join_world(config) as world:
        config = plan_run(config, world, pipeline_directory(Path(directory))).config
        if world.rank == 0:
            _planned_path(Path(directory)).write_text(config.model_dump_json())
        run_pipeline(config, int(iterations), Path(directory), world)


def reference_rank(arguments: Sequence[str]) -> None:
    """Be the one process, after the pipeline; `arguments` are those of `pipeline_rank`."""
    directory, _, iterations = arguments
    config = RunConfig.model_validate_json(_planned_path(Path(directory)).read_text())
    run_reference(config, int(iterations), Path(directory))


def run_pipeline(config: RunConfig, iterations: int, run_directory: Path, world: World) -> None:
    """Train as one of `world`'s ranks, and keep the results in a file."""
    compute_reproducibly(world.device)
    setup = build_setup(config)
    agree_on_data(setup, world)
    gradients: dict[int, dict[str, Tensor]] = {}
    losses: list[dict[str, float]] = []
    norms: dict[int, float] = {}

    def keep(stage: int, microbatch: int, named: Mapping[str, Tensor]) -> None:
        update = len(losses) if setup.plan.synchronous else microbatch // pipeline.programs.update_size
        copies = {name: gradient.detach().cpu().clone() for name, gradient in named.items()}
        gradients.setdefault(update, {}).update(copies)

    pipeline = build_training_pipeline(setup, world, Hooks(gradients=keep))
    for result in pipeline.train(setup.batches(pipeline.fields, 0, iterations), iterations):
        if result.gradient_norm is not None and setup.plan.synchronous:
            norms[len(losses)] = result.gradient_norm
        losses.append(dict(result.parts))
        if world.rank == 0:
            _tell(progress_path(pipeline_directory(run_directory)), len(losses), iterations, result.loss)
    computed = _Computed(
        losses,
        gradients,
        _merge([_parameters(pipeline, stage) for stage in pipeline.held]),
        _merge([_buffers(pipeline, stage) for stage in pipeline.held]),
        _merge([_optimizer_state(pipeline, stage) for stage in pipeline.held]),
        norms,
        _evaluate(pipeline, setup) if setup.evaluates else {},
    )
    _save(computed, _computed_path(run_directory, world.rank))


def _evaluate(pipeline: Pipeline, setup: Setup) -> dict[str, float]:
    """Return the held-out loss and its parts; metrics, which nothing depends on, are not verified."""
    found = pipeline.evaluate(_held_out(setup, pipeline.fields), setup.config.microbatch_size)
    return {name: value for name, value in found.items() if name not in pipeline.chain.metric_names}


def _save(computed: _Computed, path: Path) -> None:
    try:
        torch.save(asdict(computed), path)
    except RuntimeError as error:  # how torch's own writer tells of every trouble with a file
        held = [*computed.gradients.values(), computed.parameters, computed.buffers, computed.state]
        num_bytes = sum(tensor.nbytes for named in held for tensor in named.values())
        raise LaunchError(
            f"cannot write what the pipeline computed, {num_bytes} bytes, to {path}; free some space, verify fewer "
            "--iterations, or choose another log_directory"
        ) from error


def _tell(path: Path, done: int, total: int, loss: float) -> None:
    with MetricsWriter(path) as writer:
        writer.write({"iteration": done, "iterations": total, "loss": loss})


def _merge(named: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor for mapping in named for name, tensor in mapping.items()}


def _parameters(pipeline: Pipeline, stage: int) -> dict[str, Tensor]:
    held = pipeline.held[stage]
    blocks = pipeline.chain.blocks[held.stage.start : held.stage.stop]
    return {
        block.global_name(name): item.detach().cpu()
        for block, module in zip(blocks, held.weights.newest, strict=True)
        for name, item in module.named_parameters()
    }


def _optimizer_state(pipeline: Pipeline, stage: int) -> dict[str, Tensor]:
    weights = pipeline.held[stage].weights
    kept = {} if weights.optimizer is None else weights.optimizer.state
    return {
        f"{name}: {key}": torch.as_tensor(value).detach().cpu()
        for name, parameter in zip(weights.names, weights.parameters, strict=True)
        for key, value in kept.get(parameter, {}).items()
        if isinstance(value, Tensor | int | float)
    }


def _held_out(setup: Setup, fields: tuple[str, ...]) -> Iterator[Batch]:
    return islice(setup.evaluation_batches(fields), _HELD_OUT_BATCHES)


def _buffers(pipeline: Pipeline, stage: int) -> dict[str, Tensor]:
    held = pipeline.held[stage]
    blocks = pipeline.chain.blocks[held.stage.start : held.stage.stop]
    return {
        block.global_name(name): buffer.cpu()
        for block, module in zip(blocks, held.weights.newest, strict=True)
        for name, buffer in module.named_buffers()
    }


def _computed_path(run_directory: Path, rank: int | str) -> Path:
    return run_directory / f"computed.{rank}.pt"


def _planned_path(run_directory: Path) -> Path:
    """Return where the ranks keep the run that they train, which may have been planned."""
    return run_directory / "planned.json"


def remove_computed(run_directory: Path) -> None:
    """Remove what the ranks computed, as big as all of the run's gradients."""
    for path in run_directory.glob(_computed_path(Path(), "*").name):
        path.unlink()


def run_reference(config: RunConfig, iterations: int, run_directory: Path) -> VerifyReport:
    """Train in this process, compare with what the ranks kept, write the report to its file and return it."""
    device = use_device(torch.device(device_of(config)))
    compute_reproducibly(device)
    setup = build_setup(config)
    expected = _reference(setup, iterations, device, reference_directory(run_directory))
    found = _load(run_directory, config.num_ranks)
    comparisons = {
        "loss": compare(_as_tensors(found.losses), _as_tensors(expected.losses)),
        "gradients": compare(_numbered(found.gradients), _numbered(expected.gradients)),
        "parameters": compare(found.parameters, expected.parameters),
    }
    if expected.buffers or found.buffers:
        comparisons["buffers"] = compare(found.buffers, expected.buffers)
    if expected.state or found.state:
        comparisons["optimizer"] = compare(found.state, expected.state)
    if expected.norms or found.norms:
        comparisons["norms"] = compare(_named(found.norms), _named(expected.norms))
    if expected.evaluation or found.evaluation:
        comparisons["evaluation"] = compare(_as_tensors([found.evaluation]), _as_tensors([expected.evaluation]))
    report = VerifyReport(
        equal=not any(item.num_different for item in comparisons.values()),
        max_abs_difference={name: item.max_abs_difference for name, item in comparisons.items()},
        schedule=config.pipeline.schedule,
        synchronous=setup.plan.synchronous,
        num_ranks=config.num_ranks,
        iterations=iterations,
        comparisons=comparisons,
    )
    report_path(run_directory).write_text(json.dumps(asdict(report), indent=2, allow_nan=False) + "\n")
    return report


def _reference(setup: Setup, iterations: int, device: torch.device, directory: Path) -> _Computed:
    config, plan = setup.config, setup.plan
    reference = Reference(
        setup.chain,
        setup.optimizer,
        partition=None if plan.synchronous else plan.cut,  # one optimizer, where all stages update together
        seed=config.seed,
        clip_grad_norm=config.optimizer.clip_grad_norm,
        learning_rate=setup.learning_rate,
        device=device,
    )
    size = config.num_microbatches
    microbatches = [
        {name: tensor[rows] for name, tensor in batch.fields.items()}
        for batch in setup.batches(setup.chain.fields, 0, iterations)
        for rows in microbatch_rows(batch.num_samples, size)
    ]
    results: list[ReferenceResult] = []
    if plan.synchronous:
        for start in range(0, len(microbatches), size):
            results.append(reference.train_batch(microbatches[start : start + size]))
            _tell(
                progress_path(directory), len(results), iterations, exact_sum(results[-1].batch_parts(size)[0].values())
            )
    else:
        usage = weight_usage(plan.build(iterations))
        results.append(reference.train_asynchronous(microbatches, usage, size))
    gradients = [named for result in results for named in result.gradients]
    return _Computed(
        [parts for result in results for parts in result.batch_parts(size)],
        {index: named for index, named in enumerate(gradients) if named},
        reference.parameters(),
        reference.buffers(),
        {name: tensor.detach().cpu() for name, tensor in reference.optimizer_state().items()},
        _told_norms(results) if _tells_norms(config, plan.synchronous) else {},
        reference.evaluate(_pieces(setup)) if setup.evaluates else {},
    )


def _told_norms(results: Sequence[ReferenceResult]) -> dict[int, float]:
    """Return the norms by batch; of one whose loss is not finite none is taken."""
    return {
        index: result.norms[0][0]
        for index, result in enumerate(results)
        if all(math.isfinite(part) for share in result.losses for part in share.values())
    }


def _tells_norms(config: RunConfig, synchronous: bool) -> bool:
    return synchronous and (config.train.gradient_norm or config.optimizer.clip_grad_norm is not None)


def _pieces(setup: Setup) -> list[dict[str, Tensor]]:
    """Return the microbatches of an evaluation: each batch is cut from its start, with one short last piece."""
    size = setup.config.microbatch_size
    return [
        batch.rows(slice(start, min(start + size, batch.num_samples)))
        for batch in _held_out(setup, setup.chain.fields)
        for start in range(0, batch.num_samples, size)
    ]


def _load(run_directory: Path, num_ranks: int) -> _Computed:
    ranks = [_Computed(**torch.load(_computed_path(run_directory, rank))) for rank in range(num_ranks)]
    return _Computed(
        ranks[0].losses,
        {
            update: _merge([rank.gradients.get(update, {}) for rank in ranks])
            for update in sorted({update for rank in ranks for update in rank.gradients})
        },
        _merge([rank.parameters for rank in ranks]),
        _merge([rank.buffers for rank in ranks]),
        _merge([rank.state for rank in ranks]),
        ranks[0].norms,
        ranks[0].evaluation,
    )


def _named(norms: Mapping[int, float]) -> dict[str, Tensor]:
    return {f"iteration {index + 1}": torch.tensor(norm, dtype=torch.float64) for index, norm in norms.items()}


def _as_tensors(losses: Sequence[Mapping[str, float]]) -> dict[str, Tensor]:
    return {
        f"iteration {index}: {name}": torch.tensor(value, dtype=torch.float64)
        for index, parts in enumerate(losses, start=1)
        for name, value in parts.items()
    }


def _numbered(gradients: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {
        f"update {index + 1}: {name}": tensor for index, named in gradients.items() for name, tensor in named.items()
    }
