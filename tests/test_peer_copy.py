"""Messages by copy engines: how ranks tell each other, between threads, and how they agree on whether there are copies;
tests/test_exchange.py has them on GPUs."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from fa3_dist.parallel import exchange as exchanges
from fa3_dist.parallel import peer_copy
from fa3_dist.parallel.exchange import NO_STAMP, DistributedExchange, Place
from fa3_dist.parallel.peer_copy import ALIGNMENT, PLACES, CannotCopy, PeerCopies, carve, message_bytes
from tests.distributed import run_distributed


class Flags:
    """The driver's part: what one thread writes another one may wait for. A thread stands for a rank's stream."""

    def __init__(self) -> None:
        self.values: Counter[int] = Counter()
        self.changed = threading.Condition()

    def write(self, flag: int, count: int) -> None:
        with self.changed:
            self.values[flag] = count
            self.changed.notify_all()

    def wait(self, flag: int, count: int, equal: bool = False) -> None:
        def is_there() -> bool:
            return self.values[flag] == count if equal else self.values[flag] >= count

        with self.changed:
            assert self.changed.wait_for(is_there, timeout=20.0), "nobody came"


def make_ranks(world: int, place_bytes: int) -> list[PeerCopies]:
    """Ranks whose places lie in host memory."""
    driver = Flags()
    flags = [torch.zeros(3 * world * PLACES, dtype=torch.int32) for _ in range(world)]  # addresses, no more
    memory = [[torch.zeros(place_bytes, dtype=torch.uint8) for _ in range(world)] for _ in range(PLACES)]
    ranks = []
    for rank in range(world):
        copies = PeerCopies.__new__(PeerCopies)
        copies.__dict__.update(
            rank=rank, world=world, _driver=driver, _sent=Counter(), _received=Counter(),
            _flags=SimpleNamespace(of=flags.__getitem__),
            _places={i: SimpleNamespace(own=places[rank], of=places.__getitem__) for i, places in enumerate(memory)},
        )
        ranks.append(copies)
    return ranks


def message(number: int, rank: int, rows: int) -> list[Tensor]:
    value = 100.0 * number + rank
    return [torch.full((rows, 3), value), torch.full((rows, 2, 2), value, dtype=torch.bfloat16)]


def run_rank(copies: PeerCopies, sizes: list[list[int]], wrong: list[str]) -> None:
    pause = random.Random(copies.rank)
    for number, rows in enumerate(sizes):
        shift, place = 1 + number % (copies.world - 1), number % 2
        destination, source = (copies.rank + shift) % copies.world, (copies.rank - shift) % copies.world
        sent, count = message(number, copies.rank, rows[copies.rank]), rows[source]
        if not rows[copies.rank] and not count:
            continue
        copies.queue(place, sent if rows[copies.rank] else [], destination, source if count else None)
        time.sleep(pause.choice([0.0, 0.0, 2e-3]))  # others run ahead
        come = carve(copies._places[place].own, sent, count)
        if not all(map(torch.equal, come, message(number, source, count))):
            wrong.append(f"rank {copies.rank}, message {number}")


def run_ranks(ranks: list[PeerCopies], sizes: list[list[int]]) -> list[str]:
    """What was wrong in messages of these rows: one list a message, by the rank that sends it."""
    wrong: list[str] = []
    threads = [threading.Thread(target=run_rank, args=(copies, sizes, wrong)) for copies in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


@pytest.mark.parametrize("world", [2, 3, 5])
def test_messages_arrive_whole_and_are_not_overwritten(world: int) -> None:
    choose = random.Random(world)
    sizes = [[choose.choice([0, 1, 50, 700]) for _ in range(world)] for _ in range(120)]
    ranks = make_ranks(world, message_bytes(message(0, 0, 0), 700))
    assert run_ranks(ranks, sizes) == []
    messages = sum(count > 0 for rows in sizes for count in rows)
    assert sum(sum(copies._sent.values()) for copies in ranks) == messages


def test_without_waiting_for_the_reader_messages_are_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above would see. (Where both send, neither gets far ahead of the other.)"""
    wait = Flags.wait
    ranks = make_ranks(2, message_bytes(message(0, 0, 0), 700))
    ready = {copies._flag(copies.rank, 0, 1 - copies.rank, place) for copies in ranks for place in range(PLACES)}
    monkeypatch.setattr(
        Flags, "wait", lambda self, flag, count, equal=False: None if flag in ready else wait(self, flag, count, equal)
    )
    assert run_ranks(ranks, [[700, 0]] * 200) != []


