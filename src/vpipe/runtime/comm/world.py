"""The world of a process: which rank of the pipeline it is, where it computes, and how it reaches the others.

A world is made once, and everything else asks it. Nothing but this file asks torch for a rank: a *position* in the
pipeline is one thing, the *process* that takes it, torch's rank, another. Where a pipeline has all processes in order,
both are the same number.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from numbers import Real
from typing import TypeVar

import torch
import torch.distributed as dist

# Its functions have the group of all ranks as a default, as it is when the module is imported. If that happened later,
# by way of an optimizer, the group and its threads would never end.
import torch.distributed.nn.functional
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.distributed_c10d import _world as torch_world

from vpipe.errors import ConfigError, VPipeError
from vpipe.runtime.comm.failure import Failures, raise_if_peer_lost, telling_losses
from vpipe.runtime.comm.joining import as_device, check_backend, choose_backend, connect, let_threads_rest, local_rank
from vpipe.runtime.comm.waits.activity import Activity, ended_by
from vpipe.runtime.comm.waits.lookout import Lookout, look_out
from vpipe.runtime.comm.waits.sighting import name_place
from vpipe.runtime.comm.waits.verdict import different_calls
from vpipe.runtime.memory.workspace import GpuPeak

__all__ = ["World"]

T = TypeVar("T")

logger = logging.getLogger(__name__)

_END = "the end of the run"


@dataclass(frozen=True, eq=False)
class World:
    """One process among those of a pipeline; `World.join` makes it.

    As a context manager it leaves the others at the end, together with them. When the block raises, the others are
    told why and the group is not destroyed: that would wait for peers which may be dead. The process is expected to
    end then; that of a single rank may go on, and join again.
    """

    processes: tuple[int, ...]
    """Torch's rank of the process at each position of the pipeline."""
    position: int
    """The place of this process among them: its rank in the pipeline."""
    local_rank: int
    """Its place among the processes of this machine."""
    backend: str
    device: torch.device
    """Where it computes; for CUDA always with an index."""
    timeout: timedelta
    """How long any wait for another rank may last."""
    control: dist.ProcessGroup | None
    """A gloo group of these processes, for small messages between their CPUs; None for one that joined nobody."""
    shared_memory: bool = True
    """Whether ranks of one machine may exchange messages in memory that both see."""
    store: Store | None = None
    """Keys and values that all ranks see, where this process joined them by itself."""
    failures: Failures = field(default_factory=Failures)
    """What a rank says to the others when it fails."""
    everyone: dist.ProcessGroup | None = None
    """All processes of torch's group, where this world made it: they leave it together."""
    activity: Activity = field(default_factory=Activity)
    """What this rank is doing, for ranks that wait for it."""
    lookout: Lookout | None = None
    """What tells that, and looks after long waits; None where there is nobody else."""
    _open: list[bool] = field(default_factory=lambda: [True], repr=False)

    @classmethod
    def join(
        cls,
        *,
        device: str | torch.device = "cpu",
        timeout_seconds: float = 300.0,
        shared_memory: bool = True,
        backend: str | None = None,
        ranks: Sequence[int] | None = None,
    ) -> World:
        """Join the other ranks: under torchrun by its environment variables; without them, be the only rank.

        Where the caller has made a process group of torch already, the world is a part of it, or all of it.

        Args:
            device: ``cpu``, ``cuda`` (the device is then chosen by the local rank) or ``cuda:<index>``.
            timeout_seconds: how long a rank waits for another before it gives up.
            shared_memory: let ranks of one machine exchange messages in memory that both see, not through sockets.
            backend: ``gloo`` or ``nccl``; None takes nccl if every rank has a CUDA device of its own.
            ranks: torch's ranks of the processes of this world, in the order of the pipeline, this one among them;
                None: all. Several worlds of one process group must not share a process.

        Raises:
            ConfigError: the backend is unknown or does not fit the device, or `ranks` are not of the group.
            LaunchError: torchrun's variables are incomplete, or the other ranks cannot be reached.
            PeerLostError: another rank failed first; the text includes its message if it left one.
        """
        place = as_device(device)
        check_backend(backend, place)
        if not isinstance(timeout_seconds, Real) or not 0 < timeout_seconds < math.inf:
            raise ConfigError(f"timeout_seconds is {timeout_seconds!r}; give a number of seconds above 0")
        timeout = timedelta(seconds=timeout_seconds)
        if dist.is_initialized():
            if backend is not None and backend != dist.get_backend():
                raise ConfigError(
                    f"backend is '{backend}', and the process group that is there already has {dist.get_backend()}; "
                    "leave it out"
                )
            return cls._beside(ranks, place, timeout, shared_memory)
        failures = Failures()
        try:
            return cls._first(ranks, place, timeout, shared_memory, backend, failures)
        except Exception as error:
            if dist.is_initialized() and dist.get_world_size() == 1:
                dist.destroy_process_group()
            failures.report(error)
            raise

    @classmethod
    def _first(
        cls,
        ranks: Sequence[int] | None,
        device: torch.device,
        timeout: timedelta,
        shared_memory: bool,
        backend: str | None,
        failures: Failures,
    ) -> World:
        """Make the process group."""
        store, process, num_processes = connect(timeout)
        failures.attach(store, process)
        processes = _choose_processes(ranks, process, num_processes)
        position, is_whole = processes.index(process), len(processes) == num_processes
        failures.attach(store, position, "" if is_whole else f" of {sorted(processes)}")
        try:
            if num_processes > 1:
                _agree_on_order(processes, process, timeout, store)
            backend = choose_backend(backend, device, store, process, num_processes)
            dist.init_process_group(backend, store=store, rank=process, world_size=num_processes, timeout=timeout)
            everyone = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
            control = everyone if is_whole else _new_group(processes, timeout, "gloo", processes)
            # A rank that is quick to find a mistake and ends would keep slower ones from connecting, and from finding
            # it.
            dist.barrier(group=control)
        except RuntimeError as error:
            raise_if_peer_lost(error, "the process group to form")
            raise
        logger.info(
            "Finished initializing process group; backend: %s, rank: %d, world size: %d",
            backend, process, num_processes,
        )  # fmt: skip
        activity = Activity(position, processes)
        return cls(
            processes,
            position,
            local_rank(),
            backend,
            device,
            timeout,
            control,
            shared_memory,
            store,
            failures,
            everyone,
            activity,
            look_out(activity, store, processes),
        )

    @classmethod
    def _beside(
        cls, ranks: Sequence[int] | None, device: torch.device, timeout: timedelta, shared_memory: bool
    ) -> World:
        """Take part in the process group that the caller made; its messages are never met, as groups here are new."""
        process = dist.get_rank()
        processes = _choose_processes(ranks, process, dist.get_world_size())
        if dist.get_world_size() > 1:
            _agree_on_order(processes, process, timeout, _get_default_store())
        control = _new_group(processes, timeout, "gloo", processes) if len(processes) > 1 else None
        position = processes.index(process)
        activity = Activity(position, processes)
        return cls(
            processes,
            position,
            local_rank(),
            dist.get_backend(),
            device,
            timeout,
            control,
            shared_memory,
            activity=activity,
            lookout=look_out(activity, _get_default_store(), processes, is_shared=True),
        )

    def __post_init__(self) -> None:
        if self.lookout is not None:
            weakref.finalize(self, self.lookout.stop)

    @property
    def is_open(self) -> bool:
        """Tell whether this world can be used: one that joined the others ends when it leaves them."""
        return self._open[0]

    @cached_property
    def peak(self) -> GpuPeak:
        """What this process's tensors took of the device at most, where that is a GPU."""
        return GpuPeak(self.device)

    @property
    def rank(self) -> int:
        """Return the position of this process in the pipeline."""
        return self.position

    @property
    def process(self) -> int:
        """Return torch's rank of this process."""
        return self.processes[self.position]

    @property
    def num_ranks(self) -> int:
        """Count the ranks of the pipeline."""
        return len(self.processes)

    @property
    def peers(self) -> dist.ProcessGroup | None:
        """Return the control group, or None where there is nobody else to talk to."""
        return self.control if self.num_ranks > 1 else None

    def new_group(self, positions: Sequence[int] | None = None, backend: str | None = None) -> dist.ProcessGroup | None:
        """Make a group of some of the ranks, by default of all; None for one that is no member.

        Collective: every rank of the world makes the same groups in the same order.
        """
        chosen = range(self.num_ranks) if positions is None else positions
        return _new_group([self.processes[position] for position in chosen], self.timeout, backend, self.processes)

    def position_in(self, group: dist.ProcessGroup, position: int) -> int:
        """Return how a group of torch counts the process at a position."""
        return dist.get_group_rank(group, self.processes[position])

    def gather(self, mine: T, what: str) -> list[T]:
        """Return what every rank gave, in the order of positions; collective. `what` says in an error what it is.

        Raises:
            PeerLostError: a rank ended meanwhile.
        """
        if self.peers is None:
            return [mine]
        own = self.activity.key(what), f"{name_place(self.activity.place)}, waiting for {what}", mine
        everyone = [own] * self.num_ranks
        with self.activity.meeting(what, self.peers):
            dist.all_gather_object(everyone, own, group=self.peers)
        everyone = [everyone[self.position_in(self.peers, position)] for position in range(self.num_ranks)]
        if any(key != own[0] for key, _, _ in everyone):
            self.activity.publish()
            raise different_calls([place for _, place, _ in everyone])
        return [theirs for _, _, theirs in everyone]

    def broadcast(self, tensor: Tensor, source: int, what: str) -> None:
        """Fill a tensor of the CPU on every rank with that of the rank at position `source`; collective.

        Raises:
            PeerLostError: a rank ended meanwhile.
        """
        if self.peers is not None:
            with self.activity.meeting(what, self.peers, source):
                dist.broadcast(tensor, self.processes[source], group=self.peers)

    def meet(self, what: str) -> None:
        """Wait until all ranks got here; collective. `what` says in an error what was waited for.

        Raises:
            PeerLostError: a rank ended before it got here.
        """
        self.gather(None, what)

    def close(self) -> None:
        """Leave the others, if this world joined them: wait until all got here, then disconnect.

        Raises:
            PeerLostError: a rank ended before it got here.
        """
        if self.store is not None and self._open[0]:
            with self.activity.during("close"):
                self.meet(_END)
                with self.activity.waiting(_END, () if self.everyone is not self.control else None, self.everyone):
                    dist.barrier(group=self.everyone)
            self._open[0] = False
            if self.lookout is not None:
                self.lookout.stop()
            dist.destroy_process_group()
            let_threads_rest()

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            try:
                self.close()
            except VPipeError as lost:
                self.failures.report(lost)
                raise
        elif isinstance(error, Exception):
            self._leave_after(error)

    def _leave_after(self, error: Exception) -> None:
        self.activity.end(str(error) if isinstance(error, VPipeError) else ended_by(error))
        if self.store is None:
            return
        if dist.is_initialized() and dist.get_world_size() == 1:
            dist.destroy_process_group()
        self._open[0] = False
        self.failures.report(error)


