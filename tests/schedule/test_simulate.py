from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest

from vpipe.errors import ScheduleError
from vpipe.schedule.action import Action, Kind
from vpipe.schedule.placement import Placement
from vpipe.schedule.registry import build_schedule
from vpipe.schedule.schedule import Schedule
from vpipe.schedule.simulate.costs import Costs
from vpipe.schedule.simulate.simulate import simulate


def _random_costs(schedule: Schedule, seed: int, **link: float) -> Costs:
    draws = random.Random(seed)
    times = [tuple(draws.uniform(0.5, 2.0) for _ in range(schedule.num_stages)) for _ in range(4)]
    sizes = tuple(draws.uniform(0.0, 2.0) for _ in range(schedule.num_stages))
    return Costs(*times, message_bytes=sizes, **link)


def _ends_by_definition(schedule: Schedule, costs: Costs) -> dict[Action, float]:
    """Compute every end as the longest path into it, link contention left out."""
    durations = costs.durations(schedule.num_stages)
    place = {action: (rank, i) for rank, order in enumerate(schedule.orders) for i, action in enumerate(order)}
    ahead, back = costs.hops(schedule.placement)

    @cache
    def end(action: Action) -> float:
        rank, index = place[action]
        starts = [end(schedule.orders[rank][index - 1])] if index else [0.0]
        step = {Kind.F: -1, Kind.B: 1, Kind.I: 1}.get(action.kind, 0)
        other = Action(action.stage + step, action.kind, action.microbatch)
        if step and other in place:
            hop = (ahead if step < 0 else back)[min(action.stage, other.stage)]
            starts.append(end(other) + hop.occupied + hop.latency)
        return max(starts) + durations[action.kind][action.stage]

    return {action: end(action) for order in schedule.orders for action in order}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("naive", {"stages_per_rank": 2}),
        ("gpipe", {}),
        ("1f1b", {}),
        ("pipedream", {}),
        ("pipedream", {"depths": (6, 4, 2, 0)}),
        ("interleaved", {}),
        ("zb-h1", {}),
        ("v-min", {}),
    ],
)
def test_every_end_is_the_longest_path_into_it(name: str, options: dict[str, Any], seed: int) -> None:
    schedule = build_schedule(name, 4, 9, **options)
    # Messages of at most 2 bytes, stages of at least 0.5: at bandwidth 4 no message waits for another one.
    costs = _random_costs(schedule, seed, latency=0.7, bandwidth=4.0)
    simulation = simulate(schedule, costs)
    ends = {event.action: event.end for events in simulation.events for event in events}
    assert ends == pytest.approx(_ends_by_definition(schedule, costs))
    assert simulation.makespan == pytest.approx(max(ends.values()))


def test_events_follow_the_orders_without_overlap() -> None:
    schedule = build_schedule("pipedream", 4, 6)
    simulation = simulate(schedule, _random_costs(schedule, 0))
    for order, events in zip(schedule.orders, simulation.events, strict=True):
        assert tuple(event.action for event in events) == order
        assert all(before.end <= after.start for before, after in pairwise(events))


@pytest.mark.parametrize("latency", [0.0, 0.25, 3.0])
@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 1), (4, 8), (5, 3)])
def test_latency_in_closed_form(p: int, m: int, latency: float) -> None:
    def makespan(name: str) -> float:
        schedule = build_schedule(name, p, m)
        return simulate(schedule, Costs.from_rank_shares(schedule.placement, latency=latency)).makespan

    assert makespan("naive") == pytest.approx(m * (3 * p + 2 * (p - 1) * latency))
    assert makespan("gpipe") == pytest.approx(3 * m + (p - 1) * (3 + 2 * latency))


def test_a_transfer_shorter_than_a_forward_is_like_latency() -> None:
    schedule = build_schedule("gpipe", 4, 8)
    costs = Costs.from_rank_shares(schedule.placement, latency=0.5, bandwidth=10.0, message_bytes=5.0)
    assert simulate(schedule, costs).makespan == pytest.approx(3 * 8 + 3 * (3 + 2 * 1.0))


def test_a_link_carries_one_message_at_a_time_in_each_direction() -> None:
    schedule = build_schedule("gpipe", 2, 3)
    costs = Costs.from_rank_shares(schedule.placement, latency=0.5, bandwidth=1.0, message_bytes=5.0)
    # Forward 0 ends at 1; three transfers of 5 one after the other and the latency: forward 2 ends at 17.5, backward 0
    # at 19.5; again three transfers and the latency: 35, and the last backward ends at 37.
    assert simulate(schedule, costs).makespan == pytest.approx(17.5 + 2 + 15 + 0.5 + 2)


