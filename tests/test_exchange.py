"""Messages between ranks: both exchanges carry the same traffic; what is wrong becomes an error that names it."""

from __future__ import annotations

import gc
import os
import pickle
import re
import signal
import threading
import time
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fa3_dist.parallel.exchange as exchanges
from fa3_dist.parallel.exchange import (
    HEAD_START,
    DistributedExchange,
    Exchange,
    InProcessExchange,
    Place,
    RingError,
    Traffic,
    Watchdog,
    _tolerate_captures,
    run_in_process,
)
from tests.distributed import run_distributed, run_processes

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.float8_e4m3fn)


def start(exchange: Exchange, send, receive, shift: int = 1, what: str = "K/V"):
    """Sends to rank + shift, receives from rank - shift."""
    return exchange.exchange(send=send, destination=(exchange.rank + shift) % exchange.world, receive=receive,
                             source=(exchange.rank - shift) % exchange.world, what=what, step=shift)


# -------------------------------------------------------------------------------- what both of them must carry


def every_shift_and_dtype(exchange: Exchange) -> list[bool]:
    arrived = []
    for dtype in DTYPES:
        for shift in range(1, exchange.world):
            send = torch.full((3, 2), float(exchange.rank)).to(dtype)
            receive = torch.zeros(3, 2).to(dtype)
            start(exchange, send, receive, shift).wait()
            arrived.append(bool((receive.float() == (exchange.rank - shift) % exchange.world).all()))
    return arrived


def several_under_way(exchange: Exchange) -> list[float]:
    """Messages between two ranks match in the order they were started, whatever the order of the waits."""
    received = [torch.zeros(2) for _ in range(3)]
    pending = [start(exchange, torch.full((2,), 10.0 * i + exchange.rank), x) for i, x in enumerate(received)]
    for i in (2, 0, 1):
        pending[i].wait()
    return [float(x[0]) for x in received]


def empty_messages(exchange: Exchange) -> Traffic:
    """Only rank 0 sends something: rank 1 receives it, and nobody else counts a message."""
    send = torch.ones(4 if exchange.rank == 0 else 0, 2)
    receive = torch.zeros(4 if exchange.rank == 1 else 0, 2)
    before = Traffic(**vars(exchange.stats))
    start(exchange, send, receive).wait()
    start(exchange, None, None).wait()
    assert receive.sum() == receive.numel()
    return Traffic(*(getattr(exchange.stats, key) - value for key, value in vars(before).items()))


def parts_of_a_message(exchange: Exchange) -> tuple[bool, Traffic]:
    """Tensors of several shapes and dtypes, one of them empty, are one message; each arrives in its place."""

    def parts(rank: int) -> list[torch.Tensor]:
        return [torch.full((3, 2), float(rank)).bfloat16(), torch.ones(0, 5), torch.full((4,), 10.0 + rank)]

    received = [torch.zeros_like(part) for part in parts(0)]
    before = Traffic(**vars(exchange.stats))
    start(exchange, parts(exchange.rank), received).wait()
    expected = parts((exchange.rank - 1) % exchange.world)
    counted = Traffic(*(getattr(exchange.stats, key) - value for key, value in vars(before).items()))
    return all(map(torch.equal, received, expected)), counted


def carry(exchange: Exchange) -> dict[str, Any]:
    assert exchange.stats == Traffic(), "connecting does not count"
    checks = (every_shift_and_dtype, several_under_way, empty_messages, parts_of_a_message)
    return {fn.__name__: fn(exchange) for fn in checks}


def check_carried(by_rank: list[dict[str, Any]]) -> None:
    world = len(by_rank)
    for rank, result in enumerate(by_rank):
        assert result["every_shift_and_dtype"] == [True] * len(DTYPES) * (world - 1)
        source = (rank - 1) % world
        assert result["several_under_way"] == [source, 10.0 + source, 20.0 + source]
        assert result["parts_of_a_message"] == (True, Traffic(1, 1, 28, 28))
    nothing, sent, received = Traffic(), Traffic(1, 0, 32, 0), Traffic(0, 1, 0, 32)
    assert [r["empty_messages"] for r in by_rank] == [sent, received] + [nothing] * (world - 2)


