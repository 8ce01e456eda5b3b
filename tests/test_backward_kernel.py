"""The compiled backward on a Hopper GPU against fp64: every variant, mask and form, and what may go wrong in it."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
from torch import Tensor

from fa3_dist import _build, ops
from tests import oracle
from tests.accuracy import Problem, assert_solves, flatten, flatten_lse
from tests.hopper import DTYPES, MASKS, ONLY_THE_COMPILED_KERNEL, column, pack

pytestmark = ONLY_THE_COMPILED_KERNEL

BUILT = (ops.library_info() or {"variants": []})["variants"]
VARIANTS = [row.traits for row in _build.instances() if row.family == "backward" and row.name in BUILT]
LENGTHS = [(1, 1), (1, 239), (3, 799), (127, 512), (113, 203), (384, 256), (640, 128), (1024, 1023)]


def problem_tensors(
    seed, seqlen_q, seqlen_k, heads, kv_heads, head_dim, head_dim_v=None, dtype=torch.bfloat16, batch=2
):  # fmt: skip
    """q, k, v and dout of a dense problem."""
    head_dim_v = head_dim_v or head_dim
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = (
        (batch, seqlen_q, heads, head_dim), (batch, seqlen_k, kv_heads, head_dim),
        (batch, seqlen_k, kv_heads, head_dim_v), (batch, seqlen_q, heads, head_dim_v),
    )  # fmt: skip
    return [torch.randn(*shape, device="cuda", generator=generator).to(dtype) for shape in shapes]


def rows_of(q, k, v, dout, dlse=None, **mask) -> tuple[Tensor, Tensor]:
    """lse and delta as fp64 has them, so that only the backward is judged; dense tensors."""
    out, lse = oracle.attention(q, k, v, device="cuda", **mask)
    delta = (out.to(dout.device) * dout.double()).sum(-1).transpose(1, 2)
    delta = delta if dlse is None else delta - dlse.double()
    return lse.float().to(q.device).contiguous(), delta.float().contiguous()


def gradients(q, k, v, dout, dlse=None, dtype=None, **mask) -> list[Tensor]:
    """dq, dk, dv of a dense problem, written over NaN."""
    grads = [torch.full_like(x, torch.nan, dtype=dtype or x.dtype) for x in (q, k, v)]
    ops.backward(dout, q, k, v, *rows_of(q, k, v, dout, dlse, **mask), *grads, **mask)
    return grads


def judge(grads: list[Tensor], q, k, v, dout, dlse=None, **mask) -> None:
    """Gradients of a dense problem pass the gate of accuracy.py."""
    batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    offset = mask.pop("offset", None)
    offsets = mask.pop("offsets", [offset] * batch)
    problem = Problem(
        *(flatten(x) for x in (q, k, v, dout)), None if dlse is None else flatten_lse(dlse), None,
        *([i * n for i in range(batch)] if j % 2 == 0 else [n] * batch
          for j, n in enumerate((seqlen_q, seqlen_q, seqlen_k, seqlen_k))),
        offsets=offsets, **mask,
    )  # fmt: skip
    assert_solves(problem, oracle.Grads(None, None, *(flatten(x) for x in grads), None))


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: f"{x[0]}x{x[1]}")
@pytest.mark.parametrize("variant", VARIANTS, ids="_".join)
def test_every_variant(variant, lengths, mask):
    dtype, head_dim, head_dim_v = variant
    heads = random.Random(str((variant, lengths, mask))).choice([(2, 2), (4, 2), (3, 1)])
    tensors = problem_tensors(0, *lengths, *heads, int(head_dim), int(head_dim_v), DTYPES[dtype])
    judge(gradients(*tensors, **MASKS[mask]), *tensors, **MASKS[mask])


@pytest.mark.parametrize("head_dims", [(8, 8), (24, 64), (64, 8), (72, 72), (104, 40), (136, 136), (33, 47), (130, 7)])
def test_head_dims_between_the_variants(head_dims):
    tensors = problem_tensors(1, 200, 333, 4, 2, *head_dims)
    judge(gradients(*tensors, window_right=0), *tensors, window_right=0)


@pytest.mark.parametrize("offset", [-300, -129, -1, 0, 5, 128, 400, 5000])
def test_offsets(offset):
    tensors = problem_tensors(2, 300, 400, 4, 2, 64)
    for mask in MASKS.values():
        judge(gradients(*tensors, offset=offset, **mask), *tensors, offset=offset, **mask)


def test_offset_of_each_sequence():
    q, k, v, dout = problem_tensors(3, 260, 390, 4, 2, 128, batch=3)
    offsets = [-100, 17, 300]
    rows = [
        rows_of(*(x[i : i + 1] for x in (q, k, v, dout)), offset=offset, window_right=0)
        for i, offset in enumerate(offsets)
    ]
    grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    ops.backward(
        dout, q, k, v, *(torch.cat(x) for x in zip(*rows)), *grads, window_right=0,
        offsets=torch.tensor(offsets, dtype=torch.int32, device="cuda"),
    )  # fmt: skip
    judge(grads, q, k, v, dout, offsets=offsets, window_right=0)


@pytest.mark.parametrize("softcap", [0.7, 15.0, 50.0])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_softcap(softcap, head_dim):
    q, *others = problem_tensors(4, 300, 500, 2, 2, head_dim)
    for mask in ({}, {"window_right": 0}):
        judge(gradients(q * 8, *others, softcap=softcap, **mask), q * 8, *others, softcap=softcap, **mask)


@pytest.mark.parametrize("scale", [1e-3, 0.05, 1.0])
def test_softmax_scale(scale):
    tensors = problem_tensors(5, 300, 500, 4, 4, 64)
    judge(gradients(*tensors, softmax_scale=scale), *tensors, softmax_scale=scale)


def test_gradient_of_lse():
    tensors = problem_tensors(6, 300, 500, 4, 2, 128)
    dlse = torch.randn(2, 4, 300, device="cuda")
    judge(gradients(*tensors, dlse, window_right=0), *tensors, dlse, window_right=0)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_float_gradients_and_accumulation(head_dim):
    q, k, v, dout = tensors = problem_tensors(7, 300, 500, 6, 2, head_dim)
    grads = gradients(*tensors, dtype=torch.float32, window_right=0)
    judge(grads, *tensors, window_right=0)
    before = [torch.randn_like(x) for x in grads]
    sums = [x.clone() for x in before]
    rows = rows_of(*tensors, window_right=0)
    for _ in range(2):
        ops.backward(dout, q, k, v, *rows, *sums, window_right=0, accumulate=True)
    for got, start, once in zip(sums, before, grads):
        torch.testing.assert_close(got, start + 2 * once, atol=1e-4, rtol=1e-4)


def test_gradients_with_strides_of_their_own():
    q, k, v, dout = tensors = problem_tensors(8, 200, 300, 4, 2, 64)
    wide = [torch.full_like(x.repeat(1, 1, 2, 1), torch.nan) for x in (q, k, v)]
    grads = [x[:, :, ::2] for x in wide]
    ops.backward(dout.transpose(1, 2).contiguous().transpose(1, 2), q, k, v, *rows_of(*tensors), *grads)
    judge(grads, *tensors)
    assert all(x[:, :, 1::2].isnan().all() for x in wide)


# ---- packed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(2, 2), (4, 1)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("gap", [0, 5])
def test_packed_mixture(heads, head_dim, mask, gap):
    """Empty, one-token, short and long documents; what lies between them is NaN and must not be seen."""
    lengths_q, lengths_k = [0, 1, 17, 5, 700, 130, 64, 1, 300, 128], [3, 1, 17, 0, 700, 100, 64, 1, 450, 128]
    (q_start, total_q), (k_start, total_k) = pack(lengths_q, gap), pack(lengths_k, gap)
    q, _, _, dout = (x[0] for x in problem_tensors(9, total_q, 1, *heads, head_dim, batch=1))
    _, k, v, _ = (x[0] for x in problem_tensors(10, 1, total_k, *heads, head_dim, batch=1))
    inside_q, inside_k = (torch.zeros(n, dtype=torch.bool, device="cuda") for n in (total_q, total_k))
    lse = torch.full((heads[0], total_q), torch.nan, device="cuda")
    delta = lse.clone()
    for qs, qn, ks, kn in zip(q_start, lengths_q, k_start, lengths_k):
        inside_q[qs : qs + qn], inside_k[ks : ks + kn] = True, True
        if qn:
            of_range = (q[None, qs : qs + qn], k[None, ks : ks + kn], v[None, ks : ks + kn], dout[None, qs : qs + qn])
            lse[:, qs : qs + qn], delta[:, qs : qs + qn] = (x[0] for x in rows_of(*of_range, **MASKS[mask]))
    for x, inside in ((q, inside_q), (dout, inside_q), (k, inside_k), (v, inside_k)):
        x[~inside] = torch.nan
    grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    order = random.Random(0).sample(range(len(q_start)), len(q_start))
    ranges = [[x[i] for i in order] for x in (q_start, lengths_q, k_start, lengths_k)]
    ops.backward(
        dout, q, k, v, lse, delta, *grads, **dict(zip(ops.RANGES, map(column, ranges))), **MASKS[mask],
    )  # fmt: skip
    for grad, inside in zip(grads, (inside_q, inside_k, inside_k)):
        assert not grad[~inside].any(), "rows in no range have gradients 0"
    for x, inside in ((q, inside_q), (dout, inside_q), (k, inside_k), (v, inside_k)):
        x[~inside] = 0.0
    problem = Problem(q, k, v, dout, None, None, q_start, lengths_q, k_start, lengths_k, **MASKS[mask])
    assert_solves(problem, oracle.Grads(None, None, *grads, None))


def test_ranges_that_lie_are_cut_to_the_tensors():
    """Nobody reads starts and lengths on the host: whatever they say, no access leaves the tensors."""
    q, k, v, dout = (x[0] for x in problem_tensors(11, 500, 400, 4, 2, 64, batch=1))
    wild = column([-5, 450, 2**31 - 1, -(2**31), 100])
    lengths = column([100, 2**31 - 1, 7, 2**31 - 1, -3])
    rows = torch.zeros(2, 4, 500, device="cuda")
    grads = [torch.empty_like(x) for x in (q, k, v)]
    ops.backward(
        dout, q, k, v, *rows, *grads, q_start=wild, q_len=lengths, k_start=wild, k_len=lengths, window_right=0
    )
    torch.cuda.synchronize()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_visits_in_parts_are_the_whole(mask, head_dim):
    """What a ring does: keys in three launches, two ranges of queries each, all added up in place."""
    q, k, v, dout = (x[0] for x in problem_tensors(12, 700, 1000, 4, 2, head_dim, batch=1))
    shift = 300  # bottom-right alignment
    whole = {"offset": shift, **MASKS[mask]}
    lse, delta = (x[0] for x in rows_of(*(x[None] for x in (q, k, v, dout)), **whole))
    sums = [torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v)]
    for start, length in [(333, 500), (0, 333), (833, 167)]:
        for first, queries in ((0, 400), (400, 300)):
            ops.backward(
                dout, q, k, v, lse, delta, *sums, q_start=column([first]), q_len=column([queries]),
                k_start=column([start]), k_len=column([length]), offsets=column([first + shift - start]),
                accumulate=True, **MASKS[mask],
            )  # fmt: skip
    judge([x[None] for x in sums], *(x[None] for x in (q, k, v, dout)), **whole)


# ---- where and how it runs -------------------------------------------------------------------------------------------


def test_gradients_of_keys_are_bitwise_equal_from_run_to_run():
    q, k, v, dout = tensors = problem_tensors(13, 1500, 1500, 8, 2, 128)
    rows = rows_of(*tensors, window_right=0)
    first = None
    for _ in range(10):
        grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
        ops.backward(dout, q, k, v, *rows, *grads, window_right=0)
        first = first or grads
        assert torch.equal(grads[1], first[1]) and torch.equal(grads[2], first[2])


def test_deterministic_gradients_are_never_quietly_refused(monkeypatch):
    q, k, v, dout = tensors = problem_tensors(14, 200, 300, 2, 2, 64)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    rows = rows_of(*tensors)
    with pytest.raises(RuntimeError, match="deterministic"):
        ops.backward(dout, q, k, v, *rows, *grads, deterministic=True)
    monkeypatch.delenv("FA3_DIST_STRICT")
    ops._has_compiled_kernel.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ops.backward(dout, q, k, v, *rows, *grads, deterministic=True)
    judge(grads, *tensors)


def test_launches_on_many_streams_at_once():
    problems = [problem_tensors(30 + i, 1024, 1024, 8, 8, 64) for i in range(6)]
    rows = [rows_of(*problem, window_right=0) for problem in problems]

    def run(problem, rows):
        q, k, v, dout = problem
        grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
        ops.backward(dout, q, k, v, *rows, *grads, window_right=0)
        return grads

    wanted = [run(*one) for one in zip(problems, rows)]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    for _ in range(5):
        got = []
        for problem, values, stream in zip(problems, rows, streams):
            with torch.cuda.stream(stream):
                got.append(run(problem, values))
        torch.cuda.synchronize()
        for one, other in zip(got, wanted):
            assert torch.equal(one[1], other[1]) and torch.equal(one[2], other[2])


def test_cuda_graph():
    q, k, v, dout = tensors = problem_tensors(15, 500, 700, 4, 2, 128)
    rows = rows_of(*tensors, window_right=0)
    grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    ops.backward(dout, q, k, v, *rows, *grads, window_right=0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.backward(dout, q, k, v, *rows, *grads, window_right=0)
    for _ in range(3):
        for x in grads:
            x.fill_(torch.nan)
        graph.replay()
        judge(grads, *tensors, window_right=0)
