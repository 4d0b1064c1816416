"""Warmup, steady phase and cooldown of a rank, read off its order."""

from __future__ import annotations

from collections.abc import Sequence

from vpipe.schedule.action import Kind
from vpipe.schedule.simulate.simulate import Event

__all__ = ["PHASES", "phase_spans", "turning_points"]

PHASES = ("warmup", "steady", "cooldown")


def turning_points(events: Sequence[Event]) -> tuple[int, int]:
    """Return the places of a rank's first backward (behind the end if there is none) and last forward (or -1)."""
    backwards = (index for index, event in enumerate(events) if event.action.kind in (Kind.B, Kind.I))
    forwards = [index for index, event in enumerate(events) if event.action.kind is Kind.F]
    return next(backwards, len(events)), forwards[-1] if forwards else -1


def phase_spans(events: Sequence[Event]) -> dict[str, tuple[float, float]]:
    """Return when each phase of a rank starts and ends; phases that it does not have are left out.

    The warmup is the forwards before the first pair of a forward and a backward, the cooldown what comes after the last
    pair. Where all forwards come first there are no pairs, so no steady phase. Updates at the end belong to no phase.
    """
    work = [event for event in events if event.action.kind is not Kind.STEP]
    if not work:
        return {}
    first_backward, last_forward = turning_points(work)
    if first_backward > last_forward:
        warm, steady = first_backward, first_backward
    else:
        # The first pair begins with the last forward before the first backward, the last pair ends with the backward
        # that follows the last forward.
        warm = max((index for index in range(first_backward) if work[index].action.kind is Kind.F), default=0)
        after = (index for index in range(last_forward, len(work)) if work[index].action.kind in (Kind.B, Kind.I))
        steady = next(after, len(work) - 1) + 1
    bounds = {"warmup": (0, warm), "steady": (warm, steady), "cooldown": (steady, len(work))}
    return {phase: (work[start].start, work[end - 1].end) for phase, (start, end) in bounds.items() if end > start}
