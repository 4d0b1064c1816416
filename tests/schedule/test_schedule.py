from __future__ import annotations

from dataclasses import replace

from vpipe.schedule.registry import build_schedule
from vpipe.schedule.schedule import WeightRule


def test_fingerprint_is_the_same_for_the_same_plan() -> None:
    assert build_schedule("1f1b", 4, 8).fingerprint() == build_schedule("1f1b", 4, 8).fingerprint()


def test_fingerprint_sees_every_difference_that_ranks_must_agree_on() -> None:
    plain = build_schedule("pipedream", 4, 8)
    others = [
        replace(plain, weight_rule=WeightRule.VERTICAL),
        replace(plain, synchronous=True),
        build_schedule("pipedream", 4, 8, depths=(4, 2, 1, 0)),
        build_schedule("pipedream", 4, 9),
        build_schedule("1f1b", 4, 8),
    ]
    assert len({schedule.fingerprint() for schedule in [plain, *others]}) == 6


def test_stage_order_keeps_one_stage() -> None:
    schedule = build_schedule("naive", 2, 2, stages_per_rank=2)
    assert " ".join(map(str, schedule.stage_order(2))) == "2F0 2B0 2F1 2B1 2STEP1"
    assert schedule.stage_order(3)[0].stage == 3
