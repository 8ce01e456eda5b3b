"""All-to-all over heads, and its product with a ring, through the ring's gate; messages, memory, planted faults."""

from __future__ import annotations

import random
import time
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fa3_dist import ops
from fa3_dist.interface import apply_sink
from fa3_dist.parallel import all_to_all
from fa3_dist.parallel.all_to_all import (
    LEAST_PART,
    all_to_all_attention,
    arrive_in_order,
    check_heads,
    head_parts,
    kv_copies,
)
from fa3_dist.parallel.exchange import DistributedExchange, Exchange, RingError, run_in_process
from fa3_dist.parallel.schedule import Layout, contiguous, packed, zigzag
from tests import oracle
from tests.accuracy import Problem, assert_solves
from tests.distributed import run_distributed, run_processes
from tests.ring_gate import NAMES, Case, judge, local_rows, make_inputs, patched, run_case, striped

BF16, FP16 = torch.bfloat16, torch.float16
SPLITS = [(2, 2), (3, 3), (4, 4), (4, 2), (6, 2), (6, 3)]  # (ranks, ranks that swap heads); the last three: a ring too

FEW_KV = Case("1 kv head", (61, 0, 1, 17, 100), layout="packed", heads=12, kv_heads=1)
CASES = [
    FEW_KV,
    replace(FEW_KV, name="1 kv head, bf16", dtype=BF16, dlse=False),
    replace(FEW_KV, name="2 kv heads, window", kv_heads=2, window_left=20),
    replace(FEW_KV, name="3 kv heads, full, fp16", kv_heads=3, window_right=None, dtype=FP16),
    replace(FEW_KV, name="12 kv heads, both sides", kv_heads=12, window_left=9, window_right=3, layout="contiguous"),
    replace(FEW_KV, name="softcap and scale, zigzag", kv_heads=4, softcap=3.0, softmax_scale=0.5, layout="zigzag"),
    replace(FEW_KV, name="head_dim 24, v 7, bf16", head_dim=24, head_dim_v=7, kv_heads=6, dtype=BF16, dlse=False),
    Case("fp64, stripes, strided inputs", (90, 33), "striped", 12, 2, dtype=torch.float64, strided=True),
    Case("fp16, strided inputs, window", (90, 33), "striped", 12, 1, dtype=FP16, strided=True, window_left=30),
    Case("one document, contiguous", (48,), "contiguous", 12, 12),
    Case("ranks without tokens", (1, 0, 2), "packed", 12, 2),
    Case("no tokens at all", (0,), "zigzag", 12, 2),
]  # fmt: skip


def run(world: int, head_ranks: int, case: Case, deterministic: bool = False) -> list[dict[str, Any]]:
    attention = partial(all_to_all_attention, head_ranks=head_ranks)
    return run_in_process(world, run_case, case, deterministic, "cpu", attention)


def as_many_as_may_be(rows: int, heads: int, kv_heads: int, head_ranks: int, least: int) -> int:
    return head_parts(rows, heads, kv_heads, head_ranks, 1)


def in_parts():
    return patched(all_to_all, "head_parts", as_many_as_may_be)


# ------------------------------------------------------------------------------------------------- the gate


@pytest.mark.parametrize("world, head_ranks", SPLITS)
def test_gate(world: int, head_ranks: int):
    for case in CASES:
        assert judge(case, run(world, head_ranks, case)) == [], case.name


@pytest.mark.parametrize("world", [2, 3])
def test_gate_in_parts(world: int):
    with in_parts():
        for case in CASES:
            assert judge(case, run(world, world, case)) == [], case.name


@pytest.mark.parametrize("kv_heads, parts", [(12, 3), (6, 3), (4, 2), (3, 3), (1, 1)])
def test_parts_are_the_whole_bit_for_bit(kv_heads: int, parts: int):
    """No head's arithmetic depends on the other heads; and there are as many messages to each other rank as parts."""
    case = Case("", (61, 0, 1, 17), "packed", 12, kv_heads, dtype=BF16, dlse=False)
    whole = run(2, 2, case, deterministic=True)
    with in_parts():
        results = run(2, 2, case, deterministic=True)
    for result, expected in zip(results, whole, strict=True):
        for name in NAMES:
            assert torch.equal(result[name], expected[name]), name
        for which in ("forward", "backward"):
            assert (expected[which]["messages_sent"], result[which]["messages_sent"]) == (2, 2 * parts)