def distributed_worker(rank: int, world: int) -> dict[str, Any]:
    exchange = DistributedExchange()
    assert (exchange.rank, exchange.world, exchange.sm_margin) == (rank, world, 0)
    assert exchange.timeout == 60.0, "the group's own timeout"
    result = carry(exchange)
    result["subgroup"] = on_a_subgroup(rank, world)
    with pytest.raises(ValueError, match="this ring moves cpu tensors, got one on meta"):
        start(exchange, torch.ones(1, device="meta"), None)
    with pytest.raises(ValueError, match="timeout: expected a positive number of seconds, got -1"):
        DistributedExchange(timeout=-1)
    return result


def on_a_subgroup(rank: int, world: int) -> list[bool]:
    """Ranks of the ring are ranks of its group, not of the world."""
    members = list(range(world))[:0:-1]  # all but rank 0
    group = dist.new_group(members)
    if rank == 0:
        with pytest.raises(ValueError, match="group: this process is not a member"):
            DistributedExchange(group)
        return []
    return every_shift_and_dtype(DistributedExchange(group))


def test_distributed():
    by_rank = run_distributed(3, distributed_worker)
    check_carried(by_rank)
    assert [len(result["subgroup"]) for result in by_rank] == [0, len(DTYPES), len(DTYPES)]
    assert all(all(result["subgroup"]) for result in by_rank)


@pytest.mark.parametrize("world", [2, 3, 8])
def test_in_process(world: int):
    check_carried(run_in_process(world, carry))


def test_one_rank_needs_no_connection():
    assert run_in_process(1, lambda exchange: (exchange.rank, exchange.world)) == [(0, 1)]


def test_no_process_group():
    with pytest.raises(ValueError, match="init_process_group first, or pass a group"):
        DistributedExchange()


# ------------------------------------------------------------------------------------ the tests' own processes


def one_fails(rank: int, world: int) -> None:
    if rank == 1:
        raise KeyError("this one")
    dist.barrier()


def one_hangs(rank: int, world: int) -> None:
    if rank == 1:
        time.sleep(60.0)
    dist.barrier()


def one_is_killed(rank: int, world: int) -> None:
    if rank == 1:
        os._exit(3)


@pytest.mark.parametrize("fn, message", [
    (one_fails, "rank 1 of 2 failed .*\n.*KeyError: 'this one'"),
    (one_hangs, r"ranks \[0, 1\] of 2 were not done within 3 s"),
    (one_is_killed, "exit codes: {1: 3}"),
])  # fmt: skip
def test_run_distributed_reports_and_ends(fn, message):
    started = time.monotonic()
    with pytest.raises(AssertionError, match=re.compile(message, re.DOTALL)):
        run_distributed(2, fn, timeout=3.0 if fn is one_hangs else 60.0)
    assert time.monotonic() - started < 30.0


# -------------------------------------------------------------------------------------- errors of the back end


def silent_peer(rank: int, world: int) -> tuple:
    exchange = DistributedExchange(timeout=0.5)
    if rank == 0:
        time.sleep(1.5)  # alive, but in another place
        return ()
    started = time.monotonic()
    with pytest.raises(RingError) as caught:
        start(exchange, None, torch.zeros(2), what="dK/dV").wait()
    error, seconds = caught.value, time.monotonic() - started
    return error.rank, error.step, error.what, error.peer, str(error), error.__cause__ is not None, seconds


def test_a_silent_peer_is_named():
    outcome = run_processes(2, silent_peer)[1]
    assert outcome.error is None, outcome.error
    rank, step, what, peer, text, chained, seconds = outcome.result
    assert (rank, step, what, peer, chained) == (1, 1, "dK/dV", 0, True)
    assert text == ("rank 1, ring step 1: dK/dV from rank 0 did not arrive within 0.5 s: rank 0 is dead, stuck, or in "
                    "another step")
    assert 0.4 < seconds < 5.0


