"""The operators: schemas, argument checks, fake kernels, autograd, and the choice of what runs them on a GPU.

`torch.ops.fa3_dist.{forward, forward_into, delta, backward, round_dq}` are defined here and nowhere else; the functions
of this module of the same names are how the rest of the package calls them (keywords, defaults). Which kernel runs is
decided by the device of the inputs: `reference` on the CPU; on CUDA the compiled sm_90a library where it has the
variant, else PyTorch's kernels through `reference`, with one warning a variant (`FA3_DIST_STRICT=1` makes that an
error).

An operator's way through the dispatcher costs more host time than a short kernel runs. `forward` and `forward_into`
therefore call the compiled library directly where that comes to the same: see `_is_unobserved`.

Shapes: dense q (B, Sq, Hq, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv), lse and delta (B, Hq, Sq); packed q (Tq, Hq, D),
k (Tk, Hkv, D), v (Tk, Hkv, Dv), lse and delta (Hq, Tq), with int32 (n,) starts and lengths of the n ranges.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from fa3_dist import reference, torch_kernels
from fa3_dist._build import LIBRARY
from fa3_dist.algebra import accumulator_dtype
from fa3_dist.reference import FIRST, LAST

__all__ = [
    "FIRST", "LAST", "adds_atomically", "backward", "delta", "forward", "forward_into", "library_info", "new_dq_sum",
    "round_dq",
]  # fmt: skip

NAMESPACE = "fa3_dist"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RANGES = ("q_start", "q_len", "k_start", "k_len")

_RANGES = "Tensor? q_start, Tensor? q_len, Tensor? k_start, Tensor? k_len, Tensor? offsets, SymInt? offset"
_VISITS = "Tensor q_start, Tensor q_len, Tensor k_start, Tensor k_len, Tensor offsets, Tensor flags"
_SCORES = "float softmax_scale, SymInt? window_left, SymInt? window_right, float softcap"
SCHEMAS = {
    "forward": f"(Tensor q, Tensor k, Tensor v, {_RANGES}, {_SCORES}, ScalarType? out_dtype, bool deterministic, "
    "int sm_margin) -> (Tensor, Tensor)",
    "forward_into": "(Tensor q, Tensor k, Tensor v, Tensor(a!) out_acc, Tensor(b!) lse, Tensor(c!)? out, "
    f"{_VISITS}, {_SCORES}, int sm_margin) -> ()",
    "delta": "(Tensor dout, Tensor out, Tensor? dlse) -> Tensor",
    "backward": "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor delta, Tensor(a!) dq, Tensor(b!) dk, "
    f"Tensor(c!) dv, {_RANGES}, {_SCORES}, bool accumulate, bool accumulate_kv, bool deterministic, "
    "int? most_queries, int? mean_queries, int sm_margin) -> ()",
    "round_dq": "(Tensor dq_sum, Tensor q, Tensor v, float softmax_scale) -> Tensor",
}
# names of dtypes in csrc/instances.def
_VARIANT_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# Operators with an `<op>_sm90` implementation in the compiled library, and the family of rows in csrc/instances.def
# that says which dtypes and head dims it has.
COMPILED = {
    "forward": "forward", "forward_into": "forward", "delta": "delta", "backward": "backward", "round_dq": "backward",
}  # fmt: skip
VECTOR = 8  # the compiled attention takes head dims that are multiples of it: 16 bytes of bf16 or fp16


# ---- public wrappers -------------------------------------------------------------------------------------------------


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, q_start: Tensor | None = None, q_len: Tensor | None = None,
    k_start: Tensor | None = None, k_len: Tensor | None = None, offsets: Tensor | None = None,
    offset: int | None = None, softmax_scale: float | None = None, window_left: int | None = None,
    window_right: int | None = None, softcap: float = 0.0, out_dtype: torch.dtype | None = None,
    deterministic: bool = False, sm_margin: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention; differentiable in q, k and v through both results.

    Row i of a range of queries sees column j of its keys when i + offset - window_left <= j <= i + offset +
    window_right; None is no bound, causal is window_right=0. The offset defaults to the sequence's seqlen_k - seqlen_q.

    Args:
        q, k, v: dense or packed (module docstring), all fp32, bf16, fp16 or fp64; Hq a multiple of Hkv; any strides.
        q_start, q_len, k_start, k_len: int32 (n,), the packed form only.
        offsets: int32 (n,) or (B,), one offset a sequence; offset: one for all. At most one of the two.
        softmax_scale: factor of the scores, > 0; default D ** -0.5.
        softcap: c > 0 replaces each scaled score s by c * tanh(s / c); 0 is off.
        out_dtype: dtype of out: q's (default) or fp32.
        deterministic: the backward gives bitwise equal gradients from run to run.
        sm_margin: SMs of the GPU to leave to others, communication kernels say.

    Returns:
        out (B, Sq, Hq, Dv) or (Tq, Hq, Dv), and lse, the natural log of the sum of exp(scores), fp32 (fp64 for fp64).
        A row that sees no key, or lies in no range, has out 0, lse -inf and gradients 0.
        Short ranges that are neighbours in memory are computed together: an infinity or a NaN in v of one may reach
        the out of the others.

    Raises:
        TypeError, ValueError: an argument is not of the form above; the message names it.
    """
    return forward_as_wanted(
        q, k, v, q_start, q_len, k_start, k_len, offsets, offset, softmax_scale, window_left, window_right, softcap,
        out_dtype, deterministic, sm_margin, True,
    )  # fmt: skip


