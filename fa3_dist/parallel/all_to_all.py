"""All-to-all over heads: ranks swap tokens for heads, attend to whole documents, and swap back.

The layout's ranks form groups of A neighbours. In a group every rank has the group's tokens for a part of the heads
while attention runs, and its own tokens for all heads everywhere else, so nothing outside of attention knows of it:

    q, k, v      (T, all heads) -> (N, a part of the heads)    one message to each other rank of the group
    attention                                                  every document whole, or a ring over the groups
    out, lse     (N, a part of the heads) -> (T, all heads)    one message to each other rank of the group

With one group this is DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv:2309.14509): attention is one launch for all
documents, without partial results. With several it is the product of both (USP, Fang & Zhao 2024, arXiv:2405.07719):
a rank's part of the heads goes round the ring of the ranks that have the same part. Groups of a zigzag layout have a
zigzag layout (`schedule.grouped`), so the tokens a rank holds do not depend on the mode.

Messages of one part of a rank's heads travel while attention to another part is computed, where parts are large enough
for that (`head_parts`): of all messages only the first part's come before attention, and the last one's after it.

Any layout works, because rows come in the order of the documents and go back in the ranks'. The backward is the same
with the directions turned: dout and delta come in, dq, dk and dv go back. `delta` takes what out and lse contribute
where their gradients are, so out is not kept a second time and dlse needs no message.

Key/value heads: rank a of a group computes the a-th part of the query heads. Where ranks outnumber key/value heads, or
the parts don't fall on their borders, `kv_copies` of each key/value head are sent as if they were heads; their
gradients return in fp32 and are summed and rounded by the owner of the token.

Names: T local rows, N rows of the group, A ranks of the group, H query heads, G key/value heads, D head_dim, E head_dim
of v. A message has a part for each tensor and each run of rows that lie together in the order of the documents, so that
it is received where it is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import accumulate, islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fa3_dist import ops
from fa3_dist.algebra import accumulator_dtype
from fa3_dist.parallel.exchange import Exchange, Pending, Subgroup, moves_with_all
from fa3_dist.parallel.ring import (
    RingPlan,
    check_call,
    ring_attention,
    ring_backward,
    ring_forward,
    ring_plan,
    unit_stride,
)
from fa3_dist.parallel.schedule import Layout, grouped
from fa3_dist.parallel.sharding import keep_for_graph, upload


def all_to_all_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: Layout,
    rank: int,
    exchange: Exchange,
    head_ranks: int | None = None,
    softmax_scale: float | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float = 0.0,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """`ring_attention` by other means: the same arguments, results and gradients, the heads split over ranks.

    Called by all ranks of the exchange together, with the same layout, mask and head counts; so is the backward.

    Args:
        q, k, v: (T, H, D), (T, G, D) and (T, G, E), the local rows in the order of `layout.shards[rank]`.
        head_ranks: how many neighbouring ranks swap tokens for heads, a divisor of the ranks and of H; the groups that
            they form are a ring. None: all ranks, so there is no ring. 1: `ring_attention`.
        others: as in `ring_attention`.
    Returns:
        out (T, H, E) in q's dtype and lse (H, T), natural log, fp32 (fp64 for fp64 inputs).
    Raises:
        ValueError, TypeError: shapes, dtypes, layout, exchange and head_ranks do not fit together; nothing is sent.
        RingError: another rank is dead or stuck; names this rank, the step and that peer.
    """
    head_ranks = layout.world if head_ranks is None else head_ranks
    options = {"softmax_scale": softmax_scale, "window_left": window_left, "window_right": window_right,
               "softcap": softcap}
    if head_ranks == 1:
        return ring_attention(q, k, v, layout=layout, rank=rank, exchange=exchange, deterministic=deterministic,
                              **options)  # type: ignore[arg-type]
    check_call(q, k, v, layout, rank, exchange, options)
    check_heads(q.shape[1], head_ranks, layout.world)
    group, member = divmod(rank, head_ranks)
    ring = Subgroup(exchange, range(member, layout.world, head_ranks))
    plan = ring_plan(grouped(layout, head_ranks), group, window_left, window_right, q.device)
    swap = _Swap(layout, rank, exchange, head_ranks, q.device)
    for tables in (plan, swap.order):
        keep_for_graph(tables, q.device)
    return _AllToAllAttention.apply(q, k, v, swap, plan, ring, options, deterministic)


def check_heads(heads: int, head_ranks: int, world: int) -> None:
    """Raises ValueError unless `world` ranks can be groups of `head_ranks` that share `heads` query heads evenly."""
    if head_ranks < 1 or world % head_ranks:
        raise ValueError(f"head_ranks is {head_ranks}: expected a divisor of {world}, the number of ranks")
    if heads % head_ranks:
        raise ValueError(
            f"q has {heads} heads: expected a multiple of {head_ranks}, the ranks that share them in an all-to-all; "
            "take mode='ring', which has no such limit, or a 2-D mesh whose dimension 'heads' divides them"
        )


def kv_copies(heads: int, kv_heads: int, head_ranks: int) -> int:
    """How many copies of each key/value head an all-to-all sends: 1 if kv_heads is a multiple of head_ranks.

    Query heads are taken in runs, as long as divides both the query heads of a rank and those that read one key/value
    head. No run crosses a border of either, so each reads one copy, and every rank has equally many runs and copies.
    """
    readers = heads // kv_heads
    return readers // math.gcd(readers, heads // head_ranks)


# Rows times query heads that a part of a rank's heads has at least, and how many parts there are at most. On GPUs tiles
# enough that what the last ones leave idle is less than the messages take that a part hides; on CPUs there is always a
# core for messages.
LEAST_PART = {"cuda": 1 << 17, "cpu": 1 << 17}
MOST_PARTS = 4


def head_parts(rows: int, heads: int, kv_heads: int, head_ranks: int, least: int) -> int:
    """In how many parts each of `head_ranks` ranks computes its share of the heads, of `rows` rows.

    A part has whole copies of key/value heads, as many as any other, and at least `least` rows times query heads.
    """
    copies = kv_heads * kv_copies(heads, kv_heads, head_ranks) // head_ranks
    most = min(MOST_PARTS, rows * (heads // head_ranks) // max(least, 1))
    return max((parts for parts in range(1, most + 1) if copies % parts == 0), default=1)


class _AllToAllAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, swap: _Swap, plan: RingPlan, ring: Exchange,
                options: dict[str, Any], deterministic: bool) -> tuple[Tensor, Tensor]:
        (T, H, _), copies = q.shape, kv_copies(q.shape[1], k.shape[1], swap.ranks)
        out = q.new_empty(T, H, v.shape[2])
        lse = q.new_empty(H, T, dtype=accumulator_dtype(q.dtype))
        saved: list[Tensor] = []  # of each part

        def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            out_NhE, lse = ring_forward(q, k, v, plan, ring, options)
            saved.extend((q, k, v, lse))
            return out_NhE, _as_rows(lse)

        # Steps of a ring hide each other's messages as it is.
        parts = 1
        if ring.world == 1:
            parts = head_parts(swap.rows, H, k.shape[1], swap.ranks, LEAST_PART.get(q.device.type, 0))
        if parts > 1:
            options = options | {"sm_margin": swap.sm_margin}
        k, v = _with_copies(k, copies), _with_copies(v, copies)
        swap.there_and_back((q, k, v), attend, (out, _as_rows(lse)), parts, ("q/k/v", "out/lse"))
        ctx.save_for_backward(out, *saved)  # out as it is returned, which whatever comes next keeps too
        ctx.attention = swap, plan, ring, options | {"deterministic": deterministic}, copies
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        out, *saved = ctx.saved_tensors
        swap, plan, ring, options, copies = ctx.attention
        parts = [saved[i : i + 4] for i in range(0, len(saved), 4)]
        dout = torch.zeros_like(out) if dout is None else unit_stride(dout)
        delta = ops.delta(dout, out, dlse)
        kv_dtype = out.dtype if copies == 1 else accumulator_dtype(out.dtype)

        def attend(part: int, dout: Tensor, delta_NH1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v, lse = parts[part]
            return ring_backward(dout, q, k, v, lse, partial(_from_rows, delta_NH1), plan, ring, options, kv_dtype)

        (T, H, _), (q, k, v, _) = out.shape, parts[0]
        kv_heads = k.shape[1] * len(parts) * swap.ranks
        dq = q.new_empty(T, H, q.shape[2])
        dk, dv = (q.new_empty(T, kv_heads, x.shape[2], dtype=kv_dtype) for x in (k, v))
        swap.there_and_back((dout, _as_rows(delta)), attend, (dq, dk, dv), len(parts), ("dout/delta", "dq/dk/dv"))
        return dq, _sum_copies(dk, copies, q.dtype), _sum_copies(dv, copies, q.dtype), None, None, None, None, None


def _with_copies(x: Tensor, copies: int) -> Tensor:
    """(T, G, D) -> (T, G * copies, D), the copies of a head side by side."""
    return x if copies == 1 else x.repeat_interleave(copies, dim=1)


def _sum_copies(gradient: Tensor, copies: int, dtype: torch.dtype) -> Tensor:
    """(T, G * copies, D) -> (T, G, D) in `dtype`: the adjoint of `_with_copies`, rounded once."""
    return gradient if copies == 1 else gradient.unflatten(1, (-1, copies)).sum(2).to(dtype)


def _as_rows(x_HT: Tensor) -> Tensor:
    return x_HT.t().unsqueeze(-1)


def _from_rows(x_TH1: Tensor) -> Tensor:
    return x_TH1.squeeze(-1).t().contiguous()


# ------------------------------------------------------------------------------------------------- messages


_Parts = list[Tensor]  # of a message


class _Way(NamedTuple):
    """Messages to and from all other ranks."""

    send: list[_Parts]  # by rank
    receive: list[_Parts]
    what: str
    meanwhile: Callable[[], None]  # to be called once they are under way
    arrive: Callable[[], list[Tensor]]  # and once they have come


class _Swap:
    """Tokens for heads and back, among the ranks of a group; each direction is the other's transpose."""

    def __init__(self, layout: Layout, rank: int, exchange: Exchange, head_ranks: int, device: torch.device):
        self.ranks = head_ranks
        first = rank // head_ranks * head_ranks
        members = range(first, first + head_ranks)
        self.rows = sum(layout.tokens(member) for member in members)
        self.sm_margin = exchange.sm_margin
        self._exchange = Subgroup(exchange, members)
        self._rank = own = self._exchange.rank
        self._runs, self.order = _places(layout, first, head_ranks, device)
        # The other ranks, and what is theirs in a tensor (A - 1, ...).
        self._others = [(slice(0, own), slice(0, own)), (slice(own + 1, head_ranks), slice(own, head_ranks - 1))]

    def there_and_back(self, tensors: Sequence[Tensor], compute: Callable[..., Sequence[Tensor]],
                       results: Sequence[Tensor], parts: int, what: tuple[str, str]) -> None:
        """Fills (T, A * n, width) each with what comes of tensors of that form.

        Args:
            compute: (part, (N, n / parts, width) each) -> (N, n / parts, width) each: the group's rows, documents in
                order, of a part of this rank's heads. While one part is computed, messages of its neighbours travel.
            what: the messages there and those back, for error messages.
        """
        def of_part(part: int, tensors: Sequence[Tensor]) -> list[Tensor]:
            by_part = [x.unflatten(1, (self.ranks, parts, x.shape[1] // self.ranks // parts)) for x in tensors]
            return [x[:, :, part] for x in by_part]

        def there(part: int) -> _Way:
            return self._to_heads(of_part(part, tensors), what[0])

        def back(part: int, computed: Sequence[Tensor]) -> _Way:
            return self._to_tokens(computed, of_part(part, results), what[1])

        arrivals = self._start(there(0))
        computed: Sequence[Tensor] = ()
        for part in range(parts):
            come = arrivals.pop()()
            is_first, is_last = part == 0, part == parts - 1
            # NOTE: together: of two messages after one another, the second would wait until attention ends.
            ways = ([] if is_first else [back(part - 1, computed)]) + ([] if is_last else [there(part + 1)])
            arrivals = self._start(*ways)
            self._exchange.let_begin()
            computed = compute(part, *come)
            del come
            if not is_first:
                arrivals.pop(0)()
        (arrive,) = self._start(back(parts - 1, computed))
        arrive()

    def _start(self, *ways: _Way) -> list[Callable[[], list[Tensor]]]:
        """Starts messages; called, each of what it gives waits for those of a way and gives what has come."""
        moves = [move for way in ways for move in moves_with_all(self._exchange, way.send, way.receive, way.what)]
        pending = iter(self._exchange.exchange_together(moves))
        for way in ways:
            way.meanwhile()
        return [partial(_finish, way, list(islice(pending, self.ranks - 1))) for way in ways]

    def _to_heads(self, tensors: Sequence[Tensor], what: str) -> _Way:
        """(T, A, n, width) each -> (N, n, width) each: all rows, of this rank's heads."""
        found = [x.new_empty(self.rows, *x.shape[2:]) for x in tensors]
        packed = [self._of_others(x) for x in tensors]
        for x, to in zip(tensors, packed, strict=True):
            for members, theirs in self._others:
                _copy(x[:, members].transpose(0, 1), to=to[theirs])
        send, receive = self._messages(packed, found)

        def copy_own() -> None:
            for x, to in zip(tensors, found, strict=True):
                for run in self._runs[self._rank]:
                    _copy(x[run.local, self._rank], to=to[run.place])

        def arrive() -> list[Tensor]:
            come = found[:]
            found.clear()  # what is put in another order is not kept in this one
            return come if self.order is None else [_select(come.pop(0), self.order) for _ in tensors]

        return _Way(send, receive, what, copy_own, arrive)

    def _to_tokens(self, tensors: Sequence[Tensor], to: Sequence[Tensor], what: str) -> _Way:
        """(N, n, width) each -> (T, A, n, width) each, which it fills: this rank's rows, of all heads."""
        rows = [x.contiguous() if self.order is None else _put(x, self.order) for x in tensors]
        found = [self._of_others(x) for x in to]
        receive, send = self._messages(found, rows)

        def copy_own() -> None:
            for x, own in zip(to, rows, strict=True):
                for run in self._runs[self._rank]:
                    _copy(own[run.place], to=x[run.local, self._rank])

        def arrive() -> list[Tensor]:
            for x, come in zip(to, found, strict=True):
                for members, theirs in self._others:
                    _copy(come[theirs].transpose(0, 1), to=x[:, members])
            return list(to)

        return _Way(send, receive, what, copy_own, arrive)

    def _of_others(self, x: Tensor) -> Tensor:
        """(A - 1, T, n, width): memory for what x (T, A, n, width) has of the other ranks' heads."""
        return x.new_empty(self.ranks - 1, len(x), *x.shape[2:])

    def _messages(self, local: Sequence[Tensor], rows: Sequence[Tensor]) -> tuple[list[_Parts], list[_Parts]]:
        """Parts of messages between this rank and each one: its rows of their heads, of (A - 1, T, n, width) each, and
        their rows of its heads, of (N, n, width) each; of itself none."""
        own: list[_Parts] = [[] for _ in range(self.ranks)]
        theirs: list[_Parts] = [[] for _ in range(self.ranks)]
        for member in range(self.ranks):
            if member != self._rank:
                other = member if member < self._rank else member - 1
                own[member] = [x[other, run.local] for x in local for run in self._runs[self._rank]]
                theirs[member] = [x[run.place] for x in rows for run in self._runs[member]]
        return own, theirs


def _finish(way: _Way, transfers: Sequence[Pending]) -> list[Tensor]:
    for transfer in transfers:
        transfer.wait()
    return way.arrive()


def _copy(x: Tensor, to: Tensor) -> None:
    to, x = _in_words(to, x)
    to.copy_(x)


def _select(x: Tensor, rows: Tensor) -> Tensor:
    (words,) = _in_words(x)
    return words.index_select(0, rows).view(x.dtype)


def _put(x: Tensor, rows: Tensor) -> Tensor:
    """The adjoint of `_select`."""
    to = torch.empty_like(x, memory_format=torch.contiguous_format)
    words, x = _in_words(to, x)
    words.index_copy_(0, rows, x)
    return to


def _in_words(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same memory as words of 8 bytes, where all of it can be: what lies strided, PyTorch moves element by element,
    and elements of 2 bytes take as long as those of 8."""
    for x in tensors:
        each = 8 // x.itemsize
        is_aligned = x.data_ptr() % 8 == 0 and not any(n % each for n in (x.shape[-1], *x.stride()[:-1]))
        if x.stride(-1) != 1 or x.storage_offset() % each or not is_aligned or x.is_neg():
            return tensors
    return tuple(x.view(torch.int64) for x in tensors)


class _Run(NamedTuple):
    """Rows of a rank that follow each other in what the group has."""

    local: slice  # of the rank's rows
    place: slice  # of the group's


MOST_RUNS = 4  # of a rank, each of which is a part of a message


@lru_cache(maxsize=64)
def _places(layout: Layout, first: int, ranks: int, device: torch.device) -> tuple[list[list[_Run]], Tensor | None]:
    """Where the rows of each of the ranks from `first` on arrive: in the order of the documents; or, where they are of
    many pieces, one rank's behind the other's, and int64 (N,): which of these rows comes where in that order."""
    runs = _runs_in_order(layout, first, ranks)
    if _are_few(runs):
        return runs, None
    starts = list(accumulate(map(layout.tokens, range(first, first + ranks)), initial=0))
    order = np.empty(starts[-1], np.int64)
    for start, of_rank in zip(starts, runs, strict=False):
        for run in of_rank:
            order[run.place] = np.arange(start + run.local.start, start + run.local.stop)
    whole = [[_Run(slice(0, end - start), slice(start, end))] for start, end in pairwise(starts)]
    return whole, upload(order, device)


@lru_cache(maxsize=256)
def arrive_in_order(layout: Layout, head_ranks: int) -> bool:
    """Whether all rows arrive in the order of the documents; those of groups where not are put so afterwards."""
    return all(_are_few(_runs_in_order(layout, first, head_ranks)) for first in range(0, layout.world, head_ranks))


def _are_few(runs: list[list[_Run]]) -> bool:
    return max(map(len, runs)) <= MOST_RUNS


def _runs_in_order(layout: Layout, first: int, ranks: int) -> list[list[_Run]]:
    members = range(first, first + ranks)
    places, row = {}, 0
    for shard in sorted(shard for rank in members for shard in layout.shards[rank]):
        places[shard], row = row, row + shard.length
    return [_join([(places[shard], shard.length) for shard in layout.shards[rank]]) for rank in members]


def _join(spans: Sequence[tuple[int, int]]) -> list[_Run]:
    """(place, length) of pieces in the order of local rows -> runs, as few as may be."""
    runs: list[_Run] = []
    row = 0
    for place, length in spans:
        if runs and runs[-1].place.stop == place:
            runs[-1] = _Run(slice(runs[-1].local.start, row + length), slice(runs[-1].place.start, place + length))
        elif length:
            runs.append(_Run(slice(row, row + length), slice(place, place + length)))
        row += length
    return runs
