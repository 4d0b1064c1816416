"""The trained weights: every rank writes the shards of its stages, rank 0 the index that joins them."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor, nn

from vpipe.model.block import Block
from vpipe.model.export import save_shard, write_config, write_index
from vpipe.model.zoo import transformers_config_of
from vpipe.runtime.comm.world import World
from vpipe.runtime.pipeline import Pipeline
from vpipe.workload.setup import Setup

__all__ = ["save_model"]

logger = logging.getLogger(__name__)


def save_model(pipeline: Pipeline, setup: Setup, directory: Path, world: World) -> None:
    """Write the newest weights to `directory`, from where transformers loads a BERT, GPT or Llama; collective.

    The shards of a user's own model hold together what the `state_dict` of its modules would, shared weights under all
    their names.

    Raises:
        ModelError: `directory` already holds a model.
    """
    num_stages, model = pipeline.plan.cut.num_stages, setup.config.model
    config = transformers_config_of(model, setup.vocab_size)
    for stage, held in pipeline.held.items():
        blocks = range(held.stage.start, held.stage.stop)
        states = {
            block: _tensors(pipeline.chain.blocks[block], module)
            for block, module in zip(blocks, held.weights.newest, strict=True)
        }
        save_shard(directory, pipeline.chain, states, stage, num_stages, tied_copies=config is None)
    world.meet("all ranks to save their stages")
    if world.rank == 0:
        write_index(directory, pipeline.chain, num_stages)
        if config is not None:
            write_config(directory, config, tie_weights=model.tie_weights)


def _tensors(block: Block, module: nn.Module) -> dict[str, Tensor]:
    """Return the state of a block as far as a file of tensors can hold it."""
    state = module.state_dict()
    others = [block.global_name(name) for name, item in state.items() if not isinstance(item, Tensor)]
    if others:
        logger.warning("What is no tensor is not saved with the model: %s", ", ".join(others))
    return {name: item for name, item in state.items() if isinstance(item, Tensor)}
