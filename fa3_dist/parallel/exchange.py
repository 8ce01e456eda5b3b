"""Messages between the ranks of a ring: one small protocol, two implementations.

`DistributedExchange` moves tensors over a `torch.distributed` process group: gloo for CPU tensors, NCCL on a stream of
its own for CUDA tensors. `InProcessExchange` runs every rank of a ring in one process (`run_in_process`), which is how
a ring of 8 is tested on one device. `Subgroup` is a part of either: the ranks that swap heads, or the ring over those.

An exchange is started before the work that hides it and waited for after it:

    pending = exchange.exchange(send=kv, destination=1, receive=buffer, source=3, what="K/V", step=2)
    ...                                     # compute
    pending.wait()                          # now `buffer` is filled and `kv` may be changed

A message may have several parts, such as K and V: tensors that travel together, each from where it lies to where it is
wanted. What has no elements is never sent; both sides know every size from the schedule, so both skip it. A peer that
is dead or stuck becomes a `RingError` that names this rank, the step, what was awaited and the peer, in time.

Where a message lands may be the exchange's to say (`Exchange.room`): between GPUs of one host that can write to each
other's memory it then travels by copy engines (`peer_copy.py`), which take no SMs from attention.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import math
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fa3_dist.parallel import peer_copy
from fa3_dist.parallel.observe import COMMUNICATION, Observer
from fa3_dist.parallel.peer_copy import CannotCopy, PeerCopies

logger = logging.getLogger("fa3_dist")


# What travels one way: a tensor, or the parts of a message; None or no parts: nothing does.
Message = Tensor | Sequence[Tensor] | None
Parts = tuple[Tensor, ...]  # those that have elements


class RingError(RuntimeError):
    """A message of the ring did not get through. The back end's own error, if it gave one, is chained as the cause.

    Attributes: `rank` (this rank), `step` (the shift of the ring step), `what` (e.g. "K/V" or "dK/dV"), `peer` (the
    rank that was waited for; the first of them where it may have been another one, which `reason` says), `reason`.
    """

    def __init__(self, rank: int, step: int, what: str, peer: int, reason: str):
        super().__init__(rank, step, what, peer, reason)
        self.rank, self.step, self.what, self.peer, self.reason = rank, step, what, peer, reason

    def __str__(self) -> str:
        return f"rank {self.rank}, ring step {self.step}: {self.what} {self.reason}"


@dataclass
class Traffic:
    """What one rank has sent and received so far; empty messages, which are not sent, don't count."""

    messages_sent: int = 0
    messages_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0

    def reset(self) -> None:
        self.messages_sent = self.messages_received = self.bytes_sent = self.bytes_received = 0

    def _count(self, send: Parts, receive: Parts) -> None:
        self.messages_sent += bool(send)
        self.messages_received += bool(receive)
        self.bytes_sent += _bytes(send)
        self.bytes_received += _bytes(receive)


class Place(NamedTuple):
    """Where messages land, one after the other: a number that all ranks have in common, and how large they may be."""

    number: int
    most_rows: int  # of the messages of all ranks


class Move(NamedTuple):
    """An exchange to be started: the arguments of `Exchange.exchange`."""

    send: Message
    destination: int
    receive: Message
    source: int
    what: str
    step: int


class Pending(Protocol):
    """An exchange under way."""

    def wait(self) -> None:
        """Returns once the receive buffer may be read and the send buffer changed (on CUDA: by work queued on the
        current stream from here on; the host does not wait). Raises RingError if a peer is dead or stuck."""


NO_STAMP = -1  # of a message that won't be known later


class Exchange(Protocol):
    """What a ring needs: its place in the ring, and messages to and from any other rank.

    All ranks start their exchanges in the same order; between two ranks, messages match in the order they were started.
    A message into a place that the exchange has (`room`) is one into that place on either side.
    `sm_margin` is the number of SMs that the attention kernels leave to transfers under way (0 on the CPU). `observer`,
    if it is not None, is told when messages travel and, by the ring, when attention computes.
    """

    rank: int
    world: int
    sm_margin: int
    stats: Traffic
    observer: Observer | None

    def room(self, like: Sequence[Tensor], rows: int, place: Place) -> Parts:
        """Memory for a message to come: `rows` rows of the form that those of each tensor have.

        Called by all ranks together, with the same place and rows of the same form. It may be the place's: then it is
        valid for work that is queued before the next exchange into that place is started.
        """

    def stamp(self, place: int) -> int:
        """What to ask `remains` with, later, for the message that comes into a place's room now; NO_STAMP: it won't be
        known. The same on all ranks, as they ask for room together."""

    def remains(self, like: Sequence[Tensor], rows: int, place: Place, stamp: int) -> Parts | None:
        """The room of a message that has come, with what is in it; None if it was asked for again since the stamp, or
        may not have stayed for other reasons: on all ranks alike. `like`, `rows` and `place` are those that room was
        asked for with. It is valid as that room is: for work queued before the next exchange into the place."""

    def exchange(self, *, send: Message, destination: int, receive: Message, source: int, what: str,
                 step: int, place: Place | None = None) -> Pending:
        """Starts sending `send` to rank `destination` and filling `receive` from rank `source`.

        Args:
            send, receive: contiguous tensors of any dtype, as many with elements on either side; none: no message in
                that direction.
            destination, source: ranks of this ring.
            what, step: what travels and in which step, for error messages.
            place: the one that every rank's `receive` is from; None: they are from anywhere.
        """

    def exchange_together(self, moves: Sequence[Move]) -> list[Pending]:
        """The same for several exchanges, of which none waits for another one to find room on the device. What one rank
        starts together, so do those that it exchanges with."""

    def let_begin(self) -> None:
        """To be called before work that fills the device: exchanges started before it get their share of it first."""

    def confirm(self) -> None:
        """To be called once all that was received is read, or queued to be: work queued after it begins only if none of
        that can have been overwritten meanwhile, by a rank that has given up."""

    def raise_failure(self) -> None:
        """Raises the RingError of a message that did not come. On CUDA the host goes on while messages travel: it knows
        of one that failed no later than when it has waited for work that the message was to feed."""

    def side_stream(self) -> Any:
        """A CUDA stream for work beside that of the current one that may take every SM: None where messages would then
        wait for SMs, and on the CPU."""