def test_directions_of_a_link_do_not_disturb_each_other() -> None:
    schedule = build_schedule("naive", 2, 1)
    costs = Costs.from_rank_shares(schedule.placement, bandwidth=1.0, message_bytes=4.0)
    assert simulate(schedule, costs).makespan == pytest.approx(6 + 2 * 4)


def test_activations_and_gradients_share_a_link_that_goes_the_same_way(draw: Callable[..., Schedule]) -> None:
    # Four stages in a loop over two ranks: both 3B0 and 1F1, made at 25 and 26, go from rank 1 to rank 0.
    schedule = draw(
        "0F0 0F1 2F0 2B0 2F1 2B1 0B0 0B1 0STEP1 2STEP1",
        "1F0 3F0 3B0 1F1 3F1 3B1 1B0 1B1 1STEP1 3STEP1",
        placement=Placement(2, 2),
    )
    ones, zeros = (1.0,) * 4, (0.0,) * 4
    costs = Costs(ones, ones, zeros, zeros, bandwidth=1.0, message_bytes=(0.0, 10.0, 10.0))
    starts = {str(event.action): event.start for events in simulate(schedule, costs).events for event in events}
    assert (starts["2F0"], starts["3F0"], starts["3B0"], starts["1F1"]) == (12, 23, 24, 25)
    assert starts["2B0"] == 25 + 10
    assert starts["2F1"] == 25 + 10 + 10


def test_unequal_stages_are_bound_by_the_slowest() -> None:
    schedule = build_schedule("1f1b", 3, 20)
    costs = Costs.from_rank_shares(schedule.placement, forward=(1, 2, 1), input_grad=(1, 2, 1), weight_grad=(1, 2, 1))
    # In: a forward of stage 0; then the slowest, which waits 1 for its first gradient; out: a backward of stage 0.
    assert simulate(schedule, costs).makespan == pytest.approx(1 + 1 + 20 * 6 + 2)


def test_step_time_counts_as_work() -> None:
    schedule = build_schedule("gpipe", 1, 2)
    simulation = simulate(schedule, Costs.from_rank_shares(schedule.placement, step=4.0))
    assert simulation.makespan == 10
    assert simulation.work == (10,)
    assert simulation.bubble_fraction == 0


def test_both_bubbles_of_1f1b() -> None:
    simulation = simulate(build_schedule("1f1b", 4, 8))
    assert simulation.bubble_fraction == pytest.approx(36 / 132)
    # Rank r starts at r and ends at 33 - 2r, and works 24: 9 - 3r idle in between.
    assert simulation.span_bubble_fraction == pytest.approx((9 + 6 + 3 + 0) / 132)


def test_a_split_backward_frees_the_neighbour_earlier(draw: Callable[..., Schedule]) -> None:
    whole = draw("0F0 0B0 0STEP0", "1F0 1B0 1STEP0")
    split = draw("0F0 0I0 0W0 0STEP0", "1F0 1I0 1W0 1STEP0")
    assert simulate(whole).makespan == 6
    assert simulate(split).makespan == 5


def test_costs_of_nothing_give_no_bubble() -> None:
    schedule = build_schedule("1f1b", 2, 2)
    costs = Costs.from_rank_shares(schedule.placement, forward=0, input_grad=0, weight_grad=0)
    simulation = simulate(schedule, costs)
    assert (simulation.makespan, simulation.bubble_fraction, simulation.span_bubble_fraction) == (0, 0, 0)


def test_a_deadlock_ends_in_an_error_and_not_in_a_hang(draw: Callable[..., Schedule]) -> None:
    schedule = draw("0F0 0B0 0F1 0B1 0STEP1", "1F0 1F1 1B0 1B1 1STEP1")
    with pytest.raises(ScheduleError, match="never ends, ranks wait for each other: rank 0 at 0B0, rank 1 at 1F1"):
        simulate(schedule)


def test_a_larger_schedule_keeps_the_closed_form() -> None:
    simulation = simulate(build_schedule("1f1b", 32, 128))
    assert sum(map(len, simulation.events)) == 32 * (2 * 128 + 1)
    assert simulation.makespan == (128 + 31) * 3


def test_ranks_begin_when_they_may_and_a_common_delay_only_shifts() -> None:
    schedule = build_schedule("1f1b", 3, 4)
    costs = _random_costs(schedule, 5, latency=0.1, bandwidth=3.0)
    whole = simulate(schedule, costs)
    shifted = simulate(schedule, costs, starts=(7.0, 7.0, 7.0))
    assert shifted.makespan == pytest.approx(whole.makespan)
    assert [[event.start - 7 for event in row] for row in shifted.events] == [
        [pytest.approx(event.start) for event in row] for row in whole.events
    ]
    late = simulate(schedule, costs, starts=(0.0, 50.0, 0.0))
    assert [row[0].start for row in late.events] == [0.0, 50.0, pytest.approx(50 + costs.forward[1] + 0.1, abs=2 / 3)]
