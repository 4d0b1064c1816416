"""What a plan is expected to take: no run needs it, and every report compares with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Prediction"]


@dataclass(frozen=True)
class Prediction:
    """Time and memory that a plan is expected to take."""

    step_ms: float
    """One batch."""
    sample_ms: float | None
    memory_bytes: tuple[Mapping[str, int], ...]
    """Of every rank at its peak, by kind, and the `total`."""
    lower_bound_ms: float | None = None
    """No plan for the same request takes less; None where that is not known."""
    profile: str | None = None
    """Fingerprint of the profile that it is made from."""
    made_of: Mapping[str, Any] = field(default_factory=dict)
    """Where that was counted and not measured: what was assumed."""

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON, as `predicted` in a plan file."""
        return {
            "step_ms": self.step_ms,
            **({} if self.sample_ms is None else {"sample_ms": self.sample_ms}),
            **({} if self.lower_bound_ms is None else {"lower_bound_ms": self.lower_bound_ms}),
            "memory_bytes": [dict(kinds) for kinds in self.memory_bytes],
            **({"made_of": dict(self.made_of)} if self.made_of else {}),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], profile: str | None = None) -> Prediction:
        """Read what `to_dict` returned; of memory, only the `total` of every rank has to be there."""
        return cls(
            content["step_ms"],
            content.get("sample_ms"),
            tuple(content["memory_bytes"]),
            content.get("lower_bound_ms"),
            profile,
            content.get("made_of", {}),
        )
