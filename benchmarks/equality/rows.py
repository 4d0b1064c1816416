"""The rows of the sweep: which model runs in which schedule on how many ranks, and with which options.

Every model meets every schedule; the other options are drawn, for each row by its name, so that a model or a schedule
more leaves the rows of others as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

from benchmarks.equality.loop import Delays
from benchmarks.equality.models import MODELS
from benchmarks.equality.options import MEMORIES, OPTIMIZERS, UPDATES, policies_of

from vpipe.errors import VPipeError
from vpipe.plan.plan import Plan
from vpipe.schedule.action import Kind
from vpipe.schedule.registry import SCHEDULES

__all__ = ["FLOATS", "MOVING", "RANKS", "Row", "all_rows"]

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "naive": ("naive", {}),
    "gpipe": ("gpipe", {}),
    "1f1b": ("1f1b", {}),
    "1f1b, eager": ("1f1b", {"depths": "eager"}),
    "interleaved": ("interleaved", {}),
    "looped-bfs": ("looped-bfs", {}),
    "zb-h1": ("zb-h1", {}),
    "zb-h2": ("zb-h2", {}),
    "zb-v": ("zb-v", {}),
    "v-half": ("v-half", {}),
    "v-min": ("v-min", {}),
    "dualpipe-v": ("dualpipe-v", {}),
    "searched": ("searched", {}),
    "pipedream": ("pipedream", {}),
    "pipedream, deep": ("pipedream", {"depths": "eager"}),
    "pipedream, vertical": ("pipedream", {"vertical_sync": True}),
    "pipedream, macrobatch": ("pipedream", {"macrobatch": True}),
    "pipedream-2bw": ("pipedream-2bw", {}),
}
FLOATS = {"input", "source"}
RANKS = (1, 2, 3, 4)
MOVING = ("swap", "all three", "versions")
NO_NUMBERS = ("sparse", "sparse bag", "tied", "words that do not count", "classes that weigh", "two parts")
"""Models whose batches have no number that could be NaN."""
STILL = {"function transforms": (0, 1, 3, 4, 6), "frozen": (0, 1, 2, 5)}
"""Blocks that have nothing to move: the first reads the batch, of a function transform nothing saved is seen, and what
is frozen has one version."""
BY_ROWS = ("sparse", "sparse bag")


@dataclass(frozen=True)
class Row:
    """One training run, in a pipeline and in the plain loop."""

    model: str
    family: str
    num_ranks: int
    num_microbatches: int
    rows: int
    """Samples of a microbatch."""
    cut: tuple[int, ...]
    memory: str
    update: str
    optimizer: str
    shared_memory: bool
    evaluated: int | None
    """Samples of an evaluation's microbatches; None: as in training."""
    stages_per_rank: int | None = None

    @classmethod
    def read(cls, said: Mapping[str, Any]) -> Row:
        """Make a row of its fields as JSON has them."""
        return cls(**{**said, "cut": tuple(said["cut"])})

    @property
    def name(self) -> str:
        """Name the row."""
        sizes = f"p{self.num_ranks} m{self.num_microbatches}x{self.rows} cut {'-'.join(map(str, self.cut))}"
        ways = "" if self.shared_memory else " | sockets"
        return f"{self.model} | {self.family} | {sizes} | {self.memory} | {self.update} | {self.optimizer}{ways}"

    @property
    def schedule(self) -> str:
        """Return the schedule's name."""
        return FAMILIES[self.family][0]

    @property
    def is_synchronous(self) -> bool:
        """Tell whether all stages update together."""
        return SCHEDULES[self.schedule].synchronous

    def plan(self) -> Plan:
        """Return what runs where."""
        return _plan(self.family, self.num_ranks, self.num_microbatches, self.stages_per_rank, self.cut, self.memory)

    def delays(self) -> Delays | None:
        """Return what an asynchronous schedule delays, from its definition."""
        if self.is_synchronous:
            return None
        given = FAMILIES[self.family][1]
        depths = (
            _depths(self.num_ranks) if "depths" in given else [self.num_ranks - 1 - s for s in range(self.num_ranks)]
        )
        size = {"pipedream, macrobatch": self.num_microbatches, "pipedream-2bw": self.num_ranks}.get(self.family, 1)
        two_versions = size > 1 or self.family == "pipedream-2bw"
        return Delays(self.cut, depths, size, vertical="vertical_sync" in given, two_versions=two_versions)


def _depths(num_ranks: int) -> list[int]:
    """Return warmups deeper than the least."""
    return [2 * (num_ranks - 1 - stage) + 1 for stage in range(num_ranks)]


