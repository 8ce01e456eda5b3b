"""The public functions: FlashAttention-3's names, argument order, conventions and masks, against the oracle."""

from __future__ import annotations

import inspect

import pytest
import torch

import fa3_dist
from fa3_dist import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
)
from fa3_dist.interface import apply_sink
from tests import oracle


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


TAIL = {
    "qv": None, "q_descale": None, "k_descale": None, "v_descale": None, "window_size": (-1, -1), "attention_chunk": 0,
    "softcap": 0.0, "num_splits": 1, "pack_gqa": None, "deterministic": False, "sm_margin": 0,
    "return_attn_probs": False,
}  # fmt: skip
REQUIRED = inspect.Parameter.empty
TOLERANCE = {"rtol": 1e-5, "atol": 5e-6}


def random_tensors(device, *shapes, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype).to(device) for shape in shapes]


def assert_equals(got, expected):
    torch.testing.assert_close(got.detach().cpu().double(), expected, **TOLERANCE)


# ---- names, order, return values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function, expected",
    [
        (flash_attn_func, dict.fromkeys("qkv", REQUIRED) | {"softmax_scale": None, "causal": False, **TAIL}),
        (
            flash_attn_varlen_func,
            dict.fromkeys(("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), REQUIRED)
            | {"seqused_q": None, "seqused_k": None, "softmax_scale": None, "causal": False, **TAIL},
        ),
        (
            flash_attn_qkvpacked_func,
            {
                "qkv": REQUIRED, "softmax_scale": None, "causal": False, "q_descale": None, "k_descale": None,
                "v_descale": None, "window_size": (-1, -1), "attention_chunk": 0, "softcap": 0.0,
                "deterministic": False, "num_heads_q": None, "sm_margin": 0, "return_attn_probs": False,
            },
        ),
    ],
    ids=["func", "varlen", "qkvpacked"],
)  # fmt: skip
def test_positional_order_and_defaults_are_flash_attentions(function, expected):
    parameters = inspect.signature(function).parameters.values()
    positional = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(positional.items()) == list(expected.items())
    # whatever we add is keyword-only and optional
    assert all(p.kind is p.KEYWORD_ONLY and p.default is None for p in parameters if p.name not in positional)


def test_public_names():
    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_qkvpacked_func", "flash_attn_kvpacked_func"):
        assert name in fa3_dist.__all__ and callable(getattr(fa3_dist, name))


def test_every_argument_by_position(device):
    q, k, v = random_tensors(device, (1, 5, 2, 8), (1, 7, 2, 8), (1, 7, 2, 8))
    positional = flash_attn_func(
        q, k, v, 0.3, False, None, None, None, None, (2, 1), 0, 1.5, 1, None, True, 4, True
    )
    out, lse = oracle.attention(q, k, v, softmax_scale=0.3, window_left=2, window_right=1, softcap=1.5)
    assert_equals(positional[0], out)
    assert_equals(positional[1], lse)
    cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (5, 7))
    packed = flash_attn_varlen_func(
        q[0], k[0], v[0], cu_q, cu_k, 5, 7, None, None, 0.3, False, None, None, None, None, (2, 1), 0, 1.5, 1, None,
        True, 4, True,
    )  # fmt: skip
    assert_equals(packed[0], out[0])
    assert_equals(packed[1], lse[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_return_conventions(dtype, device):
    q, k, v = random_tensors(device, (2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 16), dtype=dtype)
    out = flash_attn_func(q, k, v)
    assert isinstance(out, torch.Tensor) and out.shape == (2, 5, 4, 16) and out.dtype == dtype
    result = flash_attn_func(q, k, v, return_attn_probs=True)
    assert isinstance(result, tuple) and len(result) == 2
    assert torch.equal(result[0], out) and result[1].shape == (2, 4, 5) and result[1].dtype == torch.float32

    cu_q, cu_k = (torch.tensor([0, n, 2 * n], dtype=torch.int32, device=device) for n in (5, 7))
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    packed_out = flash_attn_varlen_func(*packed, cu_q, cu_k, 5, 7)
    assert isinstance(packed_out, torch.Tensor) and packed_out.shape == (10, 4, 16) and packed_out.dtype == dtype
    result = flash_attn_varlen_func(*packed, cu_q, cu_k, 5, 7, return_attn_probs=True)
    assert isinstance(result, tuple) and result[1].shape == (4, 10) and result[1].dtype == torch.float32
    torch.testing.assert_close(packed_out.reshape(2, 5, 4, 16), out, rtol=1e-2, atol=1e-2)


def test_lse_is_the_natural_logarithm_of_the_sum_of_exponentials(device):
    q, k, v = random_tensors(device, (1, 3, 1, 4), (1, 5, 1, 4), (1, 5, 1, 4))
    _, lse = flash_attn_func(q, k, v, softmax_scale=0.7, return_attn_probs=True)
    scores = 0.7 * q[0, :, 0].double() @ k[0, :, 0].double().T
    assert_equals(lse[0, 0], torch.log(torch.exp(scores).sum(-1)).cpu())


def test_default_scale_is_that_of_the_query_heads(device):
    q, k, v = random_tensors(device, (1, 4, 1, 16), (1, 4, 1, 16), (1, 4, 1, 64))
    assert torch.equal(flash_attn_func(q, k, v), flash_attn_func(q, k, v, softmax_scale=0.25))
    assert not torch.equal(flash_attn_func(q, k, v), flash_attn_func(q, k, v, softmax_scale=0.125))


# ---- masks, seen through v = identity --------------------------------------------------------------------------------


def seen_keys(device, seqlen_q, seqlen_k, **options):
    """Which key each row sees: with q = 0 a row's output is the mean of the one-hot values it sees."""
    zeros_q, zeros_k = torch.zeros(1, seqlen_q, 1, 8, device=device), torch.zeros(1, seqlen_k, 1, 8, device=device)
    one_hot = torch.eye(seqlen_k, device=device)[None, :, None]
    out = flash_attn_func(zeros_q, zeros_k, one_hot, **options)[0, :, 0].cpu()
    seen = (out > 0).int()
    torch.testing.assert_close(out, seen / seen.sum(-1, keepdim=True).clamp(min=1), rtol=1e-6, atol=1e-6)
    return seen.tolist()


def test_causal_is_aligned_to_the_bottom_right_corner(device):
    assert seen_keys(device, 2, 5, causal=True) == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert seen_keys(device, 5, 2, causal=True) == [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]
    assert seen_keys(device, 3, 3, causal=True) == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert seen_keys(device, 1, 4, causal=True) == [[1, 1, 1, 1]]


def test_windows_by_example(device):
    assert seen_keys(device, 4, 4, window_size=(1, 0)) == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert seen_keys(device, 4, 4, window_size=(0, 1)) == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 1]]
    assert seen_keys(device, 2, 4, window_size=(1, 0)) == [[0, 1, 1, 0], [0, 0, 1, 1]]
    assert seen_keys(device, 3, 3, window_size=(0, 0)) == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert seen_keys(device, 3, 3, window_size=(-1, 1)) == [[1, 1, 0], [1, 1, 1], [1, 1, 1]]
    assert seen_keys(device, 3, 3, window_size=(1, -1)) == [[1, 1, 1], [1, 1, 1], [0, 1, 1]]
    # causal overrules the right side of the window
    assert seen_keys(device, 3, 3, causal=True, window_size=(1, 2)) == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert seen_keys(device, 3, 3, causal=True, window_size=[-1, -1]) == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_offset_replaces_the_alignment(device):
    assert seen_keys(device, 2, 5, causal=True, offset=0) == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert seen_keys(device, 3, 3, causal=True, offset=-1) == [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert seen_keys(device, 2, 4, window_size=(0, 0), offset=1) == [[0, 1, 0, 0], [0, 0, 1, 0]]


@pytest.mark.parametrize("left", [-1, 0, 2, 6, 7, 50])
@pytest.mark.parametrize("right", [-1, 0, 3, 50])
@pytest.mark.parametrize("shape", [(7, 7), (3, 7), (7, 3)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_windows_by_definition(left, right, shape, device):
    """FlashAttention: query i sees keys in [i + Sk - Sq - left, i + Sk - Sq + right], -1 being no bound."""
    seqlen_q, seqlen_k = shape
    expected = []
    for i in range(seqlen_q):
        diagonal = i + seqlen_k - seqlen_q
        low = 0 if left == -1 else diagonal - left
        high = seqlen_k if right == -1 else diagonal + right
        expected.append([int(low <= j <= high) for j in range(seqlen_k)])
    assert seen_keys(device, seqlen_q, seqlen_k, window_size=(left, right)) == expected


def test_query_heads_read_consecutive_groups_of_key_heads(device):
    """6 query heads on 2 key heads: heads 0, 1, 2 read head 0; heads 3, 4, 5 read head 1."""
    q, k = random_tensors(device, (1, 3, 6, 8), (1, 4, 2, 8))
    v = torch.stack([torch.full((1, 4, 8), 1.0), torch.full((1, 4, 8), 2.0)], dim=2).to(device)
    out = flash_attn_func(q, k, v)
    assert_equals(out[0, :, :, 0], torch.tensor([1.0, 1, 1, 2, 2, 2]).double().expand(3, 6))


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, mask",
    [
        ({}, {}),
        ({"causal": True}, {"window_right": 0}),
        ({"causal": True, "window_size": (4, 9)}, {"window_left": 4, "window_right": 0}),
        ({"window_size": (3, 2), "softcap": 2.0}, {"window_left": 3, "window_right": 2, "softcap": 2.0}),
        ({"causal": True, "offset": -2}, {"window_right": 0, "offset": -2}),
        ({"softmax_scale": 0.9}, {"softmax_scale": 0.9}),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_sink", [False, True], ids=["", "sink"])
def test_dense_forward_and_backward(options, mask, with_sink, device):
    q, k, v, dout, dlse, sink = random_tensors(
        device, (2, 11, 4, 16), (2, 13, 2, 16), (2, 13, 2, 8), (2, 11, 4, 8), (2, 4, 11), (4,)
    )
    leaves = [x.requires_grad_() for x in (q, k, v, *([sink] if with_sink else []))]
    sink = sink if with_sink else None
    out, lse = flash_attn_func(q, k, v, **options, sink=sink, return_attn_probs=True)
    grads = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    expected = oracle.attention_grads(q, k, v, dout, dlse, sink=sink, **mask)
    for got, want in zip((out, lse, *grads), expected, strict=with_sink):
        assert_equals(got, want)


@pytest.mark.parametrize("with_sink", [False, True], ids=["", "sink"])
@pytest.mark.parametrize("used", [False, True], ids=["", "seqused"])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_varlen_forward_and_backward(causal, used, with_sink, device):
    """Four sequences, one without queries, one without keys; with seqused only a part of each counts."""
    lengths_q, lengths_k = [5, 0, 9, 3], [7, 4, 0, 2]
    used_q, used_k = ([3, 0, 9, 2], [7, 1, 0, 1]) if used else (lengths_q, lengths_k)
    q, k, v, dout, dlse, sink = random_tensors(
        device, (17, 4, 16), (13, 2, 16), (13, 2, 8), (17, 4, 8), (4, 17), (4,)
    )
    starts = [[sum(lengths[:n]) for n in range(4)] for lengths in (lengths_q, lengths_k)]
    cu_q, cu_k = (
        torch.tensor([*start, sum(lengths)], dtype=torch.int32, device=device)
        for start, lengths in zip(starts, (lengths_q, lengths_k), strict=True)
    )
    seqused = [torch.tensor(x, dtype=torch.int32, device=device) if used else None for x in (used_q, used_k)]
    leaves = [x.requires_grad_() for x in (q, k, v, *([sink] if with_sink else []))]
    sink = sink if with_sink else None
    out, lse = flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, 9, 7, *seqused, causal=causal, window_size=(4, -1), sink=sink, return_attn_probs=True
    )
    grads = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    expected = oracle.packed_attention_grads(
        q, k, v, dout, dlse, sink=sink, q_start=starts[0], q_len=used_q, k_start=starts[1], k_len=used_k,
        window_left=4, window_right=0 if causal else None,
    )  # fmt: skip
    for got, want in zip((out, lse, *grads), expected, strict=with_sink):
        assert_equals(got, want)
    blind = torch.isneginf(expected.lse[0])
    assert not out[blind].any() and torch.isneginf(lse[:, blind]).all()


def test_varlen_self_attention_shares_one_cu_seqlens(device):
    q, k, v = random_tensors(device, (12, 2, 8), (12, 2, 8), (12, 2, 8))
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32, device=device)
    together = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 7, 7, causal=True)
    for rows in (slice(0, 5), slice(5, 12)):
        alone, _ = oracle.attention(q[None, rows], k[None, rows], v[None, rows], window_right=0)
        assert_equals(together[rows], alone[0])
    # one cu_seqlens, but only the keys are shortened
    used = torch.tensor([3, 4], dtype=torch.int32, device=device)
    out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 7, 7, seqused_k=used)
    assert_equals(out[:5], oracle.attention(q[None, :5], k[None, :3], v[None, :3])[0][0])
    assert_equals(out[5:], oracle.attention(q[None, 5:], k[None, 5:9], v[None, 5:9])[0][0])


