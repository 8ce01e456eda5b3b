"""The ecosystem's functions: names, argument order, layouts and results of FlashAttention-3's Python interface.

Code written for `flash_attn_interface` changes one import. Arguments that we do not honour raise; none is dropped.
Keyword-only additions of ours: `sink` (a learnable logit per query head that takes part in the softmax without a value)
and `offset` (position of the first query relative to the first key).
"""

from __future__ import annotations

import os
from typing import Any, Protocol

import torch
from torch import Tensor

from fa3_dist import ops


class Attention(Protocol):
    """What layers call: a subset of `flash_attn_func`, everything after q, k, v by keyword.

    q (B, S, Hq, D), k (B, S, Hkv, D), v (B, S, Hkv, Dv) -> out (B, S, Hq, Dv).
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, sink: Tensor | None = None,
        deterministic: bool = False,
    ) -> Tensor: ...


def apply_sink(out: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """Attention with a sink from attention without: out * sigmoid(lse - sink).

    A sink adds exp(sink) to the softmax's denominator and nothing to its numerator (Xiao et al. 2023, arXiv:2309.17453;
    learnable per head as in gpt-oss).

    Args:
        out: (B, S, H, D) or packed (T, H, D); lse: (B, H, S) or (H, T), without the sink; sink: (H,).
    """
    if not isinstance(sink, Tensor):
        raise TypeError(f"sink is a {type(sink).__name__}: expected a Tensor ({out.shape[-2]},), a logit a query head")
    if tuple(sink.shape) != (out.shape[-2],):
        raise ValueError(f"sink has shape {tuple(sink.shape)}: expected ({out.shape[-2]},), one logit a query head")
    keep = torch.sigmoid(lse - sink.to(lse.dtype).unsqueeze(-1))
    return (out * keep.transpose(-1, -2).unsqueeze(-1)).to(out.dtype)


def window_bounds(causal: bool, window_size: tuple[int, int]) -> tuple[int | None, int | None]:
    """FlashAttention's (causal, window_size) as the operators' bounds: -1, like any negative number, is no bound."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise ValueError(f"window_size is {window_size!r}: expected (left, right), two ints, -1 for no bound")
    left, right = window_size
    window_left = None if left is None or left < 0 else left
    window_right = None if right is None or right < 0 else right
    return window_left, 0 if causal else window_right


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False, qv: Tensor | None = None,
    q_descale: Tensor | None = None, k_descale: Tensor | None = None, v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1), attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1,
    pack_gqa: bool | None = None, deterministic: bool = False, sm_margin: int = 0, return_attn_probs: bool = False, *,
    sink: Tensor | None = None, offset: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a dense batch, differentiable in q, k, v and sink, through lse too.

    Args:
        q: (B, Sq, Hq, D); k: (B, Sk, Hkv, D); v: (B, Sk, Hkv, Dv), Hq a multiple of Hkv; fp32, bf16, fp16 or fp64, any
            strides. Under autocast, fp32 inputs are cast to its dtype, as torch's scaled_dot_product_attention does.
        softmax_scale: default D ** -0.5.
        causal: query i sees keys up to i + Sk - Sq (aligned to the bottom right corner).
        window_size: (left, right): query i sees keys from i + Sk - Sq - left to i + Sk - Sq + right; -1 is no bound.
        softcap: c > 0 caps scores with c * tanh(s / c).
        num_splits: 0 or 1 (the keys are never split); pack_gqa: a hint without effect on results, ignored.
        deterministic: bitwise equal gradients from run to run.
        sm_margin: SMs to leave to other kernels.
        return_attn_probs: return lse as well.
        sink: (Hq,) learnable logits.
        offset: replaces Sk - Sq in the masks above.

    Returns:
        out (B, Sq, Hq, Dv), or (out, lse) with lse (B, Hq, Sq), fp32, natural log, without the sink. A row that sees no
        key gives 0 and -inf.

    Raises:
        ValueError, TypeError: an argument of the wrong form, or one that we do not honour (qv, descales,
            attention_chunk, num_splits > 1); the message names it, what came and what was expected.
    """
    _check_options(qv, q_descale, k_descale, v_descale, attention_chunk, num_splits, pack_gqa)
    q, k, v = cast_for_autocast(q, k, v)
    _check_dim("flash_attn_func", q, 4, "(batch, seqlen, heads, head_dim)")
    window_left, window_right = window_bounds(causal, window_size)
    out, lse = ops.forward_as_wanted(
        q, k, v, None, None, None, None, None, offset, softmax_scale, window_left, window_right, softcap, None,
        deterministic, sm_margin, bool(return_attn_probs) or sink is not None,
    )  # fmt: skip
    out = out if sink is None else apply_sink(out, lse, sink)
    return (out, lse) if return_attn_probs else out


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int | None,
    max_seqlen_k: int | None, seqused_q: Tensor | None = None, seqused_k: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False, qv: Tensor | None = None, q_descale: Tensor | None = None,
    k_descale: Tensor | None = None, v_descale: Tensor | None = None, window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1, pack_gqa: bool | None = None,
    deterministic: bool = False, sm_margin: int = 0, return_attn_probs: bool = False, *, sink: Tensor | None = None,
    offset: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention inside each of n sequences packed one after the other.

    Args:
        q: (total_q, Hq, D); k: (total_k, Hkv, D); v: (total_k, Hkv, Dv).
        cu_seqlens_q, cu_seqlens_k: int32 (n + 1,), sequence s holds rows [cu_seqlens[s], cu_seqlens[s + 1]).
        max_seqlen_q, max_seqlen_k: accepted for compatibility, not needed; with FA3_DIST_DEBUG=1 checked.
        seqused_q, seqused_k: int32 (n,), use only that many rows of each sequence; other rows give out 0, lse -inf.
        others: as in `flash_attn_func`, Sq and Sk being the lengths of each sequence.

    Returns:
        out (total_q, Hq, Dv), or (out, lse) with lse (Hq, total_q).

    Raises:
        ValueError, TypeError: as in `flash_attn_func`.
    """
    _check_options(qv, q_descale, k_descale, v_descale, attention_chunk, num_splits, pack_gqa)
    q, k, v = cast_for_autocast(q, k, v)
    _check_dim("flash_attn_varlen_func", q, 3, "(total_q, heads, head_dim)")
    q_start, q_len = _starts_and_lengths("q", cu_seqlens_q, seqused_q, max_seqlen_q, q)
    if cu_seqlens_k is cu_seqlens_q and seqused_k is seqused_q:
        k_start, k_len = q_start, q_len
    else:
        k_start, k_len = _starts_and_lengths("k", cu_seqlens_k, seqused_k, max_seqlen_k, k)
    window_left, window_right = window_bounds(causal, window_size)
    out, lse = ops.forward_as_wanted(
        q, k, v, q_start, q_len, k_start, k_len, None, offset, softmax_scale, window_left, window_right, softcap, None,
        deterministic, sm_margin, bool(return_attn_probs) or sink is not None,
    )  # fmt: skip
    out = out if sink is None else apply_sink(out, lse, sink)
    return (out, lse) if return_attn_probs else out


