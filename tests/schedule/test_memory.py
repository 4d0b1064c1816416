from __future__ import annotations

from collections.abc import Callable

from vpipe.schedule.memory import peak_activations
from vpipe.schedule.placement import Placement
from vpipe.schedule.schedule import Schedule


def test_a_split_backward_holds_its_microbatch_until_the_weight_gradient(draw: Callable[..., Schedule]) -> None:
    assert peak_activations(draw("0F0 0I0 0F1 0I1 0W0 0W1 0STEP1")) == (2,)
    assert peak_activations(draw("0F0 0I0 0W0 0F1 0I1 0W1 0STEP1")) == (1,)


def test_one_of_several_stages_counts_its_share(draw: Callable[..., Schedule]) -> None:
    order = "0F0 1F0 0F1 1B0 0B0 1F1 1B1 0B1 0STEP1 1STEP1"
    assert peak_activations(draw(order, placement=Placement(1, 2))) == (1.5,)
