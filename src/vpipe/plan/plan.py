"""The plan of a run, as one value: which schedule, on which ranks, which blocks on which stage, and what they keep."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, Protocol, get_args

from vpipe.errors import ConfigError, PlanError
from vpipe.plan.partition import Partition
from vpipe.plan.policy import Policy, check_ratios, ratios_of, stages_with, trailing_policies
from vpipe.plan.recipe import Recipe
from vpipe.plan.values import as_numbers, as_whole_numbers
from vpipe.schedule.action import Kind

__all__ = ["Plan", "RecomputeMode"]

RecomputeMode = Literal["always", "except_last", "never"]


class _Blocks(Protocol):
    """What a plan has to know of a model."""

    def __len__(self) -> int: ...

    def trainable_sizes(self) -> list[int]: ...


class _Ranks(Protocol):
    """What a plan has to know of the processes."""

    @property
    def num_ranks(self) -> int: ...


@dataclass(frozen=True, repr=False)
class Plan(Recipe):
    """What runs where: everything that is decided about a run before it begins, and what its ranks must agree on.

    A plan may leave cuts, ranks and microbatches open: ``Plan("1f1b", num_microbatches=8)``. `resolve` closes it for a
    model and its ranks, and only a closed plan has a `fingerprint`. Plans are equal when they say the same.

    All fields of a `Recipe` are fields of a plan: the schedule, its sizes and options, and what stages do besides.

    Args:
        partition: blocks per stage, `uniform` (default) or `parameters`.
        policies: what each block does with its activations: `keep`, `recompute` or `swap`.
        recompute_ratio: instead of policies, per stage or for all, the trailing share of blocks that recompute.
        recompute: for which microbatches blocks recompute: `always`, `except_last` of a batch, `never`.

    Raises:
        ConfigError: `recompute` is none of these.
        PlanError: policies and ratios are both given.
    """

    partition: Sequence[int] | str = "uniform"
    policies: Sequence[Policy | str] | None = None
    recompute_ratio: float | Sequence[float] = 0.0
    recompute: RecomputeMode = "always"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recompute not in get_args(RecomputeMode):
            raise ConfigError(f"recompute is '{self.recompute}'; choose one of {', '.join(get_args(RecomputeMode))}")
        ratio = as_numbers("recompute_ratio", self.recompute_ratio)
        self._set("recompute_ratio", ratio)
        if not isinstance(self.partition, str):
            sizes = as_whole_numbers("partition", self.partition, "blocks per stage")
            self._set("partition", Partition(sizes))
        if self.policies is not None:
            if any(ratio) if isinstance(ratio, tuple) else ratio:
                raise PlanError(f"recompute_ratio {ratio} and policies say the same thing twice; keep one")
            self._set("policies", _read_policies(self.policies))
        if self.recompute == "never":
            self._recompute_nothing()

    def _recompute_nothing(self) -> None:
        """Say `never` as a plan whose blocks keep what they else would compute again, so that equal plans are equal."""
        self._set("recompute", "always")
        self._set("recompute_ratio", 0.0)
        if self.policies is not None:
            kept = {Policy.RECOMPUTE: Policy.KEEP}
            self._set("policies", tuple(kept.get(policy, policy) for policy in map(Policy, self.policies)))

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        *,
        partition: Sequence[int] | str = "uniform",
        policies: Sequence[Policy | str] | None = None,
        recompute_ratio: float | Sequence[float] = 0.0,
        recompute: RecomputeMode = "always",
    ) -> Plan:
        """Return the plan that runs a recipe on blocks; the arguments are the plan's own fields."""
        said = {item.name: getattr(recipe, item.name) for item in fields(Recipe)}
        return cls(**said, partition=partition, policies=policies, recompute_ratio=recompute_ratio, recompute=recompute)

    @property
    def is_closed(self) -> bool:
        """Tell whether nothing is left open."""
        known = self.num_ranks is not None and self.num_microbatches is not None
        return known and isinstance(self.partition, Partition) and self.policies is not None

    @property
    def cut(self) -> Partition:
        """Return the blocks of every stage.

        Raises:
            PlanError: they are not known yet.
        """
        if not isinstance(self.partition, Partition):
            raise PlanError(f"the plan leaves the partition open: '{self.partition}'; resolve it, or give block counts")
        return self.partition

    @property
    def block_policies(self) -> tuple[Policy, ...]:
        """Return what every block does with its activations.

        Raises:
            PlanError: that is not known yet.
        """
        if self.policies is None:
            return trailing_policies(self.cut, self._ratios(self.cut.num_stages))
        return tuple(map(Policy, self.policies))

    @property
    def ratios(self) -> tuple[float, ...]:
        """Return the share of each stage's blocks that recompute: exact where these are its last ones."""
        return ratios_of(self.cut, self.block_policies)

    @property
    def recipe(self) -> Recipe:
        """Return the order alone, without what blocks do."""
        return Recipe(**{item.name: getattr(self, item.name) for item in fields(Recipe)})

    @property
    def swapping(self) -> frozenset[int]:
        """Return the stages with blocks whose activations move to host memory."""
        if self.policies is None or Policy.SWAP not in self.policies:
            return frozenset()
        return stages_with(Policy.SWAP, self.cut, self.block_policies)

    def resolve(self, chain: _Blocks, world: _Ranks) -> Plan:
        """Close the plan: take ranks from `world`, cut `chain`, and say what every block does.

        Raises:
            PlanError: the plan is for other ranks or another model.
            ScheduleError: the schedule cannot be built for these sizes and options.
        """
        if self.num_ranks not in (None, world.num_ranks):
            raise PlanError(
                f"the plan is for {self.num_ranks} ranks and there are {world.num_ranks}; start as many, or leave "
                "num_ranks open"
            )
        count = 2 * world.num_ranks if self.num_microbatches is None else self.num_microbatches
        sized = replace(self, num_ranks=world.num_ranks, num_microbatches=count)
        # What stages do besides is checked when the closed plan is built: here its blocks are not known yet.
        placement = sized.bare().build().placement
        cut = _resolve_partition(self.partition, chain, placement.num_stages)
        policies = self.policies
        if policies is None:
            policies = trailing_policies(cut, self._ratios(cut.num_stages))
        else:
            _check_policies(policies, cut)
        closed = replace(
            sized,
            stages_per_rank=placement.num_stages // world.num_ranks,
            partition=cut,
            policies=policies,
            recompute_ratio=0.0,
        )
        # Stages that have nothing to move are not named, so plans that do the same are equal.
        return closed.with_useful_moves() if self.swap_versions else closed

    def check(self) -> None:
        """Check that the parts of a closed plan fit each other.

        Raises:
            PlanError: they do not, or the plan is open.
            ScheduleError: the schedule cannot be built for its sizes and options.
        """
        policies = self.block_policies
        Partition.checked(self.cut, self.cut.num_blocks, self.bare().build().num_stages)
        _check_policies(policies, self.cut)
        self.build()

    def fingerprint(self) -> str:
        """Hash all that ranks must agree on, as 16 hexadecimal digits.

        Raises:
            PlanError: the plan leaves something open.
        """
        if not self.is_closed:
            left = [name for name in ("num_ranks", "num_microbatches", "policies") if getattr(self, name) is None]
            left += [] if isinstance(self.partition, Partition) else ["partition"]
            raise PlanError(f"the plan leaves {', '.join(left)} open, so it has no fingerprint; resolve it first")
        said = {
            "order": self.sample.fingerprint(),
            "num_microbatches": self.num_microbatches,
            "partition": self.cut,
            "policies": [policy.value for policy in self.block_policies],
            "recompute": self.recompute,
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    def facts(self) -> dict[str, object]:
        """Return what the ranks of a closed plan must agree on, each under its own name so that it can be told."""
        order = f"{self.sample.name} with {self.num_microbatches} microbatches ({self.sample.fingerprint()})"
        return {
            "schedule": order,
            "partition": list(self.cut),
            "policies": " ".join(self.block_policies),
            "recompute": self.recompute,
            "plan": self.fingerprint(),
        }

    def warmups(self) -> list[int]:
        """Count, for every stage, its forwards ahead of the one that its first backward follows."""
        schedule = self.sample
        counts = []
        for stage in range(schedule.num_stages):
            kinds = [action.kind for action in schedule.stage_order(stage)]
            first = min(kinds.index(kind) for kind in (Kind.B, Kind.I) if kind in kinds)
            counts.append(kinds[:first].count(Kind.F) - 1)
        return counts

    def _ratios(self, num_stages: int) -> list[float]:
        """Return one recompute ratio per stage."""
        ratio = self.recompute_ratio
        ratios = list(ratio) if isinstance(ratio, Sequence) else [ratio] * num_stages
        if reasons := check_ratios(ratios, num_stages):
            raise PlanError(f"recompute_ratio {ratios} " + "; it ".join(reasons))
        return ratios

    def __repr__(self) -> str:
        """Show the schedule, and every other field that says something."""
        words = [repr(self.schedule)]
        for item in fields(self)[1:]:
            value = getattr(self, item.name)
            if value != item.default:
                words.append(f"{item.name}={_shown(value)}")
        return f"Plan({', '.join(words)})"


def _shown(value: object) -> str:
    if isinstance(value, tuple) and value and all(isinstance(item, Policy) for item in value):
        return repr([item.value for item in value])
    return repr(list(value)) if isinstance(value, tuple) else repr(value)


def _read_policies(policies: Sequence[Policy | str]) -> tuple[Policy, ...]:
    known = [policy.value for policy in Policy]
    if isinstance(policies, str) or not isinstance(policies, Sequence):
        raise PlanError(f"policies is {policies!r}; give a list with one of {', '.join(known)} per block")
    for block, policy in enumerate(policies):
        if policy not in known:
            raise PlanError(f"policies has {policy!r} for block {block}; use one of {', '.join(known)}")
    return tuple(map(Policy, policies))


def _check_policies(policies: Sequence[Policy | str], cut: Partition) -> None:
    if len(policies) != cut.num_blocks:
        raise PlanError(
            f"policies {[Policy(name).value for name in policies]} has {len(policies)} entries for {cut.num_blocks} "
            "blocks; give one per block"
        )


def _resolve_partition(partition: Sequence[int] | str, chain: _Blocks, num_stages: int) -> Partition:
    """Turn a partition given by hand, `uniform` or `parameters` into blocks per stage."""
    if partition == "uniform":
        return Partition.uniform(len(chain), num_stages)
    if partition == "parameters":
        return Partition.by_weight(chain.trainable_sizes(), num_stages)
    if isinstance(partition, str):
        raise PlanError(f"partition '{partition}' is unknown; give blocks per stage, 'uniform' or 'parameters'")
    return Partition.checked(partition, len(chain), num_stages)
