"""The planner: of all settings, cuts and policies, the plan with the least time per sample that fits.

For every setting (schedule, microbatches, warmups) the exact cut with the least busy stage is found, and others near it
that may do better in the fill and the drain. An estimate ranks them, the simulator judges the best, and from the
winners on boundaries are moved block by block while that helps.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from vpipe.errors import PlanError
from vpipe.plan.plan import Plan
from vpipe.plan.prediction import Prediction
from vpipe.planner.cost.policies import Frontiers
from vpipe.planner.cut.candidates import naive_cuts
from vpipe.planner.search.bounds import lower_bound_ms
from vpipe.planner.search.by_hand import Given, cut_each, judge_cut, policies_of
from vpipe.planner.search.candidate import Candidate
from vpipe.planner.search.drafts import MAX_ACTIONS, best_policies, cuts_of, drafts_of, fixed_plan, improve
from vpipe.planner.search.limits import find_smallest, needed_limit, scaled_limits, usable_bytes
from vpipe.planner.search.request import Request
from vpipe.planner.search.setting import Setting, microbatch_choices, settings
from vpipe.planner.search.situation import Situation
from vpipe.words.units import format_bytes

__all__ = ["Outcome", "Request", "find_plan", "judge_partition", "plan_partition"]

NUM_SIMULATED = 20
_NEGLIGIBLE = 0.001
"""Share of the time below which a gain is not worth any memory."""
_FEWEST_SIMULATED = 4
"""Plans that are simulated however many actions they have."""


@dataclass(frozen=True)
class WithinLimits:
    """Limits, and a plan that keeps them."""

    limits: tuple[int, ...]
    """Per rank."""
    plan: Candidate
    factor: float
    """What of the limits that were given can be used has been multiplied by this."""
    is_proven: bool
    """Whether none of the settings can do with limits multiplied by less; False: less may do."""


@dataclass(frozen=True)
class Outcome:
    """What the search found."""

    request: Request
    best: Candidate
    ranked: tuple[Candidate, ...]
    """Plans that were simulated, all of which fit: the best, then by time."""
    lower_bound_ms: float
    """Time that no plan of any of the settings needs less of, for one batch."""
    is_exact: bool
    """Whether each cut is the best there is for its busiest rank; False: among the policies that were looked at, or,
    where ranks have several stages, among the cuts."""
    situations: tuple[Situation, ...] = field(repr=False, compare=False)
    """All settings that were looked at."""

    @property
    def plan(self) -> Plan:
        """The best plan, as what runs."""
        return self.best.plan

    @property
    def prediction(self) -> Prediction:
        """What the best plan is expected to take."""
        return self.best.predict(self.request.profile, self.lower_bound_ms)

    @property
    def gap(self) -> float:
        """How much longer the best plan takes than the lower bound, as a fraction of the bound."""
        return self.best.step_ms / self.lower_bound_ms - 1 if self.lower_bound_ms else 0.0

    @cached_property
    def naive(self) -> Mapping[str, Candidate]:
        """The `uniform`, `parameters` and `compute` cuts in the best plan's setting; they need not fit."""
        situation = next(each for each in self.situations if each.setting == self.best.setting)
        cuts = naive_cuts(situation.times).items()
        return {name: judge_cut(situation, cut, best_policies(situation, cut), None) for name, cut in cuts}

    @property
    def smallest_limits(self) -> tuple[int, ...]:
        """Per rank, the smallest limits found that any of the settings can be planned for."""
        return self._smallest.limits

    @property
    def smallest(self) -> Candidate:
        """A plan that keeps them."""
        return self._smallest.plan

    @property
    def is_smallest_proven(self) -> bool:
        """Whether none of the settings can do with less; False: less may do."""
        return self._smallest.is_proven

    @cached_property
    def _smallest(self) -> WithinLimits:
        found = _smallest(self.situations)
        given = [limit if math.isfinite(limit) else 1.0 for limit in self.request.usable_limits]
        factors = [
            max(item.most / limit for item, limit in zip(plan.memory, given, strict=True)) for plan in self.ranked
        ]
        if min(factors) >= found.factor:
            return found
        # A search for speed may come by what a search for few bytes has missed.
        plan = self.ranked[factors.index(min(factors))]
        return WithinLimits(scaled_limits(given, min(factors)), plan, min(factors), is_proven=False)


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
        for plan in drafts_of(situation, cuts_of(situation))
        if plan.fits(situation.limits)
    ]
    if not drafts:
        drafts = [_last_resort(request, situations)]
    ranked = _simulate_best(drafts)
    improved = [improve(*pair) for pair in ranked[:2]]
    improved += [(situation, situation.recompute_earlier(plan)) for situation, plan in [*improved, *ranked[:2]]]
    ranked = _prefer_small(_distinct(sorted([*improved, *ranked], key=_merit)))
    return Outcome(
        request=request,
        best=ranked[0][1],
        ranked=tuple(plan for _, plan in ranked),
        lower_bound_ms=min(map(lower_bound_ms, situations)),
        is_exact=all(each.times.is_exact and not each.shares_ranks for each in situations),
        situations=tuple(situations),
    )


