"""Batches that do not divide by their microbatches, or differ in size and length, have the bits of one process."""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path

import pytest
import torch
from equality_cases import OPTIMIZERS, SEED, result_path
from flat_pipeline import flat_pipeline
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toy_models import MODELS, WIDTH, plain_modules
from uneven_cases import CASES, Uneven

from vpipe.data.source import FieldSpec
from vpipe.errors import DataError
from vpipe.launch.local import launch_local
from vpipe.model.chain import Block, Chain
from vpipe.model.loss import CallableLoss
from vpipe.runtime.hooks import Hooks
from vpipe.schedule.registry import build_schedule, find_entry
from vpipe.schedule.weights import weight_usage
from vpipe.verify.reference import Reference

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """Return a function from a case's name to what its ranks computed, by rank."""
    folders = {}

    def find(name):
        num_ranks = CASES[name].ranks
        if num_ranks not in folders:
            folders[num_ranks] = tmp_path_factory.mktemp(f"uneven{num_ranks}")
            launch_local(
                ["uneven_cases:run_cases", str(folders[num_ranks])],
                num_ranks,
                run_directory=folders[num_ranks],
                environment={"PYTHONPATH": str(HERE)},
            )
        return [torch.load(result_path(folders[num_ranks], name, rank)) for rank in range(num_ranks)]

    return find


def pieces(batch, count):
    """Cut a batch as torch does, with pieces of no samples at the end where there are too few."""
    parts = {name: tensor.tensor_split(count) for name, tensor in batch.items()}
    return [{name: part[index] for name, part in parts.items()} for index in range(count)]


def usage_of(case: Uneven, num_microbatches: int):
    options = {key: case.options[key] for key in ("depths", "vertical_sync") if key in case.options}
    if case.options.get("macrobatch"):
        options["microbatches_per_update"] = case.num_microbatches
    return weight_usage(build_schedule(case.schedule, case.ranks, num_microbatches, **options))


def reference(case: Uneven):
    """Return what one process computes for a case, and what computed it."""
    model, count = MODELS[case.model](), case.num_microbatches
    synchronous = find_entry(case.schedule).synchronous
    oracle = Reference(
        model,
        OPTIMIZERS[case.optimizer],
        partition=case.partition,
        seed=SEED,
        clip_grad_norm=case.options.get("clip_grad_norm"),
    )
    cut = [pieces(batch, count) for batch in case.batches(model)]
    if synchronous:
        found = [oracle.train_batch(parts) for parts in cut]
    else:
        microbatches = list(chain.from_iterable(cut))
        found = [oracle.train_asynchronous(microbatches, usage_of(case, len(microbatches)), count)]
    losses = [parts for result in found for parts in result.batch_parts(count)]
    return losses, [named for result in found for named in result.gradients if named], oracle


def dense_modules():
    with torch.random.fork_rng():
        torch.manual_seed(8)
        return nn.Sequential(nn.Linear(WIDTH, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, WIDTH))


