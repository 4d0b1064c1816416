"""Is the answer that of one process: `vpipe verify`, on one device and on two."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from gpu_check.child import attempt
from gpu_check.commands import CONFIG, backend_of, last_error, latest_run, vpipe
from gpu_check.demo import small
from gpu_check.notes import CheckFailed, Notes

__all__ = ["machines", "nccl", "pipedream", "recomputing", "swapping", "synchronous", "versions", "zero_bubble"]

_NUM_BLOCKS = 9

_TOLD = """
model: {type: custom, entry: 'gpu_check.told:chain'}
data: {type: custom, entry: 'gpu_check.told:data'}
pipeline: {schedule: 1f1b, num_ranks: 2, num_microbatches: 4}
train: {batch_size: 16, iterations: 2}
launch: {threads_per_rank: 1}
"""


def synchronous(notes: Notes) -> None:
    """Verify 1F1B with dropout and clipping."""
    _verify(notes, small(notes, 2), backend="gloo")


def recomputing(notes: Notes) -> None:
    """Verify 1F1B where every second block recomputes."""
    policies = ["recompute", "keep"] * _NUM_BLOCKS
    _verify(notes, small(notes, 2) | {"plan.policies": policies[:_NUM_BLOCKS]}, backend="gloo")


def swapping(notes: Notes) -> None:
    """Verify 1F1B where blocks swap, on three ranks: with two, none holds enough microbatches for that."""
    policies = ["swap", "swap", "keep"] * 3
    _verify(notes, small(notes, 3) | {"plan.policies": policies}, backend="gloo")


def pipedream(notes: Notes) -> None:
    """Verify PipeDream against one process with the same delays."""
    _verify(notes, small(notes, 3) | {"pipeline.schedule": "pipedream"}, backend="gloo")


def versions(notes: Notes) -> None:
    """Verify PipeDream whose waiting weight versions are in host memory."""
    moved = {"pipeline.schedule": "pipedream", "plan.swap_versions": True}
    _verify(notes, small(notes, 3) | moved, backend="gloo")


def nccl(notes: Notes) -> None:
    """Verify 1F1B and PipeDream on two devices."""
    for schedule in ("1f1b", "pipedream"):
        settings = small(notes, 2, 0, 1) | {"pipeline.schedule": schedule, "launch.distributed_backend": "nccl"}
        attempt(notes, partial(_verify, notes, settings, backend="nccl", name=schedule), schedule)


def zero_bubble(notes: Notes) -> None:
    """Verify two schedules on two devices whose ranks hold two stages: neighbours both ways, and split backwards."""
    for schedule in ("zb-v", "interleaved"):
        settings = small(notes, 2, 0, 1) | {"pipeline.schedule": schedule, "pipeline.stages_per_rank": 2}
        attempt(notes, partial(_verify, notes, settings, backend="nccl", name=schedule), schedule)


def machines(notes: Notes) -> None:
    """Verify with the devices in reverse order, and look where each rank computes.

    Raises:
        CheckFailed: it is another device than the YAML says.
    """
    order = [1, 0]
    config = notes.folder / "told.yml"
    config.write_text(_TOLD)
    places = {"launch.device": notes.device, "launch.machines": [f"localhost:{index}" for index in order]}
    _verify(notes, places, backend="nccl" if notes.on_gpu else "gloo", config=config)
    logs = sorted((latest_run(notes) / "pipeline").glob("output.log.*"))
    told = re.findall(r"rank (\d+) computes on (\S+)", "\n".join(path.read_text() for path in logs))
    found = {int(rank): device for rank, device in told}
    expected = {rank: f"cuda:{index}" if notes.on_gpu else "cpu" for rank, index in enumerate(order)}
    notes.number(devices=found)
    notes.say(", ".join(f"rank {rank} on {device}" for rank, device in sorted(found.items())))
    if found != expected:
        raise CheckFailed(f"ranks compute on {found}, not on {expected}")


def _verify(
    notes: Notes, settings: Mapping[str, object], *, backend: str, name: str = "verify", config: Path = CONFIG
) -> None:
    """Run `vpipe verify`.

    Raises:
        CheckFailed: not equal, bit for bit; or the ranks talk through something else than `backend`.
    """
    done = vpipe(notes, "verify", settings, "--iterations", "2", "--format", "json", config=config, codes=(0, 1))
    if not done.out.strip():
        raise CheckFailed(f"vpipe verify failed: {last_error(done.err)}")
    report = json.loads(done.out)
    used = backend_of(latest_run(notes))
    notes.number(**{name: {"equal": report["equal"], "backend": used, "comparisons": report["comparisons"]}})
    compared = sum(item["num_tensors"] for item in report["comparisons"].values())
    if not report["equal"]:
        raise CheckFailed(_difference(report["comparisons"]))
    notes.say(f"{report['schedule']} on {report['num_ranks']} ranks: {compared} tensors equal, bit for bit, {used}")
    if used != backend:
        raise CheckFailed(f"ranks talk through {used}, not {backend}")


def _difference(comparisons: Mapping[str, Mapping[str, object]]) -> str:
    """Say how many tensors differ, and by how much at most: rounding, or something else."""
    parts = [
        f"{item['num_different']} of {item['num_tensors']} of {name} by up to {item['max_abs_difference']}"
        for name, item in comparisons.items()
        if item["num_different"]
    ]
    return f"not equal to one process: {', '.join(parts)}"
