"""Programs are what the schedule says, for one batch or for all that flow until the pipeline drains."""

from __future__ import annotations

import logging

import pytest

from vpipe.errors import ScheduleError
from vpipe.plan.recipe import Recipe
from vpipe.runtime.programs import ProgramBuilder
from vpipe.schedule.passes.lower import lower
from vpipe.schedule.registry import build_schedule


def build(name="1f1b", num_ranks=3, rank=1, num_microbatches=4, **options):
    return ProgramBuilder(Recipe(name, num_microbatches, num_ranks, **options), rank)


def test_a_synchronous_program_is_one_batch_whatever_the_number():
    builder = build()
    program = builder.training(5, 7)
    assert program.actions == lower(build_schedule("1f1b", 3, 4))[1]
    assert (program.num_serials, program.num_batches, program.first_iteration) == (4, 1, 7)
    assert program.window == 3
    assert builder.update_size == 4


def test_an_asynchronous_program_is_all_batches():
    builder = build("pipedream", depths=[6, 4, 2])
    program = builder.training(5, 7)
    assert program.actions == lower(build_schedule("pipedream", 3, 20, depths=[6, 4, 2]))[1]
    assert (program.num_serials, program.num_batches, program.first_iteration) == (20, 5, 7)
    assert program.window == 7
    assert builder.update_size == 1
    assert builder.training(2, 12).num_serials == 8


def test_programs_are_built_once_per_length():
    builder = build("pipedream")
    assert builder.training(5, 0).actions is builder.training(5, 9).actions


def test_a_macrobatch_is_one_update():
    builder = build("pipedream", macrobatch=True)
    assert builder.update_size == 4
    assert builder.training(2, 0).weights[0].update_of == (0, 0, 0, 0, 1, 1, 1, 1)


def test_a_macrobatch_is_for_asynchronous_schedules():
    with pytest.raises(ScheduleError, match="update once per batch, which '1f1b' does anyway; leave it out"):
        build("1f1b", macrobatch=True)


@pytest.mark.parametrize(("name", "expected"), [("1f1b", [0, 1, 2, 4, 8, 16, 32]), ("pipedream", list(range(40)))])
def test_ranks_compare_batches_ever_less_often(name, expected):
    builder = build(name)
    assert [start for start in range(40) if builder.training(2, start).compares_batches] == expected
    assert not builder.evaluation([0, 1]).compares_batches


def test_a_family_with_updates_of_its_own_size_is_understood():
    assert build("pipedream-2bw", num_microbatches=6).update_size == 3
    with pytest.raises(ScheduleError, match=r"after every 3 microbatches.*num_microbatches=4; use a multiple of 3"):
        build("pipedream-2bw", num_microbatches=4)


@pytest.mark.parametrize("num_microbatches", [1, 2, 8])
def test_the_validated_sample_reaches_the_steady_state(num_microbatches):
    depths = (14, 12, 10, 8, 6, 4, 2, 0)
    sample = build("pipedream", 8, 0, num_microbatches, depths=depths).sample
    forwards = [str(action) for action in sample.orders[0]].index("0B0")
    assert forwards == depths[0] + 1
    assert (
        sample.fingerprint()
        != build("pipedream", 8, 0, num_microbatches, depths=(13, *depths[1:])).sample.fingerprint()
    )


def test_an_evaluation_only_goes_forward():
    program = build("naive", num_ranks=2, rank=1, stages_per_rank=2).evaluation([4, 7])
    assert " ".join(map(str, program.actions)) == (
        "1RECV_F0 1F0 1SEND_F0 3RECV_F0 3F0 1RECV_F1 1F1 1SEND_F1 3RECV_F1 3F1"
    )
    assert not program.training
    assert [program.place_of(serial) for serial in range(2)] == [(4, 0), (7, 0)]


def test_stages_per_rank_are_the_familys_own_unless_given():
    assert build("naive", stages_per_rank=None).sample.num_stages == 3
    assert build("naive", stages_per_rank=2).sample.num_stages == 6
    with pytest.raises(ScheduleError, match="stages_per_rank=2"):
        build("1f1b", stages_per_rank=2)


@pytest.mark.parametrize(
    ("rank", "num_microbatches", "expected"),
    [
        (0, 4, ["With num_microbatches = 4 each of 3 ranks waits for 33% of the time (stages of equal time); "]),
        (1, 4, []),
        (0, 12, []),
    ],
)
def test_what_few_microbatches_cost_is_logged_once(caplog, rank, num_microbatches, expected):
    with caplog.at_level(logging.INFO, "vpipe"):
        build(rank=rank, num_microbatches=num_microbatches)
    advice = "num_microbatches = 12 makes it 14%"
    assert caplog.messages == [text + advice for text in expected]
