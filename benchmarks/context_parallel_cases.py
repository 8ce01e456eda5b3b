"""What context parallelism is timed on, and what each case must compute, move and keep, counted from its layout."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, NamedTuple

import attention_cases
import torch
from attention_cases import Case

from fa3_dist.algebra import accumulator_dtype
from fa3_dist.parallel.all_to_all import kv_copies
from fa3_dist.parallel.ring import KV_PLACES, LEAST_HALF, adds_at_once, backward_parts, ring_plan
from fa3_dist.parallel.schedule import Layout, Span, Step, ring_schedule, step_sizes

PASSES = ("forward", "forward_backward")
SUM_SIZE = 4  # bytes of an fp32 number: sums, lse, delta


class Problem(NamedTuple):
    """A case, what is measured of it, and how often."""

    case: Case
    passes: tuple[str, ...] = PASSES
    repeats: int | None = None  # timings of each call, at most; None: as many as are asked for
    by_request: bool = False  # runs only if --cells names it
    alone: bool = True  # beside one rank alone, whose results and time the others are compared with

    @property
    def name(self) -> str:
        return self.case.name


k = 1024


def problems(scale: int = 1) -> list[Problem]:
    """All problems, with `scale` times fewer tokens in each document (one at least)."""
    found = []
    for seqlen in (8 * k, 32 * k, 128 * k):
        for name, heads, kv_heads in (("mha", 16, 16), ("gqa", 32, 8)):
            repeats = 5 if seqlen == 128 * k else None  # half a second a call, or a whole one
            found.append(Problem(_dense(f"{name}_{seqlen // k}k", seqlen, heads, kv_heads), repeats=repeats))
    batches = json.loads(attention_cases.DOCUMENTS.read_text())["batches"]
    for name in ("web_64k", "code_64k"):
        case = Case(f"packed_{name}", tuple(batches[name]), 16, 16, 128, 128, causal=True, packed=True)
        found.append(Problem(case))
    million = _dense("gqa_1m", 1024 * k, 32, 8)
    # One GPU would take a minute a call. Its ring is compared with nothing: at --scale 4 it is.
    found.append(Problem(million, passes=("forward_backward",), repeats=1, by_request=True, alone=scale > 1))
    return [problem._replace(case=_scaled(problem.case, scale)) for problem in found]


def _dense(name: str, seqlen: int, heads: int, kv_heads: int) -> Case:
    return Case(name, (seqlen,), heads, kv_heads, 128, 128, causal=True)


def _scaled(case: Case, scale: int) -> Case:
    return replace(case, lengths=tuple(max(1, length // scale) for length in case.lengths))


def window(case: Case) -> dict[str, int | None]:
    """The mask as schedules take it."""
    return {"window_left": case.left, "window_right": 0 if case.causal else None}


def flop(case: Case, which: str) -> int:
    """Operations of a pass, of all ranks together."""
    return case.flop + (case.backward_flop if which == "forward_backward" else 0)


# ---- bytes that move -------------------------------------------------------------------------------------------------


class Moved(NamedTuple):
    """Bytes of one rank."""

    sent: int
    received: int


class Row(NamedTuple):
    """Bytes of one token in each tensor, of all heads."""

    q: int
    kv: int
    out: int
    lse: int
    dq_sum: int
    dkv_sum: int

    @staticmethod
    def of(case: Case) -> Row:
        assert accumulator_dtype(case.dtype).itemsize == SUM_SIZE
        size, kv = case.dtype.itemsize, case.kv_heads * (case.head_dim + case.head_dim_v)
        q, out = case.heads * case.head_dim, case.heads * case.head_dim_v
        return Row(q * size, kv * size, out * size, case.heads * SUM_SIZE, q * SUM_SIZE, kv * SUM_SIZE)


def ring_moved(case: Case, layout: Layout, rank: int, which: str, remains: bool = False) -> Moved:
    """What a ring moves: K and V of the tokens seen elsewhere, in each pass; in the backward their fp32 gradients.

    remains: K and V of the last steps are still there when the backward comes.
    """
    row = Row.of(case)
    steps = _remote_steps(case, layout, rank)
    come, go = sum(_rows(step.receive) for step in steps), sum(_rows(step.send) for step in steps)
    forward = Moved(go * row.kv, come * row.kv)
    if which == "forward":
        return forward
    again = steps[: -len(KV_PLACES)] if remains else steps
    sent, received = sum(_rows(step.send) for step in again), sum(_rows(step.receive) for step in again)
    return Moved(
        forward.sent + sent * row.kv + come * row.dkv_sum, forward.received + received * row.kv + go * row.dkv_sum
    )


def all_to_all_moved(case: Case, layout: Layout, rank: int, which: str) -> Moved:
    """What an all-to-all moves: q, k, v to the ranks of their heads, out and lse back; the gradients likewise."""
    world, row = layout.world, Row.of(case)
    copies = kv_copies(case.heads, case.kv_heads, world)
    kv_gradient = row.kv if copies == 1 else row.dkv_sum
    to_heads = row.q + copies * row.kv
    to_tokens = row.out + row.lse
    if which == "forward_backward":
        to_heads += row.out + row.lse  # of dout and delta
        to_tokens += row.q + copies * kv_gradient
    tokens = layout.tokens(rank)
    own, theirs = tokens * (world - 1), sum(layout.documents) - tokens  # rows, each of a part of the heads
    return Moved((own * to_heads + theirs * to_tokens) // world, (theirs * to_heads + own * to_tokens) // world)


def busiest_link(moved: list[Moved]) -> int:
    """Bytes that the busiest rank sends or receives, both directions of a link being at work at once."""
    return max(max(each) for each in moved)


def _remote_steps(case: Case, layout: Layout, rank: int) -> list[Step]:
    return [step for step in ring_schedule(layout, rank, **window(case)) if step.shift]


def _rows(spans: tuple[Span, ...]) -> int:
    return sum(span.length for span in spans)


# ---- memory of a ring ------------------------------------------------------------------------------------------------


def ring_memory(
    case: Case, layout: Layout, rank: int, which: str, device_type: str, has_places: bool = False
) -> dict[str, int]:
    """Bytes that a ring has reason to hold at its peak, by what they are; all of them O(tokens / ranks).

    The messages are those of the step whose ones are largest: K/V that are read, K/V that come, and in the backward
    dK/dV that are summed up, that go home, and that come back. With places (`DistributedExchange.room`) what comes lies
    in these, which stay from step to step.
    """
    row, tokens = Row.of(case), layout.tokens(rank)
    steps = _remote_steps(case, layout, rank)
    memory = {"q": tokens * row.q, "k, v": tokens * row.kv, "out": tokens * row.out, "lse": tokens * row.lse}
    if which == "forward_backward":
        steps.reverse()
    come = [0, *(_rows(step.receive) for step in steps), 0]  # the local step and one after the last move nothing
    go = [0, *(_rows(step.send) for step in steps), 0]
    gathered = [0, *(_rows(step.send) * (len(step.send) > 1) for step in steps), 0]  # copies of several spans
    arrived = [0] * len(come) if has_places else come
    fetched = [row.kv * (arrived[i] + arrived[i + 1] + gathered[i + 1]) for i in range(len(steps) + 1)]
    if has_places:
        backwards = row.dkv_sum if which == "forward_backward" else 0
        memory["places"] = max(_most_rows(case, layout)) * (min(len(steps), 2) * row.kv + backwards)
    if which == "forward":
        sums = tokens * case.heads * case.head_dim_v * SUM_SIZE
        return memory | {"out in fp32": sums, "messages": max(fetched)}
    memory |= {"dout": tokens * row.out, "delta": tokens * row.lse, "dq in fp32": tokens * row.dq_sum}
    memory["dk, dv in fp32"] = tokens * row.dkv_sum
    returned = [0] * len(go) if has_places else go
    in_steps = [sum(each) for each in zip(fetched, _gradients_held(case, layout, come, returned, device_type))]
    last = row.dkv_sum * returned[-2] if steps and adds_at_once(steps[-1].send, device_type) else 0
    results = tokens * row.kv  # dk and dv, there from the first launch on where it writes to them
    early = results if finishes_early(case, layout, rank, device_type) else 0
    at_the_end = results - early + max(tokens * row.q, last)
    name = "messages" if max(in_steps) >= at_the_end else "dq, dk, dv and the last dK/dV"
    return memory | ({"dk, dv": early} if early else {}) | {name: max(*in_steps, at_the_end)}


def finishes_early(case: Case, layout: Layout, rank: int, device_type: str) -> bool:
    """Whether the first launch of a ring's backward writes dk and dv of its keys as they are wanted."""
    plan = ring_plan(layout, rank, **window(case), device=torch.device("cpu"))
    opening, _ = plan.parts_of_local(layout.tokens(rank) * case.kv_heads, torch.device(device_type))
    return bool(opening and plan.finished)


