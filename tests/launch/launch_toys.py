"""What the ranks of the launch tests run: functions for `vpipe.launch.worker`."""

import os
import signal
import sys
import time
from pathlib import Path

from vpipe.errors import ConfigError, NonFiniteLossError
from vpipe.runtime.status import StatusFile, status_path

RANK = int(os.environ.get("RANK", "0"))
NUM_RANKS = int(os.environ.get("WORLD_SIZE", "1"))
DIRECTORY = Path(os.environ.get("VPIPE_RUN_DIRECTORY", "."))


def speak(arguments):
    print(f"out {arguments} threads={os.environ['OMP_NUM_THREADS']}")
    print("err", file=sys.stderr)
    os.write(1, b"raw\n")


def leave_early(arguments):
    if RANK == 0:
        sys.exit(0)


def refuse(arguments):
    """The rank that `arguments` names raises; the others wait."""
    if int(arguments[0]) == RANK:
        raise ConfigError("train.batch_size 7 is not divisible by 2; use 8")
    time.sleep(3600)


def measure(arguments):
    import torch
    from torch.autograd.profiler import profile

    with profile(profile_memory=True):
        torch.ones(8)
    print("measured")


def fill_the_disk(arguments):
    if RANK == 1:
        with open("/dev/full", "w") as file:
            file.write("more than fits")
    time.sleep(3600)


def stumble(arguments):
    if RANK == 1:
        raise ValueError("surprise")
    time.sleep(3600)


def exit_with(arguments):
    print("last words", end="")  # without a line end, so it stays in the buffer
    if RANK == 1:
        os._exit(int(arguments[0]))
    time.sleep(3600)


def sleep_after_status(arguments):
    """Say what is waited for, mark being ready, and ignore what `arguments` names."""
    for name in arguments:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    StatusFile(status_path(DIRECTORY, RANK)).write(f"waiting for {RANK}F3 from rank {(RANK + 1) % NUM_RANKS}")
    time.sleep(3600)


def crash(arguments):
    if RANK == 1:
        os.kill(os.getpid(), getattr(signal, arguments[0]))
    time.sleep(3600)


def ring(arguments):
    """Every rank waits for the next one over gloo, and nobody sends."""
    import torch
    import torch.distributed as dist

    from vpipe.runtime.comm.failure import raise_if_peer_lost
    from vpipe.runtime.comm.world import World

    with (
        World.join(timeout_seconds=60, backend="gloo") as group,
        StatusFile(status_path(DIRECTORY, group.rank)) as status,
    ):
        peer = (group.rank + 1) % group.num_ranks
        status.write(f"waiting for {peer}F3 from rank {peer}")
        try:
            dist.recv(torch.zeros(4), peer, tag=3)
        except RuntimeError as error:
            raise_if_peer_lost(error, f"{peer}F3", peer)
            raise


def diverge(arguments):
    """Rank 1 stops while rank 0 waits for it; the others wait for rank 0."""
    import torch
    import torch.distributed as dist

    from vpipe.runtime.comm.failure import raise_if_peer_lost
    from vpipe.runtime.comm.world import World

    with World.join(timeout_seconds=60, backend="gloo") as group:
        dist.barrier()
        if group.rank == 1:
            raise NonFiniteLossError("the loss became NaN at iteration 12")
        peer = (group.rank + 1) % 2
        try:
            dist.recv(torch.zeros(4), peer)
        except RuntimeError as error:
            raise_if_peer_lost(error, f"{peer}F0", peer)
            raise


def agree(arguments):
    """Agree on a run directory below `arguments[0]`, and say which."""
    from vpipe.launch.run_directory import agree_run_directory
    from vpipe.runtime.comm.world import World

    with World.join(timeout_seconds=60, backend="gloo") as group:
        line = f"rank {group.rank} directory {agree_run_directory(Path(arguments[0]), group)}\n"
        os.write(1, line.encode())  # at once, so that the ranks' lines stay whole


def print_port(arguments):
    print(os.environ["MASTER_PORT"])


def suspend(arguments):
    """Rank 0 stops like a process under a debugger, so SIGTERM does not reach it."""
    StatusFile(status_path(DIRECTORY, RANK)).write("waiting for a signal")
    if RANK == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(3600)
