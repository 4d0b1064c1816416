"""What the profiler says of a chain whose bytes can be counted by hand."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from train_toys import write_chain_config

from vpipe.config import load_config
from vpipe.errors import PlanError
from vpipe.measure import links
from vpipe.measure.profile import profile_config
from vpipe.planner.profile.profile import Profile
from vpipe.runtime.comm.message import ALIGNMENT

WIDTH, SAMPLES = 6, 2
VALUE = 4 * WIDTH * SAMPLES


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    path = write_chain_config(tmp_path_factory.mktemp("profile"))
    return profile_config(load_config(path))


def test_it_counts_what_a_layer_holds(profile: Profile) -> None:
    (size,) = profile.sizes
    assert size.microbatch_size == SAMPLES
    assert [block.name for block in size.blocks] == [f"block.{index}" for index in range(4)]
    first, *middle, last = size.blocks
    for block in middle:
        assert block.parameter_bytes == 4 * (WIDTH * WIDTH + WIDTH)
        assert block.input_bytes == VALUE
        assert block.output_bytes == 2 * ALIGNMENT  # a header, and the value
        assert 0 < block.small_bytes == block.activation_bytes
        # The input, what tanh gave, and the dropout's noise.
        assert block.activation_bytes == 3 * VALUE
        assert block.weight_grad_bytes >= 2 * VALUE  # the layer's input, and the gradient of its output
        assert block.optimizer_bytes >= 2 * block.parameter_bytes  # adamw's two means
    assert first.input_bytes == 0  # the batch's fields are nobody's
    assert last.output_bytes == 0


def test_it_times_everything(profile: Profile) -> None:
    for block in profile.sizes[0].blocks:
        times = (block.forward_ms, block.input_grad_ms, block.weight_grad_ms, block.step_ms)
        # What is measured without the block is taken off, so a busy machine may leave nothing of a small one.
        assert min(*times, block.recompute_ms, block.swap_ms, block.version_ms) >= 0
    assert sum(block.forward_ms + block.weight_grad_ms for block in profile.sizes[0].blocks) > 0
    assert profile.host is not None
    assert profile.host_share >= 0


def test_copies_are_measured_where_the_run_swaps_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[object] = []

    def make(*, prefix: str, dir: Path | None) -> tempfile._TemporaryFileWrapper[bytes]:
        used.append(dir)
        return temporary(prefix=prefix, dir=dir)

    temporary = tempfile.NamedTemporaryFile
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", make)
    assert links._copy_rate(torch.device("cpu"), tmp_path) > 0
    assert used == [tmp_path]
    with pytest.raises(PlanError, match=r"plan\.swap_directory = '.*none' cannot be written to \(No such file"):
        links._copy_rate(torch.device("cpu"), tmp_path / "none")


def test_a_microbatch_larger_than_the_batch_is_refused(tmp_path: Path) -> None:
    config = load_config(write_chain_config(tmp_path))
    with pytest.raises(PlanError, match=r"microbatches of 9 samples do not fit train\.batch_size 8"):
        profile_config(config, microbatch_sizes=[9])
