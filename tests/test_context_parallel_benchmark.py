"""benchmarks/context_parallel.py without GPUs: cases, bytes and memory against counting, bars, a run of two ranks."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import check_results  # noqa: E402
import context_parallel  # noqa: E402
import context_parallel_cases as cases  # noqa: E402
import context_parallel_report as report  # noqa: E402
import timing  # noqa: E402
from attention_cases import Case  # noqa: E402
from attention_peers import CannotRun  # noqa: E402

from fa3_dist.parallel import ring  # noqa: E402
from fa3_dist.parallel.exchange import DistributedExchange  # noqa: E402
from fa3_dist.parallel.observe import COMMUNICATION, COMPUTE, Span  # noqa: E402
from fa3_dist.parallel.plan import Copies, Links, links_of  # noqa: E402
from fa3_dist.parallel.schedule import Layout, packed, zigzag  # noqa: E402
from tests.distributed import run_distributed  # noqa: E402

BYTES = 2  # of a bf16 number


def small(lengths: tuple[int, ...], heads: int = 4, kv_heads: int = 2, left: int | None = None) -> Case:
    return Case("small", lengths, heads, kv_heads, 16, 24, causal=True, left=left, packed=len(lengths) > 1)


# ---- cases -----------------------------------------------------------------------------------------------------------


def test_problems() -> None:
    found = {problem.name: problem for problem in cases.problems()}
    assert list(found) == [
        "mha_8k", "gqa_8k", "mha_32k", "gqa_32k", "mha_128k", "gqa_128k", "packed_web_64k", "packed_code_64k", "gqa_1m",
    ]
    for name, tokens in (("8k", 8), ("32k", 32), ("128k", 128), ("1m", 1024), ("web_64k", 64), ("code_64k", 64)):
        for kind, heads in (("mha", (16, 16)), ("gqa", (32, 8)), ("packed", (16, 16))):
            if problem := found.get(f"{kind}_{name}"):
                case = problem.case
                assert sum(case.lengths) == tokens * 1024 and (case.heads, case.kv_heads) == heads
                assert case.causal and case.head_dim == case.head_dim_v == 128 and case.packed == (kind == "packed")
    asked = [problem for problem in found.values() if problem.by_request]
    assert [problem.name for problem in asked] == ["gqa_1m"] and asked[0].passes == ("forward_backward",)
    assert not asked[0].alone and cases.problems(scale=4)[-1].alone
    assert [problem.name for problem in found.values() if problem.repeats] == ["mha_128k", "gqa_128k", "gqa_1m"]
    scaled = {problem.name: problem.case for problem in cases.problems(scale=64)}
    assert scaled["mha_32k"].lengths == (512,) and min(scaled["packed_web_64k"].lengths) == 1


def test_choice_of_problems_and_peers() -> None:
    found = cases.problems()
    assert [problem.name for problem in context_parallel.choose_problems(found, [])] == [p.name for p in found[:-1]]
    chosen = context_parallel.choose_problems(found, ["1m", "web"])
    assert [problem.name for problem in chosen] == ["packed_web_64k", "gqa_1m"]
    with pytest.raises(ValueError, match="no case contains '64m': they are mha_8k, gqa_8k"):
        context_parallel.choose_problems(found, ["64m"])
    ours, torchs = ["alone", "ring", "all_to_all", "ring_again"], list(context_parallel.TORCH)
    assert context_parallel.choose_peers([], [0]) == [*ours, *torchs]
    assert context_parallel.choose_peers([], [0, 4, 8]) == [*ours, "ring_margin_4", "ring_margin_8", *torchs]
    chosen = context_parallel.choose_peers(["torch_flash", "ring_margin_4", "ring"], [0, 4, 8])
    assert chosen == ["alone", "ring", "ring_margin_4", "torch_flash"]
    with pytest.raises(ValueError, match="unknown peer 'ring_margin_3'"):
        context_parallel.choose_peers(["ring_margin_3"], [0, 4])


@pytest.mark.parametrize("given", ["4,4", "-1", "0,a", ""])
def test_bad_margins_are_refused(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        context_parallel.parse_arguments(["--sm-margins", given])
    assert "--sm-margins" in capsys.readouterr().err


def test_margins_are_compared_with_the_first_one() -> None:
    def cell(name: str, first: float, second: float) -> dict[str, Any]:
        entries = {"ring": {"ms": {"median": first}}, "ring_margin_4": {"ms": {"median": second}},
                   "ring_margin_8": {"ms": None, "reason": "differs"}}  # fmt: skip
        return {"name": name, "passes": {"forward": {"entries": entries}}}

    assert report.margin_lines([cell("a", 2.0, 1.0), cell("b", 1.0, 2.0)]) == [
        "ring_margin_4 over ring: 1.0000 (a forward 0.500, b forward 2.000)"
    ]


def test_flop() -> None:
    case = next(problem.case for problem in cases.problems() if problem.name == "gqa_32k")
    product = 2 * (32768 * 32768 // 2) * 32 * 128  # of two matrices, over half of the square
    assert cases.flop(case, "forward") == 2 * product and cases.flop(case, "forward_backward") == 7 * product


# ---- bytes -----------------------------------------------------------------------------------------------------------


def owners(layout: Layout) -> list[tuple[int, int, int]]:
    """(document, position, rank) of every token."""
    return [
        (document, position, rank)
        for rank, shards in enumerate(layout.shards)
        for document, start, length in shards
        for position in range(start, start + length)
    ]


def counted_ring(case: Case, layout: Layout, which: str) -> list[cases.Moved]:
    """Sent and received bytes of each rank, from who sees whose tokens."""
    tokens = owners(layout)
    row = case.kv_heads * (case.head_dim + case.head_dim_v)
    sent, received = [0] * layout.world, [0] * layout.world
    for document, key, owner in tokens:
        seen_by = {
            rank for other, query, rank in tokens
            if other == document and key <= query and (case.left is None or key >= query - case.left)
        }
        for rank in seen_by - {owner}:
            passes = 1 if which == "forward" else 2
            sent[owner] += passes * row * BYTES
            received[rank] += passes * row * BYTES
            if which == "forward_backward":  # the gradients of this key, in fp32
                sent[rank] += row * 4
                received[owner] += row * 4
    return list(map(cases.Moved, sent, received))


def counted_all_to_all(case: Case, layout: Layout, which: str) -> list[cases.Moved]:
    """The same for an all-to-all, head by head: its rank needs the token's q, and its key/value head."""
    world = layout.world
    sent, received = [0] * world, [0] * world

    def move(source: int, destination: int, size: int) -> None:
        if source != destination:
            sent[source] += size
            received[destination] += size

    readers = case.heads // case.kv_heads
    for _, _, owner in owners(layout):
        copies = {(head // readers, head * world // case.heads) for head in range(case.heads)}
        gradient = BYTES if len(copies) == case.kv_heads else 4
        for head in range(case.heads):
            rank = head * world // case.heads
            move(owner, rank, case.head_dim * BYTES)
            move(rank, owner, case.head_dim_v * BYTES + 4)
            if which == "forward_backward":
                move(owner, rank, case.head_dim_v * BYTES + 4)
                move(rank, owner, case.head_dim * BYTES)
        for _, rank in copies:
            move(owner, rank, (case.head_dim + case.head_dim_v) * BYTES)
            if which == "forward_backward":
                move(rank, owner, (case.head_dim + case.head_dim_v) * gradient)
    return list(map(cases.Moved, sent, received))


@pytest.mark.parametrize("which", cases.PASSES)
@pytest.mark.parametrize(
    ("case", "world"),
    [
        (small((48,)), 2),
        (small((50,), kv_heads=4), 4),
        (small((60,), kv_heads=1), 4),
        (small((60,), left=9), 4),
        (small((70, 3, 1, 20, 8)), 2),
    ],
)
def test_bytes_that_move_against_counting(case: Case, world: int, which: str) -> None:
    layout = (packed if case.packed else zigzag)(case.lengths, world)
    ring_bytes, swapped = (
        [count(case, layout, rank, which) for rank in range(world)]
        for count in (cases.ring_moved, cases.all_to_all_moved)
    )
    assert ring_bytes == counted_ring(case, layout, which)
    remaining = [cases.ring_moved(case, layout, rank, which, remains=True) for rank in range(world)]
    if which == "forward":
        assert remaining == ring_bytes
    elif world == 2:  # K/V of the only step come once
        once = counted_ring(case, layout, "forward")
        assert remaining == [(a.sent - b.sent, a.received - b.received) for a, b in zip(ring_bytes, once)]
    assert swapped == counted_all_to_all(case, layout, which)
    assert cases.busiest_link(ring_bytes) == max(max(each) for each in ring_bytes) > 0


# ---- memory ----------------------------------------------------------------------------------------------------------


def peaks_without_arithmetic(rank: int, world: int, problems: list[Case], folder: str) -> list[tuple[int, int]]:
    """Bytes that a ring holds at its peak, by torch's profiler, and those expected; the operators compute nothing."""
    from torch.profiler import ProfilerActivity, profile

    exchange = DistributedExchange(timeout=30)
    ring.ops.forward_into = ring.ops.backward = lambda *args, **options: None  # type: ignore[assignment]
    ring.ops.delta = lambda dout, out, dlse: dout.new_zeros(*out.shape[1::-1], dtype=torch.float32)  # type: ignore
    found = []
    for case in problems:
        layout = (packed if case.packed else zigzag)(case.lengths, world)
        ring.ring_plan(layout, rank, None, 0, torch.device("cpu"))
        for which in cases.PASSES:
            with_backward = which == "forward_backward"
            sizes = (case.heads, 16), (case.kv_heads, 16), (case.kv_heads, 24), (case.heads, 24)
            q, k, v, dout = (torch.zeros(layout.tokens(rank), *size, dtype=torch.bfloat16) for size in sizes)
            leaves = [x.requires_grad_(with_backward) for x in (q, k, v)]
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                out, lse = ring.ring_attention(q, k, v, layout=layout, rank=rank, exchange=exchange, window_right=0)
                if with_backward:
                    torch.autograd.grad(out, leaves, dout)
            del out, lse
            path = Path(folder, f"{rank}.json")
            profiler.export_chrome_trace(str(path))
            events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
            now = peak = sum(x.nbytes for x in (*leaves, *([dout] if with_backward else [])))
            for event in sorted(events, key=lambda event: event["ts"]):
                now += event["args"]["Bytes"]
                peak = max(peak, now)
            found.append((peak, sum(cases.ring_memory(case, layout, rank, which, "cpu").values())))
    return found


def test_memory_of_a_ring_against_the_profiler(tmp_path: Path) -> None:
    problems = [small((6000,)), small((6000,), kv_heads=4), small((3000, 900, 5000, 17, 64))]
    for found in run_distributed(3, peaks_without_arithmetic, problems, str(tmp_path), timeout=60):
        assert len(found) == 6
        for peak, expected in found:
            assert peak == pytest.approx(expected, rel=1e-3)


def test_memory_is_linear_in_tokens_over_ranks() -> None:
    case = cases.problems()[-1].case
    peaks = {}
    for world in (2, 4, 8):
        memory = cases.ring_memory(case, zigzag(case.lengths, world), 0, "forward_backward", "cuda")
        peaks[world] = sum(memory.values())
        assert memory["q"] == 2**20 // world * 32 * 128 * BYTES and memory["dq in fp32"] == 2 * memory["q"]
    # From 2 ranks to 4 the messages of two steps stand beside each other for the first time.
    assert peaks[4] < 0.59 * peaks[2] and peaks[8] == peaks[4] / 2


# ---- figures of spans ------------------------------------------------------------------------------------------------


def test_figures_of_made_up_spans() -> None:
    busy = [
        Span(COMMUNICATION, "K/V", 1, 0.00001, 3.0, 100), Span(COMPUTE, "forward", 0, 1.0, 5.0),
        Span(COMPUTE, "forward", 1, 5.0, 10.0),
    ]
    idle = [Span(COMMUNICATION, "K/V", 1, 0.0, 6.0, 70), Span(COMPUTE, "forward", 0, 0.5, 3.5)]
    figures = context_parallel.TraceFigures.of([busy, idle], 10.0)
    assert figures.exposed_ms == pytest.approx(0.5 + 2.5) and figures.exposed_share == pytest.approx(0.3)
    assert figures.compute_imbalance == pytest.approx(9 / 6 - 1) and figures.bytes_sent == [100, 70]
    assert figures.steps[0] == {
        "rank": 0, "kind": "communication", "what": "K/V", "step": 1, "start": 0.0, "end": 3.0, "bytes_sent": 100,
        "exposed": 1.0,
    }
    assert [step["rank"] for step in figures.steps] == [0, 0, 0, 1, 1] and "exposed" not in figures.steps[1]


def test_figures_over_ranks() -> None:
    assert context_parallel.of_the_slowest([[1.0, 5.0, 2.0], [3.0, 4.0, 2.5]]) == [3.0, 5.0, 2.5]
    assert context_parallel.of_the_mean([[1.0, 5.0, 2.0], [3.0, 4.0, 2.5]]) == [2.0, 4.5, 2.25]
    assert context_parallel.furthest_off([90, 108], [100, 100]) == pytest.approx(0.1)
    assert context_parallel.furthest_off([101, 108], [100, 100]) == pytest.approx(0.08)


def test_gpus_are_aligned_behind_a_flush_and_all_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Event:
        def query(self) -> bool:
            return order.count("ring") == 2 and order[-1] == "ring"  # the first of them that counts

    def mark(device: torch.device) -> Event:
        order.append("mark")
        return Event()

    monkeypatch.setattr(context_parallel, "mark", mark)
    monkeypatch.setattr(context_parallel, "milliseconds", lambda start, end: 1.5)
    monkeypatch.setattr(timing, "Flush", lambda: types.SimpleNamespace(overwrite=lambda: order.append("flush")))

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        order.append("enter")
        yield
        order.append("leave")

    calls = {
        "alone": context_parallel.Call(lambda: order.append("alone") or ()),
        "ring": context_parallel.Call(lambda: order.append("ring") or (), around),
    }
    slowest, rests = [1.5], []

    def align(rest_ms: float = 0.0) -> None:
        order.append("align")
        rests.append(rest_ms)

    orders, drawn = [], []
    for rank in (0, 1):
        setup: Any = types.SimpleNamespace(
            device=torch.device("cuda"), rank=rank, world=2, align=align,
            of_all_ranks=lambda value: [value, value | {"ring": slowest[0]}],
        )
        order.clear()
        slowest[0] = 1.5
        times, late = context_parallel.time_in_turn(calls, setup, repeats=2, warmups=1)
        orders.append(order.copy())
        assert orders[rank] == orders[0], "ranks draw the same order, or their calls would not meet"
        alone = ["flush", "align", "mark", "alone", "mark"]
        ring = ["enter", "flush", "align", "mark", "ring", "mark", "leave"]
        turns = ["".join(alone + ring), "".join(ring + alone)]
        rounds = ["".join(order[12 * i : 12 * i + 12]) for i in range(3)]
        assert len(order) == 36 and set(rounds) == set(turns), "each of them comes first at times"
        assert rests[:2] == [0.0, 0.0] and rests[3:6] == [1.5 * context_parallel.REST] * 3
        rests.clear()
        assert times == {"alone": [1.5, 1.5], "ring": [1.5, 1.5]}
        assert late == {"alone": 0, "ring": 1}
        # One that is long on some rank: each is timed after much of the same, in an order that is drawn anew.
        order.clear()
        slowest[0] = 250.0
        times, late = context_parallel.time_in_turn(calls, setup, repeats=5, warmups=1)
        assert times == {"alone": [1.5 / 534] * 4, "ring": [1.5 / 4] * 4} and late == {"alone": 0, "ring": 0}
        drawn.append(rounds_of_blocks(order[12:]))
        assert drawn[rank] == drawn[0] and set(drawn[rank]) == {("alone", "ring"), ("ring", "alone")}
        rests.clear()


def rounds_of_blocks(order: list[str]) -> list[tuple[str, ...]]:
    """The names in the order of their blocks, each of which is timed behind one as long that is not."""

    def block(name: str, runs: int) -> list[str]:
        return ["align", *[name, "mark"] * runs, "mark", name, *[name, "mark"] * (runs - 1), "mark"]

    rounds = []
    for _ in range(context_parallel.BLOCKS):
        alone, ring = block("alone", 534), ["enter", *block("ring", 4), "leave"]
        names = ("ring", "alone") if order[0] == "enter" else ("alone", "ring")
        expected = ring + alone if names[0] == "ring" else alone + ring
        assert order[: len(expected)] == expected
        order = order[len(expected) :]
        rounds.append(names)
    assert not order
    return rounds


def test_the_host_is_not_far_ahead_of_calls_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def mark(device: torch.device) -> str:
        order.append("mark")
        return f"end {order.count('mark')}"

    monkeypatch.setattr(context_parallel, "mark", mark)
    monkeypatch.setattr(context_parallel, "wait_until", order.append)
    monkeypatch.setattr(context_parallel, "MOST_AHEAD", 2)
    call = context_parallel.Call(lambda: order.append("run") or ())
    context_parallel.run_in_a_row(call, 4, torch.device("cuda"))
    assert order == ["run", "mark", "run", "mark", "end 1", "run", "mark", "end 2", "run", "mark"]


def test_long_cases_are_seen_to_be_long_before_they_are_timed() -> None:
    for problem in cases.problems():
        repeats, warmups = context_parallel.runs_of(problem, 20)
        assert (repeats, warmups) in ((20, context_parallel.WARMUPS), (5, 1), (1, 0))
        assert (repeats > 1) == (warmups > 0)


# ---- PyTorch's own ---------------------------------------------------------------------------------------------------


def test_what_torchs_context_parallel_cannot_express() -> None:
    def mesh(device_type: str = "cuda") -> Any:
        return types.SimpleNamespace(size=lambda: 2, device_type=device_type)

    for case, where, reason in (
        (small((8, 8)), mesh(), "no packed documents"), (small((64,), left=3), mesh(), "no windows"),
        (small((66,)), mesh(), "a multiple of 4"), (small((64,)), mesh("cpu"), "is for CUDA"),
    ):
        with pytest.raises(CannotRun, match=reason):
            context_parallel.torch_call("torch_cudnn", case, None, where)  # type: ignore[arg-type]


def test_torchs_context_parallel_is_called_with_local_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.tensor import experimental
    from torch.distributed.tensor.experimental import _attention

    called: list[Any] = []

    @contextlib.contextmanager
    def inside(mesh: Any, *, buffers: list[Tensor], buffer_seq_dims: list[int]) -> Iterator[None]:
        called.append((tuple(buffers[0].shape), buffer_seq_dims))
        yield
        called.append("left")

    monkeypatch.setattr(experimental, "context_parallel", inside)
    monkeypatch.setattr(_attention, "set_rotate_method", called.append)
    monkeypatch.setitem(context_parallel.TORCH, "torch_flash", (torch.nn.attention.SDPBackend.MATH, "allgather"))
    case = small((64,))
    heads = (4, 16), (2, 16), (2, 24), (4, 24)
    q, k, v, dout = (torch.randn(1, 32, *each) for each in heads)
    x = context_parallel.Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), torch.empty(0), dout)
    mesh: Any = types.SimpleNamespace(size=lambda: 2, device_type="cuda")
    call = context_parallel.torch_call("torch_flash", case, x, mesh)
    with call.around():
        results = call.run()
    assert called == ["allgather", ((4,), [0]), "left"]
    assert [tuple(result.shape) for result in results] == [(1, 32, *each) for each in (heads[3], *heads[:3])]