@pytest.mark.parametrize("num_heads_q", [None, 4], ids=["5-d", "4-d"])
def test_qkvpacked_equals_its_parts(num_heads_q, device):
    (qkv,) = random_tensors(device, (2, 9, 8, 16) if num_heads_q else (2, 9, 3, 4, 16))
    qkv.requires_grad_()
    parts = qkv.split([4, 2, 2], dim=2) if num_heads_q else qkv.unbind(2)
    out, lse = flash_attn_qkvpacked_func(qkv, causal=True, num_heads_q=num_heads_q, return_attn_probs=True)
    dout, dlse = torch.ones_like(out), torch.ones_like(lse)
    expected = oracle.attention_grads(*parts, dout, dlse, window_right=0)
    assert_equals(out, expected.out)
    assert_equals(lse, expected.lse)
    (got,) = torch.autograd.grad((out, lse), qkv, (dout, dlse))
    join = torch.cat if num_heads_q else torch.stack
    assert_equals(got, join([expected.dq, expected.dk, expected.dv], dim=2))


def test_kvpacked_equals_its_parts(device):
    q, kv = random_tensors(device, (2, 6, 4, 16), (2, 9, 2, 2, 16))
    leaves = [q.requires_grad_(), kv.requires_grad_()]
    out = flash_attn_kvpacked_func(q, kv, softmax_scale=0.5, causal=True)
    k, v = kv.unbind(2)
    expected = oracle.attention_grads(q, k, v, torch.ones_like(out), softmax_scale=0.5, window_right=0)
    assert_equals(out, expected.out)
    dq, dkv = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert_equals(dq, expected.dq)
    assert_equals(dkv, torch.stack([expected.dk, expected.dv], dim=2))


