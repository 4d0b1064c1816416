"""Proof that a run computes what one process computes: loss, gradients and weights, bit for bit.

The pipeline runs a few iterations and leaves what it computed in files; then one process, started in the same way and with
the same number of threads, runs the reference on the same batches and compares.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpipe.config import RunConfig, load_config
from vpipe.runtime.feed import split_rows
from vpipe.runtime.pipeline import Hooks, Pipeline
from vpipe.runtime.process_group import process_group
from vpipe.runtime.programs import ProgramBuilder
from vpipe.schedule.weights import weight_usage
from vpipe.train.reference import Reference, ReferenceResult
from vpipe.train.setup import Setup, build_setup, build_training_pipeline
from vpipe.train.trainer import default_device

__all__ = ["Comparison", "VerifyReport", "pipeline_rank", "reference_rank", "report_path"]


@dataclass(frozen=True)
class Comparison:
    """How two sets of named numbers differ."""

    num_tensors: int
    num_different: int
    max_abs_difference: float
    first_different: str | None


@dataclass(frozen=True)
class VerifyReport:
    """What `vpipe verify` found."""

    equal: bool
    max_abs_difference: dict[str, float]
    schedule: str
    synchronous: bool
    num_ranks: int
    iterations: int
    comparisons: dict[str, Comparison]


def report_path(run_directory: Path) -> Path:
    """Return the file that holds the report."""
    return run_directory / "verify.json"


@dataclass
class _Computed:
    """What a training computed: per iteration the loss's parts, per update the gradients, in the end the parameters."""

    losses: list[dict[str, float]]
    gradients: list[dict[str, Tensor]]
    parameters: dict[str, Tensor]


def pipeline_rank(arguments: Sequence[str]) -> None:
    """Be one rank of the pipeline: train, and keep the results.

    `arguments` are a folder, a configuration file, the number of iterations, and overrides.
    """
    directory, path, iterations, *overrides = arguments
    config = load_config(path, overrides)
    device = default_device() if config.launch.device == "auto" else config.launch.device
    with process_group(config.launch.distributed_backend, config.launch.timeout_seconds, device=device) as group:
        setup = build_setup(config)
        gradients: dict[int, list[dict[str, Tensor]]] = {}

        def keep(stage: int, microbatch: int, named: Mapping[str, Tensor]) -> None:
            copies = {name: gradient.detach().cpu().clone() for name, gradient in named.items()}
            gradients.setdefault(stage, []).append(copies)

        pipeline = build_training_pipeline(setup, group.device, Hooks(gradients=keep))
        results = list(pipeline.train(setup.batches(pipeline.fields, 0, int(iterations)), int(iterations)))
        computed = _Computed(
            [dict(result.parts) for result in results],
            [_merge(updates) for updates in zip(*gradients.values(), strict=True)],
            _merge([_parameters(pipeline, stage) for stage in pipeline.held]),
        )
        torch.save(asdict(computed), _computed_path(Path(directory), group.rank))


def _merge(named: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor for mapping in named for name, tensor in mapping.items()}


def _parameters(pipeline: Pipeline, stage: int) -> dict[str, Tensor]:
    weights = pipeline.held[stage].weights
    return {name: item.detach().cpu() for name, item in zip(weights.names, weights.parameters, strict=True)}


def _computed_path(run_directory: Path, rank: int) -> Path:
    return run_directory / f"computed.{rank}.pt"


def reference_rank(arguments: Sequence[str]) -> None:
    """Be the one process: compute the same, compare with what the ranks kept, and write the report.

    `arguments` are those of `pipeline_rank`.
    """
    directory, path, iterations, *overrides = arguments
    config = load_config(path, overrides)
    device = default_device() if config.launch.device == "auto" else config.launch.device
    expected = _reference(build_setup(config), int(iterations), device)
    found = _load(Path(directory), config.num_ranks)
    comparisons = {
        "loss": _compare(_as_tensors(found.losses), _as_tensors(expected.losses)),
        "gradients": _compare(_numbered(found.gradients), _numbered(expected.gradients)),
        "parameters": _compare(found.parameters, expected.parameters),
    }
    programs = _programs(config)
    report = VerifyReport(
        equal=not any(item.num_different for item in comparisons.values()),
        max_abs_difference={name: item.max_abs_difference for name, item in comparisons.items()},
        schedule=config.pipeline.schedule,
        synchronous=programs.synchronous,
        num_ranks=config.num_ranks,
        iterations=int(iterations),
        comparisons=comparisons,
    )
    report_path(Path(directory)).write_text(json.dumps(asdict(report), indent=2) + "\n")


def _programs(config: RunConfig) -> ProgramBuilder:
    options = dict(config.schedule_options)
    macrobatch = options.pop("microbatches_per_update", None) is not None
    return ProgramBuilder(
        config.pipeline.schedule,
        config.num_ranks,
        0,
        config.pipeline.num_microbatches,
        stages_per_rank=config.pipeline.stages_per_rank,
        macrobatch=macrobatch,
        options=options,
    )


def _reference(setup: Setup, iterations: int, device: str) -> _Computed:
    config = setup.config
    programs = _programs(config)
    reference = Reference(
        setup.chain,
        setup.optimizer,
        partition=setup.partition,
        seed=config.seed,
        clip_grad_norm=config.optimizer.clip_grad_norm,
        learning_rate=setup.learning_rate,
        device=device,
    )
    size = config.pipeline.num_microbatches
    microbatches = [
        {name: tensor[rows] for name, tensor in batch.fields.items()}
        for batch in setup.batches(setup.chain.fields, 0, iterations)
        for rows in split_rows(batch.num_samples, size)
    ]
    results: list[ReferenceResult] = []
    if programs.synchronous:
        for start in range(0, len(microbatches), size):
            results.append(reference.train_batch(microbatches[start : start + size]))
    else:
        usage = weight_usage(programs.schedule(iterations))
        results.append(reference.train_asynchronous(microbatches, usage, size))
    return _Computed(
        [parts for result in results for parts in result.batch_parts(size)],
        [gradients for result in results for gradients in result.gradients],
        reference.parameters(),
    )


def _load(run_directory: Path, num_ranks: int) -> _Computed:
    ranks = []
    for rank in range(num_ranks):
        path = _computed_path(run_directory, rank)
        ranks.append(_Computed(**torch.load(path)))
        path.unlink()
    gradients = [_merge(updates) for updates in zip(*(rank.gradients for rank in ranks), strict=True)]
    return _Computed(ranks[0].losses, gradients, _merge([rank.parameters for rank in ranks]))


def _as_tensors(losses: Sequence[Mapping[str, float]]) -> dict[str, Tensor]:
    return {
        f"iteration {index}: {name}": torch.tensor(value, dtype=torch.float64)
        for index, parts in enumerate(losses)
        for name, value in parts.items()
    }


def _numbered(gradients: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {
        f"update {index}: {name}": tensor for index, named in enumerate(gradients) for name, tensor in named.items()
    }


def _compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Comparison:
    if set(found) != set(expected):
        odd = sorted(set(found) ^ set(expected))[0]
        return Comparison(len(expected), len(set(found) ^ set(expected)), float("inf"), f"{odd} (only on one side)")
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor.cpu())]
    differences = [float((found[name].double() - expected[name].cpu().double()).abs().max()) for name in different]
    return Comparison(len(expected), len(different), max(differences, default=0.0), different[0] if different else None)
