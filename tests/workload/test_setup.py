"""A run's configuration becomes data, model and learning rates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from train_toys import write_chain_config

from vpipe.config import build_config, load_config
from vpipe.errors import ConfigError
from vpipe.workload.setup import build_setup

FLAT = {
    "model_type": "bert",
    "synthetic_data": True,
    "batch_size": 4,
    "epochs": 90,
    "learning_rate": 0.5,
    "learning_rate_policy": "step",
    "model": {"num_layers": 1, "hidden_size": 16},
    "data": {"synthetic_samples": 10, "sequence_length": 16},
}


def test_a_flat_file_with_steps_alone_trains_at_the_originals_rates() -> None:
    setup = build_setup(build_config(FLAT))
    assert (setup.iterations_per_epoch, setup.total_iterations) == (3, 270)
    rates = [setup.learning_rate(3 * epoch) for epoch in (0, 29, 30, 59, 60, 89)]
    assert rates == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005, 0.005])
    assert setup.learning_rate(89.75) == 0.5


@pytest.mark.parametrize(("last_batch", "sizes"), [("train", [4, 4, 2, 4, 4]), ("drop", [4, 4, 4, 4, 4])])
def test_an_epochs_last_batch_is_trained_or_dropped(last_batch: str, sizes: list[int]) -> None:
    setup = build_setup(build_config({**FLAT, "data": {**FLAT["data"], "last_batch": last_batch}}))
    assert setup.iterations_per_epoch == (3 if last_batch == "train" else 2)
    assert [batch.num_samples for batch in setup.batches(setup.chain.fields, 0, 5)] == sizes
    assert [setup.batch_size(iteration) for iteration in range(5)] == sizes
    assert setup.num_samples(5) == sum(sizes)


def test_sequences_that_the_model_has_no_positions_for() -> None:
    # What a prepared set does: it tells its length itself, so the configuration alone shows nothing wrong.
    config = build_config({**FLAT, "data": {"synthetic_samples": 10}})
    data = config.data.model_copy(update={"sequence_length": 32})
    model = config.model.model_copy(update={"max_position_embeddings": 16})
    with pytest.raises(
        ConfigError, match=r"max_position_embeddings is 16, and the data has sequences of 32 tokens; ra"
    ):
        build_setup(config.model_copy(update={"data": data, "model": model}))


def test_data_drawn_without_a_seed_are_those_of_the_run(tmp_path: Path) -> None:
    path, entry = write_chain_config(tmp_path), "data.entry=chain_toys.py:unseeded_data"
    setups = [build_setup(load_config(path, [entry, f"seed={seed}"])) for seed in (1, 1, 2)]
    first, again, other = (setup.source.batch([0, 7], ["input"])["input"] for setup in setups)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert setups[0].held_out is not None
    assert not torch.equal(first, setups[0].held_out.batch([0, 7], ["input"])["input"])
