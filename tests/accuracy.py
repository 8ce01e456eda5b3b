"""How far from the oracle a result may be: error measures, the naive attention that sets the scale, and the gates.

A result passes if, per tensor, both its relative L2 error and its largest error against the fp64 oracle (on the same
rounded inputs) are at most twice those of naive attention computed in the input dtype with every intermediate rounded
to it, plus a floor. The floor is relative to the tensor's *magnitude*: the same formula with every term taken by its
absolute value, which is what rounding errors scale with. (dq of a one-key row is exactly zero, the difference of two
equal numbers; no fp32 kernel that sums them in its own order gets that zero, yet its error is tiny against the terms.)
Where the magnitude is zero nothing contributes at all (rows that see nothing, keys that nobody sees), and the result
must be exactly zero. lse is fp32 whatever the inputs are, so it is judged like fp32.

Legend as in oracle.py: B, Sq, Sk, H query heads, G key/value heads, D, E, T packed tokens. Functions here work on
packed tensors; `flatten` brings dense ones to that form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests import oracle

# Floors, relative to the magnitude: some units in the last place of the dtype that the arithmetic is in, which is fp32
# for 16-bit inputs too. The second kind is for calls that round intermediate results to 16 bits: kernels on tensor
# cores (probabilities, gradients of scores) and the sink (out, and the gradient that passes through it).
EPS_32, EPS_64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
FLOOR = {torch.float64: 128 * EPS_64} | dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), 8 * EPS_32)
FLOOR_ROUNDED = FLOOR | {dtype: torch.finfo(dtype).eps / 16 for dtype in (torch.float16, torch.bfloat16)}
LARGEST_TIMES_L2 = 4.0  # the floor of the largest error, in floors of the L2 error
TIMES_NAIVE = 2.0


@dataclass(frozen=True)
class Problem:
    """One attention problem over packed tensors, with everything that forward and backward need.

    q (Tq, H, D), k (Tk, G, D), v (Tk, G, E), dout (Tq, H, E), dlse (H, Tq) or None, sink (H,) or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor | None
    sink: Tensor | None
    q_start: list[int]
    q_len: list[int]
    k_start: list[int]
    k_len: list[int]
    offsets: list[int | None] | None = None
    softmax_scale: float | None = None
    window_left: int | None = None
    window_right: int | None = None
    softcap: float = 0.0

    @property
    def mask(self) -> dict:
        names = ("q_start", "q_len", "k_start", "k_len", "offsets", "window_left", "window_right")
        return {name: getattr(self, name) for name in names}

    def ranges(self):
        """(query rows, key rows, visible (q_len, k_len) bool) of every range."""
        offsets = self.offsets or [None] * len(self.q_start)
        for qs, qn, ks, kn, offset in zip(self.q_start, self.q_len, self.k_start, self.k_len, offsets, strict=True):
            offset = kn - qn if offset is None else offset
            visible = oracle.visible_mask(qn, kn, self.window_left, self.window_right, offset)
            yield slice(qs, qs + qn), slice(ks, ks + kn), visible.to(self.q.device)

    def solve(self) -> oracle.Grads:
        """The oracle's answer."""
        return oracle.packed_attention_grads(
            self.q, self.k, self.v, self.dout, self.dlse,
            sink=self.sink, softmax_scale=self.softmax_scale, softcap=self.softcap, **self.mask,
        )  # fmt: skip


def flatten(x: Tensor) -> Tensor:
    """(B, S, H, D) -> (B * S, H, D)."""
    return x.reshape(-1, *x.shape[2:])


def flatten_lse(lse: Tensor) -> Tensor:
    """(B, H, S) -> (H, B * S)."""
    return lse.transpose(0, 1).reshape(lse.shape[1], -1)