class Subgroup:
    """The exchange of some of an exchange's ranks among themselves: rank i of it is rank members[i] there.

    It has no connections of its own, so making one costs nothing and takes no other rank. Errors name the ranks of the
    exchange that it is a part of, and traffic is counted there.

    Args:
        exchange: the whole.
        members: different ranks of it, this one among them.
    """

    def __init__(self, exchange: Exchange, members: Sequence[int]):
        self.members = tuple(members)
        self.rank, self.world = self.members.index(exchange.rank), len(self.members)
        self.sm_margin, self.stats = exchange.sm_margin, exchange.stats
        self._exchange = exchange

    @property
    def observer(self) -> Observer | None:
        return self._exchange.observer

    @observer.setter
    def observer(self, observer: Observer | None) -> None:
        self._exchange.observer = observer

    def let_begin(self) -> None:
        """See `Exchange.let_begin`."""
        self._exchange.let_begin()

    def confirm(self) -> None:
        """See `Exchange.confirm`."""
        self._exchange.confirm()

    def raise_failure(self) -> None:
        """See `Exchange.raise_failure`."""
        self._exchange.raise_failure()

    def side_stream(self) -> Any:
        """See `Exchange.side_stream`: messages don't go into places here, so not by copy engines."""
        return None

    def room(self, like: Sequence[Tensor], rows: int, place: Place) -> Parts:
        """See `Exchange.room`. The places are of all ranks, which may not come here together."""
        return new_room(like, rows)

    def stamp(self, place: int) -> int:
        """See `Exchange.stamp`."""
        return NO_STAMP

    def remains(self, like: Sequence[Tensor], rows: int, place: Place, stamp: int) -> Parts | None:
        """See `Exchange.remains`."""
        return None

    def exchange(self, *, send: Message, destination: int, receive: Message, source: int, what: str,
                 step: int, place: Place | None = None) -> Pending:
        """See `Exchange.exchange`."""
        return self._exchange.exchange(send=send, destination=self.members[destination], receive=receive,
                                       source=self.members[source], what=what, step=step)

    def exchange_together(self, moves: Sequence[Move]) -> list[Pending]:
        """See `Exchange.exchange_together`."""
        return self._exchange.exchange_together([
            move._replace(destination=self.members[move.destination], source=self.members[move.source])
            for move in moves
        ])  # fmt: skip


def new_room(like: Sequence[Tensor], rows: int) -> Parts:
    """`Exchange.room` of an exchange that has no places of its own."""
    return tuple(x.new_empty(rows, *x.shape[1:]) for x in like)


def exchange_with_all(exchange: Exchange, send: Sequence[Tensor], receive: Sequence[Tensor], what: str) -> None:
    """Sends send[i] to rank i and fills receive[i] from there, for all ranks; this rank's own is copied."""
    pending = exchange.exchange_together(moves_with_all(exchange, send, receive, what))
    receive[exchange.rank].copy_(send[exchange.rank])
    for transfer in pending:
        transfer.wait()


def moves_with_all(exchange: Exchange, send: Sequence[Message], receive: Sequence[Message], what: str) -> list[Move]:
    """Of messages to and from all other ranks: send[i] to rank i, receive[i] from there. Each is between two ranks, so
    that an error names the one that is waited for."""
    rank, world = exchange.rank, exchange.world
    pairs = [((rank + shift) % world, (rank - shift) % world) for shift in range(1, world)]
    return [Move(send[to], to, receive[source], source, what, step) for step, (to, source) in enumerate(pairs, 1)]


@dataclass(frozen=True)
class _Transfer:
    """The description of one exchange, from which its errors are written."""

    rank: int
    step: int
    what: str
    destination: int | None
    source: int | None

    def receive_error(self, reason: str) -> RingError:
        assert self.source is not None
        return RingError(self.rank, self.step, self.what, self.source, f"from rank {self.source} {reason}")

    def send_error(self, reason: str) -> RingError:
        assert self.destination is not None
        return RingError(self.rank, self.step, self.what, self.destination, f"to rank {self.destination} {reason}")

    def overdue(self, seconds: float) -> RingError:
        """The error of a transfer whose two directions cannot be told apart: it names both peers."""
        if self.source is None:
            return self.send_error(_overdue("was not taken", self.destination, seconds))
        if self.destination in (None, self.source):
            return self.receive_error(_overdue("did not arrive", self.source, seconds))
        return self.receive_error(f"or to rank {self.destination} did not get through within {seconds:g} s: one of "
                                  "them is dead, stuck, or in another step")


