"""The choice between ring, all-to-all and product: at shapes that disagree, and against what runs really move."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fa3_dist.parallel.all_to_all import all_to_all_attention
from fa3_dist.parallel.exchange import DistributedExchange, Exchange, Parts, Pending, Place, new_room, run_in_process
from fa3_dist.parallel.plan import (
    LARGE_COPY,
    RATES,
    Call,
    Choice,
    Copies,
    Links,
    choose,
    estimate,
    measure_links,
    mode_name,
    speed_at,
)
from fa3_dist.parallel.ring_clock import Wires, backward_end, forward_end
from fa3_dist.parallel.schedule import Layout, contiguous, grouped, packed, work, zigzag
from tests.distributed import run_distributed
from tests.ring_gate import Case, run_case

BF16 = torch.bfloat16
HOST = Links.given(400e9)  # one host with NVLink
HOSTS = Links.given({8: 400e9, 64: 40e9})  # hosts of 8 and a network


def call(heads: int, kv_heads: int, window_left: int | None = None, window_right: int | None = 0) -> Call:
    return Call(heads, kv_heads, 128, 128, BF16, window_left, window_right)


# what decides -> (layout, call, links, expected head_ranks)
CASES: dict[str, tuple[Layout, Call, Links, int]] = {
    "few heads and a long sequence: ring": (zigzag((262144,), 8), call(8, 1), HOST, 1),
    "grouped heads and a long sequence: ring": (zigzag((131072,), 8), call(32, 8), Links.given(100e9), 1),
    "a short sequence and many heads: all-to-all": (zigzag((4096,), 4), call(32, 32), Links.given(50e9), 4),
    "the same where copy engines are faster: ring": (
        zigzag((4096,), 4), call(32, 32), replace(Links.given(50e9), copies=Copies(300e9, 1e-5)), 1),
    "on links that hide half of a ring: product": (zigzag((32768,), 8), call(32, 32), Links.given(100e9), 4),
    "the same with one key/value head: ring": (zigzag((4096,), 4), call(32, 1), Links.given(4e9), 1),
    "full mask, many heads, slow links: all-to-all": (
        contiguous((16384,), 8), call(64, 64, window_right=None), Links.given(10e9), 8),
    "the same with a short window: ring": (contiguous((16384,), 8), call(64, 64, 128), Links.given(10e9), 1),
    "short documents that stay whole: ring": (packed([1000] * 64, 8), call(32, 32), HOST, 1),
    "one long document among short ones, slow links: all-to-all": (
        packed([16000, *[100] * 8], 8), call(64, 64), Links.given(10e9), 8),
    "two hosts: all-to-all within": (zigzag((32768,), 16), call(16, 16), HOSTS, 8),
    "heads that no divisor but 1 shares: ring": (zigzag((4096,), 4), call(5, 5), Links.given(1e6), 1),
    "heads that only 2 ranks can share": (zigzag((4096,), 4), call(6, 6), Links.given(1e8), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_choices(name: str):
    layout, attention, links, expected = CASES[name]
    choice = choose(layout, attention, links, "cuda")
    assert choice.head_ranks == expected, str(choice)
    assert choice.mode == mode_name(expected, layout.world)


def test_choice_can_be_printed():
    layout, attention, links, _ = CASES["heads that only 2 ranks can share"]
    text = str(choose(layout, attention, links, "cuda"))
    assert text.startswith("ring 2 x all_to_all 2: the smallest estimate")
    assert "6 heads cannot be shared by 4 ranks" in text
    assert "6:6 heads of 128, bfloat16, causal; 4096 tokens in 1 documents on 4 ranks" in text
    marked = [line for line in text.splitlines() if line.startswith("  * ")]
    assert len(marked) == 1 and marked[0].startswith("  * ring 2 x all_to_all 2") and " MB a rank" in marked[0]
    assert "full" in str(call(2, 2, None, None)) and "window (5, 0)" in str(call(2, 2, 5, 0))
    assert "nothing else is possible" in str(choose(layout, call(5, 5), links, "cuda"))
    assert str(Choice(attention, layout, 4, "mode is 'all_to_all'")).startswith("all_to_all: mode is 'all_to_all'\n")


@pytest.mark.parametrize("window", [(None, 0), (None, None), (30, 0)])
@pytest.mark.parametrize("kv_heads", [1, 4, 8])
@pytest.mark.parametrize("head_ranks", [1, 4])
def test_estimated_bytes_are_moved(head_ranks: int, kv_heads: int, window):
    """By the busiest rank, at sizes at which messages have no padding and all ranks have as many tokens."""
    case = Case("", (128, 64), heads=16, kv_heads=kv_heads, window_left=window[0], window_right=window[1], dlse=False)
    attention = Call(case.heads, case.kv_heads, case.head_dim, case.head_dim_v, case.dtype, *window)
    expected = estimate(case.make_layout(4), attention, head_ranks, HOST, RATES["cpu"]).moved
    run = partial(all_to_all_attention, head_ranks=head_ranks)
    by_rank = run_in_process(4, run_case, case, False, "cpu", run)
    if head_ranks == 1:  # K/V come twice, and dK/dV of them leave: as many bytes in fp32
        assert expected == 3 * max(each["forward"]["bytes_received"] for each in by_rank)
    else:
        assert {each["forward"]["bytes_sent"] + each["backward"]["bytes_sent"] for each in by_rank} == {expected}


def test_estimates_count_pairs_and_follow_links():
    layout, attention = zigzag((4096,), 4), call(8, 8)
    for head_ranks in (1, 2, 4):
        each = estimate(layout, attention, head_ranks, HOST, RATES["cuda"])
        flops = work(layout, 0, window_right=0) * 8 * 128 * 2
        assert each.forward.compute == pytest.approx(2 * flops / 5e14, rel=0.01)
        assert each.backward.compute == pytest.approx(5 * flops / 5e14, rel=0.01)
        assert each.seconds == pytest.approx(each.forward.seconds + each.backward.seconds)
        slower = estimate(layout, attention, head_ranks, Links.given(1e9), RATES["cuda"])
        assert slower.exposed > each.exposed > 0 and slower.moved == each.moved
    assert HOSTS.within(2) == HOSTS.within(8) == 400e9 and HOSTS.within(16) == HOSTS.within(128) == 40e9
    assert HOSTS.between(np.array([7, 7, 20]), np.array([0, 8, 130])).tolist() == [400e9, 40e9, 40e9]


def test_one_rank_costs_its_attention():
    each = estimate(zigzag((4096, 100), 1), call(8, 2), 1, HOST, RATES["cuda"])
    assert each.exposed == 0 and each.moved == 0 and each.seconds == each.compute > 0


def test_blocks_of_ranks_cost_what_one_of_them_does():
    """Two documents, each of two of four ranks, which are two hosts: no message leaves one."""
    links = Links.given({2: 400e9, 4: 1e9})
    pair, pairs = (estimate(packed((9000,) * count, 2 * count), call(8, 8), 1, links, RATES["cuda"])
                   for count in (1, 2))
    assert pairs == pair and pair.moved > 0
    assert estimate(packed((9000, 100), 4), call(8, 8), 1, links, RATES["cuda"]).exposed > 2 * pair.exposed


NOTHING_BUT_ATTENTION = RATES["cuda"]._replace(memory=1e30, step_seconds=0.0, part_seconds=0.0, latency=0.0)


@pytest.mark.parametrize("window", [(None, 0), (None, None), (100, 0)])
@pytest.mark.parametrize("head_ranks", [1, 2, 4])
@pytest.mark.parametrize("make", [zigzag, contiguous])
def test_where_all_else_is_free_the_busiest_rank_decides(make, head_ranks: int, window):
    attention = call(8, 8, *window)
    each = estimate(make((4096,), 4), attention, head_ranks, Links.given(1e30), NOTHING_BUT_ATTENTION)
    ring = grouped(make((4096,), 4), head_ranks)
    pairs = max(work(ring, rank, window_left=window[0], window_right=window[1]) for rank in range(ring.world))
    assert each.seconds == pytest.approx(7 * 2 * pairs * 8 / head_ranks * 128 / 5e14, rel=1e-9)
    assert each.exposed == pytest.approx(0, abs=1e-9 * each.compute)


def test_slow_links_decide_alone():
    """Two ranks, full mask, by hand: the forward is its one message and what it feeds, the all-to-all its two."""
    layout, links, tokens = contiguous((2048,), 2), Links.given(1e6), 1024
    full, row = call(4, 2, window_right=None), 2 * 256 * 2  # bytes of K/V of a token
    ring = estimate(layout, full, 1, links, NOTHING_BUT_ATTENTION)
    step = tokens * tokens * 4 * 2 * 128 / 5e14  # a product of one step
    assert ring.forward.seconds == pytest.approx(tokens * row / 1e6 + 2 * step)
    assert ring.backward.seconds == pytest.approx(tokens * (row + 2 * row) / 1e6 + 5 * step)
    swapped = estimate(layout, full, 2, links, NOTHING_BUT_ATTENTION)
    per_row = 2 * 128 * 2 + 256 * 2 + 2 * (128 * 2 + 4)  # of the other rank's heads: q, k and v, out and lse
    assert swapped.forward.exposed == pytest.approx(tokens * per_row / 1e6)
    late = estimate(layout, full, 1, Links(links.bandwidth, latency=10.0), NOTHING_BUT_ATTENTION)
    assert late.forward.seconds == pytest.approx(ring.forward.seconds + 10)
    assert late.backward.seconds == pytest.approx(ring.backward.seconds + 20)


def test_copy_engines_carry_the_messages_of_the_ring_alone():
    """By hand as above; neither the all-to-all nor the ring of a product has places for them."""
    layout, full, links = contiguous((2048,), 2), call(4, 2, window_right=None), Links.given(1e6)
    copied = replace(links, copies=Copies(2e6, 10.0))
    row, step = 2 * 256 * 2, 1024 * 1024 * 4 * 2 * 128 / 5e14
    ring = estimate(layout, full, 1, copied, NOTHING_BUT_ATTENTION)
    assert ring.forward.seconds == pytest.approx(10 + 1024 * row / 2e6 + 2 * step)
    assert ring.backward.seconds == pytest.approx(20 + 1024 * 3 * row / 2e6 + 5 * step)
    found = estimate(layout, full, 1, copied, NOTHING_BUT_ATTENTION, finds_kv=True)
    assert found.forward == ring.forward and found.moved == ring.moved - 1024 * row
    assert found.backward.seconds == pytest.approx(10 + 1024 * 2 * row / 2e6 + 5 * step)
    assert estimate(layout, full, 1, links, NOTHING_BUT_ATTENTION, finds_kv=True).moved == ring.moved
    for world, head_ranks in ((2, 2), (4, 2), (4, 4)):
        layout = contiguous((2048,), world)
        estimates = {estimate(layout, full, head_ranks, each, NOTHING_BUT_ATTENTION) for each in (links, copied)}
        assert len(estimates) == 1


def test_parts_hide_the_messages_of_an_all_to_all():
    layout, full, tokens = contiguous((2048,), 2), call(4, 4, window_right=None), 1024
    in_parts = NOTHING_BUT_ATTENTION._replace(least_part=1)
    per_row = 2 * 2 * (128 + 128 + 256) + 2 * 4  # of the other rank's two heads: q, out, k and v; lse
    compute = 4 * 2 * 2048 * 2048 * 128 / 5e14
    for bandwidth, exposed in ((1e13, tokens * per_row / 1e13 / 2), (1e6, tokens * per_row / 1e6 - compute)):
        whole, parts = (estimate(layout, full, 2, Links.given(bandwidth), rates)
                        for rates in (NOTHING_BUT_ATTENTION, in_parts))
        assert whole.forward.compute == parts.forward.compute == pytest.approx(compute)
        assert whole.forward.exposed == pytest.approx(tokens * per_row / bandwidth)
        assert parts.forward.exposed == pytest.approx(exposed, rel=1e-9)
        assert parts.moved == whole.moved


def test_of_more_steps_the_last_two_find_their_keys():
    layout, full, links = contiguous((4096,), 4), call(4, 2, window_right=None), Links((), 0.0, Copies(1e6, 10.0))
    again, found = (estimate(layout, full, 1, links, NOTHING_BUT_ATTENTION, finds_kv=each) for each in (False, True))
    assert again.moved - found.moved == 2 * 1024 * 2 * 256 * 2
    assert again.backward.seconds - found.backward.seconds == pytest.approx(2 * (10 + 1024 * 2 * 256 * 2 / 1e6))


def test_rates_follow_the_length_of_tiles():
    speed = ((100, 1e14), (10000, 3e14))
    assert speed_at(speed, np.array([1, 100, 1000, 10000, 1e6])) == pytest.approx([1e14, 1e14, 2e14, 3e14, 3e14])
    rates = NOTHING_BUT_ATTENTION._replace(forward=speed)
    each = estimate(zigzag((20001,), 1), call(8, 8), 1, HOST, rates)  # 10001 keys on average
    assert each.forward.seconds == pytest.approx(4 * 20001 * 10001 * 8 * 128 / 3e14)
    assert each.backward.seconds == pytest.approx(10 * 20001 * 10001 * 8 * 128 / 5e14)
    shared = rates._replace(backward=((2 * 10001, 3e14), (4 * 10001, 4e14)))
    for kv_heads, rate in ((8, 3e14), (4, 3e14), (2, 4e14), (1, 4e14)):  # 10001 queries of each head on average
        each = estimate(zigzag((20001,), 1), call(8, kv_heads), 1, HOST, shared)
        assert each.backward.seconds == pytest.approx(10 * 20001 * 10001 * 8 * 128 / rate, rel=1e-6)


@pytest.mark.parametrize("head_ranks", [1, 4])
def test_what_is_slower_is_never_predicted_faster(head_ranks: int):
    layout, attention, rates = zigzag((8192,), 8), call(16, 4), RATES["cuda"]
    base = estimate(layout, attention, head_ranks, HOSTS, rates)
    slower = [
        (Links.given({8: 400e9, 64: 4e9}), rates), (Links.given({8: 40e9, 64: 40e9}), rates),
        (HOSTS, rates._replace(latency=1e-3)), (HOSTS, rates._replace(step_seconds=1e-3)),
        (HOSTS, rates._replace(part_seconds=1e-3)),
        (HOSTS, rates._replace(memory=3e11)), (HOSTS, rates._replace(forward=((1, 1e14),))),
    ]  # fmt: skip
    for links, other in slower:
        assert estimate(layout, attention, head_ranks, links, other).seconds >= base.seconds
    longer = estimate(zigzag((16384,), 8), attention, head_ranks, HOSTS, rates)
    assert longer.seconds > base.seconds


# ---- the ring in time ------------------------------------------------------------------------------------------------


def wires(world: int, *shifts: int) -> Wires:
    """2 bytes/s, and half a second a message."""
    return Wires((0, *shifts), world, world, lambda ranks, others: np.full(len(ranks), 2.0), 0.5)


def test_forward_by_hand():
    """Two ranks; the message of 10 bytes takes 5.5 s, in which local keys need 4 s."""
    work = np.array([[4.0, 3.0], [4.0, 5.0]])
    message = np.array([[0, 10], [0, 10]])
    assert forward_end(wires(2, 1), work, message).tolist() == [8.5, 10.5]
    hidden = forward_end(wires(2, 1), np.array([[6.0, 3.0], [7.0, 5.0]]), message)
    assert hidden.tolist() == [9.0, 12.0]


def test_a_late_rank_holds_up_those_who_wait_for_it():
    """Three ranks; only rank 0 sends: to rank 1 in step 1 at 0, to rank 2 in step 2, which it first comes to at 7.

    That message moves until 9.5, and both ends wait for it.
    """
    work = np.array([[7.0, 0.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    message = np.array([[0, 0, 0], [0, 4, 0], [0, 0, 4]])
    end = forward_end(wires(3, 1, 2), work, message)
    assert end.tolist() == [10.5, 4.5, 10.5]


def test_backward_by_hand():
    """K/V in 0 to 5.5, gradients of it in 5.5 to 8.5, home in 8.5 to 19, while the closing part ends at 10.5."""
    both = np.ones(2)
    end = backward_end(
        wires(2, 1), both, np.full((2, 2), 3.0), 2 * both, np.full((2, 2), 10), np.full((2, 2), 20),
        np.full((2, 2), 0.25), (1, 1),
    )  # fmt: skip
    assert end.tolist() == [19.25, 19.25]


def test_backward_in_halves_by_hand():
    """The gradients of one half in 5.5 to 7, home in 7 to 12.5; of the other in 7 to 8.5, home in 12.5 to 18."""
    both = np.ones(2)
    end = backward_end(
        wires(2, 1), both, np.full((2, 2), 3.0), 2 * both, np.full((2, 2), 10), np.full((2, 2), 20),
        np.full((2, 2), 0.25), (1, 2),
    )  # fmt: skip
    assert end.tolist() == [18.125, 18.125]


def test_a_half_waits_for_what_returns_from_the_step_before():
    """Three ranks, instant messages of K/V; halves of 2 s and of 2.5 s on the wire, which it takes one at a time."""
    zero, message = np.zeros(3), np.full((3, 3), 1e-9)
    quick = Wires((0, 1, 2), 3, 3, lambda ranks, others: np.full(len(ranks), 2.0), 0.0)
    end = backward_end(quick, zero, np.full((3, 3), 4.0), zero, message, np.full((3, 3), 10), np.ones((3, 3)),
                       (1, 2, 2))  # fmt: skip
    # Home in 2 to 4.5 and 4.5 to 7; the second step's halves are computed and the first's added by 6.5 and 9, so that
    # they go home in 6.5 (7, when the wire is free) to 9.5 and 9.5 to 12, and are added by 12.5.
    assert end == pytest.approx([12.5] * 3)


def test_messages_of_a_rank_take_turns():
    """Three ranks: step 2's K/V (5.5 to 11) come before step 1's dK/dV (posted at 6.5, so 11 to 21.5)."""
    all_ = np.zeros(3)
    end = backward_end(
        wires(3, 1, 2), all_, np.ones((3, 3)), all_, np.full((3, 3), 10), np.full((3, 3), 20), np.zeros((3, 3)),
        (1, 1, 1),
    )  # fmt: skip
    assert end.tolist() == [32.0] * 3  # the last step is done at 12, waits for that, and its own take 10.5 more


@pytest.mark.parametrize("bandwidth, error", [
    (0, ValueError), (-1.0, ValueError), (float("inf"), ValueError), (float("nan"), ValueError), ({}, ValueError),
    ({0: 1e9}, ValueError), ({2: 0}, ValueError), ("fast", TypeError), (True, TypeError), ({2: "fast"}, TypeError),
    ({2.5: 1e9}, TypeError), ([1e9], TypeError),
])  # fmt: skip
def test_bad_bandwidths_are_refused(bandwidth, error):
    with pytest.raises(error, match="bandwidth is .*: expected"):
        Links.given(bandwidth)


def measure(exchange: Exchange) -> tuple[Links, int]:
    return measure_links(exchange, torch.device("cpu")), exchange.stats.messages_sent


def test_measured_links_are_equal_on_all_ranks():
    """What processes measure is tested where ContextParallel asks for it."""
    ((links, messages_counted),) = {*run_in_process(6, measure)}
    assert [ranks for ranks, _ in links.bandwidth] == [2, 3, 6] and messages_counted == 0
    assert all(rate > 0 for _, rate in links.bandwidth) and links.latency > 0


class WithPlaces(DistributedExchange):
    """Between processes, where there are none; a message takes 50 ms, a large one 200 ms more."""

    def __init__(self, has_memory: bool):
        super().__init__()
        self.has_memory, self.freed = has_memory, 0

    @property
    def has_copies(self) -> bool:
        return not self._lacks_memory

    def room(self, like: Sequence[Tensor], rows: int, place: Place) -> Parts:
        assert place == (0, LARGE_COPY["cpu"])
        self._lacks_memory = not self.has_memory
        return new_room(like, rows)

    def exchange(self, *, send: Tensor, place: Place, **others: Any) -> Pending:
        time.sleep(0.25 if len(send) == place.most_rows else 0.05)
        return super().exchange(send=send, place=place, **others)

    def free_places(self) -> None:
        self.freed += 1


def measure_copies(rank: int, world: int, has_memory: bool) -> tuple[Links, int, int]:
    exchange = WithPlaces(has_memory)
    return *measure(exchange), exchange.freed


def test_copies_are_measured_where_places_can_be_had():
    ((links, messages_counted, freed),) = {*run_distributed(3, measure_copies, True)}
    assert messages_counted == 0 and freed == 1 and [ranks for ranks, _ in links.bandwidth] == [3]
    assert links.copies.latency == pytest.approx(0.05, abs=0.03) and links.latency > 0
    assert links.copies.bandwidth == pytest.approx(LARGE_COPY["cpu"] / 0.2, rel=0.3)
    assert links.in_ring == Links(((1, links.copies.bandwidth),), links.copies.latency)
    ((links, messages_counted, _),) = {*run_distributed(2, measure_copies, False)}
    assert links.copies is None and links.in_ring is links and messages_counted == 0


def measure_on_gpus(rank: int, world: int) -> tuple:
    exchange = DistributedExchange()
    links = measure_links(exchange, exchange.device)
    return links, exchange.has_copies, exchange.place_bytes, exchange.stats.messages_sent


@pytest.mark.multi_gpu
def test_copies_are_measured_on_gpus():
    world = torch.cuda.device_count()
    ((links, has_copies, place_bytes, messages_counted),) = {*run_distributed(world, measure_on_gpus, backend="nccl")}
    assert (links.copies is not None) is has_copies and place_bytes == messages_counted == 0
    assert not has_copies or (1e9 < links.copies.bandwidth < 2e12 and 0 < links.copies.latency < 1e-3)
