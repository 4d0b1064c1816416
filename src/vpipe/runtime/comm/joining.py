"""How a process comes to the others: its device, torchrun's variables, a backend that fits all; and how it leaves."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from vpipe.errors import ConfigError, LaunchError

__all__ = ["as_device", "check_backend", "choose_backend", "connect", "let_threads_rest", "local_rank", "use_device"]

BACKENDS = ("gloo", "nccl")

_GLOO_THREAD = "pt_gloo_runloop"
_THREADS = Path("/proc/self/task")
_RESTING_SECONDS = 30


def as_device(device: torch.device | str) -> torch.device:
    """Return the device that is meant, and make it the one that torch takes when none is named.

    Raises:
        ConfigError: torch knows no such device, or it is not there.
    """
    try:
        meant = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device is '{device}', which torch does not know; use cpu, cuda or cuda:<index>") from error
    return use_device(meant)


def let_threads_rest() -> None:
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


def connect(timeout: timedelta) -> tuple[Store, int, int]:
    """Return a store that all ranks see, the rank of this process, and their number.

    Raises:
        LaunchError: torchrun's variables are incomplete, or the other ranks cannot be reached.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return HashStore(), 0, 1
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise LaunchError(
            f"environment variables {', '.join(missing)} are not set but others of torchrun's are; start the ranks "
            "with `vpipe train` or torchrun, or unset RANK and WORLD_SIZE to run one process"
        )
    try:
        store = _store_at(*(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")), timeout)
    except dist.DistNetworkError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise LaunchError(
            f"rank {os.environ['RANK']} cannot reach the other ranks at {address} within "
            f"{timeout.total_seconds():g} s; check that MASTER_ADDR and MASTER_PORT are right, rank 0 runs, and no "
            "firewall is in between, or raise launch.timeout_seconds (of World.join: timeout_seconds)"
        ) from error
    # The store outlives process groups: addresses and messages of one must not be read by the next, whether torchrun
    # restarted the ranks or they join again.
    store.set_timeout(timeout)
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    joined = store.add(f"vpipe/{attempt}/joined by {rank}", 1)  # how often; all ranks join equally often
    return PrefixStore(f"vpipe/{attempt}/{joined}", store), rank, num_ranks


@cache
def _store_at(address: str, port: str, rank: str, num_ranks: str, timeout: timedelta) -> Store:
    """Return the connection to a place where ranks meet, one for as long as the process lives.

    Rank 0 may be the server. Were that to end with a world, another rank that is quicker to join the next one would be
    connected to a server that is about to go.
    """
    store: Store = next(rendezvous("env://", timeout=timeout))[0]
    return store


def local_rank() -> int:
    """Return the place of this process among those of its machine."""
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
        index = torch.cuda.current_device() if dist.is_initialized() else local_rank() % num_devices
    if index >= num_devices:
        raise ConfigError(
            f"device 'cuda:{index}' does not exist: this rank sees {num_devices} of them, from 0 on; choose another "
            "(launch.machines), or set launch.device: cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def check_backend(backend: str | None, device: torch.device) -> None:
    """Raise ConfigError for a backend that is unknown or does not fit the device."""
    if backend is not None and backend not in BACKENDS:
        raise ConfigError(f"launch.distributed_backend is '{backend}'; choose one of {', '.join(BACKENDS)}")
    if backend == "nccl" and device.type != "cuda":
        raise ConfigError(
            "launch.distributed_backend 'nccl' needs CUDA devices; set it to gloo, or launch.device: cuda"
        )


def choose_backend(backend: str | None, device: torch.device, store: Store, rank: int, num_ranks: int) -> str:
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
