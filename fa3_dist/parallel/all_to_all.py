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

Any layout works, because rows are put in the order of the documents on arrival and back before they return. The
backward is the same with the directions turned: dout and delta come in, dq, dk and dv go back. `delta` takes what out
and lse contribute where their gradients are, so out is not kept a second time and dlse needs no message.

Key/value heads: rank a of a group computes the a-th part of the query heads. Where ranks outnumber key/value heads, or
the parts don't fall on their borders, `kv_copies` of each key/value head are sent as if they were heads; their
gradients return in fp32 and are summed and rounded by the owner of the token.

Names: T local rows, N rows of the group, A ranks of the group, H query heads, G key/value heads, D head_dim, E head_dim
of v. A message is uint8 (rows, bytes): what a row has of each tensor is a column of it, whatever the dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fa3_dist import ops
from fa3_dist.algebra import accumulator_dtype
from fa3_dist.parallel.exchange import Exchange, Subgroup, exchange_with_all
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
from fa3_dist.parallel.sharding import upload


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


class _AllToAllAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, swap: _Swap, plan: RingPlan, ring: Exchange,
                options: dict[str, Any], deterministic: bool) -> tuple[Tensor, Tensor]:
        copies = kv_copies(q.shape[1], k.shape[1], swap.ranks)
        q, k, v = swap.to_heads((q, _with_copies(k, copies), _with_copies(v, copies)), "q/k/v")
        out_NhE, lse = ring_forward(q, k, v, plan, ring, options)
        out, lse_TH1 = swap.to_tokens((out_NhE, _as_rows(lse)), "out/lse")
        ctx.save_for_backward(q, k, v, lse, out)  # out as it is returned, which whatever comes next keeps too
        ctx.attention = swap, plan, ring, options | {"deterministic": deterministic}, copies
        ctx.set_materialize_grads(False)
        return out, _from_rows(lse_TH1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, lse, out = ctx.saved_tensors
        swap, plan, ring, options, copies = ctx.attention
        dout = torch.zeros_like(out) if dout is None else unit_stride(dout)
        delta = ops.delta(dout, out, dlse)
        dout, delta_NH1 = swap.to_heads((dout, _as_rows(delta)), "dout/delta")
        sum_dtype = accumulator_dtype(q.dtype)
        dq, dk, dv = ring_backward(dout, q, k, v, lse, partial(_from_rows, delta_NH1), plan, ring, options,
                                   q.dtype if copies == 1 else sum_dtype)
        dq, dk, dv = swap.to_tokens((dq, dk, dv), "dq/dk/dv")
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


class _Swap:
    """Tokens for heads and back, among the ranks of a group; each direction is the other's transpose."""

    def __init__(self, layout: Layout, rank: int, exchange: Exchange, head_ranks: int, device: torch.device):
        self.ranks = head_ranks
        first = rank // head_ranks * head_ranks
        members = range(first, first + head_ranks)
        self._exchange = Subgroup(exchange, members)
        self._tokens = [layout.tokens(member) for member in members]
        self._order = _document_order(layout, first, head_ranks, device)

    def to_heads(self, tensors: Sequence[Tensor], what: str) -> list[Tensor]:
        """(T, A * n, width) each -> (N, n, width): the group's rows, documents in order, of this rank's heads."""
        like, rank = tensors[0], self._exchange.rank
        columns, size = _columns([(x.shape[1] // self.ranks, x.shape[2], x.dtype) for x in tensors])
        others = _message(like, self.ranks - 1, len(like), size)
        receive = _message(like, sum(self._tokens), size)
        received = receive.split(self._tokens)
        send = [*others[:rank], received[rank], *others[rank:]]  # this rank's own lie where they are wanted at once
        for column, x in zip(columns, tensors, strict=True):
            parts = x.unflatten(1, (self.ranks, column.heads)).transpose(0, 1)
            _copy(parts[rank], to=column.of(received[rank]))
            _copy(parts[:rank], to=column.of(others[:rank]))
            _copy(parts[rank + 1 :], to=column.of(others[rank:]))
        exchange_with_all(self._exchange, send, received, what)
        found = [column.of(receive) for column in columns]
        return found if self._order is None else [_select(x, self._order) for x in found]

    def to_tokens(self, tensors: Sequence[Tensor], what: str) -> list[Tensor]:
        """(N, n, width) each -> (T, A * n, width): this rank's rows, of all heads."""
        columns, size = _columns([(x.shape[1], x.shape[2], x.dtype) for x in tensors])
        send = _message(tensors[0], sum(self._tokens), size)
        receive = _message(tensors[0], self.ranks, self._tokens[self._exchange.rank], size)
        for column, x in zip(columns, tensors, strict=True):
            if self._order is None:
                _copy(x, to=column.of(send))
            else:
                to, x = _in_words(column.of(send), x)
                to.index_copy_(0, self._order, x)
        exchange_with_all(self._exchange, send.split(self._tokens), receive.unbind(0), what)
        found = []
        for column in columns:
            (x,) = _in_words(column.of(receive))
            found.append(x.transpose(0, 1).flatten(1, 2).view(column.dtype))
        return found


def _copy(x: Tensor, to: Tensor) -> None:
    to, x = _in_words(to, x)
    to.copy_(x)


def _select(x: Tensor, rows: Tensor) -> Tensor:
    (words,) = _in_words(x)
    return words.index_select(0, rows).view(x.dtype)


def _in_words(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same memory as words of 8 bytes, where all of it can be: what lies strided, PyTorch moves element by element,
    and elements of 2 bytes take as long as those of 8."""
    for x in tensors:
        each = 8 // x.itemsize
        is_aligned = x.data_ptr() % 8 == 0 and not any(n % each for n in (x.shape[-1], *x.stride()[:-1]))
        if x.stride(-1) != 1 or x.storage_offset() % each or not is_aligned or x.is_neg():
            return tensors
    return tuple(x.view(torch.int64) for x in tensors)


@lru_cache(maxsize=64)
def _document_order(layout: Layout, first: int, ranks: int, device: torch.device) -> Tensor | None:
    """int64 (N,): the rows of the ranks from `first` on, one rank's behind the other's, in the order of the documents.

    None where they lie in that order.
    """
    shards = [shard for rank in range(first, first + ranks) for shard in layout.shards[rank]]
    rows = accumulate((shard.length for shard in shards), initial=0)
    runs = [np.arange(row, row + shard.length) for shard, row in sorted(zip(shards, rows, strict=False))]
    order = np.concatenate([np.empty(0, np.int64), *runs])
    return None if np.array_equal(order, np.arange(len(order))) else upload(order, device)


class _Column(NamedTuple):
    """What the rows of a message have of one tensor."""

    start: int  # byte
    heads: int
    width: int
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.start + self.heads * self.width * self.dtype.itemsize

    def of(self, rows: Tensor) -> Tensor:
        """uint8 (..., bytes) -> a view (..., heads, width)."""
        return rows[..., self.start : self.end].view(self.dtype).unflatten(-1, (self.heads, self.width))


ALIGNMENT = 16  # bytes: what the kernels' bulk loads ask of addresses and strides


def _columns(kinds: Sequence[tuple[int, int, torch.dtype]]) -> tuple[list[_Column], int]:
    """Columns for tensors of these (heads, width, dtype) side by side, and the bytes of a row."""
    columns, start = [], 0
    for kind in kinds:
        columns.append(_Column(start, *kind))
        start = -(-columns[-1].end // ALIGNMENT) * ALIGNMENT
    return columns, start


def _message(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.uint8)