def absent_at_construction(rank: int, world: int) -> str:
    if rank == 0:
        time.sleep(1.5)
        return ""
    with pytest.raises(RingError) as caught:
        DistributedExchange(timeout=0.5)
    return str(caught.value)


def test_a_rank_that_never_connects_is_named():
    outcome = run_processes(2, absent_at_construction)[1]
    assert outcome.error is None, outcome.error
    assert outcome.result.startswith("rank 1, ring step 1: the greeting from rank 0 did not arrive within 0.5 s")


def numbers(rank: int, world: int, name: str, variable: str) -> list[object]:
    """What an exchange has for a number, by argument and environment, and what it says to those that are none."""
    found: list[object] = []
    for given, environment in ((None, None), (None, "4"), (8, "4"), (-1, None), (None, "four"), (None, "-2")):
        os.environ.pop(variable, None)
        if environment is not None:
            os.environ[variable] = environment
        try:
            found.append(getattr(DistributedExchange(**{name: given}), name))
        except ValueError as error:
            found.append(str(error))
    return found


def test_margin_of_sms_comes_from_the_argument_or_the_environment():
    for found in run_distributed(2, numbers, "sm_margin", "FA3_DIST_SM_MARGIN"):
        assert found[:3] == [0, 4, 8]
        assert all("expected a number of SMs, 0 or more" in str(error) for error in found[3:])
        assert [str(error).split(":")[0] for error in found[3:]] == [
            "sm_margin is -1", "FA3_DIST_SM_MARGIN is 'four'", "FA3_DIST_SM_MARGIN is '-2'",
        ]  # fmt: skip


def test_head_start_comes_from_the_argument_or_the_environment():
    for found in run_distributed(2, numbers, "head_start", "FA3_DIST_HEAD_START"):
        assert found[:3] == [HEAD_START, 4.0, 8]
        assert all("expected microseconds, 0 or more" in str(error) for error in found[3:])
        assert [str(error).split(":")[0] for error in found[3:]] == [
            "head_start is -1", "FA3_DIST_HEAD_START is 'four'", "head_start is -2.0",
        ]  # fmt: skip


def test_error_can_be_pickled():
    """Launchers send exceptions from process to process."""
    error = RingError(1, 2, "K/V", 3, "from rank 3 is lost")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "rank 1, ring step 2: K/V from rank 3 is lost"
    assert (copy.rank, copy.step, copy.what, copy.peer) == (1, 2, "K/V", 3)


class Transfer:
    """What the watchdog sees of a transfer on a GPU."""

    def __init__(self, name: str, finished: bool = False):
        self.name, self.finished = name, finished

    def done(self) -> bool:
        return self.finished

    def overdue(self, seconds: float) -> RingError:
        return RingError(1, 2, self.name, 3, f"from rank 3 did not arrive within {seconds:g} s")


def test_watchdog_raises_the_first_overdue_transfer_and_aborts_once(caplog):
    aborted = threading.Event()
    watchdog = Watchdog(0.2, aborted.set, interval=0.01)
    for name in ("K/V", "dK/dV"):
        watchdog.watch(Transfer(name))
    watchdog.raise_failure()
    assert aborted.wait(5.0)
    with pytest.raises(RingError, match="rank 1, ring step 2: K/V from rank 3 did not arrive within 0.2 s"):
        watchdog.raise_failure()
    with pytest.raises(RingError):
        watchdog.raise_failure()
    assert "K/V from rank 3 did not arrive within 0.2 s; aborting the process group" in caplog.text


