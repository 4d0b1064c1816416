"""What makes two blocks alike, and two profiles of the same thing."""

from __future__ import annotations

import hashlib
import inspect
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from vpipe.config import RunConfig
from vpipe.config.fields import show
from vpipe.config.planning.profiled import describe_host, model_keys
from vpipe.model.chain import Chain, ValueSpec
from vpipe.model.infer import build_on_meta
from vpipe.workload.setup import Setup

__all__ = ["block_signature", "describe_machine", "describe_model", "profile_fingerprint"]

_PLAIN = (bool, int, float, str, tuple, type(None))
_ADDRESS = re.compile(" at 0x[0-9a-f]+")
_FORMAT = 6
"""Raised when other things are measured, or in another way: older profiles are not used again then."""


def block_signature(chain: Chain, index: int, specs: Mapping[int, tuple[ValueSpec, ...]]) -> str:
    """Return a hash that two blocks share if they have the same structure and the same shapes arrive at and leave them.

    Structure is the modules' classes, plain attributes, parameters and buffers, but no values of weights.
    """
    block = chain.blocks[index]
    arriving = {spec.name: (spec.shape, spec.dtype, spec.requires_grad) for spec in specs[index]}
    leaving = [(spec.shape, spec.dtype, spec.requires_grad) for spec in specs.get(index + 1, ())]
    read = [arriving.get(name, name) for name in block.inputs]  # a field of the batch is itself
    return _digest(list(_structure(build_on_meta(block))), read, sorted(map(str, arriving.values())), leaving)


def profile_fingerprint(setup: Setup, sizes: Sequence[int], device: torch.device, num_threads: int) -> str:
    """Return a hash of everything that the figures depend on: model, its code, data, sizes, optimizer and machine.

    What leaves the times alone is not in it, such as learning rate and seed.
    """
    chain = setup.chain
    blocks = [
        (block.name, block.inputs, block.outputs, list(_structure(build_on_meta(block)))) for block in chain.blocks
    ]
    fields = sorted((name, spec.shape_per_sample, str(spec.dtype)) for name, spec in setup.source.fields.items())
    machine = describe_machine(setup.config, device, num_threads)
    return _digest(
        _FORMAT, blocks, fields, _ADDRESS.sub("", repr(chain.loss)), chain.tied, list(sizes),
        sorted(describe_model(setup).items()), sorted(machine.items()), sorted(_sources(chain)),
    )  # fmt: skip


def describe_model(setup: Setup) -> dict[str, str]:
    """Return the keys of the run that decide what its blocks cost, with what the data says of those left open."""
    keys, ids = model_keys(setup.config), setup.source.fields.get("input_ids")
    known = {"model.vocab_size": setup.vocab_size, "data.sequence_length": ids and ids.shape_per_sample[0]}
    return keys | {key: show(value) for key, value in known.items() if value is not None and keys[key] == show(None)}


def describe_machine(config: RunConfig, device: torch.device, num_threads: int) -> dict[str, str]:
    """Say what is measured on, and how many ranks are busy at once."""
    return {
        **describe_host(config, num_threads),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "platform": platform.platform(),
    }


def _structure(module: nn.Module) -> Iterator[object]:
    for path, part in module.named_modules():
        kind = type(part)
        plain = sorted((key, repr(value)) for key, value in vars(part).items() if isinstance(value, _PLAIN))
        tensors = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        shapes = [(name, tuple(item.shape), str(item.dtype), item.requires_grad) for name, item in tensors]
        yield path, f"{kind.__module__}.{kind.__qualname__}", part.extra_repr(), plain, shapes


def _sources(chain: Chain) -> set[str]:
    """Return hashes of the files that the classes of the model's modules come from, where these are not torch's."""
    kinds = {type(part) for block in chain.blocks for part in build_on_meta(block).modules()}
    files = {inspect.getsourcefile(kind) for kind in kinds if not kind.__module__.startswith("torch.")}
    return {hashlib.blake2b(Path(file).read_bytes()).hexdigest() for file in files if file and Path(file).is_file()}


def _digest(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
