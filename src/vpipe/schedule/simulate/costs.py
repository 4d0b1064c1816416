"""How long each action takes: the input of the simulator."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from vpipe.errors import ScheduleError
from vpipe.schedule.action import Kind
from vpipe.schedule.placement import Placement

__all__ = ["Costs", "Hop", "Link"]

_STAGE_TIMES = ("forward", "input_grad", "weight_grad", "step")
_OPTIONAL_TIMES = ("recompute", "move", "move_versions")


@dataclass(frozen=True)
class Link:
    """One direction of a link between two ranks."""

    latency: float = 0.0
    """From the end of a transfer's time on the link to its arrival."""
    bandwidth: float = math.inf
    """Bytes per unit of time."""

    def __post_init__(self) -> None:
        _check_time("latency", self.latency)
        if math.isnan(self.bandwidth) or self.bandwidth <= 0:
            raise ScheduleError(
                f"bandwidth must be above 0, got {self.bandwidth:g}; leave it out for links that cost no time"
            )


class Hop(NamedTuple):
    """What one message between neighbouring stages costs: time on its link, then time until it arrives."""

    occupied: float
    latency: float


@dataclass(frozen=True)
class Costs:
    """Times of one microbatch on each stage, and of messages between ranks.

    Any unit of time will do, the same everywhere; the tuples have one entry per stage. A message of b bytes occupies
    its link for ``b / bandwidth`` and arrives `latency` later; a link carries one message at a time in each direction.
    """

    forward: tuple[float, ...]
    """One forward."""
    input_grad: tuple[float, ...]
    """The input-gradient half of a backward."""
    weight_grad: tuple[float, ...]
    """The weight-gradient half of a backward; a full backward takes the sum of both."""
    step: tuple[float, ...]
    """One optimizer update."""
    latency: float = 0.0
    """From the end of a transfer's time on the link to its arrival."""
    bandwidth: float = math.inf
    """Bytes per unit of time, each direction of each link."""
    message_bytes: tuple[float, ...] = ()
    """Bytes that each stage sends to the next; the gradient that comes back is as large. Empty: nothing."""
    recompute: tuple[float, ...] = ()
    """One recomputation of what the stage does not keep: its R, or without one a part of its backward. Empty: nothing
    is recomputed in backwards, and an R takes as long as the forward."""
    move: tuple[float, ...] = ()
    """Time that an OFFLOAD or a FETCH of a stage occupies its rank's host link. Empty: none."""
    move_versions: tuple[float, ...] = ()
    """Likewise for an OFFLOAD_V or a FETCH_V, which moves the stage's weights."""
    move_share: float = 0.0
    """Of the time of a move, what the computations beside it lose: 0 where something else does the copying, 1 or more
    where the core does that computes."""
    handling: Mapping[Kind, tuple[float, ...]] = field(default_factory=dict)
    """Instead of times on the host link: how long a rank itself is busy with each kind of move, by stage."""
    dispatch: float = 0.0
    """What every computation takes on top, before it starts: the executor's own time. The rank counts as working."""
    links: Mapping[tuple[int, int], Link] = field(default_factory=dict)
    """Links that are not like the rest, by (sending rank, receiving rank): each direction by itself."""

    def __post_init__(self) -> None:
        for name in (*_STAGE_TIMES, *_OPTIONAL_TIMES, "message_bytes"):
            for value in getattr(self, name):
                _check_time(name, value)
        for kind, values in self.handling.items():
            for value in values:
                _check_time(f"handling of {kind}", value)
        _check_time("move_share", self.move_share)
        _check_time("dispatch", self.dispatch)
        Link(self.latency, self.bandwidth)

    @classmethod
    def from_rank_shares(
        cls,
        placement: Placement,
        *,
        forward: float | Sequence[float] = 1.0,
        input_grad: float | Sequence[float] = 1.0,
        weight_grad: float | Sequence[float] = 1.0,
        step: float | Sequence[float] = 0.0,
        latency: float = 0.0,
        bandwidth: float = math.inf,
        message_bytes: float = 0.0,
        recompute: float | Sequence[float] | None = None,
        move: float | Sequence[float] | None = None,
        move_versions: float | Sequence[float] | None = None,
        move_share: float = 0.0,
        dispatch: float = 0.0,
        links: Mapping[tuple[int, int], Link] | None = None,
    ) -> Costs:
        """Split each rank's share of one microbatch (one number, or one per rank) evenly over its stages.

        A message has `message_bytes` at every cut, however many there are.

        Raises:
            ScheduleError: negative or not finite, or not one number per rank.
        """

        def split(name: str, share: float | Sequence[float]) -> tuple[float, ...]:
            shares = [float(share)] * placement.num_ranks if isinstance(share, int | float) else list(map(float, share))
            if len(shares) != placement.num_ranks:
                raise ScheduleError(
                    f"{name} has {len(shares)} numbers for {placement.num_ranks} ranks; give one per rank"
                )
            return tuple(
                shares[placement.rank_of(stage)] / placement.stages_per_rank for stage in range(placement.num_stages)
            )

        return cls(
            forward=split("forward", forward),
            input_grad=split("input_grad", input_grad),
            weight_grad=split("weight_grad", weight_grad),
            step=split("step", step),
            latency=latency,
            bandwidth=bandwidth,
            message_bytes=(float(message_bytes),) * placement.num_stages,
            recompute=() if recompute is None else split("recompute", recompute),
            move=() if move is None else split("move", move),
            move_versions=() if move_versions is None else split("move_versions", move_versions),
            move_share=move_share,
            dispatch=dispatch,
            links=links or {},
        )

    def durations(self, num_stages: int) -> dict[Kind, tuple[float, ...]]:
        """Return the time that each kind of computation takes its rank, dispatch included, per stage.

        Raises:
            ScheduleError: the costs are for another number of stages.
        """
        for name in (*_STAGE_TIMES, *(name for name in _OPTIONAL_TIMES if getattr(self, name))):
            if len(getattr(self, name)) != num_stages:
                raise ScheduleError(
                    f"{name} has {len(getattr(self, name))} entries for {num_stages} stages; give one per stage"
                )
        times = {
            Kind.F: self.forward,
            Kind.R: self.recompute or self.forward,
            Kind.B: tuple(i + w for i, w in zip(self.input_grad, self.weight_grad, strict=True)),
            Kind.I: self.input_grad,
            Kind.W: self.weight_grad,
            Kind.STEP: self.step,
        }
        if not self.dispatch:
            return times
        return {kind: tuple(self.dispatch + time for time in stages) for kind, stages in times.items()}

    def hops(self, placement: Placement) -> tuple[tuple[Hop, ...], tuple[Hop, ...]]:
        """Return what the message from stage s to s + 1 costs, and the gradient from s + 1 to s, for every cut s.

        Raises:
            ScheduleError: `message_bytes` is for another number of stages, or `links` for other ranks.
        """
        num_stages = placement.num_stages
        if self.message_bytes and len(self.message_bytes) not in (num_stages - 1, num_stages):
            raise ScheduleError(
                f"message_bytes has {len(self.message_bytes)} entries for {num_stages} stages; give one per stage (the "
                "last one sends nothing on and may be left out)"
            )
        for pair in self.links:
            if not all(0 <= rank < placement.num_ranks for rank in pair):
                raise ScheduleError(
                    f"links has one for ranks {pair}, but there are only 0 to {placement.num_ranks - 1}"
                )
        cuts = [(stage, placement.rank_of(stage), placement.rank_of(stage + 1)) for stage in range(num_stages - 1)]
        return (
            tuple(self._hop(stage, lower, upper) for stage, lower, upper in cuts),
            tuple(self._hop(stage, upper, lower) for stage, lower, upper in cuts),
        )

    def _hop(self, cut: int, sender: int, receiver: int) -> Hop:
        if sender == receiver:
            return Hop(0.0, 0.0)
        link = self.links.get((sender, receiver))
        latency, bandwidth = (self.latency, self.bandwidth) if link is None else (link.latency, link.bandwidth)
        return Hop(self.message_bytes[cut] / bandwidth if self.message_bytes else 0.0, latency)


def _check_time(name: str, value: float) -> None:
    if math.isnan(value) or math.isinf(value) or value < 0:
        raise ScheduleError(f"{name} must be a finite number from 0 on, got {value:g}")
