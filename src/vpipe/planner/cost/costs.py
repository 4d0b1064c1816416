"""What any stage of a chain costs: sums over blocks for all intervals at once, and the simulator's costs of a cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vpipe.errors import PlanError
from vpipe.plan.partition import Partition
from vpipe.plan.policy import Policy
from vpipe.planner.cost.loads import Moment, StageLoad
from vpipe.planner.cost.memory import Transient, each_bytes, transient_of, weight_workspace
from vpipe.planner.profile.profile import BlockProfile, LinkProfile, Profile
from vpipe.schedule.placement import Placement
from vpipe.schedule.simulate.costs import Costs, Link

__all__ = ["Array", "ChainCosts", "simulator_costs", "speeds_of"]

Array = NDArray[np.float64]


class Transients(NamedTuple):
    """`Transient` of every interval."""

    usually: Array
    first: Array

    def at(self, moment: Moment) -> Array:
        """Return what a moment needs; weight halves and updates need other things."""
        if moment.is_weights or moment.is_step:
            return np.zeros_like(self.usually)
        return self.usually if moment.gradients else self.first


class ChainCosts:
    """Costs of blocks i to j - 1 as a stage, at [i, j] of a matrix; infinite where j <= i.

    Times are for a rank of speed 1.
    """

    def __init__(self, profile: Profile, blocks: Sequence[BlockProfile], *, split_backward: bool) -> None:
        self.blocks = tuple(blocks)
        self.host = profile.host
        self.host_share = profile.host_share
        self._link = profile.link
        self.is_split = split_backward
        self.dispatch_each_ms = profile.dispatch_ms
        self.dispatch_ms = profile.dispatch_ms * (3 if split_backward else 2)

    def __len__(self) -> int:
        return len(self.blocks)

    def sums(self, name: str) -> Array:
        """Return prefix sums of a figure: entry i is that of the first i blocks."""
        return np.array([0.0, *accumulate(float(getattr(block, name)) for block in self.blocks)])

    def between(self, name: str) -> Array:
        """Return a figure's sum over every interval."""
        sums = self.sums(name)
        return np.asarray(sums[None, :] - sums[:, None])

    @cached_property
    def is_stage(self) -> NDArray[np.bool_]:
        """Tell the intervals that have a block."""
        return np.triu(np.ones((len(self) + 1, len(self) + 1), dtype=bool), 1)

    @cached_property
    def compute_ms(self) -> Array:
        """Forward and backward of one microbatch, all activations kept."""
        return self.between("forward_ms") + self.between("input_grad_ms") + self.between("weight_grad_ms")

    @cached_property
    def arriving(self) -> Array:
        """Bytes that arrive at a stage that starts at i; the same are its messages backwards."""
        return np.array([0.0, *(float(block.output_bytes) for block in self.blocks[:-1]), 0.0])

    @cached_property
    def transfer_ms(self) -> Array:
        """Time that the busiest link of the stage carries one microbatch."""
        rate = self._link.bytes_per_ms or math.inf
        return np.asarray(np.maximum(self.arriving[:, None], self.arriving[None, :]) / rate)

    @cached_property
    def passing(self) -> Array:
        """Bytes held for each microbatch by a stage that starts at i, of values that its first block does not read."""
        inputs = np.array([0.0, *(float(block.input_bytes) for block in self.blocks[1:]), 0.0])
        return np.asarray(np.maximum(self.arriving - inputs, 0.0))

    @cached_property
    def transient(self) -> Transients:
        """Needed for a moment when everything is kept; no policies need less."""
        rows = np.zeros((2, len(self) + 1, len(self) + 1))
        for index, block in enumerate(self.blocks):
            own = transient_of(block, Policy.KEEP, is_split=self.is_split)
            change = Transient(0, 0).after(block, Policy.KEEP, is_split=self.is_split)
            for row, most, more in zip(rows, own, change, strict=True):
                row[:index, index + 1] = np.maximum(row[:index, index] + more, most)
                row[index, index + 1] = most
        return Transients(*rows)

    @cached_property
    def step_workspace(self) -> Array:
        """Needed for a moment by an update of the weights, and the gradient that arrived last."""
        return self._most([block.step_workspace_bytes for block in self.blocks]) + self.arriving[None, :]

    @cached_property
    def weight_workspace(self) -> Array:
        """Needed for a moment by a weight half."""
        return self._most([weight_workspace(block) for block in self.blocks])

    def _most(self, sizes: Sequence[int]) -> Array:
        """Return the largest of every interval."""
        rows = np.zeros((len(self) + 1, len(self) + 1))
        for start in range(len(self)):
            rows[start, start + 1 :] = np.maximum.accumulate(np.array(sizes[start:], dtype=float))
        return rows

    @cached_property
    def parameters(self) -> Array:
        """Bytes of one set of weights."""
        return self.between("parameter_bytes")

    @cached_property
    def _once(self) -> Array:
        return self.between("optimizer_bytes") + self.between("buffer_bytes")

    @cached_property
    def activations(self) -> Array:
        """Bytes held for each microbatch when everything is kept."""
        return self.between("activation_bytes")

    @cached_property
    def weight_held(self) -> Array:
        """Bytes held for each microbatch between the halves of a split backward."""
        return self.between("weight_grad_bytes")

    def static_bytes(self, load: StageLoad) -> Array:
        """Return the bytes that are always there: weights, optimizer state, messages, of these as many as may be."""
        messages = load.most_arriving * self.arriving[:, None] + load.most_leaving * self.arriving[None, :]
        return self._once + load.num_versions * self.parameters + messages

    def moment_bytes(self, moment: Moment) -> Array:
        """Return the bytes that a moment adds, whatever the policies."""
        passing = moment.full * self.passing[:, None] + moment.waiting * self.arriving[:, None]
        needed: Array | float = 0.0
        if moment.is_weights or moment.is_step:
            needed = self.step_workspace if moment.is_step else self.weight_workspace
        halves = moment.halves * self.weight_held
        return np.asarray(moment.gradients * self.parameters + halves + passing + needed)

    def kept_bytes(self, load: StageLoad) -> Array:
        """Return the bytes at the peak when all blocks keep their activations."""
        peaks = [
            self.moment_bytes(moment)
            + moment.stale * self.arriving[:, None]
            + moment.full * self.activations
            + self.transient.at(moment)
            for moment in load.moments
        ]
        return np.asarray(self.static_bytes(load) + np.maximum.reduce(peaks))

    @cached_property
    def step_ms(self) -> Array:
        """One update of the weights."""
        return self.between("step_ms")

    @cached_property
    def version_ms(self) -> Array:
        """What an update takes on top where the weights before it are still needed."""
        return self.between("version_ms")

    def kept_ms(self, speed: float, updates: float = 0.0, *, keeps_versions: bool = False) -> Array:
        """Return the time per microbatch that the stage or its links are busy, when all activations are kept.

        `updates` come with every microbatch; where the stage `keeps_versions` each copies the weights first.
        """
        step = self.step_ms + self.version_ms if keeps_versions else self.step_ms
        compute = (self.compute_ms + updates * step) / speed + self.dispatch_ms + updates * self.dispatch_each_ms
        return np.where(self.is_stage, np.maximum(compute, self.transfer_ms), np.inf)