def merged(dictionaries):
    return {key: value for item in dictionaries for key, value in item.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert not [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]


@pytest.mark.parametrize("name", CASES)
def test_bits_are_those_of_one_process(results, name):
    case, ranks = CASES[name], results(name)
    losses, updates, oracle = reference(case)
    for rank in ranks:
        assert rank["losses"] == losses
        assert not any(rank["num_saved"])
    gradients = merged(rank["gradients"] for rank in ranks)
    assert {len(each) for each in gradients.values()} == {len(updates)}
    for update, named in enumerate(updates):
        assert_same(merged(gradients[stage][update] for stage in gradients), named)
    assert_same(merged(rank["state"] for rank in ranks), oracle.parameters() | oracle.buffers())
    traffic = [rank["traffic"] for rank in ranks]
    assert sum(sent for sent, _ in traffic) == sum(received for _, received in traffic)


@pytest.mark.parametrize("name", CASES)
def test_microbatches_without_samples_keep_no_weight_versions(results, name):
    case = CASES[name]
    count = 1 if find_entry(case.schedule).synchronous else len(case.sizes)
    if count == 1:
        expected = [1] * len(case.partition)
    else:
        expected = [each.num_versions for each in usage_of(case, count * case.num_microbatches)]
    sets = merged(rank["num_sets"] for rank in results(name))
    assert all(sets[stage] <= most for stage, most in enumerate(expected))


def test_weight_versions_really_moved(results):
    assert all(rank["moved"] for rank in results("moving")[:2])


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("ending")])
def test_a_short_last_batch_is_as_if_the_stream_ended_there(results, name):
    """The oracle knows of no microbatches without samples here: its schedule has fewer."""
    case, model = CASES[name], MODELS["stopped"]()
    filled = [fields for batch in case.batches(model) for fields in pieces(batch, 4) if len(fields["input"])]
    oracle = Reference(model, OPTIMIZERS["adam"], partition=case.partition, seed=SEED)
    oracle.train_asynchronous(filled, weight_usage(build_schedule("pipedream", case.ranks, len(filled))), 1)
    assert_same(merged(rank["state"] for rank in results(name)), oracle.parameters() | oracle.buffers())


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "gpipe"])
def test_the_last_batch_of_a_loader_is_that_of_a_plain_loop(schedule):
    """Anyone would write this loop: the mean over all targets of the batch, in pieces."""
    torch.manual_seed(2)
    data = TensorDataset(torch.randn(22, WIDTH), torch.randint(0, WIDTH, (22,)).masked_fill(torch.rand(22) < 0.3, -1))
    loss = nn.CrossEntropyLoss(ignore_index=-1)
    model, losses = dense_modules(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for x, y in DataLoader(data, 8):
        total, shares = int((y != -1).sum()), []
        for one, two in zip(x.tensor_split(4), y.tensor_split(4), strict=True):
            share = nn.functional.cross_entropy(model(one), two, ignore_index=-1, reduction="sum") / total
            share.backward()
            shares.append(share.item())
        losses.append(math.fsum(shares))
        optimizer.step()
        optimizer.zero_grad()
    with flat_pipeline(
        dense_modules(),
        loss,
        schedule=schedule,
        num_microbatches=4,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    ) as pipeline:
        assert [result.loss for result in pipeline.train(DataLoader(data, 8))] == losses
        assert_same(pipeline.state_dict(), model.state_dict())


def test_what_there_are_no_samples_for_is_not_done():
    actions = []
    hooks = Hooks(record=lambda action, start, end: actions.append(str(action)))
    with flat_pipeline(
        plain_modules(), nn.functional.mse_loss, schedule="1f1b", num_microbatches=4, optimizer=OPTIMIZERS["sgd"],
        hooks=hooks,
    ) as pipeline:  # fmt: skip
        pipeline.step(torch.randn(2, WIDTH), torch.randn(2, WIDTH))
    assert actions == ["0F0", "0B0", "0F1", "0B1", "0STEP3"]


@pytest.mark.parametrize("schedule", ["1f1b", "pipedream"])
def test_results_come_for_every_batch(schedule):
    with flat_pipeline(
        plain_modules(), nn.functional.mse_loss, schedule=schedule, num_microbatches=4, optimizer=OPTIMIZERS["sgd"]
    ) as pipeline:
        batches = [(torch.randn(size, WIDTH), torch.randn(size, WIDTH)) for size in (4, 1, 9, 2, 4)]
        results = list(pipeline.train(batches))
        assert [result.iteration for result in results] == [0, 1, 2, 3, 4]
        assert not any(result.num_skipped for result in results)
        assert all(math.isfinite(result.loss) for result in results)


def test_memory_is_level_after_the_longest_batch():
    """The ledger looks at every microbatch of a new shape, and what it has seen of one is of no other."""
    with flat_pipeline(
        plain_modules(), nn.functional.mse_loss, schedule="pipedream", num_microbatches=2, watch="all",
        optimizer=OPTIMIZERS["sgd"],
    ) as pipeline:  # fmt: skip
        peaks = []
        for longest in (400, 40, 400, 40):
            lengths = [5, longest, 5, 17, longest]
            list(pipeline.train([(torch.randn(2, n, WIDTH), torch.randn(2, n, WIDTH)) for n in lengths]))
            peaks.append(pipeline.ledger.peak.by_kind["activations"])
        assert len(set(peaks)) == 1
        list(pipeline.train([(torch.randn(2, 800, WIDTH), torch.randn(2, 800, WIDTH))] * 3))
        assert pipeline.ledger.peak.by_kind["activations"] > 1.5 * peaks[0]


def test_rows_that_were_described_otherwise_are_told():
    model = Chain.from_modules([nn.Linear(4, 4)], nn.functional.mse_loss)
    specs = {name: FieldSpec((5, 4), torch.float32) for name in model.fields}
    batches = [(torch.randn(4, length, 4), torch.randn(4, length, 4)) for length in (5, 9)]
    with (
        flat_pipeline(
            model, field_specs=specs, num_microbatches=2, schedule="pipedream", optimizer=OPTIMIZERS["sgd"]
        ) as p,
        pytest.raises(
            DataError, match=r"rows of shape \(9, 4\) in the field 'input', which was .* as \(5, 4\); pad them"
        ),
    ):
        list(p.train(batches))


def test_a_field_for_all_samples_may_change_its_shape():
    class Masked(nn.Linear):
        def forward(self, x, mask):
            return mask @ super().forward(x)

    block = Block("masked", lambda: Masked(4, 4), ("input", "mask"), ("hidden",))
    end = Block("end", lambda: nn.Linear(4, 4), ("hidden",), ("hidden",))
    model = Chain(
        (block, end), ("input", "mask", "target"), CallableLoss(nn.functional.mse_loss), whole_fields=("mask",)
    )
    batches = [
        {"input": torch.randn(5, n, 4), "mask": torch.ones(n, n), "target": torch.randn(5, n, 4)} for n in (3, 6, 4)
    ]
    losses = []
    for schedule, calls in (("pipedream", [batches]), ("pipedream", [[batch] for batch in batches])):
        with flat_pipeline(
            model, schedule=schedule, num_microbatches=2, seed=1, optimizer=OPTIMIZERS["sgd"]
        ) as pipeline:
            losses.append([result.loss for call in calls for result in pipeline.train(call)])
    assert losses[0] == losses[1]
