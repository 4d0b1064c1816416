"""Starts every rank of a run on this machine, through torchrun's Python API, and says what went wrong."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from vpipe.errors import LaunchError, PeerLostError
from vpipe.launch.environment import LAUNCHER_PID, RUN_DIRECTORY
from vpipe.launch.failures import RankEnd, describe_failure, find_culprit, read_end
from vpipe.launch.logs import log_path
from vpipe.launch.watchdog import Watchdog
from vpipe.runtime.status import read_status, status_path

__all__ = ["launch_local"]

GRACE_SECONDS = 5
"""How long a rank may take to end after SIGTERM or SIGINT before it gets SIGKILL."""

_HOST = "127.0.0.1"
_STARTERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}
"""Variables that say how many processes another starter has made of one command."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # those torchrun handles


def launch_local(
    arguments: Sequence[str],
    num_ranks: int,
    *,
    run_directory: Path,
    module: str = "vpipe.launch.worker",
    threads_per_rank: int = 1,
    master_port: int | None = None,
    environment: Mapping[str, str] | None = None,
    on_poll: Callable[[], None] | None = None,
    poll_seconds: float = 0.2,
) -> None:
    """Run ``python -m <module> <arguments>`` as `num_ranks` processes; return when all have ended well.

    Everything a rank writes goes to ``<run_directory>/output.log.<rank>``. When a rank fails, all others are ended.

    Args:
        arguments: for vpipe.launch.worker, ``package.module:function`` and then that function's arguments.
        num_ranks: processes to start.
        run_directory: an existing directory of this run alone.
        module: what to run instead of vpipe.launch.worker.
        threads_per_rank: torch's compute threads in each rank.
        master_port: where the ranks meet; None takes a free port.
        environment: further variables for the ranks.
        on_poll: called every `poll_seconds` from another thread, and once after the end; what it raises is raised here.
        poll_seconds: the time between two calls.

    Raises:
        LaunchError: the port is taken, or a rank failed; the text names the rank that failed first and why, what the
            others were waiting for, and where the logs are.
        KeyboardInterrupt: Ctrl-C; all ranks have ended.
    """
    if num_ranks < 1:
        raise LaunchError(f"cannot start {num_ranks} ranks; the number of ranks must be 1 or more")
    _refuse_starters(num_ranks)
    if master_port is not None:
        _check_port(master_port)
    watchdog = Watchdog(run_directory, num_ranks, GRACE_SECONDS)
    ours = _rank_environment(run_directory, threads_per_rank) | dict(environment or {})
    # The shell joins stderr to stdout before Python starts, so the log also has what the interpreter complains of.
    command = ("-c", 'exec "$0" "$@" 2>&1', sys.executable, "-m", module, *arguments)
    tasks = [watchdog.check] if on_poll is None else [watchdog.check, on_poll]
    with tempfile.TemporaryDirectory(prefix="vpipe_") as error_directory, _torchrun_logs(run_directory):
        config = _launch_config(num_ranks, master_port, _RankOutput(run_directory, Path(error_directory), ours))
        try:
            with _repeating(tasks, poll_seconds), _keeping_signal_handlers():
                elastic_launch(config, "/bin/sh")(*command)
        except ChildFailedError as error:
            raise LaunchError(_explain(error.failures, watchdog.killed, num_ranks, run_directory)) from error
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from error
            raise LaunchError(
                f"signal {error.sigval} ({error.sigval.name}) asked the run to stop; all ranks were ended. "
                f"Logs: {log_path(run_directory, '*')}"
            ) from error
        except DistNetworkError as error:
            raise LaunchError(f"cannot listen on {_HOST}:{master_port or 0} for the ranks: {error}") from error
    for rank in range(num_ranks):
        status_path(run_directory, rank).unlink(missing_ok=True)


def _refuse_starters(num_ranks: int) -> None:
    """Refuse to start all ranks in each of several processes that something else has started alike."""
    for variable, starter in _STARTERS.items():
        count = os.environ.get(variable, "1")
        if count.isdigit() and int(count) > 1:
            raise LaunchError(
                f"{starter} has started this command {count} times ({variable}={count}), and each starts all "
                f"{num_ranks} ranks, so the run would be done {count} times; start it once ({starter} -n 1 vpipe ...), "
                f"or let torchrun start its ranks: {starter} -n 1 torchrun --nproc-per-node {num_ranks} -m vpipe "
                "train CONFIG"
            )