def forward_as_wanted(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Any]:
    """`forward`, its arguments by position and one more, whether lse is wanted: else None may come in its place."""
    if _is_unobserved(q, k, v, rest[0]):
        is_recorded = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        result = _direct_forward(q, k, v, *rest[:-1], is_recorded or rest[-1])
        if result is not None:
            return _record(q, k, v, (q, k, v, *rest[:-1]), result) if is_recorded else result
    _check_is_tensor("q", q)
    scale = _default_scale(q) if rest[_SCALE] is None else rest[_SCALE]
    return torch.ops.fa3_dist.forward.default(q, k, v, *rest[:_SCALE], scale, *rest[_SCALE + 1 : -1])


def forward_into(
    q: Tensor, k: Tensor, v: Tensor, out_acc: Tensor, lse: Tensor, out: Tensor | None, *, q_start: Tensor,
    q_len: Tensor, k_start: Tensor, k_len: Tensor, offsets: Tensor, flags: Tensor, softmax_scale: float | None = None,
    window_left: int | None = None, window_right: int | None = None, softcap: float = 0.0, sm_margin: int = 0,
) -> None:
    """Continues attention from a running state over a list of visits; packed tensors only, no autograd.

    Args:
        out_acc: running output (Tq, Hq, Dv), fp32 (fp64 for fp64 inputs), updated in place.
        lse: running log-sum-exp (Hq, Tq), same dtype, updated in place.
        out: (Tq, Hq, Dv), any float dtype; receives the rows of visits flagged LAST, whose out_acc is unspecified
            afterwards. None if there are none.
        q_start, q_len, k_start, k_len, offsets: int32 (n,); offset = global position of the visit's first query minus
            that of its first key. The ranges of queries of one call are disjoint.
        flags: int32 (n,), FIRST (state not read, may hold NaN) | LAST.
        others: as in `forward`.

    A visit without a visible key leaves the state as it is (with FIRST: out 0, lse -inf). Rows in no visit keep theirs.

    Raises:
        TypeError, ValueError: an argument is not of the form above; the message names it.
    """
    if softmax_scale is None:
        softmax_scale = _default_scale(q)
    args = (
        q, k, v, out_acc, lse, out, q_start, q_len, k_start, k_len, offsets, flags, softmax_scale, window_left,
        window_right, softcap, sm_margin,
    )  # fmt: skip
    if _is_unobserved(q, k, v, q_start) and _direct_forward_into(*args):
        return
    _check_is_tensor("q", q)
    torch.ops.fa3_dist.forward_into.default(*args)


def delta(dout: Tensor, out: Tensor, dlse: Tensor | None = None) -> Tensor:
    """rowsum(dout * out) - dlse: what the backward subtracts from dP = dout V^T.

    Subtracting the gradient of lse here is all that a differentiable lse takes, since d lse / d S = P.

    Args:
        dout, out: (B, Sq, Hq, Dv) or (Tq, Hq, Dv), any float dtypes.
        dlse: gradient of lse, shape of the result.

    Returns:
        (B, Hq, Sq) or (Hq, Tq), fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: shapes or dtypes disagree; the message names the argument.
    """
    return torch.ops.fa3_dist.delta.default(dout, out, dlse)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, *,
    q_start: Tensor | None = None, q_len: Tensor | None = None, k_start: Tensor | None = None,
    k_len: Tensor | None = None, offsets: Tensor | None = None, offset: int | None = None,
    softmax_scale: float | None = None, window_left: int | None = None, window_right: int | None = None,
    softcap: float = 0.0, accumulate: bool = False, accumulate_kv: bool | None = None, deterministic: bool = False,
    most_queries: int | None = None, mean_queries: int | None = None, sm_margin: int = 0,
) -> None:
    """Gradients of attention, written to dq, dk and dv or added to them.

    Args:
        dout: (B, Sq, Hq, Dv) or (Tq, Hq, Dv); lse: the final one; delta: from `delta`.
        dq, dk, dv: shapes of q, k, v. accumulate=True: fp32 (fp64 for fp64 inputs), added to in place; dq may be one of
            `new_dq_sum`.
            accumulate=False: any float dtype, overwritten; rows in no range get 0. The ranges of keys of one call are
            disjoint, and without accumulate those of queries, too.
        accumulate_kv: whether dk and dv are added to; default: as dq is. False where dq is: they are of any float dtype
            and their rows of keys that a query sees are overwritten; those in a range that none sees get 0 or keep
            what they hold, those in no range keep it.
        deterministic: bitwise equal gradients from run to run. Ranges that accumulate may share queries: the compiled
            kernel then takes them one after the other, a launch each.
        most_queries, mean_queries: how many queries of a head see a key, at most and on the mean over the ranges' keys,
            from whoever knows: by them the compiled kernel divides its work. None: as far as shapes and windows tell.
        others: as in `forward`.

    Raises:
        TypeError, ValueError: an argument is not of the form above; the message names it.
    """
    _check_is_tensor("q", q)
    if softmax_scale is None:
        softmax_scale = _default_scale(q)
    torch.ops.fa3_dist.backward.default(
        dout, q, k, v, lse, delta, dq, dk, dv, q_start, q_len, k_start, k_len, offsets, offset, softmax_scale,
        window_left, window_right, softcap, accumulate, accumulate if accumulate_kv is None else accumulate_kv,
        deterministic, most_queries, mean_queries, sm_margin,
    )


