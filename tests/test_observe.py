"""When attention computes and when messages travel: arithmetic of intervals, and what a ring of two processes tells."""

from __future__ import annotations

import contextlib
import random
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from fa3_dist.parallel import observe
from fa3_dist.parallel.all_to_all import all_to_all_attention
from fa3_dist.parallel.exchange import DistributedExchange, Pending, Place, Subgroup, _Started, _Transfer
from fa3_dist.parallel.observe import COMMUNICATION, COMPUTE, Span, Timeline
from fa3_dist.parallel.ring import ring_attention
from fa3_dist.parallel.schedule import zigzag
from tests.distributed import run_distributed

CPU = torch.device("cpu")


def test_unions() -> None:
    assert observe.union([]) == []
    assert observe.union([(5, 7), (0, 2), (1, 3), (3, 4), (6, 6.5), (9, 9)]) == [(0, 4), (5, 7)]


@pytest.mark.parametrize(
    ("intervals", "cover", "expected"),
    [
        ([(0, 10)], [], [(0, 10)]),
        ([(0, 10)], [(0, 10)], []),
        ([(0, 10)], [(-5, 4), (6, 20)], [(4, 6)]),
        ([(0, 10)], [(2, 3), (2, 5), (4, 6)], [(0, 2), (6, 10)]),
        ([(0, 2), (1, 3), (8, 9)], [(2.5, 8.5)], [(0, 2.5), (8.5, 9)]),
        ([(5, 5)], [], []),
        ([], [(0, 1)], []),
    ],
)
def test_what_a_cover_leaves(intervals: list, cover: list, expected: list) -> None:
    assert observe.uncovered(intervals, cover) == expected


def test_what_a_cover_leaves_against_counting() -> None:
    rng = random.Random(0)
    for _ in range(200):
        sets = []
        for _ in range(2):
            starts = [rng.randint(0, 30) for _ in range(rng.randint(0, 6))]
            sets.append([(start, start + rng.randint(0, 8)) for start in starts])
        moments = [{moment for start, end in each for moment in range(start, end)} for each in sets]
        left = observe.uncovered(*sets)
        counted = [moment for start, end in left for moment in range(start, end)]
        assert counted == sorted(moments[0] - moments[1]) and observe.length(left) == len(counted)


def test_exposed_and_busy_time_of_made_up_spans() -> None:
    spans = [
        Span(COMPUTE, "forward", 0, 1.0, 4.0),
        Span(COMMUNICATION, "K/V", 1, 0.5, 3.0, 100),
        Span(COMMUNICATION, "K/V", 2, 3.5, 6.0, 50),
        Span(COMPUTE, "forward", 1, 5.0, 9.0),
        Span(COMMUNICATION, "dK/dV", 1, 8.0, 9.5, 10),
    ]
    assert observe.exposed(spans) == pytest.approx(0.5 + 1.0 + 0.5)
    assert observe.busy(spans, COMPUTE) == 7 and observe.busy(spans, COMMUNICATION) == pytest.approx(2.5 + 2.5 + 1.5)
    assert observe.exposed([]) == observe.busy([], COMPUTE) == 0


def test_a_timeline_on_the_cpu() -> None:
    timeline = Timeline(CPU)
    first = timeline.begin(COMPUTE, "forward", 0)
    second = timeline.begin(COMMUNICATION, "K/V", 3, 77)
    timeline.begin(COMMUNICATION, "K/V", 4)  # never waited for
    time.sleep(0.02)
    timeline.end(first)
    timeline.end(second)
    compute, communication = timeline.spans()
    assert compute._replace(start=0, end=0) == Span(COMPUTE, "forward", 0, 0, 0)
    assert communication._replace(start=0, end=0) == Span(COMMUNICATION, "K/V", 3, 0, 0, 77)
    assert 0 <= compute.start <= communication.start < compute.end - 19 <= communication.end - 19 < 1000


