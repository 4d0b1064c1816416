from __future__ import annotations

from vpipe.draw.compare import comparison_lines, text_grids
from vpipe.schedule.registry import build_schedule
from vpipe.schedule.simulate.simulate import simulate


def test_pictures_share_one_scale() -> None:
    simulations = [simulate(build_schedule(name, 2, 4)) for name in ("1f1b", "zb-v")]
    lengths = [len(grid.rows[1]) for grid in text_grids(simulations)]
    assert lengths[0] / lengths[1] == simulations[0].makespan / simulations[1].makespan


def test_numbers_stand_in_a_table() -> None:
    lines = comparison_lines([simulate(build_schedule(name, 4, 8)) for name in ("1f1b", "zb-v", "pipedream")])
    assert [line.split() for line in lines[1:4]] == [
        ["1f1b", "33", "27.3%", "13.6%", "4", "1", "0", "1"],
        ["zb-v", "25.5", "5.9%", "0.0%", "4", "1", "0", "2"],
        ["pipedream", "33", "27.3%", "13.6%", "4", "4", "3", "1"],
    ]
