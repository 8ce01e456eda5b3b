"""Ring attention against the fp64 oracle on 2, 3, 4 and 8 gloo processes and in process; messages, memory, repetition.

All cases of a world run in one set of processes (`results_of`), and each is judged in a test of its own.
"""

from __future__ import annotations

import gc
import hashlib
import threading
import weakref
from dataclasses import replace
from functools import cache, partial
from itertools import accumulate

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fa3_dist.parallel import ring
from fa3_dist.parallel.context import NoPeers
from fa3_dist.parallel.exchange import DistributedExchange, Exchange, InProcessExchange, run_in_process
from fa3_dist.parallel.ring import ring_attention
from fa3_dist.parallel.schedule import Layout, Visit, contiguous, packed, ring_schedule, zigzag
from tests.distributed import run_distributed
from tests.ring_gate import NAMES, Case, judge, local_rows, make_inputs, patched, run_case, striped, total_error

WORLDS = (2, 3, 4, 8)
BF16 = torch.bfloat16

SEQ_3824 = Case("seq 3824, 5 heads", (3824,), heads=5, kv_heads=5, dlse=False)
PACKED = Case("cu_seqlens [0, 120, 1248, 4232]", (120, 1128, 2984), layout="packed", dlse=False)
CASES = [
    SEQ_3824,
    replace(SEQ_3824, name="seq 3824, 5 heads, bf16", dtype=BF16),
    PACKED,
    replace(PACKED, name="cu_seqlens [0, 120, 1248, 4232], bf16", dtype=BF16),
    replace(PACKED, name="cu_seqlens [0, 120, 1248, 4232], zigzag", layout="zigzag"),
    Case("documents of 1, 137, 2041, 89", (1, 137, 2041, 89), layout="packed", kv_heads=2),
    Case("documents of 1, 137, 2041, 89, zigzag", (1, 137, 2041, 89), kv_heads=2),
    Case("documents of 1, 137, 2041, 89, window 128", (1, 137, 2041, 89), layout="packed", window_left=128),
    Case("two long documents, in blocks of ranks", (1500, 1490, 40, 30), layout="packed", kv_heads=2),
    Case("a rank without tokens", (1,), layout="zigzag"),
    Case("ranks without tokens, contiguous", (2,), layout="contiguous"),
    Case("empty documents", (0, 5, 0, 3), layout="packed"),
    Case("1 kv head", (512,), heads=8, kv_heads=1),
    Case("2 kv heads", (512,), heads=8, kv_heads=2),
    Case("1 kv head, bf16", (512,), heads=8, kv_heads=1, dtype=BF16, dlse=False),
    Case("2 kv heads, fp16", (512,), heads=8, kv_heads=2, dtype=torch.float16, dlse=False),
    Case("window 128", (1603,), window_left=128),
    Case("window 128, contiguous", (1603,), layout="contiguous", window_left=128),
    Case("window 128, bf16", (1603,), window_left=128, dtype=BF16, dlse=False),
    Case("window 512", (1603,), window_left=512),
    Case("window to both sides", (701,), window_left=100, window_right=37),
    Case("full", (701,), window_right=None, kv_heads=2),
    Case("full, bf16", (701,), window_right=None, layout="contiguous", kv_heads=2, dtype=BF16, dlse=False),
    Case("softcap and scale", (405,), softcap=5.0, softmax_scale=0.5),
    Case("head_dim 24, v 8", (405,), heads=6, kv_heads=3, head_dim=24, head_dim_v=8),
    Case("fp64", (405,), layout="contiguous", kv_heads=2, dtype=torch.float64),
    Case("strided inputs, NaN between", (333, 70), layout="packed", heads=4, kv_heads=2, strided=True),
    Case("strided inputs, bf16", (333,), heads=4, kv_heads=2, strided=True, dtype=BF16, dlse=False),
    Case("stripes", (420,), layout="striped", window_left=50),
    Case("simplest schedule", (420, 33), layout="striped", kv_heads=2, schedule="simplest"),
    Case("simplest schedule, window 30", (420,), layout="striped", window_left=30, schedule="simplest"),
]


# ------------------------------------------------------------------------------------------------- the gate


def worker(rank: int, world: int) -> dict[str, dict]:
    exchange = DistributedExchange()
    return {case.name: run_case(exchange, case) for case in CASES}


