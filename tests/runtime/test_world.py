import gc
import importlib
import multiprocessing
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from vpipe.errors import ConfigError, LaunchError, NonFiniteLossError, PeerLostError
from vpipe.runtime.comm import failure, joining
from vpipe.runtime.comm.failure import Failures, raise_if_peer_lost
from vpipe.runtime.comm.joining import choose_backend, use_device
from vpipe.runtime.comm.world import World

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_ranks(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(failure, "CONSULT_SECONDS", 0.1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_without_torchrun_there_is_one_rank(caplog):
    caplog.set_level("INFO", logger="vpipe")
    with World.join(timeout_seconds=10) as world:
        assert (world.rank, world.num_ranks, world.local_rank, world.backend) == (0, 1, 0, "gloo")
        assert world.device == torch.device("cpu")
        dist.all_reduce(torch.zeros(1), group=world.control)
    assert not dist.is_initialized()
    assert "Finished initializing process group; backend: gloo, rank: 0, world size: 1" in caplog.text


def test_the_first_failure_stays():
    alone = Failures()
    assert alone.find() is None
    alone.publish("nobody to tell")
    assert alone.find() is None
    with World.join(timeout_seconds=10) as world:
        assert world.failures.find() is None
        world.failures.publish("the loss became NaN")
        world.failures.publish("something later")
        assert world.failures.find() == "rank 0 stopped: the loss became NaN"


def test_what_stops_a_rank_is_published():
    world = World.join(timeout_seconds=10)
    with pytest.raises(NonFiniteLossError), world:
        raise NonFiniteLossError("the loss became NaN")
    assert world.failures.find() == "rank 0 stopped: the loss became NaN"


def test_a_single_rank_may_go_on_after_a_mistake():
    for _ in range(2):
        with pytest.raises(NonFiniteLossError), World.join(timeout_seconds=10):
            raise NonFiniteLossError("the loss became NaN")
        assert not dist.is_initialized()


def lose_peer(world, known=None):
    with world:
        if known is not None:
            world.failures.publish(known)
        raise PeerLostError("rank 1 ended")


def test_a_lost_peer_is_explained_by_the_published_failure():
    with pytest.raises(PeerLostError, match=r"^rank 1 ended: rank 0 stopped: out of data$"):
        lose_peer(World.join(timeout_seconds=10), "out of data")


def test_a_lost_peer_that_left_no_word_is_passed_on_and_published():
    world = World.join(timeout_seconds=10)
    with pytest.raises(PeerLostError, match=r"^rank 1 ended$"):
        lose_peer(world)
    assert world.failures.find() == "rank 0 stopped: rank 1 ended"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:27788. This is typically",
            "rank 2 ended while this rank was waiting for 1F3",
        ),
        (
            "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete",
            "waited for 4 s for 1F3 from rank 2, which does not answer; .* raise launch.timeout_seconds",
        ),
        ("NCCL error: remote process exited or there was a network error", "rank 2 ended while"),
    ],
)
def test_how_torch_says_that_a_peer_is_lost_is_understood(text, message):
    with pytest.raises(PeerLostError, match=message):
        raise_if_peer_lost(RuntimeError(text), "1F3", 2)


def test_other_errors_are_left_alone():
    raise_if_peer_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "1F3", 2)


def test_ranks_that_do_not_meet_in_time(monkeypatch):
    with socket.socket() as taken:  # and nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        values = ("1", "2", "0", "1", *address.split(":"))
        for name, value in zip(VARIABLES, values, strict=True):
            monkeypatch.setenv(name, value)
        message = rf"rank 1 cannot reach the other ranks at {address} within 0.2 s; .* or raise launch.timeout_seconds"
        with pytest.raises(LaunchError, match=message), World.join(timeout_seconds=0.2, backend="gloo"):
            pytest.fail("there is nobody to meet")


