"""A run directory as `vpipe train` leaves it, with the timeline of a made-up executor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trace_toys import Executor

from vpipe.config import build_config, dump_config
from vpipe.config.planning.to_plan import to_plan
from vpipe.plan.plan_file import plan_to_dict
from vpipe.report.trace import write_timeline
from vpipe.schedule.action import Kind

WORK = {(stage, kind): 4.0 + stage + kind.value.count("B") * 5 for stage in range(4) for kind in Kind}


def write_run(
    directory: Path,
    schedule: str = "1f1b",
    num_ranks: int = 4,
    executor: Executor | None = None,
    plan: Mapping[str, Any] | None = None,
    **pipeline: Any,
) -> Path:
    """Write iterations 4 to 11 (from 0) of a run of 8 microbatches; 1 to 3 and the last three are not in the files."""
    config = build_config(
        {
            "pipeline": {"schedule": schedule, "num_ranks": num_ranks, "num_microbatches": 8, **pipeline},
            "plan": dict(plan or {}),
            "data": {"synthetic_data": True},
            "train": {"batch_size": 8, "iterations": 14},
        }
    )
    closed = to_plan(config).resolve(range(config.num_blocks or 0), config)
    sample = closed.build()
    whole = closed.build(1 if sample.synchronous else 14)
    executor = executor or Executor(WORK, gap=0.01, send=0.2, receive=0.3, latency=0.4, turn=0.8)
    events = [event for event in executor.run(whole, 14, 8) if 4 <= event.iteration < 12]
    content = plan_to_dict(
        closed,
        microbatch_size=1,
        stages=[{"stage": stage, "rank": sample.position_of(stage)} for stage in range(sample.num_stages)],
        cuts=[{"before_stage": stage, "forward_bytes": 1000} for stage in range(1, sample.num_stages)],
    )
    directory.mkdir(exist_ok=True)
    (directory / "config.yml").write_text(dump_config(config))
    (directory / "plan.json").write_text(json.dumps(content))
    (directory / "summary.json").write_text(json.dumps({"iteration_ms": 200.0, "bubble_fraction": 0.25}))
    write_timeline(directory / "timeline.json", events)
    return directory