@cache
def results_of(world: int) -> dict[str, list[dict]]:
    by_rank = run_distributed(world, worker)
    return {case.name: [results[case.name] for results in by_rank] for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("world", WORLDS)
def test_gate(world: int, case: Case):
    assert judge(case, results_of(world)[case.name]) == []


FLAT = [case for case in CASES if sum(case.lengths) > 100 and case.schedule == "shipped"]


@pytest.mark.parametrize("case", FLAT, ids=lambda case: case.name)
def test_error_is_flat_from_2_to_8_ranks(case: Case):
    # NOTE: the oracle's own rounding is part of the errors of a case in fp64: on one CPU dk is off by 1.8 units on 2
    # ranks and by 3.1 on 8, on another by fewer.
    slack = 2 * torch.finfo(torch.float64).eps if case.dtype == torch.float64 else torch.finfo(torch.float32).eps / 4
    for name in NAMES:
        errors = {world: total_error(case, name, results_of(world)[case.name]) for world in WORLDS}
        assert max(errors.values()) < 1.3 * errors[2] + slack, f"{name}: {errors}"


@pytest.mark.parametrize("world", [1, 5, 9])
def test_gate_in_process(world: int):
    for case in CASES:
        if sum(case.lengths) < 1000:
            assert judge(case, run_in_process(world, run_case, case)) == [], case.name
    assert ring.ring_schedule is ring_schedule, "ranks of this process left another schedule behind"


@pytest.mark.parametrize("world", [2, 3, 5])
def test_gate_where_keys_are_still_there(world: int):
    """With landing places the backward finds the K/V of the last two steps where the forward got them."""
    for case in CASES:
        if sum(case.lengths) < 1000 and case.schedule == "shipped":  # of others it does not know the largest message
            assert judge(case, run_in_process(world, run_case, case, has_places=True)) == [], case.name


GPU_CASES = [case for case in CASES if 100 < sum(case.lengths) and case.schedule == "shipped"]


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("world", [2, 8])
def test_gate_of_ranks_on_one_gpu(world: int, case: Case):
    assert judge(case, run_in_process(world, run_case, case, False, "cuda")) == []


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("layout, lengths", [
    ("zigzag", (3000,)), ("packed", (300, 2600, 700, 90)), ("striped", (2100,)),
])  # fmt: skip
@pytest.mark.parametrize("kv_heads, head_dim", [(4, 64), (2, 128), (4, 256)])
@pytest.mark.parametrize("world", [2, 3])
def test_gate_of_local_steps_in_two_parts(world, kv_heads, head_dim, layout, lengths, deterministic, monkeypatch):
    """As long sequences have it: the opening beside remote launches, and what it finishes."""
    monkeypatch.setattr(ring, "LEAST_OPENING", {"cuda": 0})
    case = Case("", lengths, layout, 4, kv_heads, head_dim, head_dim, dtype=BF16, dlse=False)
    assert judge(case, run_in_process(world, run_case, case, deterministic, "cuda")) == []


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("layout, lengths", [
    ("zigzag", (3000,)), ("packed", (300, 2600, 700, 90)), ("striped", (2100,)),
])  # fmt: skip
@pytest.mark.parametrize("world", [2, 3, 5])
def test_gate_of_ranks_on_one_gpu_where_keys_are_still_there(world, layout, lengths, deterministic, monkeypatch):
    monkeypatch.setattr(ring, "LEAST_OPENING", {"cuda": 0})
    case = Case("", lengths, layout, 4, 2, 128, 128, dtype=BF16, dlse=False)
    assert judge(case, run_in_process(world, run_case, case, deterministic, "cuda", has_places=True)) == []


def nccl_worker(rank: int, world: int, peer_copies: bool) -> list[dict]:
    exchange = DistributedExchange(peer_copies=peer_copies)
    return [run_case(exchange, case, device="cuda") for case in GPU_CASES]


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in GPU_CASES if case.kv_heads > 1], ids=lambda case: case.name)
def test_gate_of_eight_ranks_on_one_gpu_in_halves(case: Case):
    with halves_from(0):
        assert judge(case, run_in_process(8, run_case, case, False, "cuda")) == []


@pytest.mark.multi_gpu
@pytest.mark.parametrize("peer_copies", [False, True], ids=["messages", "copies"])
def test_gate_over_nccl(peer_copies: bool):
    by_rank = run_distributed(torch.cuda.device_count(), nccl_worker, peer_copies, backend="nccl", timeout=300.0)
    for i, case in enumerate(GPU_CASES):
        assert judge(case, [results[i] for results in by_rank]) == [], case.name


def captured_worker(rank: int, world: int) -> list[float]:
    """A forward and backward as a CUDA graph: largest differences between its replays and the same calls, by tensor."""
    exchange = DistributedExchange(peer_copies=True)  # not in a graph, but beside it
    case = Case("", (2048,), heads=8, kv_heads=4, head_dim=64, head_dim_v=64, dtype=BF16, dlse=False)
    layout = case.make_layout(world)
    rows = local_rows(layout, rank)
    q, k, v, dout = (x[rows].cuda() for x in make_inputs(case)[:4])
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def step() -> tuple[Tensor, ...]:
        out, lse = ring_attention(*leaves, layout=layout, rank=rank, exchange=exchange, window_right=0)
        return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)

    with halves_from(0):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        differences = []
        for _ in range(3):
            with torch.no_grad():
                for x in (*leaves, dout):
                    x.copy_(torch.randn_like(x))
            graph.replay()
            expected = step()
            torch.cuda.synchronize()
            differences.append([float((a - b).float().norm() / b.float().norm()) for a, b in zip(captured, expected)])
    return [max(each) for each in zip(*differences)]


@pytest.mark.multi_gpu
def test_a_step_over_nccl_can_be_captured():
    world = torch.cuda.device_count()
    for found in run_distributed(world, captured_worker, backend="nccl", timeout=120.0):
        assert len(found) == 5 and max(found) < 1e-3, found


