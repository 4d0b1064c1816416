"""Moves values between stages: receives are posted ahead, sends never make compute wait.

Messages travel on *channels*, one per cut and direction, through memory that both ranks see where they can. Elsewhere,
with gloo all use one communicator of this transport's own, and a message is matched by a tag made of channel and serial
number. NCCL has no tags and runs the operations of a communicator in order, so there every *link*, a directed pair of
ranks, gets one communicator for activations and one for gradients. On each, receives are posted in the order of the
program, and `validate_schedule` has shown that this is the order of the sends.

A synchronous schedule without spare depth has no slack: whatever a rank does between the arrival of a message and the
compute that waits for it delays all ranks. So `receive` posts, acknowledges and tidies before it waits, not after.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from vpipe.errors import ConfigError
from vpipe.model.chain import ValueSpec
from vpipe.planner.cost.loads import SPARE_GRADIENTS
from vpipe.runtime.comm.channel import Channel, Link, Microbatches
from vpipe.runtime.comm.message import Message, MessageLayout
from vpipe.runtime.comm.shared_links import share_memory
from vpipe.runtime.comm.shared_memory import Inbox, Outbox
from vpipe.runtime.comm.world import World
from vpipe.schedule.action import Action, Kind
from vpipe.schedule.passes.lower import counterpart, lower
from vpipe.schedule.schedule import Schedule

__all__ = ["Transport"]

_RECEIVES_AHEAD = 2
_TAG_LIMIT = 1 << 31

_CUT_OFFSET = {Kind.SEND_F: 1, Kind.RECV_F: 0, Kind.SEND_B: 0, Kind.RECV_B: 1}
_FORWARD = frozenset({Kind.SEND_F, Kind.RECV_F})
_SENDS = frozenset({Kind.SEND_F, Kind.SEND_B})


class Transport:
    """Point-to-point messages of one rank; making one is collective.

    Args:
        schedule: a schedule of the pipeline, whose links are those of all its programs.
        world: the ranks, and how they may talk to each other.
        announce: is told what the rank is about to wait for, so that a hang or a death can be explained.
        ordered: match messages by their order on a link instead of by tags; None: as the process group's backend needs.
    """

    def __init__(
        self,
        schedule: Schedule,
        world: World,
        announce: Callable[[str], None] = lambda _: None,
        *,
        ordered: bool | None = None,
    ) -> None:
        is_nccl, device = world.backend == "nccl", world.device
        if is_nccl and device.type != "cuda":
            raise ConfigError(f"the process group's backend is nccl but the device is {device}; use cuda, or gloo")
        self._schedule = schedule
        self._world = world
        self._rank, self._activity = world.rank, world.activity
        self._device = device
        self._announce = announce
        self._ordered = is_nccl if ordered is None else ordered
        self._wire = device if is_nccl else torch.device("cpu")
        self._outboxes: Mapping[Link, Outbox] = {}
        self._inboxes: Mapping[Link, Inbox] = {}
        self._groups: dict[Link, dist.ProcessGroup] = {}
        if world.num_ranks > 1:
            self._connect()
        self._layouts: defaultdict[int, dict[tuple[ValueSpec, ...], MessageLayout]] = defaultdict(dict)
        self._messages: defaultdict[int, list[Message]] = defaultdict(list)
        self._channels: dict[tuple[Kind, int], Channel] = {}
        self._upcoming: defaultdict[Link, deque[tuple[Channel, int]]] = defaultdict(deque)
        self._answered: list[tuple[Channel, int]] = []
        self._num_posted: Counter[Link] = Counter()
        self._actions: Sequence[Action] = ()
        self._receives: list[tuple[Channel, int]] = []
        self._num_channels = 2 * schedule.num_stages + 2
        self._base = 0
        self._has_posted = False
        """Whether the program has posted receives; the first one that waits does, not the rank that computes first."""
        self._span = 0
        self._window = 0
        self.bytes_sent = 0
        self.bytes_received = 0

    def _links(self) -> list[Link]:
        links = {
            (rank, self._schedule.rank_of(counterpart(action)), action.kind is Kind.SEND_F)
            for rank, order in enumerate(lower(self._schedule))
            for action in order
            if action.kind in _SENDS
        }
        return sorted(links)

    def _connect(self) -> None:
        if self._ordered:
            self._groups = self._open_ordered()
            return
        shared = share_memory(self._links(), self._world, allowed=self._world.shared_memory)
        self._outboxes, self._inboxes = shared.outboxes, shared.inboxes
        if not shared.are_all:
            self._groups = self._open_tagged()

    def _open_tagged(self) -> dict[Link, dist.ProcessGroup]:
        # Not before it is needed: gloo has a thread for each communicator, which wakes a hundred times per second.
        group = self._world.new_group(backend="gloo")
        assert group is not None  # it is of all ranks
        return dict.fromkeys(self._links(), group)

    def _open_ordered(self) -> dict[Link, dist.ProcessGroup]:
        groups = {link: self._world.new_group(link[:2]) for link in self._links()}
        own = {link: group for link, group in groups.items() if group is not None}
        for (source, target, _), group in own.items():
            # NCCL connects at the first message, and blocks until the other side does: in the same order everywhere,
            # or two ranks that post their first receives from each other would wait for ever.
            probe = torch.zeros(1, device=self._wire)
            with self._activity.waiting("the first message of a link", (source + target - self._rank,), group):
                if self._rank == source:
                    dist.send(probe, self._world.processes[target], group)
                else:
                    dist.recv(probe, self._world.processes[source], group)
        return own

    def stand_in(self, replace: Callable[[dict[Link, dist.ProcessGroup]], dict[Link, dist.ProcessGroup]]) -> None:
        """Send through what `replace` returns for the links' groups, not through shared memory; collective.

        Call it before the first program.

        Raises:
            ConfigError: messages are matched by their order, as with nccl, where none can be held back.
        """
        if self._ordered:
            raise ConfigError("slow links can be emulated with gloo only; set launch.distributed_backend: gloo")
        self._outboxes, self._inboxes = {}, {}
        self._groups = replace(self._groups or self._open_tagged())

    def start(
        self,
        actions: Sequence[Action],
        microbatches: Microbatches,
        num_microbatches: int,
        window: int,
    ) -> None:
        """Begin a program: learn what will be received in which order.

        At most `window` sends stay open per channel: more cannot be unanswered when `window` is the number of
        microbatches in flight.
        """
        self._microbatches = microbatches
        self._base += self._span
        self._span, self._window = num_microbatches, window
        for (_, _, is_forward), outbox in self._outboxes.items():
            # Activations that were sent are held by the receiver, and all of them come back when a batch ends.
            outbox.num_spare = window if is_forward else SPARE_GRADIENTS
        # The batches of a synchronous schedule run one program again and again.
        if self._actions is not actions:
            self._actions = actions
            self._channels = {}
            self._receives = [
                (self._channel(action), action.microbatch)
                for action in actions
                if action.kind in (Kind.RECV_F, Kind.RECV_B)
            ]
            for action in actions:
                if action.kind in _SENDS:
                    self._channel(action)
        self._upcoming.clear()
        self._num_posted.clear()
        for channel, microbatch in self._receives:
            if channel.link not in self._inboxes:
                self._upcoming[channel.link].append((channel, microbatch))
        self._has_posted = False

    def _channel(self, action: Action) -> Channel:
        key = (action.kind, action.stage)
        if key not in self._channels:
            cut, forward = action.stage + _CUT_OFFSET[action.kind], action.kind in _FORWARD
            index = 2 * cut + (0 if forward else 1)
            peer = self._schedule.rank_of(counterpart(action))
            link = (self._rank, peer, forward) if action.kind in _SENDS else (peer, self._rank, forward)
            post = self._poster(link, peer) if link in self._groups else None
            self._channels[key] = Channel(
                index, peer, link, post, self._wire, self._messages[index], self._layouts[index]
            )
        return self._channels[key]

    def _poster(self, link: Link, peer: int) -> Callable[[Tensor, int], dist.Work]:
        group = self._groups[link]
        # The group's own method: what `dist.isend` and `dist.irecv` add to it costs more than it does.
        operation = group.send if link[0] == self._rank else group.recv
        peer_in_group = self._world.position_in(group, peer)
        return lambda buffer, tag: operation([buffer], peer_in_group, tag)

    def _tag(self, channel: Channel, microbatch: int) -> int:
        if self._ordered:
            return 0
        return (channel.index + self._num_channels * (self._base + microbatch)) % _TAG_LIMIT

    def _post_ahead(self, link: Link, now: int) -> None:
        """Post the next receives of a link whose sizes can be known while microbatch `now` is waited for."""
        upcoming = self._upcoming[link]
        while upcoming and self._num_posted[link] < _RECEIVES_AHEAD and self._microbatches.knows(upcoming[0][1], now):
            self._post_next(link)

    def _post_next(self, link: Link) -> None:
        channel, microbatch = self._upcoming[link].popleft()
        if (layout := channel.layout_of(self._microbatches.crossing(microbatch))).specs:
            message = channel.take(layout)
            channel.posted[microbatch] = self._post(channel, microbatch, message), message
            self._num_posted[link] += 1

    def _post(self, channel: Channel, microbatch: int, message: Message) -> dist.Work:
        assert channel.post is not None
        try:
            return channel.post(message.buffer, self._tag(channel, microbatch))
        except RuntimeError as error:
            sending = channel.link[0] == self._rank
            message_name = channel.name(microbatch)
            awaited = f"room to send {message_name}" if sending else message_name
            self._activity.raise_if_lost(error, awaited, channel.peer)
            raise

    def send(self, action: Action, values: Mapping[str, Tensor]) -> None:
        """Start sending `values` (by name) for a SEND_F or SEND_B; return without waiting for the receiver.

        Raises:
            PeerLostError: the receiving rank died.
            TransportError: a value does not have the shape or type that was agreed.
        """
        channel = self._channels[action.kind, action.stage]
        layout = channel.layout_of(self._microbatches.crossing(action.microbatch))
        if not layout.specs:
            return
        self.bytes_sent += layout.num_bytes
        if (outbox := self._outboxes.get(channel.link)) is not None:
            outbox.send(
                layout,
                self._base + action.microbatch,
                values,
                lambda: f"room to send {channel.name(action.microbatch)}",
            )
            return
        message = channel.take(layout)
        message.pack(self._base + action.microbatch, values)
        channel.sent[action.microbatch] = self._post(channel, action.microbatch, message), message
        if len(channel.sent) > self._window:
            self._complete(channel, next(iter(channel.sent)))

    def receive(self, action: Action) -> dict[str, Tensor]:
        """Wait for the message of a RECV_F or RECV_B and return its values by name, on the compute device.

        Raises:
            PeerLostError: the sending rank died or did not answer in time.
            TransportError: another message arrived than the one that was waited for.
        """
        channel = self._channels[action.kind, action.stage]
        layout = channel.layout_of(self._microbatches.crossing(action.microbatch))
        if not layout.specs:
            return {}
        inbox = self._inboxes.get(channel.link)
        if inbox is None:
            values = self._receive_posted(channel, action)
        else:
            self._await_shared(inbox, channel, action)
            values = inbox.receive(layout, self._base + action.microbatch)
        self.bytes_received += layout.num_bytes
        if self._wire == self._device:
            return values
        return {name: value.to(self._device) for name, value in values.items()}

    def _await_shared(self, inbox: Inbox, channel: Channel, action: Action) -> None:
        inbox.give_back()
        if not inbox.take():
            what = channel.name(action.microbatch)
            self._announce(f"waiting for {what} from rank {channel.peer}")
            inbox.wait(what)
            self._announce("running")

    def _receive_posted(self, channel: Channel, action: Action) -> dict[str, Tensor]:
        link, now = channel.link, action.microbatch
        if not self._has_posted:
            self._has_posted = True
            for each in self._upcoming:
                self._post_ahead(each, now)
        while now not in channel.posted:
            self._post_next(link)
        work, message = channel.posted.pop(now)
        # Whatever can be done before the wait must not be done after it: compute is waiting then.
        self._num_posted[link] -= 1
        self._post_ahead(link, now)
        if self._answered:
            self._complete_answered()
        what = channel.name(action.microbatch)
        self._wait(work, what, channel, f"waiting for {what} from rank {channel.peer}")
        if action.kind is Kind.RECV_B and (forward := self._channels.get((Kind.SEND_F, action.stage))) is not None:
            # The gradient's arrival shows that the forward message was received.
            self._answered.append((forward, action.microbatch))
        values = message.unpack(self._base + action.microbatch)
        if self._wire.type == "cpu":
            channel.messages.append(message)
        return values

    def _complete_answered(self) -> None:
        for channel, microbatch in self._answered:
            self._complete(channel, microbatch)
        self._answered.clear()

    def _complete(self, channel: Channel, microbatch: int) -> None:
        if microbatch in channel.sent:
            work, message = channel.sent.pop(microbatch)
            announcement = f"waiting for rank {channel.peer} to take {channel.name(microbatch)}"
            self._wait(work, f"the taking of {channel.name(microbatch)}", channel, announcement)
            if self._wire.type == "cpu":
                channel.messages.append(message)

    def _wait(self, work: dist.Work, what: str, channel: Channel, announcement: str) -> None:
        self._announce(announcement)
        self._activity.begin_wait(what, (channel.peer,), self._groups.get(channel.link))
        try:
            work.wait()
            if self._wire.type == "cuda":
                # With NCCL only the stream waits; what is announced is for those who wonder why this rank does.
                torch.cuda.current_stream().synchronize()
        except RuntimeError as error:
            self._activity.raise_if_lost(error, what, channel.peer)
            raise
        finally:
            self._activity.wait = None
        self._announce("running")

    def memory(self) -> dict[int, int]:
        """Return place and bytes of all messages: on their way, or waiting to be used again."""
        posted = [message for channel in self._channels.values() for _, message in channel.posted.values()]
        sent = [message for channel in self._channels.values() for _, message in channel.sent.values()]
        kept = [message for messages in self._messages.values() for message in messages]
        places = {message.buffer.data_ptr(): message.capacity for message in (*posted, *sent, *kept)}
        boxes: list[Outbox | Inbox] = [*self._outboxes.values(), *self._inboxes.values()]
        for box in boxes:
            places |= box.memory()
        return places

    def finish(self) -> None:
        """End a program: wait until all that was sent through sockets has been taken; shared memory outlives us.

        What was received is given back now, or a neighbour that begins the next batch first would need more memory.
        """
        for inbox in self._inboxes.values():
            inbox.give_back()
        self._answered.clear()
        self._flush(_SENDS)

    def finish_gradients(self) -> None:
        """Do so for gradients alone, which are taken whatever comes after them."""
        self._flush({Kind.SEND_B})

    def _flush(self, kinds: Iterable[Kind]) -> None:
        for (kind, _), channel in self._channels.items():
            if kind in kinds:
                for microbatch in list(channel.sent):
                    self._complete(channel, microbatch)
