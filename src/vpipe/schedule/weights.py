"""Which weight version each microbatch uses, and how many versions a stage keeps: computed by replaying its order.

Version v of a stage is its parameters after v updates. The backward of a microbatch always uses the version of its
forward; the schedule's `WeightRule` says which one that is.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from itertools import accumulate

from vpipe.errors import ScheduleError
from vpipe.schedule.action import Kind
from vpipe.schedule.schedule import Schedule, WeightRule

__all__ = ["StageWeights", "find_unavailable", "unavailable_reason", "weight_usage"]


@dataclass(frozen=True)
class StageWeights:
    """The weight versions of one stage; the tuples have one entry per microbatch."""

    version_of: tuple[int, ...]
    """The version its forward and backward use: the number of updates that version has seen."""
    update_of: tuple[int, ...]
    """The update (from 0) that applies its gradient."""
    staleness: tuple[int, ...]
    """Updates made between the version its gradient was computed from and the one it is applied to."""
    num_versions: int
    """Parameter sets kept at once, at the peak."""
    num_on_device: int
    """Those of them that are not in host memory, at the peak."""


@dataclass
class _Replay:
    """What one stage's order says, before the weight rule is applied."""

    forward_at: dict[int, int] = field(default_factory=dict)
    updates_seen: dict[int, int] = field(default_factory=dict)  # by the microbatch's forward
    update_of: dict[int, int] = field(default_factory=dict)
    released_at: dict[int, int] = field(default_factory=dict)  # the position of the microbatch's last backward
    updates_at: list[int] = field(default_factory=list)
    fetched_at: dict[int, int] = field(default_factory=dict)  # the position of the microbatch's FETCH_V


def weight_usage(schedule: Schedule) -> tuple[StageWeights, ...]:
    """Return, for each stage, the version and staleness of every microbatch and the versions kept.

    A stage keeps the newest version, and older ones for as long as a microbatch in flight or still to come uses them. A
    version whose last use is over when an update is made is overwritten by it, so it does not count: a last stage that
    updates after every backward keeps one version.

    Raises:
        ScheduleError: a forward or an update is missing, or a forward needs a version that its stage has not made yet.
    """
    replays = _replay_all(schedule)
    versions = _versions(schedule, replays)
    for stage, microbatch, needed, available in _unavailable(replays, versions):
        raise ScheduleError(unavailable_reason(stage, microbatch, needed, available))
    return tuple(_summarize(replay, version_of) for replay, version_of in zip(replays, versions, strict=True))


def find_unavailable(schedule: Schedule) -> list[tuple[int, int, int, int]]:
    """Return (stage, microbatch, version needed, newest version made) of every forward that comes too early."""
    replays = _replay_all(schedule)
    return _unavailable(replays, _versions(schedule, replays))


def unavailable_reason(stage: int, microbatch: int, needed: int, available: int) -> str:
    """Say what is wrong with a forward that comes before the update it needs."""
    return (
        f"{stage}F{microbatch} needs weight version {needed}, but stage {stage} has made only {available} updates by "
        f"then; put the forward after update {needed - 1} of stage {stage}"
    )


def _replay_all(schedule: Schedule) -> list[_Replay]:
    replays = [_replay(schedule, stage) for stage in range(schedule.num_stages)]
    for stage, replay in enumerate(replays):
        for microbatch in range(schedule.num_microbatches):
            if microbatch not in replay.forward_at or microbatch not in replay.update_of:
                raise ScheduleError(
                    f"stage {stage} has no forward and later update of microbatch {microbatch} in schedule "
                    f"'{schedule.name}'; every microbatch needs F, then B or W, then STEP: see validate_schedule"
                )
    return replays


def _replay(schedule: Schedule, stage: int) -> _Replay:
    replay, pending = _Replay(), []
    for position, action in enumerate(schedule.stage_order(stage)):
        if action.kind is Kind.F:
            replay.forward_at[action.microbatch] = position
            replay.updates_seen[action.microbatch] = len(replay.updates_at)
        elif action.kind in (Kind.B, Kind.W):
            replay.released_at[action.microbatch] = position
            pending.append(action.microbatch)
        elif action.kind is Kind.STEP:
            replay.update_of.update(dict.fromkeys(pending, len(replay.updates_at)))
            replay.updates_at.append(position)
            pending = []
        elif action.kind is Kind.FETCH_V:
            replay.fetched_at[action.microbatch] = position
    return replay


def _versions(schedule: Schedule, replays: list[_Replay]) -> list[tuple[int, ...]]:
    """Apply the weight rule: the version of every microbatch, per stage."""
    microbatches = range(schedule.num_microbatches)
    if schedule.weight_rule is WeightRule.DELAYED:
        return [tuple(max(replay.update_of[k] - 1, 0) for k in microbatches) for replay in replays]
    if schedule.weight_rule is WeightRule.VERTICAL:
        return [tuple(replays[0].updates_seen[k] for k in microbatches)] * len(replays)
    return [tuple(replay.updates_seen[k] for k in microbatches) for replay in replays]


def _unavailable(replays: list[_Replay], versions: list[tuple[int, ...]]) -> list[tuple[int, int, int, int]]:
    return [
        (stage, microbatch, needed, replay.updates_seen[microbatch])
        for stage, (replay, version_of) in enumerate(zip(replays, versions, strict=True))
        for microbatch, needed in enumerate(version_of)
        if needed > replay.updates_seen[microbatch]
    ]


def _summarize(replay: _Replay, version_of: tuple[int, ...]) -> StageWeights:
    update_of = tuple(replay.update_of[microbatch] for microbatch in range(len(version_of)))
    staleness = tuple(update - version for update, version in zip(update_of, version_of, strict=True))
    num_versions = _count_versions(replay, version_of)
    num_on_device = _count_on_device(replay, version_of) if replay.fetched_at else num_versions
    return StageWeights(version_of, update_of, staleness, num_versions, num_on_device)


def _count_versions(replay: _Replay, version_of: tuple[int, ...]) -> int:
    """Count the versions alive right after each update, where the count peaks, and return the largest."""
    last_use = _last_uses(replay, version_of)
    # Version v stops counting once it is no longer the newest and its last use is over.
    ends = sorted(max(last_use.get(version, -1), made) for version, made in enumerate(replay.updates_at))
    return max(1 + newest - bisect_right(ends, made) for newest, made in enumerate(replay.updates_at, start=1))


def _count_on_device(replay: _Replay, version_of: tuple[int, ...]) -> int:
    """Count the versions on the device after each update and each FETCH_V, and return the largest count.

    What is moved is away from the update that replaces it until its FETCH_V; what is no longer used has its place until
    the next update.
    """
    last_use, updates = _last_uses(replay, version_of), replay.updates_at
    back_at = {version_of[microbatch]: position for microbatch, position in replay.fetched_at.items()}
    changes = [(made, +1) for made in (-1, *updates)]
    for version, replaced in enumerate(updates):
        if version in back_at:
            changes += [(replaced, -1), (back_at[version], +1)]
        end = max(last_use.get(version, -1), replaced)
        changes += [(position, -1) for position in updates[bisect_left(updates, end) :][:1]]
    return max(accumulate(change for _, change in sorted(changes)))


def _last_uses(replay: _Replay, version_of: tuple[int, ...]) -> dict[int, int]:
    last_use: dict[int, int] = {}
    for microbatch, version in enumerate(version_of):
        last_use[version] = max(last_use.get(version, -1), replay.released_at[microbatch])
    return last_use
