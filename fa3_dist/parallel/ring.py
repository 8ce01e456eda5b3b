"""Ring attention: exact attention over documents whose tokens are spread over the ranks of a ring.

One loop and one autograd.Function for dense and packed batches, every mask and every head count: what differs between
them is data in the schedule (`schedule.ring_schedule`), and how messages travel is the exchange's business
(`exchange.Exchange`). What this file adds is the order of things, so that messages travel while attention computes:

    forward                                   backward
    start K/V of the first remote step        start K/V of the last remote step
    attend to local keys                      gradients of some local keys, where that pays (`LEAST_OPENING`)
    for each remote step:                     for each remote step, the last one first:
        wait for its K/V                          wait for its K/V
        start K/V of the next one                 start K/V of the next one
        attend, continuing out and lse            for each half of the key/value heads:
                                                      gradients: dq in place, dK/dV of the rows that came
                                                      add the dK/dV that came back from the step before
                                                      start sending this step's dK/dV home
                                              gradients of the other local keys
                                              add the last dK/dV that came back

A half's dK/dV travel while the other half computes. That pays where links are slow: elsewhere, and where there is one
key/value head, a step is one launch (`LEAST_HALF`). Where there is one remote step, and its messages take no SMs, the
gradients of local keys are computed on a stream of their own: what a launch leaves of the GPU at its end, when its last
tiles are under way, the next one takes (`_Beside`).

Softmax over all keys is continued from step to step in fp32 (`ops.forward_into`: running out and lse), the gradients
accumulate in fp32, and dK/dV travel in fp32; what is returned is rounded once, at the end. dK/dV that one launch alone
contributes to are written, not added to zeros, and by the first local launch right where they are wanted, if none of
its keys are any other rank's business. Only local tensors are saved for the backward, so memory is
O(sequence / world), and K and V travel again, but for those that still lie where they came in the forward
(`Exchange.remains`): the last two steps', where no other ring's forward came in between, as in every layer whose
activations are checkpointed (there it is the recomputed forward that counts). With nothing to hide, the local step
mostly comes last, in one piece.

Names: T local rows, N rows of a message, H query heads, G key/value heads, D head_dim, E head_dim of v. A message has
two parts: rows of K (N, G, D), and of V (N, G, E), sent from where they lie; dK and dV likewise.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fa3_dist import ops
from fa3_dist.algebra import accumulator_dtype
from fa3_dist.parallel.exchange import HEAD_START, NO_STAMP, Exchange, Pending, Place, pause
from fa3_dist.parallel.observe import computing
from fa3_dist.parallel.schedule import Layout, Span, Step, Visit, queries_of_keys, ring_schedule, step_sizes
from fa3_dist.parallel.sharding import keep_for_graph, upload


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: Layout,
    rank: int,
    exchange: Exchange,
    softmax_scale: float | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float = 0.0,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries to all keys of their documents, wherever those keys are.

    Called by all ranks of the exchange together, with the same layout, mask and head counts; so is the backward.
    Differentiable in q, k and v, through out and through lse.

    Args:
        q: (T, H, D), the local rows in the order of `layout.shards[rank]`; fp64, fp32, fp16 or bf16, any strides.
        k, v: (T, G, D) and (T, G, E), H a multiple of G, q's dtype.
        layout: which tokens every rank holds.
        rank, exchange: this rank and its messages to the others; the exchange's world is the layout's.
        softmax_scale: factor of q k^T; None: D ** -0.5.
        window_left, window_right: a query at position p of a document sees the positions from p - window_left to
            p + window_right; None: no limit. Causal is window_right=0.
        softcap: c > 0 replaces a score s by c * tanh(s / c).
        deterministic: gradients are bitwise equal from run to run.
    Returns:
        out (T, H, E) in q's dtype and lse (H, T), natural log, fp32 (fp64 for fp64 inputs).
    Raises:
        ValueError, TypeError: shapes, dtypes, layout and exchange do not fit together.
        RingError: another rank is dead or stuck; names this rank, the step and that peer.
    """
    options = {"softmax_scale": softmax_scale, "window_left": window_left, "window_right": window_right,
               "softcap": softcap}
    check_call(q, k, v, layout, rank, exchange, options)
    plan = ring_plan(layout, rank, window_left, window_right, q.device)
    keep_for_graph(plan, q.device)
    return _RingAttention.apply(q, k, v, plan, exchange, options, deterministic)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: RingPlan, exchange: Exchange,
                options: dict[str, Any], deterministic: bool) -> tuple[Tensor, Tensor]:
        q, k, v = (unit_stride(x) for x in (q, k, v))
        out, lse = ring_forward(q, k, v, plan, exchange, options)
        # NOTE: as a tensor, so that after a checkpoint they are of the forward that was run again.
        stamps = torch.tensor([exchange.stamp(place) for place in KV_PLACES], device="cpu")  # of the last steps' K/V
        ctx.save_for_backward(q, k, v, out, lse, stamps)  # local rows only
        ctx.ring = plan, exchange, options | {"deterministic": deterministic}
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, stamps = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else unit_stride(dout)
        delta = partial(ops.delta, dout, out, dlse)
        plan, exchange, options = ctx.ring
        gradients = ring_backward(dout, q, k, v, lse, delta, plan, exchange, options, stamps=stamps.tolist())
        return *gradients, None, None, None, None


