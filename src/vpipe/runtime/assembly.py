"""From a chain and a partition to the stages that one rank holds."""

from __future__ import annotations

import zlib
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vpipe.errors import ModelError, PlanError
from vpipe.model.chain import Chain, Crossing
from vpipe.model.copying import check_memory
from vpipe.plan.partition import Partition
from vpipe.plan.plan import Plan
from vpipe.plan.policy import Policy
from vpipe.runtime.comm.world import World
from vpipe.runtime.executor import HeldStage
from vpipe.runtime.memory.host_link import HostLink, Moved, open_host_link
from vpipe.runtime.stage.stage import Stage
from vpipe.runtime.weights.movable_versions import MovableVersions
from vpipe.runtime.weights.stage_optimizer import OptimizerFactory, refuse_coupled
from vpipe.runtime.weights.update import TiedCopy, TiedGroup
from vpipe.runtime.weights.weights import WeightVersions
from vpipe.schedule.placement import Placement

__all__ = [
    "build_stages",
    "connect",
    "crossing_specs",
    "facts_of",
    "show_loss",
    "stages_of",
    "tied_groups",
]


def crossing_specs(
    chain: Chain, partition: Partition, fields: Mapping[str, Tensor], device: torch.device, *, training: bool
) -> dict[int, Crossing]:
    """Return what crosses the cut in front of each stage but the first, for one microbatch shaped like `fields`."""
    inferred = chain.infer(partition.cuts, fields, training=training, device=device)
    return {stage: inferred[cut] for stage, cut in enumerate(partition.cuts, start=1)}


def facts_of(chain: Chain) -> dict[str, object]:
    """Return what ranks must agree on about the model, each under its own name so that it can be told."""
    with torch.device("meta"):
        modules = [(block, block.build()) for block in chain.blocks]
    switched_off = [
        block.global_name(f"{path}.").rstrip(".")
        for block, module in modules
        for path, part in module.named_modules()
        if not part.training
    ]
    frozen = [
        block.global_name(name)
        for block, module in modules
        for name, parameter in module.named_parameters()
        if not parameter.requires_grad
    ]
    return {
        "blocks": " ".join(block.name for block in chain.blocks),
        "batch fields": chain.fields,
        "whole fields": chain.whole_fields,
        "parts of the loss": chain.loss.parts,
        "metrics": chain.metric_names,
        "tied weights": chain.tied,
        "parts in evaluation mode": _listed(switched_off),
        "frozen weights": _listed(frozen),
    }


def _listed(names: Sequence[str]) -> str:
    """Return the first names, and of many a number that stands for all of them."""
    if len(names) <= 8:
        return ", ".join(names) or "none"
    return f"{', '.join(names[:8])}, ... ({len(names)}, {zlib.crc32(' '.join(names).encode()):08x})"


def build_stages(
    chain: Chain,
    plan: Plan,
    stages: Sequence[int],
    optimizer: OptimizerFactory,
    *,
    seed: int,
    device: torch.device,
    swapping: Container[int] = (),
    moving: Container[int] = (),
) -> dict[int, HeldStage]:
    """Materialise the blocks of `stages`, and nothing else.

    `swapping` names the stages that move activations, `moving` those that move weights.
    """
    _, num_microbatches = plan.sizes
    policies = plan.block_policies
    spared = num_microbatches - (plan.recompute == "except_last")
    swaps = {block for block, policy in enumerate(policies) if policy is Policy.SWAP}

    def recomputes(block: int, microbatch: int) -> bool:
        return policies[block] is Policy.RECOMPUTE and microbatch < spared

    held: dict[int, HeldStage] = {}
    for index in stages:
        start, stop = plan.cut.ranges[index]
        modules = [chain.materialise(block, seed, device) for block in range(start, stop)]
        names = _trainable_names(chain, start, modules)
        stage = Stage(chain, start, stop, recomputes, swaps if index in swapping else ())
        versions = MovableVersions if index in moving else WeightVersions
        held[index] = HeldStage(stage, versions(modules, names, optimizer))
        made = held[index].weights.optimizer
        if made is not None and plan.cut.num_stages > 1:
            refuse_coupled(made.optimizers)
    return held