def new_dq_sum(q: Tensor, v: Tensor) -> Tensor:
    """Zeros in which packed calls of `backward` with accumulate sum up dq, in the order that suits their kernel best.

    Args:
        q, v: (Tq, Hq, D) and (Tk, Hkv, Dv), those of the calls.

    Returns:
        A tensor of one dimension for `backward`'s dq, and then for `round_dq`; fp32 (fp64 for fp64 inputs).
    """
    elements = q.shape[0] * q.shape[1] * _columns_of_sum(q, v)
    return q.new_zeros(elements, dtype=accumulator_dtype(q.dtype))


def round_dq(dq_sum: Tensor, q: Tensor, v: Tensor, softmax_scale: float | None = None) -> Tensor:
    """dq (Tq, Hq, D), in q's dtype, of a sum from `new_dq_sum`.

    Args:
        q, v, softmax_scale: those of the calls that added to it.

    Raises:
        TypeError, ValueError: the sum does not go with q and v.
    """
    if softmax_scale is None:
        softmax_scale = _default_scale(q)
    return torch.ops.fa3_dist.round_dq.default(dq_sum, q, v, softmax_scale)


def adds_atomically(q: Tensor, v: Tensor) -> bool:
    """Whether calls of `backward` on several CUDA streams may add to one sum from `new_dq_sum` at a time."""
    return q.is_cuda and _has_compiled_kernel(q.device, _request("round_dq", (None, q, v)))


def _columns_of_sum(q: Tensor, v: Tensor) -> int:
    """Elements of a row of a sum of dq: those of the rows that the kernel computes with."""
    return _columns_of_variant(q.dtype, q.shape[-1], v.shape[-1]) if adds_atomically(q, v) else q.shape[-1]


@functools.cache
def _columns_of_variant(dtype: torch.dtype, head_dim: int, head_dim_v: int) -> int:
    info = library_info()
    assert info is not None
    return min(_sizes_that_hold(info["variants"], _Request("backward", (dtype,), (head_dim, head_dim_v))), key=sum)[0]


def _default_scale(q: Tensor) -> float:
    try:
        return q.shape[-1] ** -0.5
    except (AttributeError, IndexError, ZeroDivisionError):
        _check_is_tensor("q", q)
        return 1.0  # the operator refuses q


# ---- argument checks, shared by every back end -----------------------------------------------------------------------