@pytest.mark.parametrize(
    "name, values", [("num_splits", (0, 1)), ("pack_gqa", (None, True, False)), ("sm_margin", (0, 8))]
)
def test_hints_do_not_change_the_result(name, values, device):
    q, k, v = random_tensors(device, (1, 6, 4, 8), (1, 6, 2, 8), (1, 6, 2, 8))
    first, *others = (flash_attn_func(q, k, v, causal=True, **{name: value}) for value in values)
    assert all(torch.equal(first, other) for other in others)


def test_inputs_whose_last_dimension_is_not_contiguous(device):
    """FlashAttention makes them contiguous; so the result is that of their values."""
    q, k, v = (x.transpose(1, 3) for x in random_tensors(device, (2, 16, 2, 5), (2, 16, 2, 7), (2, 16, 2, 7)))
    assert q.stride(-1) != 1
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = flash_attn_func(*leaves, causal=True)
    dout = torch.ones_like(out).transpose(1, 3).contiguous().transpose(1, 3)
    expected = oracle.attention_grads(q, k, v, dout, window_right=0)
    for got, want in zip((out, *torch.autograd.grad(out, leaves, dout)), (expected.out, *expected[2:5]), strict=True):
        assert_equals(got, want)


# ---- the sink --------------------------------------------------------------------------------------------------------


