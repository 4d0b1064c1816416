"""Links in shared memory: order, reuse of places, and what each end is told when the other is gone."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from dataclasses import replace
from datetime import timedelta

import pytest
import torch

from vpipe.errors import PeerLostError, TransportError
from vpipe.model.chain import ValueSpec
from vpipe.runtime.comm import shared_memory as module
from vpipe.runtime.comm.message import MessageLayout
from vpipe.runtime.comm.shared_memory import open_inbox, open_outbox

LAYOUT = MessageLayout(3, [ValueSpec("hidden", (4,), torch.float32, True), ValueSpec("mask", (2,), torch.bool, False)])
OTHER = MessageLayout(5, [ValueSpec("hidden", (5000,), torch.float32, True)])
SHORT = timedelta(seconds=0.05)


def values(number):
    return {"hidden": torch.full((4,), float(number)), "mask": torch.tensor([True, number % 2 == 0])}


def name():
    return "room to send 0F3"


@pytest.fixture
def link():
    """Return both ends of a link, in one process."""
    outbox = open_outbox()
    inbox = open_inbox(outbox.invitation, 0, SHORT)
    outbox.connect(1, os.getpid(), SHORT)
    return outbox, inbox


def take(inbox, serial, layout=LAYOUT):
    inbox.give_back()
    assert inbox.take()
    return inbox.receive(layout, serial)


def test_messages_arrive_in_order_as_they_were_sent(link):
    outbox, inbox = link
    for number in range(5):
        outbox.send(LAYOUT, number, values(number), name)
    for number in range(5):
        found = take(inbox, number)
        assert {key: value.tolist() for key, value in found.items()} == {
            key: value.tolist() for key, value in values(number).items()
        }
    assert not inbox.take()


def test_a_missing_gradient_is_missing(link):
    outbox, inbox = link
    outbox.send(LAYOUT, 0, {"mask": torch.tensor([True, False])}, name)
    assert list(take(inbox, 0)) == ["mask"]


def test_a_place_is_used_again_once_nothing_stands_on_it(link):
    outbox, inbox = link
    outbox.send(LAYOUT, 0, values(7), name)
    kept = take(inbox, 0)["hidden"][1:]  # a view keeps the place, too
    for number in range(1, 4):
        outbox.send(LAYOUT, number, values(number), name)
        take(inbox, number)
    assert kept.tolist() == [7.0] * 3
    places = {place for messages in (outbox._away, inbox._messages) for place in messages}
    del kept
    for number in range(4, 5000):  # several times around the rings
        outbox.send(LAYOUT, number, values(number), name)
        assert take(inbox, number)["hidden"][0] == number
    assert set(inbox._messages) == places
    assert len(places) == 3


def test_more_messages_may_be_held_than_the_rings_are_long(link):
    outbox, inbox = link
    count = module._NUM_ENTRIES + 100
    held = []
    for number in range(count):
        outbox.send(LAYOUT, number, values(number), name)
        held.append(take(inbox, number))
    assert [found["hidden"][0].item() for found in held] == list(range(count))
    held.clear()
    for number in range(count, 3 * count):
        outbox.send(LAYOUT, number, values(number), name)
        assert take(inbox, number)["hidden"][0] == number
    assert len(inbox._messages) <= count + 2


def test_layouts_have_places_of_their_own(link):
    outbox, inbox = link
    for number in range(6):
        layout = (LAYOUT, OTHER)[number % 2]
        outbox.send(layout, number, {"hidden": torch.full(layout.specs[0].shape, float(number))}, name)
        assert take(inbox, number, layout)["hidden"][-1] == number
    assert len(inbox._messages) == 2


def test_bytes_are_counted_on_one_side_at_a_time(link):
    outbox, inbox = link

    def counted():
        return [sum(box.memory().values()) // LAYOUT.num_bytes for box in link]

    for number in range(3):
        outbox.send(LAYOUT, number, values(number), name)
    assert counted() == [3, 0]
    found = take(inbox, 0)
    assert counted() == [2, 1]
    take(inbox, 1)
    assert counted() == [1, 2]
    del found
    take(inbox, 2)  # gives both back
    assert counted() == [2, 1]
    outbox.send(LAYOUT, 3, values(3), name)
    assert counted() == [2, 1]


def test_gradients_that_piled_up_leave_no_memory_behind(link):
    outbox, inbox = link
    outbox.num_spare = 2

    def held():
        return sum(outbox.memory().values()) // OTHER.num_bytes, os.fstat(outbox.invitation.descriptor).st_blocks

    _, empty = held()
    for number in range(6):  # the receiver is behind
        outbox.send(OTHER, number, {"hidden": torch.full((5000,), float(number))}, name)
    assert held()[0] == 6
    for number in range(6):
        assert (take(inbox, number, OTHER)["hidden"] == number).all()
    inbox.give_back()
    assert held() == (2, empty + 2 * -(-OTHER.num_bytes // 4096) * 8)
    for number in range(6, 12):  # the same places get memory again
        outbox.send(OTHER, number, {"hidden": torch.full((5000,), float(number))}, name)
    assert [float(take(inbox, number, OTHER)["hidden"].sum()) for number in range(6, 12)] == [
        5000.0 * number for number in range(6, 12)
    ]
    assert len(inbox._messages) == 6


def test_another_message_than_the_one_waited_for_is_an_error(link):
    outbox, inbox = link
    outbox.send(LAYOUT, 4, values(4), name)
    with pytest.raises(TransportError, match=r"expected message \(channel, serial, layout\) \(3, 5, \d+\) but"):
        take(inbox, 5)
    outbox.send(OTHER, 5, {"hidden": torch.ones(5000)}, name)
    with pytest.raises(TransportError, match=r"expected a message of \d+ bytes but received 20,\d+; all ranks must"):
        take(inbox, 5)


def test_a_sender_whose_messages_nobody_takes_says_so(link, monkeypatch):
    outbox, _ = link
    place = outbox._new(LAYOUT)
    monkeypatch.setattr(outbox, "_new", lambda layout: place)  # memory is not the point
    for number in range(module._NUM_ENTRIES):
        outbox.send(LAYOUT, number, values(number), name)
    with pytest.raises(PeerLostError, match=r"waited for 0\.05 s for room to send 0F3 from rank 1, which does not"):
        outbox.send(LAYOUT, module._NUM_ENTRIES, values(0), name)


def test_a_receiver_that_waits_too_long_says_so(link):
    with pytest.raises(PeerLostError, match=r"waited for 0\.05 s for 0F3 from rank 0, which does not answer"):
        link[1].wait("0F3")


def test_no_memory_is_an_error_that_says_what_to_do(link, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(
        TransportError, match=r"no shared memory for a message of 192 bytes beside .*shared_memory: false"
    ):
        link[0].send(LAYOUT, 0, values(0), name)


def test_what_cannot_be_opened_is_no_link(monkeypatch):
    invitation = open_outbox().invitation
    outbox = open_outbox()
    with open(os.devnull) as file:
        for wrong in (
            replace(outbox.invitation, token=bytes(16)),
            replace(outbox.invitation, descriptor=file.fileno()),
            replace(outbox.invitation, pid=2**22 + 1),
            invitation,  # its outbox is gone, and so is the file
        ):
            assert open_inbox(wrong, 0, SHORT) is None
    assert open_inbox(outbox.invitation, 0, SHORT) is not None
    monkeypatch.delattr(os, "memfd_create")
    assert open_outbox() is None


def send_one(outbox, pipe):
    outbox.send(LAYOUT, 0, values(0), name)
    pipe.send("sent")
    time.sleep(60)


def test_what_a_process_sent_before_it_was_killed_arrives_and_then_its_end_is_told():
    outbox = open_outbox()
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    child = multiprocessing.get_context("fork").Process(target=send_one, args=(outbox, theirs))
    child.start()
    inbox = open_inbox(replace(outbox.invitation, pid=child.pid), 0, timedelta(seconds=60))
    assert ours.recv() == "sent"
    child.kill()
    child.join()
    assert inbox.take()
    assert inbox.receive(LAYOUT, 0)["hidden"].tolist() == [0.0] * 4
    with pytest.raises(PeerLostError, match=r"^rank 0 ended while this rank was waiting for 0F1$"):
        inbox.wait("0F1")


def of_length(length):
    return MessageLayout(3, [ValueSpec("hidden", (length,), torch.float32, True)])


@pytest.mark.parametrize("order", ["longest first", "growing", "mixed"])
def test_memory_is_level_whatever_lengths_there_are(link, order):
    outbox, inbox = link
    lengths = [40_000, *range(1_000, 40_000, 500)]
    if order == "growing":
        lengths.sort()
    elif order == "mixed":
        lengths = [1_000 + 7_919 * number % 39_001 for number in range(150)]

    def blocks():
        return os.fstat(outbox.invitation.descriptor).st_blocks * 512

    most, empty = 0, blocks()
    for number, length in enumerate(lengths * 2):
        layout = of_length(length)
        for part in range(3):  # three in flight
            outbox.send(layout, 3 * number + part, {"hidden": torch.full((length,), float(part))}, name)
        found = [take(inbox, 3 * number + part, layout)["hidden"] for part in range(3)]
        assert [item[-1].item() for item in found] == [0.0, 1.0, 2.0]
        del found
        inbox.give_back()
        most = max(most, blocks() - empty)
    longest = -(-of_length(max(lengths)).num_bytes // 4096) * 4096
    assert most <= 4 * longest
