"""Compare estimates with published runs.

    .venv/bin/python -m benchmarks.estimate.run

Writes benchmarks/estimate/results/published.json and prints the tables of the README.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import environment, format_table, write_results
from benchmarks.estimate.cases import CASES, MEMORY, Case

from vpipe.config.sections import ModelConfig
from vpipe.measure.count.count import Assumptions
from vpipe.measure.count.models import DTYPES, count_model
from vpipe.model.zoo import build_chain
from vpipe.plan.policy import Policy
from vpipe.planner.estimate.analytic import Machine, ModelWork, Precision, analytic_profile
from vpipe.planner.estimate.devices import Device, find_device, find_link
from vpipe.planner.search.candidate import Candidate
from vpipe.planner.search.search import Request, judge_partition

OUT = Path(__file__).parent / "results" / "published.json"


def predict(case: Case, model: ModelWork, device: Device) -> Candidate:
    """Return the plan that a published run is, with its predicted time and memory."""
    precision = Precision(case.dtype, *((2, 4) if case.dtype != "fp32" else (4, 4)), case.optimizer_bytes)
    machine = Machine(device, find_link(case.link), precision, case.devices_per_rank)
    request = Request(
        analytic_profile(model, machine),
        case.ranks,
        case.microbatch_size * case.num_microbatches,
        ("interleaved" if case.stages_per_rank > 1 else "1f1b",),
        [case.num_microbatches],
        stages_per_rank=case.stages_per_rank if case.stages_per_rank > 1 else None,
        is_eager=False,
    )
    names = [block.name for block in request.profile.sizes[0].blocks]
    again = [case.recompute and name.startswith("layer.") for name in names]
    policies = [Policy.RECOMPUTE if each else Policy.KEEP for each in again]
    return judge_partition(request, by_layers(names, case.ranks * case.stages_per_rank), policies)


def count(case: Case) -> ModelWork:
    """Count the model of a run."""
    chain = build_chain(ModelConfig.model_validate(case.model))

    def fields(size: int) -> dict[str, torch.Tensor]:
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(chain.fields, (size, case.sequence_length))
        if "next_sentence_label" in shapes:
            shapes["next_sentence_label"] = (size,)
        return {name: torch.empty(shape, dtype=torch.int64, device="meta") for name, shape in shapes.items()}

    assumptions = Assumptions(DTYPES["fp32" if case.dtype == "fp32" else case.dtype], case.attention)
    return count_model(case.name, chain, fields, [case.microbatch_size], assumptions)


def by_layers(names: Sequence[str], num_stages: int) -> list[int]:
    """Cut into stages of whole layers, as many as possible alike; the embedding and the head go with the ends."""
    num_layers = sum(name.endswith("attention") for name in names)
    small, rest = divmod(num_layers, num_stages)
    sizes = [2 * (small + (stage < rest)) for stage in range(num_stages)]
    sizes[0] += 1
    sizes[-1] += len(names) - sum(sizes)
    return sizes


def main() -> None:
    results: dict[str, Any] = {"environment": environment(), "published": [], "memory": []}
    start = time.perf_counter()
    for case in CASES:
        plan = predict(case, count(case), find_device(case.device))
        step = plan.step_ms / 1000
        error = step / case.published - 1
        row = {"name": case.name, "group": case.group, "published_s": case.published, "estimated_s": step}
        row |= {"error": error, "is_fitted": case.is_fitted, "source": case.source}
        results["published"].append(row)
        if case.name in MEMORY:
            first = plan.memory[0]
            state = first.parameters + first.gradients + first.optimizer
            results["memory"].append(
                {
                    "name": case.name,
                    "state_gib": [MEMORY[case.name][0], state / 2**30],
                    "activations_gib": [MEMORY[case.name][1], first.activations / 2**30],
                }
            )
    results["seconds_for_all"] = time.perf_counter() - start
    print_tables(results)
    write_results(OUT, results)


def print_tables(results: dict[str, Any]) -> None:
    rows = [
        [
            row["name"],
            f"{row['published_s']:.4g}",
            f"{row['estimated_s']:.4g}",
            f"{row['error']:+.1%}",
            "fitted" if row["is_fitted"] else "",
        ]
        for row in results["published"]
    ]
    print(format_table(["run", "published s", "estimated s", "error", ""], rows))
    for group in dict.fromkeys(row["group"] for row in results["published"]):
        tests = [row for row in results["published"] if row["group"] == group and not row["is_fitted"]]
        errors = [row["error"] for row in tests]
        print(
            f"{group}, {len(tests)} runs that nothing was fitted to: mean {statistics.mean(errors):+.1%}, "
            f"mean absolute {statistics.mean(map(abs, errors)):.1%}, from {min(errors):+.1%} to {max(errors):+.1%}"
        )
    rows = [
        [row["name"], *(f"{value:.1f}" for pair in (row["state_gib"], row["activations_gib"]) for value in pair)]
        for row in results["memory"]
    ]
    print(format_table(["run", "state GiB, published", "estimated", "activations GiB, published", "estimated"], rows))


if __name__ == "__main__":
    main()
