"""What is predicted and then run: emulated devices of many kinds, and blocks that compute."""

from __future__ import annotations

from typing import Any

from benchmarks.simulator.devices import StageTimes
from benchmarks.simulator.ranks import Configuration, RealModel

from vpipe.runtime.comm.throttle import SlowLink

MESSAGE_BYTES = 64 * 1024


def _equal(num_stages: int, forward: float, input_grad: float | None = None, weight_grad: float | None = None) -> Any:
    times = StageTimes(forward, input_grad or forward, weight_grad or forward)
    return (times,) * num_stages


def _scaled(*factors: float, base: tuple[float, float, float] = (10.0, 10.0, 10.0)) -> tuple[StageTimes, ...]:
    """Return stages of unequal size, each `base` times a factor."""
    return tuple(StageTimes(*(time * factor for time in base)) for factor in factors)


def _link(latency_ms: float, occupied_ms: float) -> SlowLink:
    return SlowLink(latency_ms, MESSAGE_BYTES / occupied_ms if occupied_ms else None)


_EMULATED: tuple[tuple[str, str, int, int, tuple[StageTimes, ...], dict[str, Any]], ...] = (
    ("1f1b-2", "1f1b", 2, 8, _equal(2, 10), {}),
    ("1f1b-4", "1f1b", 4, 8, _equal(4, 10), {}),
    ("1f1b-4-unequal", "1f1b", 4, 16, _scaled(0.8, 1.2, 1.0, 0.6), {}),
    ("1f1b-4-slow-last", "1f1b", 4, 8, _scaled(0.6, 0.6, 0.6, 1.5), {}),
    ("1f1b-6", "1f1b", 6, 12, _equal(6, 7, 8, 6), {}),
    ("1f1b-8", "1f1b", 8, 16, _equal(8, 5), {}),
    ("1f1b-8-unequal", "1f1b", 8, 16, _scaled(1, 0.8, 0.7, 0.9, 1.1, 0.6, 0.8, 1, base=(8, 8, 8)), {}),
    ("gpipe-2", "gpipe", 2, 6, _equal(2, 12, 8, 8), {}),
    ("gpipe-4-unequal", "gpipe", 4, 8, _scaled(1.0, 0.7, 1.3, 0.9), {}),
    ("gpipe-8", "gpipe", 8, 12, _equal(8, 6), {}),
    ("naive-3", "naive", 3, 4, _equal(3, 9), {}),
    ("interleaved-2", "interleaved", 2, 8, _equal(4, 6), {}),
    ("interleaved-4", "interleaved", 4, 8, _equal(8, 5), {}),
    ("interleaved-4-unequal", "interleaved", 4, 8, _scaled(1, 0.7, 0.8, 1.2, 0.9, 1, 0.6, 1, base=(7, 7, 7)), {}),
    ("looped-bfs-4", "looped-bfs", 4, 8, _equal(8, 6, 5, 5), {}),
    ("zb-h1-2-unequal", "zb-h1", 2, 8, _scaled(1.0, 1.3, base=(9, 10, 7)), {}),
    ("zb-h1-4", "zb-h1", 4, 8, _equal(4, 10), {}),
    ("zb-h1-4-unequal", "zb-h1", 4, 12, _scaled(1.1, 0.8, 0.9, 1.2, base=(8, 9, 7)), {}),
    ("zb-h1-8", "zb-h1", 8, 16, _equal(8, 6), {}),
    ("zb-h2-4", "zb-h2", 4, 12, _equal(4, 8), {}),
    ("zb-v-2", "zb-v", 2, 8, _equal(4, 7), {}),
    ("zb-v-4-unequal", "zb-v", 4, 8, _scaled(1, 0.7, 0.8, 1.2, 0.9, 1, 0.6, 1, base=(7, 7, 7)), {}),
    ("zb-v-8", "zb-v", 8, 16, _equal(16, 5), {}),
    ("v-half-4", "v-half", 4, 8, _equal(8, 6), {}),
    ("v-min-4", "v-min", 4, 8, _equal(8, 6), {}),
    ("dualpipe-v-4", "dualpipe-v", 4, 10, _equal(8, 5, 6, 5), {}),
    ("pipedream-4", "pipedream", 4, 8, _equal(4, 10), {}),
    ("pipedream-4-unequal", "pipedream", 4, 8, _scaled(0.7, 1.2, 0.9, 1.0), {}),
    ("pipedream-8", "pipedream", 8, 8, _equal(8, 6), {}),
    ("pipedream-4-eager", "pipedream", 4, 8, _equal(4, 8), {"depths": (6, 4, 2, 0)}),
    ("pipedream-2bw-4", "pipedream", 4, 8, _equal(4, 9), {"macrobatch": True}),
    ("slow-1f1b-2", "1f1b", 2, 8, _equal(2, 8), {"link": _link(5, 6)}),
    ("slow-1f1b-4", "1f1b", 4, 8, _equal(4, 10), {"link": _link(8, 0)}),
    ("slow-1f1b-4-eager", "1f1b", 4, 12, _equal(4, 9), {"link": _link(6, 3), "depths": (6, 4, 2, 0)}),
    ("slow-1f1b-8", "1f1b", 8, 12, _equal(8, 5), {"link": _link(2, 2)}),
    ("slow-gpipe-4-full", "gpipe", 4, 8, _equal(4, 7), {"link": _link(3, 13)}),
    ("slow-interleaved-4", "interleaved", 4, 8, _equal(8, 6), {"link": _link(3, 3)}),
    ("slow-zb-h1-4-unequal", "zb-h1", 4, 8, _scaled(1, 0.8, 1.1, 0.9), {"link": _link(5, 2)}),
    ("slow-zb-v-4", "zb-v", 4, 8, _equal(8, 6), {"link": _link(4, 3)}),
    ("slow-pipedream-4", "pipedream", 4, 8, _equal(4, 8), {"link": _link(6, 5)}),
    ("slow-pipedream-4-eager", "pipedream", 4, 8, _equal(4, 8), {"link": _link(6, 5), "depths": (6, 4, 2, 0)}),
)

_REAL: tuple[tuple[str, str, int, tuple[int, ...]], ...] = (
    ("real-1f1b", "1f1b", 8, (4, 4)),
    ("real-1f1b-unequal", "1f1b", 4, (3, 5)),
    ("real-gpipe-unequal", "gpipe", 4, (5, 3)),
    ("real-zb-h1", "zb-h1", 8, (4, 4)),
    ("real-pipedream", "pipedream", 8, (4, 4)),
    ("real-pipedream-unequal", "pipedream", 8, (5, 3)),
)

CONFIGURATIONS: dict[str, Configuration] = {
    **{
        name: Configuration(name, schedule, num_ranks, size, stages, **more)
        for name, schedule, num_ranks, size, stages, more in _EMULATED
    },
    **{
        name: Configuration(name, schedule, 2, size, real=RealModel(partition))
        for name, schedule, size, partition in _REAL
    },
}