@dataclass(frozen=True)
class _Together:
    """Transfers that are through when all of them are."""

    transfers: tuple[_Transfer, ...]

    def overdue(self, seconds: float) -> RingError:
        """An error that names all peers."""
        first = self.transfers[0]
        peers = {peer for each in self.transfers for peer in (each.source, each.destination) if peer is not None}
        if len(peers) <= 2:  # those of a ring, or one
            return first.overdue(seconds)
        *others, last = map(str, sorted(peers))
        return RingError(first.rank, first.step, first.what, min(peers),
                         f"from and to ranks {', '.join(others)} and {last} did not get through within {seconds:g} s: "
                         "one of them is dead, stuck, or in another step")


class _Started(NamedTuple):
    """An exchange that is to start, of parts with elements."""

    transfer: _Transfer
    send: Parts
    receive: Parts


def _overdue(event: str, peer: int | None, seconds: float) -> str:
    return f"{event} within {seconds:g} s: rank {peer} is dead, stuck, or in another step"


class _Nothing:
    """A pending exchange without messages."""

    def wait(self) -> None:
        pass


def _begin(observer: Observer | None, transfer: _Transfer, send: Parts) -> tuple[Observer | None, Any]:
    """Tells an observer that a transfer begins; it, and what it wants to be given at the end."""
    if observer is None:
        return None, None
    return observer, observer.begin(COMMUNICATION, transfer.what, transfer.step, _bytes(send))


def _parts(message: Message) -> Parts:
    """What there is to move."""
    parts = (message,) if isinstance(message, Tensor) else tuple(message or ())
    assert all(part.is_contiguous() for part in parts), "messages are contiguous"
    return tuple(part for part in parts if part.numel())


def _bytes(parts: Parts) -> int:
    return sum(part.nbytes for part in parts)


# ----------------------------------------------------------------------------------------- torch.distributed


# Microseconds that a transfer gets before a kernel that fills the device: for NCCL's stream to reach and launch it.
HEAD_START = 20.0
# Seconds that transfers under way have to get through at the end of the interpreter, and once more when let go of.
PATIENCE = 5.0
SM_CLOCK = 2e9  # Hz; no Hopper GPU runs faster, so a pause is no shorter than it says


def pause(seconds: float) -> None:
    """Work that is queued on the current CUDA stream from here on begins no earlier than so long after it could."""
    torch.cuda._sleep(round(seconds * SM_CLOCK))


