"""Judges what ranks have measured: memory against the allocator, copies beside the computation, time against torch's.

Why memory may differ by `_SHARE` and `_ROUNDING_BYTES`: the ledger adds up the storages that are held, as large as they
were asked for, and what an action needs for a moment as the allocator said (`vpipe.runtime.memory_watch`). So the
allocator has more by what it rounds: 512 bytes for each tensor, and up to 1 MiB where a piece of a large segment is not
worth cutting off, for some segments. Besides that it counts the batch (128 KiB here), and libraries' own memory, which
is taken off: it is there before. What an action needs is looked at in the first three of each kind only: hence a share.
Messages are in the ledger wherever they lie. Through gloo that is host memory, of which the allocator knows nothing:
so the ledger may be higher by all of `buffers`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from gpu_check.commands import ranks
from gpu_check.notes import CheckFailed, Notes

__all__ = ["ledger", "memory", "speed", "speed_nccl", "swap"]

_SHARE = 0.10
_ROUNDING_BYTES = 16 << 20
_MIB = 1 << 20
_SAME_LOSS = 1e-5

_LESS = (
    ("1f1b, recompute", "1f1b", "activations"),
    ("gpipe, swap", "gpipe", "activations"),
    ("pipedream, swap_versions", "pipedream", "versions"),
)
"""Which plan has to hold less than which, of what."""


def memory(notes: Notes) -> None:
    """Compare the ledger's peak with the allocator's, for several plans on three ranks that share a device."""
    found, error = ranks(notes, "gpu_check.memory_ranks", 3, "cuda:0" if notes.on_gpu else "cpu")
    if error:
        notes.problem(error)
    plans: dict[str, list[dict[str, Any]]] = {plan["name"]: plan["ranks"] for plan in found}
    ratios = []
    for name, rows in plans.items():
        for rank, row in enumerate(rows):
            if row["allocator"]:
                ratios.append(row | _compare(notes, f"{name}, rank {rank}", row))
                row["ratio"] = ratios[-1]["ratio"]
    notes.number(plans=plans, share=_SHARE, rounding_bytes=_ROUNDING_BYTES)
    for less, more, kind in _LESS:
        if less in plans and more in plans:
            _compare_plans(notes, plans, less, more, kind)
    if ratios:
        values = [row["ratio"] for row in ratios]
        notes.say(f"ledger / allocator {min(values):.3f} to {max(values):.3f} in {len(plans)} plans on 3 ranks")
    else:
        notes.say(f"the ledger alone, {len(plans)} plans on 3 ranks: no allocator of a CPU keeps a peak")


def _compare(notes: Notes, where: str, row: Mapping[str, Any]) -> dict[str, float]:
    ratio, problem = ledger(row)
    if problem:
        notes.problem(f"{where}: {problem}")
    return {"ratio": round(ratio, 4)}


def ledger(row: Mapping[str, Any]) -> tuple[float, str]:
    """Return the ledger's peak as a multiple of the allocator's, and what is wrong with it, if anything is.

    `row` has bytes: `ledger`, its `by_kind`, the allocator's peak, and what that had `before`.
    """
    own, buffers = row["ledger"], row["by_kind"]["buffers"]
    allocated = row["allocator"]["allocated"] - row["before"]
    ratio, room = own / allocated if allocated else float("inf"), _SHARE * allocated + _ROUNDING_BYTES
    sizes = f"the ledger has {own / _MIB:.1f} MiB in {row['action']} ({buffers / _MIB:.1f} of it buffers)"
    if own < allocated - room or own - buffers > allocated + room:
        return ratio, f"{sizes}, the allocator {allocated / _MIB:.1f} MiB"
    return ratio, ""


def _compare_plans(
    notes: Notes, plans: Mapping[str, Sequence[Mapping[str, Any]]], less: str, more: str, kind: str
) -> None:
    """Look whether rank 0 holds less by one plan than by another, by the ledger and by the allocator."""
    rows = plans[less][0], plans[more][0]
    pairs = {kind: [row["by_kind"][kind] for row in rows]}
    if rows[0]["allocator"]:
        pairs["memory by the allocator"] = [row["allocator"]["allocated"] - row["before"] for row in rows]
    for what, (smaller, larger) in pairs.items():
        if not smaller < larger:
            notes.problem(f"{less} has {smaller / _MIB:.2f} MiB {what} on rank 0, and {more} {larger / _MIB:.2f} MiB")


def swap(notes: Notes) -> None:
    """Compare one rank that swaps with one that keeps: the same losses, all copies pinned and beside the computation.

    Raises:
        CheckFailed: the rank failed.
    """
    found, error = ranks(notes, "gpu_check.swap_rank", 1, "cuda:0" if notes.on_gpu else "cpu")
    if error:
        raise CheckFailed(error)
    told = found[0]
    notes.number(**told)
    keep, moved = told["losses"]["keep"], told["losses"]["swap"]
    notes.number(same_bits=keep == moved)
    if not told["bytes_offloaded"] or told["bytes_offloaded"] != told["bytes_fetched"]:
        notes.problem(f"{told['bytes_offloaded']} bytes were moved out and {told['bytes_fetched']} back")
    if any(abs(one - other) > _SAME_LOSS * abs(one) for one, other in zip(keep, moved, strict=True)):
        notes.problem(f"losses differ: {keep[-1]} where all is kept, {moved[-1]} where blocks swap")
    ratio = told["batch_ms"]["swap"] / told["batch_ms"]["keep"]
    notes.say(f"{told['bytes_offloaded'] / _MIB:.1f} MiB moved out, a batch takes {ratio:.2f} times as long")
    if notes.on_gpu:
        _judge_copies(notes, told["profile"])
    else:
        notes.say("pinned memory and streams are a GPU's")


def _judge_copies(notes: Notes, profile: Mapping[str, Any]) -> None:
    if not profile["num_kernels"]:
        notes.say("the profiler saw nothing of the device, so neither streams nor pinned memory")
        return
    for way, moved in (("out", profile["moved_out"]), ("back", profile["moved_back"])):
        beside = profile[f"beside_{way}"]
        if beside < moved:
            notes.problem(
                f"{moved:,} bytes were moved {way}, and {beside:,} were copied from or to pinned memory on a stream "
                f"of their own; all copies: {profile['copies']}"
            )
    if not profile["hidden"]:
        notes.problem("no copy was made while the device computed")
    notes.say(f"{profile['hidden']:.0%} of the time of copies is hidden behind kernels")


def speed(notes: Notes) -> None:
    """Compare the time of a batch with that of torch's 1F1B, on two ranks that share a device."""
    _speed(notes, "cuda:0" if notes.on_gpu else "cpu", "gloo")


