"""Exact blockwise attention in plain PyTorch: the CPU kernel of every operator, and the last resort on a GPU.

Scores never exist as a whole: queries go in blocks against blocks of the keys they can see, with the running maximum
and sum of online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867; Rabe & Staats 2021, arXiv:2112.05682), so memory
grows with the number of tokens and never with its square. Arithmetic is fp32, or fp64 for fp64 inputs, whatever the
input dtype. Where PyTorch has a fused kernel for a range and its mask, `torch_kernels` runs it instead, in the same
precision on the CPU.

Shapes in names: B batch, S sequence, H query heads, K key/value heads, G = H / K query heads per key/value head, D head
dim. A packed range is a batch of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fa3_dist import torch_kernels
from fa3_dist.algebra import Mask, accumulator_dtype, merge

FIRST = 1  # flag of a visit: the running state of its rows is not read
LAST = 2  # flag of a visit: its rows are finished and written in the output's dtype

BLOCK_Q = 256  # with BLOCK_K: a block of scores of a few heads stays in the cache
BLOCK_K = 512


class Range(NamedTuple):
    """One visit: rows [q_start, q_start + q_len) attend to rows [k_start, k_start + k_len) of K and V."""

    q_start: int
    q_len: int
    k_start: int
    k_len: int
    offset: int
    flags: int

    @property
    def q(self) -> slice:
        return slice(self.q_start, self.q_start + self.q_len)

    @property
    def k(self) -> slice:
        return slice(self.k_start, self.k_start + self.k_len)


def read_ranges(
    q_start: Tensor, q_len: Tensor, k_start: Tensor, k_len: Tensor, offsets: Tensor | None, offset: int | None,
    flags: Tensor | None, total_q: int, total_k: int,
) -> list[Range]:
    """The visits as host integers, checked against the buffers of `total_q` and `total_k` rows (synchronises a GPU)."""
    columns = [column.tolist() for column in (q_start, q_len, k_start, k_len)]
    if offsets is not None:
        columns.append(offsets.tolist())
    elif offset is not None:
        columns.append([offset] * len(columns[0]))
    else:
        columns.append([k - q for q, k in zip(columns[1], columns[3])])
    columns.append(flags.tolist() if flags is not None else [FIRST | LAST] * len(columns[0]))
    ranges = [Range(*row) for row in zip(*columns)]
    for i, r in enumerate(ranges):
        for name, start, length, total in (("q", r.q_start, r.q_len, total_q), ("k", r.k_start, r.k_len, total_k)):
            if start < 0 or length < 0 or start + length > total:
                raise ValueError(
                    f"{name}_start[{i}] = {start}, {name}_len[{i}] = {length}: expected 0 <= start, 0 <= length and "
                    f"start + length <= {total}, the number of rows of {name}"
                )
    return ranges


# ---- one range of queries against one range of keys ------------------------------------------------------------------


def _score_blocks(mask: Mask, seqlen_q: int, seqlen_k: int) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of query rows, each with the blocks of keys that at least one of its rows sees."""
    for i in range(0, seqlen_q, BLOCK_Q):
        rows = slice(i, min(i + BLOCK_Q, seqlen_q))
        first, last = mask.visible_keys(rows.start, rows.stop, seqlen_k)
        yield rows, [slice(j, min(j + BLOCK_K, last)) for j in range(first, last, BLOCK_K)]