def stages_of(chain: Chain, held: Mapping[int, HeldStage]) -> dict[int, HeldStage]:
    """Return stages of `chain`, which only go forward, in the place of those of a chain of the same blocks."""
    return {
        index: HeldStage(Stage(chain, item.stage.start, item.stage.stop), item.weights) for index, item in held.items()
    }


def connect(
    held: Mapping[int, HeldStage], swapping: Container[int], device: torch.device, directory: Path | None, moved: Moved
) -> HostLink | None:
    """Open the way to host memory for stages whose activations or weight versions move; None where none do."""
    movable = [item.weights for item in held.values() if isinstance(item.weights, MovableVersions)]
    if not movable and not any(stage in swapping for stage in held):
        return None
    link = open_host_link(device, directory, moved)
    for weights in movable:
        weights.link = link
    return link


def show_loss(module: nn.Module | None, last: HeldStage | None) -> None:
    """Let a loss module that the caller gave, and may look into, have the weights that the last stage has trained."""
    if module is None or last is None:
        return
    trained = last.weights.newest[-1].get_submodule("loss")
    for name, parameter in module.named_parameters():
        parameter.data = trained.get_parameter(name).data


def _trainable_names(chain: Chain, start: int, modules: Sequence[nn.Module]) -> list[str]:
    names: list[str] = []
    holders: dict[int, str] = {}
    for block, module in zip(chain.blocks[start:], modules, strict=False):
        for local, parameter in module.named_parameters():
            name = block.global_name(local)
            if id(parameter) in holders:
                raise ModelError(
                    f"'{holders[id(parameter)]}' and '{name}' are one parameter; let every call of a block's build "
                    "make a module of its own, and tie weights that are one with Chain(tied=...)"
                )
            holders[id(parameter)] = name
            if parameter.requires_grad:
                names.append(name)
    check_memory(
        (block.global_name(local), item)
        for block, module in zip(chain.blocks[start:], modules, strict=False)
        for local, item in (*module.named_parameters(), *module.named_buffers())
    )
    return names


def tied_groups(
    chain: Chain,
    partition: Partition,
    placement: Placement,
    trainable: Sequence[Mapping[str, int]],
    *,
    synchronous: bool,
    world: World,
) -> list[TiedGroup]:
    """Return the chain's tied weights that are trained, by stage and rank; collective, because groups are made.

    `trainable` names each block's trainable parameters.

    Raises:
        ModelError: only some copies of a weight are trained.
        PlanError: an asynchronous schedule cannot keep weights on different stages equal.
    """
    groups = []
    for refs in chain.tied:
        named = [(ref.block, chain.blocks[ref.block].global_name(ref.name)) for ref in refs]
        trained = [name in trainable[block] for block, name in named]
        names = " and ".join(name for _, name in named)
        if not any(trained):
            continue
        if not all(trained):
            raise ModelError(f"{names} are one weight, but only some of them are trained; freeze all of them or none")
        stages_of = [partition.stage_of(block) for block, _ in named]
        copies = tuple(
            TiedCopy(stage, placement.rank_of(stage), name) for stage, (_, name) in zip(stages_of, named, strict=True)
        )
        stages = sorted({copy.stage for copy in copies})
        if not synchronous and len(stages) > 1:
            raise PlanError(
                f"{names} are one weight on stages {stages}, which an asynchronous schedule updates at different "
                "times; untie them (model.tie_weights: false, or two modules) or use a synchronous schedule"
            )
        ranks = sorted({copy.rank for copy in copies})
        groups.append(TiedGroup(copies, world.new_group(ranks) if len(ranks) > 1 else None))
    return groups
