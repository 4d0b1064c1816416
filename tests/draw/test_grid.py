from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from vpipe.draw.grid import columns_per_time, summary_lines, text_grid, to_dict
from vpipe.schedule.action import Kind
from vpipe.schedule.placement import Placement
from vpipe.schedule.registry import build_schedule
from vpipe.schedule.schedule import Schedule
from vpipe.schedule.simulate.costs import Costs
from vpipe.schedule.simulate.simulate import Simulation, simulate


def _simulate(name: str, p: int, m: int, **costs: float) -> Simulation:
    schedule = build_schedule(name, p, m)
    return simulate(schedule, Costs.from_rank_shares(schedule.placement, **costs))


def _picture(simulation: Simulation) -> list[str]:
    return text_grid(simulation).text().splitlines()


def test_cells_are_as_wide_as_their_actions() -> None:
    assert _picture(_simulate("gpipe", 2, 2)) == [
        "time   0              5",
        "rank 0 F0 F1          B0--- B1---*",
        "rank 1    F0 F1 B0--- B1---*",
    ]


def test_an_update_that_takes_time_is_a_cell() -> None:
    assert _picture(_simulate("gpipe", 1, 2, step=2.0))[1] == "rank 0 F0 F1 B0--- B1--- U1---"


def test_fractions_of_a_common_unit_are_exact() -> None:
    fine = _picture(_simulate("gpipe", 2, 2, forward=0.5, input_grad=0.25, weight_grad=1.0))
    coarse = _picture(_simulate("gpipe", 2, 2, forward=2, input_grad=1, weight_grad=4))
    assert fine[1:] == coarse[1:]


def test_times_without_common_unit_are_rounded_and_stay_readable() -> None:
    lines = _picture(_simulate("1f1b", 2, 3, forward=0.7391, input_grad=1.17723, weight_grad=0.31417, step=0.0001))
    assert lines[1].split()[2:] == ["F0", "F1", "B0---", "F2", "B1---", "B2---*"]
    assert len(lines[1]) < 50


def test_several_stages_per_rank_are_told_apart() -> None:
    schedule = build_schedule("naive", 1, 1, stages_per_rank=2)
    assert _picture(simulate(schedule))[1] == "rank 0 0F0 1F0 1B0---- 0B0----*"


def test_a_split_backward_has_both_halves(draw: Callable[..., Schedule]) -> None:
    schedule = draw("0F0 0R0 0I0 0W0 0STEP0")
    assert _picture(simulate(schedule))[1] == "rank 0 F0 R0 I0 W0*"


def test_nothing_takes_time() -> None:
    assert _picture(_simulate("gpipe", 2, 2, forward=0, input_grad=0, weight_grad=0))[1:] == ["rank 0 *", "rank 1 *"]


def test_long_grids_are_folded_into_bands() -> None:
    grid = text_grid(_simulate("1f1b", 4, 8))
    folded = grid.text(max_columns=60).splitlines()
    assert max(map(len, folded)) <= 60
    assert folded[5] == ""
    assert folded[6].startswith("time")
    assert (len(folded) + 1) % 6 == 0
    rank_3 = "".join(line[7:].ljust(53) for line in folded if line.startswith("rank 3"))
    assert rank_3.rstrip() == grid.text().splitlines()[4][7:]


def test_pieces_know_what_they_draw() -> None:
    (_, first, _) = text_grid(_simulate("gpipe", 2, 1)).lines()
    assert [piece for piece in first if piece[1]] == [("F0", Kind.F), ("B0---", Kind.B), ("*", Kind.STEP)]


def test_json_has_exactly_the_promised_keys() -> None:
    data = json.loads(json.dumps(to_dict(_simulate("1f1b", 4, 8))))
    actions, idle = data.pop("actions"), data.pop("idle")
    assert data == {
        "schedule": "1f1b",
        "num_ranks": 4,
        "num_stages": 4,
        "num_microbatches": 8,
        "makespan": 33,
        "bubble_fraction": 3 / 11,
        "span_bubble_fraction": 18 / 132,
        "peak_activations": [4, 3, 2, 1],
        "weight_versions": [1, 1, 1, 1],
        "staleness": [0, 0, 0, 0],
        "traffic": 1,
    }
    assert idle["warmup"] == [6, 5, 4, 3]
    assert list(idle) == ["warmup", "cooldown", "imbalance", "communication", "host", "step"]
    assert len(actions) == 4
    assert actions[2][:3] == ["2F0", "2F1", "2B0"]
    assert actions[2][-1] == "2STEP7"


def test_versions_of_several_stages_are_whole_rank_units(draw: Callable[..., Schedule]) -> None:
    order = "0F0 1F0 1B0 1STEP0 0F1 0B0 0STEP0 1F1 1B1 1STEP1 0B1 0STEP1"
    data = to_dict(simulate(draw(order, placement=Placement(1, 2), synchronous=False)))
    assert data["weight_versions"] == [1.5]  # two versions of stage 0, one of stage 1
    assert data["staleness"] == [1]
    assert data["peak_activations"] == [1]


def test_the_summary_says_it_in_words() -> None:
    lines = summary_lines(_simulate("1f1b", 4, 8), "What it does.")
    assert lines == [
        "1f1b: What it does.",
        "makespan          33",
        "bubble            27.27 % of all ranks' time is idle; 13.64 % between a rank's own start and end",
        "peak activations  4 3 2 1 microbatches held on ranks 0 to 3",
        "weight versions   1 1 1 1 parameter sets kept on ranks 0 to 3",
        "staleness         0 0 0 0 updates on ranks 0 to 3",
        "traffic           1 times the messages of one stage per rank",
        "idle              13.64 % warmup, 13.64 % cooldown",
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [({}, "weight stashing"), ({"vertical_sync": True}, "vertical sync"), ({"microbatches_per_update": 4}, "2BW")],
)
def test_the_summary_explains_the_weights_of_asynchronous_schedules(options: dict[str, int], words: str) -> None:
    schedule = build_schedule("pipedream", 4, 8, **options)  # type: ignore[arg-type]
    assert words in summary_lines(simulate(schedule), "What it does.")[1]


def test_the_summary_of_many_ranks_is_cut_short() -> None:
    lines = summary_lines(_simulate("1f1b", 40, 50), "")
    assert lines[3] == (
        "peak activations  40 39 38 37 36 35 34 33 32 31 30 29 ... 1 microbatches held on ranks 0 to 39"
    )


def test_one_scale_for_several_pictures() -> None:
    narrow, wide = _simulate("1f1b", 2, 2), _simulate("zb-v", 2, 2)
    scale = columns_per_time(wide)
    assert scale > columns_per_time(narrow)
    assert text_grid(narrow, scale).text().splitlines()[1].startswith("rank 0 F0-----")


def test_a_rank_that_never_idles_says_so() -> None:
    assert summary_lines(_simulate("gpipe", 1, 2), "")[-1] == "idle              never"
