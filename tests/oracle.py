"""Dense attention in fp64: the oracle every other implementation is judged against.

Written for obviousness, not for speed: the whole score matrix stands in memory, a mask is a comparison of indices, and
gradients come from autograd. It imports nothing of the package under test. `tests/test_oracle.py` checks it against
PyTorch's own attention where that can express the case, and against plain Python loops where it cannot.

Shapes: B batch, S seqlen (Sq, Sk), H query heads, G key/value heads (H a multiple of G: query head h reads key head
h // (H / G)), D head_dim, E head_dim of v, T tokens of a packed tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Grads(NamedTuple):
    """Everything a backward pass is judged by, in fp64 and in the shapes of the inputs."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dsink: Tensor | None


def visible_mask(seqlen_q: int, seqlen_k: int, left: int | None, right: int | None, offset: int) -> Tensor:
    """(Sq, Sk) bool: row i sees column j iff i + offset - left <= j <= i + offset + right (None: no limit)."""
    diagonal = torch.arange(seqlen_q)[:, None] + offset
    column = torch.arange(seqlen_k)[None, :]
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    if left is not None:
        visible &= column >= diagonal - left
    if right is not None:
        visible &= column <= diagonal + right
    return visible


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    offset: int | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """softmax(mask(cap(softmax_scale * q k^T))) v with one optional extra logit per query head in the denominator.

    q (B, Sq, H, D), k (B, Sk, G, D), v (B, Sk, G, E) of any float dtype, sink (H,): computed in fp64 on `device`.
    offset None is bottom-right alignment, Sk - Sq. softcap c > 0 replaces a score s by c * tanh(s / c).
    Returns out (B, Sq, H, E) and lse (B, H, Sq), the natural log of the sum of exponentials without the sink.
    A row that sees nothing gives out 0, lse -inf and passes no gradient. Differentiable in q, k, v and sink.
    """
    q, k, v = (x.to(device).double() for x in (q, k, v))
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)

    offset = k.shape[1] - q.shape[1] if offset is None else offset
    visible = visible_mask(q.shape[1], k.shape[1], window_left, window_right, offset).to(device)
    sees_any = visible.any(dim=-1)
    lse = _masked_logsumexp(scores, visible, sees_any)
    finite_lse = torch.where(sees_any, lse, 0.0)
    # Masked scores are replaced before exp: an overflow there would turn into 0 * inf = NaN in the backward pass.
    shifted = torch.where(visible, scores - finite_lse[..., None], 0.0)
    probabilities = torch.where(visible, torch.exp(shifted), 0.0)
    out = torch.einsum("bhij,bjhe->bihe", probabilities, v)
    if sink is not None:
        share = torch.sigmoid(finite_lse - sink.to(device).double()[None, :, None])
        out = out * share.transpose(1, 2)[..., None]
    return out, lse


def _masked_logsumexp(scores: Tensor, visible: Tensor, sees_any: Tensor) -> Tensor:
    """log of the sum of exp over visible columns, (B, H, Sq); -inf, without a gradient, for rows that see nothing."""
    if scores.shape[-1] == 0:
        return scores.new_full(scores.shape[:-1], -torch.inf)
    row_max = torch.where(visible, scores.detach(), -torch.inf).amax(dim=-1)
    row_max = torch.where(sees_any, row_max, 0.0)
    shifted = torch.where(visible, scores - row_max[..., None], 0.0)
    total = torch.where(visible, torch.exp(shifted), 0.0).sum(dim=-1)
    return torch.where(sees_any, torch.log(torch.where(sees_any, total, 1.0)) + row_max, -torch.inf)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_start: list[int],
    q_len: list[int],
    k_start: list[int],
    k_len: list[int],
    offsets: list[int | None] | None = None,
    *,
    softmax_scale: float | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention` over ranges of packed tensors: range n of q attends to range n of k and v, and to nothing else.

    q (Tq, H, D), k (Tk, G, D), v (Tk, G, E); four lists of equal length (query ranges disjoint, key ranges may
    overlap); offsets per range, None (for all or for one): k_len - q_len. Returns out (Tq, H, E) and lse (H, Tq) in
    fp64; rows outside every range have out 0 and lse -inf.
    """
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=torch.float64)
    lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float64)
    offsets = [None] * len(q_start) if offsets is None else offsets
    for qs, qn, ks, kn, offset in zip(q_start, q_len, k_start, k_len, offsets, strict=True):
        rows, columns = slice(qs, qs + qn), slice(ks, ks + kn)
        out_n, lse_n = attention(
            q[None, rows], k[None, columns], v[None, columns], offset=offset, softmax_scale=softmax_scale,
            window_left=window_left, window_right=window_right, softcap=softcap, sink=sink,
        )  # fmt: skip
        out = out.index_copy(0, torch.arange(qs, qs + qn), out_n[0])
        lse = lse.index_copy(1, torch.arange(qs, qs + qn), lse_n[0])
    return out, lse


def attention_grads(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dlse: Tensor | None = None, *, sink: Tensor | None = None, **mask
) -> Grads:
    """Outputs of `attention` and the gradients of sum(out * dout) + sum(lse * dlse), all fp64 on the CPU."""
    return _grads_of(attention, q, k, v, dout, dlse, sink, mask)


def packed_attention_grads(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dlse: Tensor | None = None, *, sink: Tensor | None = None, **ranges
) -> Grads:
    """The same for `packed_attention`; rows outside every range get zero gradients."""
    return _grads_of(packed_attention, q, k, v, dout, dlse, sink, ranges)


def _grads_of(function, q, k, v, dout, dlse, sink, arguments) -> Grads:
    leaves = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    if sink is not None:
        leaves.append(sink.detach().cpu().double().requires_grad_())
    with torch.enable_grad():
        out, lse = function(*leaves[:3], sink=leaves[3] if sink is not None else None, **arguments)
        seen = torch.isfinite(lse)
        # The loss leaves rows that see nothing out: -inf * dlse is no number, and by definition they pass no gradient.
        loss = (out * dout.detach().cpu().double()).sum()
        if dlse is not None:
            loss = loss + (torch.where(seen, lse, 0.0) * dlse.detach().cpu().double()).sum()
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        else:  # no range at all: nothing depends on any input
            grads = [torch.zeros_like(x) for x in leaves]
    dq, dk, dv, *dsink = grads
    return Grads(out.detach(), lse.detach(), dq, dk, dv, dsink[0] if dsink else None)