def ring_forward(q: Tensor, k: Tensor, v: Tensor, plan: RingPlan, exchange: Exchange,
                 options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """out (T, H, E) in q's dtype and lse (H, T)."""
    if plan.alone is not None:
        with computing(exchange.observer, "forward", 0):
            return ops.forward(q, k, v, **plan.alone, **options)
    (T, H, _), E, sum_dtype = q.shape, v.shape[-1], accumulator_dtype(q.dtype)
    # Every row is in a visit that is the first one of its range: nothing here needs a value yet.
    out = q.new_empty(T, H, E)
    out_acc = q.new_empty(T, H, E, dtype=sum_dtype)
    lse = q.new_empty(H, T, dtype=sum_dtype)

    def attend(step: int, launches: Sequence[Launch], k: Tensor, v: Tensor, sm_margin: int) -> None:
        exchange.let_begin()
        with computing(exchange.observer, "forward", step):
            for launch in launches:
                ops.forward_into(q, k, v, out_acc, lse, out, **launch, **options, sm_margin=sm_margin)

    if plan.remote:
        kv = _KeyRows(k.contiguous(), v.contiguous())
        arriving = _fetch(kv, plan, 0, exchange)
    attend(0, plan.local, k, v, exchange.sm_margin if plan.remote else 0)
    for index, step in enumerate(plan.remote):
        come, is_last = arriving.wait(), index + 1 == len(plan.remote)
        if not is_last:
            arriving = _fetch(kv, plan, index + 1, exchange)
        attend(step.step.shift, step.forward, *come, 0 if is_last else exchange.sm_margin)
    exchange.confirm()
    return out, lse


def ring_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, make_delta: Callable[[], Tensor],
                  plan: RingPlan, exchange: Exchange, options: dict[str, Any], kv_dtype: torch.dtype | None = None,
                  stamps: Sequence[int] = (NO_STAMP, NO_STAMP)) -> tuple[Tensor, Tensor, Tensor]:
    """dq (T, H, D) in the dtype of the inputs, dk (T, G, D) and dv (T, G, E) in kv_dtype (None: the same).

    make_delta: called while the first message travels. options: those of `ring_forward`, and deterministic. stamps: of
    the places of K/V, after the forward.
    """
    (T, G, D), E, sum_dtype = k.shape, v.shape[-1], accumulator_dtype(q.dtype)
    kv_dtype = kv_dtype or k.dtype
    if plan.alone is not None:
        dq, dk, dv = (x.new_empty(x.shape, dtype=dtype) for x, dtype in ((q, q.dtype), (k, kv_dtype), (v, kv_dtype)))
        with computing(exchange.observer, "backward", 0):
            ops.backward(dout, q, k, v, lse, make_delta(), dq, dk, dv, **plan.alone, **options)
        return dq, dk, dv
    opening, closing = plan.parts_of_local(T * G, k.device)
    is_there = False
    if plan.remote:
        kv = _KeyRows(k.contiguous(), v.contiguous())
        arriving = _fetch(kv, plan, len(plan.remote) - 1, exchange, stamps)
        is_there = arriving.pending is None
        # NOTE: a deterministic backward adds in the same order whether its forward was long ago or not.
        if is_there and not plan.finished and not options["deterministic"]:
            opening, closing = (), plan.local_backward
    delta = make_delta()
    row_bytes = (D + E) * sum_dtype.itemsize
    parts = [_head_parts(q.shape[1], G, step.most_rows * row_bytes, k.device) for step in plan.remote]
    # NOTE: a launch for some of the heads adds to a view, which a sum in the kernel's own order has none of.
    in_halves = any(heads.kv_count < G for parts_of_step in parts for heads in parts_of_step)
    dq = q.new_zeros(q.shape, dtype=sum_dtype) if in_halves else ops.new_dq_sum(q, v)
    # What comes back is added after the local launches have written what is theirs: not so where a step comes after it.
    writes_own = plan.writes_own and len(plan.remote) <= 1
    own = _KeyRows(*(_new_sum(x, G, sum_dtype, writes_own) for x in (k, v)))
    finished = plan.finished if opening and kv_dtype != sum_dtype else ()
    total = _KeyRows(*(x.new_empty(x.shape, dtype=kv_dtype) for x in (k, v))) if finished else None

    def add_gradients(step: int, launches: Sequence[Launch], kv: _KeyRows, dkv: _KeyRows, writes: bool, sm_margin: int,
                      heads: _Heads | None = None) -> None:
        """dkv: of the key/value heads that `heads` says, or of all; writes: they hold nothing yet."""
        tensors = (dout, q, *kv, lse, delta, dq)
        if in_halves and heads is not None:
            tensors = heads.of(*tensors)
        exchange.let_begin()
        with computing(exchange.observer, "backward", step):
            for launch in launches:
                ops.backward(  # type: ignore[misc]
                    *tensors, *dkv, **launch, **options, accumulate=True, accumulate_kv=not writes, sm_margin=sm_margin
                )

    returning: list[_Returning] = []
    # NOTE: with more steps, sums that come back would be added beside the closing launch, which adds to the same rows.
    may_overlap = len(plan.remote) == 1 and not (options["deterministic"] or in_halves) and ops.adds_atomically(q, v)
    with _Beside(exchange.side_stream() if may_overlap else None) as local:
        if opening:
            with local.stream():
                writes = total is not None or writes_own
                add_gradients(0, opening, _KeyRows(k, v), total or own, writes, exchange.sm_margin)
        for index, step in reversed(list(enumerate(plan.remote))):
            come = arriving.wait()
            if index > 0:
                arriving = _fetch(kv, plan, index - 1, exchange, stamps)
            before, returning = returning, []
            for part, heads in enumerate(parts[index]):
                dkv = _KeyRows(*(_new_sum(x, heads.kv_count, sum_dtype, step.writes) for x in come))
                local.follow()
                add_gradients(step.step.shift, step.backward, come, dkv, step.writes, exchange.sm_margin, heads)
                if before:
                    before.pop(0).add_to(own)  # its buffers go before the next ones come
                returning.append(_Returning(heads, _send_home(dkv, plan, index, part, exchange)))
                del dkv
            while before:
                before.pop(0).add_to(own)
            del come
        if plan.remote:
            del arriving  # the memory of the last K/V, too, is wanted at the end
        if is_there and not opening:
            local.let_the_other_begin()
        with local.stream():
            add_gradients(0, closing, _KeyRows(k, v), own, writes_own, exchange.sm_margin if plan.remote else 0)
    dk, dv = _total_of(own, returning, kv_dtype, finished, total)
    exchange.confirm()
    return dq.to(q.dtype) if in_halves else ops.round_dq(dq, q, v, options["softmax_scale"]), dk, dv


