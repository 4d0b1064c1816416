"""The weights that a run leaves, as a PyTorch user reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from train_toys import write_chain_config

from vpipe.config import load_config
from vpipe.config.entry import load_entry
from vpipe.runtime.comm.world import World
from vpipe.train.trainer import Trainer


def test_a_module_that_stands_twice_loads_what_was_saved(tmp_path: Path) -> None:
    overrides = ["model.entry=chain_toys.py:shared", "pipeline.num_ranks=1", "train.iterations=1"]
    with World.join(timeout_seconds=60) as group:
        trainer = Trainer(load_config(write_chain_config(tmp_path), overrides), tmp_path, group)
        trainer.run()
        expected = trainer.pipeline.state_dict()
    (shard,) = (tmp_path / "model").glob("*.safetensors")
    saved = load_file(shard)
    assert list(saved) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    model.load_state_dict(saved)
    assert torch.equal(layer.weight, saved["0.weight"])


def test_the_users_own_module_loads_what_stages_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    overrides = ["model.entry=chain_toys.py:named", "pipeline.num_ranks=1", "train.iterations=2"]
    overrides += ["pipeline.schedule=interleaved", "pipeline.stages_per_rank=2"]
    with World.join(timeout_seconds=60) as group:
        trainer = Trainer(load_config(write_chain_config(tmp_path), overrides), tmp_path, group)
        trainer.run()
        expected = trainer.pipeline.state_dict()
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) == 2
    saved = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    model = load_entry("model.entry", "chain_toys.py:named_modules", tmp_path)()
    assert set(saved) == set(model.state_dict()) - {"head._extra_state"}
    assert "What is no tensor is not saved with the model: head._extra_state" in caplog.messages
    model.load_state_dict({**saved, "head._extra_state": "mine"})
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items() if name in saved)
    assert torch.equal(model.head.weight, expected["stem.weight"])
    assert torch.equal(model.body.norm.running_mean, expected["body.norm.running_mean"])