@cache
def _plan(
    family: str, num_ranks: int, num_microbatches: int, per_rank: int | None, cut: tuple[int, ...], memory: str
) -> Plan:
    name, given = FAMILIES[family]
    options = dict(given)
    if "depths" in options:
        options["depths"] = _depths(num_ranks)
    num_stages = len(cut)
    if memory == "recompute ahead":
        options["recompute_ahead"] = range(num_stages)
    if memory == "versions":
        options["swap_versions"] = True
    if memory == "recompute but the last":
        options["recompute"] = "except_last"
    return Plan(
        name,
        num_ranks=num_ranks,
        num_microbatches=num_microbatches,
        stages_per_rank=per_rank,
        partition=cut,
        policies=policies_of(memory, sum(cut)),
        **options,
    )


@cache
def _moves(plan: Plan) -> dict[Kind, frozenset[int]]:
    """Return the stages whose activations move, and those whose weight versions do."""
    # Of one batch: given few, an asynchronous pipeline has fewer microbatches under way than in its steady state.
    actions = [action for order in plan.build().orders for action in order]
    kinds = (Kind.OFFLOAD, Kind.OFFLOAD_V)
    return {kind: frozenset(action.stage for action in actions if action.kind is kind) for kind in kinds}


def _is_legal(plan: Plan, family: str, memory: str, still: Collection[int]) -> bool:
    """Tell whether a schedule has these sizes, and moves what it is to move; blocks that are `still` have nothing."""
    num_ranks, num_microbatches = plan.sizes
    if family == "pipedream-2bw" and num_microbatches % num_ranks:
        return False
    try:
        stages = _moves(plan)
    except VPipeError:
        return False
    if memory not in MOVING:
        return True
    policies, versions = plan.block_policies, memory == "versions"
    moving = {block for block, policy in enumerate(policies) if versions or policy == "swap"}.difference(still)
    held = stages[Kind.OFFLOAD_V if versions else Kind.OFFLOAD]
    return any(moving.intersection(range(*plan.cut.ranges[stage])) for stage in held)


def _cuts(num_blocks: int, num_stages: int) -> list[tuple[int, ...]]:
    """Return an even cut, one that is heavy in front and one that is heavy behind."""
    size, rest = divmod(num_blocks, num_stages)
    spare = num_blocks - num_stages
    even = tuple(size + (stage < rest) for stage in range(num_stages))
    return list(
        dict.fromkeys([even, (1 + spare, *(1,) * (num_stages - 1)), (*(1,) * (num_stages - 1), 1 + spare), even[::-1]])
    )


def _sizes(num_ranks: int) -> list[int]:
    """Return numbers of microbatches: usual ones, odd ones, one alone, and fewer than ranks."""
    return list(dict.fromkeys([2 * num_ranks, 3, 1, num_ranks + 1, max(num_ranks - 1, 1), 6, 2 * num_ranks + 1, 4]))


def all_rows(ranks: Sequence[int] = RANKS) -> list[Row]:
    """Return every row of these numbers of ranks."""
    return list(_rows(ranks))


def _rows(numbers: Sequence[int]) -> Iterator[Row]:
    blocks = {name: len(model.task().blocks) for name, model in MODELS.items()}
    for ranks in numbers:
        for place, (family, (name, _)) in enumerate(FAMILIES.items()):
            per_rank = SCHEDULES[name].default_stages_per_rank
            for number, model in enumerate(MODELS):
                if not _is_wanted(ranks, place + number):
                    continue
                stages = per_rank * ranks
                if stages > blocks[model]:
                    continue
                if (row := _choose(model, family, ranks, blocks[model], stages)) is not None:
                    yield row


def _is_wanted(ranks: int, turn: int) -> bool:
    """Choose those to run: each model meets every schedule, and all sizes of pipelines most of them."""
    return {1: turn % 3 != 0, 2: turn % 5 < 3, 3: turn % 3 == 0, 4: turn % 3 == 1}[ranks]


def _choose(model: str, family: str, ranks: int, num_blocks: int, stages: int) -> Row | None:
    """Return the row with options drawn by its name: the first that go together."""
    draw = Random(f"{model} {family} {ranks}")
    optimizers = ["sgd", "several"] if model in BY_ROWS else list(OPTIMIZERS)
    updates = [name for name, item in UPDATES.items() if not (item.has_nan and model in NO_NUMBERS)]
    cut, still = draw.choice(_cuts(num_blocks, stages)), STILL.get(model, (0,))
    for memory in draw.sample(MEMORIES, len(MEMORIES)):
        for size in draw.sample(_sizes(ranks), len(_sizes(ranks))):
            if not _is_legal(_plan(family, ranks, size, stages // ranks, cut, memory), family, memory, still):
                continue
            return Row(
                model,
                family,
                ranks,
                size,
                draw.choice((2, 3) if memory in ("swap", "all three") else (1, 2, 3)),
                cut,
                memory,
                draw.choice(updates),
                draw.choice(optimizers),
                draw.random() < 0.75,
                draw.choice((None, 2, 3)),
                stages // ranks,
            )
    return None
