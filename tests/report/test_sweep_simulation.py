"""Simulated combinations: the planner's own figures."""

from __future__ import annotations

from pathlib import Path

import pytest
from sweep_toys import write_config

from vpipe.config import load_config
from vpipe.errors import PlanError, VPipeError
from vpipe.planner.profile.profile import BlockProfile, Profile, SizeProfile
from vpipe.report.sweep.simulation import simulate_run


def profile(num_blocks: int = 9) -> Profile:
    def blocks(samples: int) -> tuple[BlockProfile, ...]:
        return tuple(
            BlockProfile(
                name=f"block.{index}",
                forward_ms=float(samples),
                input_grad_ms=float(samples),
                weight_grad_ms=float(samples),
                recompute_ms=float(samples),
                activation_bytes=1000 * samples,
                input_bytes=100 * samples,
                output_bytes=100 * samples if index < num_blocks - 1 else 0,
                parameter_bytes=500 * (1 + 8 * (index == 0)),
            )
            for index in range(num_blocks)
        )

    return Profile("toy", {"cpu": "toy"}, tuple(SizeProfile(samples, blocks(samples)) for samples in (1, 2, 4)))


def simulated(folder: Path, *overrides: str) -> dict[str, float | None]:
    return dict(simulate_run(load_config(write_config(folder), overrides), profile()).metrics)


def test_closed_form_of_1f1b(tmp_path: Path) -> None:
    # Three equal stages of three blocks, microbatches of two samples: F = 6 ms, B = 12 ms, (m + p - 1)(F + B).
    found = simulated(tmp_path)
    assert found["iteration_ms"] == pytest.approx((4 + 2) * 18)
    assert found["samples_per_second"] == pytest.approx(8 / 108e-3)
    assert found["bubble_fraction"] == pytest.approx(2 / 6)


def test_recomputation_costs_time_and_saves_memory(tmp_path: Path) -> None:
    keep, half, whole = (simulated(tmp_path, f"pipeline.recompute_ratio={ratio}") for ratio in (0, 0.5, 1))
    for less, more in ((keep, half), (half, whole)):
        assert (less["iteration_ms"] or 0) < (more["iteration_ms"] or 0)
        assert (less["predicted_memory_bytes"] or 0) > (more["predicted_memory_bytes"] or 0)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1", "pipedream", "interleaved"])
def test_schedules_and_partitions(tmp_path: Path, schedule: str) -> None:
    uniform = simulated(tmp_path, f"pipeline.schedule={schedule}")
    assert 0 <= (uniform["bubble_fraction"] or 0) < 1
    if schedule != "interleaved":
        uneven = simulated(tmp_path, f"pipeline.schedule={schedule}", "plan.partition=[1,7,1]")
        assert (uneven["iteration_ms"] or 0) > (uniform["iteration_ms"] or 0)
        parameters = simulated(tmp_path, f"pipeline.schedule={schedule}", "plan.partition=parameters")
        assert (parameters["iteration_ms"] or 0) > (uniform["iteration_ms"] or 0)


def test_an_asynchronous_pipeline_has_no_bubble_in_its_steady_state(tmp_path: Path) -> None:
    assert simulated(tmp_path, "pipeline.schedule=pipedream")["bubble_fraction"] == pytest.approx(0, abs=1e-9)


def test_what_is_left_open_is_planned(tmp_path: Path) -> None:
    uneven, planned = (simulated(tmp_path, f"plan.partition={cut}") for cut in ("[1,7,1]", "auto"))
    assert planned["iteration_ms"] == pytest.approx(simulated(tmp_path)["iteration_ms"])
    assert (planned["iteration_ms"] or 0) < (uneven["iteration_ms"] or 0)


def test_a_limit_that_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot be kept .*the smallest that can"):
        simulated(tmp_path, "plan.memory_limit=1KiB")


def test_a_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path))
    with pytest.raises(PlanError, match="the profile: is of a model of 8 blocks, and the run's has 9"):
        simulate_run(config, profile(8))


def test_sizes_that_were_not_measured_are_refused(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path), ["batch_size=64"])
    with pytest.raises(VPipeError, match="16"):
        simulate_run(config, profile())
