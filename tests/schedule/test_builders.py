"""Closed forms, pictures, and legality over the whole grid of sizes."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from vpipe.draw.grid import text_grid
from vpipe.errors import ScheduleError
from vpipe.schedule.action import Kind
from vpipe.schedule.memory import peak_activations
from vpipe.schedule.proof.validate import check_schedule
from vpipe.schedule.registry import SCHEDULES, build_schedule
from vpipe.schedule.simulate.costs import Costs
from vpipe.schedule.simulate.simulate import Simulation, simulate
from vpipe.schedule.weights import weight_usage

GOLDEN = Path(__file__).parent / "golden"
SIZES = [(p, m) for p in range(1, 9) for m in range(1, 17)]

# Every family is drawn and tried with its default options; these are further ways to build them.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "naive-2-stages-per-rank": ("naive", {"stages_per_rank": 2}),
    "1f1b-eager": ("1f1b", {"depths": (6, 4, 2, 0)}),
    "pipedream-eager": ("pipedream", {"depths": (6, 4, 2, 0)}),
    "pipedream-vertical-sync": ("pipedream", {"vertical_sync": True}),
    "interleaved-3-stages-per-rank": ("interleaved", {"stages_per_rank": 3}),
}
PICTURES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in SCHEDULES} | VARIANTS


def _simulate(name: str, p: int, m: int, *, backward: float = 2.0, **options: Any) -> Simulation:
    schedule = build_schedule(name, p, m, **options)
    shares = {"input_grad": backward / 2, "weight_grad": backward / 2}
    return simulate(schedule, Costs.from_rank_shares(schedule.placement, **shares))


@pytest.mark.parametrize("picture", PICTURES)
def test_golden_picture(picture: str) -> None:
    """Write the pictures anew with VPIPE_UPDATE_GOLDEN=1, and look at them."""
    name, options = PICTURES[picture]
    drawn = text_grid(simulate(build_schedule(name, 4, 8, **options))).text() + "\n"
    path = GOLDEN / f"{picture}.txt"
    if os.environ.get("VPIPE_UPDATE_GOLDEN"):
        path.write_text(drawn)
    assert path.exists(), f"{path.name} is missing; its picture would be:\n{drawn}"
    assert drawn == path.read_text()


def test_no_picture_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(PICTURES)


@pytest.mark.parametrize("name", SCHEDULES)
def test_legal_at_every_size_or_refused_with_the_size_s_name(name: str) -> None:
    refusals = []
    for p, m in SIZES:
        try:
            schedule = build_schedule(name, p, m)
        except ScheduleError as error:
            refusals.append(str(error))
        else:
            assert check_schedule(schedule) == [], (p, m)
    assert all(re.search("num_ranks|num_microbatches", refusal) for refusal in refusals)


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_family_refuses_a_size(name: str) -> None:
    assert all(build_schedule(name, p, m).num_microbatches == m for p, m in SIZES)


@pytest.mark.parametrize(
    "options", [{"vertical_sync": True}, {"double": True}, {"flat": True}, {"group": 0}, {"group": 3}]
)
def test_pipedream_variants_are_legal_at_every_size(options: dict[str, Any]) -> None:
    for p, m in SIZES:
        made = dict(options)
        if made.pop("double", False):
            made["depths"] = [2 * (p - 1 - stage) for stage in range(p)]
        if made.pop("flat", False):
            made["depths"] = [1] * p  # too shallow for most stages: slow but legal
        if "group" in made:
            made["microbatches_per_update"] = p + made.pop("group")
        assert check_schedule(build_schedule("pipedream", p, m, **made)) == [], (p, m)


@pytest.mark.parametrize("stages_per_rank", [2, 3])
def test_naive_is_legal_with_several_stages_per_rank(stages_per_rank: int) -> None:
    for p, m in [(1, 1), (1, 4), (2, 3), (4, 8), (5, 2)]:
        assert check_schedule(build_schedule("naive", p, m, stages_per_rank=stages_per_rank)) == [], (p, m)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("p", "m", "percent"), [(4, 8, 27.27), (4, 16, 15.79), (8, 16, 30.43), (8, 32, 17.95)])
def test_bubble_of_the_computed_grid(name: str, p: int, m: int, percent: float) -> None:
    simulation = _simulate(name, p, m)
    assert round(100 * simulation.bubble_fraction, 2) == percent
    assert simulation.bubble_fraction == pytest.approx((p - 1) / (m + p - 1))
    assert simulation.bubble_fraction == pytest.approx(1 - 3 * m / simulation.makespan)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_makespan_of_synchronous_schedules_at_every_size(name: str) -> None:
    for p, m in SIZES:
        for backward in (1.0, 2.0, 3.0):
            makespan = _simulate(name, p, m, backward=backward).makespan
            assert makespan == pytest.approx((m + p - 1) * (1 + backward)), (p, m)


def test_the_reference_numbers_of_1f1b() -> None:
    assert _simulate("1f1b", 4, 8, backward=1.0).makespan == 22
    simulation = _simulate("1f1b", 4, 8)
    assert simulation.makespan == 33
    assert simulation.bubble_fraction == 3 / 11
    assert simulation.peak_activations == (4, 3, 2, 1)


def test_peaks_are_the_whole_batch_for_gpipe_and_the_distance_to_the_end_for_1f1b() -> None:
    for p, m in SIZES:
        assert peak_activations(build_schedule("naive", p, m)) == (1,) * p
        assert peak_activations(build_schedule("gpipe", p, m)) == (m,) * p
        held = tuple(min(p - rank, m) for rank in range(p))
        assert peak_activations(build_schedule("1f1b", p, m)) == held
        assert peak_activations(build_schedule("pipedream", p, m)) == held


def test_naive_takes_every_stage_in_turn() -> None:
    for p, m in SIZES:
        simulation = _simulate("naive", p, m)
        assert simulation.makespan == 3 * p * m
        assert simulation.bubble_fraction == pytest.approx(1 - 1 / p)
    # The same model cut finer takes the same time.
    assert _simulate("naive", 2, 3, stages_per_rank=4).makespan == pytest.approx(18)
    assert peak_activations(build_schedule("naive", 2, 3, stages_per_rank=4)) == (1, 1)


def test_pipedream_takes_the_time_of_1f1b_but_fills_only_once() -> None:
    assert _simulate("pipedream", 4, 80).makespan == 3 * 83
    assert _simulate("1f1b", 4, 8).makespan * 10 == 3 * 110


@pytest.mark.parametrize("name", [name for name, entry in SCHEDULES.items() if entry.synchronous])
def test_synchronous_schedules_update_each_stage_once_at_the_end(name: str) -> None:
    schedule = build_schedule(name, 4, 8)
    for rank, order in enumerate(schedule.orders):
        stages = schedule.placement.stages_of(rank)
        assert {str(action) for action in order[-len(stages) :]} == {f"{stage}STEP7" for stage in stages}
        assert sum(action.kind is Kind.STEP for action in order) == len(stages)


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_kind_of_backward_is_in_microbatch_order_on_every_stage(name: str) -> None:
    for p, m in [(1, 3), (4, 8), (4, 3), (5, 11)]:
        schedule = build_schedule(name, p, m)
        for stage in range(schedule.num_stages):
            for halves in ((Kind.B, Kind.I), (Kind.B, Kind.W)):
                order = [action.microbatch for action in schedule.stage_order(stage) if action.kind in halves]
                assert order == list(range(m)), (p, m, stage)


def test_shallow_depth_is_slower_and_eager_depth_hides_latency() -> None:
    def makespan(depths: list[int], latency: float) -> float:
        schedule = build_schedule("pipedream", 4, 32, depths=depths)
        return simulate(schedule, Costs.from_rank_shares(schedule.placement, latency=latency)).makespan

    default, eager, shallow = [3, 2, 1, 0], [6, 4, 2, 0], [1, 1, 1, 0]
    assert makespan(shallow, 0.0) > makespan(default, 0.0) == makespan(eager, 0.0)
    # Hidden: only the way in and out of the pipeline pays for latency any more.
    assert makespan(eager, 0.25) == pytest.approx(3 * 35 + 6 * 0.25)
    assert makespan(default, 0.25) > makespan(eager, 0.25) + 10


def test_versions_and_staleness_with_eager_depth() -> None:
    usage = weight_usage(build_schedule("pipedream", 4, 16, depths=(6, 4, 2, 0)))
    assert [stage.num_versions for stage in usage] == [7, 5, 3, 1]
    assert [stage.staleness[-1] for stage in usage] == [6, 4, 2, 0]
