"""Messages between the GPUs of one host by their copy engines, which leave all SMs to attention.

A kernel that moves messages, as NCCL's do, takes SMs that attention was to have, and waits for some to be free. A copy
engine takes none. But then nothing may run on an SM that says when: a persistent attention kernel leaves no room even
for a single block. So ranks tell each other by stream memory operations of the driver (`cuStreamWriteValue32`,
`cuStreamWaitValue32`), which the GPU's front end carries out.

Every rank has landing places in memory that the others can write to (PyTorch's symmetric memory), numbered alike on all
ranks. A message into place s, from `source` to `destination`, is

    destination:  write ready[destination, s] = n at the source     once its stream has read what lay there before
    source:       wait until that is n, copy, write arrived[source, s] = n at the destination
    destination:  wait until that is n

where n counts the messages between the two through that place. Each pair has counters of its own, so that a message of
another rank never passes for the one that is waited for.

A rank that gives up on another (`release`) must let go of its own streams, or its process could not even end; what
these then send is made from what never came, and may land where another rank still reads. So before that it sets a
word, given_up, at all others. Their streams wait until that is 0: before a message and after it, and once all that
came has been read (`confirm`). So they stand still, and these ranks give up in their turn, with an error of their
own.

Copies are taken where every rank can make them; what keeps one from it becomes `CannotCopy` on all of them, with the
same words, so that they do without together.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import os
import platform
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger("fa3_dist")

T = TypeVar("T")

PLACES = 4  # that a rank has
ALIGNMENT = 256  # bytes, of each part of a message
SPARE = 1.25  # how much larger than asked for a place becomes that has to grow: packed batches differ in length
WAIT_GREATER_OR_EQUAL, WAIT_EQUAL = 0, 1  # CU_STREAM_WAIT_VALUE_GEQ (cyclic), CU_STREAM_WAIT_VALUE_EQ
WRITE_DEFAULT = 0  # CU_STREAM_WRITE_VALUE_DEFAULT
FAR_AHEAD = 1 << 20  # messages: what a count is set to, beyond its value, to release whoever waits for it
READY, ARRIVED, GIVEN_UP = 0, 1, 2  # a rank's flags by peer and place; of GIVEN_UP only the first one


class CannotCopy(Exception):
    """Some rank cannot do what copies need; raised on all ranks of a group."""


class PeerCopies:
    """One rank's landing places, and the way into those of the others. Made by `connect`.

    Args:
        group: ranks of one host, every one of which makes this object.
        device: this rank's.
    Raises:
        CannotCopy: memory cannot be shared, or a stream not wait for it.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self.device = device
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self._group = group
        self._driver = _Driver()
        self._places: dict[int, _Shared] = {}
        self._sent: Counter[tuple[int, int]] = Counter()  # messages so far, by (peer, place)
        self._received: Counter[tuple[int, int]] = Counter()
        self._reader: Any = None  # the stream where places are read
        self._release_stream = torch.cuda.Stream(device, priority=-1)  # not one that waits for another rank
        self._flags = _Shared((3, self.world, PLACES), torch.int32, device, group)
        self._flags.own.zero_()
        _on_all_ranks(self._try_driver, group)
        torch.cuda.synchronize(device)

    def _try_driver(self) -> None:
        """Raises RuntimeError where there are no stream memory operations."""
        self._driver.write(self._flag(self.rank, GIVEN_UP, 0, 0), 0)
        self.confirm()

    @property
    def nbytes(self) -> int:
        """Bytes of the landing places, which PyTorch's allocator does not count."""
        return sum(place.own.nbytes for place in self._places.values())

    def room(self, place: int, like: Sequence[Tensor], rows: int, most_rows: int) -> tuple[Tensor, ...]:
        """Where a message of `rows` rows of each of some tensors will land: (rows, ...) each.

        Called by all ranks together, with the same place and most_rows and tensors with rows of the same form: where
        the place is too small it grows on all of them, and the host waits for the device. What is there is valid until
        the place is asked for again.

        Args:
            most_rows: of all ranks' messages into that place that are known to come.
        Raises:
            CannotCopy: a larger place cannot be had; there is none then.
        """
        if self.must_grow(place, like, most_rows):
            self._grow(place, message_bytes(like, most_rows))
        return self.remains(place, like, rows)

    def remains(self, place: int, like: Sequence[Tensor], rows: int) -> tuple[Tensor, ...]:
        """What `room` gave for that place and these arguments, if it was not asked for again since: see
        `DistributedExchange.remains`, which knows."""
        return carve(self._places[place].own, like, rows)

    def must_grow(self, place: int, like: Sequence[Tensor], most_rows: int) -> bool:
        """Whether `room` with these arguments makes the place anew, which all ranks do together."""
        return place not in self._places or self._places[place].own.nbytes < message_bytes(like, most_rows)

    def queue(self, place: int, send: Sequence[Tensor], destination: int | None, source: int | None) -> None:
        """Queues a message to a rank (no parts: none), and one that comes from another (None: none), on the current
        stream, which must stand behind whoever reads the place (`follow`)."""
        self.confirm()
        if source is not None:
            self._received[source, place] += 1
            self._driver.write(self._flag(source, READY, self.rank, place), self._received[source, place])
        if send:
            assert destination is not None
            rows = len(send[0])
            assert message_bytes(send, rows) <= self._places[place].own.nbytes, "a message larger than its place"
            self._sent[destination, place] += 1
            count = self._sent[destination, place]
            self._driver.wait(self._flag(self.rank, READY, destination, place), count)
            for to, part in zip(carve(self._places[place].of(destination), send, rows), send, strict=True):
                to.copy_(part, non_blocking=True)
            self._driver.write(self._flag(destination, ARRIVED, self.rank, place), count)
        if source is not None:
            self._driver.wait(self._flag(self.rank, ARRIVED, source, place), self._received[source, place])
        self.confirm()

    def confirm(self) -> None:
        """Has the current stream go on only if no other rank has given up: then all that came before was whole."""
        self._driver.wait(self._flag(self.rank, GIVEN_UP, 0, 0), 0, equal=True)

    def follow(self, stream: Any) -> None:
        """Has a stream wait for the current one, where places are read, and for the one where they were before."""
        reader = torch.cuda.current_stream(self.device)
        stream.wait_stream(reader)
        if self._reader is not None and self._reader != reader:
            stream.wait_stream(self._reader)
        self._reader = reader

    def release(self) -> None:
        """Gives up: lets go of every stream of this rank that waits for another rank. What they then read, and what
        they send, is worthless; the others are told so before. To be called again until all that was queued is through:
        what another rank does meanwhile may hold a stream once more."""
        with torch.cuda.device(self.device), torch.cuda.stream(self._release_stream):
            self._let_go()

    def _let_go(self) -> None:
        others = [peer for peer in range(self.world) if peer != self.rank]
        for peer in others:
            self._driver.write(self._flag(peer, GIVEN_UP, 0, 0), 1)
        self._driver.write(self._flag(self.rank, GIVEN_UP, 0, 0), 0)
        for kind, counts in ((READY, self._sent.copy()), (ARRIVED, self._received.copy())):
            for peer, place in itertools.product(others, range(PLACES)):
                self._driver.write(self._flag(self.rank, kind, peer, place), counts[peer, place] + FAR_AHEAD)

    def free(self) -> None:
        """Gives the places back; messages that come later make new ones. Called by all ranks together."""
        torch.cuda.synchronize(self.device)
        self._places.clear()

    def _flag(self, of: int, kind: int, peer: int, place: int) -> int:
        """Address of a flag of a rank, seen from here."""
        return self._flags.of(of).data_ptr() + 4 * ((kind * self.world + peer) * PLACES + place)

    def _grow(self, place: int, nbytes: int) -> None:
        before = self._places.pop(place, None)
        if before is not None:
            torch.cuda.synchronize(self.device)  # nobody reads what lies there, and no message is on its way to it
            nbytes = int(nbytes * SPARE)
        del before
        torch.cuda.empty_cache()  # a place is not from the memory that PyTorch keeps
        self._places[place] = _Shared((_aligned(nbytes),), torch.uint8, self.device, self._group)


