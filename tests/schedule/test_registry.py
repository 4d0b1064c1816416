from __future__ import annotations

import pytest

from vpipe.errors import ScheduleError
from vpipe.schedule.registry import SCHEDULES, build_schedule


@pytest.mark.parametrize("name", SCHEDULES)
def test_entry_tells_the_truth_about_its_schedules(name: str) -> None:
    schedule = build_schedule(name, 4, 8)
    assert schedule.name == name
    assert schedule.synchronous == SCHEDULES[name].synchronous
    assert SCHEDULES[name].summary.endswith(".")


@pytest.mark.parametrize("name", SCHEDULES)
def test_builder_explains_itself(name: str) -> None:
    module = __import__(SCHEDULES[name].builder.__module__, fromlist=["__doc__"])
    assert "Idea:" in module.__doc__
    assert "Source:" in module.__doc__


def test_stages_per_rank_is_the_family_s_own_unless_given() -> None:
    assert build_schedule("naive", 2, 2).num_stages == 2
    assert build_schedule("naive", 2, 2, stages_per_rank=3).num_stages == 6
    assert build_schedule("gpipe", 2, 2, stages_per_rank=1) == build_schedule("gpipe", 2, 2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (("1f1", 4, 8, {}), r"unknown schedule '1f1'; did you mean '1f1b'\?; known schedules: naive, gpipe, 1f1b"),
        (("GPipe", 4, 8, {}), r"did you mean 'gpipe'\?"),
        (("quux", 4, 8, {}), "unknown schedule 'quux'; known schedules: naive"),
        (("gpipe", 0, 8, {}), "num_ranks must be a whole number from 1 on, got 0"),
        (("gpipe", 4, 2.5, {}), r"num_microbatches must be a whole number from 1 on, got 2\.5"),
        (("gpipe", 4, True, {}), "num_microbatches must be a whole number from 1 on, got True"),
        (("naive", 4, 8, {"stages_per_rank": 0}), "stages_per_rank must be a whole number from 1 on, got 0"),
        (
            ("gpipe", 4, 8, {"stages_per_rank": 2}),
            "runs one stage per rank, got stages_per_rank=2; set it to 1, or .*naive",
        ),
        (("gpipe", 4, 8, {"depths": (3, 2, 1, 0)}), "schedule 'gpipe' has no option 'depths'; its options: none"),
        (("1f1b", 4, 8, {"depth": (3, 2, 1, 0)}), r"no option 'depth'; did you mean 'depths'\?; its options: depths"),
        (("1f1b", 4, 8, {"vertical_sync": True}), "schedule '1f1b' has no option 'vertical_sync'"),
        (("pipedream", 4, 8, {"microbatches_per_update": 0}), "microbatches_per_update must be a whole number from 1"),
        (
            ("pipedream", 4, 8, {"microbatches_per_update": 3}),
            "too small for 4 ranks .* set microbatches_per_update >= 4",
        ),
        (
            ("pipedream", 4, 8, {"microbatches_per_update": 5, "depths": (6, 4, 2, 0)}),
            "deepest warmup of 6: .* set microbatches_per_update >= 6",
        ),
        (
            ("pipedream", 4, 8, {"microbatches_per_update": 4, "vertical_sync": True}),
            "vertical_sync cannot be combined with microbatches_per_update=4",
        ),
    ],
)
def test_errors_say_what_is_legal(call: tuple[str, int, int, dict[str, object]], words: str) -> None:
    name, num_ranks, num_microbatches, options = call
    with pytest.raises(ScheduleError, match=words):
        build_schedule(name, num_ranks, num_microbatches, **options)  # type: ignore[arg-type]