class DistributedExchange:
    """Messages over a `torch.distributed` process group.

    On the CPU (gloo) `wait` blocks until both directions are through, at most `timeout`. On CUDA (NCCL) messages
    travel on a stream of their own; `wait` makes the current stream wait and returns at once, and a watchdog thread
    looks after the transfers under way: if one is overdue it logs the error, aborts the group so that nothing hangs in
    it, and the error is raised by the next call of `exchange` or `wait`. Transfers may be captured in a CUDA graph,
    once a step like it has run; nobody looks after those of a replay but NCCL's own watchdog.

    Where all ranks are GPUs of one host, with peer access, messages into places (`room`) go by copy engines, without
    NCCL (`has_copies`); not those of a CUDA graph. The places are made by the first step that needs them, or larger
    ones, and stay allocated, outside of PyTorch's allocator, as long as the exchange does (`place_bytes`). If some rank
    has no memory for one, all ranks say so in a warning and let NCCL carry the messages from there on.

    All connections between ranks are made here, one shift after the other on every rank, and not in the first step that
    needs them. So all ranks of the group construct it together.

    Args:
        group: the ring, every rank of which runs the same steps; None: the default group.
        device: where messages live; None: the current CUDA device if the group has NCCL, else the CPU.
        timeout: seconds until a message is overdue; None: the group's own timeout (under NCCL a tenth less, so that
            this error, which names the peer, comes before the group's own; a longer one would come after it). On CUDA
            they count from when the host queues the message, so the host must not be as far ahead of the device.
        sm_margin: SMs that attention kernels leave to the transfers (CUDA); None: FA3_DIST_SM_MARGIN of the
            environment, or 0. `FA3_DIST_PEER_COPIES=0 make context` times some margins.
        head_start: microseconds by which a transfer is ahead of the attention that hides it (CUDA; see `let_begin`);
            None: FA3_DIST_HEAD_START of the environment, or HEAD_START.
        peer_copies: False: no message goes by copy engines, on any rank if one says so; True: they do where they can,
            with a warning that says why where they cannot; None: FA3_DIST_PEER_COPIES of the environment (1 or 0), or
            where they can, without a word. Nothing to CPU tensors.
        tag: of the messages on the CPU; those of exchanges with different tags don't get mixed up.
    Raises:
        ValueError: this process is not in the group, the timeout is not positive, the margin is no number of SMs, the
            head start no time, or the environment says something else than these.
        RingError: a peer did not answer.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, device: torch.device | None = None,
                 timeout: float | timedelta | None = None, sm_margin: int | None = None,
                 head_start: float | None = None, peer_copies: bool | None = None, tag: int = 0):
        self.group: dist.ProcessGroup = _world_group() if group is None else group
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError("group: this process is not a member of the process group; pass the group it belongs to")
        self.device = _default_device(self.group) if device is None else torch.device(device)
        self.timeout = _seconds(timeout) if timeout is not None else _group_timeout(self.group, self.device)
        if self.timeout <= 0:
            raise ValueError(f"timeout: expected a positive number of seconds, got {self.timeout:g}")
        self.sm_margin = _default_sm_margin() if sm_margin is None else sm_margin
        if self.sm_margin < 0:
            raise ValueError(f"sm_margin is {self.sm_margin}: expected a number of SMs, 0 or more")
        self.head_start = _default_head_start() if head_start is None else head_start
        if not 0 <= self.head_start < float("inf"):
            raise ValueError(f"head_start is {self.head_start}: expected microseconds, 0 or more")
        peer_copies = _default_peer_copies() if peer_copies is None else peer_copies
        self.tag = tag
        self.stats = Traffic()
        self.observer: Observer | None = None
        self._peers: PeerCopies | None = None
        self._lacks_memory = False  # for places, on some rank
        self._stamps: Counter[int] = Counter()  # of places
        self._stream: Any = None
        self._side: Any = None
        self._posted: _StreamPending | None = None  # the last one since `let_begin`
        self._unconfirmed: _Transfer | None = None  # the last one into a place since `confirm`
        self._watchdog: Watchdog | None = None
        if self.device.type == "cuda":
            self._stream, self._side = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
            # What ends every wait for another rank. NOTE: a method of self would keep it alive, for the thread to hold.
            releases: list[Callable[[], None]] = []
            abort = self.group._get_backend(self.device).abort
            self._watchdog = Watchdog(self.timeout, partial(_call_all, [abort]),
                                      release=partial(_call_all, releases), prepare=_tolerate_captures)
            weakref.finalize(self, self._watchdog.retire).atexit = False  # then all are stopped
        self._connect("the greeting")
        if self.device.type == "cuda" and self.world > 1:
            with torch.cuda.device(self.device):
                self._peers = peer_copy.connect(self.group, self.device, peer_copies)
            if self._peers is not None:
                releases.append(self._peers.release)
                self._connect("the greeting")

    @property
    def has_copies(self) -> bool:
        """Whether messages into places go by copy engines. The same on all ranks."""
        return self._peers is not None and not self._lacks_memory

    @property
    def place_bytes(self) -> int:
        """Bytes of the places on this rank, which PyTorch's allocator does not count."""
        return 0 if self._peers is None else self._peers.nbytes

    def free_places(self) -> None:
        """Gives the places' memory back, until the next message into one. Called by all ranks of the group together;
        the host waits for the device."""
        if self._peers is not None:
            self._peers.free()
            self.forget()

    def forget(self) -> None:
        """From here on nothing `remains` of what has come so far.

        Called by all ranks of the group: where one remembers and another does not, they wait for each other in vain.
        """
        self._stamps.update(range(peer_copy.PLACES))

    def room(self, like: Sequence[Tensor], rows: int, place: Place) -> Parts:
        """See `Exchange.room`."""
        if not self._has_places():
            return new_room(like, rows)
        assert self._peers is not None
        self.raise_failure()
        self._stamps[place.number] += 1
        if self._peers.must_grow(place.number, like, place.most_rows):
            # All ranks make the memory together, and nobody watches that: so first hear from each of them.
            observer, self.observer = self.observer, None
            self._connect("word that its landing place is to grow")
            self.observer = observer
        try:
            return self._peers.room(place.number, like, rows, place.most_rows)
        except CannotCopy as reason:
            logger.warning("a landing place cannot be had, so messages go by NCCL from here on: %s", reason)
        # NOTE: not in the handler, whose traceback holds what memory some ranks did get.
        self._lacks_memory = True
        self.free_places()
        return new_room(like, rows)

    def stamp(self, place: int) -> int:
        """See `Exchange.stamp`."""
        return self._stamps[place] if self._has_places() else NO_STAMP

    def remains(self, like: Sequence[Tensor], rows: int, place: Place, stamp: int) -> Parts | None:
        """See `Exchange.remains`."""
        if stamp == NO_STAMP or self.stamp(place.number) != stamp:
            return None
        assert self._peers is not None
        return self._peers.remains(place.number, like, rows)

    def _has_places(self) -> bool:
        """Whether messages into places go by copy engines now: their counts would be wrong in a graph's second run."""
        if not self.has_copies:
            return False
        with torch.cuda.device(self.device):
            return not torch.cuda.is_current_stream_capturing()

    def exchange(self, *, send: Message, destination: int, receive: Message, source: int, what: str,
                 step: int, place: Place | None = None) -> Pending:
        """See `Exchange.exchange`."""
        started = self._describe(Move(send, destination, receive, source, what, step))
        return _Nothing() if started is None else self._start(started, place)

    def exchange_together(self, moves: Sequence[Move]) -> list[Pending]:
        """See `Exchange.exchange_together`: on CUDA one group of NCCL's, which is one kernel. A second one would wait
        for SMs that attention has taken by the time that the first one leaves its own."""
        described = list(map(self._describe, moves))
        if self._stream is None:
            return [_Nothing() if each is None else self._start(each) for each in described]
        started = [each for each in described if each is not None]
        pending = iter(self._post_on_stream(started) if started else ())
        return [_Nothing() if each is None else next(pending) for each in described]

    def _describe(self, move: Move) -> _Started | None:
        """What there is of an exchange, counted; None: nothing."""
        send, receive = _parts(move.send), _parts(move.receive)
        if not send and not receive:
            return None
        for tensor in (*send, *receive):
            if tensor.device.type != self.device.type:
                raise ValueError(f"exchange: this ring moves {self.device.type} tensors, got one on {tensor.device}; "
                                 "construct DistributedExchange with that device")
        self.stats._count(send, receive)
        destination, source = move.destination if send else None, move.source if receive else None
        return _Started(_Transfer(self.rank, move.step, move.what, destination, source), send, receive)

    def _start(self, started: _Started, place: Place | None = None) -> Pending:
        if self._stream is None:
            return _HostPending(self, *started)
        return self._post_on_stream([started], place if self._has_places() else None)[0]

    def let_begin(self) -> None:
        """See `Exchange.let_begin`.

        A kernel that takes all processors, and was queued on the current stream behind what a transfer waits for, would
        start before the transfer's own, which would then find no room until it ends. So the stream pauses first.
        """
        if self._posted is not None and self._posted.buffers and self.head_start > 0:
            with torch.cuda.device(self.device):
                pause(self.head_start * 1e-6)
        self._posted = None

    def confirm(self) -> None:
        """See `Exchange.confirm`."""
        transfer, self._unconfirmed = self._unconfirmed, None
        if transfer is None:
            return
        assert self._peers is not None
        with torch.cuda.device(self.device):
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                self._peers.confirm()
                done = torch.cuda.Event()
                done.record(self._stream)
            self._look_after(transfer, (), done).wait()

    def raise_failure(self) -> None:
        """See `Exchange.raise_failure`."""
        if self._watchdog is not None:
            self._watchdog.raise_failure()

    def side_stream(self) -> Any:
        """See `Exchange.side_stream`."""
        return self._side if self._has_places() else None

    def _post_on_stream(self, together: Sequence[_Started], place: Place | None = None) -> list[_StreamPending]:
        """place: that of a single exchange."""
        self.raise_failure()
        # The side stream starts where the current one stands: `send` is then written, and `receive` no longer in use.
        if place is None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        else:
            assert self._peers is not None
            self._peers.follow(self._stream)
        with torch.cuda.stream(self._stream):
            begun = [_begin(self.observer, transfer, send) for transfer, send, _ in together]
            if place is None:
                self._post_to_group(together)
            else:
                assert self._peers is not None
                ((transfer, send, _),) = together
                self._peers.queue(place.number, send, transfer.destination, transfer.source)
            for observer, mark in begun:
                if observer is not None:
                    observer.end(mark)
            done = torch.cuda.Event()
            done.record(self._stream)
        told = _Together(tuple(transfer for transfer, _, _ in together))  # `done` does not tell one from another
        pending = [self._look_after(told, (*send, *receive), done) for _, send, receive in together]
        self._posted = pending[-1] if place is None else None
        if place is not None:
            self._unconfirmed = together[0].transfer
        return pending

    def _look_after(self, transfer: _Transfer | _Together, buffers: Parts, done: Any) -> _StreamPending:
        assert self._watchdog is not None
        pending = _StreamPending(self._watchdog, transfer, buffers, done, self.device, self._peers)
        # NOTE: an event that is part of a CUDA graph being captured must not be queried.
        if not torch.cuda.is_current_stream_capturing():
            self._watchdog.watch(pending)
        return pending

    def _post_to_group(self, together: Sequence[_Started]) -> None:
        ops = []
        for transfer, send, receive in together:
            ops += [dist.P2POp(dist.irecv, part, group=self.group, group_peer=transfer.source) for part in receive]
            ops += [dist.P2POp(dist.isend, part, group=self.group, group_peer=transfer.destination) for part in send]
        for work in dist.batch_isend_irecv(ops):
            work.wait()  # orders the side stream after the transfer; the host does not wait

    def _connect(self, what: str) -> None:
        """Sends one byte to every other rank: to rank + 1 while receiving from rank - 1, then 2, 3, ... In each round
        every send meets a receive that its peer starts without waiting, so no order of arrival can deadlock."""
        for shift in range(1, self.world):
            send, receive = torch.zeros(2, 1, dtype=torch.uint8, device=self.device)
            destination, source = (self.rank + shift) % self.world, (self.rank - shift) % self.world
            transfer = _Transfer(self.rank, shift, what, destination, source)
            pending = self._start(_Started(transfer, (send,), (receive,)))
            pending.wait()
            if isinstance(pending, _StreamPending):
                pending.synchronize()


