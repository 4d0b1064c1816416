"""What a rank writes down of itself while the caller goes in and out of calls."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vpipe.runtime.comm.waits.activity import Activity, Calls


@pytest.fixture
def activity() -> Activity:
    return Activity(0, (0, 1))


@pytest.fixture
def calls(activity: Activity) -> Calls:
    return activity.calls()


def test_a_training_call_is_left_between_its_results(activity: Activity, calls: Calls) -> None:
    phases = []

    def work() -> Iterator[int]:
        for number in calls.reading(iter(range(2))):
            phases.append((activity.place.call, activity.place.phase, activity.place.done))
            yield number

    for _ in calls.following(work(), lambda: 7, 5):
        phases.append((activity.place.call, activity.place.phase, activity.place.done))
    assert phases == [
        ("train", "running", 0),
        ("train", "between", 1),
        ("train", "running", 1),
        ("train", "between", 2),
    ]
    assert activity.place.call == ""
    assert activity.last is not None
    assert activity.last.how == "ended"
    assert activity.last.place[3:6] == (7, 2, 5)


def test_reading_is_said_only_while_the_caller_is_asked(activity: Activity, calls: Calls) -> None:
    seen = []

    def batches() -> Iterator[int]:
        seen.append(activity.place.phase)
        yield 1
        seen.append(activity.place.phase)

    with calls.during("evaluate"):
        for _ in calls.reading(batches()):
            seen.append(activity.place.phase)
    assert seen == ["reading", "running", "reading"]


def test_a_train_that_is_a_part_of_a_step_is_that_step(activity: Activity, calls: Calls) -> None:
    with calls.during("step"):
        places = [activity.place.call for _ in calls.following(iter([1]), lambda: 0, 1)]
    assert places == ["step"]
    assert activity.last is not None
    assert activity.last.place.call == "step"


def test_an_evaluation_between_results_comes_back_to_the_train(activity: Activity, calls: Calls) -> None:
    for _ in calls.following(iter([1, 2]), lambda: 0, 2):
        with calls.during("evaluate"):
            assert activity.place.call == "evaluate"
        assert (activity.place.call, activity.place.phase) == ("train", "between")
    assert activity.place.call == ""


def test_a_train_that_is_dropped_in_another_call_does_not_end_that(activity: Activity, calls: Calls) -> None:
    results = calls.following(iter([1, 2]), lambda: 0, 2)
    next(results)
    with calls.during("evaluate"):
        results.close()  # type: ignore[attr-defined]
        assert activity.place.call == "evaluate"


def test_how_a_call_ended_is_kept(activity: Activity, calls: Calls) -> None:
    with pytest.raises(ValueError, match="no"), calls.during("evaluate"):
        raise ValueError("no")
    assert activity.last is not None
    assert activity.last.how == "ValueError: no"
    results = calls.following(iter([1, 2]), lambda: 0, 2)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert activity.last.how == "left"


def test_a_wait_is_over_however_it_ends(activity: Activity) -> None:
    def fail() -> None:
        with activity.meeting("plans", None):
            assert activity.wait is not None
            assert activity.wait.peers == (1,)
            raise RuntimeError("other")

    with pytest.raises(RuntimeError, match="other"):
        fail()
    assert activity.wait is None


def test_ranks_may_step_or_train_when_they_meet(activity: Activity, calls: Calls) -> None:
    with calls.during("step"):
        stepping = activity.key("plans")
    (training,) = [activity.key("plans") for _ in calls.following(iter([1]), lambda: 0, 1)]
    with calls.during("evaluate"):
        evaluating = activity.key("plans")
    assert stepping == training != evaluating
