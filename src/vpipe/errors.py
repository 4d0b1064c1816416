"""Everything VPipe raises on purpose.

::

    VPipeError                 base of all; its text is meant for the user, no traceback needed
    ├── ConfigError            a key or value of the run's YAML, a flag, or an argument of the public API
    ├── ScheduleError          a schedule that cannot be built, parsed or executed
    ├── PlanError              a partition, ratio or stage map that does not fit the model or the ranks
    ├── ModelError             a chain of blocks that cannot be cut, built or traced
    ├── DataError              missing, truncated or mismatched training data
    ├── LaunchError            ranks that could not be started, or ended in failure
    └── ExecutionError         something went wrong while ranks were running
        ├── PeerLostError      another rank died or stopped answering
        ├── TransportError     a message arrived with another shape or type than agreed
        ├── NonFiniteLossError the loss became NaN or infinite
        └── MemoryLimitError   a rank held more bytes than it may

Every message names the key or value, the numbers involved and what to change.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "DataError",
    "ExecutionError",
    "LaunchError",
    "MemoryLimitError",
    "ModelError",
    "NonFiniteLossError",
    "PeerLostError",
    "PlanError",
    "ScheduleError",
    "TransportError",
    "VPipeError",
]


class VPipeError(Exception):
    """Base of every error that VPipe raises on purpose."""


class ConfigError(VPipeError):
    """A key, value, flag or argument is wrong."""


class ScheduleError(VPipeError):
    """A schedule cannot be built, parsed or executed."""


class PlanError(VPipeError):
    """A partition, ratio or stage map does not fit the model or the ranks."""


class ModelError(VPipeError):
    """A chain of blocks cannot be cut, built or traced."""


class DataError(VPipeError):
    """Training data is missing, truncated or does not match the model."""


class LaunchError(VPipeError):
    """Ranks could not be started, or ended in failure."""


class ExecutionError(VPipeError):
    """Something went wrong while ranks were running."""


class PeerLostError(ExecutionError):
    """Another rank died or stopped answering."""


class TransportError(ExecutionError):
    """A message does not have the shape or type that was agreed at the start."""


class NonFiniteLossError(ExecutionError):
    """The loss became NaN or infinite."""


class MemoryLimitError(ExecutionError):
    """A rank held more bytes than its memory limit allows."""