class _HostPending:
    """Two works of a back end that blocks in `wait` (gloo)."""

    def __init__(self, owner: DistributedExchange, transfer: _Transfer, send: Parts, receive: Parts):
        self.transfer, self.timeout = transfer, owner.timeout
        self.buffers = (*send, *receive)  # alive until the works are through
        self.observer, self.begun = _begin(owner.observer, transfer, send)
        with self._named(transfer.receive_error, "cannot be received: the connection failed"):
            self.receiving = [dist.irecv(part, group=owner.group, group_src=transfer.source, tag=owner.tag)
                              for part in receive]
        with self._named(transfer.send_error, "cannot be sent: the connection failed"):
            self.sending = [dist.isend(part, group=owner.group, group_dst=transfer.destination, tag=owner.tag)
                            for part in send]

    def wait(self) -> None:
        deadline = time.monotonic() + self.timeout
        while self.receiving:
            late = _overdue("did not arrive", self.transfer.source, self.timeout)
            self._finish(self.receiving.pop(0), deadline, self.transfer.receive_error, late)
        while self.sending:
            late = _overdue("was not taken", self.transfer.destination, self.timeout)
            self._finish(self.sending.pop(0), deadline, self.transfer.send_error, late)
        self.buffers = ()
        if self.observer is not None:
            self.observer.end(self.begun)
            self.observer = None

    def _finish(self, work: Any, deadline: float, error: Callable[[str], RingError], late: str) -> None:
        left = max(deadline - time.monotonic(), 1e-3)
        try:
            work.wait(timedelta(seconds=left))
        except RuntimeError as cause:
            lost = "did not get through: the connection broke, so that rank has ended or has given up on a peer itself"
            # The back end counts in whole milliseconds, so it may be one early.
            raise error(late if time.monotonic() >= deadline - 0.01 else lost) from cause

    @contextlib.contextmanager
    def _named(self, error: Callable[[str], RingError], reason: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as cause:
            raise error(reason) from cause


class _StreamPending:
    """A transfer queued on the exchange's CUDA stream.

    It keeps the buffers alive until `wait`. After that the current stream is ordered behind the transfer, so memory
    freed to the caching allocator there cannot be reused too early, and no `record_stream` is needed. A transfer that
    is never waited for is held by the watchdog until it is through.
    """

    def __init__(self, watchdog: Watchdog, transfer: _Transfer | _Together, buffers: Parts, event: Any,
                 device: torch.device, peers: PeerCopies | None):
        self.watchdog, self.transfer, self.buffers = watchdog, transfer, buffers
        self.event, self.device = event, device  # the event: the transfer is through
        self.peers = peers  # alive until then, as long as the watchdog is

    def wait(self) -> None:
        self.watchdog.raise_failure()
        torch.cuda.current_stream(self.device).wait_event(self.event)
        self.buffers = ()  # as long as there are any, the transfer is not waited for

    def done(self) -> bool:
        with torch.cuda.device(self.device):  # the watchdog's thread would otherwise wake GPU 0
            return self.event.query()

    def overdue(self, seconds: float) -> RingError:
        return self.transfer.overdue(seconds)

    def synchronize(self) -> None:
        """Holds the host until the transfer is through or overdue. Not for use inside a step."""
        while not self.done():
            self.watchdog.raise_failure()
            time.sleep(1e-3)


class Watched(Protocol):
    """A transfer as the watchdog sees it."""

    def done(self) -> bool: ...

    def overdue(self, seconds: float) -> RingError: ...


def _nothing() -> None:
    pass


class Watchdog:
    """A thread that looks after transfers the host does not wait for.

    Transfers finish in the order they were started, so only the oldest is looked at. If it is overdue, every later
    `raise_failure` raises the error, and whoever is stuck is let go of: by `release`, again and again until all
    transfers are through, and by `abort`.

    Args:
        timeout: seconds from when a transfer is queued (`watch`) until it is overdue. NOTE: not from when the device
            begins it: what it waits for may be a peer that is lost, in a collective of somebody else's.
        abort: called once, on the watchdog's thread.
        interval: seconds between two looks while transfers are under way; the thread sleeps while there are none.
        prepare: what the thread does first.
        release: called on the watchdog's thread, before `abort` and after it.
    """

    def __init__(self, timeout: float, abort: Callable[[], None], interval: float = 0.05,
                 prepare: Callable[[], None] = _nothing, release: Callable[[], None] = _nothing):
        self._timeout, self._abort, self._interval, self._prepare = timeout, abort, interval, prepare
        self._release = release
        self._pending: list[tuple[float, Watched]] = []
        self._changed = threading.Condition()
        self._retired = False
        self._latest = math.inf  # when no transfer is waited for any longer
        self._failure: RingError | None = None
        self._thread = threading.Thread(target=self._run, name="fa3_dist-watchdog", daemon=True)
        self._thread.start()
        _watchdogs.add(self)

    def watch(self, transfer: Watched) -> None:
        """Takes over a transfer that has just been started."""
        with self._changed:
            self._pending.append((time.monotonic() + self._timeout, transfer))
            self._changed.notify()

    def raise_failure(self) -> None:
        """Raises the RingError of the transfer that was overdue, if there was one."""
        if self._failure is not None:
            raise self._failure

    def retire(self) -> None:
        """Has the thread end once it has no transfer left to look after: those under way keep their time."""
        with self._changed:
            self._retired = True
            self._changed.notify()

    def stop(self) -> None:
        """Ends the thread and waits until it has ended. Transfers under way get PATIENCE seconds, and as many again
        once they have been let go of. Called at the interpreter's end.

        NOTE: an interpreter that shuts down under a thread which is looking at a CUDA event aborts the process.
        """
        with self._changed:
            self._latest = time.monotonic() + PATIENCE
        self.retire()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=2 * PATIENCE + 1.0)

    def _run(self) -> None:
        self._prepare()
        while self._wait_for_work():
            deadline, transfer = self._pending[0]
            if transfer.done():
                with self._changed:
                    self._pending.pop(0)
            elif time.monotonic() < min(deadline, self._latest):
                time.sleep(self._interval)
            else:
                self._give_up(transfer)
                return

    def _give_up(self, transfer: Watched) -> None:
        self._failure = transfer.overdue(min(self._timeout, PATIENCE) if self._latest < math.inf else self._timeout)
        logger.critical("%s; aborting the process group", self._failure)
        self._release()
        self._abort()
        # NOTE: as long as it takes: what a peer does meanwhile may hold up once more what has been let go of.
        while not all(pending.done() for _, pending in self._pending):
            if time.monotonic() >= self._latest + PATIENCE:
                break
            time.sleep(self._interval)
            self._release()

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._retired)
            return bool(self._pending)


