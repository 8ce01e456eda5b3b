"""Messages by copy engines: how ranks tell each other, between threads; tests/test_exchange.py has them on GPUs."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fa3_dist.parallel import peer_copy
from fa3_dist.parallel.peer_copy import ALIGNMENT, PLACES, PeerCopies, carve, message_bytes


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


def test_one_queue_to_the_gpu_is_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_copy, "_Driver", object)
    assert peer_copy._is_able()
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    assert not peer_copy._is_able()


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
