"""The state of a pipeline is that of the user's own modules, by the same names, out and in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from state_toys import OPTIONS, STRUCTURES, Counting, batches, linear, make, pipeline_of, sequential_of
from torch import Tensor, nn

from vpipe.errors import ExecutionError, ModelError
from vpipe.launch.local import launch_local


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def train_plainly(model: nn.Module, number: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in batches(number):
        optimizer.zero_grad()
        for part in range(0, 8, 2):
            (nn.functional.mse_loss(model(x[part : part + 2]), y[part : part + 2]) / 4).backward()
        optimizer.step()


@pytest.mark.parametrize("name", STRUCTURES)
def test_names_and_values_are_those_of_the_users_own_module(name: str) -> None:
    model, plain = make(name), sequential_of(make(name))
    with pipeline_of(model, schedule="interleaved", stages_per_rank=2) as pipeline:
        list(pipeline.train(batches(3)))
        state = pipeline.state_dict()
    train_plainly(plain, 3)
    expected = plain.state_dict()
    assert list(state) == list(expected)
    if name not in ("tied", "twice"):  # parts of their gradients are summed in block order
        assert [key for key, item in state.items() if not same(item, expected[key])] == []
    plain.load_state_dict(state)
    assert all(same(item, state[key]) for key, item in plain.state_dict().items())


def test_a_state_goes_in_again() -> None:
    with pipeline_of(make("counting")) as pipeline:
        fresh = sequential_of(make("counting", seed=1))
        fresh[1].label = "other"
        keys = pipeline.load_state_dict(fresh.state_dict())
        assert keys == ([], [])
        assert all(same(item, fresh.state_dict()[name]) for name, item in pipeline.state_dict().items())
        loss = pipeline.step(*batches(1)[0]).loss
    with pipeline_of(fresh) as expected:
        assert expected.step(*batches(1)[0]).loss == loss


def test_without_strict_names_may_differ() -> None:
    with pipeline_of(make("plain")) as pipeline:
        before = pipeline.state_dict()
        state = {"0.weight": torch.zeros(4, 4), "9.weight": torch.zeros(1)}
        keys = pipeline.load_state_dict(state, strict=False)
        assert keys.unexpected_keys == ["9.weight"]
        assert keys.missing_keys == [name for name in before if name != "0.weight"]
        after = pipeline.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["0.weight"]
    assert not after["0.weight"].any()


def test_of_tied_weights_the_last_one_counts_as_in_torch() -> None:
    model = sequential_of(make("tied"))
    state = model.state_dict()
    state |= {name: torch.full((4, 4), number) for number, name in enumerate(("0.weight", "2.0.weight", "3.weight"))}
    model.load_state_dict(state)
    with pipeline_of(make("tied"), schedule="interleaved", stages_per_rank=2) as pipeline:
        pipeline.load_state_dict(state)
        loaded = pipeline.state_dict()
    assert all(same(item, loaded[name]) for name, item in model.state_dict().items())
    assert loaded["0.weight"].eq(2).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"0.weight": None}, "the state does not fit the model: missing keys: '0.weight'"),
        ({"0.weigth": torch.zeros(1), "0.weight": None}, "unexpected keys: '0.weigth'; did you mean '0.weight'?"),
        ({"0.bias": torch.zeros(5)}, r"size mismatch for '0.bias': it has shape \(4,\) and \(5,\) was given"),
        ({"0.bias": [0.0] * 4}, "'0.bias' is a tensor and a list was given"),
        ({"0.bias": torch.zeros(4, device="meta")}, "was given for '0.bias' is on the meta device and has no values"),
    ],
)
def test_what_does_not_fit_is_told_and_nothing_loaded(change: dict[str, Any], words: str) -> None:
    with pipeline_of(make("plain")) as pipeline:
        before = pipeline.state_dict()
        state = {**sequential_of(make("plain", seed=1)).state_dict(), **change}
        with pytest.raises(ModelError, match=words):
            pipeline.load_state_dict({name: item for name, item in state.items() if item is not None})
        assert all(torch.equal(item, before[name]) for name, item in pipeline.state_dict().items())
        with pytest.raises(ModelError, match="the state is of type list; give a dictionary"):
            pipeline.load_state_dict([])  # type: ignore[arg-type]


def test_nothing_is_loaded_while_microbatches_are_in_flight() -> None:
    with pipeline_of(make("plain"), schedule="pipedream") as pipeline:
        results = pipeline.train(batches(2))
        next(results)
        with pytest.raises(ExecutionError, match="microbatches are still in flight"):
            pipeline.load_state_dict(pipeline.state_dict())
        list(results)
        pipeline.load_state_dict(pipeline.state_dict())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("states")
    environment = {"PYTHONPATH": str(Path(__file__).parent)}
    launch_local(["state_toys:run_states", str(folder)], 2, run_directory=folder, environment=environment)
    return [torch.load(folder / f"states.{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize(
    ("name", "row"),
    [*((name, "1f1b") for name in STRUCTURES), *((name, row) for row in OPTIONS for name in ("nested", "counting"))],
)
def test_two_ranks_go_on_from_a_state_as_if_nothing_had_happened(
    name: str, row: str, found: list[dict[Any, Any]]
) -> None:
    for rank in found:
        result = rank[name, row]
        first, *others = result["states"]
        assert set(first) == set(result["names"])
        assert result["losses"] == [result["losses"][0]] * 3
        for other in others:
            assert [key for key, item in first.items() if not same(item, other[key])] == []


def test_two_ranks_are_told_the_same_of_a_state_that_does_not_fit(found: list[dict[Any, Any]]) -> None:
    told, other = (rank["refused"] for rank in found)
    assert told == other
    assert told["in one go"] == "loaded"
    assert told["different"].endswith(
        "rank 0 and rank 1 were given different values of '0.weight': read the same file on every rank"
    )
    assert told["backbone"].endswith("missing keys: '3.weight', '3.bias'")
    assert told["shape"].endswith("size mismatch for '3.weight': it has shape (4, 4) and (4, 7) was given")
    assert told["unchanged"] == "True"
    assert "'0.weight' and '2.weight' are one weight, and the ranks that hold it were given other" in told["apart"]
    assert (told["one name"], told["everywhere"]) == ("loaded", "{0.5}")


class Doubling(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def scaled() -> nn.Sequential:
    model = nn.Sequential(linear(), Counting())
    model.register_parameter("gain", nn.Parameter(torch.ones(1)))
    return model


def hooked() -> nn.Sequential:
    model = nn.Sequential(linear(), linear())
    model.register_forward_hook(lambda module, inputs, output: output * 2)
    return model


def replaced() -> nn.Sequential:
    model = nn.Sequential(linear(), linear())
    model.forward = model[0].forward  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Doubling(linear()), "the Doubling has a forward of its own, and a chain runs the items one after another"),
        (replaced(), "the Sequential has a forward of its own"),
        (scaled(), "the Sequential holds 'gain' beside its items"),
        (hooked(), "the Sequential has hooks of its own"),
    ],
    ids=["forward", "replaced", "parameter", "hook"],
)
def test_what_a_sequential_does_beside_its_items_is_refused(model: nn.Sequential, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        pipeline_of(model)