def test_lse_comes_without_the_sink(device):
    q, k, v, sink = random_tensors(device, (1, 4, 2, 8), (1, 6, 2, 8), (1, 6, 2, 8), (2,))
    with_sink = flash_attn_func(q, k, v, sink=sink, return_attn_probs=True)
    without = flash_attn_func(q, k, v, return_attn_probs=True)
    assert torch.equal(with_sink[1], without[1])
    assert not torch.equal(with_sink[0], without[0])


def test_a_sink_is_one_more_key_without_a_value(device):
    """q extended by a 1 and the extra key's logit set to the sink: the same numbers from attention without a sink."""
    q, k, v, sink = random_tensors(device, (1, 5, 1, 8), (1, 6, 1, 8), (1, 6, 1, 8), (1,))
    wide_q = torch.nn.functional.pad(q, (0, 1), value=1.0)
    wide_k = torch.nn.functional.pad(torch.nn.functional.pad(k, (0, 1)), (0, 0, 0, 0, 0, 1))
    wide_k[0, 6, 0, 8] = sink[0] / 0.5
    wide_v = torch.nn.functional.pad(v, (0, 0, 0, 0, 0, 1))
    expected = flash_attn_func(wide_q, wide_k, wide_v, softmax_scale=0.5)
    torch.testing.assert_close(flash_attn_func(q, k, v, softmax_scale=0.5, sink=sink), expected, **TOLERANCE)