class _RankOutput(LogsSpecs):
    """Where the ranks write, and the variables they get besides torchrun's."""

    def __init__(self, run_directory: Path, error_directory: Path, environment: Mapping[str, str]) -> None:
        super().__init__(str(run_directory))
        self._run_directory = run_directory
        self._error_directory = error_directory
        self._environment = environment

    @property
    def root_log_dir(self) -> str:
        return str(self._run_directory)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        errors = {local: str(self._error_directory / f"{env['RANK']}.json") for local, env in envs.items()}
        for local, env in envs.items():
            env.update(self._environment, TORCHELASTIC_ERROR_FILE=errors[local])
        return LogsDest(
            stdouts={local: str(log_path(self._run_directory, env["RANK"])) for local, env in envs.items()},
            stderrs=dict.fromkeys(envs, ""),  # not opened here: see the shell in launch_local
            error_files=errors,
        )


def _rank_environment(run_directory: Path, threads_per_rank: int) -> dict[str, str]:
    environment = {
        "OMP_NUM_THREADS": str(threads_per_rank),
        "PYTHONUNBUFFERED": "1",  # a killed rank loses what is in its buffers
        RUN_DIRECTORY: str(run_directory.absolute()),
        LAUNCHER_PID: str(os.getpid()),
    }
    if "GLOO_SOCKET_IFNAME" not in os.environ and "lo" in (name for _, name in socket.if_nameindex()):
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo asks what the host's name resolves to
    return environment


def _launch_config(num_ranks: int, master_port: int | None, output: _RankOutput) -> LaunchConfig:
    # c10d lets the kernel choose a port; only static gives the ranks the very port that was asked for.
    backend = "c10d" if master_port is None else "static"
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=f"vpipe-{os.getpid()}-{time.monotonic_ns()}",
        rdzv_backend=backend,
        rdzv_endpoint=f"{_HOST}:{master_port or 0}",
        rdzv_configs={"is_host": True, "timeout": 60} if master_port is None else {"rank": 0, "timeout": 60},
        local_addr=_HOST,
        max_restarts=0,
        logs_specs=output,
        shutdown_timeout=GRACE_SECONDS,
    )


def _check_port(port: int) -> None:
    if not 0 < port < 1 << 16:
        raise LaunchError(f"launch.master_port is {port}; ports are numbers from 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does: an ended run does not count
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError as error:
            raise LaunchError(
                f"launch.master_port {port} cannot be used: {error.strerror}; choose another, or leave it out and a "
                "free port is taken"
            ) from error


class _QuietFileHandler(logging.FileHandler):
    """Says nothing when the disk is full: what is written here is a convenience."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


@contextmanager
def _torchrun_logs(run_directory: Path) -> Iterator[None]:
    """Keep torchrun's own remarks off the terminal; they are in ``launcher.log`` if it makes any."""
    elastic = logging.getLogger("torch.distributed.elastic")
    handler = _QuietFileHandler(run_directory / "launcher.log", delay=True)
    propagate, elastic.propagate = elastic.propagate, False
    elastic.addHandler(handler)
    try:
        yield
    finally:
        elastic.removeHandler(handler)
        elastic.propagate = propagate
        with suppress(OSError):
            handler.close()


@contextmanager
def _keeping_signal_handlers() -> Iterator[None]:
    """Put back the signal handlers that torchrun replaces in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def _repeating(tasks: Sequence[Callable[[], None]], seconds: float) -> Iterator[None]:
    """Call each task every `seconds` in a thread of its own, and once more at the end; raise what a task raised."""
    stop = threading.Event()

    def repeat(task: Callable[[], None]) -> None:
        while not stop.wait(seconds):
            task()
        task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        futures = [pool.submit(repeat, task) for task in tasks]
        try:
            yield
        finally:
            stop.set()
    for future in futures:
        future.result()


def _explain(failures: Mapping[int, ProcessFailure], killed: set[int], num_ranks: int, run_directory: Path) -> str:
    """Return the message of the LaunchError, and tell it in the logs of those ranks that did not know the cause."""
    ends = [read_end(rank, failure) for rank, failure in failures.items()]
    culprit = find_culprit(ends, killed)
    statuses = {rank: read_status(run_directory, rank) for rank in range(num_ranks)}
    lines = describe_failure(culprit, statuses, run_directory, time.time())
    cause = lines.pop(culprit.rank)
    for end in ends:
        if _knows_no_cause(end, culprit, cause):
            waiting = f"; {lines[end.rank]}" if end.rank in lines else ""
            with suppress(OSError), log_path(run_directory, end.rank).open("a") as log:  # the disk may be full
                log.write(f"launcher: {cause}{waiting}\n")
    return "\n".join([cause, *(f"  {line}" for line in lines.values()), f"  logs: {log_path(run_directory, '*')}"])


def _knows_no_cause(end: RankEnd, culprit: RankEnd, cause: str) -> bool:
    """Tell whether a rank ended without a word, or saw no more than that another one was gone."""
    if end.message is None:
        return True
    return end is not culprit and end.kind == PeerLostError.__name__ and cause not in end.message
