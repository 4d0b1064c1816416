"""Joins this process to the other ranks of the run, and leaves them again without hanging."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

# Its functions have the group of all ranks as a default, as it is when the module is imported. If that happened later,
# by way of an optimizer, the group and its threads would never end.
import torch.distributed.nn.functional
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from vpipe.errors import ConfigError, LaunchError
from vpipe.runtime.comm.failure import attach_store, raise_if_peer_lost, report_failure
from vpipe.runtime.comm.wait import telling_losses

__all__ = [
    "ProcessGroup",
    "control_group",
    "destroy_process_group",
    "initialise_process_group",
    "meet",
    "process_group",
    "use_device",
]

logger = logging.getLogger(__name__)

BACKENDS = ("gloo", "nccl")

_GLOO_THREAD = "pt_gloo_runloop"
_THREADS = Path("/proc/self/task")
_RESTING_SECONDS = 30

_joined = itertools.count()
"""How often this process has joined; all ranks do so equally often."""


@dataclass(frozen=True)
class ProcessGroup:
    """One process among the ranks of the run."""

    rank: int
    num_ranks: int
    local_rank: int
    """Position among the ranks of this machine."""
    backend: str
    device: torch.device
    """Where this rank computes; for CUDA always with an index."""
    control: dist.ProcessGroup
    """A gloo group over all ranks, for small messages between their CPUs."""
    store: Store
    """Keys and values that all ranks see."""


@contextmanager
def process_group(
    backend: str | None, timeout_seconds: float, *, device: str | torch.device = "cpu"
) -> Iterator[ProcessGroup]:
    """Be a member of the process group inside the `with` block; all ranks leave it together.

    When the block raises, the other ranks are told why and the group is not destroyed: that would wait for peers which
    may be dead. The process is expected to end then; that of a single rank may go on, and join again.

    Raises:
        PeerLostError: another rank failed first; the text includes its message if it left one.
        ConfigError, LaunchError: as `initialise_process_group`.
    """
    try:
        group = initialise_process_group(backend, timeout_seconds, device=device)
        yield group
        destroy_process_group(group)
    except Exception as error:
        if dist.is_initialized() and dist.get_world_size() == 1:
            dist.destroy_process_group()
        report_failure(error)
        raise


def initialise_process_group(
    backend: str | None, timeout_seconds: float, *, device: str | torch.device = "cpu"
) -> ProcessGroup:
    """Join the ranks that torchrun's environment variables describe; without them, be the only rank.

    Args:
        backend: ``gloo`` or ``nccl``; None takes nccl if every rank has a CUDA device of its own.
        timeout_seconds: how long any wait for another rank may last.
        device: ``cpu``, ``cuda`` (the device is then chosen by the local rank) or ``cuda:<index>``.

    Raises:
        ConfigError: the backend is unknown or does not fit the device.
        LaunchError: torchrun's variables are incomplete, or the other ranks cannot be reached.
    """
    place = use_device(torch.device(device))
    _check_backend(backend, place)
    timeout = timedelta(seconds=timeout_seconds)
    store, rank, num_ranks = _connect(timeout)
    attach_store(store, rank)
    try:
        backend = _choose_backend(backend, place, store, rank, num_ranks)
        dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=timeout)
        control = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
        # A rank that is quick to find a mistake and ends would keep slower ones from connecting, and from finding it.
        dist.barrier(group=control)
    except RuntimeError as error:
        raise_if_peer_lost(error, "the process group to form")
        raise
    assert control is not None
    logger.info("Finished initializing process group; backend: %s, rank: %d, world size: %d", backend, rank, num_ranks)
    return ProcessGroup(rank, num_ranks, _local_rank(), backend, place, control, store)


def control_group(joined: ProcessGroup | None, timeout: timedelta) -> dist.ProcessGroup | None:
    """Return a gloo group of all ranks for losses and collectives; None for one rank.

    Whoever `joined` the ranks himself has one. Beside a process group that the caller made it is a new one, so that it
    never meets the caller's messages; collective.
    """
    if dist.get_world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=timeout) if joined is None else joined.control


def meet(group: ProcessGroup, what: str) -> None:
    """Wait until all ranks got here; collective. `what` says in an error what was waited for.

    Raises:
        PeerLostError: a rank ended before it got here.
    """
    with telling_losses(what):
        dist.barrier(group=group.control)


def destroy_process_group(group: ProcessGroup) -> None:
    """Wait until all ranks got here, then disconnect, so that no rank sees a peer leave early.

    Raises:
        PeerLostError: a rank ended before it got here.
    """
    meet(group, "the end of the run")
    dist.destroy_process_group()
    _let_threads_rest()


def _let_threads_rest() -> None:
    """Wait until gloo's threads have put down what they had in hand: a moment, unless the machine is very busy.

    A collective is over for who waited before the thread that did it lets go of its tensors. Where Python has dropped
    them meanwhile, that needs the interpreter, and torch aborts the process if that is about to end.
    """
    for _ in range(_RESTING_SECONDS * 1000):
        time.sleep(0.001)
        if not any(_is_running(thread) for thread in _THREADS.glob("*")):
            return


def _is_running(thread: Path) -> bool:
    try:
        name, _, state = (thread / "stat").read_text().partition("(")[2].rpartition(") ")
    except OSError:
        return False  # it has ended
    return name == _GLOO_THREAD and state.startswith("R")


def _connect(timeout: timedelta) -> tuple[Store, int, int]:
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return HashStore(), 0, 1
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise LaunchError(
            f"environment variables {', '.join(missing)} are not set but others of torchrun's are; start the ranks "
            "with `vpipe train` or torchrun, or unset RANK and WORLD_SIZE to run one process"
        )
    try:
        store, rank, num_ranks = next(rendezvous("env://", timeout=timeout))
    except dist.DistNetworkError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise LaunchError(
            f"rank {os.environ['RANK']} cannot reach the other ranks at {address} within "
            f"{timeout.total_seconds():g} s; check that MASTER_ADDR and MASTER_PORT are right, rank 0 runs, and no "
            "firewall is in between, or raise launch.timeout_seconds (of Pipeline: timeout_seconds)"
        ) from error
    # The store outlives process groups: addresses and messages of one must not be read by the next, whether torchrun
    # restarted the ranks or they join again.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"vpipe/{attempt}/{next(_joined)}", store), rank, num_ranks


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def use_device(device: torch.device) -> torch.device:
    """Make `device` the one that torch takes when none is named, and return it; for CUDA with an index.

    Random numbers and streams are those of that device. Without an index it is chosen by the local rank, or where the
    caller has made the process group, by the caller.

    Raises:
        ConfigError: it is not there.
    """
    if device.type != "cuda":
        return device
    # Read when CUDA starts. With NCCL each link is a stream of its own, on which receives wait; by default no more than
    # eight streams are independent of each other, and a stage in the middle of a "v" has as many links.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    if not torch.cuda.is_available():
        raise ConfigError("the device is 'cuda' but torch finds no CUDA device here; set it (launch.device) to cpu")
    num_devices, index = torch.cuda.device_count(), device.index
    if index is None:
        index = torch.cuda.current_device() if dist.is_initialized() else _local_rank() % num_devices
    if index >= num_devices:
        raise ConfigError(
            f"device 'cuda:{index}' does not exist: this rank sees {num_devices} of them, from 0 on; choose another "
            "(launch.machines), or set launch.device: cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _check_backend(backend: str | None, device: torch.device) -> None:
    if backend is not None and backend not in BACKENDS:
        raise ConfigError(f"launch.distributed_backend is '{backend}'; choose one of {', '.join(BACKENDS)}")
    if backend == "nccl" and device.type != "cuda":
        raise ConfigError(
            "launch.distributed_backend 'nccl' needs CUDA devices; set it to gloo, or launch.device: cuda"
        )


def _choose_backend(backend: str | None, device: torch.device, store: Store, rank: int, num_ranks: int) -> str:
    """Return `backend`, or the one that fits the devices of all ranks, the same on every rank."""
    # Their indices say nothing: each rank may see other devices of a machine, under numbers that begin at 0.
    own = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "cpu"
    store.set(f"device/{rank}", own)
    if backend == "gloo" or own == "cpu":
        return "gloo"
    names = [store.get(f"device/{other}").decode() for other in range(num_ranks)]
    is_shared = len(set(names)) < num_ranks
    if backend == "nccl" and is_shared:
        ranks = [other for other, name in enumerate(names) if names.count(name) > 1]
        raise ConfigError(
            f"launch.distributed_backend 'nccl' needs a CUDA device per rank, but ranks {ranks} share theirs; use "
            "fewer ranks, give them other devices (launch.machines), or set it to gloo"
        )
    return "gloo" if is_shared or "cpu" in names else "nccl"
