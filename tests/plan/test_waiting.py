"""How long ranks wait is what the closed forms of schedules say."""

from __future__ import annotations

from pathlib import Path

import pytest

from vpipe.plan.recipe import Recipe
from vpipe.plan.waiting import find_waiting


@pytest.mark.parametrize("num_ranks", [2, 5])
@pytest.mark.parametrize("num_microbatches", [1, 3, 40])
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_the_share_is_the_closed_form(name: str, num_microbatches: int, num_ranks: int) -> None:
    waiting = find_waiting(Recipe(name, num_microbatches, num_ranks))
    assert waiting is not None
    assert waiting.share == pytest.approx((num_ranks - 1) / (num_microbatches + num_ranks - 1))
    assert waiting.is_long == (num_microbatches < 4 * num_ranks)
    if not waiting.is_long:
        assert waiting.better is None
    else:
        enough = 4 * num_ranks
        assert waiting.better == (enough, pytest.approx((num_ranks - 1) / (enough + num_ranks - 1)))


def test_what_is_advised_can_be_run(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n")
    for name, batch_size, best in (
        ("1f1b", 24, 24),
        ("1f1b", 36, 18),  # the smallest that is enough
        ("1f1b", 14, 14),
        ("1f1b", 2, None),
        (str(tmp_path / "own.csv"), 36, None),
    ):
        waiting = find_waiting(Recipe(name, 2, 2 if name.endswith("csv") else 4), batch_size)
        assert waiting is not None
        assert (waiting.better or (None,))[0] == best, name


@pytest.mark.parametrize("recipe", [Recipe("pipedream", 1, 4), Recipe("1f1b", 1, 1), Recipe("gpipe", 8, 1)], ids=str)
def test_some_do_not_wait_for_a_batch_to_end(recipe: Recipe) -> None:
    assert find_waiting(recipe) is None
