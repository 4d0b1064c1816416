"""The plan as a value: open and closed, equal and different, printed, written and read."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

import vpipe
from vpipe.errors import ConfigError, PlanError, ScheduleError
from vpipe.plan.partition import Partition
from vpipe.plan.plan import Plan
from vpipe.plan.plan_file import plan_from_dict, plan_to_dict
from vpipe.plan.policy import Policy
from vpipe.plan.prediction import Prediction
from vpipe.plan.recipe import RankTimes
from vpipe.plan.shown import show_lines
from vpipe.schedule.action import Kind
from vpipe.schedule.registry import build_schedule


class Model:
    """Five blocks, of which the first has the parameters."""

    def __len__(self) -> int:
        return 5

    def trainable_sizes(self) -> list[int]:
        return [10, 1, 1, 1, 1]


def closed(num_ranks: int = 2, **fields: Any) -> Plan:
    return Plan(**fields).resolve(Model(), SimpleNamespace(num_ranks=num_ranks))


PLANS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cut": {"partition": [4, 1], "num_microbatches": 3},
    "recomputing": {"recompute_ratio": [0.4, 1], "recompute_ahead": [0]},
    "mixed": {"policies": ["keep", "swap", "recompute", "keep", "swap"], "schedule": "gpipe"},
    "except-last": {"schedule": "gpipe", "recompute": "except_last", "recompute_ratio": 1.0},
    "several": {"schedule": "interleaved", "stages_per_rank": 2, "num_microbatches": 4},
    "deep": {"schedule": "pipedream", "depths": [3, 1], "vertical_sync": True, "swap_versions": [0]},
    "macrobatch": {"schedule": "pipedream", "macrobatch": True, "swap_versions": True},
    "searched": {"schedule": "searched", "max_in_flight": [2, 1.5], "rank_times": {"forward": [1, 2]}},
}


def test_a_plan_may_leave_cuts_and_ranks_open() -> None:
    plan = vpipe.Plan("1f1b", num_microbatches=8, partition="uniform")
    assert not plan.is_closed
    with pytest.raises(PlanError, match="the plan leaves num_ranks, policies, partition open, so it has no"):
        plan.fingerprint()
    with pytest.raises(PlanError, match="leaves num_ranks open; resolve it"):
        plan.build()
    with pytest.raises(PlanError, match="leaves the partition open: 'uniform'"):
        _ = plan.cut
    whole = plan.resolve(Model(), SimpleNamespace(num_ranks=2))
    assert whole.is_closed
    assert (whole.cut, whole.sizes, whole.block_policies) == ((3, 2), (2, 8), (Policy.KEEP,) * 5)
    assert whole.resolve(Model(), SimpleNamespace(num_ranks=2)) == whole


def test_what_is_open_is_filled_in() -> None:
    assert closed(3).sizes == (3, 6)
    assert closed(partition="parameters").cut == (1, 4)
    assert closed(schedule="naive", stages_per_rank=2).cut == (2, 1, 1, 1)
    assert (
        closed(recompute_ratio=0.5).block_policies
        == closed(policies=["keep", "recompute", "recompute", "keep", "recompute"]).block_policies
    )


@pytest.mark.parametrize("name", PLANS)
def test_the_fingerprint_is_that_of_what_is_said(name: str) -> None:
    plan = closed(**PLANS[name])
    again = closed(**PLANS[name])
    assert plan == again
    assert hash(plan) == hash(again)
    assert plan.fingerprint() == again.fingerprint()


def test_another_plan_has_another_fingerprint() -> None:
    prints = {name: closed(**fields).fingerprint() for name, fields in PLANS.items()}
    prints["more microbatches"] = closed(num_microbatches=5).fingerprint()
    prints["another cut"] = closed(partition=[2, 3]).fingerprint()
    prints["other policies"] = closed(recompute_ratio=1.0).fingerprint()
    prints["other microbatches recompute"] = closed(recompute_ratio=1.0, recompute="except_last").fingerprint()
    assert len(set(prints.values())) == len(prints)


def test_ratios_and_the_policies_that_they_mean_are_one_plan() -> None:
    by_ratio = closed(recompute_ratio=[1.0, 0.0])
    by_policy = closed(policies=["recompute"] * 3 + ["keep"] * 2)
    assert by_ratio == by_policy
    assert by_ratio.fingerprint() == by_policy.fingerprint()


@pytest.mark.parametrize("name", PLANS)
def test_what_is_written_is_read(name: str) -> None:
    plan = closed(**PLANS[name])
    content = json.loads(json.dumps(plan_to_dict(plan, microbatch_size=2)))
    found = plan_from_dict(content)
    assert found.fingerprint() == plan.fingerprint() == content["fingerprint"]
    assert found.sample.orders == plan.sample.orders
    assert content["recompute_ratio"] == list(plan.ratios)
    text = "\n".join(show_lines(content))
    assert plan.fingerprint() in text
    assert f"Plan({plan.schedule!r}" in text


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_is_printed_as_python_that_makes_it(name: str) -> None:
    plan = closed(**PLANS[name])
    assert eval(repr(plan), {"Plan": Plan, "RankTimes": RankTimes}) == plan


def test_only_what_is_said_is_printed() -> None:
    assert repr(Plan()) == "Plan('1f1b')"
    assert repr(Plan("gpipe", num_microbatches=8, partition="uniform")) == "Plan('gpipe', num_microbatches=8)"
    assert repr(Plan("1f1b", partition=[3, 2])) == "Plan('1f1b', partition=[3, 2])"


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"recompute": "maybe"}, ConfigError, "recompute is 'maybe'; choose one of always, except_last"),
        (
            {"policies": ["keep", "drop"]},
            PlanError,
            "policies has 'drop' for block 1; use one of keep, rec",
        ),
        ({"policies": "keep"}, PlanError, "policies is 'keep'; give a list with one of keep"),
        ({"policies": ["keep"] * 4}, PlanError, "has 4 entries for 5 blocks; give one per block"),
        ({"policies": ["keep"] * 5, "recompute_ratio": 0.5}, PlanError, "say the same thing twice; keep one"),
        ({"recompute_ratio": [0.5]}, PlanError, "has 1 entries for 2 stages"),
        ({"recompute_ratio": 1.5}, PlanError, "gives stage 0 the ratio 1.5"),
        ({"partition": [1, 1, 1]}, PlanError, "has 3 entries for 2 stages"),
        ({"partition": "even"}, PlanError, "partition 'even' is unknown; give blocks per stage, 'uniform' or 'param"),
        (
            {"rank_times": {"backward": [1, 2]}},
            PlanError,
            "rank_times has 'backward'; its times are forward",
        ),
        ({"schedule": "1f1c"}, ScheduleError, "unknown schedule '1f1c'; did you mean '1f1b'"),
        ({"depths": [3, 1], "schedule": "gpipe"}, ScheduleError, "schedule 'gpipe' has no option 'depths'"),
        (
            {"rank_times": {"forward": [1, 2]}},
            ScheduleError,
            "schedule '1f1b' has no option 'rank_times'; its options: depths",
        ),
        ({"macrobatch": True}, ScheduleError, "update once per batch, which '1f1b' does anyway; leave it out"),
    ],
)
def test_what_does_not_fit_together_is_told(fields: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        closed(**fields)
    assert text in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"schedule": 3}, "schedule is 3; give a name from `vpipe schedule --list`"),
        ({"num_microbatches": "8"}, "num_microbatches is '8'; give a whole number from 1 on"),
        ({"num_microbatches": True}, "num_microbatches is True; give a whole number from 1 on"),
        ({"num_ranks": 0}, "num_ranks is 0; give a whole number from 1 on"),
        ({"stages_per_rank": 1.5}, "stages_per_rank is 1.5; give a whole number from 1 on"),
        ({"depths": 3}, "depths is 3; give a list of warmup forwards, one per stage, each a whole number from 0 on"),
        ({"depths": "abc"}, "depths is 'abc'; give a list of warmup forwards"),
        ({"depths": [2, -1]}, "depths is [2, -1]; give a list of warmup forwards"),
        ({"macrobatch": "yes"}, "macrobatch is 'yes'; give True or False"),
        ({"recompute_ahead": 0}, "recompute_ahead is 0; give a list of stages"),
        ({"swap_versions": "yes"}, "swap_versions is 'yes'; give a list of stages"),
        ({"max_in_flight": "x"}, "max_in_flight is 'x'; give a number, or a list of numbers"),
        ({"rank_times": 3}, "rank_times is 3; give a mapping of forward, input_grad, weight_grad to a list each"),
        ({"rank_times": {"forward": ["a"]}}, "rank_times forward is 'a'; give a number"),
        ({"rank_times": {"forward": 3}}, "rank_times forward is 3; give a list with one time per rank"),
        ({"max_in_flight": {"0": 1}}, "max_in_flight is {'0': 1}; give a number, or a list of numbers"),
        ({"depths": {"0": 1}}, "depths is {'0': 1}; give a list of warmup forwards"),
        ({"partition": 3}, "partition is 3; give a list of blocks per stage"),
        ({"policies": 3}, "policies is 3; give a list with one of keep"),
        ({"recompute_ratio": "x"}, "recompute_ratio is 'x'; give a number"),
    ],
)
def test_what_is_no_value_of_a_field_is_told_at_once(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(PlanError) as raised:
        Plan(**fields)
    assert text in str(raised.value)


def test_stages_that_are_not_there_cannot_do_anything_besides() -> None:
    with pytest.raises(ScheduleError, match="there is no stage 2 to recompute ahead"):
        closed(schedule="pipedream", recompute_ahead=[2]).build()
    with pytest.raises(ScheduleError, match="there is no stage 2 whose weight versions could be moved"):
        closed(schedule="pipedream", swap_versions=[2])


def test_stages_with_nothing_to_move_are_not_named() -> None:
    moving = closed(3, schedule="pipedream", swap_versions=True)
    assert moving.moving_versions == (0,)
    assert moving == closed(3, schedule="pipedream", swap_versions=[0, 2])
    assert closed(3, swap_versions=True) == closed(3)


def test_the_order_has_what_stages_do_besides() -> None:
    assert closed().sample.orders == build_schedule("1f1b", 2, 4).orders
    kinds = {
        name: {action.kind for order in closed(**fields).sample.orders for action in order}
        for name, fields in PLANS.items()
    }
    assert Kind.R in kinds["recomputing"]
    assert Kind.OFFLOAD in kinds["mixed"]
    assert Kind.OFFLOAD_V in kinds["deep"]
    assert not kinds["plain"] & {Kind.R, Kind.OFFLOAD, Kind.OFFLOAD_V}
    assert closed(**PLANS["mixed"]).swapping == {0, 1}


def test_warmups_are_those_of_the_order() -> None:
    assert closed(3).warmups() == [2, 1, 0]
    assert closed(schedule="pipedream", depths=[3, 1]).warmups() == [3, 1]


def test_a_prediction_is_written_and_read() -> None:
    prediction = Prediction(12.5, 1.5, ({"activations": 5, "total": 7},), 11.0, "abc", {"machine": "x"})
    assert Prediction.from_dict(json.loads(json.dumps(prediction.to_dict())), "abc") == prediction
    lines = show_lines(plan_to_dict(closed(), microbatch_size=2, prediction=prediction))
    assert "predicted    12.5 ms per step, at least 11 ms for any plan" in lines


def test_a_file_of_the_original_is_shown_as_far_as_it_says() -> None:
    assert show_lines({"partition": [3, 2], "recompute_ratio": [0.5, 0]})[-1].startswith("The file has the original's")
    older = {"partition": [3, 2], "recompute_ratio": [0.34, 0], "schedule": "1f1b", "num_microbatches": 4}
    assert plan_from_dict(older).is_closed
    assert plan_from_dict(older) == closed(num_microbatches=4, recompute_ratio=[0.34, 0])


FILE: dict[str, Any] = {
    "partition": [3, 2],
    "policies": ["keep"] * 5,
    "schedule": "1f1b",
    "num_microbatches": 4,
    "predicted": {"step_ms": 1.5, "memory_bytes": [{"total": 3}, {"total": 4}]},
    "stages": [{"stage": 0, "blocks": ["a", "b", "c"]}, {"stage": 1, "blocks": ["d", "e"]}],
}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"partition": ["a", 2]}, "partition is ['a', 2]; give a list of blocks per stage, each a whole number"),
        ({"partition": []}, "partition [] has 0 stages"),
        ({"partition": [3, 0]}, "gives stage 1 0 blocks; a stage has at least 1"),
        ({"partition": [3, 1, 1], "num_ranks": 2}, "partition [3, 1, 1] has 3 entries for 2 stages"),
        ({"schedule": "zb-v", "partition": [2, 2, 1]}, "has 3 stages, which are no multiple of stages_per_rank 2"),
        ({"stages_per_rank": 0}, "stages_per_rank is 0; give a whole number from 1 on"),
        ({"stages_per_rank": "x"}, "stages_per_rank is 'x'; give a whole number"),
        ({"num_ranks": None, "stages_per_rank": 2, "schedule": "gpipe"}, "schedule 'gpipe' runs one stage per rank"),
        ({"policies": ["keep"] * 4}, "has 4 entries for 5 blocks; give one per block"),
        ({"stage_to_depth_map": {"0": 3}}, "depths is {'0': 3}; give a list of warmup forwards"),
        ({"microbatch_size": "2"}, "microbatch_size is '2'; give a whole number"),
        ({"predicted": 3}, "predicted is 3; it is a mapping with step_ms and memory_bytes"),
        ({"predicted": {"memory_bytes": []}}, "predicted has step_ms = None; it is a number, in ms"),
        ({"predicted": {"step_ms": 1, "lower_bound_ms": "x"}}, "predicted has lower_bound_ms = 'x'; it is a number"),
        ({"predicted": {"step_ms": 1}}, "predicted has no memory_bytes with a 'total' for each rank; plan again"),
        ({"predicted": {"step_ms": 1, "memory_bytes": [{}]}}, "predicted has no memory_bytes with a 'total'"),
        ({"predicted": FILE["predicted"] | {"made_of": 3}}, "predicted has made_of = 3; it is a mapping"),
        ({"stages": 3}, "stages is not a list of"),
        ({"stages": [{"blocks": 3}]}, "stages is not a list of"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(changes: dict[str, Any], text: str) -> None:
    assert show_lines(FILE)[-2:] == ["   0     3 B", "   1     4 B"]
    with pytest.raises((PlanError, ScheduleError)) as raised:
        show_lines(FILE | changes)
    assert text in str(raised.value)


def test_a_file_holds_stages_as_its_schedule_does() -> None:
    plan = plan_from_dict({"partition": [2, 1, 1, 1], "schedule": "zb-v", "num_microbatches": 4})
    assert (plan.num_ranks, plan.stages_per_rank) == (2, 2)
    assert plan == closed(schedule="zb-v", num_microbatches=4)


def test_never_recomputing_is_keeping() -> None:
    policies = ["keep", "swap", "recompute", "keep", "recompute"]
    plan = closed(policies=policies, recompute="never")
    assert plan == closed(policies=["keep", "swap", "keep", "keep", "keep"])
    assert closed(recompute_ratio=0.5, recompute="never").fingerprint() == closed().fingerprint()
    assert plan_from_dict(plan_to_dict(plan)) == plan


def test_a_recipe_for_any_number_of_stages_lists_nothing_by_stage_or_rank() -> None:
    listed = Plan("searched", max_in_flight=[2, 1], rank_times={"forward": [1, 2]}, swap_versions=[0], depths=[1, 0])
    assert listed.for_any_stages() == Plan("searched")
    everywhere = Plan("searched", max_in_flight=2, swap_versions=True, num_microbatches=4)
    assert everywhere.for_any_stages() == everywhere
    assert RankTimes([1, 2]) == RankTimes((1.0, 2.0))
    assert Plan(swap_versions=False) == Plan()


def test_a_plan_for_other_ranks_is_refused() -> None:
    with pytest.raises(PlanError, match="the plan is for 4 ranks and there are 2; start as many, or leave num_ranks"):
        Plan(num_ranks=4).resolve(Model(), SimpleNamespace(num_ranks=2))


def test_a_partition_is_one_however_it_is_given() -> None:
    assert Plan(partition=(3, 2)) == Plan(partition=[3, 2])
    assert isinstance(Plan(partition=[3, 2]).partition, Partition)