def speeds_of(profile: Profile, num_ranks: int) -> tuple[float, ...]:
    """Return the speed of every rank.

    Raises:
        PlanError: the profile has speeds of another number of ranks.
    """
    speeds = profile.rank_speeds or (1.0,) * num_ranks
    if len(speeds) != num_ranks:
        raise PlanError(
            f"the profile has rank_speeds of {len(speeds)} ranks, and the run has {num_ranks}; give one each"
        )
    return tuple(speeds)


def host_ms(host: LinkProfile | None, swapped_bytes: float) -> float:
    """Return how long the host link is busy with one microbatch, out and back."""
    return 2 * host.transfer_ms(swapped_bytes) if host else 0.0


def simulator_costs(
    profile: Profile,
    blocks: Sequence[BlockProfile],
    partition: Partition,
    policies: Sequence[Policy],
    placement: Placement,
    num_versions: Sequence[int] = (),
    moves: Sequence[bool] = (),
) -> Costs:
    """Return the simulator's costs, in ms and bytes, of a partition with a policy per block.

    `num_versions` is how many weight versions each stage has; empty: one. `moves` tells the stages that have enough in
    flight for activations to be moved: in others, blocks that swap keep; empty: all have.
    """
    speeds = speeds_of(profile, placement.num_ranks)
    names = ("forward", "input_grad", "weight_grad", "step", "recompute", "move", "move_versions")
    times: dict[str, list[float]] = {name: [] for name in names}
    for stage, (start, stop) in enumerate(partition.ranges):
        speed = speeds[placement.rank_of(stage)]
        inside = [(blocks[index], policies[index]) for index in range(start, stop)]
        # What is saved is noted forward and found again backward, which take about the same time. Where one block
        # swaps, it is noted of those that keep as well: what they share stays.
        noting = {"forward": 0.5, "input_grad": 0.5}
        is_moving = not moves or moves[stage]
        is_noted = is_moving and any(policy is Policy.SWAP for _, policy in inside)
        handling = is_noted * math.fsum(block.swap_ms for block, policy in inside if policy is not Policy.RECOMPUTE)
        for name in ("forward", "input_grad", "weight_grad", "step"):
            own = math.fsum(getattr(block, f"{name}_ms") for block, _ in inside)
            times[name].append((own + noting.get(name, 0.0) * handling) / speed)
        if num_versions and num_versions[stage] > 1:
            times["step"][-1] += math.fsum(block.version_ms for block, _ in inside) / speed
        again = math.fsum(block.recompute_ms for block, policy in inside if policy is Policy.RECOMPUTE)
        times["recompute"].append(again / speed)
        swapped = is_moving * sum(each_bytes(block, policy)[1] for block, policy in inside)
        times["move"].append(host_ms(profile.host, swapped) / 2)
        weights = sum(block.parameter_bytes for block, _ in inside)
        times["move_versions"].append(host_ms(profile.host, weights) / 2)
    return Costs(
        forward=tuple(times["forward"]),
        input_grad=tuple(times["input_grad"]),
        weight_grad=tuple(times["weight_grad"]),
        step=tuple(times["step"]),
        recompute=tuple(times["recompute"]),
        move=tuple(times["move"]),
        move_versions=tuple(times["move_versions"]),
        latency=profile.link.latency_ms,
        bandwidth=profile.link.bytes_per_ms or math.inf,
        message_bytes=tuple(float(blocks[stop - 1].output_bytes) for _, stop in partition.ranges),
        move_share=profile.host_share,
        dispatch=profile.dispatch_ms,
        links={
            (pair.sender, pair.receiver): Link(pair.link.latency_ms, pair.link.bytes_per_ms or math.inf)
            for pair in profile.links
        },
    )
