"""Times out of counts and data sheets, against the closed forms."""

from __future__ import annotations

import pytest
from analytic_toys import DEVICE, MIB, machine, model, work

from vpipe.errors import PlanError
from vpipe.planner.estimate.analytic import Operation, Precision, analytic_profile, operation_ms
from vpipe.planner.estimate.devices import LINKS


@pytest.mark.parametrize(
    ("operation", "expected_ms"),
    [
        (Operation("mm", 10**9, 1000), 2.0),  # at half of the peak
        (Operation("add", 0, 3 * 10**6), 3.0),
        (Operation("mm", 10**9, 5 * 10**6), 5.0),  # whichever takes longer
        (Operation("tiny", 0, 1), 0.01),  # a kernel's start
        (Operation("tiny", 0, 1, count=7), 0.07),
    ],
)
def test_an_operation_takes_the_longest_of_three_times(operation: Operation, expected_ms: float) -> None:
    assert operation_ms(operation, machine()) == pytest.approx(expected_ms)


def test_a_block_is_the_sum_of_its_operations() -> None:
    block = analytic_profile(model(), machine()).sizes[0].blocks[0]
    assert (block.forward_ms, block.input_grad_ms, block.weight_grad_ms) == pytest.approx((2, 2, 2))
    assert block.recompute_ms == block.forward_ms
    assert (block.activation_bytes, block.input_bytes, block.output_bytes) == (MIB, MIB // 8, MIB // 8)


def test_bytes_per_parameter_are_those_of_the_precision() -> None:
    block = analytic_profile(model(), machine(precision=Precision("bf16", 2, 4, 12))).sizes[0].blocks[0]
    # Gradients count as much as the weights in a profile, so the rest of theirs is with the optimizer.
    assert (block.parameter_bytes, block.optimizer_bytes) == (20_000, 140_000)
    assert 2 * block.parameter_bytes + block.optimizer_bytes == 10_000 * (2 + 4 + 12)
    assert block.step_ms == pytest.approx(10_000 * (2 * 12 + 4 + 2) / 1e6)


def test_tied_weights_are_exchanged_before_an_update() -> None:
    alone, tied = (analytic_profile(model(tied_parameters=n), machine()).sizes[0].blocks[0] for n in (0, 10_000))
    assert tied.step_ms - alone.step_ms == pytest.approx(10_000 * 2 / 0.5e6)


def test_devices_of_a_rank_share_work_and_bytes_and_exchange_results() -> None:
    block = analytic_profile(model(), machine(devices_per_rank=4)).sizes[0].blocks[0]
    link = LINKS[DEVICE.link]
    exchange = 2 * 3 * (MIB / 8 / 4 / (link.gb_per_s * 1e6) + link.latency_us / 1e3)
    assert block.forward_ms == pytest.approx(2 / 4 + exchange)
    assert block.input_grad_ms == pytest.approx(2 / 4 + exchange)
    assert block.weight_grad_ms == pytest.approx(2 / 4)
    assert (block.activation_bytes, block.output_bytes, block.parameter_bytes) == (MIB // 4, MIB // 32, 5000)


def test_links_of_the_machine_are_those_of_the_profile() -> None:
    profile = analytic_profile(model(sizes=(1, 2)), machine())
    assert (profile.link.latency_ms, profile.link.bytes_per_ms) == (0.1, 0.5e6)
    assert profile.host is not None
    assert profile.host.bytes_per_ms == 1e6
    assert profile.microbatch_sizes == (1, 2)
    assert analytic_profile(model(), machine(swaps=False)).host is None


def test_equal_estimates_have_equal_fingerprints() -> None:
    first, again, other = (
        analytic_profile(model(), machine(precision=Precision(gradient_bytes=size))) for size in (2, 2, 4)
    )
    assert first.fingerprint == again.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        (Precision("fp16"), "toy has no peak for fp16; use one of bf16, fp32"),
        (Precision("bf16", 4, 2), "gradients of 2 bytes with weights of 4"),
    ],
)
def test_impossible_precisions_are_refused(precision: Precision, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        machine(precision=precision)


def test_activations_of_tf32_are_fp32() -> None:
    assert Precision("tf32").activation_type == "fp32"
    assert work().forward_flops == 10**9
