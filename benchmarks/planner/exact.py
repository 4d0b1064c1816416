"""The planner against trying everything on 1,000 small chains, and on 400 blocks for 64 stages.

python -m benchmarks.planner.exact [--num-chains 1000] [--num-shared 200] [--only small|shared|deep] [--out FILE]

Brute force and random chains are those of the tests (`tests/planner/planner_oracle.py`): 2 to 5 blocks on 1 to 3 ranks
of unequal speed, times and bytes drawn at random, six schedules, links and host memory slow or fast, a limit per rank.
It tries every cut and every combination of policies. There the busiest stage counts, which the planner's programme
makes as fast as possible.

`shared` is the same for two stages on each of two ranks (`tests/planner/shared_oracle.py`): 4 or 5 blocks, six
schedules, 4 microbatches, a limit between the least that any plan needs and what is needed when all is kept. There the
simulated step counts, of every cut with every combination of policies; the 30 best of these may recompute ahead of the
gradient.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, environment, format_table, write_results

from vpipe.errors import PlanError
from vpipe.plan.policy import Policy
from vpipe.planner.cost.costs import ChainCosts
from vpipe.planner.cost.loads import stage_loads
from vpipe.planner.cost.policies import Frontiers
from vpipe.planner.cut.exact import cut_minimax
from vpipe.planner.cut.stage_times import StageTimes
from vpipe.planner.profile.profile import BlockProfile, LinkProfile, Profile, SizeProfile
from vpipe.planner.search.limits import needed_limit
from vpipe.planner.search.search import Outcome, Request, find_plan
from vpipe.schedule.registry import build_schedule

NUM_BLOCKS, NUM_STAGES, NUM_MICROBATCHES = 400, 64, 128
MOST_S = {False: 1.0, True: 30.0}
"""Seconds that planning may take, without policies and with them."""


def compare(num_chains: int) -> dict[str, Any]:
    """Plan so many chains both ways."""
    sys.path.insert(0, str(ROOT / "tests" / "planner"))
    from planner_oracle import brute_force, planned

    equal, infeasible, costly, seconds = 0, 0, 0, []
    for seed in range(num_chains):
        start = time.perf_counter()
        found = planned(seed)
        seconds.append(time.perf_counter() - start)
        expected = brute_force(seed)
        equal += found == expected or math.isclose(found, expected, rel_tol=1e-9)
        infeasible += math.isinf(expected)
        costly += math.isfinite(expected) and expected > planned(seed, unlimited=True)
    return {
        "num_chains": num_chains,
        "equal": equal,
        "infeasible": infeasible,
        "slower_than_without_limit": costly,
        "planner_ms": round(1e3 * statistics.median(seconds), 2),
    }


def compare_shared(num_chains: int) -> dict[str, Any]:
    """Plan so many chains with two stages per rank both ways, and ask for their smallest limits."""
    sys.path.insert(0, str(ROOT / "tests" / "planner"))
    from shared_oracle import brute_force, problem

    ratios, smallest, refused, seconds = [], [], 0, []
    for seed in range(num_chains):
        found = problem(seed)
        best, least = brute_force(found)
        smallest.append(find_plan(found.unlimited).smallest_limits[0] / needed_limit(least))
        start = time.perf_counter()
        try:
            outcome = find_plan(found.request)
        except PlanError:
            refused += 1
            continue
        seconds.append(time.perf_counter() - start)
        ratios.append(outcome.best.step_ms / best)
    return {
        "num_chains": num_chains,
        "refused": refused,
        "as_good_as_best": sum(ratio <= 1 + 1e-9 for ratio in ratios),
        "mean_over_best": round(statistics.mean(ratios), 4),
        "largest_over_best": round(max(ratios), 4),
        "over_1_percent": sum(ratio > 1.01 for ratio in ratios),
        "largest_limit_over_least": round(max(smallest), 4),
        "planner_ms": round(1e3 * statistics.median(seconds), 1),
        "largest_planner_ms": round(1e3 * max(seconds), 1),
    }


def plan_deep_shared() -> list[dict[str, Any]]:
    """Plan 400 blocks for 32 ranks with two stages each, without policies and under two limits."""
    profile = deep_profile(alike=False)
    base = Request(profile, NUM_STAGES // 2, NUM_MICROBATCHES, ("interleaved",), stages_per_rank=2)
    free = plan_deep("two per rank, no policies", _with(base, policies=(Policy.KEEP,)))
    limits = [int(share * free["largest_bytes"]) for share in (0.7, 0.4)]
    return [free, *(plan_deep(f"two per rank, {limit} bytes", _with(base, limits=[limit])) for limit in limits)]


def deep_profile(*, alike: bool) -> Profile:
    """Return 400 blocks: 199 transformer layers between an embedding and a head, or all of them different."""
    draw = random.Random(7)
    if alike:
        layer = [_block(1.0, 60, 24), _block(2.0, 80, 48)]
        blocks = [_block(0.2, 20, 240), *layer * ((NUM_BLOCKS - 2) // 2), _block(10.0, 90, 240)]
    else:
        blocks = [_block(draw.uniform(0.5, 4), draw.randint(20, 120), draw.randint(4, 60)) for _ in range(NUM_BLOCKS)]
    named = tuple(BlockProfile(**{**vars(block), "name": f"block.{index}"}) for index, block in enumerate(blocks))
    return Profile(
        "deep",
        {},
        (SizeProfile(1, named),),
        link=LinkProfile(0.05, 1e6),
        host=LinkProfile(0.0, 16e3),
        dispatch_ms=0.05,
    )


def _block(forward_ms: float, activation_kb: int, parameter_kb: int) -> BlockProfile:
    return BlockProfile(
        name="block",
        forward_ms=forward_ms,
        input_grad_ms=forward_ms,
        weight_grad_ms=forward_ms,
        recompute_ms=forward_ms,
        activation_bytes=1000 * activation_kb,
        input_bytes=10_000,
        output_bytes=10_000,
        parameter_bytes=1000 * parameter_kb,
        optimizer_bytes=2000 * parameter_kb,
        workspace_bytes=5_000,
    )


def plan_deep(name: str, request: Request) -> dict[str, Any]:
    """Plan once; return how long it took and what came out."""
    start, busy = time.perf_counter(), time.process_time()
    outcome = find_plan(request)
    # One thread: on a quiet machine both are the same.
    seconds, processor = time.perf_counter() - start, time.process_time() - busy
    return {"case": name, "seconds": round(seconds, 2), "processor_s": round(processor, 2), **_facts(outcome)}


def _facts(outcome: Outcome) -> dict[str, Any]:
    best = outcome.best
    counts = {policy.value: best.policies.count(policy) for policy in Policy}
    return {
        "step_ms": round(best.step_ms, 1),
        "lower_bound_ms": round(outcome.lower_bound_ms, 1),
        "gap": round(outcome.gap, 4),
        "is_exact": outcome.is_exact,
        "uniform_ms": round(outcome.naive["uniform"].step_ms, 1),
        "policies": counts,
        "largest_bytes": max(memory.total for memory in best.memory),
    }


def time_the_cut(profile: Profile) -> float:
    """Return the seconds that the exact cut alone takes, without policies and the simulator."""
    chain = ChainCosts(profile, profile.sizes[0].blocks, split_backward=False)
    loads = stage_loads(build_schedule("1f1b", NUM_STAGES, NUM_MICROBATCHES))
    start = time.perf_counter()
    times = StageTimes(chain, Frontiers(chain, (Policy.KEEP,)), loads, (1.0,) * NUM_STAGES, (math.inf,) * NUM_STAGES)
    cut_minimax(times.kept)
    return round(time.perf_counter() - start, 3)


def plan_all() -> list[dict[str, Any]]:
    """Plan both deep chains without policies, with one depth and with three to choose from, and under two limits."""
    rows = []
    for alike in (True, False):
        profile, words = deep_profile(alike=alike), "alike" if alike else "all different"
        keep: dict[str, Any] = {"policies": (Policy.KEEP,)}
        base = Request(profile, NUM_STAGES, NUM_MICROBATCHES, is_eager=False)
        cut_seconds = time_the_cut(profile)
        free = plan_deep(f"{words}, no policies", _with(base, **keep))
        rows += [{**free, "cut_seconds": cut_seconds}]
        rows.append(plan_deep(f"{words}, no policies, three depths", _with(base, **keep, is_eager=True)))
        rows += [
            plan_deep(f"{words}, {share:.0%} of the memory", _with(base, limits=[int(share * free["largest_bytes"])]))
            for share in (0.7, 0.4)
        ]
        for row in rows[-4:]:
            print(row, flush=True)
    return rows


def _with(request: Request, **changes: Any) -> Request:
    return Request(**{**vars(request), **changes})


def show(results: dict[str, Any]) -> None:
    """Print what there is."""
    for part in ("small", "shared"):
        if part in results:
            print(format_table(list(results[part]), [list(results[part].values())]), "\n")
    header = ["400 blocks on 64 stages", "seconds", "step ms", "bound ms", "gap", "uniform ms", "keep/recompute/swap"]
    rows = [*results.get("deep", []), *results.get("deep_shared", [])]
    print(format_table(header, [_row(row) for row in rows]))


def _row(row: dict[str, Any]) -> Sequence[object]:
    counts = " / ".join(map(str, row["policies"].values()))
    return (
        row["case"],
        row["seconds"],
        row["step_ms"],
        row["lower_bound_ms"],
        f"{row['gap']:.1%}",
        row["uniform_ms"],
        counts,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-chains", type=int, default=1000)
    parser.add_argument("--num-shared", type=int, default=200)
    parser.add_argument("--only", choices=("small", "shared", "deep"), help="this part; the file keeps the others")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "exact.json")
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text()) if arguments.only and arguments.out.exists() else {}
    results[f"environment of {arguments.only}" if results else "environment"] = environment()
    if arguments.only in (None, "small"):
        results["small"] = compare(arguments.num_chains)
    if arguments.only in (None, "shared"):
        results |= {"shared": compare_shared(arguments.num_shared), "deep_shared": plan_deep_shared()}
    if arguments.only in (None, "deep"):
        results["deep"] = plan_all()
    write_results(arguments.out, results)
    show(results)


if __name__ == "__main__":
    main()
