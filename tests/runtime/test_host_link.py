"""The thread that copies: order, what waits for what, where bytes go, and what happens when there is no room."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest
import torch
from torch import Tensor

from vpipe.errors import ConfigError, ExecutionError
from vpipe.runtime.memory.host_link import Owner, StreamLink, ThreadLink, open_host_link
from vpipe.runtime.memory.host_memory import MappedMemory
from vpipe.runtime.memory.swap import Parcel

PAGE = mmap.ALLOCATIONGRANULARITY


def parcels(*sizes: int) -> list[Parcel]:
    return [Parcel(torch.randint(0, 256, (size,), dtype=torch.uint8).untyped_storage()) for size in sizes]


class Gate:
    """Host memory that lets nothing in until it is opened."""

    def __init__(self, memory: MappedMemory) -> None:
        self.memory = memory
        self.opened, self.asked = Event(), Event()

    def take(self, num_bytes: int) -> Tensor:
        self.asked.set()
        assert self.opened.wait(30)
        return self.memory.take(num_bytes)

    def give(self, region: Tensor) -> None:
        self.memory.give(region)


def test_bytes_go_out_and_come_back(tmp_path: Path) -> None:
    link = open_host_link(torch.device("cpu"), tmp_path)
    sent = parcels(5000, 1, 70000)
    contents = [parcel.content().clone() for parcel in sent]
    link.offload((0, 0), sent)
    link.fetch((0, 0), sent[::-1])
    assert all(torch.equal(parcel.content(), content) for parcel, content in zip(sent, contents, strict=True))
    link.close()
    assert link.bytes_offloaded == link.bytes_fetched == 75001
    assert list(tmp_path.iterdir()) == []  # the file has no name


def test_an_offload_does_not_wait_but_the_next_one_waits_for_it(tmp_path: Path) -> None:
    gate = Gate(MappedMemory(tmp_path))
    link = ThreadLink(gate)
    first, second = parcels(100), parcels(100)
    link.offload((0, 0), first)
    assert gate.asked.wait(30)
    assert first[0].device is not None  # on its way, and still here
    link.fetch((0, 0), first)
    gate.opened.set()
    link.offload((0, 1), second)
    assert first[0].content().numel() == 100
    link.close()
    assert second[0].device is None


def test_memory_is_free_when_it_has_left(tmp_path: Path) -> None:
    moves: list[tuple[Owner, bool, bool]] = []
    link = ThreadLink(
        MappedMemory(tmp_path), lambda owner, parcel, comes: moves.append((owner, comes, parcel.device is not None))
    )
    sent = parcels(10)
    link.offload((3, 7), sent)
    link.fetch((3, 7), sent)
    sent[0].content()
    link.close()
    assert moves == [((3, 7), True, True), ((3, 7), False, True), ((3, 7), True, False)]


def test_regions_are_used_again(tmp_path: Path) -> None:
    memory = MappedMemory(tmp_path)
    link = ThreadLink(memory)
    for number in range(5):
        sent = parcels(3 * PAGE, 10)
        link.offload((0, number), sent)
        link.fetch((0, number), sent)
        for parcel in sent:
            parcel.content()
    link.close()
    assert memory.num_bytes == 4 * PAGE


class Streams:
    """What `StreamLink` asks of torch.cuda, on a CPU: notes what is queued on which stream, and does it at once."""

    class Stream:
        device = torch.device("cpu")

        def __init__(self, log: list[str], name: str) -> None:
            self.log, self.name = log, name

        def wait_stream(self, other: Streams.Stream) -> None:
            self.log.append(f"{self.name} waits for {other.name}")

        def record_event(self) -> Streams.Event:
            return Streams.Event(self)

    class Event:
        def __init__(self, stream: Streams.Stream) -> None:
            self.stream = stream

        def wait(self) -> None:
            self.stream.log.append(f"computing waits for {self.stream.name}")

        def synchronize(self) -> None:
            self.stream.log.append(f"host waits for {self.stream.name}")

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.current = Streams.Stream(self.log, "computing")
        patch.setattr(torch.cuda, "Stream", lambda _: Streams.Stream(self.log, "copying"))
        patch.setattr(torch.cuda, "current_stream", lambda: self.current)
        patch.setattr(torch.cuda, "stream", self.on)
        patch.setattr(Tensor, "record_stream", lambda _, stream: self.log.append(f"allocator told of {stream.name}"))
        patch.setattr(Tensor, "copy_", lambda target, source, non_blocking: self.copy(target, source))

    @contextmanager
    def on(self, stream: Streams.Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.log.append(f"{self.current.name} copies")
        target.numpy()[:] = source.numpy()


def test_a_gpu_copies_beside_the_computation_and_never_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = parcels(5000, 70000)
    contents = [parcel.content().clone() for parcel in sent]
    streams = Streams(monkeypatch)
    link = StreamLink(
        torch.device("cpu"),
        MappedMemory(tmp_path),
        lambda owner, parcel, comes: streams.log.append(f"moved on {streams.current.name}"),
    )
    link.offload((0, 0), sent)
    one = ["copying copies", "allocator told of copying", "moved on copying"]
    assert streams.log == ["copying waits for computing", *["moved on computing"] * 2, *one, *one]
    assert [parcel.device for parcel in sent] == [None, None]
    streams.log.clear()
    link.fetch((0, 0), sent)
    one = ["moved on computing", "allocator told of copying", "copying copies"]
    assert streams.log == ["copying waits for computing", *one, *one]
    streams.log.clear()
    assert all(torch.equal(parcel.content(), content) for parcel, content in zip(sent, contents, strict=True))
    assert streams.log == ["computing waits for copying"] * 2
    streams.log.clear()
    link.offload((0, 1), [])
    assert streams.log[0] == "host waits for copying"
    assert link.bytes_offloaded == link.bytes_fetched == 75000


class Full(MappedMemory):
    def take(self, num_bytes: int) -> Tensor:
        if num_bytes > 100:
            raise ExecutionError("no room")
        return super().take(num_bytes)


def test_errors_are_raised_where_the_bytes_are_needed(tmp_path: Path) -> None:
    link = ThreadLink(Full(tmp_path))
    large, small = parcels(200), parcels(50)
    link.offload((0, 0), large)
    link.offload((0, 1), small)
    link.fetch((0, 0), large)
    link.fetch((0, 1), small)
    assert small[0].content().numel() == 50
    with pytest.raises(ExecutionError, match="no room"):
        large[0].content()
    link.close()


def test_a_disk_without_room_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(28, "No space left on device")

    memory = MappedMemory(tmp_path)
    monkeypatch.setattr("os.posix_fallocate", refuse)
    with pytest.raises(ExecutionError, match=r"swapping needs 8,192 bytes in .*No space left.*another swap_directory"):
        memory.take(PAGE + 1)


def test_a_folder_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"swapped activations cannot be kept in '.*nowhere'.*swap_directory that"):
        MappedMemory(tmp_path / "nowhere")