@pytest.mark.parametrize("rows, heads, kv_heads, parts", [
    (1024, 16, 16, 1), (8192, 16, 4, 1), (32768, 8, 8, 2), (32768, 16, 4, 4), (131072, 8, 8, 4), (131072, 8, 1, 1),
    (131072, 12, 3, 3), (131072, 10, 5, 1), (131072, 12, 6, 3), (0, 4, 4, 1),
])  # fmt: skip
def test_heads_of_a_part(rows: int, heads: int, kv_heads: int, parts: int):
    assert head_parts(rows, heads, kv_heads, 1, LEAST_PART["cuda"]) == parts
    assert head_parts(rows, 2 * heads, 2 * kv_heads, 2, LEAST_PART["cuda"]) == parts


def test_messages_travel_while_attention_is_computed(monkeypatch):
    """Those to the next part and those back from the one before are started together, and waited for afterwards."""
    events: list[str] = []
    start, attend, finish = all_to_all._Swap._start, all_to_all.ring_forward, all_to_all._finish

    def started(self, *ways):
        if self._rank == 0:
            events.append("start " + " and ".join(way.what for way in ways))
        return start(self, *ways)

    def finished(way, transfers):
        if not way.send[0]:  # rank 0: nothing to itself
            events.append(f"wait for {way.what}")
        return finish(way, transfers)

    def attended(q, k, v, plan, ring, options):
        if ring._exchange.rank == 0:
            events.append("attend")
        return attend(q, k, v, plan, ring, options)

    monkeypatch.setattr(all_to_all._Swap, "_start", started)
    monkeypatch.setattr(all_to_all, "ring_forward", attended)
    monkeypatch.setattr(all_to_all, "_finish", finished)

    def forward(exchange: Exchange) -> None:
        q, k, v = (torch.ones(16, 6, 8) for _ in range(3))
        all_to_all_attention(q, k, v, layout=zigzag([32], 2), rank=exchange.rank, exchange=exchange)

    with in_parts():
        run_in_process(2, forward)
    assert events == [
        "start q/k/v",
        "wait for q/k/v", "start q/k/v", "attend",
        "wait for q/k/v", "start out/lse and q/k/v", "attend", "wait for out/lse",
        "wait for q/k/v", "start out/lse", "attend", "wait for out/lse",
        "start out/lse", "wait for out/lse",
    ]  # fmt: skip


def test_rows_are_kept_in_one_order_only(monkeypatch):
    """What arrives in the order of the ranks is let go of as it is put in the order of the documents."""
    attend, select = all_to_all.ring_forward, all_to_all._select
    arrived: list[Any] = []

    def selected(x, rows):
        arrived.append(weakref.ref(x))
        return select(x, rows)

    def attended(*call):
        assert len(arrived) >= 3 and all(x() is None for x in arrived)
        return attend(*call)

    monkeypatch.setattr(all_to_all, "ring_forward", attended)
    monkeypatch.setattr(all_to_all, "_select", selected)
    with replaced("MOST_RUNS", 0):
        run(2, 2, GROUPED)
    assert len(arrived) == 2 * 5