def _gradients_held(case: Case, layout: Layout, come: list[int], go: list[int], device_type: str) -> list[int]:
    """Most bytes of dK/dV in each step: those of the step before until they are added, and this one's, part by part.

    come, go: rows of K/V that come to this rank, and those whose gradients come back into memory of their own, in each
    step, as the backward takes them, with one more at either end.
    """
    head_bytes = (case.head_dim + case.head_dim_v) * SUM_SIZE
    held: list[int] = []
    before: list[int] = []
    for step, rows in enumerate([0, *_most_rows(case, layout)[:0:-1]]):
        parts = backward_parts(case.kv_heads, rows * head_bytes, LEAST_HALF[device_type])
        now: list[int] = []
        most = 0
        for heads in parts:
            most = max(most, sum(now) + sum(before) + come[step] * heads * head_bytes)
            before = before[1:]
            now.append((come[step] + go[step]) * heads * head_bytes)
            most = max(most, sum(now) + sum(before))
        held.append(most)
        before = now
    return held


def _most_rows(case: Case, layout: Layout) -> list[int]:
    """Rows of K/V that come to a rank in each step, of all ranks; none in the local one, which is the first."""
    return [0, *step_sizes(layout, **window(case)).keys.max(axis=0).tolist()[1:]]


def describe(problem: Problem, layout: Layout) -> dict[str, Any]:
    """The problem as a result file has it."""
    tokens = [layout.tokens(rank) for rank in range(layout.world)]
    return {"name": problem.name, **problem.case.describe(), "tokens_of_ranks": tokens}
