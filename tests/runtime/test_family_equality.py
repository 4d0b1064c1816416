"""Every family has the bits of one process, with all that is hard for a pipeline at once: see `toy_models.winding`.

Two ranks and four, one stage per rank and two, dropout on, and a number of microbatches that fills no rounds; of the
asynchronous families, the bits of the same delays in one process. An order that is read from a file is among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from equality_cases import Case, _run, result_path
from test_equality import assert_bits_of_one_process

from vpipe.errors import ScheduleError
from vpipe.launch.local import launch_local
from vpipe.runtime.comm.world import World
from vpipe.schedule.csv_form import to_csv
from vpipe.schedule.registry import SCHEDULES, build_schedule

HERE = Path(__file__).parent
CUTS = {2: (4, 5), 4: (2, 2, 2, 3), 8: (1, 1, 2, 1, 1, 1, 1, 1)}
ASYNCHRONOUS: dict[str, dict[str, Any]] = {
    "pipedream": {},
    "pipedream-vertical": {"vertical_sync": True},
    "pipedream-macrobatch": {"macrobatch": True},
}


def _cases() -> Iterator[tuple[str, Case]]:
    for num_ranks in (2, 4):
        for name, entry in SCHEDULES.items():
            for count in (1, 2) if entry.synchronous else ():
                size = 2 * num_ranks + 1
                try:
                    build_schedule(name, num_ranks, size, stages_per_rank=count)
                except ScheduleError:
                    continue  # not with so many stages
                options = {"stages_per_rank": count}
                case = Case("winding", CUTS[count * num_ranks], name, size, options, "sgd", num_ranks, calls=(1, 1))
                yield f"{name}-{num_ranks}x{count}", case
        for name, options in ASYNCHRONOUS.items():
            yield f"{name}-{num_ranks}", Case("winding", CUTS[num_ranks], "pipedream", 2 * num_ranks, options, "sgd")
    yield "file-2x2", Case("winding", CUTS[4], "order.csv", 5, {}, "sgd", num_ranks=2, calls=(1, 1))


CASES = dict(_cases())


def test_every_synchronous_family_is_among_them() -> None:
    assert {case.schedule for case in CASES.values()} >= {
        name for name, entry in SCHEDULES.items() if entry.synchronous
    }
    assert {(case.ranks, case.options.get("stages_per_rank")) for case in CASES.values()} >= {
        (ranks, count) for ranks in (2, 4) for count in (1, 2)
    }


def run_cases(arguments: Sequence[str]) -> None:
    """Run the cases of this number of ranks in one of them."""
    folder = Path(arguments[0])
    with World.join(timeout_seconds=60, backend="gloo") as group:
        for name, case in CASES.items():
            if case.ranks != group.num_ranks:
                continue
            if case.schedule.endswith(".csv"):
                case = replace(case, schedule=str(folder / case.schedule))
            torch.save(_run(case), result_path(folder, name, group.rank))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    found = {}
    for num_ranks in (2, 4):
        folder = tmp_path_factory.mktemp(f"families{num_ranks}")
        (folder / "order.csv").write_text(to_csv(build_schedule("v-half", 2, 5)))
        command = ["test_family_equality:run_cases", str(folder)]
        launch_local(command, num_ranks, run_directory=folder, environment={"PYTHONPATH": str(HERE)})
        for name, case in CASES.items():
            if case.ranks == num_ranks:
                found[name] = [torch.load(result_path(folder, name, rank)) for rank in range(num_ranks)]
    return found


@pytest.mark.parametrize("name", CASES)
def test_bits_are_those_of_one_process(results, name):
    case, ranks = CASES[name], results[name]
    # Whatever the order, one process computes the same.
    plain = replace(case, schedule="naive", options={}) if case.schedule.endswith(".csv") else case
    assert_bits_of_one_process(ranks, plain)