_watchdogs: weakref.WeakSet[Watchdog] = weakref.WeakSet()  # those whose threads may run


@atexit.register
def _stop_watchdogs() -> None:
    for watchdog in list(_watchdogs):
        watchdog.stop()


RELAXED_CAPTURE = 2  # cudaStreamCaptureModeRelaxed


def _tolerate_captures() -> None:
    """Lets this thread look at CUDA events while another one captures a graph, which that would otherwise spoil."""
    assert torch.version.cuda is not None
    try:
        runtime = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")  # the one that torch has loaded
        status = runtime.cudaThreadExchangeStreamCaptureMode(ctypes.byref(ctypes.c_int(RELAXED_CAPTURE)))
    except (OSError, AttributeError) as error:
        status = error
    if status != 0:
        logger.warning("a CUDA graph captured while messages are under way may fail: the watchdog's thread cannot be "
                       "told to keep out of captures (%s)", status)


def _call_all(functions: list[Callable[[], None]]) -> None:
    for function in functions:
        try:
            function()
        except Exception:
            logger.exception("a connection could not be ended")  # the others still are


def _world_group() -> dist.ProcessGroup:
    if dist.group.WORLD is None:
        raise ValueError("group is None and there is no default process group: call torch.distributed."
                         "init_process_group first, or pass a group")
    return dist.group.WORLD