def naive_grads(problem: Problem, dtype: torch.dtype | None = None) -> oracle.Grads:
    """Textbook attention and its gradients in the input dtype (or `dtype`), every intermediate rounded to it."""
    dtype = dtype or problem.q.dtype
    inputs = [problem.q, problem.k, problem.v] + ([problem.sink] if problem.sink is not None else [])
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    q, k, v = leaves[:3]
    with torch.enable_grad():
        out = torch.zeros(*q.shape[:2], v.shape[2], dtype=dtype, device=q.device)
        lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=dtype, device=q.device)
        loss = 0.0 * out.sum()
        for rows, columns, visible in problem.ranges():
            if visible.any():
                sink = leaves[3] if problem.sink is not None else None
                out_n, lse_n = _naive_attention(problem, q[rows], k[columns], v[columns], visible, sink)
                loss = loss + (out_n * problem.dout[rows].to(dtype)).sum()
                if problem.dlse is not None:
                    loss = loss + (torch.where(visible.any(-1), lse_n, 0.0) * problem.dlse[:, rows].to(dtype)).sum()
                out[rows], lse[:, rows] = out_n.detach(), lse_n.detach()
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        else:
            grads = [torch.zeros_like(x) for x in leaves]
    return oracle.Grads(out, lse, *grads[:3], grads[3] if problem.sink is not None else None)


def _naive_attention(problem, q, k, v, visible, sink):
    """One range: q (S, H, D), k (L, G, D), v (L, G, E) -> out (S, H, E), lse (H, S)."""
    groups = q.shape[1] // k.shape[1]
    q_HSD, k_HLD, v_HLE = (x.transpose(0, 1) for x in (q, k, v))
    k_HLD, v_HLE = k_HLD.repeat_interleave(groups, dim=0), v_HLE.repeat_interleave(groups, dim=0)
    scale = q.shape[-1] ** -0.5 if problem.softmax_scale is None else problem.softmax_scale
    scores = (q_HSD @ k_HLD.transpose(1, 2)) * scale
    if problem.softcap > 0:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    blind = ~visible.any(dim=-1, keepdim=True)
    row_max = scores.detach().amax(dim=-1, keepdim=True).masked_fill(blind, 0.0)
    total = torch.exp(scores - row_max).sum(dim=-1, keepdim=True).masked_fill(blind, 1.0)
    lse = (torch.log(total) + row_max).masked_fill(blind, -torch.inf)[..., 0]
    if sink is None:
        return ((torch.exp(scores - row_max) / total) @ v_HLE).transpose(0, 1), lse
    row_max = torch.maximum(row_max, sink.detach()[:, None, None])
    exponentials = torch.exp(scores - row_max)
    total = exponentials.sum(dim=-1, keepdim=True) + torch.exp(sink[:, None, None] - row_max)
    return ((exponentials / total) @ v_HLE).transpose(0, 1), lse


def magnitudes(problem: Problem) -> oracle.Grads:
    """The sums behind every tensor with each term by its absolute value, in fp64: the scale of rounding errors.

    A probability exp(s - lse) carries the rounding errors of s and lse, which grow with them: 1 + max |s| times.
    """
    q, k, v, dout = (x.detach().cpu().double() for x in (problem.q, problem.k, problem.v, problem.dout))
    groups = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if problem.softmax_scale is None else problem.softmax_scale
    result = oracle.Grads(
        torch.zeros_like(dout), torch.zeros(q.shape[1], q.shape[0], dtype=torch.float64),
        *(torch.zeros_like(x) for x in (q, k, v)), torch.zeros(q.shape[1], dtype=torch.float64),
    )  # fmt: skip
    for rows, columns, visible in problem.ranges():
        if not visible.any():
            continue
        visible = visible.cpu()
        q_n, dout_n = q[rows].transpose(0, 1), dout[rows].transpose(0, 1)
        k_n, v_n = (x[columns].transpose(0, 1).repeat_interleave(groups, dim=0) for x in (k, v))
        scores = (q_n @ k_n.transpose(1, 2)) * scale
        slope, largest_score = 1.0, scores.masked_fill(~visible, 0.0).abs().amax(-1, keepdim=True)
        if problem.softcap > 0:
            tanh = torch.tanh(scores / problem.softcap)
            scores, slope = problem.softcap * tanh, 1 + tanh**2  # of 1 - tanh^2, a difference
        scores = scores.masked_fill(~visible, -torch.inf)
        lse = torch.logsumexp(scores, dim=-1, keepdim=True)
        blind = torch.isneginf(lse)
        p = torch.exp(scores - lse.masked_fill(blind, 0.0))
        if problem.sink is not None:
            sink = problem.sink.detach().cpu().double()[:, None, None]
            p = p * torch.sigmoid(lse - sink)
        dp = dout_n.abs() @ v_n.abs().transpose(1, 2)
        delta = (p * dp).sum(-1, keepdim=True)
        p = p * (1.0 + largest_score)
        dlse = 0.0 if problem.dlse is None else problem.dlse[:, rows].detach().cpu().double().abs()[..., None]
        ds = p * (dp + delta + dlse) * slope * abs(scale)
        ds_k, ds_q, p_dout = ds @ k_n.abs(), ds.transpose(1, 2) @ q_n.abs(), p.transpose(1, 2) @ dout_n.abs()
        result.out[rows] += (p @ v_n.abs()).transpose(0, 1)
        result.lse[:, rows] += (1.0 + largest_score).masked_fill(blind, 0.0)[..., 0]
        result.dq[rows] += ds_k.transpose(0, 1)
        result.dk[columns] += _sum_groups(ds_q, groups).transpose(0, 1)
        result.dv[columns] += _sum_groups(p_dout, groups).transpose(0, 1)
        result.dsink.add_((delta * (1.0 + largest_score)).sum((1, 2)))
    return result