@pytest.mark.gpu
def test_a_graph_outlives_the_caches_of_its_tables():
    """A ring of one, so that what the graph reads is tables of visits and nothing of an exchange's."""
    layout = packed((300, 17, 5, 190), 1)
    q, k, v = (torch.randn(512, heads, 64, device="cuda", dtype=BF16) for heads in (4, 2, 2))

    def run() -> Tensor:
        return ring_attention(q, k, v, layout=layout, rank=0, exchange=NoPeers(), window_right=0)[0]

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    ring.ring_plan.cache_clear()
    gc.collect()
    torch.cuda.synchronize()
    garbage = [torch.full((n,), 3, dtype=torch.int32, device="cuda") for n in range(1, 300) for _ in range(3)]
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected) and garbage


# ------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize("world", WORLDS)
def test_messages_of_a_causal_zigzag(world: int):
    """One message a remote step and direction; K/V twice, dK/dV once; only the rows that are needed."""
    case = Case("1 kv head", (512,), heads=8, kv_heads=1)
    for rank, result in enumerate(results_of(world)[case.name]):
        layout = case.make_layout(world)
        halves = [[shard.length for shard in shards] for shards in layout.shards]
        # From an earlier rank only its early half is seen, by all queries; from a later one all is, by the late half.
        arriving = sum(halves[s][0] if s < rank else sum(halves[s]) for s in range(world) if s != rank)
        leaving = sum(halves[rank][0] if rank < r else sum(halves[rank]) for r in range(world) if r != rank)
        kv_bytes, dkv_bytes = 32 * 4, 32 * 4
        assert result["forward"] == {
            "messages_sent": world - 1, "messages_received": world - 1,
            "bytes_sent": leaving * kv_bytes, "bytes_received": arriving * kv_bytes,
        }  # fmt: skip
        assert result["backward"] == {
            "messages_sent": 2 * (world - 1), "messages_received": 2 * (world - 1),
            "bytes_sent": leaving * kv_bytes + arriving * dkv_bytes,
            "bytes_received": arriving * kv_bytes + leaving * dkv_bytes,
        }  # fmt: skip


@pytest.mark.parametrize("world", WORLDS)
def test_keys_that_are_still_there_do_not_come_again(world: int):
    """With landing places: those of the last two remote steps."""
    case = Case("", (512,), heads=8, kv_heads=1)
    for result in run_in_process(world, run_case, case, has_places=True):
        gradients, keys = world - 1, max(world - 3, 0)
        assert result["forward"]["messages_received"] == world - 1
        assert result["backward"]["messages_received"] == result["backward"]["messages_sent"] == gradients + keys


@pytest.mark.parametrize("world", [2, 4])
def test_keys_of_another_layer_are_not_taken_for_ones_own(world: int):
    """Two forwards, the second one's message larger, then their backwards, the first one's twice."""
    cases = [Case("", (160,), kv_heads=2), Case("", (410, 50), kv_heads=2, window_left=90)]

    def both(exchange: Exchange) -> tuple[list[dict[str, Tensor]], list[int]]:
        calls, counts, results = [], [], []
        for case in cases:
            layout, inputs = case.make_layout(world), make_inputs(case)
            rows = local_rows(layout, exchange.rank)
            leaves = [x[rows].requires_grad_() for x in inputs[:3]]
            outputs = ring_attention(*leaves, layout=layout, rank=exchange.rank, exchange=exchange, **case.options)
            calls.append((leaves, outputs, (inputs.dout[rows], inputs.dlse[:, rows])))
        for index in (1, 0, 0):
            leaves, outputs, gradients = calls[index]
            exchange.stats.reset()
            found = outputs + torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)
            results.append(dict(zip(NAMES, [x.detach() for x in found], strict=True)))
            counts.append(exchange.stats.messages_received)
        return results, counts

    by_rank = run_in_process(world, both, has_places=True)
    for run, index in enumerate((1, 0, 0)):
        assert judge(cases[index], [results[run] for results, _ in by_rank]) == []
    if world == 2:
        assert [counts for _, counts in by_rank] == [[2, 3, 3]] * 2  # dK/dV in halves; K/V of the first one again


@pytest.mark.parametrize("world", WORLDS)
def test_gradients_travel_in_fp32_also_for_bf16(world: int):
    for result in results_of(world)["1 kv head, bf16"]:
        gradient_bytes = result["backward"]["bytes_sent"] - result["forward"]["bytes_sent"]
        assert gradient_bytes == 2 * result["forward"]["bytes_received"] > 0


@pytest.mark.parametrize("world", WORLDS)
def test_a_window_is_a_halo(world: int):
    """Contiguous shards longer than the window: K/V of 128 rows from one neighbour, one message each way."""
    results = results_of(world)["window 128, contiguous"]
    for rank, result in enumerate(results):
        before, after = int(rank > 0), int(rank < world - 1)
        assert (result["forward"]["messages_sent"], result["forward"]["messages_received"]) == (after, before)
        assert result["backward"]["messages_sent"] == result["backward"]["messages_received"] == after + before
        assert result["forward"]["bytes_received"] == before * 128 * 32 * 4


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_without_tokens_send_nothing(world: int):
    layout = contiguous((2,), world)
    for rank, result in enumerate(results_of(world)["ranks without tokens, contiguous"]):
        messages = result["forward"]["messages_sent"] + result["forward"]["messages_received"]
        assert messages == layout.tokens(rank) <= 1


@pytest.mark.parametrize("world", WORLDS)
def test_gradients_of_several_heads_travel_in_halves(world: int):
    """Two messages of dK/dV a step, each of half the key/value heads; together the bytes of one."""
    for result in results_of(world)["2 kv heads"]:
        gradient_bytes = result["backward"]["bytes_sent"] - result["forward"]["bytes_sent"]
        assert result["forward"]["messages_sent"] == world - 1
        assert result["backward"]["messages_sent"] == result["backward"]["messages_received"] == 3 * (world - 1)
        assert gradient_bytes == result["forward"]["bytes_received"] > 0


# ---------------------------------------------------------------------------------------- halves of the heads


def halves_from(least_half: int):
    """Inside, messages of half the heads are worth it from so many bytes on, whatever the device."""
    shipped = ring.backward_parts
    return patched(ring, "backward_parts", lambda kv_heads, head_bytes, _: shipped(kv_heads, head_bytes, least_half))


HALVED = [
    Case("5 kv heads", (333,), heads=10, kv_heads=5),
    Case("packed", (37, 301, 60), layout="packed", heads=4, kv_heads=2, dtype=BF16, dlse=False),
    Case("window", (333,), layout="contiguous", heads=6, kv_heads=3, window_left=60, softcap=3.0),
    Case("v of other size, full", (200,), heads=4, kv_heads=4, head_dim_v=24, window_right=None),
]


@pytest.mark.parametrize("case", HALVED, ids=lambda case: case.name)
def test_halves_change_no_bit(case: Case):
    with halves_from(1 << 62):
        whole = run_in_process(4, run_case, case)
    halves = run_in_process(4, run_case, case)
    assert judge(case, halves) == []
    for one, other in zip(whole, halves, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in NAMES)
    sent = [sum(result["backward"]["messages_sent"] for result in results) for results in (whole, halves)]
    keys_sent = sum(result["forward"]["messages_sent"] for result in whole)
    assert sent == [2 * keys_sent, 3 * keys_sent]


@pytest.mark.parametrize("kv_heads, head_bytes, least, expected", [
    (8, 100, 400, [4, 4]), (8, 99, 400, [8]), (5, 200, 400, [3, 2]), (1, 1 << 40, 0, [1]), (2, 0, 0, [1, 1]),
])  # fmt: skip
def test_steps_are_halved_where_messages_are_large(kv_heads: int, head_bytes: int, least: int, expected: list[int]):
    assert ring.backward_parts(kv_heads, head_bytes, least) == expected


def test_ranks_halve_alike_where_their_messages_differ():
    """Causal zigzag of 2: rank 0 needs 100 rows, rank 1 needs 50; a threshold between them."""
    case = Case("", (200,), heads=4, kv_heads=2)
    with halves_from(75 * 32 * 4):
        results = run_in_process(2, run_case, case)
    assert judge(case, results) == []
    assert [result["backward"]["messages_sent"] for result in results] == [3, 3]
    with halves_from(101 * 32 * 4):
        results = run_in_process(2, run_case, case)
    assert [result["backward"]["messages_sent"] for result in results] == [2, 2]


class Told:
    """An exchange that notes when messages are started and waited for."""

    def __init__(self, exchange: Exchange, events: list[str]):
        self._exchange, self._events = exchange, events

    def __getattr__(self, name: str):
        return getattr(self._exchange, name)

    def exchange(self, **message):
        name = f"{message['what']} {message['step']}"
        self._events.append(f"start {name}")
        pending = self._exchange.exchange(**message)

        class Waited:
            def wait(_) -> None:
                self._events.append(f"wait {name}")
                pending.wait()

        return Waited()


def test_one_half_travels_while_the_other_computes():
    """What rank 0 of 3 does in a backward, in its order: launches with their heads, messages with their steps."""
    case, shipped = Case("", (900,), heads=4, kv_heads=2, window_right=None), ring.ops.backward
    events: dict[str, list[str]] = {}

    def backward(dout, *others, **options):
        events[threading.current_thread().name].append(f"compute {dout.shape[1]}")
        shipped(dout, *others, **options)

    def run(exchange: Exchange) -> None:
        layout, inputs = case.make_layout(3), make_inputs(case)
        rows, mine = local_rows(layout, exchange.rank), events.setdefault(threading.current_thread().name, [])
        leaves = [x[rows].requires_grad_() for x in inputs[:3]]
        out, _ = ring_attention(*leaves, layout=layout, rank=exchange.rank,
                                exchange=Told(exchange, mine))  # type: ignore[arg-type]
        mine.clear()
        torch.autograd.grad(out, leaves, inputs.dout[rows])

    with patched(ring.ops, "backward", backward):
        run_in_process(3, run)
    for order in events.values():
        assert order == [
            "start K/V 2", "compute 4",
            "wait K/V 2", "start K/V 1",
            "compute 2", "start dK/dV 2",
            "compute 2", "start dK/dV 2",  # the first half of step 2 travels meanwhile
            "wait K/V 1",
            "compute 2", "wait dK/dV 2", "start dK/dV 1",
            "compute 2", "wait dK/dV 2", "start dK/dV 1",
            "compute 4",  # the rest of the local step: the last half travels meanwhile
            "wait dK/dV 1", "wait dK/dV 1",
        ]  # fmt: skip