def _default_device(group: Any) -> torch.device:
    if torch.cuda.is_available() and "nccl" in dist.get_backend_config(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _default_sm_margin() -> int:
    given = os.environ.get("FA3_DIST_SM_MARGIN", "0")
    if not given.isdecimal():
        raise ValueError(f"FA3_DIST_SM_MARGIN is {given!r}: expected a number of SMs, 0 or more")
    return int(given)


def _default_head_start() -> float:
    given = os.environ.get("FA3_DIST_HEAD_START", str(HEAD_START))
    try:
        return float(given)
    except ValueError:
        raise ValueError(f"FA3_DIST_HEAD_START is {given!r}: expected microseconds, 0 or more") from None


def _default_peer_copies() -> bool | None:
    given = os.environ.get("FA3_DIST_PEER_COPIES")
    if given not in (None, "0", "1"):
        raise ValueError(f"FA3_DIST_PEER_COPIES is {given!r}: expected 1 or 0")
    return None if given is None else given == "1"


def _seconds(timeout: float | timedelta) -> float:
    return timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)


def _group_timeout(group: Any, device: torch.device) -> float:
    seconds = group._get_backend(device).options._timeout.total_seconds()
    return seconds * (0.9 if device.type == "cuda" else 1.0)


# ------------------------------------------------------------------------------------------------ in process


