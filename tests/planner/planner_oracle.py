"""Small random planning problems, solved by the planner and by trying every cut and every policy."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

from plan_toys import random_profile

from vpipe.plan.partition import Partition
from vpipe.plan.policy import Policy
from vpipe.planner.cost.costs import ChainCosts
from vpipe.planner.cost.loads import StageLoad, stage_loads
from vpipe.planner.cost.memory import RankMemory, rank_memory, stage_bytes
from vpipe.planner.cost.policies import Frontiers
from vpipe.planner.cut.stage_times import StageTimes
from vpipe.planner.profile.profile import Profile
from vpipe.schedule.action import Kind
from vpipe.schedule.registry import build_schedule
from vpipe.schedule.schedule import Schedule, uses_split_backward
from vpipe.schedule.weights import weight_usage

FAMILIES = ("1f1b", "gpipe", "pipedream", "zb-h1", "zb-h2", "pipedream-2bw")


def problem(seed: int) -> tuple[Profile, Schedule, tuple[float, ...]]:
    """Draw a chain of 2 to 5 blocks on 1 to 3 unequal ranks, a schedule, and a limit per rank."""
    draw = random.Random(seed)
    num_ranks = draw.choice([1, 2, 2, 3])
    num_blocks = draw.randint(max(2, num_ranks), 5)
    profile = random_profile(draw, num_blocks, num_ranks)
    schedule = build_schedule(draw.choice(FAMILIES), num_ranks, draw.choice([2, 4, 5]))
    ends = list(itertools.accumulate(Partition.uniform(num_blocks, num_ranks)))
    cut = list(itertools.pairwise([0, *ends]))
    kept = _memory(profile, schedule, cut, [Policy.KEEP] * num_blocks, stage_loads(schedule))
    largest = max(item.most for item in kept)
    limits = tuple(round(largest * draw.uniform(0.6, 1.2)) for _ in kept)
    return profile, schedule, limits


def planned(seed: int, *, unlimited: bool = False) -> float:
    """Return the time of the busiest stage in the planner's cut; infinity when it finds none."""
    profile, schedule, limits = problem(seed)
    blocks = profile.sizes[0].blocks
    times = stage_times(profile, schedule, (math.inf,) * len(limits) if unlimited else limits)
    value, partition, _ = times.best
    if not partition:
        return value
    policies = times.policies(partition)
    assert policies is not None
    cut = list(Partition(partition).ranges)
    memory = _memory(profile, schedule, cut, policies, times.loads)
    assert unlimited or all(item.most <= limit for item, limit in zip(memory, limits, strict=True))
    reached = max(
        stage_ms(profile, start, stop, policies[start:stop], rank, schedule) for rank, (start, stop) in enumerate(cut)
    )
    assert math.isclose(reached, value, rel_tol=1e-9)
    assert sum(partition) == len(blocks)
    return value


def stage_times(profile: Profile, schedule: Schedule, limits: Sequence[float]) -> StageTimes:
    """Return the planner's view of a schedule of one stage per rank."""
    chain = ChainCosts(profile, profile.sizes[0].blocks, split_backward=uses_split_backward(schedule))
    return StageTimes(
        chain,
        Frontiers(chain, tuple(Policy)),
        stage_loads(schedule),
        tuple(profile.rank_speeds),
        tuple(limits),
        _updates(schedule),
    )


def _updates(schedule: Schedule) -> float:
    """Return updates for each microbatch that come between computations."""
    kinds = [action.kind for action in schedule.orders[0]]
    return 0.0 if schedule.synchronous else kinds.count(Kind.STEP) / kinds.count(Kind.F)


def brute_force(seed: int) -> float:
    """Return the same by trying every cut and, in each stage, every combination of policies."""
    profile, schedule, limits = problem(seed)
    num_blocks = len(profile.sizes[0].blocks)
    loads = stage_loads(schedule)
    best = math.inf
    for inner in itertools.combinations(range(1, num_blocks), schedule.num_ranks - 1):
        cut = list(itertools.pairwise([0, *inner, num_blocks]))
        slowest = 0.0
        for rank, (start, stop) in enumerate(cut):
            times = [math.inf]
            for own in itertools.product(_allowed(profile), repeat=stop - start):
                policies = [Policy.KEEP] * start + list(own) + [Policy.KEEP] * (num_blocks - stop)
                if _memory(profile, schedule, cut, policies, loads)[rank].most <= limits[rank]:
                    times.append(stage_ms(profile, start, stop, own, rank, schedule))
            slowest = max(slowest, min(times))
        best = min(best, slowest)
    return best


def stage_ms(
    profile: Profile, start: int, stop: int, policies: Sequence[Policy], rank: int, schedule: Schedule
) -> float:
    """Return how long the rank, its links or its host link are busy with one microbatch."""
    blocks = profile.sizes[0].blocks
    inside = list(zip(blocks[start:stop], policies, strict=True))
    compute = sum(item.forward_ms + item.input_grad_ms + item.weight_grad_ms for item, _ in inside)
    more = sum(item.recompute_ms for item, policy in inside if policy is Policy.RECOMPUTE)
    more += sum(item.swap_ms for item, policy in inside if policy is Policy.SWAP)
    out = sum(item.activation_bytes for item, policy in inside if policy is Policy.SWAP)
    crossing = max(blocks[start - 1].output_bytes if start else 0, blocks[stop - 1].output_bytes)
    rates = profile.link.bytes_per_ms, profile.host.bytes_per_ms if profile.host else None
    copying = 2 * out / rates[1] if rates[1] else 0.0
    updates, keeps_older = _updates(schedule), weight_usage(schedule)[rank].num_on_device > 1
    more += updates * sum(item.step_ms + (item.version_ms if keeps_older else 0.0) for item, _ in inside)
    dispatches = (3 if uses_split_backward(schedule) else 2) + updates
    own = (compute + more) / profile.rank_speeds[rank] + dispatches * profile.dispatch_ms
    return max(own + profile.host_share * copying, crossing / rates[0] if rates[0] else 0.0, copying)


def _allowed(profile: Profile) -> list[Policy]:
    return list(Policy) if profile.host else [Policy.KEEP, Policy.RECOMPUTE]


def _memory(
    profile: Profile,
    schedule: Schedule,
    cut: Sequence[tuple[int, int]],
    policies: Sequence[Policy],
    loads: Sequence[StageLoad],
) -> tuple[RankMemory, ...]:
    blocks, is_split = profile.sizes[0].blocks, uses_split_backward(schedule)
    stages = [stage_bytes(blocks, start, stop, policies, is_split=is_split) for start, stop in cut]
    return rank_memory(schedule, loads, stages)
