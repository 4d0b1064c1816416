"""Searched schedules: never worse than a family, within their memory, the same everywhere, honest about the gap."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import pytest

from vpipe.errors import ScheduleError
from vpipe.schedule.memory import peak_activations
from vpipe.schedule.placement import Placement
from vpipe.schedule.proof.validate import check_schedule
from vpipe.schedule.registry import SCHEDULES, build_schedule
from vpipe.schedule.search.families import fitting_families
from vpipe.schedule.search.report import report_search
from vpipe.schedule.search.search import search
from vpipe.schedule.search.searched import make_request
from vpipe.schedule.simulate.costs import Costs
from vpipe.schedule.simulate.simulate import simulate

NAMES = ("forward", "input_grad", "weight_grad")


def _draw(number: int) -> tuple[int, int, float, dict[str, tuple[float, ...]]]:
    source = random.Random(number)
    p, m = source.randint(1, 8), source.randint(1, 16)
    limit = max(1.0, source.uniform(p / 2, 2 * p))
    return p, m, limit, {name: tuple(source.uniform(0.5, 1.5) for _ in range(p)) for name in NAMES}


def _families(p: int, m: int, limit: float, times: dict[str, Any]) -> dict[str, float]:
    """Time every synchronous family within the limit, with one and with two stages per rank."""
    makespans: dict[str, float] = {}
    for name, entry in SCHEDULES.items():
        for count in (1, 2) if entry.synchronous and name != "searched" else ():
            try:
                schedule = build_schedule(name, p, m, stages_per_rank=count)
            except ScheduleError:
                continue
            if max(peak_activations(schedule)) <= limit:
                costs = Costs.from_rank_shares(schedule.placement, **times)
                makespans[f"{name} {count}"] = simulate(schedule, costs).makespan
    return makespans


@pytest.mark.parametrize("number", range(40))
def test_never_worse_than_the_best_family_that_fits(number: int) -> None:
    p, m, limit, times = _draw(number)
    schedule = build_schedule("searched", p, m, max_in_flight=limit, search_steps=300_000, **times)
    assert check_schedule(schedule) == []
    assert max(peak_activations(schedule)) <= limit
    makespan = simulate(schedule, Costs.from_rank_shares(schedule.placement, **times)).makespan
    families = _families(p, m, limit, times)
    assert makespan <= min(families.values())
    result = search(make_request(p, m, max_in_flight=limit, search_steps=300_000, **times))
    assert (result.schedule, result.makespan) == (schedule, makespan)
    assert result.best_family_makespan == min(families.values())
    best = {name.split()[0] for name, time in families.items() if time == min(families.values())}
    assert result.best_family in best
    assert result.lower_bound <= makespan + 1e-9
    assert result.gap == pytest.approx(makespan / result.lower_bound - 1, abs=1e-9)


def test_equal_costs_give_the_families_own_closed_forms() -> None:
    for p, m in [(2, 3), (4, 8), (8, 16)]:
        line = search(make_request(p, m, stages_per_rank=1, max_in_flight=2 * p - 1))
        assert (line.makespan, line.gap) == (3 * m + p - 1, 0)  # ZB-H2
        free = search(make_request(p, m))
        assert (free.makespan, free.gap) == (3 * m + (p - 1) / 2, 0)  # ZB-V
        assert free.schedule.placement == Placement(p, 2, "v")


def test_placements_follow_stages_per_rank() -> None:
    assert build_schedule("searched", 3, 4, stages_per_rank=1).placement == Placement(3)
    assert build_schedule("searched", 3, 4, stages_per_rank=3, search_steps=0).placement.stages_per_rank == 3
    names = {family.name for family in fitting_families(3, 4, [99] * 3, 1)}
    assert names == {"naive", "gpipe", "1f1b", "interleaved", "looped-bfs", "zb-h1", "zb-h2"}
    assert {family.name for family in fitting_families(4, 8, [1] * 4, None)} == {"naive"}
    assert {family.name for family in fitting_families(4, 8, [2] * 4, 2)} == {"naive", "v-min"}


def test_limits_may_differ_by_rank() -> None:
    limits = (4, 1, 3, 1.5)
    schedule = build_schedule("searched", 4, 8, max_in_flight=limits, search_steps=100_000)
    assert all(peak <= limit for peak, limit in zip(peak_activations(schedule), limits, strict=True))


def test_more_memory_never_costs_and_its_worth_is_told() -> None:
    times = {"forward": (1, 2, 1, 1)}
    makespans = []
    for limit in (1, 2, 3, 4, 8):
        request = make_request(4, 8, stages_per_rank=1, max_in_flight=limit, **times)
        report = report_search(request)
        makespans.append(report.result.makespan)
        assert report.more_makespan <= report.result.makespan
        assert bool(report.saved) == (limit < 4)  # rank 1's work is the bound from then on
        assert (report.to_dict()["one_more_microbatch"] is None) == (limit >= 4)
    assert makespans == sorted(makespans, reverse=True)
    assert makespans[0] == 8 * (5 + 4 + 1)  # one way there and back after the other, and the first rank's W
    assert makespans[3] == makespans[4] == 33


def test_no_memory_beyond_the_batch_is_asked_for() -> None:
    report = report_search(make_request(3, 2, max_in_flight=50))
    assert (report.request.limits, report.saved) == ((2, 2, 2), 0)
    assert "memory is not the limit" in report.lines()[-1]


def test_other_processes_find_the_same() -> None:
    times = {"forward": (1.1, 0.7, 1.3), "weight_grad": (0.6, 1.4, 0.9)}
    here = build_schedule("searched", 3, 5, max_in_flight=2, search_steps=50_000, **times).fingerprint()
    code = (
        "from vpipe.schedule.registry import build_schedule\n"
        f"print(build_schedule('searched', 3, 5, max_in_flight=2, search_steps=50_000, **{times}).fingerprint())"
    )
    for seed in ("1", "2"):
        result = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed},
        )
        assert result.stdout.strip() == here


def test_overheads_and_slow_links_are_searched_for() -> None:
    times = {"latency": 0.5, "dispatch": 0.2, "bandwidth": 2.0, "message_bytes": 1.0, "step": (1.0, 0.0, 2.0, 0.0)}
    schedule = build_schedule("searched", 4, 6, search_steps=200_000, **times)
    costs = Costs.from_rank_shares(schedule.placement, **times)
    families = _families(4, 6, 4, times)
    assert simulate(schedule, costs).makespan < min(families.values())
    assert schedule.placement.stages_per_rank == 1  # messages cost too much here for two


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"max_in_flight": 0.5},
            r"max_in_flight 0\.5 is below one microbatch.*the smallest limit that an order fits is 1",
        ),
        ({"max_in_flight": (2, 2, 0.9, 2)}, r"max_in_flight 0\.9 is below one microbatch"),
        ({"max_in_flight": (2, 2)}, "max_in_flight has 2 numbers for 4 ranks; give one per rank"),
        ({"max_in_flight": float("nan")}, "max_in_flight must be a number of microbatches, got nan"),
        ({"forward": (1, 2)}, "forward has 2 numbers for 4 ranks"),
        ({"forward": -1}, "forward must be a finite number from 0 on"),
    ],
)
def test_what_cannot_be_searched_for(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ScheduleError, match=words):
        build_schedule("searched", 4, 8, **options)
