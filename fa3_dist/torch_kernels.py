"""PyTorch's own fused attention kernels behind our contract, for the ranges and masks that they can express.

On the CPU: its flash attention in fp32 (inputs are converted, so partial results keep fp32). On CUDA: its
FlashAttention-2 for bf16 and fp16, whose partial outputs and gradients come in the input dtype; the fallback until, and
wherever, no kernel of ours exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fa3_dist.algebra import Mask, merge, rectangles

_cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_cuda_forward = torch.ops.aten._flash_attention_forward
_cuda_backward = torch.ops.aten._flash_attention_backward


def covers(q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, mask: Mask, softcap: float) -> bool:
    """Whether PyTorch has a fused kernel for this range."""
    if softcap != 0 or q_BSHD.shape[-1] != v_BSKD.shape[-1] or q_BSHD.shape[-1] == 0 or q_BSHD.shape[0] == 0:
        return False
    if rectangles(mask, q_BSHD.shape[1], k_BSKD.shape[1], square=False) is None:
        return False
    if q_BSHD.device.type == "cpu":
        return q_BSHD.dtype != torch.float64
    return q_BSHD.dtype in (torch.bfloat16, torch.float16) and q_BSHD.shape[-1] % 8 == 0 and q_BSHD.shape[-1] <= 256


def attend(q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, mask: Mask, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """out (B, S, H, D) and lse (B, H, S), both fp32, of a range that `covers` accepted."""
    B, Sq, H, D = q_BSHD.shape
    run = _attend_cpu if q_BSHD.device.type == "cpu" else _attend_cuda
    out = q_BSHD.new_zeros(B, Sq, H, D, dtype=torch.float32)
    lse = q_BSHD.new_full((B, H, Sq), float("-inf"), dtype=torch.float32)
    covered = slice(0, 0)
    for r in rectangles(mask, Sq, k_BSKD.shape[1], square=q_BSHD.device.type == "cpu") or ():
        part = run(q_BSHD[:, r.rows], k_BSKD[:, r.keys], v_BSKD[:, r.keys], r.causal, softmax_scale)
        if r.rows == covered:  # the same rows with further keys
            part = merge(out[:, r.rows], lse[:, :, r.rows], *part)
        out[:, r.rows], lse[:, :, r.rows] = part
        covered = r.rows
    return out, lse


def attend_backward(
    dout_BSHD: Tensor, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, lse_BHS: Tensor, delta_BHS: Tensor,
    dq_BSHD: Tensor, dk_BSKD: Tensor, dv_BSKD: Tensor, mask: Mask, softmax_scale: float,
) -> bool:
    """Adds the gradients of a range that `covers` accepted to fp32 dq, dk, dv.

    PyTorch's backward kernels want `out`, but use it only to form delta = rowsum(dout * out); they get the shortest
    vector with that product. Returns False, with nothing done, where there is none: dout = 0 in a row whose delta is
    not 0, which a gradient of lse can cause.
    """
    on_cpu = q_BSHD.device.type == "cpu"
    largest = dout_BSHD.abs().amax(-1, keepdim=True).float()
    direction = dout_BSHD.float() / largest.masked_fill(largest == 0, 1.0)
    along = delta_BHS.transpose(1, 2).unsqueeze(-1) / largest / direction.square().sum(-1, keepdim=True)
    along = along.masked_fill((largest == 0) & (delta_BHS.transpose(1, 2).unsqueeze(-1) == 0), 0.0)
    out_BSHD = (direction * along).to(torch.float32 if on_cpu else q_BSHD.dtype)
    if not bool(torch.isfinite(along).all() and torch.isfinite(out_BSHD).all()):
        return False
    run = _attend_backward_cpu if on_cpu else _attend_backward_cuda
    for r in rectangles(mask, q_BSHD.shape[1], k_BSKD.shape[1], square=on_cpu) or ():
        dq, dk, dv = run(
            dout_BSHD[:, r.rows], q_BSHD[:, r.rows], k_BSKD[:, r.keys], v_BSKD[:, r.keys], out_BSHD[:, r.rows],
            lse_BHS[:, :, r.rows], r.causal, softmax_scale,
        )
        dq_BSHD[:, r.rows] += dq
        dk_BSKD[:, r.keys] += dk
        dv_BSKD[:, r.keys] += dv
    return True


def with_plain_rows(*tensors: Tensor) -> list[Tensor]:
    """The tensors (..., heads, head_dim), dense or packed, copied where a kernel could not address their rows.

    PyTorch's kernels take the last stride for 1 without looking, and on CUDA every row for 16-byte aligned; the copy
    engine of a Hopper GPU asks for the same and takes no strides of 0. So a tensor stays as it is if its last dimension
    is contiguous and, on CUDA, its data pointer and other strides are multiples of 16 bytes, the strides above 0; the
    stride of a dimension with one element does not matter. Any other is copied: contiguous, of its own.
    """
    return [x if _has_plain_rows(x) else x.clone(memory_format=torch.contiguous_format) for x in tensors]


def _has_plain_rows(x: Tensor) -> bool:
    *strides, last = x.stride()
    if last != 1:
        return False
    if x.is_cpu:
        return True
    size = x.element_size()
    return x.data_ptr() % 16 == 0 and all(n > 0 and n * size % 16 == 0 for n, m in zip(strides, x.shape) if m > 1)


def pad_head_dim(x: Tensor, multiple: int) -> Tensor:
    """x (..., D) with columns of zeros up to a multiple; x itself if D is one.

    Zeros at the end of q and k leave their products as they are, and zeros at the end of v add columns of 0 to out.
    """
    missing = -x.shape[-1] % multiple
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """(B, S, H, D) of any float dtype -> (B, H, S, D) fp32."""
    return [x.float().transpose(1, 2) for x in with_plain_rows(*tensors)]


def _attend_cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool, softmax_scale: float) -> tuple[Tensor, Tensor]:
    out, lse = _cpu_forward(*_heads_first(q, k, v), 0.0, causal, scale=softmax_scale)
    return out.transpose(1, 2), lse


def _attend_backward_cpu(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, softmax_scale: float
) -> list[Tensor]:
    dout, q, k, v, out = _heads_first(dout, q, k, v, out)
    gradients = _cpu_backward(dout, q, k, v, out, lse.contiguous(), 0.0, causal, scale=softmax_scale)
    return [g.transpose(1, 2) for g in gradients]


def _attend_cuda(q: Tensor, k: Tensor, v: Tensor, causal: bool, softmax_scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = with_plain_rows(q, k, v)
    out, lse, *_ = _cuda_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=softmax_scale
    )
    return out, lse


def _attend_backward_cuda(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, softmax_scale: float
) -> list[Tensor]:
    dout, q, k, v, out = with_plain_rows(dout.to(q.dtype), q, k, v, out)
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.zeros((), dtype=torch.uint64, device=q.device)
    return list(
        _cuda_backward(
            dout, q, k, v, out, lse.contiguous(), None, None, q.shape[1], k.shape[1], 0.0, causal,
            no_dropout, unused, scale=softmax_scale,
        )
    )