@pytest.mark.parametrize("world, expected", [
    (2, "q/k/v from rank 1 did not arrive within 9 s: rank 1 is dead, stuck"),
    (3, "q/k/v from rank 2 or to rank 1 did not get through within 9 s: one of them is dead, stuck"),
    (4, "q/k/v from and to ranks 1, 2 and 3 did not get through within 9 s: one of them is dead, stuck"),
])
def test_transfers_that_end_together_name_all_peers(world: int, expected: str):
    """Of an all-to-all over NCCL, whose messages are one group, nobody can say which one is missing."""
    transfers = tuple(exchanges._Transfer(0, shift, "q/k/v", shift, world - shift) for shift in range(1, world))
    error = exchanges._Together(transfers).overdue(9.0)
    assert str(error) == f"rank 0, ring step 1: {expected}, or in another step" and error.peer in range(1, world)


def test_watchdog_lets_go_of_transfers_until_all_are_through():
    called: list[str] = []
    transfers = [Transfer("first"), Transfer("second")]

    def release() -> None:
        called.append("release")
        if len(called) > 4:
            transfers[0].finished = True
        if len(called) > 6:
            transfers[1].finished = True

    watchdog = Watchdog(0.1, lambda: called.append("abort"), interval=0.01, release=release)
    for transfer in transfers:
        watchdog.watch(transfer)
    watchdog._thread.join(timeout=5.0)
    assert called == ["release", "abort", *["release"] * 5]
    with pytest.raises(RingError, match="first from rank 3 did not arrive"):
        watchdog.raise_failure()


@pytest.mark.parametrize("comes", [True, False])
def test_watchdog_that_is_stopped_first_lets_transfers_get_through(comes: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exchanges, "PATIENCE", 10.0 if comes else 0.3)
    slow = Transfer("slow")
    called: list[str] = []

    def release() -> None:
        called.append("release")
        slow.finished = True

    watchdog = Watchdog(60.0, lambda: called.append("abort"), interval=0.01, release=release)
    watchdog.watch(slow)
    if comes:
        threading.Timer(0.1, lambda: setattr(slow, "finished", True)).start()
    started = time.monotonic()
    watchdog.stop()
    assert not watchdog._thread.is_alive()
    assert 0.1 <= time.monotonic() - started < 10.0 if comes else time.monotonic() - started >= 0.3
    assert called == ([] if comes else ["release", "abort"])


def test_watchdog_that_is_retired_leaves_transfers_their_time():
    slow, called = Transfer("slow"), []
    watchdog = Watchdog(0.4, lambda: called.append("abort"), interval=0.01)
    watchdog.watch(slow)
    watchdog.retire()
    time.sleep(0.1)
    assert watchdog._thread.is_alive() and not called
    slow.finished = True
    watchdog._thread.join(timeout=5.0)
    assert not watchdog._thread.is_alive() and not called


def test_watchdog_lets_finished_transfers_go():
    aborted = threading.Event()
    watchdog = Watchdog(0.3, aborted.set, interval=0.01)
    slow = Transfer("slow")
    for transfer in (Transfer("done", finished=True), slow, Transfer("behind", finished=True)):
        watchdog.watch(transfer)
    time.sleep(0.1)
    slow.finished = True
    assert not aborted.wait(0.5)
    watchdog.raise_failure()
    before = threading.active_count()
    watchdog.stop()
    deadline = time.monotonic() + 5.0
    while threading.active_count() == before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() < before, "the thread ends"


# -------------------------------------------------------------------------------------------------- in process


def test_in_process_ranks_run_one_at_a_time_in_a_fixed_order():
    """Random numbers come from one global state: equal runs show that the order of ranks is fixed."""

    def fn(exchange: Exchange) -> list[float]:
        drawn = []
        for shift in (1, 2, 1):
            receive = torch.zeros(2)
            pending = start(exchange, torch.rand(2), receive, shift)
            drawn.append(float(torch.rand(())))
            pending.wait()
            drawn.append(float(receive[0]))
        return drawn

    runs = []
    for _ in range(5):
        torch.manual_seed(7)
        runs.append(run_in_process(4, fn))
    assert all(run == runs[0] for run in runs)