def test_what_a_rank_sends_that_has_given_up_is_not_taken_for_a_message() -> None:
    """Rank 1 hands on what rank 0 was to send, and gives up on it; rank 2, which waits for that, goes on waiting until
    it gives up itself."""
    sent = message(0, 1, 4)
    ranks = make_ranks(3, message_bytes(sent, 4))
    ended: list[str] = []

    def hand_on() -> None:
        ranks[1].queue(0, [], None, 0)
        ended.append("rank 1's wait")
        ranks[1].queue(1, sent, 2, None)
        ended.append("rank 1's message")

    def take() -> None:
        ranks[2].queue(1, [], None, 1)
        ended.append("rank 2's wait")

    threads = [threading.Thread(target=each) for each in (hand_on, take)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    assert not ended
    ranks[1]._let_go()
    threads[0].join(timeout=10.0)
    time.sleep(0.1)
    assert ended == ["rank 1's wait", "rank 1's message"]
    ranks[2]._let_go()
    threads[1].join(timeout=10.0)
    assert ended[-1] == "rank 2's wait"


def test_who_still_reads_when_a_rank_gives_up_gets_no_further() -> None:
    """Rank 0 has sent one message and waits for room for the next one, which it does not get before it gives up; rank 1
    reads the first one, perhaps as the second one comes."""
    first, second = message(0, 0, 4), message(1, 0, 4)
    ranks = make_ranks(2, message_bytes(first, 4))
    ended: list[str] = []

    def send() -> None:
        ranks[0].queue(0, first, 1, None)
        ranks[0].queue(0, second, 1, None)
        ended.append("rank 0's messages")

    def read() -> None:
        ranks[1].confirm()
        ended.append("what was read is whole")

    sender, reader = (threading.Thread(target=each) for each in (send, read))
    sender.start()
    ranks[1].queue(0, [], None, 0)
    ranks[0]._let_go()
    sender.join(timeout=10.0)
    come = carve(ranks[1]._places[0].own, second, 4)
    assert ended == ["rank 0's messages"] and all(map(torch.equal, come, second)), "no room, and yet it came"
    reader.start()
    time.sleep(0.1)
    assert len(ended) == 1
    ranks[1]._let_go()
    reader.join(timeout=10.0)
    assert len(ended) == 2


# ---- whether there are copies ----------------------------------------------------------------------------------------


DEVICE = torch.device("cuda", 0)  # by name only


def test_what_keeps_a_rank_from_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_copy, "_Driver", object)
    assert peer_copy._obstacle(DEVICE) is None
    with monkeypatch.context() as changed:
        changed.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # one queue to the GPU is too few
        assert peer_copy._obstacle(DEVICE) == "CUDA_DEVICE_MAX_CONNECTIONS is 1"
    with monkeypatch.context() as changed:
        changed.setattr(symmetric_memory, "get_backend", lambda device: "NVSHMEM")
        assert peer_copy._obstacle(DEVICE) == "symmetric memory is that of NVSHMEM: expected CUDA's own"
    with monkeypatch.context() as changed:
        changed.delattr(symmetric_memory, "get_backend")
        assert str(peer_copy._obstacle(DEVICE)).startswith("AttributeError: ")

    def no_driver() -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(peer_copy, "_Driver", no_driver)
    assert peer_copy._obstacle(DEVICE) == "OSError: libcuda.so.1: cannot open shared object file"


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[tuple[str, str]] = []
        exchanges.logger.addHandler(self)
        exchanges.logger.setLevel(logging.DEBUG)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelname, record.getMessage()))


def fails(message: str) -> Any:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError(message)

    return fail