class Random(NamedTuple):
    """A problem from a seed: documents of 0, 1, 17 and other tokens, any kv heads that divide the query heads."""

    problem: Problem
    layout: Layout

    @staticmethod
    def make(random_: random.Random, world: int, head_ranks: int) -> Random:
        lengths = [random_.choice([0, 1, 17, random_.randint(2, 70)]) for _ in range(random_.randint(1, 5))]
        tokens, heads = sum(lengths), head_ranks * random_.randint(1, 4)
        kv_heads = random_.choice([divisor for divisor in range(1, heads + 1) if heads % divisor == 0])
        head_dim, head_dim_v = random_.choice([8, 16]), random_.choice([5, 16])
        dtype = random_.choice([torch.float32, torch.float32, torch.float64, BF16, FP16])
        generator = torch.Generator().manual_seed(random_.getrandbits(32))

        def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        sums = torch.float64 if dtype == torch.float64 else torch.float32
        starts = list(accumulate(lengths, initial=0))[:-1]
        problem = Problem(
            normal(tokens, heads, head_dim), normal(tokens, kv_heads, head_dim), normal(tokens, kv_heads, head_dim_v),
            normal(tokens, heads, head_dim_v), random_.choice([None, normal(heads, tokens, dtype=sums)]),
            random_.choice([None, normal(heads, dtype=sums)]), starts, lengths, starts, lengths,
            window_left=random_.choice([None, None, 0, random_.randint(1, 40)]),
            window_right=random_.choice([0, 0, None, random_.randint(1, 40)]),
            softcap=random_.choice([0.0, 0.0, 4.0]), softmax_scale=random_.choice([None, 0.3]),
        )  # fmt: skip
        return Random(problem, random_.choice([zigzag, contiguous, packed, striped])(tuple(lengths), world))

    def solve(self, exchange: Exchange, head_ranks: int) -> oracle.Grads:
        """This rank's rows of everything, and its part of dsink."""
        problem, rows = self.problem, local_rows(self.layout, exchange.rank)
        leaves = [x[rows].requires_grad_() for x in (problem.q, problem.k, problem.v)]
        out, lse = all_to_all_attention(
            *leaves, layout=self.layout, rank=exchange.rank, exchange=exchange, head_ranks=head_ranks,
            softmax_scale=problem.softmax_scale, window_left=problem.window_left, window_right=problem.window_right,
            softcap=problem.softcap,
        )  # fmt: skip
        outputs, gradients = [out], [problem.dout[rows]]
        if problem.sink is not None:
            leaves.append(problem.sink.clone().requires_grad_())
            outputs = [apply_sink(out, lse, leaves[-1])]
        if problem.dlse is not None:
            outputs, gradients = [*outputs, lse], [*gradients, problem.dlse[:, rows]]
        dq, dk, dv, *dsink = torch.autograd.grad(outputs, leaves, gradients)
        return oracle.Grads(outputs[0].detach(), lse.detach(), dq, dk, dv, dsink[0] if dsink else None)

    def judge(self, by_rank: list[oracle.Grads]) -> None:
        """Puts the ranks' rows together and compares them with the oracle."""
        problem = self.problem
        order = torch.cat([local_rows(self.layout, rank) for rank in range(self.layout.world)]).argsort()
        out, dq, dk, dv = (torch.cat([getattr(each, name) for each in by_rank])[order]
                           for name in ("out", "dq", "dk", "dv"))
        lse = torch.cat([each.lse for each in by_rank], dim=1)[:, order]
        dsink = None if problem.sink is None else sum(each.dsink for each in by_rank)
        assert_solves(problem, oracle.Grads(out, lse, dq, dk, dv, dsink))


@pytest.mark.parametrize("world, head_ranks", [(3, 1), *SPLITS])
def test_random_problems(world: int, head_ranks: int):
    random_ = random.Random(10 * world + head_ranks)
    for _ in range(20):
        each = Random.make(random_, world, head_ranks)
        each.judge(run_in_process(world, each.solve, head_ranks))


GLOO_CASES = CASES[1::2]


def worker(rank: int, world: int) -> dict[int, list[dict]]:
    exchange = DistributedExchange()
    return {
        head_ranks: [run_case(exchange, case, attention=partial(all_to_all_attention, head_ranks=head_ranks))
                     for case in GLOO_CASES]
        for head_ranks in (2, world)
    }  # fmt: skip


def test_gate_over_gloo():
    by_rank = run_distributed(4, worker)
    for head_ranks in by_rank[0]:
        for i, case in enumerate(GLOO_CASES):
            assert judge(case, [results[head_ranks][i] for results in by_rank]) == [], (head_ranks, case.name)


GPU_CASES = [case for case in CASES if sum(case.lengths)]