def _new_sum(like: Tensor, heads: int, dtype: torch.dtype, is_written: bool) -> Tensor:
    """Memory for dK or dV of some heads: zeros to add to, unless all of it is going to be written."""
    return (like.new_empty if is_written else like.new_zeros)((len(like), heads, like.shape[2]), dtype=dtype)


class _Beside:
    """Work on a stream of its own, beside the current one: from the start of a `with` statement on, and until its end,
    whatever that is, the current stream waits for it. With None all of it is on the current stream."""

    def __init__(self, stream: Any):
        self._stream = stream
        self._current = None if stream is None else torch.cuda.current_stream(stream.device)

    def __enter__(self) -> _Beside:
        self.follow()
        return self

    def __exit__(self, *error: object) -> None:
        if self._current is not None:
            self._current.wait_stream(self._stream)

    def follow(self) -> None:
        """What is queued here from now on begins no earlier than what is queued next on the current stream."""
        if self._current is not None:
            self._stream.wait_stream(self._current)

    def let_the_other_begin(self) -> None:
        """Of launches that both streams come to at the same time, that on the other one begins first; this one takes
        the SMs that it leaves."""
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                pause(HEAD_START * 1e-6)

    def stream(self) -> AbstractContextManager[Any]:
        """Inside, the current stream is this one."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


# --------------------------------------------------------------------------- parts of the local step, and of the heads


# Rows times key/value heads from which on the local backward is two launches, of which the first one hides the first
# K/V. With fewer, two take longer than one and the message together: on an H200, 0.92 against 0.62 ms for 4 k rows and
# 8 heads, 5.0 against 4.9 ms for 16 k and 16 (benchmarks/LOG.md). CPUs launch nothing.
LEAST_OPENING = {"cuda": 1 << 17, "cpu": 0}


# Bytes of a message of dK/dV of half the heads from which on a step of the backward is two launches. On an H200 two
# take 6 to 11 % longer than one where 4 k queries or more meet 4 k keys or more (benchmarks/LOG.md), and a link within
# a host leaves less than that to hide: there it is not done, unless the environment asks for it. CPUs launch nothing.
LEAST_HALF = {"cuda": int(os.environ.get("FA3_DIST_LEAST_HALF", 1 << 62)), "cpu": 0}


def backward_parts(kv_heads: int, head_bytes: int, least_half: int) -> list[int]:
    """Key/value heads of each launch of a step of the backward: all in one, or about half in either of two.

    A function of what all ranks know alike, since both ends of a message must expect the same.

    Args:
        kv_heads: of a rank.
        head_bytes: of the largest message of dK/dV of the step, on any rank, for one head.
        least_half: bytes of a message worth a launch of its own, as in LEAST_HALF.
    """
    half = kv_heads // 2
    return [kv_heads - half, half] if half and half * head_bytes >= least_half else [kv_heads]


class _Heads(NamedTuple):
    """A range of key/value heads, and the query heads that read them."""

    kv_start: int
    kv_count: int
    readers: int  # query heads of a key/value head

    def of(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor,
           dq: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Views of the backward's arguments: (rows, heads, ...), lse and delta (heads, rows)."""
        start, count = self.kv_start * self.readers, self.kv_count * self.readers
        dout, q, dq = (x.narrow(1, start, count) for x in (dout, q, dq))
        lse, delta = (x.narrow(0, start, count) for x in (lse, delta))
        return dout, q, *self.of_kv(_KeyRows(k, v)), lse, delta, dq

    def of_kv(self, rows: _KeyRows) -> _KeyRows:
        return _KeyRows(*(x.narrow(1, self.kv_start, self.kv_count) for x in rows))