def _choose_processes(ranks: Sequence[int] | None, process: int, num_processes: int) -> tuple[int, ...]:
    if ranks is None:
        return tuple(range(num_processes))
    if not isinstance(ranks, Sequence) or not all(isinstance(rank, int) for rank in ranks):
        raise ConfigError(f"ranks is {ranks!r}; give a list of torch's ranks, such as [0, 1]")
    processes = tuple(ranks)
    if len(set(processes)) < len(processes) or not all(0 <= rank < num_processes for rank in processes):
        raise ConfigError(f"ranks {list(ranks)} are not different ones of 0 to {num_processes - 1}")
    if process not in processes:
        raise ConfigError(f"this process is rank {process}, which is not among the ranks {list(ranks)} of its world")
    return processes


def _new_group(
    members: Sequence[int], timeout: timedelta, backend: str | None, world: Sequence[int]
) -> dist.ProcessGroup | None:
    """Make a group of some processes of a `world`, all of which call this; None for one that is no member.

    Torch names groups by a count, so all processes of its group have to make the same ones in the same order. A world
    that is a part of them cannot ask that of the others: there only members know of a group. Its name then depends on
    how many groups a process has, so the members make that equal first.
    """
    if len(world) == dist.get_world_size():
        group = dist.new_group(sorted(members), timeout=timeout, backend=backend)
    elif dist.get_rank() in members:
        _level_groups(sorted(members), timeout)
        with telling_losses("the ranks of a group to make it"):
            group = dist.new_group(sorted(members), timeout=timeout, backend=backend, use_local_synchronization=True)
    else:
        return None
    return group if isinstance(group, dist.ProcessGroup) else None


