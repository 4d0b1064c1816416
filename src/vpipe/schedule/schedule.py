"""A schedule: what each rank computes, in which order. Plain data."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from vpipe.schedule.action import Action, Kind
from vpipe.schedule.placement import Placement

__all__ = ["Schedule", "WeightRule", "freeze", "uses_split_backward"]


class WeightRule(str, Enum):
    """Which weight version a forward uses; the backward always uses the same one."""

    NEWEST = "newest"
    """The newest version its stage has when the forward starts (PipeDream; all synchronous schedules)."""
    VERTICAL = "vertical"
    """The version number the microbatch used at stage 0 (PipeDream's vertical sync)."""
    DELAYED = "delayed"
    """The version one update before its own: gradients of update u come from version max(u - 1, 0) (PipeDream-2BW)."""


@dataclass(frozen=True)
class Schedule:
    """What each rank computes, in which order.

    `orders[rank]` lists compute actions (F, B, I, W, R and STEP), and moves to host memory and back (OFFLOAD, FETCH,
    OFFLOAD_V, FETCH_V); `lower` adds the communication.
    """

    name: str
    num_microbatches: int
    placement: Placement
    orders: tuple[tuple[Action, ...], ...]
    synchronous: bool = True
    weight_rule: WeightRule = WeightRule.NEWEST

    @property
    def num_ranks(self) -> int:
        """Count the ranks."""
        return self.placement.num_ranks

    @property
    def num_stages(self) -> int:
        """Count the stages."""
        return self.placement.num_stages

    def rank_of(self, action: Action) -> int:
        """Return the rank that runs `action`."""
        return self.placement.rank_of(action.stage)

    def position_of(self, stage: int) -> int:
        """Return the place in the pipeline where `stage` is held: the rank of all of its actions."""
        return self.placement.rank_of(stage)

    def stage_order(self, stage: int) -> tuple[Action, ...]:
        """Return the actions of `stage`, in the order its rank runs them."""
        order = self.orders[self.position_of(stage)]
        if self.placement.stages_per_rank == 1:
            return order
        return tuple(action for action in order if action.stage == stage)

    def fingerprint(self) -> str:
        """Hash everything that ranks must agree on, as 16 hexadecimal digits."""
        rows = [" ".join(map(str, order)) for order in self.orders]
        head = f"{self.name} {self.num_microbatches} {self.placement} {self.synchronous} {self.weight_rule.value}"
        return hashlib.sha256("\n".join([head, *rows]).encode()).hexdigest()[:16]


def freeze(orders: Sequence[Sequence[Action]]) -> tuple[tuple[Action, ...], ...]:
    """Turn lists of actions into the tuples that a `Schedule` holds."""
    return tuple(tuple(order) for order in orders)


def uses_split_backward(schedule: Schedule) -> bool:
    """Return whether backwards are split into input and weight gradients (I and W): an executor must know how."""
    return any(action.kind is Kind.I or action.kind is Kind.W for order in schedule.orders for action in order)