def test_in_process_message_is_read_at_the_wait():
    """A send buffer changed before the wait arrives changed, a receive buffer is untouched until then: misuse shows."""

    def fn(exchange: Exchange) -> tuple[float, float]:
        send, receive = torch.ones(1), torch.full((1,), -1.0)
        pending = start(exchange, send, receive)
        send.fill_(5.0)
        early = float(receive)
        pending.wait()
        return early, float(receive)

    assert run_in_process(2, fn) == [(-1.0, 5.0)] * 2


def test_in_process_send_buffer_is_free_after_the_wait():
    def fn(exchange: Exchange) -> float:
        send, receive = torch.full((1,), float(exchange.rank)), torch.zeros(1)
        pending = start(exchange, send, receive)
        pending.wait()
        send.fill_(99.0)
        return float(receive)

    assert run_in_process(3, fn) == [2.0, 0.0, 1.0]


def test_in_process_backward_runs_on_every_rank():
    """A backward that waits for another rank's backward does not keep it from running."""

    class Swap(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, exchange):
            ctx.exchange = exchange
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            received = torch.empty_like(gradient)
            start(ctx.exchange, gradient.contiguous(), received).wait()
            return received, None

    def fn(exchange: Exchange) -> float:
        x = torch.ones(1, requires_grad=True)
        (Swap.apply(x, exchange) * float(exchange.rank)).sum().backward()
        assert x.grad is not None
        return float(x.grad)

    assert run_in_process(3, fn) == [2.0, 0.0, 1.0]


def test_in_process_failure_ends_all_ranks():
    seen: dict[int, RingError] = {}

    def fn(exchange: Exchange) -> None:
        if exchange.rank == 1:
            raise ZeroDivisionError("rank 1 breaks")
        try:
            for shift in (1, 2):
                start(exchange, torch.ones(1), torch.zeros(1), shift).wait()
        except RingError as error:
            seen[exchange.rank] = error
            raise

    with pytest.raises(ZeroDivisionError, match="rank 1 breaks"):
        run_in_process(3, fn)
    assert sorted(seen) == [0, 2]
    assert (seen[2].rank, seen[2].step, seen[2].what, seen[2].peer) == (2, 1, "K/V", 1)
    assert "rank 1 breaks" in str(seen[2]) and isinstance(seen[2].__cause__, ZeroDivisionError)


def test_in_process_deadlock_is_an_error():
    def fn(exchange: Exchange) -> None:
        start(exchange, None, torch.zeros(1), what="dK/dV").wait()

    with pytest.raises(RingError, match="rank 0, ring step 1: dK/dV from rank 2 did not get through: every rank waits"):
        run_in_process(3, fn)


def test_in_process_turn_passes_over_ranks_that_cannot_go_on():
    def fn(exchange: Exchange) -> float:
        rank, received = exchange.rank, torch.zeros(1)

        def take(source: int) -> None:
            exchange.exchange(send=None, destination=rank, receive=received, source=source, what="K/V", step=1).wait()

        def give(destination: int):
            return exchange.exchange(send=torch.ones(1), destination=destination, receive=None, source=rank, what="K/V",
                                     step=1)

        if rank == 0:  # while it waits for the second message of rank 2, rank 1 waits for its own
            take(2)
            sent = give(2)
            take(2)
            give(1).wait()
            sent.wait()
        elif rank == 1:
            take(0)
        else:
            sent = give(0)
            take(0)
            give(0).wait()
            sent.wait()
        return float(received)

    assert run_in_process(3, fn) == [1.0, 1.0, 1.0]


def test_in_process_mismatch_is_an_error():
    def fn(exchange: InProcessExchange) -> None:
        size = 3 if exchange.rank == 0 else 4
        start(exchange, torch.zeros(size), torch.zeros(4)).wait()

    with pytest.raises(RingError, match=r"rank 1, .* from rank 0 came as \(3,\) torch.float32, but \(4,\) .* expected"):
        run_in_process(2, fn)


