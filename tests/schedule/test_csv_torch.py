"""What torch's own schedules write, and what is made of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from vpipe.errors import ScheduleError
from vpipe.schedule.action import Action
from vpipe.schedule.csv_form import from_csv, read_csv
from vpipe.schedule.csv_torch import IN_ORDER
from vpipe.schedule.registry import build_schedule
from vpipe.schedule.schedule import uses_split_backward
from vpipe.schedule.simulate.simulate import simulate

Form = Literal["compute_only", "compute_comms"]
FORMS: list[Form] = ["compute_only", "compute_comms"]
WITH_COMMUNICATION = """\
0UNSHARD,0F0,0SEND_F0,0RECV_B0,0B0,0REDUCE_GRAD,0RESHARD
1UNSHARD,1RECV_F0,1F0,1B0,1SEND_B0,1REDUCE_GRAD,1RESHARD
"""


def make(name: str, num_ranks: int, num_microbatches: int, per_rank: int) -> Any:
    """Make a schedule of torch as rank 0 has it; no process group is needed to know the order."""
    num_stages = num_ranks * per_rank
    held = [0, num_stages - 1] if "V" in name else range(0, num_stages, num_ranks)
    common = {"num_stages": num_stages, "group_size": num_ranks, "group_rank": 0, "has_backward": True, "submod": None}
    stages = [
        SimpleNamespace(**common, stage_index=stage, is_first=stage == 0, is_last=stage == num_stages - 1)
        for stage in held
    ]
    return getattr(torch_schedules, name)(stages, num_microbatches, loss_fn=lambda output, target: output)


@pytest.mark.parametrize("sizes", [(2, 4), (4, 8), (3, 9)], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("name", "per_rank"),
    [
        ("ScheduleInterleaved1F1B", 1),
        ("ScheduleInterleaved1F1B", 2),
        ("ScheduleInterleaved1F1B", 3),
        ("ScheduleLoopedBFS", 2),
        ("ScheduleInterleavedZeroBubble", 2),
        ("ScheduleZBVZeroBubble", 2),
        ("ScheduleDualPipeV", 2),
    ],
)
def test_every_schedule_of_torch_is_read(
    name: str, per_rank: int, form: Form, sizes: tuple[int, int], tmp_path: Path
) -> None:
    theirs = make(name, *sizes, per_rank)
    theirs._dump_csv(tmp_path / "own.csv", form)
    schedule, notes = read_csv((tmp_path / "own.csv").read_text())
    assert schedule.synchronous
    assert (schedule.num_ranks, schedule.num_microbatches) == sizes
    assert schedule.placement.style == ("v" if "V" in name else "loop")
    computed = [
        [part for action in order if action is not None for part in (action.sub_actions or (action,))]
        for order in theirs.pipeline_order.values()
    ]
    is_reordered = name == "ScheduleLoopedBFS"
    assert (IN_ORDER in notes) == is_reordered
    assert any("UNSHARD and RESHARD and REDUCE_GRAD" in note for note in notes) == (form == "compute_comms")
    for rank, order in enumerate(computed):
        own = [action for action in schedule.orders[rank] if str(action.kind) != "STEP"]
        if is_reordered:
            assert [(action.stage, str(action.kind)) for action in own] == [
                (action.stage_index, action.computation_type.value) for action in order
            ]
        else:
            assert own == [Action.parse(str(action)) for action in order]
    assert uses_split_backward(schedule) == ("Zero" in name or "Dual" in name)
    assert simulate(schedule).makespan > 0


def test_looped_bfs_is_the_own_one() -> None:
    text = "0F0,0F1,2F0,2F1,2B1,2B0,0B1,0B0\n1F0,1F1,3F0,3F1,3B1,3B0,1B1,1B0\n"
    schedule, notes = read_csv(text)
    assert notes == (IN_ORDER,)
    assert schedule.orders == build_schedule("looped-bfs", 2, 2).orders


def test_what_is_for_shards_and_replicas_is_left_out() -> None:
    schedule, (note,) = read_csv(WITH_COMMUNICATION)
    assert schedule.orders == build_schedule("1f1b", 2, 1).orders
    assert note == (
        "6 cells of UNSHARD and RESHARD and REDUCE_GRAD left out: they are for sharded weights and replicas, of which "
        "a stage here has none"
    )
    assert read_csv("0F0,0B0\n").notes == ()


@pytest.mark.parametrize(
    ("cell", "other", "words"),
    [
        ("1SEND_B0,", "", "rank 1 has sends or receives, but not 1SEND_B0, which its computations need; leave all of"),
        ("0RECV_B0,", "", "rank 0 has sends or receives, but not 0RECV_B0"),
        ("1F0,", "1F0,1SEND_F0,", "rank 1 has 1SEND_F0, which its computations do not need; a value crosses once"),
        ("0SEND_F0,", "0SEND_F0,0SEND_F0,", "rank 0 has 0SEND_F0, which its computations do not need"),
        ("0F0,0SEND_F0,", "0SEND_F0,0F0,", "rank 0 has 0SEND_F0 before 0F0; put it on the other side"),
        ("1RECV_F0,1F0,", "1F0,1RECV_F0,", "rank 1 has 1RECV_F0 behind 1F0; put it on the other side"),
        ("0RECV_B0,0B0,", "0B0,0RECV_B0,", "rank 0 has 0RECV_B0 behind 0B0"),
        ("1B0,1SEND_B0,", "1SEND_B0,1B0,", "rank 1 has 1SEND_B0 before 1B0"),
    ],
)
def test_communication_that_does_not_fit_is_refused_by_name(cell: str, other: str, words: str) -> None:
    assert cell in WITH_COMMUNICATION
    with pytest.raises(ScheduleError, match=words):
        from_csv(WITH_COMMUNICATION.replace(cell, other))
