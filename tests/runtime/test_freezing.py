"""Weights that are frozen and trained again between batches give what one process gives that does the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flat_pipeline import flat_pipeline
from freezing_toys import OPTIONS, TURNS, adamw, batches, by_turns, chain, modules, pipeline_of
from torch import Tensor, nn

from vpipe.errors import ConfigError, ExecutionError
from vpipe.launch.local import launch_local
from vpipe.schedule.registry import build_schedule, find_entry
from vpipe.schedule.weights import weight_usage
from vpipe.verify.reference import Reference


def oracle_by_turns(options: dict[str, Any], num_ranks: int) -> dict[str, Any]:
    name = options.get("schedule", "1f1b")
    oracle = Reference(chain(), adamw, partition=options.get("partition"), clip_grad_norm=options.get("clip_grad_norm"))
    parameters = {
        block.global_name(local): item
        for block, module in zip(oracle.chain.blocks, oracle._modules, strict=True)
        for local, item in module.named_parameters()
    }
    found: dict[str, Any] = {"losses": [], "held_out": [], "states": [], "frozen": []}
    for turn, changes in enumerate(TURNS):
        for parts, is_trained in zip(changes, (False, True), strict=True):
            for parameter_name, item in parameters.items():
                if any(f"{parameter_name}.".startswith(f"{part}.") for part in parts):
                    item.requires_grad_(is_trained)
        found["frozen"].append(sorted(name for name, item in parameters.items() if not item.requires_grad))
        pieces = [
            [{"input": x[at : at + 2], "target": y[at : at + 2]} for at in range(0, 8, 2)] for x, y in batches(turn)
        ]
        if find_entry(name).synchronous:
            results = [oracle.train_batch(each) for each in pieces]
        else:
            per_update = {"microbatches_per_update": 4} if options.get("macrobatch") else {}
            usage = weight_usage(build_schedule(name, num_ranks, 8, **per_update))
            results = [oracle.train_asynchronous([*pieces[0], *pieces[1]], usage, 4)]
        found["losses"] += [parts["loss"] for result in results for parts in result.batch_parts(4)]
        found["held_out"].append(oracle.evaluate([piece for each in pieces for piece in each])["loss"])
        found["states"].append(oracle.parameters() | oracle.buffers())
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in ("frozen", "losses", "held_out"):
        assert found[key] == expected[key], key
    for turn, (state, other) in enumerate(zip(found["states"], expected["states"], strict=True)):
        assert [name for name in state if not torch.equal(state[name], other[name])] == [], turn


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "1f1b"},
        {"schedule": "zb-h1"},
        {"schedule": "gpipe", "recompute_ratio": 1.0, "clip_grad_norm": 0.1},
        {"schedule": "interleaved", "stages_per_rank": 5, "partition": [1, 1, 1, 1, 1]},
        {"schedule": "pipedream"},
    ],
    ids=lambda options: options["schedule"],
)
def test_one_rank_gives_what_one_process_gives(options: dict[str, Any]) -> None:
    with pipeline_of(**options) as pipeline:
        found = by_turns(pipeline)
    assert_same(found, oracle_by_turns(options, 1))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("freezing")
    environment = {"PYTHONPATH": str(Path(__file__).parent)}
    launch_local(["freezing_toys:run_freezing", str(folder)], 2, run_directory=folder, environment=environment)
    return [torch.load(folder / f"freezing.{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", OPTIONS)
def test_two_ranks_give_what_one_process_gives(name: str, ranks: list[dict[str, Any]]) -> None:
    expected = oracle_by_turns(OPTIONS[name], 2)
    for found in ranks:
        assert_same(found[name], expected)
    assert len({key for found in ranks for key in found[name]["states"][0]}) == len(modules().state_dict())


def test_ranks_that_freeze_other_weights_are_told(ranks: list[dict[str, Any]]) -> None:
    text = "ranks do not agree on the frozen weights: rank 0: ['0.bias', '0.weight']; rank 1: ['1.bias', '1.weight']"
    assert [found["told"]["text"].startswith(text) for found in ranks] == [True, True]


def test_a_plain_loop_agrees() -> None:
    model = modules()
    model[2][2].p = 0.0  # no random numbers
    with pipeline_of() as pipeline:
        pipeline.held[0].weights.newest[2][2].p = 0.0
        found = by_turns(pipeline)
    optimizer = adamw(model.parameters())
    for turn, (freeze, unfreeze) in enumerate(TURNS):
        for parts, is_trained in ((freeze, False), (unfreeze, True)):
            for name, item in model.named_parameters():
                if any(f"{name}.".startswith(f"{part}.") for part in parts):
                    item.requires_grad_(is_trained)
        for x, y in batches(turn):
            optimizer.zero_grad()
            for at in range(0, 8, 2):
                loss: Tensor = nn.functional.mse_loss(model(x[at : at + 2]), y[at : at + 2]) / 4
                if loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        assert all(torch.equal(item, found["states"][turn][name]) for name, item in model.state_dict().items()), turn


def test_names_of_weights_and_modules_and_functions() -> None:
    with pipeline_of() as pipeline:
        assert pipeline.freeze("2") == ["2.1.bias", "2.1.weight"]
        assert pipeline.freeze(["0.bias", "3"]) == ["0.bias", "2.1.bias", "2.1.weight", "3.0.bias", "3.0.weight"]
        assert pipeline.unfreeze(lambda name: name.endswith("bias")) == ["2.1.weight", "3.0.weight"]
        with pytest.raises(ConfigError, match="no trained weight of the model is called '5'"):
            pipeline.freeze("5")
        with pytest.raises(ConfigError, match=r"is called '4.weigth'; did you mean '4.weight'\?"):
            pipeline.freeze(["4.weigth"])


def test_tied_weights_are_frozen_together() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    with flat_pipeline(
        model, nn.functional.mse_loss, optimizer=adamw, schedule="interleaved", stages_per_rank=2
    ) as made:
        assert made.freeze("2.weight") == ["0.weight", "2.weight"]
        before = made.state_dict()
        made.step(*batches(0)[0])
        after = made.state_dict()
        assert [name for name in before if not torch.equal(before[name], after[name])] == ["0.bias", "2.bias"]
        made.unfreeze("0.weight")
        made.step(*batches(0)[0])
        assert torch.equal(made.state_dict()["0.weight"], made.state_dict()["2.weight"])
        assert not torch.equal(made.state_dict()["0.weight"], before["0.weight"])


def test_what_was_never_trained_stays_so_and_the_users_module_is_left_alone() -> None:
    model = modules()
    model[1].requires_grad_(False)
    with flat_pipeline(model, nn.functional.mse_loss, optimizer=adamw, schedule="zb-h1") as made:
        with pytest.raises(ConfigError, match="called '1'; it was frozen when the pipeline was made, so no optimizer"):
            made.unfreeze("1")
        made.freeze("0")
        made.step(*batches(0)[0])
        assert [name for name, item in model.named_parameters() if not item.requires_grad] == ["1.weight", "1.bias"]
        model[0].requires_grad_(False)
        with pytest.raises(ConfigError, match=r"call pipeline.freeze\('0.weight'\)"):
            made.step(*batches(0)[0])


def test_not_while_microbatches_are_in_flight() -> None:
    with pipeline_of(schedule="pipedream") as pipeline:
        results = pipeline.train(batches(0))
        next(results)
        with pytest.raises(ExecutionError, match="microbatches are still in flight"):
            pipeline.freeze("0")
        list(results)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


class Inside(nn.Module):
    """Computes with its weight as layers do, and in a script, which is found out with the first microbatch alone."""

    scripted = staticmethod(torch.jit.script(_product))

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        other: Tensor = self.scripted(x, self.inner.weight)
        return self.inner(x) + other


def test_what_a_frozen_weight_did_not_show_is_found_out_when_it_is_trained_again() -> None:
    states = []
    for schedule in ("1f1b", "zb-h1"):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 6), Inside(), nn.Linear(6, 6))
        options = {"schedule": schedule, "num_microbatches": 4}
        with flat_pipeline(model, nn.functional.mse_loss, optimizer=adamw, **options) as made:
            made.freeze("1")
            list(made.train(batches(0)))
            made.unfreeze("1")
            list(made.train(batches(1)))
            states.append(made.state_dict())
    assert made.held[0].stage._findings.whole == {1}
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []
