"""The choice between ring, all-to-all and product: at shapes that disagree, and against what runs really move."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fa3_dist.parallel.all_to_all import all_to_all_attention
from fa3_dist.parallel.exchange import Exchange, run_in_process
from fa3_dist.parallel.plan import RATES, Call, Choice, Links, choose, estimate, measure_links, mode_name
from fa3_dist.parallel.schedule import Layout, contiguous, packed, work, zigzag
from tests.ring_gate import Case, run_case

BF16 = torch.bfloat16
HOST = Links.given(400e9)  # one host with NVLink
HOSTS = Links.given({8: 400e9, 64: 40e9})  # hosts of 8 and a network


def call(heads: int, kv_heads: int, window_left: int | None = None, window_right: int | None = 0) -> Call:
    return Call(heads, kv_heads, 128, 128, BF16, window_left, window_right)


# what decides -> (layout, call, links, expected head_ranks)
CASES: dict[str, tuple[Layout, Call, Links, int]] = {
    "few heads and a long sequence: ring": (zigzag((262144,), 8), call(8, 1), HOST, 1),
    "grouped heads and a long sequence: ring": (zigzag((131072,), 8), call(32, 8), HOST, 1),
    "a short sequence and many heads: all-to-all": (zigzag((4096,), 4), call(32, 32), Links.given(50e9), 4),
    "on a host that hides half of a ring: product": (zigzag((16384,), 8), call(64, 64), Links.given(200e9), 4),
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
        flops = work(layout, 0, window_right=0) * 8 * 128 * 2 * 7
        assert each.compute == pytest.approx(flops / RATES["cuda"].flops, rel=0.01)
        slower = estimate(layout, attention, head_ranks, Links.given(1e9), RATES["cuda"])
        assert slower.exposed > each.exposed > 0 and slower.moved == each.moved
    assert HOSTS.within(2) == HOSTS.within(8) == 400e9 and HOSTS.within(16) == HOSTS.within(128) == 40e9


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