def test_in_process_inherits_grad_mode():
    with torch.no_grad():
        assert run_in_process(2, lambda exchange: torch.is_grad_enabled()) == [False, False]
    assert run_in_process(2, lambda exchange: torch.is_grad_enabled()) == [True, True]


def test_in_process_world_must_be_positive():
    with pytest.raises(ValueError, match="world: expected a positive number of ranks, got 0"):
        run_in_process(0, lambda exchange: None)


# ----------------------------------------------------------------------------------------------- graphs


def captured_with_a_watchdog(prepare) -> tuple[Tensor, int]:
    """What a graph of ten additions gives, captured while a watchdog looks at an event, and how often that looked."""
    looks = []

    class Slow:
        event = torch.cuda.Event()

        def done(self) -> bool:
            looks.append(self.event.query())
            return len(looks) > 20

        def overdue(self, seconds: float) -> RingError:
            raise AssertionError("it has a minute")

    watchdog, x, graph = Watchdog(60.0, lambda: None, 0.002, prepare), torch.zeros(8, device="cuda"), None
    Slow.event.record()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            watchdog.watch(Slow())
            for _ in range(10):
                x += 1
                time.sleep(0.01)
        graph.replay()
    finally:
        watchdog.stop()
    return x.cpu(), len(looks)


@pytest.mark.gpu
def test_watchdog_does_not_spoil_the_capture_of_a_graph():
    x, looks = captured_with_a_watchdog(_tolerate_captures)
    assert x.tolist() == [10.0] * 8 and looks > 5


# --------------------------------------------------------------------------------------------------------- NCCL


def nccl_worker(rank: int, world: int) -> dict[str, Any]:
    exchange = DistributedExchange()
    assert exchange.device == torch.device("cuda", rank) and exchange.timeout == 54.0
    results = []
    for shift in range(1, world):
        send, receive = torch.full((3, 2), float(rank), device="cuda"), torch.zeros(3, 2, device="cuda")
        start(exchange, send, receive, shift).wait()
        results.append(bool((receive == (rank - shift) % world).all()))
    start(exchange, torch.ones(0, device="cuda"), None).wait()
    return {"results": results, "messages": exchange.stats.messages_sent}


@pytest.mark.multi_gpu
def test_nccl():
    world = torch.cuda.device_count()
    expected = {"results": [True] * (world - 1), "messages": world - 1}
    assert run_distributed(world, nccl_worker, backend="nccl") == [expected] * world


