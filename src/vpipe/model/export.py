"""Weights of a chain into a directory that transformers loads: each stage writes its shard, then one rank the rest."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vpipe.errors import ModelError
from vpipe.model.chain import Chain
from vpipe.model.infer import build_on_meta
from vpipe.model.pretrained import INDEX_FILE, WEIGHTS_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["save_shard", "shard_path", "write_config", "write_index"]

_ARCHITECTURES = {"bert": "BertForPreTraining", "gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}
# transformers expects both names of an untied output bias; it reads only the first.
_UNREAD_COPIES = {"cls.predictions.decoder.bias": "cls.predictions.bias"}


def shard_path(directory: Path | str, stage: int, num_stages: int) -> Path:
    """Return the file of one stage's weights, named as transformers names shards."""
    return Path(directory) / f"model-{stage + 1:05}-of-{num_stages:05}.safetensors"


def save_shard(
    directory: Path | str,
    chain: Chain,
    states: Mapping[int, Mapping[str, Tensor]],
    stage: int,
    num_stages: int,
    *,
    tied_copies: bool = False,
) -> Path:
    """Write the blocks of one stage, given as block index -> the module's `state_dict`, under model-wide names.

    Of tied parameters only the first of the group is written, as transformers expects; with `tied_copies` all of them,
    as a module's own `load_state_dict` does. Returns the file, which appears when it is complete.

    Raises:
        ModelError: the directory holds a model in a single file, which transformers would load instead, or the file
            cannot be written.
    """
    path = shard_path(directory, stage, num_stages)
    if (path.parent / WEIGHTS_FILE).exists():
        raise ModelError(f"'{path.parent}' already holds a {WEIGHTS_FILE}; remove it or save to another directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_suffix(".partial")
    try:
        dropped = set() if tied_copies else _tied_copies(chain)
        save_file(_shard_tensors(chain, states, dropped), partial_path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise ModelError(
            f"cannot write the weights to '{path}': {error}; free some space, or save elsewhere"
        ) from error
    return partial_path.replace(path)


def write_index(directory: Path | str, chain: Chain, num_stages: int) -> Path:
    """Write the index of all stages' shards, once all of them are there.

    Raises:
        ModelError: a shard is missing, or the shards do not hold all of the chain.
    """
    file_of: dict[str, str] = {}
    total_bytes = 0
    for stage in range(num_stages):
        path = shard_path(directory, stage, num_stages)
        if not path.is_file():
            raise ModelError(f"'{path}' is missing; every stage saves its shard before the index is written")
        with safe_open(path, framework="pt") as file:
            file_of.update(dict.fromkeys(file.keys(), path.name))
        total_bytes += _data_bytes(path)
    if missing := sorted(_all_names(chain) - set(file_of)):
        raise ModelError(f"the shards in '{directory}' lack {len(missing)} tensors of the model, first '{missing[0]}'")
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(file_of.items()))}
    path = Path(directory) / INDEX_FILE
    path.write_text(json.dumps(index, indent=2) + "\n")
    return path


def write_config(directory: Path | str, config: PreTrainedConfig, *, tie_weights: bool) -> Path:
    """Write the `config.json` with which transformers' class for such a model loads the shards by `from_pretrained`."""
    config = copy.deepcopy(config)
    config.tie_word_embeddings = tie_weights
    config.architectures = [_ARCHITECTURES[config.model_type]]
    config.save_pretrained(directory)
    return Path(directory) / "config.json"


def _shard_tensors(
    chain: Chain, states: Mapping[int, Mapping[str, Tensor]], dropped: Collection[tuple[int, str]]
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    written: set[int] = set()
    for block, state in states.items():
        for local, tensor in state.items():
            if (block, local) in dropped:
                continue
            value = tensor.detach().cpu().contiguous()
            # safetensors refuses tensors that share memory.
            if value.untyped_storage().data_ptr() in written:
                value = value.clone()
            written.add(value.untyped_storage().data_ptr())
            name = chain.blocks[block].global_name(local)
            tensors[name] = value
            if name in _UNREAD_COPIES:
                tensors[_UNREAD_COPIES[name]] = value.clone()
    return tensors


def _data_bytes(path: Path) -> int:
    """Return the size of a safetensors file without its header, whose length stands in the first eight bytes."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def _tied_copies(chain: Chain) -> set[tuple[int, str]]:
    return {(ref.block, ref.name) for group in chain.tied for ref in group[1:]}


def _all_names(chain: Chain) -> set[str]:
    dropped = _tied_copies(chain)
    return {
        block.global_name(local)
        for index, block in enumerate(chain.blocks)
        for local, item in build_on_meta(block).state_dict().items()
        if (index, local) not in dropped and isinstance(item, Tensor)
    }
