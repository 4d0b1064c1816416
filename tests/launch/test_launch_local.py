"""Ranks are real processes here; most of them do not import torch, which keeps them quick."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from vpipe.errors import LaunchError
from vpipe.launch import local
from vpipe.launch.local import launch_local
from vpipe.runtime.status import read_status

HERE = Path(__file__).parent
ENVIRONMENT = {"PYTHONPATH": str(HERE)}


def launch(directory, function, *arguments, num_ranks=2, **options):
    launch_local(
        [f"launch_toys:{function}", *arguments],
        num_ranks,
        run_directory=directory,
        environment=ENVIRONMENT,
        **options,
    )


def log(directory, rank):
    return (directory / f"output.log.{rank}").read_text()


SOON_SECONDS = 25
"""How long the others may go on: torchrun by itself would take 30 s to end them, and they wait for longer."""


class KillWhenWaiting:
    """Sends a signal to one rank as soon as all ranks wait, and measures from then."""

    def __init__(self, directory, rank, num_ranks, number=signal.SIGKILL):
        self.directory, self.rank, self.num_ranks, self.number = directory, rank, num_ranks, number
        self.at = None

    def __call__(self):
        if self.at is None and all(self._is_waiting(rank) for rank in range(self.num_ranks)):
            self.at = time.monotonic()
            os.kill(read_status(self.directory, self.rank).pid, self.number)

    def _is_waiting(self, rank):
        status = read_status(self.directory, rank)
        return status is not None and status.text.startswith("waiting")


def test_a_clean_run_leaves_all_output_and_nothing_else(tmp_path):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    launch(tmp_path, "speak", "a b", "$HOME", threads_per_rank=3)
    for rank in range(2):
        assert sorted(log(tmp_path, rank).splitlines()) == ["err", "out ['a b', '$HOME'] threads=3", "raw"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output.log.0", "output.log.1"]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_an_early_clean_exit_is_no_failure(tmp_path):
    launch(tmp_path, "leave_early")


def test_a_refusal_is_told_without_traceback(tmp_path, capfd):
    with pytest.raises(LaunchError) as caught:
        launch(tmp_path, "refuse", "1")
    first, second = str(caught.value).splitlines()
    assert first == "rank 1 stopped: train.batch_size 7 is not divisible by 2; use 8"
    assert second == f"  logs: {tmp_path}/output.log.*"
    assert "train.batch_size 7 is not divisible" in log(tmp_path, 1)
    assert "Traceback" not in log(tmp_path, 1)
    assert f"launcher: {first}" in log(tmp_path, 0)
    assert capfd.readouterr() == ("", "")


def test_the_rank_that_diverged_is_the_cause_and_not_those_that_lost_it(tmp_path):
    with pytest.raises(LaunchError, match=r"^rank 1 stopped: the loss became NaN at iteration 12"):
        launch(tmp_path, "diverge", num_ranks=3)


def test_measuring_memory_leaves_nothing_else_in_the_log(tmp_path):
    launch(tmp_path, "measure", num_ranks=1)
    assert log(tmp_path, 0) == "measured\n"


def test_a_full_disk_is_told_in_one_line(tmp_path):
    with pytest.raises(LaunchError) as error:
        launch(tmp_path, "fill_the_disk")
    assert str(error.value).splitlines()[0] == (
        "rank 1 stopped: cannot write: No space left on device; free some space, or choose another log_directory"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_a_disk_that_is_full_from_the_start_is_told_too(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        (tmp_path / "filler").write_bytes(b"x" * 8192)  # all there is
        with pytest.raises(
            LaunchError, match=r"^rank \d stopped: cannot write: No space left on device; free some space"
        ):
            launch(tmp_path, "speak")
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_bug_keeps_its_traceback_in_the_log(tmp_path):
    with pytest.raises(LaunchError, match=r"^rank 1 failed: ValueError: surprise \(the traceback is in .*log\.1\)"):
        launch(tmp_path, "stumble")
    assert 'raise ValueError("surprise")' in log(tmp_path, 1)


def test_an_exit_without_a_word_is_told_and_loses_no_output(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with pytest.raises(LaunchError, match="rank 1 ended with exit code 3 and no message"):
        launch(tmp_path, "exit_with", "3")
    assert "last words" in log(tmp_path, 1)


def test_a_native_crash_leaves_the_python_stack(tmp_path):
    with pytest.raises(LaunchError, match=r"rank 1 was killed by signal 11 \(SIGSEGV\)"):
        launch(tmp_path, "crash", "SIGSEGV")
    assert "launch_toys.py" in log(tmp_path, 1)


def test_an_import_that_fails_is_told(tmp_path):
    with pytest.raises(LaunchError, match=r"No module named 'nowhere'"):
        launch_local(["nowhere:main"], 1, run_directory=tmp_path)


def test_a_module_that_does_not_exist_is_in_the_log(tmp_path):
    with pytest.raises(LaunchError, match="rank 0 ended with exit code 1"):
        launch_local([], 1, run_directory=tmp_path, module="nowhere")
    assert "No module named nowhere" in log(tmp_path, 0)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_kill_minus_nine_ends_everybody_and_says_who_waited_for_what(tmp_path, victim):
    killer = KillWhenWaiting(tmp_path, victim, 3)
    with pytest.raises(LaunchError) as caught:
        launch(tmp_path, "ring", num_ranks=3, on_poll=killer, poll_seconds=0.05)
    assert time.monotonic() - killer.at < SOON_SECONDS
    message = str(caught.value)
    waits = {rank: f"waiting for {(rank + 1) % 3}F3 from rank {(rank + 1) % 3}" for rank in range(3)}
    assert message.startswith(f"rank {victim} was killed by signal 9 (SIGKILL) while {waits[victim]}; ")
    for rank in {0, 1, 2} - {victim}:
        assert f"\n  rank {rank} was {waits[rank]} (for " in message
        assert f"rank {victim} was killed by signal 9" in log(tmp_path, rank)
    assert "Finished initializing process group; backend: gloo, rank: 0, world size: 3" in log(tmp_path, 0)


def test_ranks_that_ignore_sigterm_end_in_time_too(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "GRACE_SECONDS", 1)
    killer = KillWhenWaiting(tmp_path, 1, 3)
    with pytest.raises(LaunchError, match=r"^rank 1 was killed by signal 9"):
        launch(tmp_path, "sleep_after_status", "SIGTERM", num_ranks=3, on_poll=killer)
    assert time.monotonic() - killer.at < SOON_SECONDS


def test_a_suspended_rank_ends_in_time_too(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "GRACE_SECONDS", 1)
    killer = KillWhenWaiting(tmp_path, 1, 2)
    with pytest.raises(LaunchError, match=r"^rank 1 was killed by signal 9"):
        launch(tmp_path, "suspend", on_poll=killer)
    assert time.monotonic() - killer.at < SOON_SECONDS


def test_a_rank_that_somebody_terminates_is_named(tmp_path):
    killer = KillWhenWaiting(tmp_path, 1, 2, signal.SIGTERM)
    with pytest.raises(LaunchError, match=r"^rank 1 was killed by signal 15 \(SIGTERM\)"):
        launch(tmp_path, "sleep_after_status", on_poll=killer)


def test_a_rank_that_only_saw_another_one_gone_finds_the_cause_in_its_log(tmp_path):
    (tmp_path / "0.json").write_text(
        json.dumps(
            {
                "message": {
                    "message": "rank 1 ended while this rank was waiting for 1F3",
                    "extraInfo": {"timestamp": "100"},
                },
                "vpipe": {"kind": "PeerLostError", "expected": True, "time": 100.0},
            }
        )
    )
    codes = {0: 1, 1: -signal.SIGKILL}
    failures = {
        rank: ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file=str(tmp_path / f"{rank}.json"))
        for rank, code in codes.items()
    }
    text = local._explain(failures, set(), 2, tmp_path)
    assert text.startswith("rank 1 was killed by signal 9 (SIGKILL)")
    for rank in codes:
        assert "launcher: rank 1 was killed by signal 9 (SIGKILL)" in log(tmp_path, rank)


def test_no_process_stays_behind(tmp_path):
    killer = KillWhenWaiting(tmp_path, 0, 2)
    with pytest.raises(LaunchError):
        launch(tmp_path, "sleep_after_status", on_poll=killer)
    for rank in range(2):
        with pytest.raises(ChildProcessError):  # neither running nor a zombie
            os.waitpid(read_status(tmp_path, rank).pid, os.WNOHANG)


def test_a_busy_port_is_named_with_the_way_out(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=f"launch.master_port {port} cannot be used: .*leave it out"):
            launch(tmp_path, "speak", master_port=port)


@pytest.mark.parametrize("port", [0, 65536])
def test_impossible_ports_are_refused(tmp_path, port):
    with pytest.raises(LaunchError, match=f"launch.master_port is {port}"):
        launch(tmp_path, "speak", master_port=port)


def test_the_port_that_was_asked_for_is_used(tmp_path):
    for attempt in range(20):
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        directory = tmp_path / f"{attempt}"
        directory.mkdir()
        try:
            launch_local(
                ["launch_toys:print_port"], 1, run_directory=directory, environment=ENVIRONMENT, master_port=port
            )
        except LaunchError as error:
            last = error
            continue  # somebody else took it meanwhile
        assert log(directory, 0) == f"{port}\n"
        return
    pytest.fail(f"no port stayed free: {last}")


def test_no_ranks_are_refused(tmp_path):
    with pytest.raises(LaunchError, match="cannot start 0 ranks"):
        launch(tmp_path, "speak", num_ranks=0)


@pytest.mark.parametrize(
    ("variable", "starter"),
    [("SLURM_STEP_NUM_TASKS", "srun"), ("OMPI_COMM_WORLD_SIZE", "mpirun"), ("PMI_SIZE", "mpiexec")],
)
def test_a_command_that_something_else_starts_several_times_is_refused(tmp_path, monkeypatch, variable, starter):
    monkeypatch.setenv(variable, "2")
    with pytest.raises(LaunchError) as error:
        launch(tmp_path, "speak", num_ranks=3)
    assert str(error.value).startswith(
        f"{starter} has started this command 2 times ({variable}=2), and each starts all 3"
    )
    assert f"{starter} -n 1 torchrun --nproc-per-node 3 -m vpipe train CONFIG" in str(error.value)
    monkeypatch.setenv(variable, "1")
    launch(tmp_path, "speak", num_ranks=1)


def test_what_the_poll_raises_reaches_the_caller(tmp_path):
    def poll():
        raise KeyError("display")

    with pytest.raises(KeyError, match="display"):
        launch(tmp_path, "speak", on_poll=poll)


LAUNCHER = """
import sys
from pathlib import Path
from vpipe.launch.local import launch_local
try:
    launch_local(["launch_toys:sleep_after_status"], 2, run_directory=Path(sys.argv[1]))
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture
def launcher(tmp_path):
    """Start a launcher with two ranks that wait, and return it with their process numbers."""
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(tmp_path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        ranks = KillWhenWaiting(tmp_path, 0, 2)
        while not all(ranks._is_waiting(rank) for rank in range(2)):
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        yield process, [read_status(tmp_path, rank).pid for rank in range(2)]
    finally:
        process.kill()  # its ranks end with it
        process.wait()


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_ctrl_c_ends_everybody_quietly(launcher, tmp_path):
    process, pids = launcher
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 130
    assert output == ""
    assert not any(is_running(pid) for pid in pids)
    assert all("Traceback" not in log(tmp_path, rank) for rank in range(2))


def test_ranks_do_not_outlive_a_launcher_that_is_killed(launcher):
    process, pids = launcher
    killed = time.monotonic()
    process.kill()
    process.communicate()
    while any(is_running(pid) for pid in pids):  # by themselves they would sleep on
        time.sleep(0.02)
    assert time.monotonic() - killed < SOON_SECONDS