def connect(group: dist.ProcessGroup, device: torch.device, wanted: bool | None = None) -> PeerCopies | None:
    """Landing places on all ranks of a group, or None where these cannot write to each other's memory: ranks of several
    hosts, GPUs without peer access, one device for several ranks, no symmetric memory, or not wanted by some.

    Called by all ranks of the group together; they all get places, or none does. Before the first message another one
    must have gone from every rank to every other: it says that their counters have been set to 0.

    Args:
        wanted: None: where they can be had; True: the same, with a warning where they cannot; False: not on this rank,
            and so on none.
    """
    try:
        _agree("copies are switched off" if wanted is False else _obstacle(device), group)
        _check_reach(group, device)
        return PeerCopies(group, device)
    except CannotCopy as reason:
        level = logging.WARNING if wanted else logging.INFO
        logger.log(level, "the ring's messages go by NCCL, not by copy engines: %s", reason)
    return None


def _check_reach(group: dist.ProcessGroup, device: torch.device) -> None:
    """Raises CannotCopy unless each rank has a GPU of its own and can write to the memory of all others'."""
    own = _uuid(device)
    hosts, uuids = zip(*_of_all_ranks((_host(), own), group), strict=True)
    if len(set(hosts)) > 1:
        raise CannotCopy("ranks are on several hosts, or in containers that do not share processes and TMPDIR")
    if len(set(uuids)) < len(uuids):
        raise CannotCopy("several ranks share a GPU")
    visible = {_uuid(i): i for i in range(torch.cuda.device_count())}
    others = [visible.get(uuid) for uuid in uuids if uuid != own]
    reaches_all = all(i is not None and torch.cuda.can_device_access_peer(device, i) for i in others)
    _agree(None if reaches_all else "it does not see the GPU of every other rank, or has no peer access to it", group)