def _level_groups(members: Sequence[int], timeout: timedelta) -> None:
    """Let all `members` have equally many groups, by ones of their own."""
    counts = _exchange(members, f"groups of {members}", str(len(torch_world.pg_names)), timeout, _get_default_store())
    for _ in range(max(map(int, counts)) - len(torch_world.pg_names)):
        dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)


def _agree_on_order(processes: Sequence[int], process: int, timeout: timedelta, store: Store) -> None:
    """Check that all processes of a world have them in the same order.

    Raises:
        ConfigError: they do not; on every rank.
    """
    members = sorted(processes)
    orders = _exchange(members, f"order of {members}", str(list(processes)), timeout, store, process)
    for other, order in zip(members, orders, strict=True):
        if order != orders[0]:
            raise ConfigError(
                f"ranks do not agree on the order of their world: rank {members[0]} has {orders[0]}, rank {other} has "
                f"{order}; give the same ranks in the same order on all of them"
            )


def _exchange(
    members: Sequence[int], what: str, mine: str, timeout: timedelta, store: Store, process: int | None = None
) -> list[str]:
    """Return what every member says, in the order of `members`; each says it as often as the others."""
    own = dist.get_rank() if process is None else process
    board = PrefixStore(f"vpipe/{what}", store)
    turn = board.add(f"turns of {own}", 1)
    board.set(f"{turn}/{own}", mine)
    try:
        board.wait([f"{turn}/{other}" for other in members], timeout)
    except RuntimeError as error:
        raise_if_peer_lost(error, f"ranks {list(members)} to join the same world")
        raise
    return [board.get(f"{turn}/{other}").decode() for other in members]
