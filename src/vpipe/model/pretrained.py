"""Weights of transformers' models into blocks: each rank reads only the tensors of the blocks that it owns."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vpipe.errors import ModelError
from vpipe.model.chain import Block, Chain
from vpipe.model.infer import build_on_meta
from vpipe.model.initialise import initialise_meta

__all__ = ["INDEX_FILE", "WEIGHTS_FILE", "Weights", "check_weights", "initialise_from", "load_block", "open_weights"]

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Ends of names, and under which other ends files hold the same tensor: as BERT's first checkpoints named it, and as the
# one name that is kept of two tied tensors.
_OTHER_NAMES = (
    (".LayerNorm.weight", ".LayerNorm.gamma"),
    (".LayerNorm.bias", ".LayerNorm.beta"),
    ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ("cls.predictions.bias", "cls.predictions.decoder.bias"),
)
# Constants that older versions of transformers saved.
_NO_WEIGHTS = ("position_ids",)
_SHOWN_REASONS = 5


class Weights(Protocol):
    """Named tensors that are read one at a time."""

    @property
    def names(self) -> Collection[str]:
        """Name all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""

    def read(self, name: str) -> Tensor:
        """Read one tensor to the CPU."""


@dataclass(frozen=True)
class _Mapped:
    tensors: Mapping[str, Tensor]

    @property
    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


@dataclass(frozen=True)
class _Stored:
    file_of: Mapping[str, Path]

    @property
    def names(self) -> Collection[str]:
        return self.file_of.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self.file_of[name], framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        with safe_open(self.file_of[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor


def open_weights(source: Path | str | Mapping[str, Tensor]) -> Weights:
    """Open a transformers directory with safetensors, in one file or in shards with an index, or wrap a state_dict.

    Raises:
        ModelError: the directory has no such file, or one that cannot be read.
    """
    if isinstance(source, Mapping):
        return _Mapped(source)
    directory = Path(source)
    if (directory / WEIGHTS_FILE).is_file():
        return _Stored(dict.fromkeys(_names_in(directory / WEIGHTS_FILE), directory / WEIGHTS_FILE))
    if (directory / INDEX_FILE).is_file():
        return _Stored(_read_index(directory))
    reason = f"'{directory}' has neither {WEIGHTS_FILE} nor {INDEX_FILE}" if directory.is_dir() else "no such directory"
    fix = ""
    if (directory / "pytorch_model.bin").is_file():
        fix = "; it has pytorch_model.bin: load that with transformers and save_pretrained() it again"
    raise ModelError(f"cannot read weights from '{directory}': {reason}{fix}")


def _names_in(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read weights from '{path}': {error}; the file may be truncated") from error


def _read_index(directory: Path) -> dict[str, Path]:
    try:
        index = json.loads((directory / INDEX_FILE).read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ModelError(f"'{directory / INDEX_FILE}' is no index of safetensors files: {error!r}") from error
    file_of = {name: directory / file for name, file in index.items()}
    present = {path: set(_names_in(path)) for path in dict.fromkeys(file_of.values())}
    for name, path in file_of.items():
        if name not in present[path]:
            raise ModelError(f"'{path}' does not hold '{name}', which '{INDEX_FILE}' says it holds")
    return file_of


def check_weights(chain: Chain, weights: Weights) -> list[str]:
    """Return why `weights` are not those of `chain`: tensors missing, left over or of another shape."""
    reasons: list[str] = []
    used: set[str] = set()
    for block in chain.blocks:
        module = build_on_meta(block)
        reasons += _check_block(block, module, weights)
        names = [block.global_name(local) for local in module.state_dict()]
        used.update(alias for name in names for alias in _aliases(name))
    for name in sorted(set(weights.names) - used):
        if not name.endswith(_NO_WEIGHTS):
            reasons.append(f"'{name}' is there, and the model has no such parameter")
    return reasons + _check_tied(chain, weights)


def initialise_from(chain: Chain, source: Path | str | Mapping[str, Tensor]) -> Chain:
    """Return `chain` with blocks that start from the weights of a transformers directory or state_dict.

    A tensor is read when its block is materialised. Weights of a tied model may start an untied one.

    Raises:
        ModelError: the weights cannot be read, or are not those of the chain.
    """
    weights = open_weights(source)
    if reasons := check_weights(chain, weights):
        where = "the given state_dict" if isinstance(source, Mapping) else f"the weights in '{source}'"
        raise ModelError(f"{where} do not fit the model: {_join(reasons)}")
    blocks = tuple(replace(block, build=partial(_build_loaded, block, weights)) for block in chain.blocks)
    return replace(chain, blocks=blocks)


def load_block(block: Block, module: nn.Module, weights: Weights) -> None:
    """Copy the block's tensors into its `module`, in the module's types.

    Raises:
        ModelError: a tensor is missing or has another shape.
    """
    if reasons := _check_block(block, module, weights):
        raise ModelError(f"the weights do not fit block '{block.name}': {_join(reasons)}")
    with torch.no_grad():
        for local, tensor in module.state_dict().items():
            stored = _find(block.global_name(local), weights)
            assert stored is not None
            tensor.copy_(weights.read(stored))


def _build_loaded(block: Block, weights: Weights) -> nn.Module:
    if torch.get_default_device().type == "meta":
        return block.build()
    module = initialise_meta(block.name, block.build())
    load_block(block, module, weights)
    return module


def _check_block(block: Block, module: nn.Module, weights: Weights) -> list[str]:
    reasons = []
    for local, tensor in module.state_dict().items():
        name = block.global_name(local)
        stored = _find(name, weights)
        if stored is None:
            reasons.append(f"'{name}' is missing")
        elif weights.shape(stored) != tuple(tensor.shape):
            reasons.append(f"'{stored}' has shape {weights.shape(stored)}, the model needs {tuple(tensor.shape)}")
    return reasons


def _check_tied(chain: Chain, weights: Weights) -> list[str]:
    reasons = []
    for first, *others in chain.tied:
        source = chain.blocks[first.block].global_name(first.name)
        for ref in others:
            name = chain.blocks[ref.block].global_name(ref.name)
            there = source in weights.names and name in weights.names
            if there and not torch.equal(weights.read(source), weights.read(name)):
                reasons.append(f"'{name}' and '{source}' differ, and the model ties them; train it untied")
    return reasons


def _aliases(name: str) -> list[str]:
    return [name, *(name.removesuffix(ours) + theirs for ours, theirs in _OTHER_NAMES if name.endswith(ours))]


def _find(name: str, weights: Weights) -> str | None:
    return next((alias for alias in _aliases(name) if alias in weights.names), None)


def _join(reasons: list[str]) -> str:
    more = len(reasons) - _SHOWN_REASONS
    return "; ".join(reasons[:_SHOWN_REASONS]) + (f"; and {more} more" if more > 0 else "")