def test_on_cuda_spans_lie_between_events_of_the_messages_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exchange and the timeline on made-up streams: what is recorded where, and in which order."""
    order: list[str] = []
    stream = ["main"]

    class Event:
        clock = 0.0

        def __init__(self, enable_timing: bool = False) -> None:
            self.timed = enable_timing

        def record(self, where: object = None) -> None:
            order.append(f"{'mark' if self.timed else 'done'} on {stream[0]}")
            Event.clock += 1
            self.at = Event.clock

        def synchronize(self) -> None:
            order.append("host waits")

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    class OnStream:
        def __enter__(self) -> None:
            stream.insert(0, "side")

        def __exit__(self, *_: object) -> None:
            stream.pop(0)

    work = SimpleNamespace(wait=lambda: order.append("transfer"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda which: OnStream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(dist, "P2POp", lambda *args, **options: None)
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda operations: [work] * len(operations))
    exchange = DistributedExchange.__new__(DistributedExchange)
    exchange.__dict__.update(
        rank=0, device=torch.device("cuda"), group=None, observer=None, _peers=None,
        _stream=SimpleNamespace(wait_stream=lambda other: order.append("side waits for main")),
        _watchdog=SimpleNamespace(raise_failure=lambda: None),
    )
    started = _Started(_Transfer(0, 2, "K/V", 1, None), (torch.zeros(5),), ())
    exchange._post_on_stream([started])
    assert order == ["side waits for main", "transfer", "done on side"], "nothing is recorded unobserved"
    order.clear()
    exchange.observer = timeline = Timeline(exchange.device)
    exchange._post_on_stream([started])
    with observe.computing(timeline, "forward", 1):
        order.append("attention")
    assert order == [
        "mark on main", "side waits for main", "mark on side", "transfer", "mark on side", "done on side",
        "mark on main", "attention", "mark on main",
    ]
    order.clear()
    assert timeline.spans() == [Span(COMMUNICATION, "K/V", 2, 1, 2, 20), Span(COMPUTE, "forward", 1, 4, 5)]
    assert order == ["host waits"] * 4


def test_messages_under_way_get_a_head_start(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[int] = []
    stream = SimpleNamespace(wait_stream=lambda other: None, wait_event=lambda event: None)
    monkeypatch.setattr(torch.cuda, "_sleep", pauses.append)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda which: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda where: None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(dist, "P2POp", lambda *args, **options: None)
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda operations: [])
    exchange = DistributedExchange.__new__(DistributedExchange)
    exchange.__dict__.update(
        rank=0, device=torch.device("cuda"), group=None, observer=None, head_start=10.0, _posted=None, _stream=stream,
        _watchdog=SimpleNamespace(raise_failure=lambda: None, watch=lambda pending: watched.append(pending)),
        _peers=SimpleNamespace(follow=lambda side: None, queue=lambda *message: copied.append(message),
                               confirm=lambda: copied.append(("confirm",))),
        _unconfirmed=None,
    )
    copied: list[tuple] = []
    watched: list[Pending] = []

    def post(place: Place | None = None) -> Pending:
        return exchange._post_on_stream([_Started(_Transfer(0, 2, "K/V", 1, None), (torch.zeros(5),), ())], place)[0]

    exchange.let_begin()
    assert pauses == [], "there is no message"
    post()
    exchange.let_begin()
    exchange.let_begin()
    assert pauses == [10 * 2000], "10 us of the fastest clock, once"
    post().wait()
    exchange.let_begin()
    assert len(pauses) == 1, "the message is through before what comes now"
    post(Place(3, 5))
    exchange.let_begin()
    assert len(pauses) == 1 and [(place, to) for place, _, to, _ in copied] == [(3, 1)], "a copy needs no SMs"
    with monkeypatch.context() as outside_of_a_graph:
        outside_of_a_graph.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        exchange.confirm()
        exchange.confirm()
    assert copied[1:] == [("confirm",)] and len(watched) == 1, "once a call, and somebody looks after it"
    exchange.head_start = 0.0
    post()
    exchange.let_begin()
    assert len(pauses) == 1


def ring_of_three(rank: int, world: int) -> list[tuple]:
    """Kinds, names, steps and bytes that a causal ring and an all-to-all tell of, and their order."""
    exchange = DistributedExchange(timeout=30)
    layout = zigzag((120,), world)
    generator = torch.Generator().manual_seed(rank)
    told: list[tuple] = []
    for attention in (ring_attention, all_to_all_attention):
        q, k, v = (torch.randn(layout.tokens(rank), 3, 8, generator=generator).requires_grad_() for _ in range(3))
        exchange.observer = timeline = Timeline(CPU)
        out, _ = attention(q, k, v, layout=layout, rank=rank, exchange=exchange, window_right=0)
        out.sum().backward()
        exchange.observer = None
        sent, exchange.stats.bytes_sent = exchange.stats.bytes_sent, 0
        spans = timeline.spans()
        assert Subgroup(exchange, [rank]).observer is None and sent == sum(span.bytes_sent for span in spans)
        assert all(0 <= span.start < span.end for span in spans)
        attention(q, k, v, layout=layout, rank=rank, exchange=exchange)  # unobserved
        assert len(timeline.spans()) == len(spans)
        exchange.stats.bytes_sent = 0
        told.append([(span.kind, span.what, span.step, span.bytes_sent) for span in spans])
    return told


def test_what_three_ranks_tell_of_a_ring_and_an_all_to_all() -> None:
    row = 3 * (8 + 8) * 4  # bytes of K and V of a token
    for rank, (ring, swap) in enumerate(run_distributed(3, ring_of_three, timeout=60)):
        # A later rank needs the first 20 of this rank's 40 tokens, an earlier one all of them.
        needed = {step: row * (20 if rank + step < 3 else 40) for step in (1, 2)}
        given_back = {step: row * (20 if rank - step >= 0 else 40) for step in (1, 2)}
        kv = {step: (COMMUNICATION, "K/V", step, needed[step]) for step in (1, 2)}
        home = {
            step: [each for heads in (2, 1)  # of the three, in either part of a step
                   for each in ((COMPUTE, "backward", step, 0),
                                (COMMUNICATION, "dK/dV", step, given_back[step] * heads // 3))]
            for step in (1, 2)
        }  # fmt: skip
        forward, backward = ([(COMPUTE, what, step, 0) for step in range(3)] for what in ("forward", "backward"))
        assert ring == [
            kv[1], forward[0], kv[2], forward[1], forward[2],
            kv[2], kv[1], *home[2], *home[1], backward[0],  # 40 tokens stay whole
        ]
        assert [span[:3] for span in swap if span[0] == COMPUTE] == [
            (COMPUTE, "forward", 0), (COMPUTE, "backward", 0)
        ]
        assert [span[1] for span in swap if span[0] == COMMUNICATION] == [
            name for name in ("q/k/v", "out/lse", "dout/delta", "dq/dk/dv") for _ in range(2)
        ]
        assert min(span[3] for span in swap if span[0] == COMMUNICATION) > 0
