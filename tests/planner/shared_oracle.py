"""Small random planning problems with two stages per rank, solved by trying every cut and every policy."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, replace

from plan_toys import random_profile

from vpipe.plan.policy import Policy
from vpipe.plan.recipe import Recipe
from vpipe.planner.search.candidate import Candidate
from vpipe.planner.search.limits import needed_limit
from vpipe.planner.search.search import Request, judge_partition
from vpipe.planner.search.setting import Setting
from vpipe.planner.search.situation import Situation

FAMILIES = ("interleaved", "looped-bfs", "zb-v", "v-half", "v-min", "dualpipe-v")
NUM_STAGES = 4
NUM_AHEAD = 30


@dataclass(frozen=True)
class Problem:
    """A chain of 4 or 5 blocks on 2 ranks, and a limit."""

    request: Request

    @property
    def unlimited(self) -> Request:
        """The same without the limit."""
        return replace(self.request, limits=None)

    def under(self, limit: int) -> Request:
        """The same with another limit."""
        return replace(self.request, limits=[limit])


def problem(seed: int) -> Problem:
    """Draw a problem; its limit lies between what is needed at least and what is when everything is kept."""
    draw = random.Random(seed)
    num_blocks = draw.choice([4, 4, 4, 5])
    profile = random_profile(draw, num_blocks, 2)
    request = Request(profile, 2, 4, (draw.choice(FAMILIES),), [4], stages_per_rank=2, is_eager=False)
    kept = min(_most(request, cut, [Policy.KEEP] * num_blocks) for cut in all_cuts(num_blocks, NUM_STAGES))
    found = Problem(replace(request, limits=[1]))
    _, least = brute_force(found)
    return Problem(replace(request, limits=[needed_limit(round(least + draw.uniform(0.0, 0.9) * (kept - least)))]))


def brute_force(found: Problem) -> tuple[float, int]:
    """Return the shortest step within the limit, and the fewest bytes that the largest rank can do with.

    The best plans may also recompute before the gradient arrives, as the planner's do.
    """
    request = found.request
    profile, (limit, *_) = request.profile, request.usable_limits
    setting = Setting(Recipe(request.schedules[0], 4, 2, 2), 1)
    situation = Situation.of(profile, setting, request.usable_limits, tuple(Policy), {})
    allowed = list(Policy) if profile.host else [Policy.KEEP, Policy.RECOMPUTE]
    fitting: list[Candidate] = []
    least = math.inf
    for cut in all_cuts(profile.num_blocks, NUM_STAGES):
        for policies in itertools.product(allowed, repeat=profile.num_blocks):
            draft = situation.draft(cut, policies)
            needed = max(memory.most for memory in draft.memory)
            least = min(least, needed)
            if needed <= limit:
                fitting.append(situation.judge(draft))
    fitting.sort(key=lambda plan: plan.step_ms)
    ahead = [situation.recompute_earlier(plan) for plan in fitting[:NUM_AHEAD]]
    return min((plan.step_ms for plan in ahead), default=math.inf), int(least)


def all_cuts(num_blocks: int, num_stages: int) -> list[list[int]]:
    """Return every cut."""
    inner = itertools.combinations(range(1, num_blocks), num_stages - 1)
    return [[stop - start for start, stop in itertools.pairwise([0, *ends, num_blocks])] for ends in inner]


def _most(request: Request, cut: list[int], policies: list[Policy]) -> int:
    return max(memory.most for memory in judge_partition(request, cut, policies).memory)
