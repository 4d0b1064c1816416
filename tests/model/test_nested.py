"""Values that are more than a tensor are taken apart and put together again."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from transformers.modeling_outputs import BaseModelOutput

from vpipe.errors import ModelError
from vpipe.model.block import Crossing, nests_of, parts_of
from vpipe.model.chain import Chain
from vpipe.model.loss import CallableLoss
from vpipe.model.nested import map_tensors, take_apart, tensors_of

Pair = namedtuple("Pair", "first second")


@dataclass(frozen=True)
class State:
    hidden: Tensor
    extras: Any


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return one is two
    if type(one) is not type(two):
        return False
    if isinstance(one, dict):
        return list(one) == list(two) and all(_same(one[key], two[key]) for key in one)
    if isinstance(one, State):
        return _same(one.hidden, two.hidden) and _same(one.extras, two.extras)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(_same, one, two))
    return bool(one == two)


VALUES: dict[str, tuple[Any, list[str]]] = {
    "dictionary": ({"b": torch.ones(1), "a": torch.ones(2)}, ["h['b']", "h['a']"]),
    "ordered": (OrderedDict(b=torch.ones(1), a=None), ["h['b']"]),
    "list": ([torch.ones(1), [torch.ones(2)], "word", 3], ["h[0]", "h[1][0]"]),
    "tuple": ((torch.ones(1), (), (torch.ones(2),)), ["h[0]", "h[2][0]"]),
    "one in a tuple": ((torch.ones(1),), ["h[0]"]),
    "namedtuple": (Pair(torch.ones(1), {"x": torch.ones(2)}), ["h.first", "h.second['x']"]),
    "dataclass": (State(torch.ones(1), [torch.ones(2), torch.float64]), ["h.hidden", "h.extras[0]"]),
    "nothing": (None, []),
    "number": (3.5, []),
    "output of transformers": (BaseModelOutput(last_hidden_state=torch.ones(1)), ["h['last_hidden_state']"]),
}


@pytest.mark.parametrize("name", VALUES)
def test_what_is_taken_apart_is_put_together_again(name: str) -> None:
    value, names = VALUES[name]
    tensors, nest = take_apart("h", value)
    assert list(tensors) == names
    assert [id(item) for item in tensors.values()] == [id(item) for item in tensors_of(value)]
    assert nest is not None
    assert _same(nest.put_together(tensors), value)
    again, other = take_apart("h", map_tensors(lambda tensor: tensor + 1, value))
    assert other == nest
    assert str(other) == str(nest)
    assert all(torch.equal(again[key], tensors[key] + 1) for key in names)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": [torch.ones(1), None], "b": (2, "word")}, "{'a': [a tensor, None], 'b': (2, 'word')}"),
        (State(torch.ones(1), Pair(1, torch.ones(1))), "State(hidden=a tensor, extras=Pair(first=1, second=a tensor))"),
        ([take_apart, torch.float32], "[take_apart, torch.float32]"),
    ],
)
def test_what_is_shown_is_the_same_in_every_process(value: Any, text: str) -> None:
    assert str(take_apart("h", value)[1]) == text


def test_a_tensor_is_itself() -> None:
    tensor = torch.ones(2)
    assert take_apart("h", tensor) == ({"h": tensor}, None)


def test_packed_sequences_stay_that() -> None:
    packed = pack_sequence([torch.ones(3, 1), torch.ones(2, 1)])
    tensors, nest = take_apart("h", packed)
    assert nest is not None
    made = nest.put_together(tensors)
    assert isinstance(made, PackedSequence)
    assert made.data is packed.data


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"a": torch.ones(1)}, {"b": torch.ones(1)}),
        ([torch.ones(1)], (torch.ones(1),)),
        ([torch.ones(1), 2], [torch.ones(1), 3]),
        ([torch.ones(1), None], [torch.ones(1), torch.ones(1)]),
        (State(torch.ones(1), None), Pair(torch.ones(1), None)),
        (torch.ones(1), [torch.ones(1)]),
    ],
)
def test_other_values_are_told_apart(one: Any, two: Any) -> None:
    assert take_apart("h", one)[1] != take_apart("h", two)[1]


def test_what_cannot_cross_is_named() -> None:
    with pytest.raises(
        ModelError, match=r"'h\['x'\]' is of type object where it crosses a cut; what crosses is tensors"
    ):
        take_apart("h", {"x": object()})


def test_inference_tells_how_a_value_is_put_together() -> None:
    class Both(nn.Module):
        def forward(self, hidden: Tensor) -> dict[str, Any]:
            return {"hidden": hidden, "same": [hidden], "size": hidden.shape[1]}

    class Sum(nn.Module):
        def forward(self, given: dict[str, Any]) -> Tensor:
            return given["hidden"] + given["same"][0] * given["size"]

    chain = Chain.from_modules([nn.Linear(4, 3), Both(), Sum()], CallableLoss(nn.functional.mse_loss))
    crossing = chain.infer([1, 2], {"input": torch.ones(5, 4), "target": torch.ones(5, 3)})[2]
    assert isinstance(crossing, Crossing)
    assert parts_of(crossing, ["hidden", "other"]) == ("hidden['hidden']", "hidden['same'][0]", "other")
    assert [spec.same_as for spec in crossing] == [None, "hidden['hidden']"]
    assert str(nests_of(crossing)["hidden"]) == "{'hidden': a tensor, 'same': [a tensor], 'size': 3}"