def _head_parts(heads: int, kv_heads: int, head_bytes: int, device: torch.device) -> list[_Heads]:
    counts = backward_parts(kv_heads, head_bytes, LEAST_HALF.get(device.type, 0))
    starts = accumulate(counts, initial=0)
    return [_Heads(start, count, heads // kv_heads) for start, count in zip(starts, counts, strict=False)]


# ------------------------------------------------------------------------------------------------- messages


# Where messages land: K/V of a step while those of the step before are read; dK/dV of each part of the heads, which are
# added up before the next ones are asked for.
KV_PLACES, DKV_PLACES = (0, 1), (2, 3)


class _KeyRows(NamedTuple):
    """Rows of K and V, or of their gradients: the parts of a message."""

    k: Tensor  # (N, G, D)
    v: Tensor  # (N, G, E)


class _Arrival(NamedTuple):
    """A message under way to this rank, or one that came before and is still there."""

    pending: Pending | None  # None: it is still there
    rows: _KeyRows  # valid after wait()
    spans: tuple[Span, ...]  # which rows of the owner's tensors they are, in this order

    def wait(self) -> _KeyRows:
        if self.pending is not None:
            self.pending.wait()
        return self.rows


class _Returning(NamedTuple):
    """dK/dV under way to this rank, their owner."""

    heads: _Heads  # of the message
    arrival: _Arrival

    def add_to(self, own: _KeyRows) -> None:
        """Waits for the rows and adds them where they belong."""
        for x, rows in zip(self.heads.of_kv(own), self.arrival.wait(), strict=True):
            _add_rows(x, rows, self.arrival.spans, to=x)


def _fetch(kv: _KeyRows, plan: RingPlan, index: int, exchange: Exchange,
           stamps: Sequence[int] = (NO_STAMP, NO_STAMP)) -> _Arrival:
    """Starts bringing the K/V rows that a remote step needs, and sending the rows another rank needs in it.

    stamps: of the places after a forward, of which the last two steps' K/V may still be there.
    """
    step, place = plan.remote[index].step, Place(KV_PLACES[index % 2], plan.most_rows)
    is_late = index >= len(plan.remote) - len(KV_PLACES)
    there = exchange.remains(kv, _total(step.receive), place, stamps[index % 2]) if is_late else None
    if there is not None:
        return _Arrival(None, _KeyRows(*there), step.receive)
    rows = _KeyRows(*exchange.room(kv, _total(step.receive), place))
    pending = exchange.exchange(send=[_gather(x, step.send) for x in kv], destination=step.destination, receive=rows,
                                source=step.source, what="K/V", step=step.shift, place=place)
    return _Arrival(pending, rows, step.receive)


def _send_home(dkv: _KeyRows, plan: RingPlan, index: int, part: int, exchange: Exchange) -> _Arrival:
    """Starts sending dK/dV of the rows that came in a remote step to their owner, those of a part of the heads; what
    arrives belongs to rows sent."""
    step, place = plan.remote[index].step, Place(DKV_PLACES[part], plan.most_rows)
    rows = _KeyRows(*exchange.room(dkv, _total(step.send), place))
    pending = exchange.exchange(send=dkv, destination=step.source, receive=rows, source=step.destination,
                                what="dK/dV", step=step.shift, place=place)
    return _Arrival(pending, rows, step.send)


def _gather(x: Tensor, spans: Sequence[Span]) -> Tensor:
    """The rows of `spans`, one behind the other; a view if there is one span."""
    parts = [x.narrow(0, span.start, span.length) for span in spans]
    if not parts:
        return x[:0]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _add_rows(x: Tensor, rows: Tensor, spans: Sequence[Span], to: Tensor) -> None:
    """Writes to the rows of `to` in `spans` those of x plus some that lie one behind the other. `to` may be x."""
    for (start, length), part in zip(spans, rows.split([span.length for span in spans]), strict=True):
        torch.add(x.narrow(0, start, length), part, out=to.narrow(0, start, length))


def adds_at_once(spans: Sequence[Span], device_type: str) -> bool:
    """Whether the last dK/dV of these rows are added and rounded at once: on a CPU, PyTorch would round from a copy."""
    return len(spans) <= MOST_SPANS and device_type == "cuda"


def _total_of(own: _KeyRows, returning: list[_Returning], dtype: torch.dtype, finished: Sequence[Span],
              total: _KeyRows | None) -> _KeyRows:
    """dK/dV with the parts that are still under way (all of the same rows), in dtype; takes the parts from the list.

    finished: rows that `total`, in dtype, has already.
    """
    spans = returning[0].arrival.spans if returning else ()
    arrived = []
    if not returning or not adds_at_once(spans, own.k.device.type) or dtype == own.k.dtype:
        while returning:
            returning.pop(0).add_to(own)
        if total is None:
            return _KeyRows(*(x.to(dtype) for x in own))
        spans = ()
    else:
        # Added and rounded at once: everything is read once, and what is written is half as large.
        arrived = [(heads, arrival.wait()) for heads, arrival in returning]  # first, for what was sent to be free
        returning.clear()
    total = total or _KeyRows(*(x.new_empty(x.shape, dtype=dtype) for x in own))
    for to, x in zip(total, own, strict=True):
        for start, length in rows_between([*spans, *finished], len(x)):
            to.narrow(0, start, length).copy_(x.narrow(0, start, length))
    for heads, rows_of_kv in arrived:
        for to, x, rows in zip(heads.of_kv(total), heads.of_kv(own), rows_of_kv, strict=True):
            _add_rows(x, rows, spans, to)
    return total


def rows_between(spans: Sequence[Span], rows: int) -> list[Span]:
    """The rows of 0 ... rows - 1 that are in none of some spans."""
    found, end = [], 0
    for start, length in [*sorted(spans), Span(rows, 0)]:
        if start > end:
            found.append(Span(end, start - end))
        end = start + length
    return found


def _total(spans: Iterable[Span]) -> int:
    return sum(span.length for span in spans)


def unit_stride(x: Tensor) -> Tensor:
    """The operators ask for a contiguous last dimension and nothing else."""
    return x if x.stride(-1) == 1 else x.contiguous()


# ----------------------------------------------------------------------------------------------------- plan


Launches = tuple[tuple[Visit, ...], ...]  # as the schedule has them
Launch = dict[str, Any]  # visits as an operator's keyword arguments: int32 (n,) tensors on the device


FORWARD_COLUMNS = ("q_start", "q_len", "k_start", "k_len", "offsets", "flags")
BACKWARD_COLUMNS = FORWARD_COLUMNS[:-1]


class _RemoteStep(NamedTuple):
    step: Step
    most_rows: int  # that come to a rank in this step, of all ranks
    writes: bool  # its backward's launches contribute once to every row that comes
    forward: tuple[Launch, ...]
    backward: tuple[Launch, ...]


class RingPlan(NamedTuple):
    """A rank's schedule with its tables of visits on the device."""

    local: tuple[Launch, ...]  # the local forward
    remote: tuple[_RemoteStep, ...]
    local_backward: tuple[Launch, ...]
    opening: tuple[Launch, ...]  # the same in two parts: this one hides the first K/V,
    closing: tuple[Launch, ...]  # and this one the last dK/dV
    writes_own: bool  # either form of the local backward contributes once to every local key
    finished: tuple[Span, ...]  # all rows of keys of `opening`, where they are no other rank's business
    alone: Launch | None  # all there is, in both directions, where there are no messages and no running sums

    @property
    def most_rows(self) -> int:
        """That come to a rank in a remote step, of all ranks and steps."""
        return max(step.most_rows for step in self.remote)

    def parts_of_local(self, kv_rows: int, device: torch.device) -> tuple[tuple[Launch, ...], tuple[Launch, ...]]:
        """The local backward before the remote steps, and after them. kv_rows: local rows times key/value heads."""
        if not self.remote or kv_rows < LEAST_OPENING.get(device.type, 0):
            return (), self.local_backward
        return self.opening, self.closing


@lru_cache(maxsize=64)
def ring_plan(layout: Layout, rank: int, window_left: int | None, window_right: int | None,
              device: torch.device) -> RingPlan:
    """The schedule of this layout and mask, its visits on the device. Every layer of a model asks for the same one."""
    window = window_left, window_right
    steps = ring_schedule(layout, rank, window_left=window_left, window_right=window_right)
    assert steps[0].shift == 0 and all(step.shift for step in steps[1:]), "the local step comes first"
    opening, closing = _split_local(steps[0].backward) if len(steps) > 1 else ((), ())
    local, *forward = _upload([step.forward for step in steps], FORWARD_COLUMNS, device)
    visits_of = [*(step.backward for step in steps), opening, closing]
    local_backward, *backward, opening_launches, closing_launches = (
        _with_queries(launches, visits, *window)
        for launches, visits in zip(_upload(visits_of, BACKWARD_COLUMNS, device), visits_of, strict=True)
    )
    sizes = step_sizes(layout, window_left=window_left, window_right=window_right)
    most_rows = dict(zip(sizes.shifts, sizes.keys.max(axis=0).tolist(), strict=True))
    remote = tuple(
        _RemoteStep(step, most_rows.get(step.shift, 0), _meets_each_once(step.backward, _total(step.receive), *window),
                    *launches)
        for step, *launches in zip(steps[1:], forward, backward, strict=True)
    )
    # One launch each way: every row is in one visit of the forward, so in one of the backward, and so are the keys.
    is_alone = not remote and len(local) == len(local_backward) == 1
    alone = {name: local[0][name] for name in BACKWARD_COLUMNS} if is_alone else None
    rows = layout.tokens(rank)
    writes_own = _meets_each_once(steps[0].backward, rows, *window)
    finished = _finished_rows(opening, [span for step in steps[1:] for span in step.send], rows) if writes_own else ()
    return RingPlan(local, remote, local_backward, opening_launches, closing_launches, writes_own, finished, alone)


MOST_SPANS = 4  # of rows that are rounded by a kernel each: that is faster than one more pass over everything


def _finished_rows(launches: Launches, sent: Sequence[Span], rows: int) -> tuple[Span, ...]:
    """The keys of visits that are disjoint, if no rank is sent any of them and few spans are left beside them."""
    keys = sorted(Span(visit.k_start, visit.k_len) for launch in launches for visit in launch if visit.k_len)
    is_shared = any(key.start < span.start + span.length and span.start < key.start + key.length
                    for key in keys for span in sent)
    return () if is_shared or len(rows_between(keys, rows)) > MOST_SPANS else tuple(keys)


def _meets_each_once(launches: Launches, keys: int, window_left: int | None, window_right: int | None) -> bool:
    """Whether each of so many rows of keys is in one visit, of all launches, and seen by some query there."""
    end = 0
    for visit in sorted((visit for launch in launches for visit in launch), key=lambda visit: visit.k_start):
        sees_first = window_left is None or visit.offset - window_left <= 0
        sees_last = window_right is None or visit.offset + visit.q_len - 1 + window_right >= visit.k_len - 1
        if visit.k_start != end or visit.q_len == 0 or not (sees_first and sees_last):
            return False
        end += visit.k_len
    return end == keys


def _split_local(launches: Launches) -> tuple[Launches, Launches]:
    """The same work as two parts, of which the first is about a quarter: whole visits where that can be."""
    sizes = {visit: visit.q_len * visit.k_len for launch in launches for visit in launch}
    total, left = sum(sizes.values()), sum(sizes.values()) // 4
    opening = set()
    for visit, size in sorted(sizes.items(), key=lambda item: -item[1]):
        if size <= left:
            opening.add(visit)
            left -= size
    if left <= total // 8:
        parts = [
            tuple(tuple(visit for visit in launch if (visit in opening) is is_opening) for launch in launches)
            for is_opening in (True, False)
        ]
        return parts[0], parts[1]
    first, rest = _split_keys(launches)
    return rest, first


def _split_keys(launches: Launches) -> tuple[Launches, Launches]:
    """The same work as two parts: the first half of every visit's keys, and the rest (a smaller part under causal).

    Halves are multiples of 128 keys, which tiles and blocks of quantised keys divide; shorter visits stay whole.
    """
    first, rest = [], []
    for launch in launches:
        halves = [(visit, min(visit.k_len, -(-visit.k_len // 256) * 128)) for visit in launch]
        first.append(tuple(visit._replace(k_len=half) for visit, half in halves))
        rest.append(tuple(
            visit._replace(k_start=visit.k_start + half, k_len=visit.k_len - half, offset=visit.offset - half)
            for visit, half in halves if half < visit.k_len
        ))
    return tuple(first), tuple(rest)


def _with_queries(launches: Sequence[Launch], visits: Launches, window_left: int | None,
                  window_right: int | None) -> tuple[Launch, ...]:
    """Launches of the backward with what their visits tell the kernel."""
    counts = [queries_of_keys(of_launch, window_left=window_left, window_right=window_right)
              for of_launch in filter(None, visits)]
    return tuple(launch | {"most_queries": most, "mean_queries": mean}
                 for launch, (most, mean) in zip(launches, counts, strict=True))


def _upload(steps: Sequence[Launches], names: tuple[str, ...], device: torch.device) -> list[tuple[Launch, ...]]:
    """Launches as tables, all in one tensor; launches without visits are left out."""
    visits = [visit for launches in steps for launch in launches for visit in launch]
    rows = [(*visit[:5], ops.FIRST * visit.first | ops.LAST * visit.last)[: len(names)] for visit in visits]
    table = upload(np.ascontiguousarray(np.array(rows, dtype=np.int32).reshape(-1, len(names)).T), device)
    end, result = 0, []
    for launches in steps:
        tables = []
        for launch in filter(None, launches):
            start, end = end, end + len(launch)
            tables.append(dict(zip(names, table[:, start:end], strict=True)))
        result.append(tuple(tables))
    return result


# --------------------------------------------------------------------------------------------------- checks


def check_call(q: Tensor, k: Tensor, v: Tensor, layout: Layout, rank: int, exchange: Exchange,
           options: dict[str, Any]) -> None:
    """What a user can get wrong, before the first message: an error after it would leave a message in the way."""
    if (exchange.world, exchange.rank) != (layout.world, rank):
        raise ValueError(f"exchange is rank {exchange.rank} of {exchange.world}: expected rank {rank} of "
                         f"{layout.world}, as rank and layout say")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3 or x.shape[0] != layout.tokens(rank):
            raise ValueError(f"{name} has shape {tuple(x.shape)}: expected (tokens, heads, head_dim) with the "
                             f"{layout.tokens(rank)} tokens that the layout gives rank {rank}")
    (H, _), G = q.shape[1:], k.shape[1]
    if v.shape[1] != G or G == 0 or H % G != 0:
        raise ValueError(f"q, k and v have {H}, {G} and {v.shape[1]} heads: expected as many for v as for k, and a "
                         "multiple of that for q")
    ops.check_qkv(q, k, v)
    scale = options["softmax_scale"]
    ops.check_scores(1.0 if scale is None else scale, options["window_left"], options["window_right"],
                     options["softcap"])