def places_worker(rank: int, world: int, peer_copies: bool) -> dict[str, Any]:
    """Messages into places, of which some grow, some are empty, and all are read long after the next one was sent."""
    exchange = DistributedExchange(peer_copies=peer_copies or rank > 0)
    rows_of = torch.randint(0, 9000, (40, world), generator=torch.Generator().manual_seed(0)).tolist()
    streams, read, expected = [torch.cuda.Stream() for _ in range(2)], [], []
    for i, rows in enumerate(rows_of):
        rows = [count if count > 500 else 0 for count in rows]  # sent by each rank
        shift = 1 + i % (world - 1)
        source, place = (rank - shift) % world, Place(i % 2, max(rows))
        with torch.cuda.stream(streams[i // 7 % 2]):  # the stream changes now and then
            sent = [torch.full((rows[rank], *form), 100.0 * i + rank, dtype=dtype, device="cuda")
                    for form, dtype in (((3, 5), torch.float32), ((7,), torch.bfloat16))]  # fmt: skip
            room = exchange.room(sent, rows[source], place)
            exchange.exchange(send=sent, destination=(rank + shift) % world, receive=room, source=source, what="K/V",
                              step=shift, place=place).wait()  # fmt: skip
            torch.cuda._sleep(300_000 if (i + rank) % 3 else 0)
            read += [part.float().clone() for part in room]
        expected += [torch.full_like(part, 100.0 * i + source, dtype=dtype).float()
                     for part, dtype in zip(room, (torch.float32, torch.bfloat16))]  # fmt: skip
    torch.cuda.synchronize()
    found = {"wrong": [i for i, pair in enumerate(zip(read, expected)) if not torch.equal(*pair)],
             "bytes": exchange.place_bytes}  # fmt: skip
    exchange.free_places()
    left = weakref.ref(exchange)
    found["left"] = exchange.place_bytes
    del exchange
    gc.collect()
    return found | {"is_gone": left() is None}


@pytest.mark.multi_gpu
@pytest.mark.parametrize("peer_copies", [True, False])
def test_messages_into_places(peer_copies: bool):
    """By copy engines; or, since one rank does not want these, by NCCL on all of them."""
    found = run_distributed(torch.cuda.device_count(), places_worker, peer_copies, backend="nccl", timeout=120.0)
    assert [each["wrong"] for each in found] == [[]] * len(found)
    assert all((each["bytes"] > 0) is peer_copies and each["left"] == 0 and each["is_gone"] for each in found)


def nccl_lost_peer(rank: int, world: int, is_killed: bool, by_copy: bool) -> tuple:
    exchange = DistributedExchange(timeout=3.0, peer_copies=by_copy)
    if rank == 0:
        if is_killed:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(20.0)
        return ()
    started = time.monotonic()
    place = Place(0, 2) if by_copy else None
    receive = torch.zeros(2, device="cuda")
    exchange.exchange(send=None, destination=0, receive=receive, source=0, what="dK/dV", step=1, place=place).wait()
    queued = time.monotonic() - started
    with pytest.raises(RingError) as caught:
        torch.cuda.synchronize()  # ends because the watchdog aborts the group, and releases who waits for a copy
        start(exchange, None, receive).wait()
    return queued, time.monotonic() - started, str(caught.value)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("by_copy", [False, True], ids=["nccl", "copy"])
@pytest.mark.parametrize("is_killed", [False, True], ids=["silent", "killed"])
def test_a_lost_peer_is_named_and_the_host_does_not_wait(is_killed: bool, by_copy: bool):
    outcome = run_processes(2, nccl_lost_peer, is_killed, by_copy, backend="nccl", without=[0], timeout=60.0)[1]
    assert outcome.error is None, outcome.error
    queued, seconds, text = outcome.result
    assert queued < 1.0 and seconds < 10.0
    assert text.startswith("rank 1, ring step 1: dK/dV from rank 0 did not arrive within 3 s")


def nccl_hands_on(rank: int, world: int) -> str:
    """Rank 0 hands on what rank 1 never sends: it gives up after 2 s, and rank 1 after 6 s."""
    exchange = DistributedExchange(timeout=2.0 if rank == 0 else 6.0, peer_copies=True)
    x = torch.zeros(4, device="cuda")
    places = [exchange.room([x], 4, Place(number, 4))[0] for number in range(2)]
    started = time.monotonic()
    with pytest.raises(RingError) as caught:
        peer: dict[str, Any] = {"destination": 1 - rank, "source": 1 - rank, "what": "K/V"}
        if rank == 0:
            exchange.exchange(send=None, receive=places[0], **peer, step=1, place=Place(0, 4)).wait()
            exchange.exchange(send=places[0], receive=None, **peer, step=2, place=Place(1, 4)).wait()
        else:
            exchange.exchange(send=None, receive=places[1], **peer, step=2, place=Place(1, 4)).wait()
        torch.cuda.synchronize()
        assert time.monotonic() - started > (1.5 if rank == 0 else 5.5), "what never came was taken for a message"
        start(exchange, None, x).wait()
    return str(caught.value)


@pytest.mark.multi_gpu
def test_what_a_rank_sends_that_has_given_up_is_not_taken_for_a_message():
    first, second = run_distributed(2, nccl_hands_on, backend="nccl", timeout=60.0)
    assert first.startswith("rank 0, ring step 1: K/V from rank 1 did not arrive within 2 s")
    assert second.startswith("rank 1, ring step 2: K/V from rank 0 did not arrive within 6 s")
