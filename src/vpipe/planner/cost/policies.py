"""Keep, recompute or swap: the ways of running a stage that no other way beats in both time and bytes.

A multiple-choice knapsack over the blocks of a stage. A way is described by figures that do not depend on the stage's
place in the pipeline, all better when smaller: time added by recomputing and by keeping track of what is swapped, bytes
swapped and bytes held for each microbatch, bytes of messages whose content is moved, and bytes needed for a moment,
usually and in the first backward. Block after block is added, and what another way beats in all of them is dropped. So
one computation serves every stage, schedule and limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from vpipe.plan.policy import Policy
from vpipe.planner.cost.costs import Array, ChainCosts, host_ms
from vpipe.planner.cost.loads import Moment, StageLoad
from vpipe.planner.cost.memory import Transient, each_bytes, transient_of
from vpipe.planner.profile.profile import BlockProfile

__all__ = ["Frontier", "Frontiers", "StageFit"]

_EXACT_BLOCKS = 12
_MANY = 1 << 20
_FEW = 256
_TIME, _SWAPPED, _HELD, _MOVED, _USUALLY, _FIRST = range(6)
_TRANSIENT = slice(_USUALLY, _FIRST + 1)


@dataclass(frozen=True)
class Frontier:
    """The undominated ways to run one interval.

    `points` has a row for each: ms added, swapped, held, messages moved, needed for a moment (usually, first).
    """

    points: Array
    choices: NDArray[np.int8]
    """Of the last block: an index into the policies."""
    parents: NDArray[np.int32]
    """The row of the interval without the last block that each row extends."""
    is_exact: bool
    """False when ways were left out, so that the best one may be missing."""
    alike: NDArray[np.intp]
    """For each policy, a row that needs no more of anything than when every block has this policy."""


@dataclass(frozen=True)
class StageFit:
    """Stages that one question is about: arrays with a row per stage, and a column per moment that may be its peak."""

    full: Array
    copies: Array
    halves: Array
    gradients: Array
    stale: Array
    waiting: Array
    is_weights: NDArray[np.bool_]
    is_step: NDArray[np.bool_]
    speeds: Array
    limits: Array
    updates: Array
    """Updates that come with every microbatch."""
    version_copies: Array
    """Those of them that copy the weights first."""

    @classmethod
    def of(
        cls, loads: Sequence[StageLoad], speeds: Sequence[float], limits: Sequence[float], updates: float = 0.0
    ) -> StageFit:
        """Lay out the stages; a stage with fewer moments than another repeats its last."""
        width = max(len(load.moments) for load in loads)
        rows = [[*load.moments, *[load.moments[-1]] * (width - len(load.moments))] for load in loads]

        def column(figure: Callable[[Moment], int]) -> Array:
            return np.array([[figure(moment) for moment in row] for row in rows], dtype=float)

        return cls(
            full=column(lambda moment: moment.full),
            copies=column(lambda moment: moment.copies),
            halves=column(lambda moment: moment.halves),
            gradients=column(lambda moment: moment.gradients),
            stale=column(lambda moment: moment.stale),
            waiting=column(lambda moment: moment.waiting),
            is_weights=column(lambda moment: moment.is_weights).astype(bool),
            is_step=column(lambda moment: moment.is_step).astype(bool),
            speeds=np.array(speeds, dtype=float),
            limits=np.array(limits, dtype=float),
            updates=np.full(len(loads), updates),
            version_copies=np.array([updates * load.keeps_versions for load in loads], dtype=float),
        )

    def select(self, stages: NDArray[np.intp]) -> StageFit:
        """Return some of the stages."""
        return StageFit(*(getattr(self, item.name)[stages] for item in fields(self)))


class Frontiers:
    """Frontiers of all intervals of a chain, computed when first asked for."""

    def __init__(self, chain: ChainCosts, policies: Sequence[Policy], max_points: int | None = None) -> None:
        self.chain = chain
        self.policies = tuple(policy for policy in policies if policy is not Policy.SWAP or chain.host is not None)
        self._max_points = max_points or (_MANY if self.is_short else _FEW)
        self._rows: dict[int, list[Frontier]] = {}
        self._options = [self._options_of(block) for block in chain.blocks]

    @property
    def is_short(self) -> bool:
        """Tell whether the chain is so short that all of its frontiers are quickly there, and exact."""
        return len(self.chain) <= _EXACT_BLOCKS

    @property
    def is_exact(self) -> bool:
        """Tell whether no way was left out of any frontier so far."""
        return all(row[-1].is_exact for row in self._rows.values())

    def interval(self, start: int, stop: int) -> Frontier:
        """Return the frontier of blocks `start` to `stop - 1`."""
        row = self._rows.setdefault(start, [])
        while len(row) < stop - start:
            row.append(self._extend(row[-1], start + len(row)) if row else self._begin(start))
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
        return self.policies_of(start, stop, row)

    def ways(self, start: int, stop: int, fit: StageFit, computes: NDArray[np.bool_]) -> tuple[Array, Array, Array]:
        """Return what one stage takes in every way of its frontier, whatever the limit.

        `computes` tells at which moments of `fit` it is this stage that runs.

        Returns:
            Time that it computes, time on the host link, and bytes at every moment: a row each.
        """
        points = self.interval(start, stop).points
        held, transient = self._moments(points, start, stop, fit)
        busy, host = self._busy(points, start, stop, fit)
        return busy[0], host, held[0] + computes[:, None] * transient[0] + points[:, _MOVED]

    def policies_of(self, start: int, stop: int, row: int) -> tuple[Policy, ...]:
        """Return the policies of one way of a frontier."""
        chosen = []
        for end in range(stop, start, -1):
            frontier = self.interval(start, end)
            chosen.append(self.policies[frontier.choices[row]])
            row = int(frontier.parents[row])
        return tuple(reversed(chosen))

    def _bytes(self, points: Array, start: int, stop: int, fit: StageFit) -> Array:
        held, transient = self._moments(points, start, stop, fit)
        return np.asarray((held + transient).max(axis=1) + points[:, _MOVED])

    def _moments(self, points: Array, start: int, stop: int, fit: StageFit) -> tuple[Array, Array]:
        """Return what every stage holds at its moments, and what it needs there if it computes."""
        chain = self.chain
        given = (
            fit.full * chain.passing[start]
            + fit.waiting * chain.arriving[start]
            + fit.halves * chain.weight_held[start, stop]
            + fit.gradients * chain.parameters[start, stop]
            + fit.is_weights * chain.weight_workspace[start, stop]
            + fit.is_step * chain.step_workspace[start, stop]
        )
        chosen = (
            fit.full[:, :, None] * points[:, _HELD]
            + fit.copies[:, :, None] * points[:, _SWAPPED]
            + fit.stale[:, :, None] * (chain.arriving[start] - points[:, _MOVED])
        )
        transient = np.where(fit.gradients[:, :, None] > 0, points[:, _USUALLY], points[:, _FIRST])
        return given[:, :, None] + chosen, np.where((fit.is_weights | fit.is_step)[:, :, None], 0.0, transient)

    def _times(self, points: Array, start: int, stop: int, fit: StageFit) -> Array:
        busy, host = self._busy(points, start, stop, fit)
        return np.asarray(np.maximum(np.maximum(busy, host), self.chain.transfer_ms[start, stop]))

    def _busy(self, points: Array, start: int, stop: int, fit: StageFit) -> tuple[Array, Array]:
        """Return how long every stage computes, and its host link copies."""
        chain = self.chain
        step = fit.updates * chain.step_ms[start, stop] + fit.version_copies * chain.version_ms[start, stop]
        given = (chain.compute_ms[start, stop] + step) / fit.speeds + chain.dispatch_ms
        given += fit.updates * chain.dispatch_each_ms
        compute = given[:, None] + points[:, _TIME] / fit.speeds[:, None]
        host = host_ms(chain.host, 1.0) * points[:, _SWAPPED]
        return np.asarray(compute + chain.host_share * host), host

    def _options_of(self, block: BlockProfile) -> Array:
        rows = []
        for policy in self.policies:
            each, swapped = each_bytes(block, policy)
            more = {Policy.RECOMPUTE: block.recompute_ms, Policy.SWAP: block.swap_ms}.get(policy, 0.0)
            rows.append((more, swapped, each, 0, *transient_of(block, policy, is_split=self.chain.is_split)))
        return np.array(rows, dtype=float)

    def _begin(self, start: int) -> Frontier:
        """Return the frontier of block `start` alone; when it swaps, the message that brought its input is free."""
        options = self._options[start].copy()
        if Policy.SWAP in self.policies:
            options[self.policies.index(Policy.SWAP), _MOVED] = self.chain.arriving[start]
        return self._frontier(options, 1, np.arange(len(options)), is_exact=True)

    def _extend(self, before: Frontier, index: int) -> Frontier:
        """Return the frontier with block `index` added, whose backward comes before that of all others."""
        old, options = before.points, self._options[index]
        grown = old[None, :, :] + options[:, None, :]
        nothing, block, is_split = Transient(0, 0), self.chain.blocks[index], self.chain.is_split
        change = np.array([nothing.after(block, policy, is_split=is_split) for policy in self.policies], dtype=float)
        left = old[None, :, _TRANSIENT] + change[:, None, :]
        grown[:, :, _TRANSIENT] = np.maximum(left, options[:, None, _TRANSIENT])
        alike = np.arange(len(options)) * len(old) + before.alike
        return self._frontier(grown.reshape(-1, grown.shape[-1]), len(old), alike, is_exact=before.is_exact)

    def _frontier(self, candidates: Array, num_before: int, alike: NDArray[np.intp], *, is_exact: bool) -> Frontier:
        kept = _undominated(candidates)
        # What every other way is compared with: the same for all blocks, or what needs no more than that.
        alike = np.array([kept[(candidates[kept] <= candidates[row]).all(axis=1).argmax()] for row in alike])
        if len(kept) > self._max_points:
            kept, is_exact = _thin(candidates, kept, self._max_points, alike), False
        choices, parents = np.divmod(kept, num_before)
        places = np.array([int((kept == row).argmax()) for row in alike])
        return Frontier(candidates[kept], choices.astype(np.int8), parents.astype(np.int32), is_exact, places)


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


def _thin(points: Array, rows: NDArray[np.intp], count: int, needed: NDArray[np.intp]) -> NDArray[np.intp]:
    """Keep `count` rows: those `needed`, the extremes of each column and of all bytes, others evenly along the time."""
    chosen = points[rows]
    totals = [*chosen.T, chosen[:, _SWAPPED] + chosen[:, _HELD], 2 * chosen[:, _SWAPPED] + chosen[:, _HELD]]
    extremes = [int(total.argmin()) for total in totals]
    extremes += np.flatnonzero(np.isin(rows, needed)).tolist()
    spread = np.linspace(0, len(rows) - 1, count - len(extremes)).round().astype(int)
    return np.asarray(rows[np.unique(np.concatenate([extremes, spread]))])