def _group(x_BSHD: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """(B, S, K * G, D) -> (B, K, G * S, D): the query heads that share a key/value head become rows of one product."""
    B, S, H, D = x_BSHD.shape
    G = H // kv_heads
    return x_BSHD.to(dtype).reshape(B, S, kv_heads, G, D).permute(0, 2, 3, 1, 4).reshape(B, kv_heads, G * S, D)


def _ungroup(x_BKRD: Tensor, heads: int) -> Tensor:
    """Inverse of `_group`: (B, K, G * S, D) -> (B, S, K * G, D)."""
    B, K, R, D = x_BKRD.shape
    G = heads // K
    return x_BKRD.reshape(B, K, G, R // G, D).permute(0, 3, 1, 2, 4).reshape(B, R // G, heads, D)


def _scores(q_BKRD: Tensor, k_BKSD: Tensor, hidden: Tensor | None, softcap: float) -> tuple[Tensor, Tensor | None]:
    """Scaled, capped and masked scores (B, K, G * rows, keys), and tanh(s / softcap) where there is a cap."""
    s = q_BKRD @ k_BKSD.transpose(-1, -2)
    squashed = None
    if softcap > 0:
        squashed = torch.tanh(s / softcap)
        s = squashed * softcap
    if hidden is not None:
        B, K, R, C = s.shape
        s = s.view(B, K, R // hidden.shape[0], hidden.shape[0], C).masked_fill_(hidden, float("-inf")).view(B, K, R, C)
    return s, squashed


def attend(
    q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, mask: Mask, softmax_scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Attention of one range: out (B, S, H, Dv) and lse (B, H, S) in the accumulator dtype."""
    if torch_kernels.covers(q_BSHD, k_BSKD, v_BSKD, mask, softcap):
        return torch_kernels.attend(q_BSHD, k_BSKD, v_BSKD, mask, softmax_scale)
    (B, Sq, H, _), (Sk, K, Dv) = q_BSHD.shape, v_BSKD.shape[1:]
    dtype = accumulator_dtype(q_BSHD.dtype)
    k, v = (x.to(dtype).transpose(1, 2) for x in (k_BSKD, v_BSKD))
    out_BSHD = q_BSHD.new_zeros(B, Sq, H, Dv, dtype=dtype)
    lse_BHS = q_BSHD.new_full((B, H, Sq), float("-inf"), dtype=dtype)
    for rows, key_blocks in _score_blocks(mask, Sq, Sk):
        if not key_blocks:
            continue
        q = _group(q_BSHD[:, rows], K, dtype) * softmax_scale
        row_max = q.new_full((*q.shape[:-1], 1), float("-inf"))
        row_sum = torch.zeros_like(row_max)
        acc = q.new_zeros(*q.shape[:-1], Dv)
        for keys in key_blocks:
            s, _ = _scores(q, k[:, :, keys], mask.hidden(rows, keys, q.device), softcap)
            new_max = torch.maximum(row_max, s.amax(-1, keepdim=True))
            shift = new_max.masked_fill(new_max == float("-inf"), 0.0)  # a row that has seen nothing: exp(-inf - 0) = 0
            p = s.sub_(shift).exp_()
            rescale = torch.exp(row_max - shift)
            row_sum = row_sum * rescale + p.sum(-1, keepdim=True)
            acc = acc * rescale + p @ v[:, :, keys]
            row_max = new_max
        sees_nothing = row_sum == 0
        out_BSHD[:, rows] = _ungroup(acc / row_sum.masked_fill(sees_nothing, 1.0), H)
        lse_BHS[:, :, rows] = (row_max + row_sum.log()).reshape(B, H, rows.stop - rows.start)
    return out_BSHD, lse_BHS


def attend_backward(
    dout_BSHD: Tensor, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, lse_BHS: Tensor, delta_BHS: Tensor,
    dq_BSHD: Tensor, dk_BSKD: Tensor, dv_BSKD: Tensor, mask: Mask, softmax_scale: float, softcap: float,
) -> None:
    """Adds the gradients of one range to dq, dk, dv (accumulator dtype).

    P = exp(S - lse) with the final lse, dS = P * (dO V^T - delta): FlashAttention-2 (arXiv:2307.08691), algorithm 2.
    """
    if torch_kernels.covers(q_BSHD, k_BSKD, v_BSKD, mask, softcap) and torch_kernels.attend_backward(
        dout_BSHD, q_BSHD, k_BSKD, v_BSKD, lse_BHS, delta_BHS, dq_BSHD, dk_BSKD, dv_BSKD, mask, softmax_scale
    ):
        return
    (Sq, H), (Sk, K) = q_BSHD.shape[1:3], v_BSKD.shape[1:3]
    dtype = accumulator_dtype(q_BSHD.dtype)
    k, v = (x.to(dtype).transpose(1, 2) for x in (k_BSKD, v_BSKD))
    # +inf makes P of a row that saw no key exactly zero
    lse_BHS = lse_BHS.to(dtype).masked_fill(lse_BHS == float("-inf"), float("inf"))
    for rows, key_blocks in _score_blocks(mask, Sq, Sk):
        if not key_blocks:
            continue
        q = _group(q_BSHD[:, rows], K, dtype) * softmax_scale
        dout = _group(dout_BSHD[:, rows], K, dtype)
        lse, delta = (x[:, :, rows].to(dtype).reshape(*q.shape[:-1], 1) for x in (lse_BHS, delta_BHS))
        dq = torch.zeros_like(q)
        for keys in key_blocks:
            s, squashed = _scores(q, k[:, :, keys], mask.hidden(rows, keys, q.device), softcap)
            p = s.sub_(lse).exp_()
            dv_BSKD[:, keys] += (p.transpose(-1, -2) @ dout).transpose(1, 2)
            ds = (dout @ v[:, :, keys].transpose(-1, -2)).sub_(delta).mul_(p)
            if squashed is not None:
                ds.mul_(1 - squashed * squashed)
            dq += ds @ k[:, :, keys]
            dk_BSKD[:, keys] += (ds.transpose(-1, -2) @ q).transpose(1, 2)  # q carries softmax_scale already
        dq_BSHD[:, rows] += _ungroup(dq * softmax_scale, H)


# ---- the operators ---------------------------------------------------------------------------------------------------


def forward(
    q: Tensor, k: Tensor, v: Tensor, q_start: Tensor | None, q_len: Tensor | None, k_start: Tensor | None,
    k_len: Tensor | None, offsets: Tensor | None, offset: int | None, softmax_scale: float, window_left: int | None,
    window_right: int | None, softcap: float, out_dtype: torch.dtype | None, deterministic: bool, sm_margin: int,
) -> tuple[Tensor, Tensor]:
    del deterministic, sm_margin  # this code is always deterministic and owns no SM
    out_dtype = out_dtype or q.dtype
    lse_dtype = accumulator_dtype(q.dtype)

    def run(q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        return attend(q_BSHD, k_BSKD, v_BSKD, Mask(offset, window_left, window_right), softmax_scale, softcap)

    if q.dim() == 4:
        B, Sq, H, _ = q.shape
        if offsets is None:
            out, lse = run(q, k, v, k.shape[1] - Sq if offset is None else offset)
            return out.to(out_dtype).contiguous(), lse.contiguous()
        out = q.new_empty(B, Sq, H, v.shape[-1], dtype=out_dtype)
        lse = q.new_empty(B, H, Sq, dtype=lse_dtype)
        for b, offset_b in enumerate(offsets.tolist()):
            one = slice(b, b + 1)
            out[one], lse[one] = run(q[one], k[one], v[one], offset_b)
        return out, lse

    assert q_start is not None and q_len is not None and k_start is not None and k_len is not None
    out = q.new_zeros(*q.shape[:2], v.shape[-1], dtype=out_dtype)
    lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=lse_dtype)
    for r in read_ranges(q_start, q_len, k_start, k_len, offsets, offset, None, q.shape[0], k.shape[0]):
        out_r, lse_r = run(q[None, r.q], k[None, r.k], v[None, r.k], r.offset)
        out[r.q], lse[:, r.q] = out_r[0].to(out_dtype), lse_r[0]
    return out, lse


def forward_into(
    q: Tensor, k: Tensor, v: Tensor, out_acc: Tensor, lse: Tensor, out: Tensor | None, q_start: Tensor, q_len: Tensor,
    k_start: Tensor, k_len: Tensor, offsets: Tensor, flags: Tensor, softmax_scale: float, window_left: int | None,
    window_right: int | None, softcap: float, sm_margin: int,
) -> None:
    del sm_margin
    for r in read_ranges(q_start, q_len, k_start, k_len, offsets, None, flags, q.shape[0], k.shape[0]):
        if r.flags & LAST and out is None:
            raise ValueError("out is None, but a visit has the flag LAST: expected a tensor for its result; pass out")
        mask = Mask(r.offset, window_left, window_right)
        out_r, lse_r = (x[0] for x in attend(q[None, r.q], k[None, r.k], v[None, r.k], mask, softmax_scale, softcap))
        if not r.flags & FIRST:
            out_r, lse_r = merge(out_acc[r.q], lse[:, r.q], out_r, lse_r)
        lse[:, r.q] = lse_r
        destination = out if r.flags & LAST else out_acc
        assert destination is not None
        destination[r.q] = out_r.to(destination.dtype)


def delta(dout: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    dtype = accumulator_dtype(out.dtype)
    result = (dout.to(dtype) * out.to(dtype)).sum(-1).transpose(-1, -2)
    return (result if dlse is None else result - dlse.to(dtype)).contiguous()


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    q_start: Tensor | None, q_len: Tensor | None, k_start: Tensor | None, k_len: Tensor | None, offsets: Tensor | None,
    offset: int | None, softmax_scale: float, window_left: int | None, window_right: int | None, softcap: float,
    accumulate: bool, accumulate_kv: bool, deterministic: bool, most_queries: int | None, mean_queries: int | None,
    sm_margin: int,
) -> None:
    del deterministic, most_queries, mean_queries, sm_margin
    dtype = accumulator_dtype(q.dtype)
    dq = dq.view(q.shape) if dq.dim() == 1 else dq
    whole = [slice(None)]
    ranges: list[Range] = []
    if q.dim() == 3:
        assert q_start is not None and q_len is not None and k_start is not None and k_len is not None
        ranges = read_ranges(q_start, q_len, k_start, k_len, offsets, offset, None, q.shape[0], k.shape[0])
    keys_written = [r.k for r in ranges] if accumulate and q.dim() == 3 else whole
    # Gradients, and the rows that are overwritten.
    gradients = (
        (dq, [] if accumulate else whole), (dk, [] if accumulate_kv else keys_written),
        (dv, [] if accumulate_kv else keys_written),
    )  # fmt: skip
    for gradient, written in gradients:
        for rows in written:
            gradient[rows] = 0
    sums = [x if x.dtype == dtype else torch.zeros_like(x, dtype=dtype) for x, _ in gradients]

    def run(queries: tuple[Tensor, ...], rows: tuple[Tensor, Tensor], keys: tuple[Tensor, ...], offset: int) -> None:
        (dout, q, dq), (lse, delta), (k, v, dk, dv) = queries, rows, keys
        mask = Mask(offset, window_left, window_right)
        attend_backward(dout, q, k, v, lse, delta, dq, dk, dv, mask, softmax_scale, softcap)

    queries, keys = (dout, q, sums[0]), (k, v, sums[1], sums[2])
    if q.dim() == 3:
        for r in ranges:
            of_queries = (lse[None, :, r.q], delta[None, :, r.q])
            run(tuple(x[None, r.q] for x in queries), of_queries, tuple(x[None, r.k] for x in keys), r.offset)
    elif offsets is None:
        run(queries, (lse, delta), keys, k.shape[1] - q.shape[1] if offset is None else offset)
    else:
        for b, offset_b in enumerate(offsets.tolist()):
            one = slice(b, b + 1)
            run(tuple(x[one] for x in queries), (lse[one], delta[one]), tuple(x[one] for x in keys), offset_b)

    for (gradient, written), total in zip(gradients, sums):
        if gradient is not total:
            for rows in written:
                gradient[rows] = total[rows].to(gradient.dtype)


def round_dq(dq_sum: Tensor, q: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
    del v, softmax_scale  # the sum is scaled
    return dq_sum.view(q.shape).to(q.dtype, copy=True)