def connect_worker(rank: int, world: int) -> list[tuple[bool, list[tuple[str, str]]]]:
    """Whether this rank gets copies, and what it says, in cases; in most of them the last rank is unlike others."""
    group, is_odd, words = dist.group.WORLD, rank == world - 1, Records()
    assert group is not None
    found = []

    def connect(wanted: bool | None, /, **odd: Any) -> None:
        """odd: what is so on the last rank."""
        usual: dict[str, Any] = {
            "_obstacle": lambda device: None, "_host": lambda: ("a",), "_Driver": Flags, "_uuid": gpus.__getitem__,
            "reach": True, "empty": torch.zeros, "rendezvous": lambda own, name: SimpleNamespace(get_buffer=buffer),
            "wanted": wanted,
        }
        now = usual | odd if is_odd else usual
        torch.cuda.can_device_access_peer = lambda device, peer: now["reach"]
        for name in ("_obstacle", "_host", "_Driver", "_uuid"):
            setattr(peer_copy, name, now[name])
        symmetric_memory.empty, symmetric_memory.rendezvous = now["empty"], now["rendezvous"]
        words.lines = []
        found.append((peer_copy.connect(group, torch.device("cpu"), now["wanted"]) is not None, words.lines))

    def buffer(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    gpus: dict[Any, str] = {torch.device("cpu"): f"GPU {rank}"} | {i: f"GPU {i}" for i in range(world)}
    torch.cuda.device_count = lambda: world
    torch.cuda.synchronize = torch.cuda.Stream = lambda *arguments, **options: None
    connect(None)
    connect(True)
    connect(True, wanted=False)
    connect(None, wanted=True, _obstacle=lambda device: "CUDA_DEVICE_MAX_CONNECTIONS is 1")
    connect(None, _host=lambda: ("b",))
    connect(None, _uuid=lambda device: "GPU 0")
    connect(None, reach=False)
    connect(None, empty=fails("out of memory\nin detail"))
    connect(None, rendezvous=fails("no file descriptor came"))
    connect(None, _Driver=lambda: SimpleNamespace(write=fails("cuStreamWriteValue32_v2 failed")))
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_all_ranks_have_copies_or_none_has_and_the_reason_is_told_to_who_asked_for_them(world: int) -> None:
    of_ranks = run_distributed(world, connect_worker)
    last = world - 1
    for rank, found in enumerate(of_ranks):
        assert found[:2] == [(True, []), (True, [])]
        reasons = [
            f"rank {last}: copies are switched off", f"rank {last}: CUDA_DEVICE_MAX_CONNECTIONS is 1",
            "ranks are on several hosts, or in containers that do not share processes and TMPDIR",
            "several ranks share a GPU",
            f"rank {last}: it does not see the GPU of every other rank, or has no peer access to it",
            f"rank {last}: out of memory", f"rank {last}: no file descriptor came",
            f"rank {last}: cuStreamWriteValue32_v2 failed",
        ]
        levels = ["INFO" if rank == last else "WARNING", "WARNING" if rank == last else "INFO", *["INFO"] * 6]
        assert found[2:] == [
            (False, [(level, f"the ring's messages go by NCCL, not by copy engines: {reason}")])
            for level, reason in zip(levels, reasons, strict=True)
        ]


def test_ranks_that_share_no_sockets_are_not_of_one_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    host = peer_copy._host()
    assert host == peer_copy._host()
    monkeypatch.setattr(peer_copy.tempfile, "gettempdir", lambda: str(tmp_path))
    assert peer_copy._host() != host and peer_copy._host()[0] == host[0]
    monkeypatch.setattr(peer_copy.tempfile, "gettempdir", lambda: str(tmp_path / "missing"))
    assert peer_copy._host() == host[:1]


def test_symmetric_memory_is_made_without_multicast(monkeypatch: pytest.MonkeyPatch) -> None:
    for before in (None, "0"):
        if before is not None:
            monkeypatch.setenv("TORCH_SYMM_MEM_DISABLE_MULTICAST", before)
        with pytest.raises(ZeroDivisionError), peer_copy._without_multicast():
            assert os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1"
            raise ZeroDivisionError
        assert os.environ.get("TORCH_SYMM_MEM_DISABLE_MULTICAST") == before


class Crowded:
    """Copies on a device that has no memory for a larger place."""

    nbytes = 100

    def must_grow(self, place: int, like: list[Tensor], most_rows: int) -> bool:
        return most_rows > 4

    def room(self, place: int, like: list[Tensor], rows: int, most_rows: int) -> tuple[Tensor, ...]:
        if most_rows > 4:
            raise CannotCopy("rank 1: out of memory")
        return self.remains(place, like, rows)

    def remains(self, place: int, like: list[Tensor], rows: int) -> tuple[Tensor, ...]:
        return tuple(torch.full((rows, *x.shape[1:]), 7.0) for x in like)

    def free(self) -> None:
        self.nbytes = 0


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> DistributedExchange:
    """An exchange on the CPU that takes itself for one with copies."""
    exchange = DistributedExchange.__new__(DistributedExchange)
    exchange.__dict__.update(
        _peers=Crowded(), _lacks_memory=False, device=torch.device("cpu"), observer=None, _stamps=Counter(),
        _watchdog=SimpleNamespace(raise_failure=lambda: None), _connect=lambda what: None,
    )
    monkeypatch.setattr(torch.cuda, "device", lambda device: threading.Lock())  # a context manager
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return exchange


def test_messages_go_by_nccl_once_a_place_cannot_be_had(
    crowded: DistributedExchange, caplog: pytest.LogCaptureFixture
) -> None:
    exchange, x = crowded, torch.zeros(2, 3)
    assert exchange.room([x], 2, Place(0, 4))[0].eq(7.0).all() and exchange.has_copies and exchange.place_bytes
    assert not caplog.messages
    assert exchange.room([x], 2, Place(0, 5))[0].shape == (2, 3) and not exchange.has_copies
    assert exchange.place_bytes == 0 and not exchange._has_places()
    assert caplog.messages == [
        "a landing place cannot be had, so messages go by NCCL from here on: rank 1: out of memory"
    ]
    assert exchange.room([x], 2, Place(0, 4))[0].shape == (2, 3) and len(caplog.messages) == 1


def test_a_message_remains_until_its_place_is_asked_for(
    crowded: DistributedExchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, places = torch.zeros(2, 3), [Place(number, 4) for number in range(2)]

    def are_there() -> list[bool]:
        return [crowded.remains([x], 2, place, stamp) is not None for place, stamp in zip(places, stamps, strict=True)]

    for place in places:
        crowded.room([x], 2, place)
    stamps = [crowded.stamp(place.number) for place in places]
    assert are_there() == [True, True]
    (there,) = crowded.remains([x], 2, places[0], stamps[0]) or ()
    assert there.eq(7.0).all() and there.shape == (2, 3)
    assert crowded.remains([x], 2, places[0], None) is None
    crowded.room([x], 2, places[1])
    assert are_there() == [True, False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # what is captured runs again
    assert are_there() == [False, False] and crowded.stamp(0) == NO_STAMP
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert are_there() == [True, False]
    crowded.forget()
    assert are_there() == [False, False]
    stamps = [crowded.stamp(place.number) for place in places]
    assert are_there() == [True, True]
    crowded.free_places()
    assert are_there() == [False, False]
    stamps = [crowded.stamp(place.number) for place in places]
    crowded.room([x], 2, Place(0, 5))  # cannot be had
    assert are_there() == [False, False] and crowded.stamp(0) == NO_STAMP


def test_a_place_that_cannot_be_had_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    (copies,) = make_ranks(1, 1024)
    copies.__dict__.update(device=torch.device("cpu"), _group=None)
    like = [torch.zeros(1, 256)]
    before = copies._places[0]
    assert len(copies.room(0, like, 1, 1)[0]) == 1 and copies._places[0] is before
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(peer_copy, "_of_all_ranks", lambda value, group: [None, value])
    monkeypatch.setattr(symmetric_memory, "empty", fails("CUDA out of memory"))
    with pytest.raises(CannotCopy, match="rank 1: CUDA out of memory"):
        copies.room(0, like, 2, 2)
    assert 0 not in copies._places and copies.must_grow(0, like, 1)


def test_copies_are_as_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, wanted in ((None, None), ("0", False), ("1", True)):
        monkeypatch.delenv("FA3_DIST_PEER_COPIES", raising=False)
        if given is not None:
            monkeypatch.setenv("FA3_DIST_PEER_COPIES", given)
        assert exchanges._default_peer_copies() is wanted
    monkeypatch.setenv("FA3_DIST_PEER_COPIES", "yes")
    with pytest.raises(ValueError, match="FA3_DIST_PEER_COPIES is 'yes': expected 1 or 0"):
        exchanges._default_peer_copies()


# ---- where messages lie ----------------------------------------------------------------------------------------------


def test_carve_keeps_parts_apart_and_aligned() -> None:
    like = [torch.zeros(1, 3, dtype=torch.bfloat16), torch.zeros(1, 2, 2)]
    place = torch.zeros(message_bytes(like, 50), dtype=torch.uint8)
    parts = carve(place, like, 50)
    assert [tuple(part.shape) for part in parts] == [(50, 3), (50, 2, 2)]
    assert [part.dtype for part in parts] == [x.dtype for x in like]
    assert all((part.data_ptr() - place.data_ptr()) % ALIGNMENT == 0 for part in parts)
    parts[0].fill_(1.0)
    assert not parts[1].any() and (parts[1].data_ptr() - parts[0].data_ptr()) == 2 * ALIGNMENT  # of 300 bytes
    assert [len(part) for part in carve(place, like, 0)] == [0, 0]