def _check_is_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}: expected a Tensor")


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _check_tensor(name: str, x: Tensor, shape: tuple[int, ...], like: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    _check_is_tensor(name, x)
    if x.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {x.dtype}: expected {' or '.join(map(str, dtypes))}")
    if x.shape != shape:
        raise ValueError(f"{name} has shape {_shape(x)}: expected {tuple(shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}: expected {like.device}, where q is; move it there")


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises TypeError or ValueError unless q, k and v fit together, dense or packed."""
    if q.dim() not in (3, 4):
        raise ValueError(
            f"q has shape {_shape(q)}: expected (batch, seqlen, heads, head_dim), or packed (tokens, heads, head_dim)"
        )
    if q.dtype not in DTYPES:
        raise TypeError(f"q has dtype {q.dtype}: expected {', '.join(map(str, DTYPES))}")
    for name, x in (("k", k), ("v", v)):
        _check_is_tensor(name, x)
        if x.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {x.dtype}: expected {q.dtype}, the dtype of q; cast one of them")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}: expected {q.device}, where q is; move it there")
        if x.dim() != q.dim():
            raise ValueError(f"{name} has shape {_shape(x)}: expected {q.dim()} dimensions like q {_shape(q)}")
    if k.shape[-1] != q.shape[-1] or q.shape[-1] == 0:
        raise ValueError(f"k has head_dim {k.shape[-1]}: expected {q.shape[-1]}, the head_dim of q, at least 1")
    if q.dim() == 4 and k.shape[0] != q.shape[0]:
        raise ValueError(f"k has batch size {k.shape[0]}: expected {q.shape[0]}, the batch size of q")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v has shape {_shape(v)}: expected {(*_shape(k)[:-1], 'head_dim_v')} beside k {_shape(k)}")
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if kv_heads == 0 or heads % kv_heads != 0 or heads == 0:
        raise ValueError(
            f"k and v have {kv_heads} heads and q has {heads}: expected the heads of q to be a multiple of theirs"
        )


def _check_ranges(q: Tensor, ranges: Sequence[Tensor | None], offsets: Tensor | None, offset: int | None) -> None:
    if offsets is not None and offset is not None:
        raise ValueError(f"offset = {offset} and offsets were both given: expected at most one of them")
    packed = q.dim() == 3
    for name, x in zip(RANGES, ranges):
        if not packed and x is not None:
            raise ValueError(f"{name} was given with dense q {_shape(q)}: expected packed q (tokens, heads, head_dim)")
        if packed and x is None:
            raise ValueError(f"{name} is None with packed q {_shape(q)}: expected an int32 tensor, an entry a sequence")
    count = q.shape[0]
    if packed:
        q_start = ranges[0]
        assert q_start is not None
        if q_start.dim() != 1:
            raise ValueError(f"q_start has shape {_shape(q_start)}: expected one dimension, an entry a sequence")
        count = q_start.shape[0]
    for name, x in zip((*RANGES, "offsets"), (*ranges, offsets)):
        if x is not None:
            _check_tensor(name, x, (count,), q, (torch.int32,))


def check_scores(softmax_scale: float, window_left: int | None, window_right: int | None, softcap: float) -> None:
    """Raises ValueError unless scores can be scaled, masked and capped so."""
    if not (math.isfinite(softmax_scale) and softmax_scale > 0):
        raise ValueError(f"softmax_scale is {softmax_scale}: expected a finite number above 0")
    if not (math.isfinite(softcap) and softcap >= 0):
        raise ValueError(f"softcap is {softcap}: expected a finite number above 0, or 0 for none")
    for name, bound in (("window_left", window_left), ("window_right", window_right)):
        if bound is not None and bound < 0:
            raise ValueError(f"{name} is {bound}: expected a number of keys, 0 or more, or None for no bound")


def _check_sm_margin(sm_margin: int) -> None:
    if sm_margin < 0:
        raise ValueError(f"sm_margin is {sm_margin}: expected a number of SMs, 0 or more")


def _rows_shape(q: Tensor) -> tuple[int, ...]:
    """Shape of lse and delta: (B, Hq, Sq), packed (Hq, Tq)."""
    return (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])


def _check_forward(
    q: Tensor, k: Tensor, v: Tensor, q_start: Tensor | None, q_len: Tensor | None, k_start: Tensor | None,
    k_len: Tensor | None, offsets: Tensor | None, offset: int | None, softmax_scale: float, window_left: int | None,
    window_right: int | None, softcap: float, out_dtype: torch.dtype | None, deterministic: bool, sm_margin: int,
) -> None:
    check_qkv(q, k, v)
    _check_ranges(q, (q_start, q_len, k_start, k_len), offsets, offset)
    check_scores(softmax_scale, window_left, window_right, softcap)
    _check_sm_margin(sm_margin)
    if out_dtype not in (None, q.dtype, accumulator_dtype(q.dtype)):
        raise TypeError(f"out_dtype is {out_dtype}: expected q's {q.dtype}, or {accumulator_dtype(q.dtype)}")


def _check_forward_into(
    q: Tensor, k: Tensor, v: Tensor, out_acc: Tensor, lse: Tensor, out: Tensor | None, q_start: Tensor, q_len: Tensor,
    k_start: Tensor, k_len: Tensor, offsets: Tensor, flags: Tensor, softmax_scale: float, window_left: int | None,
    window_right: int | None, softcap: float, sm_margin: int,
) -> None:
    check_qkv(q, k, v)
    if q.dim() != 3:
        raise ValueError(f"q has shape {_shape(q)}: expected packed (tokens, heads, head_dim); flatten the batch")
    _check_ranges(q, (q_start, q_len, k_start, k_len), offsets, None)
    _check_tensor("flags", flags, _shape(q_start), q, (torch.int32,))
    check_scores(softmax_scale, window_left, window_right, softcap)
    _check_sm_margin(sm_margin)
    state_dtype = accumulator_dtype(q.dtype)
    out_shape = (*_shape(q)[:-1], v.shape[-1])
    _check_tensor("out_acc", out_acc, out_shape, q, (state_dtype,))
    _check_tensor("lse", lse, _rows_shape(q), q, (state_dtype,))
    if out is not None:
        _check_tensor("out", out, out_shape, q, DTYPES)


def _check_delta(dout: Tensor, out: Tensor, dlse: Tensor | None) -> None:
    _check_is_tensor("out", out)
    if out.dim() not in (3, 4):
        raise ValueError(
            f"out has shape {_shape(out)}: expected (batch, seqlen, heads, head_dim) or (tokens, heads, head_dim)"
        )
    if out.dtype not in DTYPES:
        raise TypeError(f"out has dtype {out.dtype}: expected {', '.join(map(str, DTYPES))}")
    _check_tensor("dout", dout, _shape(out), out, DTYPES)
    if dlse is not None:
        _check_tensor("dlse", dlse, _rows_shape(out), out, (accumulator_dtype(out.dtype),))


def _check_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    q_start: Tensor | None, q_len: Tensor | None, k_start: Tensor | None, k_len: Tensor | None, offsets: Tensor | None,
    offset: int | None, softmax_scale: float, window_left: int | None, window_right: int | None, softcap: float,
    accumulate: bool, accumulate_kv: bool, deterministic: bool, most_queries: int | None, mean_queries: int | None,
    sm_margin: int,
) -> None:
    check_qkv(q, k, v)
    _check_ranges(q, (q_start, q_len, k_start, k_len), offsets, offset)
    check_scores(softmax_scale, window_left, window_right, softcap)
    _check_sm_margin(sm_margin)
    if (most_queries is None) != (mean_queries is None) or not 0 <= (mean_queries or 0) <= (most_queries or 0):
        raise ValueError(
            f"most_queries is {most_queries} and mean_queries {mean_queries}: expected both or neither, and a mean "
            "from 0 to the most"
        )
    _check_tensor("dout", dout, (*_shape(q)[:-1], v.shape[-1]), q, DTYPES)
    sums = accumulator_dtype(q.dtype)
    for name, x in (("lse", lse), ("delta", delta)):
        _check_tensor(name, x, _rows_shape(q), q, (sums,))
    if accumulate_kv and not accumulate:
        raise ValueError("accumulate_kv is True and accumulate False: expected dq to be added to where dk and dv are")
    if dq.dim() == 1 and q.dim() == 3 and accumulate:
        _check_dq_sum("dq", dq, q, v)
    else:
        _check_tensor("dq", dq, _shape(q), q, (sums,) if accumulate else DTYPES)
    for name, x, like in (("dk", dk, k), ("dv", dv, v)):
        _check_tensor(name, x, _shape(like), q, (sums,) if accumulate_kv else DTYPES)


def _check_dq_sum(name: str, dq_sum: Tensor, q: Tensor, v: Tensor) -> None:
    # NOTE: which kernel runs, and so how many elements its sum has, a fake tensor's device cannot be asked.
    shape = _shape(dq_sum) if is_fake(q) else (q.shape[0] * q.shape[1] * _columns_of_sum(q, v),)
    _check_tensor(name, dq_sum, shape, q, (accumulator_dtype(q.dtype),))
    if not dq_sum.is_contiguous():
        raise ValueError(f"{name} has stride {dq_sum.stride(0)}: expected a contiguous sum; take one from new_dq_sum")


def _check_round_dq(dq_sum: Tensor, q: Tensor, v: Tensor, softmax_scale: float) -> None:
    if q.dim() != 3 or v.dim() != 3:
        raise ValueError(f"q has shape {_shape(q)} and v {_shape(v)}: expected packed (tokens, heads, head_dim)")
    check_scores(softmax_scale, None, None, 0.0)
    _check_dq_sum("dq_sum", dq_sum, q, v)


_CHECKS: dict[str, Callable[..., None]] = {
    "forward": _check_forward,
    "forward_into": _check_forward_into,
    "delta": _check_delta,
    "backward": _check_backward,
    "round_dq": _check_round_dq,
}


# ---- what runs an operator -------------------------------------------------------------------------------------------


def _load_library() -> bool:
    """Loads the compiled library if it is there; a library that does not load is reported, never silently ignored."""
    if not LIBRARY.exists():
        return False
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        warnings.warn(
            f"the compiled library {LIBRARY} does not load under torch {torch.__version__}: {error}. CUDA tensors "
            "run through PyTorch's kernels; rebuild it with `make kernels`",
            stacklevel=2,
        )
        return False
    return True


def library_info() -> dict[str, Any] | None:
    """What the compiled library says of itself: version, variants, hash of its sources, compilers; None without one."""
    if not _library_loaded:
        return None
    info = ctypes.CDLL(str(LIBRARY)).fa3_dist_build_info
    info.restype = ctypes.c_char_p
    return json.loads(info().decode())


class _Request(NamedTuple):
    """What decides whether the compiled library can run a call."""

    op: str
    dtypes: tuple[torch.dtype, ...]
    head_dims: tuple[int, ...] = ()
    needs: tuple[str, ...] = ()  # what the call asks for and no compiled kernel has

    def __str__(self) -> str:
        dims = f", head_dim {' and '.join(map(str, self.head_dims))}" if self.head_dims else ""
        needs = "".join(f", with {need}" for need in self.needs)
        return f"fa3_dist::{self.op} for {' and '.join(map(str, dict.fromkeys(self.dtypes)))}{dims}{needs}"


def _request(op: str, args: tuple[Any, ...]) -> _Request:
    if op == "delta":
        dout, out = args[:2]
        return _Request(op, (dout.dtype, out.dtype))
    has_state = op != "forward"  # that it adds to
    if op == "backward":
        has_state = bool(dict(zip(SCHEMA_ARGS[op], args)).get("accumulate"))
    if op == "round_dq":
        op, (q, v) = "backward", args[1:3]
    else:
        q, _, v = args[1:4] if op == "backward" else args[:3]
    request = _Request(op, (q.dtype,), (q.shape[-1], v.shape[-1]))
    needs = []
    if op == "forward_into":
        out = args[5]
        if out is not None and out.dtype not in (q.dtype, torch.float32):
            needs.append(f"an out of {out.dtype}")
    # The operator pads what it owns, and no state.
    if has_state and (q.shape[-1] % VECTOR or v.shape[-1] % VECTOR):
        needs.append(f"a state whose head dims are not multiples of {VECTOR}")
    return request._replace(needs=tuple(needs))


def compiled_sizes(variants: Sequence[str]) -> dict[str, dict[str, list[tuple[int, ...]]]]:
    """What the compiled variants (names as in csrc/instances.def) run: operator -> dtype -> sizes.

    A size is the largest (head_dim, head_dim_v) that a kernel takes; it is () for one that takes all. Operators without
    a compiled kernel are missing.
    """
    sizes: dict[str, dict[str, list[tuple[int, ...]]]] = {}
    for variant in variants:
        family, dtype, *largest = variant.split("_")
        for op in (op for op, rows in COMPILED.items() if rows == family):
            sizes.setdefault(op, {}).setdefault(dtype, []).append(tuple(map(int, largest)))
    return sizes


def _covers(variants: Sequence[str], request: _Request) -> bool:
    """Whether one of the compiled variants runs such calls: one that holds both head dims (the smallest will do it)."""
    dtypes = [_VARIANT_DTYPES.get(dtype) for dtype in request.dtypes]
    if request.needs or None in dtypes or 0 in request.head_dims:
        return False
    return bool(_sizes_that_hold(variants, request))


def _sizes_that_hold(variants: Sequence[str], request: _Request) -> list[tuple[int, ...]]:
    """Those of the variants that hold the head dims, for the operator and its first dtype."""
    kernels = compiled_sizes(variants).get(request.op, {}).get(str(_VARIANT_DTYPES.get(request.dtypes[0])), [])
    return [size for size in kernels if all(dim <= most for dim, most in zip(request.head_dims, size))]


@functools.cache
def _has_compiled_kernel(device: torch.device, request: _Request) -> bool:
    """Whether the compiled library runs such calls on `device`; otherwise warns, once, of what runs instead."""
    capability = torch.cuda.get_device_capability(device)
    info = library_info()
    variants = info["variants"] if info else []
    if capability == (9, 0) and _covers(variants, request):
        return True
    if info is None:
        have = f"no compiled library was loaded from {LIBRARY}; `make kernels` builds it"
    else:
        have = f"the compiled library has the sm_90a kernels {', '.join(variants)}"
    message = (
        f"{request} was called on {torch.cuda.get_device_name(device)} (sm_{capability[0]}{capability[1]}), but {have}."
        " It runs through PyTorch's FlashAttention-2 kernels where they can express the call and otherwise in exact "
        "blockwise PyTorch code: right, but several times slower, and packed calls read their ranges on the host"
    )
    if os.environ.get("FA3_DIST_STRICT") == "1":
        raise RuntimeError(f"{message}. FA3_DIST_STRICT=1 makes this an error")
    warnings.warn(f"{message}. FA3_DIST_STRICT=1 turns this warning into an error", stacklevel=3)
    return False


@contextlib.contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """An operator's arithmetic does not depend on where it is called: no autocast, no TF32 or bf16 matrix products."""
    precision = torch.get_float32_matmul_precision()
    with torch.autocast(device_type, enabled=False):
        if precision == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """PyTorch's kernels take this from a global setting and not as an argument."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if before or not wanted:
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def _run_on_cpu(op: str, *args: Any) -> Any:
    _CHECKS[op](*args)
    with _full_precision("cpu"):
        return getattr(reference, op)(*args)


def _run_on_cuda(op: str, *args: Any) -> Any:
    _CHECKS[op](*args)
    device, request = args[0].device, _request(op, args)
    if _has_compiled_kernel(device, request):
        if os.environ.get("FA3_DIST_DEBUG") == "1":
            _check_contents(op, args)
        return _RUN_COMPILED[op](*args)
    deterministic = dict(zip(SCHEMA_ARGS[op], args)).get("deterministic", False)
    with torch.cuda.device(device), _full_precision("cuda"), _deterministic(deterministic):
        return getattr(reference, op)(*args)


def _check_contents(op: str, args: tuple[Any, ...]) -> None:
    """What the compiled kernels take on trust: reads the ranges and flags, and so waits for the GPU."""
    call = dict(zip(SCHEMA_ARGS[op], args))
    if call.get("q_start") is None:
        return
    q_start, q_len, k_start, k_len, offsets = (call[name] for name in (*RANGES, "offsets"))
    total_q, total_k = call["q"].shape[0], call["k"].shape[0]
    ranges = reference.read_ranges(
        q_start, q_len, k_start, k_len, offsets, call.get("offset"), call.get("flags"), total_q, total_k
    )
    if op == "backward":
        _check_disjoint("keys", [(r.k_start, r.k_len) for r in ranges])
    if not call.get("accumulate"):
        _check_disjoint("queries", [(r.q_start, r.q_len) for r in ranges])
    if op == "forward_into" and call["out"] is None and any(r.flags & LAST for r in ranges):
        raise ValueError("out is None, but a visit has the flag LAST: expected a tensor for its result; pass out")


def _check_disjoint(name: str, ranges: list[tuple[int, int]]) -> None:
    filled = sorted((start, length, i) for i, (start, length) in enumerate(ranges) if length > 0)
    for (start, length, i), (following, _, j) in zip(filled, filled[1:]):
        if start + length > following:
            raise ValueError(
                f"ranges {i} and {j} share {name} from row {following} on: expected the ranges of {name} of one call "
                "to be disjoint; make a call for each"
            )


def _compiled_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    head_dim_v = v.shape[-1]
    q, k, v = torch_kernels.with_plain_rows(*(torch_kernels.pad_head_dim(x, VECTOR) for x in (q, k, v)))
    out, lse = _forward_sm90(q, k, v, *_with_plain_columns(rest))
    return (out if out.shape[-1] == head_dim_v else out[..., :head_dim_v].contiguous()), lse


def _compiled_forward_into(
    q: Tensor, k: Tensor, v: Tensor, out_acc: Tensor, lse: Tensor, out: Tensor | None, *rest: Any
) -> None:
    state = [out_acc, lse] if out is None else [out_acc, lse, out]
    written = [x if _is_writable(x) else x.clone(memory_format=torch.contiguous_format) for x in state]
    q, k, v = torch_kernels.with_plain_rows(q, k, v)
    _forward_into_sm90(q, k, v, *written, *[None] * (3 - len(state)), *_with_plain_columns(rest))
    for x, copy in zip(state, written):
        if x is not copy:
            x.copy_(copy)


def _compiled_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    *rest: Any,
) -> None:
    accumulate = rest[SCHEMA_ARGS["backward"].index("accumulate") - 9]
    dout, q, k, v = (torch_kernels.pad_head_dim(x, VECTOR) for x in (dout.to(q.dtype), q, k, v))
    dout, q, k, v = torch_kernels.with_plain_rows(dout, q, k, v)
    written = []
    for x, like in ((dq, q), (dk, k), (dv, v)):
        if _is_writable(x) and (x.shape == like.shape or x.dim() == 1) and x.dtype in (q.dtype, torch.float32):
            written.append(x)
        else:
            dtype = q.dtype if x.dtype == q.dtype else torch.float32
            if accumulate:  # it holds sums, or rows that are kept
                written.append(x.to(dtype, copy=True, memory_format=torch.contiguous_format))
            else:
                written.append(torch.empty(like.shape, dtype=dtype, device=q.device))
    _backward_sm90(dout, q, k, v, lse.contiguous(), delta.contiguous(), *written, *_with_plain_columns(rest))
    for x, result in zip((dq, dk, dv), written):
        if x is not result:
            x.copy_(result[..., : x.shape[-1]])


def _with_plain_columns(rest: Sequence[Any]) -> list[Any]:
    """The arguments after q, k, v and a state, their tensors contiguous: ranges may be columns of a table."""
    return [x.contiguous() if isinstance(x, Tensor) else x for x in rest]


def _is_writable(x: Tensor) -> bool:
    """Whether a kernel can write its rows, aligned and one behind the other, to x itself."""
    return x.is_contiguous() and x.data_ptr() % 16 == 0


# ---- direct calls of the compiled library ----------------------------------------------------------------------------

_is_compiling, _is_profiling = torch.compiler.is_dynamo_compiling, torch._C._autograd._profiler_enabled
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_functorch, _tracing = torch._C._are_functorch_transforms_active, torch._C._get_tracing_state


def _is_unobserved(q: Tensor, k: Tensor, v: Tensor, q_start: Tensor | None) -> bool:
    """Whether a call may leave out the operator, since nothing would see it.

    That is: no compiler, mode, transform, trace, profiler or tensor subclass, and no FA3_DIST_DEBUG. Arguments need no
    check here: the library refuses whatever the operator refuses, and strides that its kernels cannot load or write.
    (So it does tensors that are yet to be negated: parts of complex numbers, which do not lie side by side.)
    """
    return (
        not _is_compiling()
        and type(q) is type(k) is type(v) is Tensor
        and not (_dispatch_modes() or _function_modes() or _functorch() or _tracing() or _is_profiling())
        and (q_start is None or os.environ.get("FA3_DIST_DEBUG") != "1")
    )


class _DirectForward(torch.autograd.Function):
    """What `register_autograd` makes of the operator, made of a result of the compiled kernel's: the same formula."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, args: tuple[Any, ...], result: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        _save_for_backward(ctx, args, result)
        return result

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_forward_autograd(ctx, dout, dlse)[:3], None, None


# NOTE: what `apply` does before this is for functorch, which is not active here, and takes as long as a launch.
_record = super(torch.autograd.Function, _DirectForward).apply


def _direct_calls() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The compiled library's forward and forward_into without the dispatcher.

    They take the operator's arguments, by position; forward also takes None for the scale, and whether lse is wanted:
    None comes in its place if not. The one gives the operator's results and the other True; or None, having done
    nothing, for a call that they leave to the operator: one that no kernel here runs as it is, that is
    wrong, or that fails. They take tensors apart by DLPack's table of C functions and are written against Python's
    limited API, so that one library serves every Torch and every Python. What else they need of Torch may be missing;
    then they leave all calls to the operator.
    """

    def leave(*_: Any) -> None:
        return None

    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    empty = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)  # a third of what torch.empty takes
    if not _library_loaded or exchange is None or empty is None:
        return leave, leave
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    make = ctypes.PyDLL(str(LIBRARY)).fa3_dist_direct_calls
    make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, *[ctypes.py_object] * 5]
    dtypes = torch.bfloat16, torch.float16, torch.float32
    return make(address(exchange, b"dlpack_exchange_api"), Tensor, empty, *dtypes) or (leave, leave)


# ---- registration ----------------------------------------------------------------------------------------------------


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    _check_forward(q, k, v, *args)
    out_dtype = args[SCHEMA_ARGS["forward"].index("out_dtype") - 3]
    out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=out_dtype or q.dtype)
    return out, q.new_empty(_rows_shape(q), dtype=accumulator_dtype(q.dtype))


def _fake_delta(dout: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    _check_delta(dout, out, dlse)
    return out.new_empty(_rows_shape(out), dtype=accumulator_dtype(out.dtype))


def _fake_round_dq(dq_sum: Tensor, q: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
    _check_round_dq(dq_sum, q, v, softmax_scale)
    return q.new_empty(q.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.options = inputs[:_TENSORS], inputs[_TENSORS:]
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _forward_autograd(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, q_start, q_len, k_start, k_len, offsets, out, lse = ctx.saved_tensors
    offset, softmax_scale, window_left, window_right, softcap, _, deterministic, sm_margin = ctx.options
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, dout, dlse)):
        raise RuntimeError(
            "fa3_dist attention was differentiated with create_graph=True: expected a first derivative only, it has no "
            "second one; use torch's scaled_dot_product_attention with SDPBackend.MATH for double backward"
        )
    unused = (None,) * (len(SCHEMA_ARGS["forward"]) - 3)
    if dout is None and dlse is None:
        return (None, None, None, *unused)
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    backward(
        dout, q, k, v, lse, delta(dout, out, dlse), dq, dk, dv, q_start=q_start, q_len=q_len, k_start=k_start,
        k_len=k_len, offsets=offsets, offset=offset, softmax_scale=softmax_scale, window_left=window_left,
        window_right=window_right, softcap=softcap,
        deterministic=deterministic or torch.are_deterministic_algorithms_enabled(), sm_margin=sm_margin,
    )
    return (dq, dk, dv, *unused)


def _vmap(op: str, *_: Any) -> Any:
    raise RuntimeError(
        f"fa3_dist::{op} was called under torch.vmap: expected plain tensors; fold the mapped dimension into the batch "
        "dimension (dense) or add sequences to the packed form"
    )


_definitions = torch.library.Library(NAMESPACE, "DEF")
for _op, _schema in SCHEMAS.items():
    _definitions.define(_op + _schema)
    if _op in COMPILED:
        _definitions.define(f"{_op}_sm90{_schema}")
        # NOTE: autograd is the operator's business; without this PyTorch would look at every argument of every call.
        _definitions.impl(f"{_op}_sm90", torch.library.fallthrough_kernel, "Autograd")
    _definitions.impl(_op, functools.partial(_run_on_cpu, _op), "CPU")
    _definitions.impl(_op, functools.partial(_run_on_cuda, _op), "CUDA")
    torch.library.register_vmap(f"{NAMESPACE}::{_op}", functools.partial(_vmap, _op), lib=_definitions)
SCHEMA_ARGS = {op: [a.name for a in getattr(torch.ops.fa3_dist, op).default._schema.arguments] for op in SCHEMAS}
_TENSORS = SCHEMA_ARGS["forward"].index("offset")  # arguments of forward before it are tensors
_SCALE = SCHEMA_ARGS["forward"].index("softmax_scale") - 3  # among those after q, k and v

_forward_sm90 = torch.ops.fa3_dist.forward_sm90.default
_forward_into_sm90 = torch.ops.fa3_dist.forward_into_sm90.default
_backward_sm90 = torch.ops.fa3_dist.backward_sm90.default
_RUN_COMPILED: dict[str, Callable[..., Any]] = {
    "forward": _compiled_forward,
    "forward_into": _compiled_forward_into,
    "delta": torch.ops.fa3_dist.delta_sm90.default,
    "backward": _compiled_backward,
    "round_dq": torch.ops.fa3_dist.round_dq_sm90.default,
}

torch.library.register_fake(f"{NAMESPACE}::forward", _fake_forward, lib=_definitions)
torch.library.register_fake(f"{NAMESPACE}::delta", _fake_delta, lib=_definitions)
torch.library.register_fake(f"{NAMESPACE}::forward_into", _check_forward_into, lib=_definitions)
torch.library.register_fake(f"{NAMESPACE}::backward", _check_backward, lib=_definitions)
torch.library.register_fake(f"{NAMESPACE}::round_dq", _fake_round_dq, lib=_definitions)
torch.library.register_autograd(
    f"{NAMESPACE}::forward", _forward_autograd, setup_context=_save_for_backward, lib=_definitions
)

_library_loaded = _load_library()
_direct_forward, _direct_forward_into = _direct_calls()
