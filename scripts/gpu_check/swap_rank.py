"""One rank that swaps, beside one that does not: times, losses, and every copy as the profiler of the device saw it.

``python -m gpu_check.swap_rank cuda:0`` prints one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

import vpipe
from gpu_check.blocks import COMPUTING, TRIED, Size, compute_in_steps, cross_entropy, sgd, wait_for

__all__ = ["describe_copies"]

_NUM_WARMUP, _NUM_ROUNDS, _NUM_BATCHES = 3, 4, 3
_NUM_PROFILED = 2

Event = dict[str, Any]
Interval = tuple[float, float]


def _build(size: Size, world: vpipe.World, *, swaps: bool) -> vpipe.Pipeline:
    """Make a pipeline of one stage that holds all microbatches of a batch; of its blocks every third may swap."""
    policies = ["swap" if swaps and block % 3 == 1 else "keep" for block in range(size.num_blocks)]
    plan = vpipe.Plan("gpipe", num_microbatches=size.num_microbatches, policies=policies)
    return vpipe.Pipeline(size.build_blocks(dropout=0.1), cross_entropy, plan=plan, optimizer=sgd, world=world)


def _moved(pipeline: vpipe.Pipeline) -> tuple[int, int]:
    link = pipeline.host_link
    return (link.bytes_offloaded, link.bytes_fetched) if link else (0, 0)


def _profile(pipeline: vpipe.Pipeline, size: Size) -> dict[str, Any]:
    """Train a few batches under the profiler; return what was moved and what the device copied meanwhile."""
    before = _moved(pipeline)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(_NUM_PROFILED):
            pipeline.step(*size.build_batch())
        torch.cuda.synchronize()
    out, back = (now - then for now, then in zip(_moved(pipeline), before, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return {"moved_out": out, "moved_back": back, **describe_copies(events)}


def describe_copies(events: Iterable[Event]) -> dict[str, Any]:
    """Return, of a Chrome trace, the bytes copied out and back by stream and kind of memory, and what they hid behind.

    The stream that computes is the one whose kernels take longest. `hidden` is the share of the time of pinned copies
    on other streams during which it computes.
    """
    timed = [event for event in events if event.get("ph") == "X" and "dur" in event]
    kernels = [event for event in timed if event.get("cat") == "kernel"]
    copies = [event for event in timed if event.get("cat") == "gpu_memcpy"]
    busy: defaultdict[int, float] = defaultdict(float)
    for event in kernels:
        busy[event["args"]["stream"]] += event["dur"]
    computing = max(busy, key=lambda stream: busy[stream], default=None)
    beside = [event for event in copies if "Pinned" in event["name"] and event["args"]["stream"] != computing]
    working = _joined((event["ts"], event["ts"] + event["dur"]) for event in kernels)
    total = sum(event["dur"] for event in beside)
    hidden = sum(_overlap((event["ts"], event["ts"] + event["dur"]), working) for event in beside)
    return {
        "num_kernels": len(kernels),
        "computing_stream": computing,
        "copies": _by_name(copies),
        "beside_out": sum(event["args"].get("bytes", 0) for event in beside if "DtoH" in event["name"]),
        "beside_back": sum(event["args"].get("bytes", 0) for event in beside if "HtoD" in event["name"]),
        "beside_ms": total / 1e3,
        "hidden": hidden / total if total else 0.0,
    }


def _by_name(copies: Sequence[Event]) -> dict[str, int]:
    found: defaultdict[str, int] = defaultdict(int)
    for event in copies:
        found[f"{event['name']}, stream {event['args']['stream']}"] += event["args"].get("bytes", 0)
    return dict(found)


def _joined(intervals: Iterable[Interval]) -> list[Interval]:
    """Return intervals in order, with those that touch made one."""
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def _overlap(one: Interval, others: Sequence[Interval]) -> float:
    """Return how much of an interval lies in others, which are in order and apart."""
    total = 0.0
    for index in range(bisect_right(others, one[0], key=itemgetter(1)), len(others)):
        start, end = others[index]
        if start >= one[1]:
            break
        total += min(one[1], end) - max(one[0], start)
    return total


def main() -> None:
    """Be the rank."""
    compute_in_steps()
    with vpipe.World.join(device=sys.argv[1]) as world:
        size = COMPUTING if world.device.type == "cuda" else TRIED
        pipelines = {name: _build(size, world, swaps=name == "swap") for name in ("keep", "swap")}
        losses: dict[str, list[float]] = {name: [] for name in pipelines}
        batch_ms: dict[str, list[float]] = {name: [] for name in pipelines}
        wait = wait_for(world.device)
        for round_ in range(_NUM_ROUNDS + 1):
            for name, pipeline in pipelines.items():
                for _ in range(_NUM_BATCHES if round_ else _NUM_WARMUP):
                    start = time.perf_counter()
                    losses[name].append(pipeline.step(*size.build_batch()).loss)
                    wait()
                    if round_:
                        batch_ms[name].append((time.perf_counter() - start) * 1e3)
        out, back = _moved(pipelines["swap"])
        found: dict[str, Any] = {
            "bytes_offloaded": out,
            "bytes_fetched": back,
            "batch_ms": {name: statistics.median(values) for name, values in batch_ms.items()},
            "losses": losses,
        }
        if world.device.type == "cuda":
            found |= _pinned()
            found["profile"] = _profile(pipelines["swap"], size)
        sys.stdout.write(json.dumps(found) + "\n")
        for pipeline in pipelines.values():
            pipeline.close()


def _pinned() -> dict[str, Any]:
    """Return how much pinned memory torch has, where it tells."""
    stats: dict[str, Any] = getattr(torch.cuda, "host_memory_stats", dict)()
    return {"pinned_bytes": stats.get("allocated_bytes.current")}


if __name__ == "__main__":
    main()