def judge_partition(
    request: Request, partition: Sequence[int] | str, policies: Given = None, ahead: Collection[int] | None = None
) -> Candidate:
    """Simulate a partition given by hand or name, with given policies or else the best that fit; it need not fit.

    Of several settings in the request, the one it does best in. Stages of `ahead` recompute before the gradient
    arrives; None: those that gain by it.

    Raises:
        PlanError: it does not cut the model into the stages, or has another number of policies than the model blocks.
    """
    plans: list[tuple[bool, float, int, Candidate]] = []
    for situation, cut in cut_each(_situations(request), partition):
        given = policies_of(policies, cut)
        if given is not None and len(given) != len(situation.chain):
            raise PlanError(f"{len(given)} policies for {len(situation.chain)} blocks; give one per block")
        plan = judge_cut(situation, cut, given or best_policies(situation, cut), ahead)
        plans.append((not plan.fits(situation.limits), plan.sample_ms, len(plans), plan))
    return min(plans)[-1]


def plan_partition(
    request: Request, partition: Sequence[int] | str, policies: Given = None, ahead: Collection[int] | None = None
) -> Candidate:
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
        raise PlanError(_refusal(request, _enough(request, situations, plan.partition), given))
    raise PlanError(_refusal(request, _needed(request, plan), f"{given} and what it recomputes"))


def _last_resort(request: Request, situations: Sequence[Situation]) -> tuple[Situation, Candidate]:
    """Return the plan with the least memory, which fits although no fast one was found that does.

    Raises:
        PlanError: it does not fit either.
    """
    enough = _enough(request, situations)
    if not enough.plan.fits(request.usable_limits):
        raise PlanError(_refusal(request, enough))
    return next(each for each in situations if each.setting == enough.plan.setting), enough.plan


def _needed(request: Request, plan: Candidate) -> WithinLimits:
    """Return the smallest limits that a plan keeps: equal ones, or of those given one by one what is too small more."""
    needs = [memory.most for memory in plan.memory]
    factor = max(need / limit for need, limit in zip(needs, request.usable_limits, strict=True))
    return WithinLimits(_raised(request, needs, factor), plan, factor, is_proven=True)


def _raised(request: Request, needs: Sequence[float], factor: float) -> tuple[int, ...]:
    """Return limits that allow `needs`: of those given one by one the ones that are too small, else all are raised."""
    usable, limits = request.usable_limits, request.limits or ()
    if len(limits) <= 1:
        return scaled_limits(usable, factor)
    return tuple(
        limit if need <= most else needed_limit(math.ceil(need - 1e-6))
        for need, most, limit in zip(needs, usable, limits, strict=True)
    )


