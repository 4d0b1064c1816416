"""The plan in words and tables: what each stage does and holds, what limits it, and what else there would be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields

from vpipe.plan.policy import Policy
from vpipe.planner.cost.costs import host_ms, speeds_of
from vpipe.planner.cost.memory import RankMemory
from vpipe.planner.profile.profile import BlockProfile, Profile
from vpipe.planner.search.candidate import Candidate
from vpipe.planner.search.search import Outcome, Request
from vpipe.schedule.memory import stage_activations
from vpipe.words.table import format_table
from vpipe.words.units import format_bytes

__all__ = ["brief_lines", "compare_lines", "explain_lines", "plan_lines"]


def explain_lines(outcome: Outcome) -> list[str]:
    """Explain the best plan, and what the next best and the naive ones would give."""
    best = outcome.best
    searched = (
        "cuts and policies" if any(each.shares_ranks for each in outcome.situations) else "policies of long stages"
    )
    exact = "" if outcome.is_exact else f" ({searched} were searched, not proven)"
    return [
        *plan_lines(outcome.request, best),
        f"No plan of the settings looked at needs less than {outcome.lower_bound_ms:.4g} ms per step: this one is "
        f"within {outcome.gap:.1%}{exact}.",
        "",
        *_alternative_lines(outcome),
        "",
        _limit_line(outcome),
    ]


def plan_lines(request: Request, plan: Candidate) -> list[str]:
    """Describe one plan: its time, its stages, its memory, its busiest stage."""
    rate = 1000 / plan.sample_ms if plan.sample_ms else math.inf
    return [
        f"Plan: {plan.setting.describe()}, partition {list(plan.partition)}",
        f"Predicted: {plan.step_ms:.4g} ms per step, {plan.sample_ms:.4g} ms per sample, {rate:.4g} samples/s",
        "",
        *_stage_table(request, plan),
        "",
        *_memory_table(plan, request.rank_limits),
        "",
        _bottleneck_line(request, plan),
    ]


def brief_lines(outcome: Outcome) -> list[str]:
    """Describe the best plan, and say in a line each what the naive cuts would give."""
    best = outcome.best
    others = [
        f"Instead, {name} {list(plan.partition)}: {plan.step_ms:.4g} ms per step, "
        + (_versus(plan, best) if plan.fits(outcome.request.usable_limits) else "and it does not fit")
        for name, plan in outcome.naive.items()
        if plan.partition != best.partition
    ]
    return [*plan_lines(outcome.request, best), *others]


def compare_lines(outcome: Outcome, plan: Candidate, name: str) -> list[str]:
    """Say what the planner would change in a plan given by hand, and what it would gain."""
    best, limits = outcome.best, outcome.request.rank_limits
    lines = [f"{name}: {list(plan.partition)}, {plan.step_ms:.4g} ms per step ({plan.setting.describe()})"]
    lines += [
        f"  it does not fit: rank {rank} needs {memory.describe()}, its limit is {format_bytes(limit)}"
        for rank, (memory, limit) in enumerate(zip(plan.memory, limits, strict=True))
        if memory.most > outcome.request.usable_limits[rank]
    ]
    gain, fits = plan.sample_ms / best.sample_ms - 1, plan.fits(outcome.request.usable_limits)
    if gain < 0.001 and fits:
        return [*lines, "  the planner finds nothing better" if gain <= 0 else "  the planner gains under 0.1 %"]
    changes, why = _changes(plan, best), "" if fits else "to fit, "
    return [*lines, f"  {why}the planner would {'; '.join(changes)}: {_versus(best, plan)}"]


def _changes(plan: Candidate, best: Candidate) -> list[str]:
    changes = []
    if plan.setting != best.setting:
        changes.append(f"run {best.setting.describe()}")
    if plan.partition != best.partition:
        changes.append(f"cut into {list(best.partition)}")
    if plan.policies != best.policies:
        pairs = zip(plan.policies, best.policies, strict=True)
        changes.append(f"change what {sum(one is not other for one, other in pairs)} blocks do with activations")
    if plan.ahead != best.ahead:
        stages = f"stages {' '.join(map(str, best.ahead))}" if best.ahead else "no stage"
        changes.append(f"let {stages} recompute before the gradient arrives")
    return changes


def _versus(plan: Candidate, other: Candidate) -> str:
    """Say how much faster or slower `plan` is than `other`: by how much the slower of both takes longer."""
    slow, fast = max(plan.sample_ms, other.sample_ms), min(plan.sample_ms, other.sample_ms)
    words = "faster" if plan.sample_ms <= other.sample_ms else "slower"
    return (
        f"{plan.sample_ms:.4g} instead of {other.sample_ms:.4g} ms per sample, {_percent(slow / fast - 1)} {words}"
        if fast
        else f"{plan.sample_ms:.4g} instead of {other.sample_ms:.4g} ms per sample"
    )


def _percent(share: float) -> str:
    """Write a share without a minus before a zero."""
    return f"{share:.1%}".replace("-0.0%", "0.0%")


def _stage_table(request: Request, plan: Candidate) -> list[str]:
    blocks = request.profile.at(plan.setting.microbatch_size).blocks
    placement = plan.setting.build().placement
    rows = [["stage", "rank", "blocks", "", "forward", "backward", "busy", "in flight", "activations"]]
    costs, setting = plan.costs, plan.setting
    steady = setting.build() if setting.synchronous else setting.build(setting.num_batches_until_steady)
    in_flight = stage_activations(steady)
    for stage, (start, stop) in enumerate(plan.partition.ranges):
        backward = plan.stage_ms[stage] - costs.forward[stage]
        work = plan.busy_ms[stage] * plan.setting.num_microbatches
        rows.append(
            [
                str(stage),
                str(placement.rank_of(stage)),
                str(stop - start),
                _names(blocks[start:stop]),
                f"{costs.forward[stage]:.4g} ms",
                f"{backward:.4g} ms",
                f"{work / plan.step_ms:.0%}" if plan.step_ms else "",
                str(in_flight[stage]),
                _policy_words(request, plan, stage, placement.rank_of(stage), start, stop),
            ]
        )
    return format_table(rows, left={3, 8})


def _names(blocks: Sequence[BlockProfile]) -> str:
    return blocks[0].name if len(blocks) == 1 else f"{blocks[0].name} to {blocks[-1].name}"


def _policy_words(request: Request, plan: Candidate, stage: int, rank: int, start: int, stop: int) -> str:
    """Say what is kept, recomputed and swapped, and what that costs for each microbatch."""
    profile, own = request.profile, plan.policies[start:stop]
    words = []
    if kept := own.count(Policy.KEEP):
        words.append("all kept" if kept == len(own) else f"{kept} kept")
    if again := own.count(Policy.RECOMPUTE):
        ahead = ", before the gradient arrives" if stage in plan.ahead else ""
        words.append(f"{again} recomputed ({plan.costs.recompute[stage]:.4g} ms{ahead})")
    if own.count(Policy.SWAP):
        blocks = profile.at(plan.setting.microbatch_size).blocks[start:stop]
        away = [block for block, policy in zip(blocks, own, strict=True) if policy is Policy.SWAP]
        noted = (block.swap_ms for block, policy in zip(blocks, own, strict=True) if policy is not Policy.RECOMPUTE)
        handling = math.fsum(noted) / speeds_of(profile, plan.setting.num_ranks)[rank]
        size = sum(block.activation_bytes for block in away)
        is_moving = plan.costs.move[stage] > 0
        words.append(
            f"{len(away)} swapped ({_swap_words(profile, size, handling)})"
            if is_moving
            else f"{len(away)} to swap, but too few are in flight: kept"
        )
    if stage in plan.setting.moving:
        weights = sum(block.parameter_bytes for block in profile.sizes[0].blocks[start:stop])
        words.append(f"older weights swapped ({_swap_words(profile, weights)})")
    return ", ".join(words)


def _swap_words(profile: Profile, num_bytes: float, handling: float = 0.0) -> str:
    """Say how long the host link is busy with so many bytes, and what the rank loses by that."""
    copying = host_ms(profile.host, num_bytes)
    lost = handling + profile.host_share * copying
    return (f"{lost:.4g} ms, and " if lost else "") + f"{copying:.4g} ms on the host link"


def _memory_table(plan: Candidate, limits: Sequence[float]) -> list[str]:
    kinds = [item.name for item in fields(RankMemory)]
    rows = [["rank", *kinds, "total", "of limit" if any(map(math.isfinite, limits)) else ""]]
    for rank, (memory, limit) in enumerate(zip(plan.memory, limits, strict=True)):
        share = f"{memory.total / limit:.0%}" if math.isfinite(limit) else ""
        sizes = [format_bytes(getattr(memory, kind)) for kind in kinds]
        rows.append([str(rank), *sizes, format_bytes(memory.total), share])
    return format_table(rows, left=set())


def _bottleneck_line(request: Request, plan: Candidate) -> str:
    busy, speeds = plan.busy_ms, request.profile.rank_speeds
    stage = max(range(len(busy)), key=busy.__getitem__)
    rank = plan.setting.build().position_of(stage)
    slow = f", whose speed is {speeds[rank]:g}" if speeds and speeds[rank] != 1 else ""
    mean = sum(busy) / len(busy)
    over = f", {busy[stage] / mean - 1:.1%} more than the mean" if mean else ""
    return f"Bottleneck: stage {stage} on rank {rank}{slow}: {busy[stage]:.4g} ms per microbatch{over}."


def _alternative_lines(outcome: Outcome) -> list[str]:
    rows = [["instead", "partition", "ms/step", "ms/sample", "slower by", ""]]
    others: list[tuple[str, Candidate]] = [("next best", plan) for plan in outcome.ranked[1:2]]
    for name, plan in [*others, *outcome.naive.items()]:
        over = [rank for rank, limit in enumerate(outcome.request.usable_limits) if plan.memory[rank].most > limit]
        notes = [f"does not fit rank {over[0]}: {format_bytes(plan.memory[over[0]].most)}"] if over else []
        if plan.setting != outcome.best.setting:
            notes.append(plan.setting.describe())
        elif plan.partition == outcome.best.partition:
            notes.append("the same cut")
        slower = _percent(plan.sample_ms / outcome.best.sample_ms - 1) if outcome.best.sample_ms and not over else ""
        rows.append([name, _short(plan.partition), f"{plan.step_ms:.4g}", f"{plan.sample_ms:.4g}", slower, *notes[:1]])
    return format_table([row + [""] * (6 - len(row)) for row in rows], left={0, 1, 5})


def _short(partition: Sequence[int]) -> str:
    shown = " ".join(map(str, partition[:12]))
    return shown if len(partition) <= 12 else f"{shown} ..."


def _limit_line(outcome: Outcome) -> str:
    limits, plan = outcome.smallest_limits, outcome.smallest
    rank = max(range(len(limits)), key=lambda each: plan.memory[each].most / limits[each])
    named = format_bytes(limits[0]) if len(set(limits)) == 1 else ", ".join(map(format_bytes, limits))
    found, reason = "", "Less cannot"
    even = " even when every block holds as little as it can, and"
    if not outcome.is_smallest_proven:
        is_shared = any(situation.shares_ranks for situation in outcome.situations)
        why = "several stages share a rank" if is_shared else "stages are long"
        found, reason, even = " (found; less may do)", f"It was searched for, not proven, because {why}", ", and"
    return (
        f"Smallest limit that can be kept{found}: {named} per rank, at {plan.sample_ms:.4g} ms per sample "
        f"({plan.setting.describe()}, {list(plan.partition)}). {reason}: rank {rank} needs "
        f"{plan.memory[rank].describe()}{even} 1 % of a limit is left to chance."
    )