def test_incomplete_variables_are_named(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with (
        pytest.raises(LaunchError, match="WORLD_SIZE, MASTER_PORT are not set"),
        World.join(timeout_seconds=1, backend="gloo"),
    ):
        pass


@pytest.mark.parametrize(
    ("backend", "message"), [("mpi", "is 'mpi'; choose one of gloo, nccl"), ("nccl", "needs CUDA devices")]
)
def test_backends_that_do_not_fit_are_refused(backend, message):
    with pytest.raises(ConfigError, match=message), World.join(timeout_seconds=1, backend=backend):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_cuda_device_is_named():
    with (
        pytest.raises(ConfigError, match=r"the device is 'cuda' but torch finds no CUDA device here; .*launch.device"),
        World.join(timeout_seconds=1, device="cuda"),
    ):
        pass


def test_a_device_is_one_that_torch_knows():
    with pytest.raises(ConfigError, match="device is 'gpu', which torch does not know; use cpu, cuda or"):
        World.join(device="gpu")


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that there are two; return which one torch was told to take."""
    taken = []
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="GPU-0"))
    return taken


def test_the_local_rank_chooses_a_gpu_where_no_index_does(gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert use_device(torch.device("cuda")) == torch.device("cuda:0")
    assert use_device(torch.device("cuda:1")) == torch.device("cuda:1")
    assert gpus == [0, 1]
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    with pytest.raises(ConfigError, match="'cuda:2' does not exist: this rank sees 2 of them"):
        use_device(torch.device("cuda:2"))


def test_a_caller_with_a_group_of_his_own_has_chosen_the_gpu(gpus, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: True)
        assert use_device(torch.device("cuda")) == torch.device("cuda:1")


@pytest.mark.parametrize(
    ("others", "expected"),
    [(["GPU-1", "GPU-2"], "nccl"), (["GPU-1", "GPU-0"], "gloo"), (["GPU-1", "cpu"], "gloo"), (["cpu", "cpu"], "gloo")],
)
@pytest.mark.usefixtures("gpus")
def test_nccl_is_for_ranks_with_gpus_of_their_own_whatever_each_calls_its_own(others, expected):
    store = dist.HashStore()
    for rank, name in enumerate(others, start=1):
        store.set(f"device/{rank}", name)
    assert choose_backend(None, torch.device("cuda:0"), store, 0, 3) == expected
    assert store.get("device/0") == b"GPU-0"


@pytest.mark.usefixtures("gpus")
def test_nccl_is_refused_where_ranks_share_a_gpu():
    store = dist.HashStore()
    store.set("device/1", "GPU-1")
    store.set("device/2", "GPU-0")
    with pytest.raises(ConfigError, match=r"a CUDA device per rank, but ranks \[0, 2\] share theirs"):
        choose_backend("nccl", torch.device("cuda:0"), store, 0, 3)
    assert choose_backend("gloo", torch.device("cuda:0"), store, 0, 3) == "gloo"


def _be_rank(rank, port):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo"
    )
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"


@pytest.fixture
def in_two_ranks():
    """Return a function that runs another in two processes, which give their results to a queue, and collects these."""
    # As under torchrun, the store outlives the groups.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("fork")
    ranks = []

    def run(function, num_results):
        results = context.Queue()
        ranks.extend(context.Process(target=function, args=(rank, store.port, results)) for rank in range(2))
        for rank in ranks:
            rank.start()
        return [results.get() for _ in range(num_results)], ranks

    yield run
    for rank in ranks:
        rank.kill()
        rank.join()


def _leave_without_the_others(rank, port, results):
    _be_rank(rank, port)
    failure.CONSULT_SECONDS = 0.1
    try:
        with World.join(timeout_seconds=600, backend="gloo"):
            if rank == 1:
                os._exit(0)
    except PeerLostError as error:
        results.put(str(error))
        results.close()
        results.join_thread()


def test_leaving_does_not_hang_when_a_peer_is_gone(in_two_ranks):
    (message,), ranks = in_two_ranks(_leave_without_the_others, 1)
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    # Not "waited for 600 s for ...".
    assert "ended while this rank was waiting for the end of the run" in message


def _join_in_turn(rank, port, results):
    _be_rank(rank, port)
    found = []
    for turn in range(4):
        with World.join(timeout_seconds=600, backend="gloo") as world:
            found.append(world.failures.find())
            total = torch.ones(1)
            dist.all_reduce(total, group=world.control)
            found.append(total.item())
            dist.barrier(group=world.control)
            world.failures.publish(f"said in turn {turn}")
    results.put(found)
    results.close()
    results.join_thread()


def test_ranks_join_again_with_nothing_left_of_the_last_time(in_two_ranks):
    found, _ = in_two_ranks(_join_in_turn, 2)
    assert found == [[None, 2.0] * 4] * 2


def test_leaving_waits_for_threads_that_still_have_something_in_hand(tmp_path, monkeypatch):
    states = iter(["R", "R", "S"])

    def write(_seconds):
        (tmp_path / "7" / "stat").write_text(f"7 (pt_gloo_runloop) {next(states)} 1 7")

    (tmp_path / "7").mkdir()
    (tmp_path / "8").mkdir()
    (tmp_path / "8" / "stat").write_text("8 (python) R 1 8")  # whoever else computes is not waited for
    monkeypatch.setattr(joining, "_THREADS", tmp_path)
    monkeypatch.setattr(joining.time, "sleep", write)
    with World.join(timeout_seconds=10, backend="gloo"):
        pass
    assert next(states, None) is None


def test_a_group_that_was_left_has_no_threads():
    gc.collect()  # groups of other tests
    before = _gloo_threads()
    with World.join(timeout_seconds=10, backend="gloo") as world:
        dist.all_reduce(torch.zeros(1), group=world.control)
        threads = _gloo_threads() - before
        assert threads
        # Optimizers import it. Were it the first time, its functions would have the group as a default for ever.
        importlib.import_module("torch.distributed.nn.functional")
    del world
    while threads & _gloo_threads():  # one that has ended may be listed for a moment, one that has not for ever
        time.sleep(0.01)


def _gloo_threads():
    found = set()
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has ended
            if (thread / "comm").read_text().strip() == "pt_gloo_runloop":
                found.add(thread.name)
    return found
