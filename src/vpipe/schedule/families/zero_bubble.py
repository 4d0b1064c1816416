"""Zero bubble: split the backward, send the input gradient on at once, and fill idle time with weight gradients.

Idea: only the input gradient (I) is waited for; the weight gradient (W) can come later. Stage s runs its warmup, then
one forward and one input gradient in turn, and its weight gradients some microbatches behind, the further the later the
stage: what early stages hold as forwards ahead, late stages hold as weight gradients behind.

- **ZB-H1**: 1F1B's warmup ``p - 1 - s``, W is s microbatches behind. No more memory than 1F1B's rank 0: p microbatches
  on every rank. Idle ``(p - 1)(F + I - W)`` per rank, a third of 1F1B's when F = I = W.
- **ZB-H2**: twice of both: warmup ``2(p - 1 - s)``, W is 2s behind. Holds 2p - 1 microbatches; idle
  ``(p - 1)(F + I - 2W)``: none from a rank's own start to its own end when F = I = W. From the first rank's start to
  the last rank's end, which a synchronous update waits for, ``(p - 1)F`` stays: the stages lie in a line. With fewer
  than 2p - 1 microbatches it goes as far beyond ZB-H1 as they allow.

Source: Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024 (figures 2 and 3).
"""

from __future__ import annotations

from vpipe.schedule.action import Action, Kind
from vpipe.schedule.families.order import RankOrder
from vpipe.schedule.placement import Placement
from vpipe.schedule.schedule import Schedule, freeze

__all__ = ["build_zb_h1", "build_zb_h2"]


def build_zb_h1(num_ranks: int, num_microbatches: int) -> Schedule:
    """Build the zero-bubble schedule that holds no more than 1F1B."""
    return _build("zb-h1", num_ranks, num_microbatches, extra=0)


def build_zb_h2(num_ranks: int, num_microbatches: int) -> Schedule:
    """Build the zero-bubble schedule that pays with memory for having no bubble inside a rank's own time."""
    extra = min(max(num_microbatches - num_ranks, 0), num_ranks - 1)
    return _build("zb-h2", num_ranks, num_microbatches, extra=extra)


def _build(name: str, num_ranks: int, num_microbatches: int, *, extra: int) -> Schedule:
    """Build both: a stage goes at most `extra` further ahead with F and behind with W than ZB-H1."""
    orders = []
    for stage in range(num_ranks):
        to_last = num_ranks - 1 - stage
        ahead, behind = to_last + min(to_last, extra), stage + min(stage, extra)
        orders.append(_order(stage, min(ahead, num_microbatches), behind, num_microbatches))
    return Schedule(name, num_microbatches, Placement(num_ranks), freeze(orders))


def _order(stage: int, ahead: int, behind: int, num_microbatches: int) -> list[Action]:
    order = RankOrder()
    for _ in range(ahead):
        order.add(stage, Kind.F)
    for microbatch in range(num_microbatches):
        if microbatch + ahead < num_microbatches:
            order.add(stage, Kind.F)
        order.add(stage, Kind.I)
        if microbatch >= behind:
            order.add(stage, Kind.W)
    for _ in range(min(behind, num_microbatches)):
        order.add(stage, Kind.W)
    return order.finish(num_microbatches)
