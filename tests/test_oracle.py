"""The oracle against PyTorch's own attention in fp64, against plain Python loops, and against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests import accuracy, oracle

TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def random_qkv(seed, batch=2, seqlen_q=7, seqlen_k=9, heads=4, heads_kv=2, head_dim=5, head_dim_v=3):
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, seqlen_q, heads, head_dim, generator=rng, dtype=torch.float64)
    k = torch.randn(batch, seqlen_k, heads_kv, head_dim, generator=rng, dtype=torch.float64)
    v = torch.randn(batch, seqlen_k, heads_kv, head_dim_v, generator=rng, dtype=torch.float64)
    return q, k, v


def sdpa(q, k, v, *, attn_mask=None, is_causal=False, scale=None):
    """PyTorch's plain (math) attention on (B, S, H, D) tensors."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out.transpose(1, 2)


def loop_mask(seqlen_q, seqlen_k, left, right, offset):
    """The mask written out cell by cell, from its definition."""
    mask = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool)
    for i in range(seqlen_q):
        for j in range(seqlen_k):
            after_left = left is None or i + offset - left <= j
            before_right = right is None or j <= i + offset + right
            mask[i, j] = after_left and before_right
    return mask


def check_against_sdpa(q, k, v, reference, **oracle_arguments):
    """out and the gradients of `oracle.attention` equal those of `reference(q, k, v)`, a differentiable function."""
    dout = torch.randn(*q.shape[:3], v.shape[3], generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected_out = reference(*leaves)
    expected_grads = torch.autograd.grad(expected_out, leaves, dout)
    ours = oracle.attention_grads(q, k, v, dout, **oracle_arguments)
    torch.testing.assert_close(ours.out, expected_out.detach(), **TIGHT)
    for got, expected in zip((ours.dq, ours.dk, ours.dv), expected_grads, strict=True):
        torch.testing.assert_close(got, expected, **TIGHT)


@pytest.mark.parametrize("heads_kv", [1, 2, 4])
@pytest.mark.parametrize("scale", [None, 0.0, -0.7, 2.5])
def test_full_attention_equals_sdpa(heads_kv, scale):
    q, k, v = random_qkv(0, heads_kv=heads_kv)
    check_against_sdpa(q, k, v, lambda q, k, v: sdpa(q, k, v, scale=scale), softmax_scale=scale)


@pytest.mark.parametrize("heads_kv", [1, 4])
def test_causal_square_equals_sdpa(heads_kv):
    q, k, v = random_qkv(1, seqlen_q=8, seqlen_k=8, heads_kv=heads_kv, head_dim_v=5)
    check_against_sdpa(q, k, v, lambda q, k, v: sdpa(q, k, v, is_causal=True), window_right=0)


@pytest.mark.parametrize("shape", [(7, 9), (9, 7), (1, 6), (6, 1), (8, 8)], ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize(
    "left, right", [(None, 0), (0, 0), (2, 0), (3, 2), (None, 3), (1, None), (100, 100), (0, None)]
)
@pytest.mark.parametrize("offset", [None, 0, -3, 4, -50, 50])
def test_masks_equal_sdpa_with_an_explicit_mask(shape, left, right, offset):
    seqlen_q, seqlen_k = shape
    q, k, v = random_qkv(2, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    mask = loop_mask(seqlen_q, seqlen_k, left, right, seqlen_k - seqlen_q if offset is None else offset)
    assert torch.equal(
        oracle.visible_mask(seqlen_q, seqlen_k, left, right, seqlen_k - seqlen_q if offset is None else offset), mask
    )
    sees_any = mask.any(dim=1)

    def reference(q, k, v):
        # Rows that see nothing are taken out before PyTorch sees them: what it does with them is not at issue.
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
        if not sees_any.any():
            return out + 0 * (q.sum() + k.sum() + v.sum())
        rows = sees_any.nonzero()[:, 0]
        return out.index_copy(1, rows, sdpa(q[:, rows], k, v, attn_mask=mask[rows]))

    arguments = {"window_left": left, "window_right": right, "offset": offset}
    check_against_sdpa(q, k, v, reference, **arguments)

    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, dim=2)) / math.sqrt(q.shape[-1])
    expected_lse = torch.logsumexp(scores.masked_fill(~mask, -torch.inf), dim=-1)
    _, lse = oracle.attention(q, k, v, **arguments)
    torch.testing.assert_close(lse, expected_lse, **TIGHT)
    assert torch.equal(torch.isneginf(lse), (~sees_any).expand_as(lse))


@pytest.mark.parametrize("softcap, with_sink", [(0.0, True), (1.5, False), (1.5, True)])
def test_softcap_and_sink_equal_plain_loops(softcap, with_sink):
    q, k, v = random_qkv(3, batch=1, seqlen_q=3, seqlen_k=4, heads=2, heads_kv=1, head_dim=2, head_dim_v=2)
    sink = [0.3, -1.2] if with_sink else None
    sink_tensor = torch.tensor(sink, dtype=torch.float64) if sink else None
    out, lse = oracle.attention(q, k, v, window_right=0, offset=0, softcap=softcap, sink=sink_tensor)
    for head in range(2):
        for i in range(3):
            exponentials = []
            for j in range(i + 1):
                score = sum(float(q[0, i, head, d] * k[0, j, 0, d]) for d in range(2)) / math.sqrt(2)
                exponentials.append(math.exp(softcap * math.tanh(score / softcap) if softcap else score))
            total = sum(exponentials) + (math.exp(sink[head]) if sink else 0.0)
            for e in range(2):
                expected = sum(x * float(v[0, j, 0, e]) for j, x in enumerate(exponentials)) / total
                assert float(out[0, i, head, e]) == pytest.approx(expected, rel=1e-12)
            assert float(lse[0, head, i]) == pytest.approx(math.log(sum(exponentials)), rel=1e-12)


@pytest.mark.parametrize("softcap, with_sink", [(0.0, False), (0.8, False), (0.0, True), (0.8, True)])
@pytest.mark.parametrize("left, right, offset", [(None, None, None), (1, 0, -1)])
def test_gradients_equal_finite_differences(softcap, with_sink, left, right, offset):
    q, k, v = random_qkv(4, batch=1, seqlen_q=3, seqlen_k=4, heads=2, heads_kv=1, head_dim=2, head_dim_v=3)
    sink = torch.tensor([0.5, -0.4], dtype=torch.float64)
    arguments = {"softcap": softcap, "window_left": left, "window_right": right, "offset": offset}

    def function(q, k, v, sink):
        out, lse = oracle.attention(q, k, v, sink=sink if with_sink else None, **arguments)
        return out, torch.where(torch.isfinite(lse), lse, 0.0)  # finite differences of -inf are not numbers

    leaves = [x.requires_grad_() for x in (q, k, v, sink)]
    assert torch.autograd.gradcheck(function, leaves)

    dout = torch.randn(1, 3, 2, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    dlse = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    ours = oracle.attention_grads(q, k, v, dout, dlse, sink=sink if with_sink else None, **arguments)
    expected = torch.autograd.grad(function(*leaves), leaves[: 4 if with_sink else 3], (dout, dlse))
    for got, want in zip(ours[2:], expected, strict=False):
        torch.testing.assert_close(got, want, **TIGHT)


def test_large_logits_do_not_overflow():
    q, k, v = random_qkv(5)
    out, lse = oracle.attention(q * 1e3, k * 1e3, v, window_right=0)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()
    assert float(lse.abs().max()) > 1e5
    ours = oracle.attention_grads(q * 1e3, k * 1e3, v, torch.ones_like(out), torch.ones_like(lse), window_right=0)
    assert all(torch.isfinite(x).all() for x in ours[:5])


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(0, 5), (5, 0), (0, 0)])
def test_empty_sequences(seqlen_q, seqlen_k):
    q, k, v = random_qkv(6, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    dout, dlse = torch.ones(2, seqlen_q, 4, 3), torch.ones(2, 4, seqlen_q)
    ours = oracle.attention_grads(q, k, v, dout, dlse)
    assert ours.out.shape == (2, seqlen_q, 4, 3) and not ours.out.any()
    assert ours.lse.shape == (2, 4, seqlen_q) and torch.isneginf(ours.lse).all()
    for grad, x in zip((ours.dq, ours.dk, ours.dv), (q, k, v), strict=True):
        assert grad.shape == x.shape and not grad.any()


def test_packed_equals_one_block_diagonal_mask():
    """Three documents, gaps between them, one of them without keys: one SDPA call under a mask written cell by cell."""
    q_start, q_len, k_start, k_len = [1, 6, 9], [4, 2, 3], [0, 5, 7], [5, 0, 4]
    offsets = [None, 0, -1]
    q, k, v = (x[0] for x in random_qkv(7, batch=1, seqlen_q=13, seqlen_k=12))
    mask = torch.zeros(13, 12, dtype=torch.bool)
    for qs, qn, ks, kn, offset in zip(q_start, q_len, k_start, k_len, offsets, strict=True):
        mask[qs : qs + qn, ks : ks + kn] = loop_mask(qn, kn, 2, 0, kn - qn if offset is None else offset)
    rows = mask.any(dim=1).nonzero()[:, 0]
    assert 0 < len(rows) < 13

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    seen = sdpa(leaves[0][None, rows], leaves[1][None], leaves[2][None], attn_mask=mask[rows])[0]
    expected_out = torch.zeros(13, 4, 3, dtype=torch.float64).index_copy(0, rows, seen)
    dout = torch.randn(13, 4, 3, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    expected_grads = torch.autograd.grad(expected_out, leaves, dout)

    ranges = {"q_start": q_start, "q_len": q_len, "k_start": k_start, "k_len": k_len, "offsets": offsets}
    poisoned = [x.clone() for x in (q, k, v)]
    for x, outside in zip(poisoned, ([0, 5, 8, 12], [11], [11]), strict=True):
        x[outside] = torch.nan
    ours = oracle.packed_attention_grads(*poisoned, dout, window_left=2, window_right=0, **ranges)
    torch.testing.assert_close(ours.out, expected_out.detach(), **TIGHT)
    for got, expected in zip((ours.dq, ours.dk, ours.dv), expected_grads, strict=True):
        torch.testing.assert_close(got, expected, **TIGHT)
    assert torch.equal(torch.isneginf(ours.lse[0]), ~mask.any(dim=1))


# ---- the gates of accuracy.py ----------------------------------------------------------------------------------------


def gate_problem(dtype, softcap=0.0, sink=False) -> accuracy.Problem:
    """Two ranges with rows that see nothing, keys that nobody sees, and rows outside every range."""
    rng = torch.Generator().manual_seed(0)
    shapes = [(20, 4, 16), (18, 2, 16), (18, 2, 8), (20, 4, 8), (4, 20), (4,)]
    q, k, v, dout, dlse, logits = (torch.randn(s, generator=rng, dtype=torch.float64).to(dtype) for s in shapes)
    return accuracy.Problem(
        q, k, v, dout, dlse.float(), logits.float() if sink else None,
        [1, 10], [8, 9], [0, 9], [8, 9], [-2, 0], window_left=5, window_right=0, softcap=softcap,
    )  # fmt: skip


@pytest.mark.parametrize("softcap, sink", [(0.0, False), (1.5, False), (0.0, True), (1.5, True)])
def test_naive_attention_in_fp64_equals_the_oracle(softcap, sink):
    """What sets the scale of the gates is attention, too: the same numbers from other code."""
    problem = gate_problem(torch.float64, softcap, sink)
    for name, got, want in zip(oracle.Grads._fields, accuracy.naive_grads(problem), problem.solve()):
        if want is not None:
            torch.testing.assert_close(got, want, **TIGHT, msg=lambda text, name=name: f"{name}: {text}")


def test_magnitudes_bound_the_values_and_vanish_with_them():
    problem = gate_problem(torch.float64)
    right, sizes = problem.solve(), accuracy.magnitudes(problem)
    for name in ("out", "dq", "dk", "dv"):
        value, magnitude = getattr(right, name), getattr(sizes, name)
        assert (magnitude * (1 + 1e-12) >= value.abs()).all(), name
        assert torch.equal(magnitude == 0, value == 0), name
    blind = torch.isneginf(right.lse)
    assert torch.equal(sizes.lse == 0, blind) and blind.any() and not blind.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_gates_pass_right_answers_and_fail_wrong_ones(dtype):
    """The rounded oracle passes; a deviation of a few of its own rounding errors, anywhere, does not."""
    problem = gate_problem(dtype)
    right = problem.solve()
    rounded = oracle.Grads(*(x.to(dtype) for x in right[:5]), None)
    accuracy.assert_solves(problem, rounded._replace(lse=right.lse.to(torch.promote_types(dtype, torch.float32))))

    factor = 1 + {torch.float64: 1e-11, torch.float32: 5e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    for name in ("out", "dq", "dk", "dv"):
        value = getattr(right, name)
        faults = {"scaled": value * factor, "zero": value * 0, "NaN": torch.full_like(value, torch.nan)}
        one_wrong = value.clone()
        one_wrong.view(-1)[value.abs().argmax()] *= 1 + 20 * (factor - 1)
        blind_row = value.clone()
        blind_row[(value == 0).nonzero()[0, 0]] = 1e-30
        for fault, wrong in (faults | {"one element": one_wrong, "a row that must be zero": blind_row}).items():
            with pytest.raises(AssertionError, match=name):
                accuracy.assert_solves(problem, oracle.Grads(*[None] * 6)._replace(**{name: wrong}))
                pytest.fail(f"{name}: {fault} passed")
    for wrong in (right.lse * (1 + 1e-5), right.lse.clamp(min=-1e30), torch.full_like(right.lse, -torch.inf)):
        with pytest.raises(AssertionError, match="lse"):
            accuracy.assert_solves(problem, oracle.Grads(*[None] * 6)._replace(lse=wrong))