def test_a_row_that_sees_nothing_stays_zero_with_a_sink(device):
    q, k, v, sink = random_tensors(device, (1, 4, 2, 8), (1, 2, 2, 8), (1, 2, 2, 8), (2,))
    leaves = [x.requires_grad_() for x in (q, k, v, sink)]
    out = flash_attn_func(*leaves[:3], causal=True, sink=sink)
    assert not out[:, :2].any() and out[:, 2:].all()
    for grad in torch.autograd.grad(out, leaves, torch.ones_like(out)):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("sink_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sink_of_16_bit_attention(sink_dtype, device):
    q, k, v = random_tensors(device, (1, 4, 2, 8), (1, 6, 2, 8), (1, 6, 2, 8), dtype=torch.bfloat16)
    sink = torch.tensor([0.5, -0.25], dtype=sink_dtype, device=device, requires_grad=True)
    out = flash_attn_func(q, k, v, sink=sink)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.cpu().double(), oracle.attention(q, k, v, sink=sink)[0], rtol=1e-2, atol=1e-2)
    (dsink,) = torch.autograd.grad(out.float().sum(), sink)
    expected = oracle.attention_grads(q, k, v, torch.ones_like(out), sink=sink).dsink
    assert dsink.dtype == sink_dtype
    torch.testing.assert_close(dsink.cpu().double(), expected, rtol=2e-2, atol=2e-2)


def test_sinks_far_below_and_above_every_score(device):
    q, k, v, out_gradient = random_tensors(device, (1, 4, 2, 8), (1, 6, 2, 8), (1, 6, 2, 8), (1, 4, 2, 8))
    plain, lse = flash_attn_func(q, k, v, return_attn_probs=True)
    assert torch.equal(apply_sink(plain, lse, torch.full((2,), -1e4, device=device)), plain)
    overwhelmed = torch.full((2,), 1e4, device=device, requires_grad=True)
    out = apply_sink(plain, lse, overwhelmed)
    assert not out.any()
    assert not torch.autograd.grad(out, overwhelmed, out_gradient)[0].any()