# --------------------------------------------------------------------------- sums that are written, not added to zeros


@pytest.mark.parametrize("window_left, window_right", [(None, None), (None, 0), (40, 0), (3, 5), (200, 0)], ids=str)
@pytest.mark.parametrize("make", [zigzag, contiguous, packed, striped])
@pytest.mark.parametrize("world", [2, 3])
def test_rows_are_written_where_one_launch_alone_meets_them(world, make, window_left, window_right):
    """Counted pair by pair: keys of a step, and local ones in either form, that are met once and seen."""
    layout, found = make((61, 7, 300, 150), world), set()
    for rank in range(world):
        steps = ring_schedule(layout, rank, window_left=window_left, window_right=window_right)
        plan = ring.ring_plan(layout, rank, window_left, window_right, torch.device("cpu"))
        parts = [ring._split_local(steps[0].backward)] if len(steps) > 1 else []
        for parts_of_local in [(steps[0].backward,), *parts]:
            launches = sum(parts_of_local, ())
            may_write = meets_each_once(launches, layout.tokens(rank), window_left, window_right)
            assert plan.writes_own <= may_write
        for step, planned in zip(steps[1:], plan.remote, strict=True):
            rows = sum(span.length for span in step.receive)
            assert planned.writes == meets_each_once(step.backward, rows, window_left, window_right)
            found.add(planned.writes)
        found.add(plan.writes_own)
    if make is zigzag and window_left is None:
        assert found == {True}
    if make is striped and window_left is not None:
        assert False in found


