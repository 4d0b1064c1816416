"""What makes two blocks alike, and two profiles of the same thing."""

from __future__ import annotations

import hashlib
import inspect
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from vpipe._version import __version__
from vpipe.config import RunConfig
from vpipe.model.chain import Chain, ValueSpec
from vpipe.model.infer import build_on_meta
from vpipe.train.setup import Setup

__all__ = ["block_signature", "describe_machine", "profile_fingerprint"]

_PLAIN = (bool, int, float, str, tuple, type(None))
_ADDRESS = re.compile(" at 0x[0-9a-f]+")
_FORMAT = 5
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
    """Return a hash of everything that the figures depend on: model, its code, data, sizes, optimizer and machine."""
    config, chain = setup.config, setup.chain
    blocks = [
        (block.name, block.inputs, block.outputs, list(_structure(build_on_meta(block)))) for block in chain.blocks
    ]
    fields = sorted((name, spec.shape_per_sample, str(spec.dtype)) for name, spec in setup.source.fields.items())
    machine = describe_machine(config, device, num_threads)
    return _digest(
        _FORMAT, blocks, fields, _ADDRESS.sub("", repr(chain.loss)), chain.tied, list(sizes), config.train.batch_size,
        config.optimizer.model_dump_json(), config.data.model_dump_json(), config.seed, sorted(machine.items()),
        sorted(_sources(chain)),
    )  # fmt: skip


def describe_machine(config: RunConfig, device: torch.device, num_threads: int) -> dict[str, str]:
    """Say what is measured on, and how many ranks are busy at once."""
    launch = config.launch
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "ranks": str(config.num_ranks),
        "threads_per_rank": str(num_threads),
        "link": f"{launch.distributed_backend or 'default'}{' in shared memory' * launch.shared_memory}, "
        f"{launch.link_latency_ms} ms and "
        f"{launch.link_bandwidth_mb_per_s or 'no limit of'} MB/s added",
        "platform": platform.platform(),
        "torch": torch.__version__,
        "vpipe": __version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


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