# ---- checks between ranks --------------------------------------------------------------------------------------------


def test_relative_differences() -> None:
    def differences(*of_ranks: tuple[float, float, int]) -> list[float]:
        return context_parallel.relative_differences([context_parallel.Distance(*each) for each in of_ranks])

    assert differences((0.1, 10.0, 100), (0.4, 20.0, 100)) == pytest.approx([0.01, 0.02])
    rows_of_noise = differences((1e-4, 1e-4, 100), (0.4, 20.0, 100))  # a tenth of the average is sqrt(2)
    assert rows_of_noise == pytest.approx([1e-4 / 2**0.5, 0.02])
    assert differences((0.0, 0.0, 0), (0.4, 20.0, 100))[0] == 0.0
    assert not max(differences((float("nan"), 10.0, 100), (0.4, 20.0, 100))) <= 1
    between = context_parallel.Distance.between
    assert between(torch.ones(3), torch.ones(4)).difference == float("inf")
    assert between(torch.ones(4), 3 * torch.ones(4)) == (4.0, 6.0, 4)


def measure_with_faults(rank: int, world: int) -> list[dict[str, Any]]:
    """A case whose all-to-all is wrong on rank 1, then one that rank 1 cannot compute alone."""
    setup = context_parallel.make_setup(torch.device("cpu"), repeats=2, margins=[0])
    problem = cases.Problem(small((96,)), passes=("forward_backward",))
    real_call, real_alone = context_parallel.our_call, context_parallel.alone_call

    def changed(call: context_parallel.Call, change: Callable[[Any], Any]) -> context_parallel.Call:
        return call._replace(run=lambda: change(call.run()))

    def wrong(case: Case, x: Any, batch: Any) -> context_parallel.Call:
        call = real_call(case, x, batch)
        is_wrong = rank == 1 and batch.attention.exchange is setup.modes["all_to_all"].exchange
        return changed(call, lambda results: (*results[:2], 1.02 * results[2], results[3])) if is_wrong else call

    def failing(results: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    context_parallel.our_call = wrong
    cells = [context_parallel.measure(problem, setup, ["alone", "ring", "all_to_all"])]
    context_parallel.our_call = real_call
    context_parallel.alone_call = lambda case, x: (
        changed(real_alone(case, x), failing) if rank == 1 else real_alone(case, x)
    )
    cells.append(context_parallel.measure(problem, setup, ["alone", "ring"]))
    assert all(mode.exchange.observer is None for mode in setup.modes.values())
    cells.append(context_parallel.measure(problem._replace(alone=False), setup, ["alone", "ring"]))
    return cells


def test_wrong_results_and_missing_ones_on_one_rank() -> None:
    of_ranks = run_distributed(2, measure_with_faults, timeout=60)
    wrong, missing, left_out = of_ranks[0]
    entries = wrong["passes"]["forward_backward"]["entries"]
    assert entries["all_to_all"]["ms"] is None and len(wrong["errors"]) == 1
    assert wrong["errors"][0].startswith("forward_backward, all_to_all differs by 2.0e-02 in dk on rank 1, relative L2")
    assert entries["ring"]["difference"] < 8e-3 and entries["ring"]["efficiency"] > 0
    assert any("WRONG: forward_backward, all_to_all" in line for line in report.cell_lines(wrong))
    entries = missing["passes"]["forward_backward"]["entries"]
    assert entries["alone"] == {"ms": None, "tflops": None, "reason": "rank 1: CUDA out of memory"}
    assert entries["ring"]["ms"] and "efficiency" not in entries["ring"] and "bound" not in entries["ring"]
    assert any("unchecked: one rank alone" in line for line in report.cell_lines(missing))
    entries = left_out["passes"]["forward_backward"]["entries"]
    assert entries["alone"]["reason"] == "left out: it would take minutes" and entries["ring"]["ms"]
    assert "unchecked" in entries["ring"] and not left_out["errors"]


# ---- a whole run -----------------------------------------------------------------------------------------------------


COPIES = Copies(bandwidth=1e9, latency=1e-4)


def links_with_copies(exchange: DistributedExchange) -> Links:
    """As if there were copy engines between processes."""
    links = links_of(exchange)
    assert links.copies is None
    return replace(links, copies=COPIES)


def run_as_torchrun_does(rank: int, world: int, port: str, flags: list[str]) -> tuple[int, str]:
    """Exit status of the benchmark's command line on one rank, and what it printed."""
    torch.distributed.destroy_process_group()  # it makes its own
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in numbers.items()})
    context_parallel.links_of = links_with_copies
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = context_parallel.main(["--device", "cpu", *flags])
    return status, said.getvalue()


