"""Keep, recompute or swap: the ways of running a stage that no other way beats in both time and bytes.

A multiple-choice knapsack over the blocks of a stage. A way is described by four sums that do not depend on the stage's
place in the pipeline, all better when smaller: recompute time, bytes swapped and bytes held for each microbatch, and
the largest bytes needed for a moment. Block after block is added, and what another way beats in all four is dropped.
So one computation serves every stage, schedule and limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vpipe.plan.costs import Array, ChainCosts, host_ms, swap_copies
from vpipe.plan.memory import Policy, StageLoad, transient_bytes
from vpipe.plan.profile import BlockProfile

__all__ = ["Frontier", "Frontiers", "StageFit"]

_EXACT_BLOCKS = 12
_MANY = 1 << 20
_FEW = 256
_TIME, _SWAPPED, _HELD, _TRANSIENT = range(4)


@dataclass(frozen=True)
class Frontier:
    """The undominated ways to run one interval; `points` has a row each: recompute ms, swapped, held, transient."""

    points: Array
    choices: NDArray[np.int8]
    """Of the last block: an index into the policies."""
    parents: NDArray[np.int32]
    """The row of the interval without the last block that each row extends."""
    is_exact: bool
    """False when ways were left out, so that the best one may be missing."""


@dataclass(frozen=True)
class StageFit:
    """Stages that one question is about: arrays with a row per stage, and a column per peak of what it holds."""

    full: Array
    copies: Array
    halves: Array
    speeds: Array
    limits: Array

    @classmethod
    def of(cls, loads: Sequence[StageLoad], speeds: Sequence[float], limits: Sequence[float]) -> StageFit:
        """Lay out the stages; a stage with fewer peaks than another repeats its last."""
        width = max(len(load.held) for load in loads)
        held = [[*load.held, *[load.held[-1]] * (width - len(load.held))] for load in loads]
        return cls(
            full=np.array([[full for full, _ in peaks] for peaks in held], dtype=float),
            copies=np.array([[swap_copies(full) for full, _ in peaks] for peaks in held], dtype=float),
            halves=np.array([[halves for _, halves in peaks] for peaks in held], dtype=float),
            speeds=np.array(speeds, dtype=float),
            limits=np.array(limits, dtype=float),
        )

    def select(self, stages: NDArray[np.intp]) -> StageFit:
        """Return some of the stages."""
        return StageFit(*(getattr(self, name)[stages] for name in ("full", "copies", "halves", "speeds", "limits")))


class Frontiers:
    """Frontiers of all intervals of a chain, computed when first asked for."""

    def __init__(self, chain: ChainCosts, policies: Sequence[Policy], max_points: int | None = None) -> None:
        self.chain = chain
        self.policies = tuple(policy for policy in policies if policy is not Policy.SWAP or chain.host is not None)
        self._max_points = max_points or (_MANY if len(chain) <= _EXACT_BLOCKS else _FEW)
        self._rows: dict[int, list[Frontier]] = {}
        self._options = [self._options_of(block) for block in chain.blocks]

    @property
    def is_exact(self) -> bool:
        """Tell whether no way was left out of any frontier so far."""
        return all(row[-1].is_exact for row in self._rows.values())

    def interval(self, start: int, stop: int) -> Frontier:
        """Return the frontier of blocks `start` to `stop - 1`."""
        row = self._rows.setdefault(start, [])
        while len(row) < stop - start:
            row.append(self._extend(row[-1] if row else None, self._options[start + len(row)]))
        return row[stop - start - 1]

    def times(self, start: int, stop: int, fit: StageFit, static: Array) -> Array:
        """Return each stage's shortest time with these blocks under its limit, infinite where nothing fits.

        `static` has each stage's bytes that depend on no policy.
        """
        points = self.interval(start, stop).points
        fits = self._bytes(points, start, stop, fit) + static[:, None] <= fit.limits[:, None]
        return np.asarray(np.where(fits, self._times(points, start, stop, fit), np.inf).min(axis=1))

    def least_bytes(self, start: int, stop: int, fit: StageFit) -> Array:
        """Return the fewest bytes of activations and workspace that each stage can do with, at any time."""
        return np.asarray(self._bytes(self.interval(start, stop).points, start, stop, fit).min(axis=1))

    def best(self, start: int, stop: int, fit: StageFit, static: float) -> tuple[Policy, ...] | None:
        """Return the policies of the fastest way under the limit of one stage; None when nothing fits.

        Of equally fast ways, that with the least recomputing, then swapping.
        """
        points = self.interval(start, stop).points
        fits = self._bytes(points, start, stop, fit)[0] + static <= fit.limits[0]
        if not fits.any():
            return None
        times = np.where(fits, self._times(points, start, stop, fit)[0], np.inf)
        row = int(np.lexsort((points[:, _HELD], points[:, _SWAPPED], points[:, _TIME], times))[0])
        return self._policies(start, stop, row)

    def _policies(self, start: int, stop: int, row: int) -> tuple[Policy, ...]:
        chosen = []
        for end in range(stop, start, -1):
            frontier = self.interval(start, end)
            chosen.append(self.policies[frontier.choices[row]])
            row = int(frontier.parents[row])
        return tuple(reversed(chosen))

    def _bytes(self, points: Array, start: int, stop: int, fit: StageFit) -> Array:
        passing = self.chain.passing[start]
        weight_held = self.chain.weight_held[start, stop]
        peaks = (
            fit.full[:, :, None] * (points[:, _HELD] + passing)
            + fit.copies[:, :, None] * points[:, _SWAPPED]
            + (fit.halves * weight_held)[:, :, None]
        )
        return np.asarray(peaks.max(axis=1) + points[:, _TRANSIENT])

    def _times(self, points: Array, start: int, stop: int, fit: StageFit) -> Array:
        chain = self.chain
        compute = (chain.compute_ms[start, stop] + points[:, _TIME]) / fit.speeds[:, None] + chain.dispatch_ms
        host = host_ms(chain.host, 1.0) * points[:, _SWAPPED]
        return np.asarray(np.maximum(np.maximum(compute, host), chain.transfer_ms[start, stop]))

    def _options_of(self, block: BlockProfile) -> Array:
        rows = {
            Policy.KEEP: (0.0, 0, block.activation_bytes),
            Policy.RECOMPUTE: (block.recompute_ms, 0, block.input_bytes),
            Policy.SWAP: (0.0, block.activation_bytes, 0),
        }
        return np.array([(*rows[policy], transient_bytes(block, policy)) for policy in self.policies], dtype=float)

    def _extend(self, before: Frontier | None, options: Array) -> Frontier:
        old = np.zeros((1, 4)) if before is None else before.points
        grown = old[None, :, :] + options[:, None, :]
        grown[:, :, _TRANSIENT] = np.maximum(old[None, :, _TRANSIENT], options[:, None, _TRANSIENT])
        candidates = grown.reshape(-1, 4)
        kept = _undominated(candidates)
        is_exact = before is None or before.is_exact
        if len(kept) > self._max_points:
            kept, is_exact = _thin(candidates, kept, self._max_points), False
        choices, parents = np.divmod(kept, len(old))
        return Frontier(candidates[kept], choices.astype(np.int8), parents.astype(np.int32), is_exact)


def _undominated(points: Array) -> NDArray[np.intp]:
    """Return the rows that no other row is at most equal to in every column, in order; of equal rows, the first."""
    order = np.lexsort(points.T[::-1])
    points = points[order]
    alive = np.ones(len(points), dtype=bool)
    for row in range(len(points)):
        if alive[row]:
            # In this order only later rows can be dominated.
            later = points[row + 1 :]
            alive[row + 1 :] &= (later[:, 1:] < points[row, 1:]).any(axis=1)
    return np.asarray(order[alive])


def _thin(points: Array, rows: NDArray[np.intp], count: int) -> NDArray[np.intp]:
    """Keep `count` rows spread evenly along the time, and the extremes of every column and of the bytes together."""
    chosen = points[rows]
    totals = [*chosen.T, chosen[:, _SWAPPED] + chosen[:, _HELD], 2 * chosen[:, _SWAPPED] + chosen[:, _HELD]]
    extremes = [int(total.argmin()) for total in totals]
    spread = np.linspace(0, len(rows) - 1, count - len(extremes)).round().astype(int)
    return np.asarray(rows[np.unique(np.concatenate([extremes, spread]))])
