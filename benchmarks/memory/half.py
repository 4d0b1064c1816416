"""Train under half of the memory that a plan without policies needs, and compare: loss bits, bytes, time.

Under the limit with whatever the planner chooses, by recomputation alone, and by swapping alone; all in turn.

python -m benchmarks.memory.half [--model bert] [--microbatches 10] [--num-rounds 2] [--out FILE]
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.common import environment, format_table, write_results
from benchmarks.memory.configurations import base_config
from benchmarks.memory.ranks import measure_profile, run_config

from vpipe.config import build_config
from vpipe.config.planning.planned import build_request
from vpipe.config.planning.to_plan import with_plan
from vpipe.plan.policy import Policy
from vpipe.planner.search.search import find_plan, judge_partition
from vpipe.words.units import format_bytes

NUM_RANKS, NUM_BATCHES = 2, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bert", choices=["bert", "gpt"])
    parser.add_argument("--microbatches", type=int, default=10)
    parser.add_argument("--num-rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "half.json")
    arguments = parser.parse_args()
    surroundings = environment()
    tree = base_config(arguments.model, arguments.microbatches)
    tree["pipeline"] |= {"schedule": "gpipe", "num_ranks": NUM_RANKS}
    tree["train"]["iterations"] = NUM_BATCHES
    free = build_config(tree)
    profile = measure_profile(free)
    cut = [len(profile.sizes[0].blocks) // 2, len(profile.sizes[0].blocks) - len(profile.sizes[0].blocks) // 2]
    keep = judge_partition(build_request(free, profile), cut, [Policy.KEEP] * sum(cut))
    limit = max(memory.total for memory in keep.memory) // 2
    limited = build_config({**tree, "plan": {"partition": "auto", "memory_limit": limit}})
    request = build_request(limited, profile)
    plan = find_plan(request).best
    same_cut = judge_partition(build_request(free, profile), plan.partition, [Policy.KEEP] * sum(cut))
    recomputing, swapping = (
        find_plan(replace(request, policies=(Policy.KEEP, policy))).best for policy in (Policy.RECOMPUTE, Policy.SWAP)
    )
    contestants = {
        "all kept": (with_plan(free, keep.plan), keep),
        "all kept, cut as for half": (with_plan(free, same_cut.plan), same_cut),
        "half of it": (with_plan(limited, plan.plan), plan),
        "half, recomputing": (with_plan(limited, recomputing.plan), recomputing),
        "half, swapping": (with_plan(limited, swapping.plan), swapping),
    }
    rounds = [
        {name: run_config(config) for name, (config, _) in contestants.items()} for _ in range(arguments.num_rounds)
    ]
    rows, results = [], []
    for name, (_, predicted) in contestants.items():
        all_runs = [found[name] for found in rounds]
        runs = all_runs[0]
        result: dict[str, Any] = {
            "name": name,
            "partition": list(predicted.partition),
            "policies": [policy.value for policy in predicted.policies],
            "predicted_bytes": max(memory.total for memory in predicted.memory),
            "measured_bytes": max(run.peak_bytes for found in all_runs for run in found),
            "predicted_ms": round(predicted.step_ms, 1),
            # The first batches are looked at closely, which takes time.
            "rounds_ms": [round(statistics.median(found[0].batch_ms[3:]), 1) for found in all_runs],
            "measured_ms": round(statistics.median(ms for found in all_runs for ms in found[0].batch_ms[3:]), 1),
            "bytes_moved": sum(run.bytes_moved for run in runs),
            "losses": list(runs[0].losses),
            "same_losses_in_all_rounds": all(found[0].losses == runs[0].losses for found in all_runs),
        }
        results.append(result)
        sizes = [format_bytes(result[key]) for key in ("predicted_bytes", "measured_bytes")]
        error = result["predicted_ms"] / result["measured_ms"] - 1
        rows.append([name, *sizes, result["predicted_ms"], result["measured_ms"], f"{error:+.1%}", result["rounds_ms"]])
    same = all(result["losses"] == results[0]["losses"] and result["same_losses_in_all_rounds"] for result in results)
    header = ["run", "predicted", "measured", "predicted ms", "measured ms", "error", "rounds ms"]
    print(format_table(header, rows))
    for result in results[1:]:
        print(f"{result['name']}: {result['partition']} {' '.join(result['policies'])}")
    print(
        f"limit {format_bytes(limit)}; the same bits in every loss: {same}; host link {profile.host}, share of a copy "
        f"that computing loses {profile.host_share:.2f}"
    )
    write_results(
        arguments.out,
        {
            "environment": surroundings,
            "limit": limit,
            "same_losses": same,
            "host": asdict(profile.host) if profile.host else None,
            "host_share": profile.host_share,
            "swap_ms": [round(block.swap_ms, 3) for block in profile.sizes[0].blocks],
            "runs": results,
        },
    )


if __name__ == "__main__":
    main()
