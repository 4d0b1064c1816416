"""The planner: of all settings, cuts and policies, the plan with the least time per sample that fits.

For every setting (schedule, microbatches, depths) the exact cut with the least busy stage is found, and others near it
that may do better in the fill and the drain. An estimate ranks them, the simulator judges the best, and from the
winners on boundaries are moved block by block while that helps.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise

from vpipe.errors import PlanError
from vpipe.plan.bounds import lower_bound_ms
from vpipe.plan.by_hand import Given, cut_each, judge_cut, policies_of
from vpipe.plan.candidates import candidate_cuts, naive_cuts, neighbours
from vpipe.plan.limits import needed_limit, smallest_limits, usable_bytes
from vpipe.plan.memory import Policy
from vpipe.plan.policies import Frontiers
from vpipe.plan.request import Request
from vpipe.plan.setting import Setting, microbatch_choices, settings
from vpipe.plan.situation import Plan, Situation
from vpipe.plan.units import describe_memory, format_bytes

__all__ = ["Outcome", "Request", "find_plan", "judge_partition", "plan_partition"]

NUM_SIMULATED = 20
_NEGLIGIBLE = 0.001
"""Share of the time below which a gain is not worth any memory."""
_MAX_ACTIONS = 50_000
"""Actions that ranking may simulate, and moving the boundaries of one plan: what takes about a tenth of a second."""
_FEWEST_SIMULATED = 4
"""Plans that are simulated however many actions they have."""


@dataclass(frozen=True)
class Outcome:
    """What the search found."""

    request: Request
    best: Plan
    ranked: tuple[Plan, ...]
    """Plans that were simulated, all of which fit: the best, then by time."""
    lower_bound_ms: float
    """Time that no plan of any of the settings needs less of, for one batch."""
    is_exact: bool
    """Whether each cut is the best there is for its busiest stage; False: among the policies that were looked at."""
    situations: tuple[Situation, ...] = field(repr=False, compare=False)
    """All settings that were looked at."""

    @property
    def gap(self) -> float:
        """How much longer the best plan takes than the lower bound, as a fraction of the bound."""
        return self.best.step_ms / self.lower_bound_ms - 1 if self.lower_bound_ms else 0.0

    @cached_property
    def naive(self) -> Mapping[str, Plan]:
        """The `uniform`, `parameters` and `compute` cuts in the best plan's setting; they need not fit."""
        situation = next(each for each in self.situations if each.setting == self.best.setting)
        cuts = naive_cuts(situation.times).items()
        return {name: judge_cut(situation, cut, _best_policies(situation, cut), None) for name, cut in cuts}

    @property
    def smallest_limits(self) -> tuple[int, ...]:
        """Per rank, the smallest limits that any of the settings could be planned for."""
        return self._smallest[0]

    @property
    def smallest(self) -> Plan:
        """A plan that keeps them."""
        return self._smallest[1]

    @cached_property
    def _smallest(self) -> tuple[tuple[int, ...], Plan]:
        return _smallest(self.situations)


def find_plan(request: Request) -> Outcome:
    """Find the plan with the least time per sample within the limits.

    Raises:
        PlanError: nothing fits (the text names the smallest limits that something fits in), or the request is wrong.
        ScheduleError: no schedule can be built for it.
    """
    situations = _situations(request)
    drafts = [
        (situation, plan)
        for situation in situations
        for plan in _drafts(situation, candidate_cuts(situation.times))
        if plan.fits(situation.limits)
    ]
    if not drafts:
        raise PlanError(_refusal(request, *_smallest(situations)))
    ranked = _simulate_best(drafts)
    improved = [_improve(*pair) for pair in ranked[:2]]
    improved += [(situation, situation.recompute_ahead(plan)) for situation, plan in [*improved, *ranked[:2]]]
    ranked = _prefer_small(_distinct(sorted([*improved, *ranked], key=_merit)))
    return Outcome(
        request=request,
        best=ranked[0][1],
        ranked=tuple(plan for _, plan in ranked),
        lower_bound_ms=min(map(lower_bound_ms, situations)),
        is_exact=all(each.times.is_exact for each in situations),
        situations=tuple(situations),
    )


