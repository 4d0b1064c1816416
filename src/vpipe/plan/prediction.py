"""What a plan is expected to take: no run needs it, and every report compares with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vpipe.errors import PlanError
from vpipe.plan.values import is_number

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
        """Read what `to_dict` returned; of memory, only the `total` of every rank has to be there.

        Raises:
            PlanError: it is no prediction.
        """
        if not isinstance(content, Mapping):
            raise PlanError(f"predicted is {content!r}; it is a mapping with step_ms and memory_bytes")
        for name in ("step_ms", "sample_ms", "lower_bound_ms"):
            value = content.get(name)
            if not is_number(value) and (value is not None or name == "step_ms"):
                raise PlanError(f"predicted has {name} = {value!r}; it is a number, in ms")
        ranks = content.get("memory_bytes")
        if not isinstance(ranks, Sequence) or not all(map(_is_memory, ranks)):
            raise PlanError("predicted has no memory_bytes with a 'total' for each rank; plan again")
        if not isinstance(made_of := content.get("made_of", {}), Mapping):
            raise PlanError(f"predicted has made_of = {made_of!r}; it is a mapping, or left out")
        return cls(
            content["step_ms"],
            content.get("sample_ms"),
            tuple(ranks),
            content.get("lower_bound_ms"),
            profile,
            made_of,
        )


def _is_memory(kinds: object) -> bool:
    return isinstance(kinds, Mapping) and is_number(kinds.get("total"))