def _sum_groups(x: Tensor, groups: int) -> Tensor:
    """(H, L, D) -> (G, L, D): the sum over the query heads that share a key head."""
    return x.unflatten(0, (-1, groups)).sum(1)


def assert_close_to_oracle(
    name: str, ours: Tensor, reference: Tensor, naive: Tensor, dtype: torch.dtype, magnitude: Tensor | None = None,
    rounded: bool = False,
) -> None:  # fmt: skip
    """The gate for one tensor (see the top of the file).

    ours is compared with reference (fp64). naive, naive attention's answer, and dtype, the input dtype, set the allowed
    error; magnitude, if left out, is |reference|; rounded: intermediate results were rounded to dtype (on a GPU they
    always may be). Infinities must be where the reference has them.
    """
    floor_L2 = (FLOOR_ROUNDED if rounded or ours.is_cuda else FLOOR)[dtype]
    ours, naive = ours.detach().cpu().double(), naive.detach().cpu().double()
    assert ours.shape == reference.shape, f"{name}: shape {tuple(ours.shape)}, oracle {tuple(reference.shape)}"
    finite = torch.isfinite(reference)
    assert torch.equal(ours[~finite], reference[~finite]), f"{name}: not -inf where the oracle is"
    assert torch.isfinite(ours[finite]).all(), f"{name}: {int((~torch.isfinite(ours[finite])).sum())} values not finite"
    magnitude = torch.where(finite, reference.abs() if magnitude is None else magnitude, 0.0)
    error, naive_error = (torch.where(finite, x - reference, 0.0) for x in (ours, naive))
    if not error.numel():
        return
    assert not error[magnitude == 0].any(), f"{name}: not exactly zero where nothing contributes"
    for measure, floor, size in (
        ("L2", floor_L2, lambda x: float(torch.linalg.vector_norm(x))),
        ("largest", LARGEST_TIMES_L2 * floor_L2, lambda x: float(x.abs().max())),
    ):
        allowed = TIMES_NAIVE * size(naive_error) + floor * size(magnitude)
        assert size(error) <= allowed, (
            f"{name}: {measure} error {size(error):.3e}, allowed {allowed:.3e} = {TIMES_NAIVE:g} x naive {dtype} "
            f"{size(naive_error):.3e} + {floor:.1e} x magnitude {size(magnitude):.3e}"
        )


def assert_solves(problem: Problem, ours: oracle.Grads) -> None:
    """All tensors of `ours` (a field left None is not judged) pass the gate for `problem`."""
    dtype = problem.q.dtype
    half = dtype in (torch.float16, torch.bfloat16)
    reference, naive, magnitude = problem.solve(), naive_grads(problem), magnitudes(problem)
    if half and ours.lse is not None:
        naive = naive._replace(lse=naive_grads(problem, torch.float32).lse)
    for name in oracle.Grads._fields:
        got, want, simple, scale = (getattr(x, name) for x in (ours, reference, naive, magnitude))
        if got is not None:
            judged_as = torch.float32 if name == "lse" and half else dtype
            assert_close_to_oracle(name, got, want, simple, judged_as, scale, rounded=problem.sink is not None)
