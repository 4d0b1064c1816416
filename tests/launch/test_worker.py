"""Ranks that somebody else starts: torchrun by hand, or plain processes with torchrun's variables."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from vpipe.errors import LaunchError
from vpipe.launch.environment import LAST_WORDS_SECONDS
from vpipe.launch.worker import _last_words_seconds, load_function

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", LAST_WORDS_SECONDS: "25"}


def torchrun(num_ranks, *arguments):
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), "-m", "vpipe.launch.worker"]
    return subprocess.run(
        [sys.executable, "-m", *command, *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )


def start_rank(rank, num_ranks, port, *arguments):
    variables = {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "vpipe.launch.worker", *arguments],
        env={**ENVIRONMENT, **variables},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def port():
    """Return where the ranks meet: as under torchrun, somebody else's store, which outlives them."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port
    del store


def test_under_torchrun_all_ranks_share_one_new_directory_with_their_logs(tmp_path):
    result = torchrun(2, "launch_toys:agree", str(tmp_path / "runs"))
    assert result.returncode == 0, result.stderr
    directories = set(re.findall(r"rank \d directory (.*)", result.stdout))
    assert len(directories) == 1
    directory = Path(directories.pop())
    assert directory.parent == tmp_path / "runs"
    assert "Finished initializing process group; backend: gloo, rank: 1, world size: 2" in result.stderr
    assert sorted(path.name for path in directory.iterdir()) == ["output.log.0", "output.log.1"]


def test_under_torchrun_a_directory_that_cannot_be_made_fails_clearly_on_every_rank(tmp_path):
    (tmp_path / "runs").write_text("")
    result = torchrun(2, "launch_toys:agree", str(tmp_path / "runs"))
    assert result.returncode == 1
    for rank in range(2):
        line = rf"rank {rank} ERROR: cannot create a run directory in log_directory '.*runs': Not a"
        assert re.search(line, result.stderr)
    assert "launch_toys.py" not in result.stderr  # no traceback of a rank


def test_a_rank_that_lost_its_peer_gives_the_peers_reason(port):
    ranks = [start_rank(rank, 2, port, "launch_toys:diverge") for rank in range(2)]
    errors = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert "rank 1 ERROR: the loss became NaN at iteration 12" in errors[1]
    assert (
        "rank 0 ERROR: rank 1 ended while this rank was waiting for 1F0: "
        "rank 1 stopped: the loss became NaN at iteration 12"
    ) in errors[0]
    assert not any("Traceback" in text for text in errors)


@pytest.mark.parametrize(("given", "seconds"), [(None, 5.0), ("25", 25.0), ("0", 0.0), ("soon", 5.0), ("-1", 5.0)])
def test_how_long_a_rank_may_look_for_the_reason_can_be_set(monkeypatch, caplog, given, seconds):
    monkeypatch.delenv(LAST_WORDS_SECONDS, raising=False)
    if given is not None:
        monkeypatch.setenv(LAST_WORDS_SECONDS, given)
    assert _last_words_seconds() == seconds
    told = f"VPIPE_LAST_WORDS_SECONDS is '{given}', which is no number of seconds; taking 5"
    assert (told in caplog.text) == (given in ("soon", "-1"))


def test_the_error_file_holds_the_clean_message(tmp_path):
    file = tmp_path / "error.json"
    result = subprocess.run(
        [sys.executable, "-m", "vpipe.launch.worker", "launch_toys:refuse", "0"],
        env={**ENVIRONMENT, "TORCHELASTIC_ERROR_FILE": str(file)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    content = json.loads(file.read_text())
    assert content["message"]["message"] == "train.batch_size 7 is not divisible by 2; use 8"
    assert content["message"]["extraInfo"]["py_callstack"] == content["message"]["message"]
    assert content["vpipe"]["kind"] == "ConfigError"
    assert abs(content["vpipe"]["time"] - time.time()) < 60


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("launch_toys", "not of the form package.module:function"),
        ("json:nothing", "module 'json' has no function 'nothing'"),
    ],
)
def test_targets_that_name_no_function_are_refused(target, message):
    with pytest.raises(LaunchError, match=message):
        load_function(target)