def _situations(request: Request) -> list[Situation]:
    counts = request.num_microbatches or microbatch_choices(request.profile, request.batch_size)
    link = request.profile.link
    found = settings(
        replace(request.options, num_ranks=request.num_ranks, stages_per_rank=request.stages_per_rank),
        request.batch_size,
        request.schedules,
        counts,
        may_move_versions=request.may_move_versions,
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


def _simulate_best(drafts: Sequence[tuple[Situation, Candidate]]) -> list[tuple[Situation, Candidate]]:
    """Simulate each setting's most promising draft, then of all drafts those that promise most; the best first.

    How far a setting's estimate is from its simulation corrects the estimates of its other drafts.
    """
    promising = sorted(drafts, key=lambda pair: pair[0].estimate(pair[1]) / pair[0].setting.batch_size)
    corrections: dict[Setting, float] = {}
    done: dict[int, tuple[Situation, Candidate]] = {}
    for index, (situation, draft) in enumerate(promising):
        if situation.setting not in corrections and len(corrections) < 2 * NUM_SIMULATED:
            plan = situation.judge(draft)
            corrections[situation.setting] = plan.step_ms / max(situation.estimate(draft), 1e-12)
            done[index] = situation, plan

    def corrected(index: int) -> float:
        situation, draft = promising[index]
        return situation.estimate(draft) * corrections[situation.setting] / situation.setting.batch_size

    known = [index for index, (situation, _) in enumerate(promising) if situation.setting in corrections]
    most = max(_FEWEST_SIMULATED, min(NUM_SIMULATED, MAX_ACTIONS // promising[0][0].num_actions))
    for index in sorted(known, key=corrected)[:most]:
        if index not in done:
            situation, draft = promising[index]
            done[index] = situation, situation.judge(draft)
    return sorted(done.values(), key=_merit)


def _distinct(ranked: Sequence[tuple[Situation, Candidate]]) -> list[tuple[Situation, Candidate]]:
    first: dict[tuple[object, ...], tuple[Situation, Candidate]] = {}
    for situation, plan in ranked:
        first.setdefault((plan.setting, plan.partition, plan.policies), (situation, plan))
    return list(first.values())


def _prefer_small(ranked: Sequence[tuple[Situation, Candidate]]) -> list[tuple[Situation, Candidate]]:
    """Move the plan with the least memory among those that are about as fast as the fastest to the front."""
    fastest = ranked[0][1].sample_ms
    close = [pair for pair in ranked if pair[1].sample_ms <= fastest * (1 + _NEGLIGIBLE)]
    first = min(close, key=lambda pair: (bool(pair[1].setting.moving), _merit(pair)[1]))
    return [first, *(pair for pair in ranked if pair is not first)]


def _merit(pair: tuple[Situation, Candidate]) -> tuple[float, int]:
    """Return what plans are ranked by: time per sample, then memory."""
    return pair[1].sample_ms, max(memory.total for memory in pair[1].memory)


def _smallest(situations: Sequence[Situation]) -> WithinLimits:
    """Return the smallest limits of any situation, in the proportion of those given, and a plan that keeps them."""
    found = [(situation, find_smallest(situation)) for situation in situations]
    situation, best = min(found, key=lambda pair: pair[1].factor)
    limits = scaled_limits(situation.limits, best.factor)
    plan = fixed_plan(situation.under([usable_bytes(limit) for limit in limits]), best.partition)
    return WithinLimits(limits, plan, best.factor, is_proven=all(each.is_proven for _, each in found))


def _enough(request: Request, situations: Sequence[Situation], partition: Sequence[int] | None = None) -> WithinLimits:
    """Return the smallest limits that something, or this `partition`, can keep in any of the situations."""
    found = [(situation, find_smallest(situation, partition)) for situation in situations]
    situation, best = min(found, key=lambda pair: pair[1].factor)
    limits = _raised(request, best.needs, best.factor)
    plan = fixed_plan(situation.under([usable_bytes(limit) for limit in limits]), best.partition)
    return WithinLimits(limits, plan, best.factor, is_proven=all(each.is_proven for _, each in found))


def _refusal(request: Request, kept: WithinLimits, given: str = "") -> str:
    limits, plan = kept.limits, kept.plan
    rank = max(range(len(limits)), key=lambda each: plan.memory[each].most / limits[each])
    searched = "" if kept.is_proven else " of all that were searched (less may do)"
    return (
        f"memory_limit {_all_bytes(request.limits or ())} cannot be kept{given}: the smallest that can is "
        f"{_all_bytes(limits)} per rank{searched} ({plan.setting.describe()}), where rank {rank} needs "
        f"{plan.memory[rank].describe()}, and 1 % of a limit is left to chance; raise the limit, use more ranks, "
        "smaller microbatches, or a schedule that holds less"
    )


def _all_bytes(limits: Sequence[int]) -> str:
    different = sorted(set(limits)) if len(set(limits)) == 1 else limits
    return ", ".join(f"{limit} bytes ({format_bytes(limit)})" for limit in different)
