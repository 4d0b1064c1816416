"""A profile as text: a row for every kind of block, then what lies between ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vpipe.planner.profile.profile import BlockProfile, LinkProfile, Profile, SizeProfile
from vpipe.words.table import format_table
from vpipe.words.units import format_bytes

__all__ = ["profile_lines"]

_TIMES = {
    "forward_ms": "forward",
    "input_grad_ms": "input grad",
    "weight_grad_ms": "weight grad",
    "recompute_ms": "recompute",
    "swap_ms": "swap",
    "step_ms": "step",
    "version_ms": "version",
}
_SIZES = {
    "activation_bytes": "kept",
    "input_bytes": "its inputs",
    "weight_grad_bytes": "for W",
    "output_bytes": "cut after it",
    "parameter_bytes": "parameters",
}


def profile_lines(profile: Profile) -> list[str]:
    """Describe a profile: of blocks that were measured once, one row."""
    lines = [line for size in profile.sizes for line in (*_size_lines(size), "")]
    lines.append(f"Links between ranks: {_link_words(profile.link)}")
    if profile.host is not None:
        lost = f"; computing beside it loses {profile.host_share:.0%} of that time"
        lines.append(f"Host memory, for swapping: {_link_words(profile.host)}{lost}")
    lines.append(f"Each computation takes the runtime {profile.dispatch_ms:.3f} ms on top.")
    if profile.rank_speeds:
        lines.append(f"Ranks are not alike; speeds: {', '.join(f'{speed:.2f}' for speed in profile.rank_speeds)}")
    lines.append(f"Measured on: {', '.join(f'{key} {value}' for key, value in profile.machine.items())}")
    return lines


def _size_lines(size: SizeProfile) -> list[str]:
    rows = [["block", *(f"{name} ms" for name in _TIMES.values()), "spread", *_SIZES.values()]]
    for names, block in _kinds(size.blocks):
        times = [f"{getattr(block, key):.3g}" for key in _TIMES]
        sizes = [format_bytes(getattr(block, key)) for key in _SIZES]
        rows.append([names, *times, f"{block.spread:.0%}", *sizes])
    return [f"Microbatches of {size.microbatch_size} samples:", *format_table(rows, left={0})]


def _kinds(blocks: Sequence[BlockProfile]) -> list[tuple[str, BlockProfile]]:
    """Return each kind once, with the name of the first block and how many others are alike."""
    counts: dict[BlockProfile, list[str]] = {}
    for block in blocks:
        counts.setdefault(replace(block, name=""), []).append(block.name)
    return [(names[0] + f" (+{len(names) - 1})" * (len(names) > 1), kind) for kind, names in counts.items()]


def _link_words(link: LinkProfile) -> str:
    rate = "no limit seen" if link.bytes_per_ms is None else f"{link.bytes_per_ms * 1e-6:.3g} GB/s"
    return f"{link.latency_ms:.3f} ms and {rate}" if link.latency_ms else rate
