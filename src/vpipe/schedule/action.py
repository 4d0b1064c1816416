"""One step of one rank: the word that schedules are written in.

The text form is ``<stage><kind><microbatch>``: ``2F0`` is the forward of microbatch 0 on stage 2,
``2SEND_F0`` sends its result on, ``2STEP7`` is the optimizer update whose last gradient came from
microbatch 7, ``2FETCH_V9`` brings back the weight version that microbatch 9 uses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from vpipe.errors import ScheduleError

__all__ = ["COMMUNICATION", "COMPUTE", "MOVES", "VERSION_MOVES", "Action", "Kind"]


class Kind(str, Enum):
    """What an action does."""

    F = "F"
    """Forward of one microbatch."""
    B = "B"
    """Full backward: gradients for inputs and for weights."""
    I = "I"  # noqa: E741  (the literature's letter)
    """Backward for inputs only."""
    W = "W"
    """Backward for weights only."""
    R = "R"
    """Recompute a forward ahead of its backward."""
    SEND_F = "SEND_F"
    """Send the forward's outputs to the next stage."""
    RECV_F = "RECV_F"
    """Receive this stage's inputs from the previous stage."""
    SEND_B = "SEND_B"
    """Send the gradients of this stage's inputs to the previous stage."""
    RECV_B = "RECV_B"
    """Receive the gradients of this stage's outputs from the next stage."""
    OFFLOAD = "OFFLOAD"
    """Move a microbatch's activations to host memory."""
    FETCH = "FETCH"
    """Bring them back."""
    OFFLOAD_V = "OFFLOAD_V"
    """Copy the newest weights to host memory, for the microbatch that needs them again: the next update of the stage
    takes their place."""
    FETCH_V = "FETCH_V"
    """Bring these weights back, for that microbatch."""
    REDUCE = "REDUCE"
    """Sum gradients over replicas."""
    STEP = "STEP"
    """Optimizer update of the stage from all gradients since its previous one; the microbatch is their highest."""

    def __str__(self) -> str:
        return self.value

    __hash__ = str.__hash__  # in C; Enum's own is a Python call, and schedules of millions of actions are hashed


COMPUTE = frozenset({Kind.F, Kind.B, Kind.I, Kind.W, Kind.R, Kind.STEP})
COMMUNICATION = frozenset({Kind.SEND_F, Kind.RECV_F, Kind.SEND_B, Kind.RECV_B})
VERSION_MOVES = frozenset({Kind.OFFLOAD_V, Kind.FETCH_V})
MOVES = frozenset({Kind.OFFLOAD, Kind.FETCH}) | VERSION_MOVES

_TEXT = re.compile(r"(\d+)([A-Z_]+)(\d+)")


@dataclass(frozen=True, slots=True)
class Action:
    """One step: what (`kind`) is done for which `stage` and `microbatch`."""

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """Read an action from its text form.

        Raises:
            ScheduleError: `text` is not ``<stage><kind><microbatch>``.
        """
        match = _TEXT.fullmatch(text.strip())
        if match is None or match[2] not in Kind.__members__:
            kinds = " ".join(Kind.__members__)
            raise ScheduleError(f"'{text}' is not an action; write <stage><kind><microbatch>, e.g. 2F0; kinds: {kinds}")
        return cls(int(match[1]), Kind[match[2]], int(match[3]))