def flash_attn_qkvpacked_func(
    qkv: Tensor, softmax_scale: float | None = None, causal: bool = False, q_descale: Tensor | None = None,
    k_descale: Tensor | None = None, v_descale: Tensor | None = None, window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0, softcap: float = 0.0, deterministic: bool = False, num_heads_q: int | None = None,
    sm_margin: int = 0, return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attn_func` on qkv (B, S, 3, H, D), or (B, S, Hq + 2 * Hkv, D) with `num_heads_q` = Hq; see there."""
    q, k, v = _split_qkv(qkv, num_heads_q)
    return flash_attn_func(
        q, k, v, softmax_scale, causal, None, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap,
        deterministic=deterministic, sm_margin=sm_margin, return_attn_probs=return_attn_probs,
    )


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attn_func` on q (B, Sq, Hq, D) and kv (B, Sk, 2, Hkv, D); the other arguments are the same."""
    _check_dim("flash_attn_kvpacked_func", kv, 5, "(batch, seqlen, 2, heads, head_dim)", name="kv")
    if kv.shape[2] != 2:
        raise ValueError(f"kv has shape {tuple(kv.shape)}: expected (batch, seqlen, 2, heads, head_dim)")
    k, v = kv.unbind(2)
    return flash_attn_func(q, k, v, *args, **kwargs)


def _split_qkv(qkv: Tensor, num_heads_q: int | None) -> tuple[Tensor, ...]:
    if qkv.dim() == 5 and qkv.shape[2] == 3:
        return qkv.unbind(2)
    if qkv.dim() == 4 and num_heads_q is not None:
        kv_heads, rest = divmod(qkv.shape[2] - num_heads_q, 2)
        if num_heads_q > 0 and kv_heads > 0 and rest == 0:
            return qkv.split([num_heads_q, kv_heads, kv_heads], dim=2)
    raise ValueError(
        f"qkv has shape {tuple(qkv.shape)} with num_heads_q = {num_heads_q}: expected (batch, seqlen, 3, heads, "
        "head_dim), or (batch, seqlen, num_heads_q + 2 * heads_kv, head_dim) with num_heads_q given"
    )


def _check_options(
    qv: Tensor | None, q_descale: Tensor | None, k_descale: Tensor | None, v_descale: Tensor | None,
    attention_chunk: int, num_splits: int, pack_gqa: bool | None,
) -> None:
    """Raises for options of FlashAttention-3 that we do not honour."""
    if not (qv is None and q_descale is None and k_descale is None and v_descale is None):
        refused = {"qv": qv, "q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
        name, value = next((name, value) for name, value in refused.items() if value is not None)
        raise ValueError(f"{name} is a {type(value).__name__}: expected None, fa3_dist does not support it yet")
    if attention_chunk != 0:
        raise ValueError(f"attention_chunk is {attention_chunk}: expected 0, chunked attention is not supported")
    if num_splits not in (0, 1):
        raise ValueError(f"num_splits is {num_splits}: expected 0 or 1, keys are never split over blocks")
    if pack_gqa not in (None, True, False):
        raise TypeError(f"pack_gqa is {pack_gqa!r}: expected None, True or False")


def _check_dim(function: str, x: Tensor, dim: int, layout: str, name: str = "q") -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}: expected a tensor {layout}")
    if x.dim() != dim:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: {function} expected {layout}")


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """fp32 inputs in the dtype of an active autocast region."""
    if not torch._C._is_any_autocast_enabled():  # first, because it is the cheapest to ask
        return tensors
    device_type = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if device_type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) if x.dtype == torch.float32 else x for x in tensors)


def _starts_and_lengths(
    side: str, cu_seqlens: Tensor, seqused: Tensor | None, max_seqlen: int | None, x: Tensor
) -> tuple[Tensor, Tensor]:
    name = f"cu_seqlens_{side}"
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name} is a {type(cu_seqlens).__name__}: expected an int32 tensor (sequences + 1,)")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} has dtype {cu_seqlens.dtype}: expected torch.int32; use {name}.to(torch.int32)")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name} has shape {tuple(cu_seqlens.shape)}: expected (sequences + 1,)")
    starts, lengths = cu_seqlens[:-1], cu_seqlens[1:] - cu_seqlens[:-1]
    debug = os.environ.get("FA3_DIST_DEBUG") == "1"
    if debug and max_seqlen is not None and bool((lengths > max_seqlen).any()):
        longest = int(lengths.max())
        raise ValueError(f"max_seqlen_{side} is {max_seqlen}: expected at least {longest}, the longest sequence")
    if seqused is not None:
        if debug and bool((seqused > lengths).any()):
            raise ValueError(f"seqused_{side} is longer than its sequence: expected at most {lengths.tolist()}")
        lengths = seqused
    return starts, lengths
