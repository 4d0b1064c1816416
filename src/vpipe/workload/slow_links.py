"""The slow links that a run's configuration asks for, on a pipeline."""

from __future__ import annotations

from vpipe.config import LaunchConfig
from vpipe.runtime.comm.throttle import SlowLink, emulate_slow_links
from vpipe.runtime.pipeline import Pipeline

__all__ = ["slow_down"]

_BYTES_PER_MS = 1e6 / 1e3
"""In one megabyte per second."""


def slow_down(pipeline: Pipeline, launch: LaunchConfig) -> None:
    """Make the pipeline's links as slow as the configuration says, before it trains.

    Raises:
        ConfigError: they cannot be held back, as with nccl.
    """
    if launch.link_latency_ms or launch.link_bandwidth_mb_per_s:
        bandwidth = launch.link_bandwidth_mb_per_s
        link = SlowLink(launch.link_latency_ms, None if bandwidth is None else bandwidth * _BYTES_PER_MS)
        emulate_slow_links(pipeline.transport, link)