# ---- autocast --------------------------------------------------------------------------------------------------------


def test_autocast_casts_fp32_inputs_like_sdpa(device):
    """fp32 inputs become autocast's dtype, as for torch's scaled_dot_product_attention; gradients come in fp32."""
    q, k, v = (x.requires_grad_() for x in random_tensors(device, (1, 9, 2, 16), (1, 9, 2, 16), (1, 9, 2, 16)))
    with torch.autocast(device, dtype=torch.bfloat16):
        out, lse = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
        theirs = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    assert out.dtype == theirs.dtype == torch.bfloat16 and lse.dtype == torch.float32
    rounded = [x.detach().bfloat16() for x in (q, k, v)]
    expected = oracle.attention_grads(*rounded, torch.ones_like(out), window_right=0)
    torch.testing.assert_close(lse.cpu().double(), expected.lse, **TOLERANCE)
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    for got, want in zip((out, *grads), (expected.out, *expected[2:5]), strict=True):
        torch.testing.assert_close(got.detach().cpu().double(), want, rtol=2e-2, atol=2e-2)
    assert all(grad.dtype == torch.float32 for grad in grads)


@pytest.mark.parametrize("options", [{}, {"window_size": (3, 0)}], ids=["fused kernel", "blockwise"])
def test_bf16_inputs_lose_nothing_under_autocast(options, device):
    q, k, v = random_tensors(device, (1, 40, 2, 16), (1, 40, 2, 16), (1, 40, 2, 16), dtype=torch.bfloat16)
    expected = flash_attn_func(q, k, v, **options, return_attn_probs=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = flash_attn_func(q, k, v, **options, return_attn_probs=True)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_fp64_stays_fp64_under_autocast(device):
    q, k, v = random_tensors(device, (1, 9, 2, 16), (1, 9, 2, 16), (1, 9, 2, 16), dtype=torch.float64)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = flash_attn_func(q, k, v)
    torch.testing.assert_close(out.cpu(), oracle.attention(q, k, v)[0], rtol=1e-12, atol=1e-12)


# ---- use in training -------------------------------------------------------------------------------------------------


def test_gradients_accumulate_on_parameters(device):
    """Two backward passes through projections add up, as with any PyTorch function."""
    torch.manual_seed(0)
    projection = torch.nn.Linear(16, 3 * 16, device=device)
    (x,) = random_tensors(device, (2, 7, 16))

    def loss():
        return flash_attn_qkvpacked_func(projection(x).view(2, 7, 3, 2, 8), causal=True).square().sum()

    loss().backward()
    once = projection.weight.grad.clone()
    loss().backward()
    torch.testing.assert_close(projection.weight.grad, 2 * once, rtol=1e-5, atol=1e-5)
    assert once.abs().sum() > 0


def test_saved_inputs_may_not_be_changed_before_the_backward(device):
    q, k, v = (x.requires_grad_() for x in random_tensors(device, (1, 4, 1, 8), (1, 4, 1, 8), (1, 4, 1, 8)))
    key = k * 1.0
    out = flash_attn_func(q, key, v)
    with torch.no_grad():
        key.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_activation_checkpointing_gives_the_same_bits(device):
    tensors = random_tensors(device, (1, 30, 4, 16), (1, 30, 2, 16), (1, 30, 2, 16), dtype=torch.bfloat16)

    def grads(run):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = run(*leaves)
        return (out, *torch.autograd.grad(out.float().square().sum(), leaves))

    def attention(q, k, v):
        return flash_attn_func(q, k, v, causal=True, deterministic=True)

    plain = grads(attention)
    checkpointed = grads(lambda *x: torch.utils.checkpoint.checkpoint(attention, *x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