@pytest.mark.parametrize("window_left, window_right", [(None, None), (None, 0), (40, 0), (3, 5)], ids=str)
@pytest.mark.parametrize("make", [zigzag, packed, striped])
def test_launches_tell_how_many_queries_see_their_keys(make, window_left, window_right):
    """Counted pair by pair, launch by launch: the kernel divides its work by it."""
    layout, told = make((61, 7, 200, 90), 3), set()
    for rank in range(3):
        plan = ring.ring_plan(layout, rank, window_left, window_right, torch.device("cpu"))
        backward = [*plan.local_backward, *plan.opening, *plan.closing]
        for launch in (*backward, *(launch for step in plan.remote for launch in step.backward)):
            columns = zip(*(launch[name].tolist() for name in ("q_len", "k_len", "offsets")), strict=True)
            seen = [
                sum((window_left is None or i + offset - window_left <= j) and
                    (window_right is None or j <= i + offset + window_right) for i in range(q_len))
                for q_len, k_len, offset in columns for j in range(k_len)
            ]
            told.add((launch["most_queries"], launch["mean_queries"]))
            assert (max(seen), -(-sum(seen) // len(seen))) == (launch["most_queries"], launch["mean_queries"])
    assert len(told) > 2


def meets_each_once(launches: ring.Launches, keys: int, window_left: int | None, window_right: int | None) -> bool:
    met, seen = [0] * keys, [False] * keys
    for visit in (visit for launch in launches for visit in launch):
        for j in range(visit.k_len):
            met[visit.k_start + j] += 1
            seen[visit.k_start + j] |= any(
                (window_left is None or i + visit.offset - window_left <= j)
                and (window_right is None or j <= i + visit.offset + window_right)
                for i in range(visit.q_len)
            )
    return set(met) <= {1} and all(seen)


def test_launches_overlap_only_where_they_add_atomically(monkeypatch):
    """Not PyTorch's kernels, not in halves, whose sums are copies of views, and not where the order counts. Where
    nothing comes before the remote launch, the local one lets it begin."""
    asked, let = [], []
    monkeypatch.setattr(InProcessExchange, "side_stream", lambda exchange: asked.append(exchange.rank))
    monkeypatch.setattr(ring._Beside, "let_the_other_begin", lambda beside: let.append(beside))
    whole, halves = Case("", (300,), kv_heads=1), Case("", (300,), heads=4, kv_heads=2)
    run_in_process(2, run_case, whole)
    assert asked == []
    monkeypatch.setattr(ring.ops, "adds_atomically", lambda q, v: True)
    monkeypatch.setattr(ring.ops, "_columns_of_variant", lambda dtype, head_dim, head_dim_v: head_dim)
    run_in_process(2, run_case, halves)
    run_in_process(2, run_case, whole, True)
    run_in_process(3, run_case, whole)
    assert asked == []
    run_in_process(2, run_case, whole)
    assert sorted(asked) == [0, 1] and let == []
    run_in_process(2, run_case, whole, has_places=True)  # rank 0 begins with keys that are its own
    assert sorted(asked) == [0, 0, 1, 1] and len(let) == 1


# ----------------------------------------------------------------------------------- the parts of the local step


def test_a_small_local_step_stays_whole(monkeypatch):
    """The local backward in one launch is right, and comes after the remote one, which hides nothing then."""
    case = Case("", (900,), heads=4, kv_heads=2)
    plan = ring.ring_plan(case.make_layout(3), 0, None, 0, torch.device("cpu"))
    monkeypatch.setattr(ring, "LEAST_OPENING", {"cpu": 1000})
    assert plan.parts_of_local(999, torch.device("cpu")) == ((), plan.local_backward)
    opening, closing = plan.parts_of_local(1000, torch.device("cpu"))
    assert opening is plan.opening and closing is plan.closing and opening and closing
    assert judge(case, run_in_process(3, run_case, case)) == []


@pytest.mark.parametrize("lengths, whole", [
    ((4000,), False), ((3000, 2000), False), ((700,) * 20, True), ((5000, *(1000,) * 10), True),
])  # fmt: skip
def test_the_local_step_opens_with_a_quarter_of_the_work(lengths: tuple[int, ...], whole: bool):
    """Of whole documents where they are small enough; every visible pair is in one part."""
    visits = tuple(
        Visit(start, n, start, n, 0, True, True) for start, n in zip(accumulate(lengths, initial=0), lengths)
    )
    opening, closing = (sum(launches, ()) for launches in ring._split_local((visits,)))
    assert (set(opening) | set(closing) == set(visits)) == whole and not set(opening) & set(closing)
    pairs = [sum(visible_pairs(visit) for visit in part) for part in (opening, closing, visits)]
    assert pairs[0] + pairs[1] == pairs[2] and 0.12 < pairs[0] / pairs[2] < 0.26


def visible_pairs(visit: Visit) -> int:
    """Under a causal mask."""
    return sum(min(max(i + visit.offset + 1, 0), visit.k_len) for i in range(visit.q_len))


# --------------------------------------------------------------------------------- independence and repetition


@pytest.mark.parametrize("make, window_left", [(zigzag, None), (contiguous, None), (packed, None), (zigzag, 90)])
def test_future_tokens_change_nothing_earlier(make, window_left):
    lengths, moment, world = (61, 400, 77), 61 + 201, 4
    layout = make(lengths, world)
    case = Case("", lengths, heads=4, kv_heads=2)

    def outputs(exchange: Exchange, changed: bool) -> tuple[Tensor, Tensor]:
        q, k, v, dout, _ = (None if x is None else x.clone() for x in make_inputs(case))
        if changed:
            for x in (q, k, v):
                x[moment : 61 + 400] += 100.0 * torch.randn_like(x[moment : 61 + 400])
        rows = local_rows(layout, exchange.rank)
        q, k, v = (x[rows].requires_grad_() for x in (q, k, v))
        out, lse = ring_attention(q, k, v, layout=layout, rank=exchange.rank, exchange=exchange, window_right=0,
                                  window_left=window_left)
        gradients = torch.autograd.grad(out, (q, k, v), dout[rows])
        return out.detach(), lse.detach().t(), *gradients

    before, after = (run_in_process(world, outputs, changed) for changed in (False, True))
    touched = False
    for rank in range(world):
        rows = local_rows(layout, rank)
        future = (rows >= moment) & (rows < 61 + 400)
        other_document = (rows < 61) | (rows >= 61 + 400)
        for index, (x, y) in enumerate(zip(before[rank], after[rank], strict=True)):
            # The future reaches the gradients of keys in its document, and nothing of another one.
            kept = ~future if index < 2 else other_document
            assert torch.equal(x[kept], y[kept])
            touched |= not torch.equal(x[future], y[future])
    assert touched


def hashes(rank: int, world: int) -> list[str]:
    exchange, found = DistributedExchange(), []
    window = Case("", (300,), kv_heads=2, window_left=70, dtype=BF16, dlse=False)
    for case in (replace(PACKED, lengths=(37, 300, 211)), window):
        for _ in range(20):
            result = run_case(exchange, case, deterministic=True)
            content = b"".join(result[name].float().numpy().tobytes() for name in NAMES)
            found.append(hashlib.sha256(content).hexdigest())
    return found


def test_twenty_deterministic_runs_are_equal_bit_for_bit():
    for found in run_distributed(3, hashes):
        assert len(set(found[:20])) == 1 and len(set(found[20:])) == 1 and found[0] != found[20]


def checkpointed(rank: int, world: int) -> list[bool]:
    """Gradients of a small attention layer with and without activation checkpointing."""
    exchange, layout = DistributedExchange(), zigzag([260], world)
    torch.manual_seed(0)
    weight = torch.randn(32, 3 * 32)
    x = torch.randn(260, 32)[local_rows(layout, rank)]

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        q, k, v = (x @ weight).unflatten(1, (6, 16)).split(2, dim=1)
        out, lse = ring_attention(q, k, v, layout=layout, rank=rank, exchange=exchange, window_right=0,
                                  deterministic=True)
        return out.flatten(1) * lse.mean()

    def gradients(run) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        out = run(*leaves)
        return out.detach(), *torch.autograd.grad((out + run(out, leaves[1])).square().sum(), leaves)

    plain = gradients(layer)
    with_checkpoints = gradients(lambda *args: checkpoint(layer, *args, use_reentrant=False))
    return [torch.equal(a, b) for a, b in zip(plain, with_checkpoints, strict=True)]


def test_activation_checkpointing_changes_no_bit():
    assert run_distributed(3, checkpointed) == [[True] * 3] * 3


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("world, messages", [(2, 3), (3, 6)])
def test_a_checkpointed_layer_finds_the_keys_of_its_second_forward(world: int, messages: int, use_reentrant: bool):
    """Two layers: in the backward of each, K/V come for the forward run again, and no more; dK/dV in halves."""
    case = Case("", (300,), heads=4, kv_heads=2, dtype=torch.float64)

    def run(exchange: Exchange, uses_checkpoints: bool) -> tuple[list[Tensor], int]:
        layout, inputs = case.make_layout(world), make_inputs(case)
        leaves = [x[local_rows(layout, exchange.rank)].requires_grad_() for x in inputs[:3]]

        def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ring_attention(q, k, v, layout=layout, rank=exchange.rank, exchange=exchange, **case.options)[0]

        x = leaves[0]
        for _ in range(2):
            x = (partial(checkpoint, layer, use_reentrant=use_reentrant) if uses_checkpoints else layer)(x, *leaves[1:])
        exchange.stats.reset()
        x.square().sum().backward()
        return [leaf.grad for leaf in leaves], exchange.stats.messages_received

    by_rank = run_in_process(world, run, True, has_places=True)
    for (found, count), (plain, _) in zip(by_rank, run_in_process(world, run, False), strict=True):
        assert count == 2 * messages
        torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)  # fp64


# --------------------------------------------------------------------------------------------------- memory


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that operators returned and that are still alive, and their peak; views of inputs are not
    counted."""

    def __init__(self, *inputs: Tensor):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = {x.untyped_storage()._cdata for x in inputs}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage())
        return result

    def _add(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_bytes(exchange: Exchange, tokens: int, heads: int, kv_heads: int) -> int:
    """Peak of what one rank allocates for forward and backward, its inputs not counted."""
    layout = zigzag([tokens * exchange.world], exchange.world)
    q, k, v = (torch.ones(tokens, h, 16, requires_grad=True) for h in (heads, kv_heads, kv_heads))
    with LiveBytes(q, k, v) as live:
        out, lse = ring_attention(q, k, v, layout=layout, rank=exchange.rank, exchange=exchange, window_right=0)
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    return live.peak


def test_peak_memory_is_local():
    """The memory for a number of local tokens is the same on any number of ranks: a few times the local tensors."""
    tokens, heads, kv_heads = 64, 2, 2
    q_bytes, kv_bytes = tokens * heads * 16 * 4, tokens * kv_heads * 32 * 4
    # out, dout, dq and a margin; K/V joined and dK/dV; K/V here and coming; dK/dV computed, leaving and coming back.
    bound = 4 * q_bytes + (2 + 2 + 3) * kv_bytes
    peaks = {world: max(run_in_process(world, peak_bytes, tokens, heads, kv_heads)) for world in (4, 8, 16)}
    assert max(peaks.values()) < bound and peaks[16] < 1.02 * peaks[8], peaks


def saved_bytes(exchange: Exchange) -> tuple[int, int]:
    layout = zigzag([64 * exchange.world], exchange.world)
    q, k, v = (torch.ones(64, 2, 16, requires_grad=True) for _ in range(3))
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out, lse = ring_attention(q, k, v, layout=layout, rank=exchange.rank, exchange=exchange, window_right=0)
    stamps = 8 * len(ring.KV_PLACES)
    return sum(x.nbytes for x in saved), sum(x.nbytes for x in (q, k, v, out, lse)) + stamps


def test_only_local_tensors_are_saved_for_the_backward():
    for saved, local in run_in_process(8, saved_bytes):
        assert saved == local


# ------------------------------------------------------------------------------------- gradients, single outputs


def test_finite_differences_through_out_and_lse():
    """Along a random direction, fp64: the loss of all ranks against what their gradients say."""
    world, layout = 3, packed((11, 60), 3)
    torch.manual_seed(0)
    full = [torch.randn(71, h, 8, dtype=torch.float64) for h in (4, 2, 2)]
    direction = [torch.randn_like(x) for x in full]
    weight, weight_lse = torch.randn(71, 4, 8, dtype=torch.float64), torch.randn(4, 71, dtype=torch.float64)

    def loss_and_slope(exchange: Exchange, step: float) -> tuple[float, float]:
        rows = local_rows(layout, exchange.rank)
        leaves = [(x + step * d)[rows].requires_grad_() for x, d in zip(full, direction, strict=True)]
        out, lse = ring_attention(*leaves, layout=layout, rank=exchange.rank, exchange=exchange, window_left=20,
                                  window_right=0, softcap=3.0)
        loss = (out * weight[rows]).sum() + (lse * weight_lse[:, rows]).sum()
        gradients = torch.autograd.grad(loss, leaves)
        return loss.item(), sum(float((g * d[rows]).sum()) for g, d in zip(gradients, direction, strict=True))

    def total(step: float, index: int) -> float:
        return sum(result[index] for result in run_in_process(world, loss_and_slope, step))

    h = 1e-6
    assert (total(h, 0) - total(-h, 0)) / (2 * h) == pytest.approx(total(0.0, 1), rel=1e-7)


@pytest.mark.parametrize("used", ["out", "lse"])
def test_a_loss_may_use_one_output_only(used: str):
    case = Case("", (70,), kv_heads=2)
    layout, inputs = zigzag(case.lengths, 2), make_inputs(case)

    def gradients(exchange: Exchange, both: bool) -> tuple[Tensor, ...]:
        rows = local_rows(layout, exchange.rank)
        leaves = [x[rows].requires_grad_() for x in inputs[:3]]
        out, lse = ring_attention(*leaves, layout=layout, rank=exchange.rank, exchange=exchange, window_right=0)
        weights = {"out": inputs.dout[rows], "lse": inputs.dlse[:, rows]}
        terms = {"out": (out * weights["out"]).sum(), "lse": (lse * weights["lse"]).sum()}
        loss = sum(term * (name == used) for name, term in terms.items()) if both else terms[used]
        return torch.autograd.grad(loss, leaves)

    one, both = (run_in_process(2, gradients, both) for both in (False, True))
    for rank in range(2):
        assert one[rank][0].abs().sum() > 0
        for x, y in zip(one[rank], both[rank], strict=True):
            torch.testing.assert_close(x, y)


def test_no_gradient_no_backward_messages():
    layout = zigzag([64], 2)

    def forward(exchange: Exchange) -> tuple[bool, int]:
        q, k, v = (torch.ones(32, 2, 16, requires_grad=True) for _ in range(3))
        with torch.no_grad():
            out, _ = ring_attention(q, k, v, layout=layout, rank=exchange.rank, exchange=exchange)
        return out.requires_grad, exchange.stats.messages_sent

    assert run_in_process(2, forward) == [(False, 1)] * 2


# -------------------------------------------------------------------------------------------------- wrong calls


def qkv(**changes) -> dict:
    return {name: torch.zeros(changes.get(name, (20, 2, 8))) for name in ("q", "k", "v")}


WRONG = {
    "q has shape (3, 2, 8)": (ValueError, qkv(q=(3, 2, 8))),
    "k has shape (19, 2, 8)": (ValueError, qkv(k=(19, 2, 8))),
    "v has shape (1, 20, 2, 8)": (ValueError, qkv(v=(1, 20, 2, 8))),
    "k has dtype torch.bfloat16": (TypeError, qkv() | {"k": torch.zeros(20, 2, 8, dtype=BF16)}),
    "q has dtype torch.int64": (TypeError, qkv() | {"q": torch.zeros(20, 2, 8, dtype=torch.int64)}),
    "v is on meta": (ValueError, qkv() | {"v": torch.zeros(20, 2, 8, device="meta")}),
    "have 2, 1 and 2 heads": (ValueError, qkv(k=(20, 1, 8))),
    "have 3, 2 and 2 heads": (ValueError, qkv(q=(20, 3, 8))),
    "k has head_dim 4": (ValueError, qkv(k=(20, 2, 4))),
    "softmax_scale is nan": (ValueError, qkv() | {"softmax_scale": float("nan")}),
    "softcap is -1.0": (ValueError, qkv() | {"softcap": -1.0}),
    "window_left is -1": (ValueError, qkv() | {"window_left": -1}),
    "window_right is -5": (ValueError, qkv() | {"window_right": -5}),
    "expected rank 1 of 2": (ValueError, qkv() | {"rank": 1}),
    "expected rank 0 of 3": (ValueError, qkv() | {"layout": zigzag([60], 3)}),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_calls_are_refused_before_any_message(message: str):
    error, arguments = WRONG[message]

    def call(exchange: Exchange) -> int:
        if exchange.rank == 0:
            with pytest.raises(error) as caught:
                ring_attention(**{"layout": zigzag([40], 2), "rank": 0, "exchange": exchange} | arguments)
            assert message in str(caught.value) and "expected" in str(caught.value)
        return exchange.stats.messages_sent

    assert run_in_process(2, call) == [0, 0]


def test_plans_are_made_once():
    ring.ring_plan.cache_clear()
    layout: Layout = zigzag([64], 2)

    def twice(exchange: Exchange) -> None:
        for _ in range(2):
            q = torch.ones(32, 2, 16)
            ring_attention(q, q, q, layout=zigzag([64], 2), rank=exchange.rank, exchange=exchange, window_right=0)

    run_in_process(2, twice)
    assert layout == zigzag([64], 2)
    assert ring.ring_plan.cache_info().misses == 2 and ring.ring_plan.cache_info().hits == 2
