"""Costs that predictions are made from, measured apart from the runs that are predicted.

- What the executor and the operating system add to a sleeping device: from pairs of ranks that play ping-pong, with
  times of their own, on as many processes at once as the predicted run has, because they share the cores.
- What a slow link adds to what it is told: from one such pair.
- What real blocks cost: from each stage alone, without any pipeline, while the other stage computes on the other core.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.simulator.configurations import CONFIGURATIONS, MESSAGE_BYTES
from benchmarks.simulator.devices import StageTimes
from benchmarks.simulator.ranks import Configuration, Run, run_pipeline, run_stages_alone

from vpipe.report.measured_costs import MeasuredCosts, Overheads, measure_costs
from vpipe.runtime.comm.throttle import SlowLink
from vpipe.schedule.action import Kind
from vpipe.schedule.simulate.costs import Link

_TIMES = (StageTimes(8.5, 7.5, 6.5), StageTimes(8.5, 7.5, 12.5))
"""Of the first and the last stage. With backwards split, the last one ends a batch last, and the first waits for the
loss: that has its time too."""
_PAIRS = (1, 2, 4)
_SLOW = SlowLink(latency_ms=4.5, bandwidth_bytes_per_ms=MESSAGE_BYTES / 3.5)

Calibration = dict[str, Any]


def calibrate() -> Calibration:
    """Measure everything; return plain data for a JSON file."""
    real = next(item.real for item in CONFIGURATIONS.values() if item.real is not None)
    slow = _ping_pong("1f1b", 1, link=_SLOW)
    nominal = _SLOW.latency_ms + _SLOW.occupied_ms(MESSAGE_BYTES)
    return {
        "emulated": {str(pairs): calibrate_crowd(pairs, MESSAGE_BYTES) for pairs in _PAIRS},
        "real_messages": calibrate_crowd(1, real.message_bytes),
        "slow_link_adds_ms": _latency_ms(slow) - nominal,
    }


def _ping_pong(schedule: str, pairs: int, *, num_bytes: int = MESSAGE_BYTES, link: SlowLink | None = None) -> list[Any]:
    pair = Configuration("ping-pong", schedule, 2, 6, _TIMES, boundary_floats=num_bytes // 4, link=link)
    return [measure_costs(run.events) for run in run_pipeline(pair, pairs)]


def calibrate_crowd(pairs: int, num_bytes: int) -> dict[str, Any]:
    """Measure what is added while so many pairs of ranks run at once."""
    whole, split, asynchronous = (
        _ping_pong(schedule, pairs, num_bytes=num_bytes) for schedule in ("1f1b", "zb-h1", "pipedream")
    )
    everything = whole + split + asynchronous
    told = [costs.overheads.tell_ms for costs in split if costs.overheads.tell_ms is not None]
    shared = {
        name: statistics.fmean(getattr(costs.overheads, name) for costs in everything)
        for name in ("gap_ms", "send_ms", "receive_ms")
    }
    return {
        **shared,
        "turn_ms": statistics.fmean(costs.overheads.turn_ms for costs in whole + split),
        "tell_ms": statistics.fmean(told) if told else None,
        "turn_asynchronous_ms": statistics.fmean(costs.overheads.turn_ms for costs in asynchronous),
        "latency_ms": _latency_ms(everything),
        "added_ms": {
            kind.value: [_added(everything, stage, kind) for stage in (0, 1)]
            for kind in (Kind.F, Kind.B, Kind.I, Kind.W, Kind.STEP)
        },
        "step_asynchronous_ms": [_added(asynchronous, stage, Kind.STEP) for stage in (0, 1)],
    }


def _added(found: Iterable[MeasuredCosts], stage: int, kind: Kind) -> float:
    """Return what the work of a stage takes longer than its device sleeps: of the first stage, or of the last."""
    asked = _TIMES[stage]
    nominal = {Kind.F: asked.forward_ms, Kind.I: asked.input_grad_ms, Kind.W: asked.weight_grad_ms}
    nominal[Kind.B] = asked.input_grad_ms + asked.weight_grad_ms
    times = [costs.work_ms[stage, kind] for costs in found if (stage, kind) in costs.work_ms]
    return statistics.fmean(times) - nominal.get(kind, 0.0)


def _latency_ms(found: Sequence[MeasuredCosts]) -> float:
    return statistics.fmean(link.latency for costs in found for link in costs.links.values())


def costs_of(configuration: Configuration, calibration: Calibration) -> MeasuredCosts:
    """Put together the costs of a configuration: of real blocks by running each stage alone, now."""
    if configuration.real is not None:
        return _costs_of_blocks(configuration, calibration["real_messages"])
    pairs = next(pairs for pairs in _PAIRS if 2 * pairs >= configuration.num_ranks)
    extra = calibration["emulated"][str(pairs)]
    work = {}
    last = configuration.num_stages - 1
    per_rank = configuration.num_stages // configuration.num_ranks
    for stage, times in enumerate(configuration.stages):
        added = {Kind(kind): values[stage == last] for kind, values in extra["added_ms"].items()}
        work[stage, Kind.F] = times.forward_ms + added[Kind.F]
        work[stage, Kind.STEP] = added[Kind.STEP] / per_rank
        if not configuration.recipe.synchronous:
            work[stage, Kind.STEP] = extra["step_asynchronous_ms"][stage == last]
        if configuration.is_split:
            work[stage, Kind.I] = times.input_grad_ms + added[Kind.I]
            work[stage, Kind.W] = times.weight_grad_ms + added[Kind.W]
        else:
            work[stage, Kind.B] = times.input_grad_ms + times.weight_grad_ms + added[Kind.B]
    return MeasuredCosts(work, _overheads(configuration, extra), _links(configuration, calibration, extra))


def _overheads(configuration: Configuration, extra: dict[str, Any]) -> Overheads:
    names = {field.name for field in dataclasses.fields(Overheads)}
    given = {name: value for name, value in extra.items() if name in names}
    if not configuration.recipe.synchronous:
        given |= {"turn_ms": extra["turn_asynchronous_ms"], "tell_ms": None}
    return Overheads(**given)


def _links(
    configuration: Configuration, calibration: Calibration, extra: dict[str, Any]
) -> dict[tuple[int, int], Link]:
    link = Link(max(0.0, extra["latency_ms"]))
    if (slow := configuration.link) is not None:
        latency = max(0.0, slow.latency_ms + calibration["slow_link_adds_ms"])
        link = Link(latency, slow.bandwidth_bytes_per_ms or float("inf"))
    neighbours = range(configuration.num_ranks - 1)
    there = {(rank, rank + 1): link for rank in neighbours}
    back = {(rank + 1, rank): link for rank in neighbours}
    # A loop of stages goes from the last rank to the first again.
    around = dict.fromkeys([(configuration.num_ranks - 1, 0), (0, configuration.num_ranks - 1)], link)
    return {**there, **back, **(around if configuration.num_ranks > 1 else {})}


def _costs_of_blocks(configuration: Configuration, extra: dict[str, Any]) -> MeasuredCosts:
    alone: list[Run] = run_stages_alone(configuration)
    work = {}
    for stage, run in enumerate(alone):
        for (_, kind), time in measure_costs(run.events).work_ms.items():
            work[stage, kind] = time
    return MeasuredCosts(
        work,
        _overheads(configuration, extra),
        {(0, 1): Link(max(0.0, extra["latency_ms"])), (1, 0): Link(max(0.0, extra["latency_ms"]))},
    )
