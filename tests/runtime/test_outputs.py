"""Metrics, outputs and predictions are what a plain loop computes, and leave the training alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from outputs_cases import CASES, HELD_OUT, NUM_BATCHES, SEED, largest, right, run_outputs, same_sign
from torch import Tensor, nn
from toy_models import MODELS, make_batch, seeded_modules

from vpipe.launch.local import launch_local
from vpipe.model.chain import Chain, call_block

NAMES = {"plain": "hidden", "normalised": "hidden", "peculiar": "hidden", "seeded": "hidden"}
NAMES |= {"skipping": "logits", "tied": "logits"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all cases, those of one number of ranks in one launch."""
    path = tmp_path_factory.mktemp("outputs")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    run_outputs([str(path)])
    torch.set_num_threads(before)
    for ranks in (2, 3):
        launch_local(
            ["outputs_cases:run_outputs", str(path)],
            ranks,
            run_directory=path,
            environment={"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        )
    return path


def load(folder: Path, name: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{name}.{rank}.pt", weights_only=False) for rank in range(CASES[name].ranks)]


def last(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the rank of the last stage gave: the only one with outputs."""
    (found,) = [rank for rank in ranks if rank["predicted"][0] is not None]
    return found


def pieces(chain: Chain, size: int) -> list[list[dict[str, Tensor]]]:
    """Return the batches to predict in pieces of `size` samples and a short last one."""
    batches = [make_batch(chain, 50 + number, count) for number, count in enumerate(HELD_OUT)]
    return [
        [{name: item[start : start + size] for name, item in batch.items()} for start in range(0, count, size)]
        for batch, count in zip(batches, HELD_OUT, strict=True)
    ]


def forward(name: str, state: dict[str, Tensor], batches: list[list[dict[str, Tensor]]]) -> list[list[Tensor]]:
    """Run the blocks one after another in one process, with these weights."""
    chain = MODELS[CASES[name].model]()
    modules: list[nn.Module] = []
    for index, block in enumerate(chain.blocks):
        module = chain.materialise(index, SEED)
        module.load_state_dict({local: state[block.global_name(local)] for local in module.state_dict()})
        modules.append(module.eval())
    found = []
    with torch.no_grad():
        for parts in batches:
            outputs = []
            for part in parts:
                values = dict(part)
                for block, module in zip(chain.blocks, modules, strict=True):
                    values.update(call_block(block, module, values))
                outputs.append(values[NAMES[CASES[name].model]])
            found.append(outputs)
    return found


@pytest.mark.parametrize("name", CASES)
def test_training_has_the_same_bits_with_and_without_them(folder: Path, name: str) -> None:
    for rank in load(folder, name):
        plain = rank["plain"]
        assert plain["losses"] == rank["losses"]
        assert plain["beside"] == [({}, None)] * NUM_BATCHES
        assert {key: rank["evaluated"][key] for key in plain["evaluated"]} == plain["evaluated"]
        for key in ("state", "later"):
            assert rank[key].keys() == plain[key].keys()
            assert all(torch.equal(tensor, plain[key][name]) for name, tensor in rank[key].items())


@pytest.mark.parametrize("name", CASES)
def test_predictions_are_those_of_one_process_on_the_same_pieces(folder: Path, name: str) -> None:
    ranks = load(folder, name)
    chain = MODELS[CASES[name].model]()
    expected = [torch.cat(parts) for parts in forward(name, merged(ranks), pieces(chain, 2))]
    for rank in ranks:
        assert len(rank["predicted"]) == len(HELD_OUT)
        for each, whole in zip(expected, rank["everywhere"], strict=True):
            assert torch.equal(each, whole)
        if rank is not last(ranks):
            assert rank["predicted"] == rank["with targets"] == [None] * len(HELD_OUT)
    for kind in ("predicted", "with targets"):
        for each, found in zip(expected, last(ranks)[kind], strict=True):
            assert torch.equal(each, found)
            assert not found.requires_grad


@pytest.mark.parametrize("name", CASES)
def test_without_a_size_batches_are_cut_as_for_training(folder: Path, name: str) -> None:
    ranks = load(folder, name)
    chain = MODELS[CASES[name].model]()
    for index, count in enumerate(HELD_OUT):
        size = math.ceil(count / CASES[name].num_microbatches)
        (parts,) = forward(name, merged(ranks), [pieces(chain, size)[index]])
        assert torch.equal(torch.cat(parts), last(ranks)["usual size"][index])


def merged(ranks: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: tensor for rank in ranks for name, tensor in rank["state"].items()}


@pytest.mark.parametrize("name", CASES)
def test_outputs_of_training_are_what_the_loss_was_computed_of(folder: Path, name: str) -> None:
    ranks, case = load(folder, name), CASES[name]
    for rank in ranks:
        if rank is not last(ranks):
            assert rank["outputs"] == [None] * NUM_BATCHES
    chain = MODELS[case.model]()
    for number, outputs in enumerate(last(ranks)["outputs"]):
        batch = make_batch(chain, number, 2 * case.num_microbatches)
        assert not outputs.requires_grad
        assert len(outputs) == 2 * case.num_microbatches
        if case.model in ("plain", "normalised"):
            parts = zip(outputs.split(2), batch["target"].split(2), strict=True)
            shares = [nn.functional.mse_loss(a, b).item() for a, b in parts]
            is_exact = case.num_microbatches == 4  # a sixth is not
            expected = math.fsum(shares) / len(shares)
            assert last(ranks)["losses"][number][0] == pytest.approx(expected, rel=0 if is_exact else 1e-6, abs=0)


def test_outputs_of_training_are_those_of_the_loop_that_anyone_would_write(folder: Path) -> None:
    ranks, chain, net = load(folder, "1f1b-2-torch"), MODELS["seeded"](), seeded_modules()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for number in range(NUM_BATCHES):
        batch = make_batch(chain, number, 8)
        found = []
        for x, y in zip(batch["input"].split(2), batch["target"].split(2), strict=True):
            found.append(net(x))
            (nn.functional.mse_loss(found[-1], y) * (2 / 8)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(torch.cat(found), last(ranks)["outputs"][number])
        shares = [largest(item, item).item() * 2 for item in found]
        assert ranks[0]["metrics"][number]["largest"] == math.fsum(shares) / 8
    net.eval()
    with torch.no_grad():
        for parts, output in zip(pieces(chain, 2), last(ranks)["predicted"], strict=True):
            assert torch.equal(torch.cat([net(part["input"]) for part in parts]), output)


@pytest.mark.parametrize("name", CASES)
def test_metrics_are_those_of_the_outputs_and_the_same_on_every_rank(folder: Path, name: str) -> None:
    ranks, case = load(folder, name), CASES[name]
    assert all(rank["metrics"] == ranks[0]["metrics"] for rank in ranks)
    assert all(rank["evaluated"] == ranks[0]["evaluated"] for rank in ranks)
    chain = MODELS[case.model]()
    for number, outputs in enumerate(last(ranks)["outputs"]):
        batch = make_batch(chain, number, 2 * case.num_microbatches)
        assert ranks[0]["metrics"][number] == metrics(outputs, batch, chain, 2)
    predicted = last(ranks)["predicted"]
    joined = {
        name: torch.cat([make_batch(chain, 50 + number, count)[name] for number, count in enumerate(HELD_OUT)])
        for name in chain.fields
    }
    found = metrics(torch.cat(predicted), joined, chain, 1)
    assert {name: ranks[0]["evaluated"][name] for name in found} == pytest.approx(found, rel=1e-6)


def metrics(outputs: Tensor, batch: dict[str, Tensor], chain: Chain, size: int) -> dict[str, float]:
    """Compute the metrics of a batch: means weigh by samples, sums and counts are added."""
    target = batch[chain.fields[1]]
    parts = list(zip(outputs.split(size), target.split(size), strict=True))
    found = {"largest": math.fsum(float(largest(*part)) * len(part[0]) for part in parts) / len(outputs)}
    if chain.fields == ("input", "target"):
        found["same_sign"] = math.fsum(same_sign(*part) * len(part[0]) for part in parts) / len(outputs)
    else:
        totals, counts = zip(*(map(int, right(*part)) for part in parts), strict=True)
        found["right"] = sum(totals) / sum(counts)
    return found
