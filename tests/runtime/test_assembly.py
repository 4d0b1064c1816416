"""From a chain and a partition to stages: cuts, names, policies and ties."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toy_models import frozen, plain, skipping, tied, tied_frozen

from vpipe.errors import ModelError, PlanError
from vpipe.model.chain import Block, Chain, ParameterRef
from vpipe.plan.partition import Partition
from vpipe.plan.plan import Plan
from vpipe.plan.policy import trailing_policies
from vpipe.runtime.assembly import build_stages, crossing_specs, tied_groups
from vpipe.schedule.placement import Placement


def build(chain, partition, stages, ratio=0.0, recompute="always", num_microbatches=4):
    plan = Plan(
        "naive",
        num_microbatches,
        len(partition),
        partition=partition,
        policies=trailing_policies(partition, [ratio] * len(partition)),
        recompute=recompute,
    )
    return build_stages(chain, plan, stages, torch.optim.SGD, seed=0, device=torch.device("cpu"))


def groups(chain, partition, synchronous=True):
    return tied_groups(
        chain,
        Partition(partition),
        Placement(1, len(partition)),
        chain.parameter_sizes(),
        synchronous=synchronous,
        world=SimpleNamespace(),
    )


def test_partitions_are_given_or_found():
    chain = plain()
    cut = {
        name: Plan(partition=name).resolve(chain, SimpleNamespace(num_ranks=2)).cut
        for name in ("uniform", "parameters")
    }
    assert cut["uniform"] == (4, 3)
    assert Plan(partition=[1, 6]).resolve(chain, SimpleNamespace(num_ranks=2)).cut == (1, 6)
    assert chain.trainable_sizes() == [63, 0, 0, 70, 14, 0, 48]
    assert cut["parameters"] == (3, 4)


def test_a_rank_builds_its_own_blocks_and_nothing_else():
    built = []

    def watched(number):
        def build():
            if torch.get_default_device().type != "meta":
                built.append(number)
            return nn.Linear(2, 2)

        return build

    blocks = tuple(
        Block(str(number), watched(number), ("hidden" if number else "input",), ("hidden",)) for number in range(5)
    )
    held = build(Chain(blocks, ("input", "target"), plain().loss), (1, 2, 2), (1,))
    assert built == [1, 2]
    assert (held[1].stage.start, held[1].stage.stop, held[1].stage.is_last) == (1, 3, False)
    assert held[1].weights.names == ["1.weight", "1.bias", "2.weight", "2.bias"]


def test_frozen_parameters_have_no_name_in_an_optimizer():
    names = build(frozen(), (2, 2, 3), (0, 1))
    assert names[0].weights.names == []
    assert names[1].weights.names == ["again.inner.weight", "again.inner.bias", "join.inner.weight"]
    assert frozen().parameter_sizes()[3] == {"join.inner.weight": 36}


@pytest.mark.parametrize(
    ("ratio", "recompute", "expected"),
    [
        (0.0, "always", []),
        (1.0, "never", []),
        (1.0, "always", [(block, index) for block in range(2, 6) for index in range(3)]),
        (0.5, "always", [(block, index) for block in (4, 5) for index in range(3)]),
        (0.5, "except_last", [(block, index) for block in (4, 5) for index in range(2)]),
        (0.3, "always", [(5, index) for index in range(3)]),
    ],
)
def test_the_trailing_share_of_a_stages_blocks_is_recomputed(ratio, recompute, expected):
    stage = build(plain(), (2, 4, 1), (1,), ratio, recompute, num_microbatches=3)[1].stage
    chosen = [(block, index) for block in range(2, 6) for index in range(3) if stage._recomputes(block, index)]
    assert chosen == expected


def test_what_crosses_is_known_per_stage():
    fields = {"tokens": torch.zeros(2, 3, dtype=torch.int64), "labels": torch.zeros(2, 3, dtype=torch.int64)}
    crossing = crossing_specs(skipping(), Partition([2, 2, 3]), fields, torch.device("cpu"), training=True)
    assert {stage: [spec.name for spec in specs] for stage, specs in crossing.items()} == {
        1: ["hidden", "mask", "skip", "positions"],
        2: ["hidden", "positions", "skip", "later"],
    }
    assert [spec.requires_grad for spec in crossing[1]] == [True, False, True, False]


def test_ties_are_known_by_stage_and_name():
    (group,) = groups(tied(), (2, 1, 4))
    assert [(copy.stage, copy.rank, copy.name) for copy in group.copies] == [
        (0, 0, "embed.table.weight"),
        (1, 0, "again.table"),
        (2, 0, "head.weight"),
    ]
    assert group.group is None
    assert groups(tied_frozen(), (3, 4)) == []


def test_ties_on_one_stage_are_fine_anywhere_and_across_stages_only_when_all_update_together():
    assert len(groups(tied(), (7,), synchronous=False)) == 1
    with pytest.raises(
        PlanError, match=r"are one weight on stages \[0, 1, 2\], which an asynchronous schedule updates"
    ):
        groups(tied(), (2, 1, 4), synchronous=False)


def test_half_frozen_ties_are_refused():
    chain = tied_frozen()
    first = Block("embed", skipping().blocks[0].build, ("tokens",), ("hidden", "mask", "positions"))
    refs = (ParameterRef(0, "table.weight"), ParameterRef(6, "weight"))
    mixed = Chain((first, *chain.blocks[1:]), chain.fields, chain.loss, (refs,))
    with pytest.raises(
        ModelError, match=r"embed.table.weight and head.weight are one weight, but only some of them are"
    ):
        groups(mixed, (3, 4))