def judge_partition(
    request: Request, partition: Sequence[int] | str, policies: Given = None, ahead: Collection[int] | None = None
) -> Plan:
    """Simulate a partition given by hand or name, with given policies or else the best that fit; it need not fit.

    Of several settings in the request, the one it does best in. Stages of `ahead` recompute before the gradient
    arrives; None: those that gain by it.

    Raises:
        PlanError: it does not cut the model into the stages, or has another number of policies than the model blocks.
    """
    plans: list[tuple[bool, float, int, Plan]] = []
    for situation, cut in cut_each(_situations(request), partition):
        given = policies_of(policies, cut)
        if given is not None and len(given) != len(situation.chain):
            raise PlanError(f"{len(given)} policies for {len(situation.chain)} blocks; give one per block")
        plan = judge_cut(situation, cut, given or _best_policies(situation, cut), ahead)
        plans.append((not plan.fits(situation.limits), plan.sample_ms, len(plans), plan))
    return min(plans)[-1]


def plan_partition(
    request: Request, partition: Sequence[int] | str, policies: Given = None, ahead: Collection[int] | None = None
) -> Plan:
    """Return the plan for a partition given by hand or name, as `judge_partition`.

    Raises:
        PlanError: it does not fit within the limits; the text names the smallest that it fits in. Or as
            `judge_partition`.
    """
    plan = judge_partition(request, partition, policies, ahead)
    if plan.fits(request.usable_limits):
        return plan
    given = f" with partition {list(plan.partition)}"
    if policies_of(policies, plan.partition) is None:
        situations = [each for each, _ in cut_each(_situations(request), plan.partition)]
        raise PlanError(_refusal(request, *_smallest(situations, plan.partition), given))
    raise PlanError(_refusal(request, _needed(request, plan), plan, f"{given} and what it recomputes"))


def _needed(request: Request, plan: Plan) -> tuple[int, ...]:
    """Return the smallest limits that a plan keeps, in the proportion of those given."""
    limits = request.rank_limits
    factor = max(memory.most / limit for memory, limit in zip(plan.memory, limits, strict=True))
    return tuple(needed_limit(math.ceil(factor * limit - 1e-6)) for limit in limits)


def _situations(request: Request) -> list[Situation]:
    counts = request.num_microbatches or microbatch_choices(request.profile, request.batch_size)
    link = request.profile.link
    found = settings(
        request.num_ranks,
        request.batch_size,
        request.schedules,
        counts,
        stages_per_rank=request.stages_per_rank,
        options=request.options,
        is_eager=request.is_eager and (link.latency_ms > 0 or link.bytes_per_ms is not None),
    )
    cache: dict[tuple[int, bool], Frontiers] = {}
    limits = request.usable_limits
    situations = [
        Situation.of(request.profile, setting, limits, request.policies, cache, sockets=request.sockets)
        for setting in found
    ]
    able = [each for each in situations if each.schedule.num_stages <= len(each.chain)]
    if not able:
        least = min(each.schedule.num_stages for each in situations)
        raise PlanError(
            f"the model's {request.profile.num_blocks} blocks cannot be cut into {least} stages; use fewer ranks or "
            "fewer stages per rank"
        )
    return able


def _drafts(situation: Situation, cuts: Iterable[Sequence[int]]) -> Iterator[Plan]:
    for cut in cuts:
        policies = situation.times.policies(cut)
        if policies is not None:
            yield situation.draft(cut, policies)