def speed_nccl(notes: Notes) -> None:
    """Compare the time of a batch with that of torch's 1F1B, on two devices."""
    _speed(notes, "cuda", "nccl")


def _speed(notes: Notes, device: str, backend: str) -> None:
    """Tell how many times as fast as torch's; where torch's own part fails, that is no problem of VPipe's."""
    found, error = ranks(notes, "gpu_check.throughput_ranks", 2, device, backend)
    told: dict[str, Any] = {key: value for line in found for key, value in line.items()}
    notes.number(**told)
    if error and "torch" in told.get("begun", ""):
        notes.say(f"torch's Schedule1F1B failed, so there is nothing to compare with: {error}")
        return
    if error:
        raise CheckFailed(error)
    ours, theirs = told["round_ms"]["vpipe"], told["round_ms"]["torch"]
    ratio = statistics.median(theirs) / statistics.median(ours)
    spread = [round(other / own, 3) for own, other in zip(ours, theirs, strict=True)]
    notes.number(speed_over_torch=round(ratio, 4), rounds=spread)
    notes.say(
        f"{ratio:.2f} times as fast as torch's Schedule1F1B ({min(spread):.2f} to {max(spread):.2f}); "
        f"{statistics.median(ours):.1f} and {statistics.median(theirs):.1f} ms a batch, {backend}"
    )
