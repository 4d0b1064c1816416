"""A timetable of equal slots, one action of each rank in a slot, whose gaps can be closed without holding more memory.

The slot is the time of one stage's forward, input gradient or weight gradient, taken as equal. Only the order that
comes out matters; how long it really takes is the simulator's business.
"""

from __future__ import annotations

from collections import deque
from itertools import accumulate

from vpipe.errors import ScheduleError
from vpipe.schedule.action import Action, Kind
from vpipe.schedule.placement import Placement

__all__ = ["SlotGrid"]

_HELD = {Kind.F: 1, Kind.I: 0, Kind.W: -1}  # change of what a rank holds, in microbatches of one stage
_MAX_ROUNDS = 8


class SlotGrid:
    """Which action each rank runs in which slot."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._last = placement.num_stages - 1
        self._rank_of = [placement.rank_of(stage) for stage in range(placement.num_stages)]
        self._rows: list[dict[int, Action]] = [{} for _ in range(placement.num_ranks)]
        self._slot_of: dict[Action, int] = {}

    def place(self, action: Action, slot: int) -> None:
        """Put `action` into a free slot of its rank.

        Raises:
            ScheduleError: the slot is taken.
        """
        row = self._rows[self._rank_of[action.stage]]
        if slot in row:
            raise ScheduleError(f"{action} and {row[slot]} would both run in slot {slot}; choose another block")
        row[slot] = action
        self._slot_of[action] = slot

    def fill_weight_gradients(self) -> None:
        """Put every W that has no slot into the first gap after its I, oldest first."""
        for row in self._rows:
            waiting: deque[Action] = deque()
            slot, end = 0, max(row, default=-1)
            while slot <= end or waiting:
                action = row.get(slot)
                if action is None and waiting:
                    self.place(waiting.popleft(), slot)
                elif action is not None and action.kind is Kind.I:
                    weight = Action(action.stage, Kind.W, action.microbatch)
                    if weight not in self._slot_of:
                        waiting.append(weight)
                slot += 1

    def close_gaps(self) -> None:
        """Move actions into earlier gaps as long as their inputs are there and no rank holds more than the peak so far.

        First everything, with the weight gradients where they are. Then the end again: after a rank's last forward
        memory only falls, so there input gradients go first, and weight gradients fill what they leave.
        """
        peak = max(max(self._held(rank)) for rank in range(len(self._rows)))
        for _ in range(_MAX_ROUNDS):
            if not self._pull((Kind.F, Kind.I, Kind.W), peak):
                break
        for _ in range(_MAX_ROUNDS):
            self._take_out_last_weight_gradients()
            moved = self._pull((Kind.I,), peak)
            self.fill_weight_gradients()
            if not moved:
                break

    def orders(self) -> list[list[Action]]:
        """Return the actions of each rank in the order of their slots."""
        return [[row[slot] for slot in sorted(row)] for row in self._rows]

    def _held(self, rank: int) -> list[int]:
        """Return what `rank` holds after each slot."""
        row = self._rows[rank]
        return list(accumulate(_HELD[row[slot].kind] if slot in row else 0 for slot in range(max(row) + 1)))

    def _take_out_last_weight_gradients(self) -> None:
        for row in self._rows:
            last = max(slot for slot, action in row.items() if action.kind is Kind.F)
            for slot in [slot for slot, action in row.items() if slot > last and action.kind is Kind.W]:
                del self._slot_of[row.pop(slot)]

    def _pull(self, kinds: tuple[Kind, ...], peak: int) -> bool:
        """Move each action of `kinds`, in order of time, to the first gap it may use; return whether any moved."""
        held = [self._held(rank) for rank in range(len(self._rows))]
        moved = False
        for action, slot in sorted(self._slot_of.items(), key=lambda item: (item[1], self._rank_of[item[0].stage])):
            if action.kind not in kinds:
                continue
            rank = self._rank_of[action.stage]
            row, holds = self._rows[rank], held[rank]
            goal = self._earliest(action)
            if action.kind is Kind.F:
                first = slot
                while first > goal and holds[first - 1] < peak:
                    first -= 1
                goal = first
            while goal < slot and goal in row:
                goal += 1
            if goal < slot:
                row[goal] = row.pop(slot)
                self._slot_of[action] = goal
                for passed in range(goal, slot):
                    holds[passed] += _HELD[action.kind]
                moved = True
        return moved

    def _earliest(self, action: Action) -> int:
        """Return the first slot after everything `action` needs, its predecessor on the stage included."""
        stage, kind, microbatch = action.stage, action.kind, action.microbatch
        needed = [Action(stage, kind, microbatch - 1)] if microbatch else []
        if kind is Kind.W:
            needed.append(Action(stage, Kind.I, microbatch))
        elif kind is Kind.I:
            needed.append(Action(stage, Kind.F, microbatch))
            if stage < self._last:
                needed.append(Action(stage + 1, Kind.I, microbatch))
        elif stage > 0:
            needed.append(Action(stage - 1, Kind.F, microbatch))
        return 1 + max((self._slot_of[other] for other in needed), default=-1)
