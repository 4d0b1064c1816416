"""What a pipeline computes has the bits of one process: every schedule and option, on one to four ranks.

Ranks are started once per number of ranks and run all of its cases; each case is then a test of its own.
"""

from __future__ import annotations

import math
from itertools import accumulate, chain
from pathlib import Path

import pytest
import torch
from equality_cases import CASES, OPTIMIZERS, SEED, Case, result_path
from torch import nn
from toy_models import MODELS, seeded_modules

from vpipe.launch.local import launch_local
from vpipe.model.chain import call_block
from vpipe.schedule.passes.lower import lower
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
            folders[num_ranks] = tmp_path_factory.mktemp(f"ranks{num_ranks}")
            launch_local(
                ["equality_cases:run_cases", str(folders[num_ranks])],
                num_ranks,
                run_directory=folders[num_ranks],
                environment={"PYTHONPATH": str(HERE)},
            )
        return [torch.load(result_path(folders[num_ranks], name, rank)) for rank in range(num_ranks)]

    return find


def schedules(case: Case):
    """Yield the schedule of each program that the case runs, and its number of batches."""
    options = {"depths": case.options["depths"]} if "depths" in case.options else {}
    if case.options.get("macrobatch"):
        options["microbatches_per_update"] = case.num_microbatches
    if case.options.get("vertical_sync"):
        options["vertical_sync"] = True
    synchronous = find_entry(case.schedule).synchronous
    for count in [1] * sum(case.calls) if synchronous else case.calls:
        size = count * case.num_microbatches
        stages = case.options.get("stages_per_rank")
        yield build_schedule(case.schedule, case.ranks, size, stages_per_rank=stages, **options), count


def cut(batch, case: Case):
    step = case.samples_per_microbatch
    return [
        {name: tensor[start : start + step] for name, tensor in batch.items()}
        for start in range(0, len(next(iter(batch.values()))), step)
    ]


def reference(case: Case):
    """Return what one process computes for a case."""
    model = MODELS[case.model]()
    options = {key: case.options[key] for key in ("clip_grad_norm", "learning_rate") if key in case.options}
    oracle = Reference(model, OPTIMIZERS[case.optimizer], partition=case.partition, seed=SEED, **options)
    batches = iter(case.batches(model))
    found = {"losses": [], "gradients": [], "norms": [], "held_out": []}
    starts = set(accumulate((0, *case.calls)))
    for schedule, count in schedules(case):
        if oracle.iteration in starts:
            found["held_out"].append(held_out_losses(oracle, case))
        microbatches = [fields for _ in range(count) for fields in cut(next(batches), case)]
        if schedule.synchronous:
            result = oracle.train_batch(microbatches)
        else:
            result = oracle.train_asynchronous(microbatches, weight_usage(schedule), case.num_microbatches)
        found["losses"] += result.batch_parts(case.num_microbatches)
        found["gradients"] += result.gradients
        found["norms"] += result.norms
    return found, oracle


def held_out_losses(oracle: Reference, case: Case):
    """Evaluate in one process: all samples of a part count the same, whatever batch they are in."""
    model = oracle.chain
    sums: dict[str, list[float]] = {name: [] for name in model.loss.parts}
    counts = dict.fromkeys(sums, 0.0)
    modes = [(part, part.training) for module in oracle._modules for part in module.modules()]
    modules = [module.eval() for module in oracle._modules]
    with torch.no_grad():
        for batch in (piece for whole in case.held_out(model) for piece in cut(whole, case)):
            values, size = dict(batch), len(next(iter(batch.values())))
            for block, module in zip(model.blocks, modules, strict=True):
                values.update(call_block(block, module, values))
            for name, part in model.loss(values, dict.fromkeys(sums, 1.0), size).items():
                sums[name].append(part.item())
                counts[name] += model.loss.count(batch, size)[name]
    for part, mode in modes:
        part.training = mode
    parts = {name: math.fsum(sums[name]) / counts[name] for name in sums}
    return {"loss": math.fsum(parts.values()), **parts}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not different


def merged(dictionaries):
    return {key: value for item in dictionaries for key, value in item.items()}


def assert_bits_of_one_process(ranks, case):
    """Check what the ranks of a case found against one process that does the same."""
    expected, oracle = reference(case)
    for rank in ranks:
        assert rank["losses"] == expected["losses"]
        assert rank["loss"] == [math.fsum(parts.values()) for parts in expected["losses"]]
        assert rank["iterations"] == list(range(sum(case.calls)))
        assert rank["held_out"] == expected["held_out"]
        assert not any(rank["num_saved"])
    gradients = merged(rank["gradients"] for rank in ranks)
    assert sorted(gradients) == list(range(len(case.partition)))
    assert len(expected["gradients"]) == len(gradients[0])
    for update, named in enumerate(expected["gradients"]):
        assert_same(merged(gradients[stage][update] for stage in gradients), named)
    assert_same(merged(rank["state"] for rank in ranks), oracle.parameters() | oracle.buffers())


@pytest.mark.parametrize("name", CASES)
def test_bits_are_those_of_one_process(results, name):
    assert_bits_of_one_process(results(name), CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_versions_cost_what_the_schedule_says(results, name):
    programs = [[usage.num_versions for usage in weight_usage(schedule)] for schedule, _ in schedules(CASES[name])]
    peaks = [max(counts) for counts in zip(*programs, strict=True)]
    assert merged(rank["num_sets"] for rank in results(name)) == dict(enumerate(peaks))


@pytest.mark.parametrize("name", CASES)
def test_ranks_do_what_the_schedule_says_and_keep_nothing(results, name):
    for number, rank in enumerate(results(name)):
        expected = [str(action) for schedule, _ in schedules(CASES[name]) for action in lower(schedule)[number]]
        assert list(chain.from_iterable(rank["actions"])) == expected
        assert not any(rank["num_saved"])


@pytest.mark.parametrize("name", CASES)
def test_what_is_sent_is_received(results, name):
    traffic = [rank["traffic"] for rank in results(name)]
    assert sum(sent for sent, _ in traffic) == sum(received for _, received in traffic)
    assert all(sent + received > 0 for sent, received in traffic) == (len(traffic) > 1)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "clip_grad_norm" in case.options])
def test_norms_are_those_of_one_process(results, name):
    case = CASES[name]
    expected, _ = reference(case)
    updates = len(expected["norms"]) // sum(case.calls)
    for number, rank in enumerate(results(name)):
        last = expected["norms"][updates - 1 :: updates]
        assert rank["norms"] == [norms[min(number, len(norms) - 1)] for norms in last]


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("-torch")])
def test_bits_are_those_of_a_plain_training_loop(results, name):
    """The oracle's own word is not taken for it: this is the loop that anyone would write."""
    case, ranks = CASES[name], results(name)
    model = seeded_modules()
    optimizer = OPTIMIZERS[case.optimizer](model.parameters())
    losses = []
    for batch in case.batches(MODELS["seeded"]()):
        losses.append([])
        for fields in cut(batch, case):
            loss = nn.functional.mse_loss(model(fields["input"]), fields["target"]) * (1 / case.num_microbatches)
            loss.backward()
            losses[-1].append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert [rank["loss"] for rank in ranks] == [[math.fsum(shares) for shares in losses]] * case.ranks
    assert_same(merged(rank["state"] for rank in ranks), model.state_dict())
