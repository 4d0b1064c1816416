"""Planning on paper: speeds, shares of time, limits, and how it is told."""

from __future__ import annotations

import json
from typing import Any

import pytest
from analytic_toys import DEVICE, MIB, machine, model

from vpipe.errors import PlanError
from vpipe.plan.policy import Policy
from vpipe.planner.estimate.analytic import Precision
from vpipe.planner.estimate.estimate import SHARES, Estimate, estimate
from vpipe.planner.explain.analytic import estimate_lines, estimate_to_dict


def found(num_ranks: int = 2, batch_size: int = 8, memory_limit: int = 1 << 30, **changes: Any) -> Estimate:
    options = {name: changes.pop(name) for name in ("schedules", "policies", "stages_per_rank") if name in changes}
    sizes = changes.pop("sizes", (1,))
    toy = changes.pop("model", None) or model(sizes=sizes)
    return estimate(toy, machine(**changes), num_ranks, batch_size, memory_limit=memory_limit, **options)


def test_speeds_follow_from_the_step() -> None:
    # Every microbatch takes 8 blocks x 6 ms; in 1F1B of two equal stages, 9 slots of 24 ms, and messages.
    result = found()
    step = result.plan.step_ms
    assert step == pytest.approx(9 * 24, rel=0.02)
    assert result.samples_per_s == pytest.approx(8000 / step)
    assert result.tokens_per_s == pytest.approx(128 * 8000 / step)
    assert result.model_flops_per_sample == 3 * 8 * 10**9
    # Half of 1 TFLOP/s is reached, in 8 of 9 slots.
    assert result.model_tflops_per_device == pytest.approx(0.5 * 8 / 9, rel=0.02)
    assert result.utilisation == result.model_tflops_per_device


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "interleaved", "zb-h1", "pipedream"])
@pytest.mark.parametrize("memory_limit", [1 << 30, 7 * MIB])
def test_shares_of_time_are_all_there_is(schedule: str, memory_limit: int) -> None:
    per_rank = 2 if schedule == "interleaved" else None
    result = found(schedules=(schedule,), stages_per_rank=per_rank, memory_limit=memory_limit)
    assert set(result.shares) == set(SHARES)
    assert sum(result.shares.values()) == pytest.approx(1)
    assert min(result.shares.values()) >= -1e-9
    products = 8 * 8 * 6 / (2 * result.plan.step_ms)
    assert result.shares["products"] == pytest.approx(products)


def test_a_rank_of_several_devices_is_faster_and_exchanges() -> None:
    alone, split = found(), found(devices_per_rank=2)
    assert split.num_devices == 4
    assert alone.plan.step_ms / 2 < split.plan.step_ms < alone.plan.step_ms
    assert split.shares["exchange"] > 0 == alone.shares["exchange"]


def test_memory_makes_blocks_recompute_and_that_costs() -> None:
    roomy, tight = found(), found(memory_limit=7 * MIB, policies=(Policy.KEEP, Policy.RECOMPUTE))
    assert roomy.unlimited_ms is None
    assert Policy.RECOMPUTE in tight.plan.policies
    assert tight.unlimited_ms == pytest.approx(roomy.plan.step_ms)
    assert tight.plan.step_ms > roomy.plan.step_ms
    assert tight.shares["recompute"] > 0
    assert max(memory.total for memory in tight.plan.memory) <= 7 * MIB


def test_of_several_microbatch_sizes_the_best_is_taken() -> None:
    # A microbatch of 2 takes as long as one of 1 here, so half as many are twice as fast.
    result = found(sizes=(1, 2))
    assert result.plan.setting.microbatch_size == 2


def test_what_never_fits_is_refused_with_the_least_that_does() -> None:
    with pytest.raises(PlanError, match=r"cannot be kept: the smallest that can is (\d+) bytes") as error:
        found(memory_limit=MIB)
    least = int(str(error.value).split("smallest that can is ")[1].split()[0])
    assert max(memory.total for memory in found(memory_limit=least).plan.memory) <= least
    with pytest.raises(PlanError, match="cannot be kept"):
        found(memory_limit=least - 1)


def test_more_ranks_than_blocks_are_refused() -> None:
    with pytest.raises(PlanError, match="the model's 8 blocks cannot be cut into 9 stages; use fewer ranks"):
        found(num_ranks=9)


def test_the_text_says_what_is_assumed_and_what_limits() -> None:
    text = "\n".join(estimate_lines(found(num_ranks=4, batch_size=4)))
    for words in (
        "Model: toy, 80,000 parameters, 8 blocks (2 kinds), 128 tokens per sample",
        "Devices: 4 x toy (4 ranks): 50% of 1 TFLOP/s bf16, 100% of 1 GB/s, at least 10 us per operation",
        "Links between ranks: wire, 100 us, 0.5 GB/s; to the host: 1 GB/s",
        "Bytes per parameter: 16 (weights 2, gradients 2, optimizer 12); activations in bf16",
        "tokens/s",
        "of the peak (MFU)",
        "matrix products",
        "Limited by",
        "Plan: 1f1b, 4 x 1 samples",
        "block.0 to block.1",
        "all kept",
        "The smallest memory that would do:",
    ):
        assert words in text
    assert "Without a limit of memory" not in text


def test_the_text_names_the_wait_when_that_is_the_limit() -> None:
    text = "\n".join(estimate_lines(found(num_ranks=8, batch_size=2)))
    assert "Limited by waiting while the pipeline fills and drains: a larger --batch-size" in text


def test_the_text_tells_the_price_of_memory_and_of_splitting() -> None:
    text = "\n".join(estimate_lines(found(memory_limit=7 * MIB, policies=(Policy.KEEP, Policy.RECOMPUTE), swaps=False)))
    assert "Without a limit of memory:" in text
    assert "recomputed" in text
    assert "to the host: not used" in text
    split = "\n".join(estimate_lines(found(devices_per_rank=2)))
    assert "The 2 devices of a rank split every block evenly" in split
    assert "(2 ranks of 2)" in split


def test_of_many_stages_some_are_shown() -> None:
    result = found(num_ranks=20, batch_size=20, model=model(40))
    short, long = estimate_lines(result), estimate_lines(result, all_stages=True)
    assert len(long) == len(short) + 8 - 1
    assert "  ... 8 more (--all-stages shows them)" in short


def test_json_is_a_plan_file_with_the_estimate_beside_it() -> None:
    result = found(memory_limit=7 * MIB, precision=Precision("bf16", 2, 4, 12))
    content = json.loads(json.dumps(estimate_to_dict(result)))
    assert content["policies"] == list(result.plan.policies)
    told = content["estimate"]
    assert set(told) == {
        "model", "num_parameters", "tokens_per_sample", "num_blocks", "device", "num_devices", "devices_per_rank",
        "assumed", "step_s", "samples_per_s", "tokens_per_s", "model_tflops_per_device", "utilisation", "time_shares",
        "recomputed_blocks", "swapped_blocks", "policy_costs", "expected_error", "unlimited_step_s",
        "smallest_limit_bytes",
    }  # fmt: skip
    assert told["step_s"] == pytest.approx(content["predicted"]["step_ms"] / 1000)
    assert told["assumed"]["matmul_fraction"] == DEVICE.matmul_fraction["bf16"]
    assert told["assumed"]["gradient_bytes"] == 4
    assert told["assumed"]["memory_limit_bytes"] == 7 * MIB
    assert sum(told["time_shares"].values()) == pytest.approx(1)
    assert told["recomputed_blocks"] + told["swapped_blocks"] > 0
