"""Tensors in and out of a layout: a rank's rows of a tensor of tokens, all rows from every rank's, and positions.

Everything here indexes with ranges that the layout knows on the host: slices and one concatenation, no index tensors
and no synchronisation with the device. Ranks may hold different numbers of tokens, also none.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fa3_dist.parallel.schedule import Layout

# torch renamed these two collectives; the old names warn where the new ones exist.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def shard(tensor: Tensor, layout: Layout, rank: int, dim: int = 0) -> Tensor:
    """The rows of `tensor` that `rank` holds, in local order.

    Args:
        tensor: any dtype; along `dim` it has one row for each token of all documents, document by document.
        layout, rank: which rows.
        dim: the dimension of tokens; may be negative.
    Returns:
        tensor with layout.tokens(rank) rows along `dim`, a view where they are one range. Differentiable.
    Raises:
        ValueError: `dim` has another length than the layout's documents together.
    """
    tokens = sum(layout.documents)
    if tensor.shape[dim] != tokens:
        raise ValueError(
            f"tensor has shape {tuple(tensor.shape)}: expected {tokens} rows along dim {dim}, one for each token of "
            "the layout's documents"
        )
    return _take(tensor, _global_ranges(layout, rank), dim)


def unshard(tensor: Tensor, layout: Layout, group: Any, dim: int = 0) -> Tensor:
    """The rows of all ranks in the order of the documents, on every rank: the inverse of `shard`.

    All ranks of the group call it together, and so they do in the backward.

    Gradients: the backward sums, over the ranks, the gradients that reach each rank's copy of the result, and gives
    every rank its own rows. These are the gradients of the sum of all ranks' losses. So where every rank computes the
    same loss from the full tensor, parameter gradients that are then averaged over the group (what DDP and FSDP do) are
    those of that loss.

    Args:
        tensor: this rank's rows along `dim`, in local order; the other dimensions are equal on all ranks.
        layout: the layout they were sharded by.
        group: the process group of the layout's ranks.
        dim: the dimension of tokens; may be negative.
    Raises:
        ValueError: another number of rows than the layout gives this rank, or a group of another size.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if world != layout.world:
        raise ValueError(f"group has {world} ranks: expected {layout.world}, the ranks of the layout")
    if tensor.shape[dim] != layout.tokens(rank):
        raise ValueError(
            f"tensor has shape {tuple(tensor.shape)}: expected {layout.tokens(rank)} rows along dim {dim}, the tokens "
            f"that the layout gives rank {rank}"
        )
    rows = tensor.movedim(dim, 0)
    longest = max(layout.tokens(each) for each in range(world))
    if world > 1 and longest:
        rows = _GatherRows.apply(rows, longest, group)
    return _take(rows, _gathered_ranges(layout, longest), 0).movedim(0, dim)


def positions(layout: Layout, rank: int, device: torch.device | str | None = None) -> Tensor:
    """int64 (layout.tokens(rank),): the position of each local row in its document."""
    runs = [np.arange(start, start + length, dtype=np.int64) for _, start, length in layout.shards[rank]]
    return upload(np.concatenate(runs) if runs else np.empty(0, np.int64), device)


def upload(numbers: np.ndarray, device: torch.device | str | None) -> Tensor:
    """The numbers as a tensor on the device; the host does not wait for them to get there.

    Raises RuntimeError while a CUDA graph is captured: a copy from the host is no part of one.
    """
    host = torch.from_numpy(numbers)
    if device is not None and torch.device(device).type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph is being captured, and what this batch's layout and mask need on the device is not there "
                "yet: expected one step like it before the capture, and batches to be sharded outside of it"
            )
        return host.pin_memory().to(device, non_blocking=True)  # pageable memory would make the host wait
    return host.to(device)


_read_by_graphs: dict[int, object] = {}  # by id


def keep_for_graph(read: object, device: torch.device) -> None:
    """If a CUDA graph is being captured, keeps what it reads of a layout's tables for as long as the process lives:
    nobody tells when a graph is dropped, and caches forget layouts that are not used for long."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _read_by_graphs[id(read)] = read


class _GatherRows(torch.autograd.Function):
    """(n, ...) of each rank -> (world * longest, ...): rank r's rows start at r * longest, the rest is not set."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, longest: int, group: Any) -> Tensor:
        ctx.rows, ctx.longest, ctx.group = rows.shape[0], longest, group
        block = rows
        if rows.shape[0] < longest or not rows.is_contiguous():
            block = rows.new_empty(longest, *rows.shape[1:])
            block[: rows.shape[0]] = rows
        gathered = rows.new_empty(dist.get_world_size(group) * longest, *rows.shape[1:])
        _all_gather(gathered, block, group=group)
        return gathered

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # Sums of half-precision gradients are taken in fp32, whatever the back end would do.
        sum_dtype = torch.promote_types(gradient.dtype, torch.float32)
        block = gradient.new_empty(ctx.longest, *gradient.shape[1:], dtype=sum_dtype)
        _reduce_scatter(block, gradient.to(sum_dtype).contiguous(), group=ctx.group)
        return block[: ctx.rows].to(gradient.dtype), None, None


def _take(tensor: Tensor, ranges: tuple[tuple[int, int], ...], dim: int) -> Tensor:
    parts = [tensor.narrow(dim, start, length) for start, length in ranges]
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, dim) if parts else tensor.narrow(dim, 0, 0)


@lru_cache(maxsize=64)
def _global_ranges(layout: Layout, rank: int) -> tuple[tuple[int, int], ...]:
    """(start, length) of a rank's rows among all tokens, in local order."""
    starts = tuple(accumulate(layout.documents, initial=0))
    return _joined((starts[document] + start, length) for document, start, length in layout.shards[rank])


@lru_cache(maxsize=64)
def _gathered_ranges(layout: Layout, longest: int) -> tuple[tuple[int, int], ...]:
    """(start, length), in the order of the documents, of rows that lie rank by rank in blocks of `longest` rows."""
    ranges = []
    for rank, shards in enumerate(layout.shards):
        rows = accumulate((length for _, _, length in shards), initial=rank * longest)
        ranges += [(document, start, row, length) for (document, start, length), row in zip(shards, rows, strict=False)]
    return _joined((row, length) for _, _, row, length in sorted(ranges))


def _joined(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The same rows in the same order, ranges that continue each other as one."""
    joined: list[tuple[int, int]] = []
    for start, length in ranges:
        if joined and sum(joined[-1]) == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        else:
            joined.append((start, length))
    return tuple(joined)