def _agree(trouble: str | None, group: dist.ProcessGroup) -> None:
    """Raises CannotCopy on all ranks if one of them has trouble."""
    for rank, each in enumerate(_of_all_ranks(trouble, group)):
        if each is not None:
            raise CannotCopy(f"rank {rank}: {each}")


def _on_all_ranks(make: Callable[[], T], group: dist.ProcessGroup) -> T:
    """What `make` gives; if it raises RuntimeError on some rank, CannotCopy on all: or they would wait for that one."""
    made: list[T] = []
    trouble = None
    try:
        made.append(make())
    except RuntimeError as error:
        trouble = str(error).partition("\n")[0]
    _agree(trouble, group)
    return made[0]


def _of_all_ranks(value: Any, group: dist.ProcessGroup) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _uuid(device: torch.device | int) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def message_bytes(like: Sequence[Tensor], rows: int) -> int:
    """Bytes that a message of so many rows of each of some tensors takes in a landing place."""
    return sum(_aligned(rows * _row_bytes(x)) for x in like)


def carve(place: Tensor, like: Sequence[Tensor], rows: int) -> tuple[Tensor, ...]:
    """The parts of a message in a landing place (bytes): `rows` rows of the form that each of some tensors has."""
    parts, at = [], 0
    for x in like:
        nbytes = rows * _row_bytes(x)
        parts.append(place[at : at + nbytes].view(x.dtype).view(rows, *x.shape[1:]))
        at += _aligned(nbytes)
    return tuple(parts)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _row_bytes(x: Tensor) -> int:
    return x.shape[1:].numel() * x.itemsize


def _host() -> tuple[str | int, ...]:
    """Equal for ranks that can hand memory to each other, which symmetric memory has them do by their process ids and
    sockets in a folder: containers of a host may share neither, and it would wait for a handle that never comes."""
    found: list[str | int] = [platform.node()]
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        found[0] = file.read().strip()  # of the running system, whatever its containers are called
    with contextlib.suppress(OSError):
        folder = os.stat(tempfile.gettempdir())
        found += [os.readlink("/proc/self/ns/pid"), folder.st_dev, folder.st_ino]
    return tuple(found)


def _obstacle(device: torch.device) -> str | None:
    """Why this rank can make no copies, whatever the others can."""
    # A stream that waits would hold up all others that share its queue to the GPU, the one that releases it included.
    if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        return "CUDA_DEVICE_MAX_CONNECTIONS is 1"
    try:
        import torch.distributed._symmetric_memory as symmetric_memory

        _Driver()
        backend = symmetric_memory.get_backend(device)
    except (ImportError, OSError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None if backend in (None, "CUDA") else f"symmetric memory is that of {backend}: expected CUDA's own"


@contextlib.contextmanager
def _without_multicast() -> Iterator[None]:
    """Inside, symmetric memory is made without NVLink multicast objects, which copies have no use for."""
    name = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class _Shared:
    """Memory of one form on every rank of a group; made by all of them together. CannotCopy where some cannot."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup):
        import torch.distributed._symmetric_memory as symmetric_memory

        with _without_multicast():
            self.own = own = _on_all_ranks(lambda: symmetric_memory.empty(shape, dtype=dtype, device=device), group)
            self._handle = _on_all_ranks(lambda: symmetric_memory.rendezvous(own, group.group_name), group)
        self._of = [
            own if rank == dist.get_rank(group) else self._handle.get_buffer(rank, shape, dtype)
            for rank in range(dist.get_world_size(group))
        ]

    def of(self, rank: int) -> Tensor:
        """A rank's, seen from here."""
        return self._of[rank]


class _Driver:
    """Stream memory operations, on the current stream. Flags are 32 bits wide and given by their addresses."""

    def __init__(self) -> None:
        library = ctypes.CDLL("libcuda.so.1")
        self._write, self._wait = library.cuStreamWriteValue32_v2, library.cuStreamWaitValue32_v2
        for function in (self._write, self._wait):
            function.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]

    def write(self, flag: int, count: int) -> None:
        """Sets a flag, any rank's, once all that is queued before has been done and can be seen by who waits for it."""
        self._queue(self._write, flag, count, WRITE_DEFAULT)

    def wait(self, flag: int, count: int, equal: bool = False) -> None:
        """Waits until a flag of this rank is `count` or has passed it, or, `equal`, until it is that."""
        self._queue(self._wait, flag, count, WAIT_EQUAL if equal else WAIT_GREATER_OR_EQUAL)

    def _queue(self, function: Any, flag: int, count: int, flags: int) -> None:
        if status := function(torch.cuda.current_stream().cuda_stream, flag, count & 0xFFFFFFFF, flags):
            raise RuntimeError(f"{function.__name__} failed with CUresult {status}: set FA3_DIST_PEER_COPIES=0 to do "
                               "without copy engines")
