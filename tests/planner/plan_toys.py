"""Profiles for tests: chains of blocks with given or random costs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vpipe.planner.profile.profile import BlockProfile, LinkProfile, Profile, SizeProfile

MIB = 1 << 20


def block(name: str = "block", forward_ms: float = 1.0, **changes: Any) -> BlockProfile:
    """Return a block whose backward takes twice its forward, with small round numbers of bytes."""
    plain = BlockProfile(
        name=name,
        forward_ms=forward_ms,
        input_grad_ms=forward_ms,
        weight_grad_ms=forward_ms,
        recompute_ms=forward_ms,
        activation_bytes=100,
        input_bytes=10,
        output_bytes=10,
        parameter_bytes=40,
    )
    return replace(plain, **changes)


def profile_of(blocks: Sequence[BlockProfile], microbatch_size: int = 1, **changes: Any) -> Profile:
    """Return a profile of one size, with links that cost nothing."""
    named = tuple(replace(item, name=f"{item.name}.{index}") for index, item in enumerate(blocks))
    last = replace(named[-1], output_bytes=0)
    return Profile("toy", {"cpu": "toy"}, (SizeProfile(microbatch_size, (*named[:-1], last)),), **changes)


def uniform_profile(num_blocks: int, **changes: Any) -> Profile:
    """Return a chain of equal blocks."""
    return profile_of([block()] * num_blocks, **changes)


def random_block(draw: random.Random) -> BlockProfile:
    """Return a block whose times and bytes are small whole numbers, so that brute force meets ties exactly."""
    activation = draw.randint(4, 40)
    return block(
        forward_ms=float(draw.randint(1, 8)),
        input_grad_ms=float(draw.randint(1, 8)),
        weight_grad_ms=float(draw.randint(0, 8)),
        recompute_ms=float(draw.randint(1, 8)),
        activation_bytes=activation,
        input_bytes=draw.randint(1, activation),
        output_bytes=draw.randint(0, 12),
        parameter_bytes=draw.randint(0, 30),
        weight_grad_bytes=draw.randint(0, activation),
        workspace_bytes=draw.randint(0, 10),
        optimizer_bytes=draw.randint(0, 30),
        buffer_bytes=draw.randint(0, 3),
        swap_ms=float(activation % 3),
        step_ms=float(activation % 5),
        version_ms=(activation % 4) / 2,
    )


def random_profile(draw: random.Random, num_blocks: int, num_ranks: int, **changes: Any) -> Profile:
    """Return a random chain on ranks of unequal speed, with a slow host link or none."""
    options: dict[str, Any] = {
        "rank_speeds": tuple(draw.choice([0.5, 1.0, 1.0, 2.0]) for _ in range(num_ranks)),
        "host": draw.choice([None, LinkProfile(0.0, 2.0), LinkProfile(0.0, 8.0)]),
        "link": draw.choice([LinkProfile(), LinkProfile(0.5, 2.0)]),
        "dispatch_ms": draw.choice([0.0, 0.25]),
        "host_share": (0.0, 0.5, 1.0)[num_blocks % 3],
    }
    return profile_of([random_block(draw) for _ in range(num_blocks)], **(options | changes))
