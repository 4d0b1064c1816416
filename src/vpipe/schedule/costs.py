"""How long each action takes: the input of the simulator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from vpipe.errors import ScheduleError
from vpipe.schedule.action import Kind
from vpipe.schedule.placement import Placement

__all__ = ["Costs"]


@dataclass(frozen=True)
class Costs:
    """Times of one microbatch on each stage, and of messages between ranks.

    Any unit of time will do, the same everywhere; the tuples have one entry per stage. A message of b bytes occupies
    its link for ``b / bandwidth`` and arrives `latency` later; a link carries one message at a time in each direction.
    """

    forward: tuple[float, ...]
    """One forward; also one recomputation."""
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

    def __post_init__(self) -> None:
        for item in fields(self):
            values = getattr(self, item.name)
            values = values if isinstance(values, tuple) else (values,)
            for value in values:
                if math.isnan(value) or value < 0 or (math.isinf(value) and item.name != "bandwidth"):
                    raise ScheduleError(f"{item.name} must be a finite number from 0 on, got {value:g}")
        if self.bandwidth == 0:
            raise ScheduleError("bandwidth must be above 0; leave it out for links that cost no time")

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
        )

    def durations(self, num_stages: int) -> dict[Kind, tuple[float, ...]]:
        """Return the time of each kind of computation, per stage.

        Raises:
            ScheduleError: the costs are for another number of stages.
        """
        for name in ("forward", "input_grad", "weight_grad", "step"):
            if len(getattr(self, name)) != num_stages:
                raise ScheduleError(
                    f"{name} has {len(getattr(self, name))} entries for {num_stages} stages; give one per stage"
                )
        both = tuple(i + w for i, w in zip(self.input_grad, self.weight_grad, strict=True))
        return {
            Kind.F: self.forward,
            Kind.R: self.forward,
            Kind.B: both,
            Kind.I: self.input_grad,
            Kind.W: self.weight_grad,
            Kind.STEP: self.step,
        }

    def transfers(self, num_stages: int) -> tuple[float, ...]:
        """Return how long a message between stage s and s + 1 occupies its link, for every stage but the last.

        Raises:
            ScheduleError: `message_bytes` is for another number of stages.
        """
        if not self.message_bytes:
            return (0.0,) * (num_stages - 1)
        if len(self.message_bytes) not in (num_stages - 1, num_stages):
            raise ScheduleError(
                f"message_bytes has {len(self.message_bytes)} entries for {num_stages} stages; give one per stage (the "
                "last one sends nothing on and may be left out)"
            )
        return tuple(size / self.bandwidth for size in self.message_bytes[: num_stages - 1])