def _simulate_best(drafts: Sequence[tuple[Situation, Plan]]) -> list[tuple[Situation, Plan]]:
    """Simulate each setting's most promising draft, then of all drafts those that promise most; the best first.

    How far a setting's estimate is from its simulation corrects the estimates of its other drafts.
    """
    promising = sorted(drafts, key=lambda pair: pair[0].estimate(pair[1]) / pair[0].setting.batch_size)
    corrections: dict[Setting, float] = {}
    done: dict[int, tuple[Situation, Plan]] = {}
    for index, (situation, draft) in enumerate(promising):
        if situation.setting not in corrections and len(corrections) < 2 * NUM_SIMULATED:
            plan = situation.judge(draft)
            corrections[situation.setting] = plan.step_ms / max(situation.estimate(draft), 1e-12)
            done[index] = situation, plan

    def corrected(index: int) -> float:
        situation, draft = promising[index]
        return situation.estimate(draft) * corrections[situation.setting] / situation.setting.batch_size

    known = [index for index, (situation, _) in enumerate(promising) if situation.setting in corrections]
    most = max(_FEWEST_SIMULATED, min(NUM_SIMULATED, _MAX_ACTIONS // promising[0][0].num_actions))
    for index in sorted(known, key=corrected)[:most]:
        if index not in done:
            situation, draft = promising[index]
            done[index] = situation, situation.judge(draft)
    return sorted(done.values(), key=_merit)


def _improve(situation: Situation, plan: Plan) -> tuple[Situation, Plan]:
    """Move boundaries by one block while the simulator says that it helps, as far as the budget goes."""
    left = max(1, _MAX_ACTIONS // situation.num_actions)
    improving = True
    while improving and left > 0:
        improving = False
        # Where moving a block makes the busiest rank busier by much, simulating it is a waste.
        most = 1.1 * _busiest(situation, plan.partition)
        cuts = (cut for cut in neighbours(plan.partition) if _busiest(situation, cut) <= most)
        for draft in _drafts(situation, cuts):
            if left <= 0:
                break
            if not draft.fits(situation.limits):
                continue
            left -= 1
            judged = situation.judge(draft)
            if judged.step_ms < plan.step_ms * (1 - 1e-9):
                plan, improving = judged, True
                break
    return situation, plan


def _busiest(situation: Situation, partition: Sequence[int]) -> float:
    """Return the time of the busiest stage when nothing is added to it."""
    ends = [0, *accumulate(partition)]
    return max(
        float(times[start, stop])
        for times, (start, stop) in zip(situation.times.optimistic, pairwise(ends), strict=True)
    )


def _fixed(situation: Situation, partition: Sequence[int]) -> Plan:
    """Judge a cut with the best policies that fit, or with everything kept where nothing fits."""
    return situation.judge(situation.draft(partition, _best_policies(situation, partition)))


def _best_policies(situation: Situation, partition: Sequence[int]) -> tuple[Policy, ...]:
    return situation.times.policies(partition) or (Policy.KEEP,) * len(situation.chain)


def _distinct(ranked: Sequence[tuple[Situation, Plan]]) -> list[tuple[Situation, Plan]]:
    first: dict[tuple[object, ...], tuple[Situation, Plan]] = {}
    for situation, plan in ranked:
        first.setdefault((plan.setting, plan.partition, plan.policies), (situation, plan))
    return list(first.values())


def _prefer_small(ranked: Sequence[tuple[Situation, Plan]]) -> list[tuple[Situation, Plan]]:
    """Move the plan with the least memory among those that are about as fast as the fastest to the front."""
    fastest = ranked[0][1].sample_ms
    close = [pair for pair in ranked if pair[1].sample_ms <= fastest * (1 + _NEGLIGIBLE)]
    first = min(close, key=lambda pair: (bool(pair[1].setting.swap_versions), _merit(pair)[1]))
    return [first, *(pair for pair in ranked if pair is not first)]


def _merit(pair: tuple[Situation, Plan]) -> tuple[float, int]:
    """Return what plans are ranked by: time per sample, then memory."""
    return pair[1].sample_ms, max(memory.total for memory in pair[1].memory)


def _smallest(situations: Sequence[Situation], partition: Sequence[int] | None = None) -> tuple[tuple[int, ...], Plan]:
    """Return the smallest limits of any situation, or that a `partition` can keep, and a plan that keeps them."""
    found = [(*smallest_limits(situation, partition), index) for index, situation in enumerate(situations)]
    limits, cut, index = min(found)
    return limits, _fixed(situations[index].under([usable_bytes(limit) for limit in limits]), cut)


def _refusal(request: Request, limits: Sequence[int], plan: Plan, given: str = "") -> str:
    rank = max(range(len(limits)), key=lambda each: plan.memory[each].most / limits[each])
    return (
        f"memory_limit {_all_bytes(request.limits or ())} cannot be kept{given}: the smallest that can is "
        f"{_all_bytes(limits)} per rank ({plan.setting.describe()}), where rank {rank} needs "
        f"{describe_memory(plan.memory[rank])}, and 1 % of a limit is left to chance; raise the limit, use more ranks, "
        "smaller microbatches, or a schedule that holds less"
    )


def _all_bytes(limits: Sequence[int]) -> str:
    different = sorted(set(limits)) if len(set(limits)) == 1 else limits
    return ", ".join(f"{limit} bytes ({format_bytes(limit)})" for limit in different)
