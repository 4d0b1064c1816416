"""The weights that a run leaves, as a PyTorch user reads them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from train_toys import write_chain_config

from vpipe.config import load_config
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
