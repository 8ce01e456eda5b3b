"""Context parallelism beside one GPU: `torchrun --standalone --nproc-per-node N benchmarks/context_parallel.py`.

    alone               whole sequences by flash_attn_func, on all ranks at once and without a message among them; its
                        time is the mean of theirs, since no two GPUs are equally fast
    ring, all_to_all    ContextParallel in that mode, all ranks on the same sequences
    ring_again          the ring, in whose backward all K/V come again. In ring itself those of the last two steps
                        still lie where the forward got them: as in a layer whose activations are checkpointed, or in
                        a model's last layer. Other layers' forwards come in between, which is ring_again
    ring_margin_4, ...  the ring again, its attention leaving so many SMs to messages (`--sm-margins`)
    torch_...           PyTorch's own context_parallel: over cuDNN, with all-gather and with all-to-all; over its
                        FlashAttention-2

All get the same N(0, 1) tensors and take turns, ranks side by side, from a moment that all have reached; a call that
ranks share takes as long as its slowest rank. (A GPU's clock gives way under load that lasts: an H200's after 50 ms, by
10 % and more, and one that has rested is faster for over a second. So no GPU rests while another one runs alone, calls
come in an order that is drawn anew each time, and GPUs rest before each call for REST times what the one before took.
Cases with a call of LONG_MS and more find the GPUs warm instead: a call is timed as BLOCK_MS of it, one after the other
as the layers of a model come, right behind BLOCK_MS that do not count; all calls have BLOCKS of these, in an order that
is drawn anew, too. Of single ones the slowest rank's time would be that of whichever GPU's clock is low just then.)
Every rank compares its rows of out, dq, dk and dv with what it computes alone; results that differ are an error and no
figure. Efficiency is the time alone over ranks times the time together. Further calls, not timed, record on every rank
when attention computes and when messages travel (`fa3_dist.parallel.observe`): time is exposed if messages are under
way and no attention. `bound` is the efficiency that the links allow by themselves: the bytes that the busiest rank must
move take so long at the measured bandwidth (of copy engines, where the ring has them), and the ring can hide all of
them behind attention, the all-to-all those of all but one part of a rank's heads.

What is run, with two GPUs in about four minutes:

    make context                                               all cases but the million tokens; keeps its figures
    make context ARGS="--cells gqa_1m --peers ring"            1 M tokens: that they fit, and the peak of memory
    make context ARGS="--cells gqa_1m --peers ring --scale 4"  the same on 256 k, with the results checked
    FA3_DIST_PEER_COPIES=0 make context                        the ring's messages by NCCL, not by copy engines
    FA3_DIST_PEER_COPIES=0 TORCH_NCCL_HIGH_PRIORITY=1 make context ARGS="--cells 8k,32k --peers ring,ring_margin_4"
                                                               messages before attention where both wait for SMs

The ring with each margin of SMs stands beside the ring in the tables, and a line at the end compares them; copy engines
have no use for one. The mode that mode="auto" would take is held against the faster one of both in every case.

The bars are for two GPUs. On CPUs (gloo) it runs at small sizes, `--scale 256`, to try it out: such figures are not
judged, nor are those of more ranks. The exit status is 1 if a bar is missed or an output is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import math
import os
import random
import statistics
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import timing
import torch
import torch.distributed as dist
from attention import GRADIENTS, LARGEST_DIFFERENCE, OUT, name_list
from attention_cases import Case, Inputs, make_inputs
from attention_peers import CannotRun, first_result, ours, sdpa_func
from attention_report import GEMM_LEAST
from context_parallel_cases import (
    Problem,
    all_to_all_moved,
    busiest_link,
    describe,
    flop,
    problems,
    ring_memory,
    ring_moved,
    window,
)
from context_parallel_report import cell_lines, complain, draw, print_summary, step_lines, summarise
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.attention import SDPBackend

from fa3_dist.parallel import ContextParallel, Layout, imbalance, plan
from fa3_dist.parallel.all_to_all import LEAST_PART, head_parts
from fa3_dist.parallel.context import LocalBatch
from fa3_dist.parallel.exchange import DistributedExchange
from fa3_dist.parallel.observe import (
    COMMUNICATION,
    COMPUTE,
    Span,
    Timeline,
    busy,
    exposed,
    length,
    mark,
    milliseconds,
    uncovered,
)
from fa3_dist.parallel.plan import Links, exposed_by_parts, links_of
from fa3_dist.parallel.sharding import shard

REPEATS, WARMUPS, TRACES = 20, 3, 5
REST = 1.5
LONG_MS, BLOCK_MS, BLOCKS = 50, 800, 4
MOST_AHEAD = 4  # runs
SPIN_MS = 5.0  # longer than the host takes to launch a ring of 8 in both directions
CYCLES_OF_MS = 2_000_000  # at 2 GHz
JUDGED_RANKS = 2  # that the bars are for
TIMEOUT = timedelta(minutes=5)
MODES = ("ring", "all_to_all")
AGAIN = "ring_again"
TORCH = {  # PyTorch's own: backend, and how keys and values travel
    "torch_cudnn": (SDPBackend.CUDNN_ATTENTION, "allgather"),
    "torch_cudnn_alltoall": (SDPBackend.CUDNN_ATTENTION, "alltoall"),
    "torch_flash": (SDPBackend.FLASH_ATTENTION, "allgather"),
}
SM_MARGINS = {"cuda": [0, 4, 8], "cpu": [0]}

Results = tuple[Tensor, ...]  # out, and of a pass with a backward dq, dk, dv


class Call(NamedTuple):
    """What is timed. `around` is entered before the clock starts."""

    run: Callable[[], Results]
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


class Setup(NamedTuple):
    """What a run measures with, on one rank."""

    device: torch.device
    mesh: DeviceMesh
    host_group: Any  # for messages that don't pass through the device
    modes: dict[str, ContextParallel]
    links: Links
    repeats: int

    @property
    def rank(self) -> int:
        return self.mesh.get_rank()

    @property
    def world(self) -> int:
        return self.mesh.size()

    def of_all_ranks(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def exchange(self, name: str) -> DistributedExchange | None:
        """The messages of a mode of ours; None for other names."""
        exchange = self.modes[name].exchange if name in self.modes else None
        return exchange if isinstance(exchange, DistributedExchange) else None

    def align(self, rest_ms: float = 0.0) -> None:
        """What follows begins on all ranks at about the same time: on CUDA on the devices, which rest for some
        milliseconds before, hosts running ahead."""
        if self.device.type == "cuda":
            torch.cuda._sleep(round(max(rest_ms, SPIN_MS) * CYCLES_OF_MS))
            dist.all_reduce(torch.zeros(1, device=self.device))
        else:
            dist.barrier(group=self.host_group)


# ---- calls -----------------------------------------------------------------------------------------------------------


def run_pass(attend: Callable[[], Tensor], leaves: Sequence[Tensor], dout: Tensor | None,
             between: Callable[[], None] = lambda: None) -> Results:
    """out, detached; with a dout the gradients of the leaves too. between: called before the backward."""
    if dout is None:
        with torch.no_grad():
            return (attend(),)
    out = attend()
    between()
    return (out.detach(), *torch.autograd.grad(out, leaves, dout))


def alone_call(case: Case, x: Inputs) -> Call:
    """Whole sequences on one rank."""
    return Call(functools.partial(run_pass, ours(case, x), x[:3], x.dout))


def local_inputs(x: Inputs, batch: LocalBatch) -> Inputs:
    """This rank's rows, (1, T, heads, head_dim) each."""

    def local(whole: Tensor) -> Tensor:
        rows = shard(whole.detach().flatten(0, -3), batch.layout, batch.rank).unsqueeze(0).clone()
        return rows.requires_grad_(whole.requires_grad)

    q, k, v = map(local, x[:3])
    return Inputs(q, k, v, x.cu_seqlens, None if x.dout is None else local(x.dout))


def our_call(case: Case, x: Inputs, batch: LocalBatch, between: Callable[[], None] = lambda: None) -> Call:
    """A mode of ours on this rank's rows. between: as in `run_pass`."""
    options: dict[str, Any] = {"causal": case.causal, "window_size": (-1 if case.left is None else case.left, -1)}
    attend = functools.partial(batch.attention, x.q, x.k, x.v, **options)
    return Call(functools.partial(run_pass, attend, x[:3], x.dout, between))


def again_call(case: Case, x: Inputs, batch: LocalBatch, exchange: DistributedExchange | None) -> Call:
    """The ring, which forgets what has come before the backward. Raises CannotRun where it remembers nothing."""
    if x.dout is None:
        raise CannotRun("it is the ring: the backward differs")
    if exchange is None or not exchange.has_copies:
        raise CannotRun("it is the ring: without copy engines K/V always come again")
    return our_call(case, x, batch, exchange.forget)


def torch_call(name: str, case: Case, x: Inputs, mesh: DeviceMesh) -> Call:
    """PyTorch's own, whose ranks hold the very rows that ours hold. Raises CannotRun for what it cannot express."""
    world = mesh.size()
    if case.packed or case.left is not None or not case.causal:
        raise CannotRun("torch's context_parallel takes whole causal sequences: no packed documents and no windows")
    if sum(case.lengths) % (2 * world) or len(case.lengths) > 1:
        raise CannotRun(f"torch's context_parallel balances sequences of a multiple of {2 * world} tokens alone")
    if mesh.device_type != "cuda":
        raise CannotRun("torch's context_parallel is for CUDA")
    try:
        from torch.distributed.tensor.experimental import context_parallel
        from torch.distributed.tensor.experimental._attention import set_rotate_method
    except ImportError as error:
        raise CannotRun(f"torch {torch.__version__}: {error}") from None
    backend, rotation = TORCH[name]

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        # NOTE: it finds out from some buffer whether the load is balanced; the tensors proper are sharded already.
        buffer = torch.zeros(2 * world, device=x.q.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            set_rotate_method(rotation)
            with context_parallel(mesh, buffers=[buffer], buffer_seq_dims=[0]):
                yield

    attend = functools.partial(sdpa_func, backend, x.q, x.k, x.v, causal=True)
    return Call(functools.partial(run_pass, attend, x[:3], x.dout), around)


# ---- measuring a pass of a problem -----------------------------------------------------------------------------------


class Measurement:
    """A pass of a problem on its way to figures; all ranks make the same decisions, so that calls stay together."""

    def __init__(self, problem: Problem, which: str, setup: Setup, peers: Sequence[str]) -> None:
        self.problem, self.case, self.which, self.setup, self.peers = problem, problem.case, which, setup, peers
        cp = setup.modes["ring"]
        tokens = torch.zeros(1, sum(self.case.lengths), dtype=torch.int64)
        cu_seqlens = (0, *accumulate(self.case.lengths)) if self.case.packed else None
        self.batches = {name: mode.shard(tokens, cu_seqlens=cu_seqlens) for name, mode in setup.modes.items()}
        self.layout = self.batches["ring"].layout
        assert cp.rank == setup.rank and all(batch.layout == self.layout for batch in self.batches.values())
        self.calls: dict[str, Call] = {}
        self.entries: dict[str, dict[str, Any]] = {}
        self.errors: list[str] = []

    def measure(self) -> dict[str, Any]:
        """The pass as a result file has it."""
        x = make_inputs(self.case, str(self.setup.device), requires_grad=self.which == "forward_backward")
        local = local_inputs(x, self.batches["ring"])
        expected = self._check_alone(alone_call(self.case, x), local)
        del x
        for name in self.peers:
            if name != "alone":
                self._check(name, functools.partial(self._build, name, local), local, expected)
        del expected
        self._time()
        for name in filter(self.calls.__contains__, self.setup.modes):
            self._trace(name)
            self._account(name)
        return {"flop": flop(self.case, self.which), "entries": self.entries, "errors": self.errors}

    def _build(self, name: str, local: Inputs) -> Call:
        if name == AGAIN:
            return again_call(self.case, local, self.batches[name], self.setup.exchange(name))
        if name in self.setup.modes:
            return our_call(self.case, local, self.batches[name])
        return torch_call(name, self.case, local, self.setup.mesh)

    # ---- checks

    def refuse(self, name: str, reason: str, is_error: bool = False) -> None:
        """No figure, and why."""
        self.calls.pop(name, None)
        self.entries[name] = {"ms": None, "tflops": None, "reason": reason}
        if is_error:
            self.errors.append(f"{self.which}, {name} {reason}")

    def _first(self, name: str, call: Callable[[], Call], local: Inputs) -> tuple[Call, Results] | None:
        """Builds and runs a call on every rank; None, and refused, where one cannot. Notes the memory at its peak."""
        reason, built, results = None, None, None
        exchange = self.setup.exchange(name)
        if exchange is not None:
            exchange.free_places()
        before = _allocated(self.setup.device)
        try:
            built = call()
            with built.around():
                results = first_result(built.run)
        except CannotRun as error:
            reason = str(error)
        peak = _peak_since(before, self.setup.device)
        if peak is not None and exchange is not None:
            peak += exchange.place_bytes
        reasons = self.setup.of_all_ranks(reason)
        if any(reasons):
            rank = next(rank for rank, each in enumerate(reasons) if each)
            self.refuse(name, reasons[rank] if len(set(reasons)) == 1 else f"rank {rank}: {reasons[rank]}")
            del results
            _free(self.setup.device)
            return None
        assert built is not None and results is not None
        inputs = sum(tensor.nbytes for tensor in (*local[:3], local.dout) if tensor is not None)
        peaks = self.setup.of_all_ranks(None if peak is None else peak + inputs)
        self.entries[name] = {"peak_bytes": None if None in peaks else peaks}
        self.calls[name] = built
        return built, results

    def _check_alone(self, call: Call, local: Inputs) -> Results | None:
        """This rank's rows of what it computes alone; None where that cannot be."""
        if not self.problem.alone:
            self.refuse("alone", "left out: it would take minutes")
            return None
        found = self._first("alone", lambda: call, local)
        if found is None:
            return None
        del self.entries["alone"]["peak_bytes"]  # NOTE: whole inputs are beside it
        rank = self.setup.rank
        return tuple(shard(result.flatten(0, -3), self.layout, rank).clone() for result in found[1])

    def _check(self, name: str, build: Callable[[], Call], local: Inputs, expected: Results | None) -> None:
        """Accepts a call if its results are those of one rank alone, on every rank; else it is an error."""
        found = self._first(name, build, local)
        if found is None:
            return
        if expected is None:
            self.entries[name]["unchecked"] = "one rank alone has no results to compare with"
            return
        results = [result.flatten(0, -3) for result in found[1]]
        distances = list(map(Distance.between, results, expected))
        differences = list(map(relative_differences, zip(*self.setup.of_all_ranks(distances), strict=True)))
        bounds = [LARGEST_DIFFERENCE[OUT], *[LARGEST_DIFFERENCE[GRADIENTS]] * 3]
        for result, of_ranks, bound in zip((*OUT, *GRADIENTS), differences, bounds):
            for rank, difference in enumerate(of_ranks):
                if not difference <= bound:
                    reason = f"differs by {difference:.1e} in {result} on rank {rank}, relative L2"
                    return self.refuse(name, f"{reason}: {bound:.0e} is the bound", is_error=True)
        self.entries[name]["difference"] = max(map(max, differences))

    # ---- times

    def _time(self) -> None:
        """Times the calls in turn."""
        times, late = time_in_turn(self.calls, self.setup, *runs_of(self.problem, self.setup.repeats))
        total = flop(self.case, self.which)
        for name, local in times.items():
            of_ranks = self.setup.of_all_ranks((local, late[name]))
            times_of_ranks = [values for values, _ in of_ranks]
            if name == "alone":
                self.entries[name] |= timing.speed(of_the_mean(times_of_ranks), total)
            else:
                self.entries[name] |= timing.speed(of_the_slowest(times_of_ranks), total // self.setup.world)
            self.entries[name]["ms_of_ranks"] = [statistics.median(values) for values in times_of_ranks]
            self.entries[name]["host_was_late"] = max(count for _, count in of_ranks)
        if alone := self.entries.get("alone", {}).get("ms"):
            for name, entry in self.entries.items():
                if name != "alone" and entry.get("ms"):
                    entry["efficiency"] = alone["median"] / self.setup.world / entry["ms"]["median"]

    # ---- where the time goes

    def _trace(self, name: str) -> None:
        """Spans of all ranks in the call whose exposed time is the median of some."""
        traces = []
        for _ in range(TRACES if self.problem.repeats is None else 1):
            spans, taken = trace(self.calls[name], self.setup, self.setup.modes[name])
            of_ranks = self.setup.of_all_ranks((spans, taken))
            traces.append(TraceFigures.of([each for each, _ in of_ranks], max(time for _, time in of_ranks)))
        traces.sort(key=lambda figures: figures.exposed_ms)
        self.entries[name] |= traces[len(traces) // 2]._asdict()

    def _account(self, name: str) -> None:
        """Bytes moved beside those that must be, the bound that they put on efficiency, and the memory expected."""
        setup, entry = self.setup, self.entries[name]
        is_ring = name != "all_to_all"
        exchange = setup.exchange(name)
        has_places = exchange is not None and exchange.place_bytes > 0
        remains = has_places and name != AGAIN
        count = functools.partial(ring_moved, remains=remains) if is_ring else all_to_all_moved
        moved = [count(self.case, self.layout, rank, self.which) for rank in range(setup.world)]
        entry["must_send"] = [each.sent for each in moved]
        links = setup.links.in_ring if is_ring else setup.links
        entry["link_ms"] = 1e3 * busiest_link(moved) / links.within(setup.world)
        if alone := self.entries.get("alone", {}).get("ms"):
            compute = alone["median"] / setup.world
            if is_ring:
                least = max(compute, entry["link_ms"])
            else:
                tokens, least_part = sum(self.layout.documents), LEAST_PART[setup.device.type]
                entry["parts"] = head_parts(tokens, self.case.heads, self.case.kv_heads, setup.world, least_part)
                least = compute + exposed_by_parts(entry["link_ms"], compute, entry["parts"])
            entry["bound"] = compute / least
        if is_ring:
            memory = [
                ring_memory(self.case, self.layout, rank, self.which, setup.device.type, has_places)
                for rank in range(setup.world)
            ]
            entry["expected_bytes"] = [sum(each.values()) for each in memory]
            entry["expected_bytes_of_rank_0"] = memory[0]
            if entry["peak_bytes"]:
                entry["memory_off"] = furthest_off(entry["peak_bytes"], entry["expected_bytes"])


class Distance(NamedTuple):
    """How far a rank's rows of a result lie from what is expected, in L2."""

    difference: float
    expected: float
    elements: int

    @staticmethod
    def between(result: Tensor, expected: Tensor) -> Distance:
        """Infinite between different shapes."""
        norm = expected.float().norm().item()
        if result.shape != expected.shape:
            return Distance(math.inf, norm, expected.numel())
        return Distance((result.float() - expected.float()).norm().item(), norm, expected.numel())


def relative_differences(of_ranks: Sequence[Distance]) -> list[float]:
    """Relative L2 of every rank; rows count as no smaller than a tenth of the average of all ranks.

    The gradient of a query that sees one key is nothing but rounding, and a rank may have no other rows.
    """
    size = math.hypot(*(each.expected for each in of_ranks)) / math.sqrt(sum(each.elements for each in of_ranks))
    least = [max(0.1 * size * math.sqrt(each.elements), sys.float_info.min) for each in of_ranks]
    return [each.difference / max(each.expected, floor) for each, floor in zip(of_ranks, least)]


def runs_of(problem: Problem, repeats: int) -> tuple[int, int]:
    """How often its calls run, and how often before, which does not count but says whether they are long."""
    few = problem.repeats
    return (repeats, WARMUPS) if few is None else (min(few, repeats), 1 if few > 1 else 0)


def time_in_turn(
    calls: Mapping[str, Call], setup: Setup, repeats: int, warmups: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Milliseconds on this rank of `repeats` runs of each call, after runs that don't count, with a cold L2.

    And in how many of them the device had begun before the host was through with the call: then the time holds some of
    the host's. If a call proves long, all are timed in blocks.
    """
    flush = timing.Flush().overwrite if setup.device.type == "cuda" else lambda: None
    times = Times(setup.device, calls)
    order, draw, slowest, rest_ms = list(calls), random.Random(0), dict.fromkeys(calls, 0.0), 0.0
    for index in range(warmups + repeats):
        if index == warmups > 0:
            before, times = times, Times(setup.device, calls)
            slowest = slowest_of_ranks({name: values[-1] for name, values in before.milliseconds().items()}, setup)
            if max(slowest.values()) >= LONG_MS:
                time_in_blocks(calls, setup, slowest, times, draw)
                break
        draw.shuffle(order)
        for name in order:
            with calls[name].around():
                flush()
                setup.align(rest_ms)
                times.add(name, calls[name])
            rest_ms = REST * slowest[name]
    return times.milliseconds(), times.late


def time_in_blocks(
    calls: Mapping[str, Call], setup: Setup, last_ms: Mapping[str, float], times: Times, draw: random.Random
) -> None:
    """The same of BLOCKS of each call, the mean of the runs of each; last_ms: as long as one run takes.

    `draw`: of the order, the same on all ranks.
    """
    order = list(calls)
    for _ in range(BLOCKS):
        draw.shuffle(order)
        for name in order:
            runs = math.ceil(BLOCK_MS / last_ms[name])
            with calls[name].around():
                setup.align()
                run_in_a_row(calls[name], runs, setup.device)
                times.add(name, calls[name], runs)


def run_in_a_row(call: Call, runs: int, device: torch.device) -> None:
    """Runs a call so many times without a pause.

    NOTE: the host is never further ahead than by some: memory that streams share is free when the device has used it.
    """
    ends: deque[Any] = deque()
    for _ in range(runs):
        if len(ends) == MOST_AHEAD:
            wait_until(ends.popleft())
        call.run()
        ends.append(mark(device))


class Times:
    """When runs of calls began and ended on this rank."""

    def __init__(self, device: torch.device, names: Iterable[str]):
        self.device = device
        self._marks: dict[str, list[tuple[Any, Any, int]]] = {name: [] for name in names}
        self.late = dict.fromkeys(self._marks, 0)  # runs that the device began before the host was through with them

    def add(self, name: str, call: Call, runs: int = 1) -> None:
        """Runs a call, so many times without a pause."""
        start = mark(self.device)
        call.run()
        self.late[name] += self.device.type == "cuda" and start.query()
        run_in_a_row(call, runs - 1, self.device)
        self._marks[name].append((start, mark(self.device), runs))

    def milliseconds(self) -> dict[str, list[float]]:
        """Of a run, every time that it was added."""
        return {name: [milliseconds(start, end) / runs for start, end, runs in marks]
                for name, marks in self._marks.items()}


def wait_until(moment: Any) -> None:
    """The host waits for a mark on CUDA."""
    if isinstance(moment, torch.cuda.Event):
        moment.synchronize()


def slowest_of_ranks(times: Mapping[str, float], setup: Setup) -> dict[str, float]:
    """The longest of all ranks' times, by name."""
    of_ranks = setup.of_all_ranks(dict(times))
    return {name: max(of_rank[name] for of_rank in of_ranks) for name in times}


def of_the_slowest(times_of_ranks: Sequence[Sequence[float]]) -> list[float]:
    """How long each of several calls took, on the rank that took longest."""
    return [max(times) for times in zip(*times_of_ranks, strict=True)]


def of_the_mean(times_of_ranks: Sequence[Sequence[float]]) -> list[float]:
    """How long each of several calls took, on the mean of the ranks."""
    return [statistics.mean(times) for times in zip(*times_of_ranks, strict=True)]


def furthest_off(measured: Sequence[float], expected: Sequence[float]) -> float:
    """The largest distance from what is expected, as a share of it."""
    return max(abs(each / wanted - 1) for each, wanted in zip(measured, expected, strict=True))


def trace(call: Call, setup: Setup, mode: ContextParallel) -> tuple[list[Span], float]:
    """This rank's spans in one run of a call, and the milliseconds of the run."""
    with call.around():
        setup.align()
        mode.exchange.observer = timeline = Timeline(setup.device)
        start = mark(setup.device)
        call.run()
        end = mark(setup.device)
        mode.exchange.observer = None
    return timeline.spans(), milliseconds(start, end)


class TraceFigures(NamedTuple):
    """What the spans of all ranks in one call come to."""

    traced_ms: float
    exposed_ms: float  # of the rank with most of it
    exposed_share: float  # of the call's time
    compute_imbalance: float  # busiest rank's attention time over the mean, minus 1
    bytes_sent: list[int]  # by rank
    steps: list[dict[str, Any]]  # the spans

    @staticmethod
    def of(spans_of_ranks: Sequence[Sequence[Span]], taken: float) -> TraceFigures:
        """taken: milliseconds of the call on its slowest rank."""
        compute = [busy(spans, COMPUTE) for spans in spans_of_ranks]
        mean = sum(compute) / len(compute)
        largest = max(map(exposed, spans_of_ranks))
        return TraceFigures(
            taken, largest, largest / taken, max(compute) / mean - 1 if mean else 0.0,
            [sum(span.bytes_sent for span in spans) for spans in spans_of_ranks],
            [step for rank, spans in enumerate(spans_of_ranks) for step in described_steps(rank, spans)],
        )


def described_steps(rank: int, spans: Sequence[Span]) -> list[dict[str, Any]]:
    """The spans as a result file has them; of messages also the part that no attention hides."""
    covering = [(span.start, span.end) for span in spans if span.kind == COMPUTE]
    steps = []
    for span in spans:
        step = {"rank": rank, **span._asdict(), "start": round(span.start, 4), "end": round(span.end, 4)}
        if span.kind == COMMUNICATION:
            step["exposed"] = round(length(uncovered([(span.start, span.end)], covering)), 4)
        else:
            del step["bytes_sent"]
        steps.append(step)
    return steps


def _allocated(device: torch.device) -> int:
    """Bytes allocated on the device now, from where its peak is counted anew; 0 on the CPU."""
    if device.type != "cuda":
        return 0
    _free(device)
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak_since(before: int, device: torch.device) -> int | None:
    """Bytes beside `before` at the peak; None on the CPU, which does not count them."""
    return torch.cuda.max_memory_allocated() - before if device.type == "cuda" else None


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(problem: Problem, setup: Setup, peers: Sequence[str]) -> dict[str, Any]:
    """All passes of a problem."""
    passes: dict[str, Any] = {}
    for which in problem.passes:
        measurement = Measurement(problem, which, setup, peers)
        passes[which] = measurement.measure()
        _free(setup.device)
    errors = [error for each in passes.values() for error in each.pop("errors")]
    layout = measurement.layout
    return {
        **describe(problem, layout), "area_imbalance": imbalance(layout, **window(problem.case)) - 1,
        "chosen": chosen_mode(problem.case, layout, setup), "passes": passes, "errors": errors,
    }


def chosen_mode(case: Case, layout: Layout, setup: Setup) -> str:
    """The mode that mode="auto" takes."""
    call = plan.Call(case.heads, case.kv_heads, case.head_dim, case.head_dim_v, case.dtype, **window(case))
    return plan.choose(layout, call, setup.links, setup.device.type).mode


# ---- command line ----------------------------------------------------------------------------------------------------


def choose_problems(found: Sequence[Problem], patterns: Sequence[str]) -> list[Problem]:
    """The problems whose name contains one of the patterns; without patterns all that are not by request.

    Raises ValueError for a pattern that matches none.
    """
    for pattern in patterns:
        if not any(pattern in problem.name for problem in found):
            names = ", ".join(problem.name for problem in found)
            raise ValueError(f"no case contains '{pattern}': they are {names}")
    if not patterns:
        return [problem for problem in found if not problem.by_request]
    return [problem for problem in found if any(pattern in problem.name for pattern in patterns)]


def choose_peers(wanted: Sequence[str], margins: Sequence[int]) -> list[str]:
    """One rank alone and the wanted ones, in the usual order; all without a wish. ValueError for an unknown one.

    margins: of SMs; the ring runs with the first one, and once more with each of the others.
    """
    peers = ["alone", *MODES, AGAIN, *map(ring_with_margin, margins[1:]), *TORCH]
    for name in wanted:
        if name not in peers:
            raise ValueError(f"unknown peer '{name}': the peers are {', '.join(peers)}")
    return [name for name in peers if not wanted or name == "alone" or name in wanted]


def ring_with_margin(margin: int) -> str:
    """The name of a ring that leaves so many SMs to messages."""
    return f"ring_margin_{margin}"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line; `is_whole` says that the run is the one whose figures are kept."""
    parser = argparse.ArgumentParser(description="Context parallelism beside one GPU. Start it with torchrun.")
    add = parser.add_argument
    add("--draw", type=Path, metavar="JSON", help="only draw a result file's picture again (without torchrun)")
    add("--output", type=Path, help="result file, its picture goes beside it (default: benchmarks/results/"
        "context_parallel_NxGPU.json for all cases on GPUs, else none)")
    add("--cells", type=name_list, default=[], help='parts of case names: "32k,packed"; gqa_1m runs only if named here')
    add("--peers", type=name_list, default=[], help="beside one rank alone: "
        f'"{",".join((*MODES, AGAIN, ring_with_margin(4), *TORCH))}" (default: all)')
    add("--repeats", type=int, default=REPEATS, help=f"timings of each call (default: {REPEATS})")
    add("--scale", type=int, default=1, help="divide the tokens of all documents by this (default: 1)")
    add("--sm-margins", type=margin_list, metavar="SMS", help="SMs that attention leaves to messages: the ring runs "
        "once with each, and is judged with the first (default: 0,4,8 on GPUs, else 0)")
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--steps", action="store_true", help="print every step of every rank too")
    parsed = parser.parse_args(arguments)
    if min(parsed.repeats, parsed.scale) < 1:
        parser.error("--repeats, --scale: expected 1 or more")
    kept = {name: value for name, value in vars(parsed).items() if name not in ("output", "steps", "device")}
    parsed.is_whole = parsed.device == "cuda" and all(parser.get_default(name) == value for name, value in kept.items())
    parsed.sm_margins = parsed.sm_margins or SM_MARGINS[parsed.device]
    return parsed


def margin_list(text: str) -> list[int]:
    """ "0,4,8" as numbers, each once."""
    margins = [int(each) for each in text.split(",")]
    if min(margins) < 0 or len(set(margins)) < len(margins):
        raise argparse.ArgumentTypeError(f"expected different numbers of SMs, such as 0,4,8, got {text}")
    return margins


def connect(device_type: str) -> torch.device:
    """Joins the group that torchrun described and returns this rank's device."""
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, timeout=TIMEOUT)
        return device
    dist.init_process_group("gloo", timeout=TIMEOUT)
    return torch.device("cpu")


def make_setup(device: torch.device, repeats: int, margins: Sequence[int]) -> Setup:
    """Connections of all modes, and the links between the ranks, measured."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("cp",))
    modes = {name: ContextParallel(mesh, mode=name, sm_margin=margins[0]) for name in MODES}
    modes[AGAIN] = ContextParallel(mesh, mode="ring", sm_margin=margins[0])
    modes |= {ring_with_margin(each): ContextParallel(mesh, mode="ring", sm_margin=each) for each in margins[1:]}
    exchange = modes["ring"].exchange
    assert isinstance(exchange, DistributedExchange)
    links = links_of(exchange)
    return Setup(device, mesh, dist.new_group(backend="gloo", timeout=TIMEOUT), modes, links, repeats)


def gemm_tflops(setup: Setup) -> dict[str, Any] | None:
    """A bf16 GEMM on all GPUs at once, the figures of the slowest; None on CPUs."""
    if setup.device.type != "cuda":
        return None
    ms = timing.time_in_turn({"gemm": timing.gemm()}, timing.Flush().overwrite, repeats=20)["gemm"]
    speeds = [timing.speed(each, timing.GEMM_FLOP) for each in setup.of_all_ranks(ms)]
    return min(speeds, key=lambda speed: speed["tflops"]["median"])


def header(parsed: argparse.Namespace, setup: Setup) -> dict[str, Any]:
    """Where the figures come from."""
    is_cuda = setup.device.type == "cuda"
    ring = setup.exchange("ring")
    return {
        "benchmark": "context_parallel",
        **timing.measured_on(None if is_cuda else "CPU"),
        "ranks": setup.world,
        "hosts": len(set(setup.of_all_ranks(os.uname().nodename))),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if is_cuda else None,
        "bandwidth": dict(setup.links.bandwidth), "latency": setup.links.latency,
        "copies": setup.links.copies and setup.links.copies._asdict(),
        "repeats": parsed.repeats, "scale": parsed.scale, "sm_margins": parsed.sm_margins,
        "nccl_high_priority": os.environ.get("TORCH_NCCL_HIGH_PRIORITY"),
        "peer_copies": ring is not None and ring.has_copies,
        "selected": {"cells": parsed.cells, "peers": parsed.peers},
        "judged": is_cuda and parsed.scale == 1 and setup.world == JUDGED_RANKS,
    }


def run(
    chosen: Sequence[Problem], peers: Sequence[str], parsed: argparse.Namespace, setup: Setup,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Measures the problems one after the other, saving the result after each. The GEMM runs before and after them."""
    about = header(parsed, setup)
    gemm = gemm_tflops(setup)
    cells: list[dict[str, Any]] = []

    def result() -> dict[str, Any]:
        valid = gemm["tflops"]["median"] >= GEMM_LEAST if gemm else None
        summary = summarise({cell["name"]: cell for cell in cells}, about["judged"])
        return {**about, "gemm": gemm, "valid": valid, "cells": cells, "summary": summary}

    started = time.monotonic()
    for index, problem in enumerate(chosen):
        cells.append(measure(problem, setup, peers))
        if setup.rank == 0:
            progress = f"\n[{index + 1}/{len(chosen)}, {time.monotonic() - started:.0f} s]"
            print(progress, *cell_lines(cells[-1]), sep="\n")
            if parsed.steps:
                print(*step_lines(cells[-1]), sep="\n")
            sys.stdout.flush()
            save(result())
    if gemm:
        again = gemm_tflops(setup)
        assert again is not None
        gemm = min(gemm, again, key=lambda speed: speed["tflops"]["median"])
    return result()


def redraw(path: Path) -> int:
    """Draws a result file's picture again; returns the exit status."""
    drawn = draw(json.loads(path.read_text()), path.with_suffix(".png"))
    print(path.with_suffix(".png") if drawn else "matplotlib is not installed: pip install matplotlib")
    return 0 if drawn else 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parsed = parse_arguments(arguments)
    if parsed.draw:
        return redraw(parsed.draw)
    trouble = None
    if int(os.environ.get("WORLD_SIZE", 0)) < 2:
        trouble = "expected two ranks or more: torchrun --nproc-per-node 2 benchmarks/context_parallel.py"
    elif parsed.device == "cuda":
        trouble = timing.why_no_hopper() or timing.why_no_library()
    try:
        chosen = choose_problems(problems(parsed.scale), parsed.cells)
        peers = choose_peers(parsed.peers, parsed.sm_margins)
    except ValueError as error:
        trouble = str(error)
    if trouble:
        print(trouble, file=sys.stderr)
        return 2
    if parsed.device == "cuda":
        os.environ["FA3_DIST_STRICT"] = "1"  # our kernels or none
    setup = make_setup(connect(parsed.device), parsed.repeats, parsed.sm_margins)
    output = parsed.output
    if output is None and parsed.is_whole:
        output = timing.default_output("context_parallel", torch.cuda.get_device_name(), setup.world)
    save = functools.partial(timing.write_result, output) if output else lambda result: None
    result = run(chosen, peers, parsed, setup, save)
    status = 0
    if setup.rank == 0:
        save(result)
        print_summary(result)
        if output:
            print(f"written: {output}")
            if not draw(result, output.with_suffix(".png")):
                print(f"no picture, since matplotlib is not installed; --draw {output} makes it elsewhere")
        status = timing.exit_status(complain(result))
    dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(record(main)())  # torchrun then reports the first exception of any rank