def run_in_process(world: int, fn: Callable[..., Any], *args: Any, has_places: bool = False) -> list[Any]:
    """Runs `fn(exchange, *args)` once for each rank of a ring inside this process and returns the results by rank.

    Each rank has a thread, but only one of them runs at a time: a rank runs until it waits for a message that is not
    there yet, then the next one that can go on does. So a run is deterministic, global random state included. Ranks
    share the current CUDA device and stream.

    Args:
        has_places: messages into a place land where the one before did, as they do between GPUs.
    Raises:
        ValueError: world < 1.
        Exception: the first error that `fn` raised on any rank; the other ranks end with a RingError at their next
            wait. RingError too if all ranks wait for messages that nobody sends.
    """
    if world < 1:
        raise ValueError(f"world: expected a positive number of ranks, got {world}")
    hub = _Hub(world)
    results: list[Any] = [None] * world
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    stream = torch.cuda.current_stream() if device is not None else None
    grad = torch.is_grad_enabled()

    def run(rank: int) -> None:
        with contextlib.ExitStack() as stack, hub.running(rank):
            if stream is not None:
                stack.enter_context(torch.cuda.stream(stream))
            stack.enter_context(torch.set_grad_enabled(grad))
            # Backward nodes of one device share one thread unless they run on the caller's: rank 0, waiting in its
            # backward for rank 1, would keep rank 1 from running its own.
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            results[rank] = fn(InProcessExchange(hub, rank, has_places), *args)

    threads = [threading.Thread(target=run, args=(rank,), name=f"ring rank {rank}") for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if hub.failure is not None:
        raise hub.failure
    return results


@dataclass
class _Letter:
    parts: Parts
    written: Any  # CUDA event: their contents are there
    copied: Any = None  # CUDA event: the receiver has copied them
    taken: bool = False


@dataclass
class _Hub:
    """What the ranks of one process share: the letters under way, and whose turn it is."""

    world: int
    letters: dict[tuple[int, int, int], _Letter] = field(default_factory=dict)  # (source, destination, number)
    turn: int = 0
    failure: BaseException | None = None
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _finished: set[int] = field(default_factory=set)
    _blocked: dict[int, Callable[[], bool]] = field(default_factory=dict)  # rank -> can it go on?

    @contextlib.contextmanager
    def running(self, rank: int) -> Iterator[None]:
        """The whole life of a rank: waits for its first turn, and hands the turn on when it ends, however it ends."""
        with self._changed:
            self._changed.wait_for(lambda: self.turn == rank)
        try:
            yield
        except BaseException as error:
            self.failure = self.failure or error
        finally:
            with self._changed:
                self._finished.add(rank)
                self._pass_turn(rank)

    def block(self, rank: int, ready: Callable[[], bool], error: Callable[[str], RingError]) -> None:
        """Returns when `ready()`, letting other ranks run meanwhile; raises `error(reason)` if that cannot happen."""
        if not ready() and self.failure is None:
            with self._changed:
                self._blocked[rank] = ready
                self._pass_turn(rank)
                self._changed.wait_for(lambda: self.turn == rank)
                del self._blocked[rank]
        if not ready():
            cause = self.failure
            if cause is None:
                raise error("did not get through: every rank waits for a message, and nobody sends one")
            raise error(f"did not get through: another rank ended with {cause!r}") from cause

    def _pass_turn(self, rank: int) -> None:
        in_turn = [(rank + 1 + i) % self.world for i in range(self.world)]
        others = [r for r in in_turn if r not in self._finished]
        able = [r for r in others if r not in self._blocked or self._blocked[r]()]
        # Nobody can go on: the next one wakes to find that out, and its error then ends the rest.
        self.turn = next(iter(able or others), -1)
        self._changed.notify_all()


class InProcessExchange:
    """One rank's side of a ring that runs in one process; made by `run_in_process`. See `Exchange`."""

    sm_margin = 0

    def __init__(self, hub: _Hub, rank: int, has_places: bool = False):
        self.rank, self.world = rank, hub.world
        self.stats = Traffic()
        self.observer: Observer | None = None  # not told of messages: when ranks that take turns wait says nothing
        self._hub = hub
        self._has_places = has_places
        self._places: dict[int, Tensor] = {}  # bytes
        self._stamps: Counter[int] = Counter()
        self._numbers: Counter[tuple[int, int]] = Counter()  # messages so far, by (source, destination)

    def room(self, like: Sequence[Tensor], rows: int, place: Place) -> Parts:
        """See `Exchange.room`."""
        if not self._has_places:
            return new_room(like, rows)
        self._stamps[place.number] += 1
        size, before = peer_copy.message_bytes(like, place.most_rows), self._places.get(place.number)
        if before is None or before.nbytes < size:
            self._places[place.number] = like[0].new_empty(size, dtype=torch.uint8)
        self._places[place.number].fill_(0xFF)  # NaN: from here on nobody may read what came before
        return peer_copy.carve(self._places[place.number], like, rows)

    def stamp(self, place: int) -> int:
        """See `Exchange.stamp`."""
        return self._stamps[place] if self._has_places else NO_STAMP

    def remains(self, like: Sequence[Tensor], rows: int, place: Place, stamp: int) -> Parts | None:
        """See `Exchange.remains`."""
        if stamp == NO_STAMP or self.stamp(place.number) != stamp:
            return None
        return peer_copy.carve(self._places[place.number], like, rows)

    def exchange(self, *, send: Message, destination: int, receive: Message, source: int, what: str,
                 step: int, place: Place | None = None) -> Pending:
        """See `Exchange.exchange`."""
        send, receive = _parts(send), _parts(receive)
        self.stats._count(send, receive)
        transfer = _Transfer(self.rank, step, what, destination if send else None, source if receive else None)
        letter = None
        if send:
            letter = _Letter(send, _record(send[0]))
            self._hub.letters[self._key(self.rank, destination)] = letter
        key = self._key(source, self.rank) if receive else None
        return _InProcessPending(self._hub, transfer, letter, receive, key)

    def exchange_together(self, moves: Sequence[Move]) -> list[Pending]:
        """See `Exchange.exchange_together`."""
        return [self.exchange(**move._asdict()) for move in moves]

    def raise_failure(self) -> None:
        """See `Exchange.raise_failure`: who waits here is told."""

    def let_begin(self) -> None:
        """See `Exchange.let_begin`: there is nothing to be done."""

    def confirm(self) -> None:
        """See `Exchange.confirm`: there is nothing to be done."""

    def side_stream(self) -> Any:
        """See `Exchange.side_stream`."""
        return torch.cuda.Stream() if torch.cuda.is_available() else None

    def _key(self, source: int, destination: int) -> tuple[int, int, int]:
        number = self._numbers[source, destination]
        self._numbers[source, destination] += 1
        return source, destination, number


@dataclass
class _InProcessPending:
    """The receiver copies when it waits, no earlier: a buffer read or changed too soon shows."""

    hub: _Hub
    transfer: _Transfer
    letter: _Letter | None
    receive: Parts
    key: tuple[int, int, int] | None

    def wait(self) -> None:
        rank, letters = self.transfer.rank, self.hub.letters
        if self.receive:
            key = self.key
            assert key is not None
            self.hub.block(rank, lambda: key in letters, self.transfer.receive_error)
            self._take(letters.pop(key))
            self.receive = ()
        if self.letter is not None:
            letter = self.letter
            self.hub.block(rank, lambda: letter.taken, self.transfer.send_error)
            _after(letter.copied)
            self.letter = None

    def _take(self, letter: _Letter) -> None:
        sent, expected = (
            [(tuple(part.shape), part.dtype) for part in parts] for parts in (letter.parts, self.receive)
        )
        if sent != expected:
            raise self.transfer.receive_error(f"came as {_forms(sent)}, but {_forms(expected)} was expected: the ranks "
                                              "disagree about the layout")
        _after(letter.written)
        for to, part in zip(self.receive, letter.parts, strict=True):
            to.copy_(part)
        letter.copied = _record(self.receive[0])
        letter.taken = True


def _forms(parts: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> str:
    return " and ".join(f"{shape} {dtype}" for shape, dtype in parts)


def _record(tensor: Tensor) -> Any:
    """An event on the current CUDA stream; None for a CPU tensor."""
    if tensor.device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def _after(event: Any) -> None:
    if event is not None:
        torch.cuda.current_stream().wait_event(event)