def test_two_ranks_write_figures_and_timelines(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "cp.json"
    flags = ["--scale", "128", "--cells", "gqa_8k", "--repeats", "2", "--steps", "--sm-margins", "0,3",
             "--output", str(output)]
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = str(found.getsockname()[1])
    (status, said), (other_status, nothing) = run_distributed(2, run_as_torchrun_does, port, flags, timeout=100)
    assert status == other_status == 0 and not nothing
    result = json.loads(output.read_text())
    assert {"device", "torch", "commit", "csrc_hash", "library", "date", "bandwidth"} <= set(result)
    assert (result["ranks"], result["scale"], result["judged"], result["valid"]) == (2, 128, False, None)
    assert result["peer_copies"] is False and result["copies"] == COPIES._asdict()
    (cell,) = result["cells"]
    assert cell["name"] == "gqa_8k" and cell["tokens_of_ranks"] == [32, 32] and not cell["errors"]
    assert cell["area_imbalance"] == pytest.approx(0, abs=1e-9) and cell["chosen"] in ("ring", "all_to_all")
    layout, case = zigzag((64,), 2), cases.problems(scale=128)[1].case
    for which, measured in cell["passes"].items():
        entries = measured["entries"]
        ours = ["alone", "ring", "all_to_all", "ring_again", "ring_margin_3"]
        assert list(entries) == [*ours, *context_parallel.TORCH]
        alone = entries["alone"]["ms"]["median"]
        assert measured["flop"] == cases.flop(case, which)
        assert entries["alone"]["tflops"]["median"] == pytest.approx(measured["flop"] / alone / 1e9)
        assert len(entries["alone"]["ms_of_ranks"]) == 2
        counts = {"ring": counted_ring, "ring_margin_3": counted_ring, "all_to_all": counted_all_to_all}
        for name, count in counts.items():
            entry = entries[name]
            moved = count(case, layout, which)
            assert entry["bytes_sent"] == entry["must_send"] == [each.sent for each in moved]
            assert entry["efficiency"] == pytest.approx(alone / 2 / entry["ms"]["median"])
            assert entry["tflops"]["median"] == pytest.approx(measured["flop"] / 2 / entry["ms"]["median"] / 1e9)
            bandwidth = result["bandwidth"]["2"] if name == "all_to_all" else COPIES.bandwidth
            assert entry["link_ms"] == pytest.approx(1e3 * max(max(each) for each in moved) / bandwidth)
            hidden = alone / 2 + entry["link_ms"] if name == "all_to_all" else max(alone / 2, entry["link_ms"])
            assert entry["bound"] == pytest.approx(alone / 2 / hidden) and 0 < entry["bound"] <= 1
            assert 0 <= entry["exposed_ms"] < entry["traced_ms"] and entry["compute_imbalance"] >= 0
            assert entry["peak_bytes"] is None and entry["difference"] < 8e-3
        for name in context_parallel.TORCH:
            assert entries[name] == {"ms": None, "tflops": None, "reason": "torch's context_parallel is for CUDA"}
        why = {"forward": "the backward differs", "forward_backward": "without copy engines K/V always come again"}
        assert entries["ring_again"] == {"ms": None, "tflops": None, "reason": f"it is the ring: {why[which]}"}
        steps = entries["ring"]["steps"]
        kinds = [(step["kind"], step["what"], step["step"]) for step in steps if step["rank"] == 1]
        forward = [("communication", "K/V", 1), ("compute", "forward", 0), ("compute", "forward", 1)]
        half = [("compute", "backward", 1), ("communication", "dK/dV", 1)]
        # With 32 tokens a rank, the local step is one launch.
        backward = [("communication", "K/V", 1), *half, *half, ("compute", "backward", 0)]
        assert kinds == forward + (backward if which == "forward_backward" else [])
    for text in ("gqa_8k: 64 tokens on 2 ranks, 32:8 heads of 128", "torch's context_parallel is for CUDA",
                 "forward + backward, rank 1, step 1: dK/dV", "not judged", "ring_margin_3 over ring: ",
                 "by copy engines 1 GB/s"):
        assert text in said, text
    picture = output.with_suffix(".png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


def test_a_picture_is_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(context_parallel, "draw", lambda result, path: drawn.append((result, path)) or len(drawn) == 1)
    (tmp_path / "cp.json").write_text('{"ranks": 2}')
    assert [context_parallel.main(["--draw", str(tmp_path / "cp.json")]) for _ in range(2)] == [0, 2]
    assert drawn == [({"ranks": 2}, tmp_path / "cp.png")] * 2


@pytest.mark.multi_gpu
def test_two_gpus(tmp_path: Path) -> None:
    if reason := timing.why_no_hopper() or timing.why_no_library():
        pytest.skip(reason)
    output = tmp_path / "cp.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(ROOT / "benchmarks" / "context_parallel.py"), "--scale", "4", "--cells", "mha_32k,packed_code",
               "--repeats", "3", "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    result = json.loads(output.read_text())
    assert (result["copies"] is not None) is result["peer_copies"]
    for cell in result["cells"]:
        assert not cell["errors"], ended.stderr
        for measured in cell["passes"].values():
            for name in ("ring", "all_to_all"):
                entry = measured["entries"][name]
                assert entry["efficiency"] > 0 and entry["bytes_sent"] == entry["must_send"]
                assert all(step["start"] <= step["end"] for step in entry["steps"])
            assert measured["entries"]["ring"]["memory_off"] < 0.1


# ---- bars ------------------------------------------------------------------------------------------------------------


def made_up_cells(**figures: float) -> dict[str, Any]:
    """Every case with the same figures, those of the ring."""
    entry = {"efficiency": 0.99, "exposed_share": 0.01, "compute_imbalance": 0.02, "memory_off": 0.05, **figures}
    entry["ms"] = {"median": 1.0}
    return {
        problem.name: {
            "name": problem.name, "area_imbalance": figures.get("area_imbalance", 0.01), "errors": [], "chosen": "ring",
            "passes": {
                which: {"entries": {"ring": dict(entry), "all_to_all": {"ms": {"median": 2.0}}}}
                for which in problem.passes
            },
        }
        for problem in cases.problems()
    }


def verdicts(cells: dict[str, Any], judged: bool = True) -> dict[str, bool | None]:
    return {line["what"]: line["passed"] for line in report.summarise(cells, judged)}


def test_bars() -> None:
    assert set(verdicts(made_up_cells()).values()) == {True} and len(report.BARS) == 14 + 8 + 2 + 4 + 8 + 1
    levels = {bar.what: (bar.bar, bar.sense) for bar in report.BARS}
    for what, bar in (
        ("efficiency of the ring, gqa_8k forward", (0.80, "at least")),
        ("efficiency of the ring, mha_32k forward", (0.95, "at least")),
        ("efficiency of the ring, gqa_32k forward + backward", (0.95, "at least")),
        ("efficiency of the ring, gqa_128k forward + backward", (0.98, "at least")),
        ("efficiency of the ring, packed_code_64k forward", (0.90, "at least")),
        ("exposed communication, mha_128k forward + backward", (0.02, "at most")),
        ("imbalance of mask area, packed_web_64k", (0.03, "at most")),
        ("imbalance of attention time, packed_code_64k forward", (0.03, "at most")),
        ("peak memory off the expected one, gqa_1m", (0.10, "at most")),
        ("mode chosen over the faster one, mha_8k", (1.15, "at most")),
    ):
        assert levels[what] == bar


@pytest.mark.parametrize(
    ("figure", "value", "word", "count"),
    [
        ("efficiency", 0.94, "efficiency", 8), ("efficiency", 0.96, "efficiency", 4),
        ("efficiency", 0.7, "efficiency", 14),
        ("exposed_share", 0.021, "exposed", 8), ("compute_imbalance", 0.031, "imbalance of attention", 4),
        ("area_imbalance", 0.031, "imbalance of mask", 2), ("memory_off", 0.11, "peak memory", 1),
    ],
)
def test_missed_bars(figure: str, value: float, word: str, count: int) -> None:
    missed = [what for what, passed in verdicts(made_up_cells(**{figure: value})).items() if not passed]
    assert len(missed) == count and all(what.startswith(word) for what in missed)
    summary = report.summarise(made_up_cells(**{figure: value}), True)
    complaints = report.complain({"cells": [], "summary": summary, "valid": True})
    assert len(complaints) == count and all(f"{value:.4g}, the bar is at " in complaint for complaint in complaints)


def test_a_mode_that_is_chosen_and_slow() -> None:
    cells = made_up_cells()
    times = cells["mha_8k"]["passes"]["forward_backward"]["entries"]["all_to_all"]["ms"]
    what = "mode chosen over the faster one, mha_8k"
    for median, passed, note in ((0.88, True, "ring is chosen, all_to_all is faster"), (0.86, False, "ring is chosen"),
                                 (1.1, True, "ring")):  # fmt: skip
        times["median"] = median
        (line,) = [line for line in report.summarise(cells, True) if line["what"] == what]
        assert line["value"] == pytest.approx(max(1.0, 1 / median)) and line["passed"] is passed
        assert line["note"].startswith(note)
    cells["mha_8k"]["chosen"] = "ring 2 x all_to_all 2"
    assert verdicts(cells)[what] is None


def test_what_is_not_judged() -> None:
    assert set(verdicts(made_up_cells(efficiency=0.1), judged=False).values()) == {None}
    assert set(verdicts({}).values()) == {None}
    cells = made_up_cells()
    cells["gqa_8k"]["errors"].append("ring differs")
    cells["mha_32k"]["passes"]["forward"]["entries"] = {
        "alone": {"reason": "out of memory"}, "ring": {"exposed_share": 0.01},
    }
    lines = {line["what"]: line for line in report.summarise(cells, True)}
    assert lines["efficiency of the ring, gqa_8k forward"]["note"] == "results disagree"
    line = lines["efficiency of the ring, mha_32k forward"]
    assert (line["value"], line["passed"], line["note"]) == (None, None, "alone: out of memory")
    assert lines["exposed communication, mha_32k forward"]["passed"] is True
    complaints = report.complain({"cells": list(cells.values()), "summary": [], "valid": False,
                                  "gemm": {"tflops": {"median": 700.0}}})
    assert complaints == ["gqa_8k: ring differs", "the run is invalid: its GEMM ran at 700 TFLOP/s, 760 is the least"]


def test_results_judged_by_other_bars_are_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = made_up_cells()
    result = {"benchmark": "context_parallel", "judged": True, "cells": list(cells.values()),
              "csrc_hash": timing._build.csrc_hash(), "summary": report.summarise(cells, True)}
    assert not check_results.stale_results({"a.json": result})
    monkeypatch.setattr(report, "BARS", [report.BARS[0]._replace(bar=0.5), *report.BARS[1:]])
    assert check_results.stale_results({"a.json": result}) == ["a.json: judged by other bars than the tree's"]


# ---- command line ----------------------------------------------------------------------------------------------------


def test_whole_runs_are_kept_beside_the_others() -> None:
    assert context_parallel.parse_arguments(["--device", "cuda", "--steps"]).is_whole
    for flags in (["--scale", "2"], ["--cells", "mha"], ["--peers", "ring"], ["--sm-margin", "4"], ["--device", "cpu"]):
        assert not context_parallel.parse_arguments(["--device", "cuda", *flags]).is_whole
    path = timing.default_output("context_parallel", "NVIDIA H200", 8)
    assert path == ROOT / "benchmarks" / "results" / "context_parallel_8xh200.json"


@pytest.mark.parametrize(
    ("world", "flags", "message"),
    [
        (None, [], "expected two ranks or more: torchrun"),
        ("1", [], "expected two ranks or more: torchrun"),
        ("2", ["--device", "cpu", "--cells", "64m"], "no case contains '64m'"),
        ("2", ["--device", "cpu", "--peers", "cudnn"], "unknown peer 'cudnn'"),
    ],
)
def test_useless_arguments_teach(
    world: str | None, flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world:
        monkeypatch.setenv("WORLD_SIZE", world)
    assert context_parallel.main(flags) == 2 and message in capsys.readouterr().err