@pytest.mark.gpu
@pytest.mark.parametrize("world, head_ranks", SPLITS)
def test_gate_on_one_gpu(world: int, head_ranks: int):
    attention = partial(all_to_all_attention, head_ranks=head_ranks)
    for case in GPU_CASES:
        assert judge(case, run_in_process(world, run_case, case, False, "cuda", attention)) == [], case.name
        if head_ranks == world:
            with in_parts():
                assert judge(case, run_in_process(world, run_case, case, False, "cuda", attention)) == [], case.name


def nccl_worker(rank: int, world: int) -> list[dict]:
    exchange, head_ranks = DistributedExchange(), 2 if world % 2 == 0 else world
    attention = partial(all_to_all_attention, head_ranks=head_ranks)
    whole = [run_case(exchange, case, False, "cuda", attention) for case in GPU_CASES]
    with in_parts():
        return whole + [run_case(exchange, case, False, "cuda", attention) for case in GPU_CASES]


@pytest.mark.multi_gpu
def test_gate_over_nccl():
    by_rank = run_distributed(torch.cuda.device_count(), nccl_worker, backend="nccl", timeout=300.0)
    for i, case in enumerate(GPU_CASES * 2):
        assert judge(case, [results[i] for results in by_rank]) == [], case.name


# --------------------------------------------------------------------------------- messages, launches, memory


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("kv_heads, copies", [(8, 1), (4, 1), (2, 2), (1, 4)])
def test_messages(kv_heads: int, copies: int, dtype: torch.dtype):
    """One message to each other rank, there and back; gradients are in fp32 only where they are parts of a sum."""
    assert kv_copies(8, kv_heads, 4) == copies
    case = Case("", (40, 24), heads=8, kv_heads=kv_heads, dtype=dtype, dlse=False)
    size, gradient_size = dtype.itemsize, 4 if copies > 1 else dtype.itemsize
    q, kv, lse = 2 * 16, 2 * 16 * (kv_heads * copies // 4), 8  # elements a row, lse in bytes: 2 of fp32
    for result in run(4, 4, case):
        rows = 64 // 4 * 3  # to the others, and as many from them
        forward, backward = result["forward"], result["backward"]
        for messages in (forward, backward):
            assert messages["messages_sent"] == messages["messages_received"] == 2 * 3
            assert messages["bytes_sent"] == messages["bytes_received"]
        assert forward["bytes_sent"] == rows * ((q + kv) * size + q * size + lse)
        assert backward["bytes_sent"] == rows * (q * size + lse + q * size + kv * gradient_size)


def test_kv_copies_of_all_head_counts():
    """Every query head reads the key/value head that it should, and every rank has as many of them."""
    for heads in range(1, 25):
        for kv_heads in filter(lambda n: heads % n == 0, range(1, heads + 1)):
            for ranks in filter(lambda n: heads % n == 0, range(1, heads + 1)):
                sent = torch.arange(kv_heads).repeat_interleave(kv_copies(heads, kv_heads, ranks))
                assert len(sent) % ranks == 0
                read = [part.repeat_interleave(heads // len(sent)) for part in sent.chunk(ranks)]
                assert torch.equal(torch.cat(read), torch.arange(kv_heads).repeat_interleave(heads // kv_heads))
                assert kv_heads % ranks or len(sent) == kv_heads


def test_one_launch_for_all_documents(monkeypatch):
    counts = dict.fromkeys(("forward", "forward_into", "backward"), 0)

    def counted(name: str):
        operator = getattr(ops, name)

        def call(*args, **kwargs):
            counts[name] += 1
            return operator(*args, **kwargs)

        return call

    for name in counts:
        monkeypatch.setattr(ops, name, counted(name))
    run(2, 2, Case("", (5, 0, 1, 30, 17, 40), "packed", 2, 1))
    assert counts == {"forward": 2, "forward_into": 0, "backward": 2}


def saved_bytes(exchange: Exchange, head_ranks: int) -> tuple[int, int]:
    layout = zigzag([64 * exchange.world], exchange.world)
    q, k, v = (torch.ones(64, heads, 16, requires_grad=True) for heads in (8, 4, 4))
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out, lse = all_to_all_attention(q, k, v, layout=layout, rank=exchange.rank, exchange=exchange,
                                        head_ranks=head_ranks, window_right=0)
    assert any(x.data_ptr() == out.data_ptr() for x in saved), "out is not kept twice"
    return sum(x.nbytes for x in saved), sum(x.nbytes for x in (q, k, v, out, lse))


@pytest.mark.parametrize("head_ranks", [2, 4])
def test_what_is_saved_is_as_large_as_the_local_tensors(head_ranks: int):
    for saved, local in run_in_process(4, saved_bytes, head_ranks):
        assert saved == local


# ------------------------------------------------------------------------------------- gradients, repetition


@pytest.mark.parametrize("used", ["out", "lse"])
def test_a_loss_may_use_one_output_only(used: str):
    case = Case("", (70,), heads=4, kv_heads=1)
    layout, inputs = zigzag(case.lengths, 4), make_inputs(case)

    def gradients(exchange: Exchange, both: bool) -> tuple[Tensor, ...]:
        rows = local_rows(layout, exchange.rank)
        leaves = [x[rows].requires_grad_() for x in inputs[:3]]
        out, lse = all_to_all_attention(*leaves, layout=layout, rank=exchange.rank, exchange=exchange, head_ranks=2)
        terms = {"out": (out * inputs.dout[rows]).sum(), "lse": (lse * inputs.dlse[:, rows]).sum()}
        loss = sum(term * (name == used) for name, term in terms.items()) if both else terms[used]
        return torch.autograd.grad(loss, leaves)

    one, both = (run_in_process(4, gradients, both) for both in (False, True))
    for rank in range(4):
        assert one[rank][0].abs().sum() > 0
        for x, y in zip(one[rank], both[rank], strict=True):
            torch.testing.assert_close(x, y)


def test_no_gradient_no_backward_messages():
    def forward(exchange: Exchange) -> tuple[bool, int]:
        q, k, v = (torch.ones(16, 4, 8, requires_grad=True) for _ in range(3))
        with torch.no_grad():
            out, _ = all_to_all_attention(q, k, v, layout=zigzag([64], 4), rank=exchange.rank, exchange=exchange)
        return out.requires_grad, exchange.stats.messages_sent

    assert run_in_process(4, forward) == [(False, 6)] * 4


def test_deterministic_runs_and_checkpointing_are_equal_bit_for_bit():
    layout = zigzag([130], 4)
    weight, x = torch.randn(32, 64), torch.randn(130, 32)

    def layer(exchange: Exchange, x: Tensor, weight: Tensor) -> Tensor:
        q, k, v = (x @ weight).unflatten(1, (8, 8)).split((4, 2, 2), dim=1)
        out, lse = all_to_all_attention(q, k, v, layout=layout, rank=exchange.rank, exchange=exchange, head_ranks=2,
                                        window_right=0, deterministic=True)
        return out.flatten(1) * lse.mean()

    def gradients(exchange: Exchange, recomputed: bool) -> list[Tensor]:
        leaves = [x[local_rows(layout, exchange.rank)].requires_grad_(), weight.clone().requires_grad_()]
        run = partial(layer, exchange)
        out = checkpoint(run, *leaves, use_reentrant=False) if recomputed else run(*leaves)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    first, again, recomputed = (run_in_process(4, gradients, each) for each in (False, False, True))
    for rank in range(4):
        for a, b, c in zip(first[rank], again[rank], recomputed[rank], strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)


# ---------------------------------------------------------------------------------------------------- faults


@contextmanager
def replaced(name: str, value: Any):
    all_to_all._places.cache_clear()
    try:
        with patched(all_to_all, name, value):
            yield
    finally:
        all_to_all._places.cache_clear()


def kv_gradients_not_summed():
    """Only what the first reader of a key/value head says counts."""
    return replaced("_sum_copies", lambda x, copies, dtype: x[:, ::copies].to(dtype))


def kv_gradients_averaged():
    return replaced("_sum_copies", lambda x, copies, dtype: x.unflatten(1, (-1, copies)).mean(2).to(dtype))


def kv_heads_interleaved():
    return replaced("_with_copies", lambda x, copies: x.repeat(1, copies, 1))


def one_behind_the_other(layout: Layout, first: int, ranks: int, device: torch.device):
    """Rows in the order of the ranks."""
    ends = list(accumulate((layout.tokens(rank) for rank in range(first, first + ranks)), initial=0))
    return [[all_to_all._Run(slice(0, end - start), slice(start, end))] for start, end in pairwise(ends)], None


def documents_out_of_order():
    return replaced("_places", one_behind_the_other)


def order_not_undone():
    class Disordered(all_to_all._Swap):
        def __init__(self, layout, rank, exchange, head_ranks, device):
            super().__init__(layout, rank, exchange, head_ranks, device)
            self._disorder = one_behind_the_other(layout, rank // head_ranks * head_ranks, head_ranks, device)

        def _to_tokens(self, tensors, to, what):
            self._runs, self._order = self._disorder
            return super()._to_tokens(tensors, to, what)

    return replaced("_Swap", Disordered)


def own_rows_forgotten():
    class Forgetful(all_to_all._Swap):
        def _to_heads(self, tensors, what):
            return super()._to_heads(tensors, what)._replace(meanwhile=lambda: None)

    return replaced("_Swap", Forgetful)


def runs_in_each_others_place():
    class Turned(all_to_all._Swap):
        def _messages(self, local, rows):
            own, theirs = super()._messages(local, rows)
            n = len(self._runs[self._rank])
            return [[part for i in range(0, len(each), n) for part in each[i : i + n][::-1]] for each in own], theirs

    return replaced("_Swap", Turned)


def ring_of_the_wrong_ranks():
    """Heads of other ranks come round the ring."""
    class Shifted(all_to_all.Subgroup):
        def __init__(self, exchange, members):
            super().__init__(exchange, members)
            if members[-1] - members[0] >= len(members):  # a ring, not a group of neighbours
                self.members = tuple(m if m == exchange.rank else m ^ 1 for m in members)
    return replaced("Subgroup", Shifted)


def lse_gradient_dropped():
    delta = ops.delta
    return patched(ops, "delta", lambda dout, out, dlse=None: delta(dout, out))


GROUPED = Case("", (61, 1, 17), "zigzag", heads=4, kv_heads=2)
ONE_DOCUMENT = Case("", (64,), "zigzag", heads=4, kv_heads=2)
MUTANTS: dict[Callable[[], Any], tuple[int, Case]] = {  # each with a number of head ranks and a case that must turn red
    kv_gradients_not_summed: (4, GROUPED),
    kv_gradients_averaged: (4, GROUPED),
    kv_heads_interleaved: (4, GROUPED),
    documents_out_of_order: (2, GROUPED),
    order_not_undone: (4, GROUPED),
    own_rows_forgotten: (4, GROUPED),
    runs_in_each_others_place: (4, ONE_DOCUMENT),
    ring_of_the_wrong_ranks: (2, GROUPED),
    lse_gradient_dropped: (2, GROUPED),
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_gate_catches(mutant: Callable[[], Any]):
    head_ranks, case = MUTANTS[mutant]
    with mutant():
        assert judge(case, run(4, head_ranks, case)) != []
    assert judge(case, run(4, head_ranks, case)) == []


def test_gate_catches_a_message_that_is_not_awaited():
    with replaced("_finish", lambda way, transfers: way.arrive()):
        assert judge(GROUPED, run(4, 4, GROUPED)) != []


# --------------------------------------------------------------------------------------------- wrong calls, failures


WRONG = {
    "q has 6 heads: expected a multiple of 4": {"q": (16, 6, 8), "k": (16, 3, 8), "v": (16, 3, 8), "head_ranks": 4},
    "head_ranks is 3: expected a divisor of 4": {"head_ranks": 3},
    "head_ranks is 0: expected a divisor of 4": {"head_ranks": 0},
    "k has shape (15, 4, 8)": {"k": (15, 4, 8)},
    "have 4, 3 and 3 heads": {"k": (16, 3, 8), "v": (16, 3, 8)},
    "window_left is -1": {"window_left": -1},
    "softcap is -1.0": {"softcap": -1.0},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_calls_are_refused_before_any_message(message: str):
    arguments: dict[str, Any] = {"q": (16, 4, 8), "k": (16, 4, 8), "v": (16, 4, 8), "head_ranks": 2} | WRONG[message]
    tensors = {name: torch.zeros(arguments.pop(name)) for name in "qkv"}

    def call(exchange: Exchange) -> int:
        with pytest.raises(ValueError) as caught:
            all_to_all_attention(**tensors, **arguments, layout=zigzag([64], 4), rank=exchange.rank, exchange=exchange)
        assert message in str(caught.value) and "expected" in str(caught.value)
        return exchange.stats.messages_sent

    assert run_in_process(4, call) == [0] * 4


def test_heads_that_do_not_divide_are_told_what_to_do():
    with pytest.raises(ValueError, match="q has 4 heads: expected a multiple of 3, .*take mode='ring'"):
        check_heads(4, 3, 3)
    check_heads(6, 3, 6)


@pytest.mark.parametrize("head_ranks", [2, 4])
def test_a_rank_that_fails_ends_the_others(head_ranks: int):
    seen: dict[int, RingError] = {}
    layout = zigzag([64], 4)

    def step(exchange: Exchange) -> None:
        if exchange.rank == 2:
            raise ZeroDivisionError("rank 2 breaks")
        q, k, v = (torch.ones(16, 4, 8) for _ in range(3))
        try:
            for _ in range(2):
                all_to_all_attention(q, k, v, layout=layout, rank=exchange.rank, exchange=exchange,
                                     head_ranks=head_ranks)
        except RingError as error:
            seen[exchange.rank] = error
            raise

    with pytest.raises(ZeroDivisionError):
        run_in_process(4, step)
    assert sorted(seen) == [0, 1, 3]
    assert (seen[3].peer, seen[3].what) == (2, "q/k/v")
    assert all(error.rank == rank and error.step >= 1 for rank, error in seen.items())


def silent_peer(rank: int, world: int) -> tuple:
    exchange, layout = DistributedExchange(), zigzag([64], world)
    q, k, v = (torch.ones(layout.tokens(rank), 4, 8, requires_grad=True) for _ in range(3))
    out, lse = all_to_all_attention(q, k, v, layout=layout, rank=rank, exchange=exchange, window_right=0)
    if rank == 1:  # alive, but not in the backward
        time.sleep(1.5)
        return ()
    exchange.timeout, started = 0.5, time.monotonic()
    with pytest.raises(RingError) as caught:
        out.sum().backward()
    return time.monotonic() - started, str(caught.value)


def test_a_silent_peer_is_named():
    outcomes = run_processes(2, silent_peer)
    assert [outcome.error for outcome in outcomes] == [None, None]
    seconds, text = outcomes[0].result
    assert seconds < 5.0
    assert text == ("rank 0, ring step 1: dout/delta from rank 1 did not arrive within 0.5 s: rank 1 is dead, stuck, "
                    "or in another step")


def test_rows_of_few_pieces_arrive_in_order():
    assert arrive_in_order(zigzag([64], 4), 2) and arrive_in_order(zigzag([64], 4), 4)
    assert arrive_in_order(contiguous([64], 4), 4) and not arrive_in_order(contiguous([5] * 40, 4), 4)
    assert not arrive_in_order(zigzag([64, 64, 64], 4), 4)
    assert arrive_in_order(zigzag([64, 64], 4), 4) and arrive_in_order(zigzag([0], 4), 4)


def test_orders_are_made_once():
    all_to_all._places.cache_clear()

    def twice(exchange: Exchange) -> None:
        for _ in range(2):
            q = torch.ones(16, 4, 8)
            layout: Layout = zigzag([64], 4)
            all_to_all_attention(q, q, q, layout=layout, rank=exchange.rank, exchange=exchange, head_ranks=2)

    run_in_process(4, twice)
    info = all_to_all._places.cache_info()
    assert (info.misses, info.hits) == (2, 6)
