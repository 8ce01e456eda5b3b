"""The compiled backward on a Hopper GPU against fp64: every variant, mask and form, and what may go wrong in it."""

from __future__ import annotations

import itertools
import random
import re

import pytest
import torch
from torch import Tensor

from fa3_dist import _build, flash_attn_func, ops
from tests import oracle
from tests.accuracy import Problem, assert_solves, flatten, flatten_lse
from tests.hopper import DTYPES, MASKS, ONLY_THE_COMPILED_KERNEL, column, pack, poison_memory

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


def gradients(q, k, v, dout, dlse=None, dtype=None, deterministic=False, **mask) -> list[Tensor]:
    """dq, dk, dv of a dense problem, written over NaN."""
    grads = [torch.full_like(x, torch.nan, dtype=dtype or x.dtype) for x in (q, k, v)]
    rows = rows_of(q, k, v, dout, dlse, **mask)
    ops.backward(dout, q, k, v, *rows, *grads, deterministic=deterministic, **mask)
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


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize(
    "heads, head_dim, longest",
    [*itertools.product([(2, 2), (4, 1)], [64, 128, 192, 256], [700]), ((4, 1), 128, 9700)],  # the last: long blocks
)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("gap", [0, 5])
def test_packed_mixture(heads, head_dim, longest, mask, gap, deterministic):
    """Empty, one-token, short and long documents; what lies between them is NaN and must not be seen."""
    lengths_q, lengths_k = [0, 1, 17, 5, longest, 130, 64, 1, 300, 128], [3, 1, 17, 0, 700, 100, 64, 1, 450, 128]
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
    poison_memory()
    ops.backward(
        dout, q, k, v, lse, delta, *grads, **dict(zip(ops.RANGES, map(column, ranges))), **MASKS[mask],
        deterministic=deterministic,
    )  # fmt: skip
    for grad, inside in zip(grads, (inside_q, inside_k, inside_k)):
        assert not grad[~inside].any(), "rows in no range have gradients 0"
    for x, inside in ((q, inside_q), (dout, inside_q), (k, inside_k), (v, inside_k)):
        x[~inside] = 0.0
    problem = Problem(q, k, v, dout, None, None, q_start, lengths_q, k_start, lengths_k, **MASKS[mask])
    assert_solves(problem, oracle.Grads(None, None, *grads, None))


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("accumulate, accumulate_kv", [(False, False), (True, True), (True, False)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("spans", [(0, 500, 0, 700), (37, 300, 11, 440), (499, 1, 600, 100), (100, 0, 0, 5)], ids=str)
def test_one_range(head_dim, mask, spans, accumulate, accumulate_kv, deterministic):
    """No list of tiles is made for a single one; what lies outside of it is NaN and must not be seen."""
    tensors = [x[0] for x in problem_tensors(13, 500, 700, 4, 2, head_dim, batch=1)]
    rows, keys = (slice(start, start + length) for start, length in (spans[:2], spans[2:]))
    inside = dict(zip("q k v dout".split(), (rows, keys, keys, rows)))
    lse, delta = torch.full((2, 4, 500), torch.nan, device="cuda")
    parts = [x[None, span] for x, span in zip(tensors, inside.values())]
    if spans[1]:
        lse[:, rows], delta[:, rows] = (x[0] for x in rows_of(*parts, **MASKS[mask]))
    for x, part, span in zip(tensors, [x.clone() for x in parts], inside.values()):
        x.fill_(torch.nan)
        x[span] = part[0]
    q, k, v, dout = tensors
    adds = (accumulate, accumulate_kv, accumulate_kv)
    before = [
        torch.randn(x.shape, device="cuda") if add else torch.full_like(x, torch.nan) for x, add in zip((q, k, v), adds)
    ]
    if accumulate and not accumulate_kv:  # keys that no query sees keep what they hold
        for x in before[1:]:
            x.zero_()
            x[keys][seen_keys(spans[1], spans[3], **MASKS[mask])] = torch.nan
    grads = [x.clone() for x in before]
    poison_memory()
    ops.backward(
        dout, q, k, v, lse, delta, *grads, **dict(zip(ops.RANGES, (column([x]) for x in spans))), **MASKS[mask],
        accumulate=accumulate, accumulate_kv=accumulate_kv, deterministic=deterministic,
    )  # fmt: skip
    grads = [x.double() - y.double() if add else x for x, y, add in zip(grads, before, adds)]
    if spans[1]:
        of_range = [x[None, inside[name]].to(q.dtype) for name, x in zip("qkv", grads)]
        judge(of_range, *(x[None, span] for x, span in zip(tensors, inside.values())), **MASKS[mask])
    for name, grad in zip("qkv", grads):
        if spans[1]:
            grad[inside[name]] = 0.0
        assert not grad.any(), f"rows of {name} that are in no range, or that meet none"


def seen_keys(
    queries: int, keys: int, window_left: int | None = None, window_right: int | None = None, offset: int | None = None
) -> slice:  # fmt: skip
    """Keys that some query sees, the last query at the last key unless there is an offset."""
    offset = keys - queries if offset is None else offset
    first = 0 if window_left is None else max(0, offset - window_left)
    end = keys if window_right is None else min(keys, queries + offset + window_right)
    return slice(first, end if queries else first)


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("heads", [(2, 2), (4, 1)])
@pytest.mark.parametrize("head_dims", [(64, 64), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("mask", [*MASKS, "offsets"])
def test_runs_of_short_documents(heads, head_dims, mask, deterministic):
    """Runs of short documents, broken by longer ones and perhaps by a gap; masks and offsets cut each its own way."""
    lengths = torch.randint(0, 70, (90,), generator=torch.Generator().manual_seed(32)).tolist()
    lengths[20], lengths[21], lengths[40], lengths[60] = 128, 127, 129, 300
    start, _ = pack(lengths)
    if heads[0] > heads[1]:
        start[50:] = [s + 3 for s in start[50:]]  # nobody's tokens
    total = start[-1] + lengths[-1]
    options = {"window_right": 0} if mask == "offsets" else MASKS[mask]
    offsets = [i % 41 - 20 for i in range(len(lengths))] if mask == "offsets" else None
    q, k, v, dout = (x[0] for x in problem_tensors(33, total, total, *heads, *head_dims, batch=1))
    lse, delta = torch.full((heads[0], total), -torch.inf, device="cuda"), torch.zeros(heads[0], total, device="cuda")
    for i, (s, n) in enumerate(zip(start, lengths)):
        offset = {} if offsets is None else {"offset": offsets[i]}
        if n:
            rows = rows_of(*(x[None, s : s + n] for x in (q, k, v, dout)), **options, **offset)
            lse[:, s : s + n], delta[:, s : s + n] = (x[0] for x in rows)
    grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    poison_memory()
    ops.backward(
        dout, q, k, v, lse, delta, *grads, **dict(zip(ops.RANGES, map(column, [start, lengths] * 2))), **options,
        offsets=None if offsets is None else column(offsets), deterministic=deterministic,
    )  # fmt: skip
    problem = Problem(q, k, v, dout, None, None, *[start, lengths] * 2, offsets=offsets, **options)
    assert_solves(problem, oracle.Grads(None, None, *grads, None))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_past_the_documents_of_a_tile_have_no_weight(dtype):
    """exp(0 - lse) of such a row, whose scores are 0, may be infinite, and 0 times that is NaN."""
    lengths = [64, 64] * 30 + [60, 60] * 30  # full tiles; then, in their place, some that end early
    start, total = pack(lengths)
    q, k, v, dout = (x[0] for x in problem_tensors(34, total, total, 2, 2, 64, dtype=DTYPES[dtype], batch=1))
    direction = torch.ones(64, device="cuda")
    q, k = (0.1 * q + direction).to(q.dtype), (0.1 * k - 4 * direction).to(k.dtype)  # scores of about -32
    lse, delta = torch.empty(2, 2, total, device="cuda")
    for s, n in zip(start, lengths):
        lse[:, s : s + n], delta[:, s : s + n] = (
            x[0] for x in rows_of(*(x[None, s : s + n] for x in (q, k, v, dout)))
        )  # fmt: skip
    grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    ops.backward(
        dout, q, k, v, lse, delta, *grads, **dict(zip(ops.RANGES, map(column, [start, lengths] * 2))), sm_margin=129
    )
    problem = Problem(q, k, v, dout, None, None, *[start, lengths] * 2)
    assert_solves(problem, oracle.Grads(None, None, *grads, None))


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
def test_ranges_that_lie_are_cut_to_the_tensors(deterministic):
    """Nobody reads starts and lengths on the host: whatever they say, no access leaves the tensors, no tile waits."""
    q, k, v, dout = (x[0] for x in problem_tensors(11, 500, 400, 4, 2, 64, batch=1))
    wild = column([-5, 450, 2**31 - 1, -(2**31), 100])
    lengths = column([100, 2**31 - 1, 7, 2**31 - 1, -3])
    rows = torch.zeros(2, 4, 500, device="cuda")
    grads = [torch.empty_like(x) for x in (q, k, v)]
    ops.backward(
        dout, q, k, v, *rows, *grads, q_start=wild, q_len=lengths, k_start=wild, k_len=lengths, window_right=0,
        deterministic=deterministic,
    )  # fmt: skip
    torch.cuda.synchronize()


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_visits_in_parts_are_the_whole(mask, head_dim, deterministic):
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
                accumulate=True, deterministic=deterministic, **MASKS[mask],
            )  # fmt: skip
    judge([x[None] for x in sums], *(x[None] for x in (q, k, v, dout)), **whole)


@pytest.mark.parametrize("parts", [3, 40])
@pytest.mark.parametrize("heads", [(2, 2), (4, 1)])
@pytest.mark.parametrize("head_dims", [(128, 128), (192, 128), (256, 256)])
def test_ranges_that_share_their_queries(head_dims, heads, parts):
    """In one launch, all of them: their tiles of queries are many times as many as those of the queries alone."""
    q, k, v, dout = (x[0] for x in problem_tensors(14, 1024, 1280, *heads, *head_dims, batch=1))
    shift = {"offset": 256, "window_right": 0}
    lse, delta = (x[0] for x in rows_of(*(x[None] for x in (q, k, v, dout)), **shift))
    starts = [1280 * i // parts for i in range(parts + 1)]
    lengths = [end - start for start, end in zip(starts, starts[1:])]
    ranges = ([0] * parts, [1024] * parts, starts[:-1], lengths)
    for dtype in (q.dtype, torch.float32):  # in fp32, heads that share keys are taken in parts
        dq = torch.zeros_like(q, dtype=torch.float32)
        dk, dv = (torch.full_like(x, torch.nan, dtype=dtype) for x in (k, v))
        ops.backward(
            dout, q, k, v, lse, delta, dq, dk, dv, **dict(zip(ops.RANGES, map(column, ranges))), window_right=0,
            offsets=column([256 - start for start in starts[:-1]]), accumulate=True, accumulate_kv=False,
        )  # fmt: skip
        judge([x[None].to(q.dtype) for x in (dq, dk, dv)], *(x[None] for x in (q, k, v, dout)), **shift)


# ---- long blocks of queries ------------------------------------------------------------------------------------------

# Lengths of queries and of keys, heads, KV heads and the mask: what csrc/backward/backward.h takes long blocks for.
LONG = {
    "full": (2049, 300, 2, 1, {}),
    "full, no whole block": (2081, 129, 3, 3, {}),
    "causal": (4097, 4097, 1, 1, {"window_right": 0}),
    "full, two heads a tile": (1100, 8700, 2, 1, {}),
    "causal, GQA": (4200, 1500, 6, 2, {"window_right": 0}),
    "causal, first queries see nothing": (4300, 900, 4, 2, {"window_right": 0}),
    "causal, offset": (4150, 2500, 4, 2, {"window_right": 0, "offset": 77}),
    "window": (2300, 2400, 4, 2, {"window_left": 2060, "window_right": 0}),
    "local": (2299, 1500, 4, 2, {"window_left": 1800, "window_right": 300, "offset": -301}),
    "what comes later": (4100, 2100, 2, 1, {"window_left": 55}),
    "softcap": (2100, 700, 4, 2, {"softcap": 5.0}),
}


def kernels_of(
    seqlen_q, seqlen_k, heads, kv_heads, mask, dtype=torch.bfloat16, head_dim=128, batch=1, **options
) -> list[str]:  # fmt: skip
    """Names of the kernels that a backward runs."""
    q, k, v, dout = problem_tensors(40, seqlen_q, seqlen_k, heads, kv_heads, head_dim, dtype=dtype, batch=batch)
    rows = torch.zeros(2, batch, heads, seqlen_q, device="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ops.backward(dout, q, k, v, *rows, *map(torch.empty_like, (q, k, v)), **mask, **options)
        torch.cuda.synchronize()
    return [event.name for event in profile.events()]


def query_blocks(*problem, **options) -> str:
    """QueryBlocks of the kernel that runs, by its name."""
    (kernel,) = (name for name in kernels_of(*problem, **options) if "backward_kernel" in name)
    number = re.search(r"QueryBlocks\D+(\d)", kernel)
    assert number, kernel
    return ["usual", "long", "long in turns"][int(number[1])]


@pytest.mark.parametrize("case", LONG)
def test_long_blocks_are_taken(case):
    """So that what the tests of this section find is said of them."""
    seqlen_q, *others = LONG[case]
    assert query_blocks(seqlen_q, *others) == "long"
    assert query_blocks(seqlen_q, *others, deterministic=True) == "long in turns"
    assert query_blocks(1000, *others) == query_blocks(seqlen_q, *others, dtype=torch.float16) == "usual"


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("head_dims", [(128, 128), (104, 120)], ids=str)
@pytest.mark.parametrize("case", LONG)
def test_long_blocks(case, head_dims, deterministic):
    seqlen_q, seqlen_k, heads, kv_heads, mask = LONG[case]
    batch = 2 if case in ("full", "softcap") else 1
    q, *others = problem_tensors(41, seqlen_q, seqlen_k, heads, kv_heads, *head_dims, batch=batch)
    tensors = (q * (8 if "softcap" in mask else 1), *others)
    judge(gradients(*tensors, **mask, deterministic=deterministic), *tensors, **mask)


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("order", ["dq", "dq_sum"])
@pytest.mark.parametrize("mask", [{}, {"window_right": 0}, {"window_left": 1200, "window_right": 0}], ids=str)
def test_long_blocks_add_up(mask, order, deterministic):
    """What a ring does: keys in two launches, of two ranges that share their queries, and of one."""
    q, k, v, dout = (x[0] for x in problem_tensors(42, 2500, 2800, 2, 1, 128, batch=1))
    shift = 300
    whole = {"offset": shift, **mask}
    lse, delta = (x[0] for x in rows_of(*(x[None] for x in (q, k, v, dout)), **whole))
    dq = ops.new_dq_sum(q, v) if order == "dq_sum" else torch.zeros_like(q, dtype=torch.float32)
    dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
    for ranges in (([0, 0], [2500, 2500], [0, 1000], [1000, 900]), ([0], [2500], [1900], [900])):
        ops.backward(
            dout, q, k, v, lse, delta, dq, dk, dv, **dict(zip(ops.RANGES, map(column, ranges))), accumulate=True,
            offsets=column([shift - start for start in ranges[2]]), deterministic=deterministic, **mask,
        )  # fmt: skip
    dq = ops.round_dq(dq, q, v) if order == "dq_sum" else dq.to(q.dtype)
    judge([x[None].to(q.dtype) for x in (dq, dk, dv)], *(x[None] for x in (q, k, v, dout)), **whole)


# ---- zeros that are written beside the tiles (csrc/backward/clear.cuh) -----------------------------------------------

# seqlen_q, seqlen_k, heads, kv_heads, batch: many more tiles of keys than processors.
MANY_TILES = {
    "square": (400, 500, 8, 8, 24),
    "a tile a head": (300, 128, 8, 8, 60),
    "few queries": (2, 700, 8, 8, 24),
    "fewer queries than tiles": (3, 1100, 8, 8, 16),
    "more queries": (900, 400, 8, 8, 24),
    "grouped": (333, 513, 8, 2, 60),
    "one sequence": (1025, 1100, 72, 72, 1),
    "keys that few queries see": (100, 2000, 40, 40, 1),
}


def solve_by_heads(q, k, v, dout, **mask) -> tuple[list[Tensor], list[Tensor]]:
    """What `rows_of` gives for a dense problem, and dq, dk, dv in fp64; never the scores of all heads at once."""
    group, results = q.shape[2] // k.shape[2], []
    for head in range(k.shape[2]):
        queries, keys = slice(head * group, (head + 1) * group), slice(head, head + 1)
        leaves = [x.double().requires_grad_() for x in (q[:, :, queries], k[:, :, keys], v[:, :, keys])]
        out, lse = oracle.attention(*leaves, device="cuda", **mask)
        weighted = out * dout[:, :, queries]
        grads = torch.autograd.grad(weighted.sum(), leaves)
        results.append((lse.detach(), weighted.detach().sum(-1).transpose(1, 2), *grads))
    *rows, dq, dk, dv = zip(*results, strict=True)
    return [torch.cat(x, dim=1).float().contiguous() for x in rows], [torch.cat(x, dim=2) for x in (dq, dk, dv)]


def assert_close_by_heads(grads: list[Tensor], expected: list[Tensor]) -> None:
    """Gradients are close to fp64's: what is added to no zeros, or lost, is off by as much as they are."""
    for got, want in zip(grads, expected, strict=True):
        # By batch element and head; the rest is what fp32 leaves of terms that cancel.
        error, size = (x.square().mean(dim=(1, 3)).sqrt() for x in (got.double() - want, want))
        assert (error <= 1e-2 * size + 1e-4).all(), f"error {error.max()} of gradients of {size.mean()}"


def judge_many_tiles(q, k, v, dout, runs=({},), **mask) -> None:
    """The same of gradients over NaN, in several runs, each with other options."""
    rows, expected = solve_by_heads(q, k, v, dout, **mask)
    for options in runs:
        grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
        torch.cuda.empty_cache()  # so that scratch memory is the poison, not what fp64 has left
        poison_memory()
        ops.backward(dout, q, k, v, *rows, *grads, **mask, **options)
        assert_close_by_heads(grads, expected)


@pytest.mark.parametrize("mask", [*MASKS, "sees little"])
@pytest.mark.parametrize("head_dim", [40, 64, 96, 128])
@pytest.mark.parametrize("case", MANY_TILES)
def test_many_tiles(case, head_dim, mask):
    seqlen_q, seqlen_k, heads, kv_heads, batch = MANY_TILES[case]
    options = {"window_right": 0, "offset": -seqlen_q // 2} if mask == "sees little" else MASKS[mask]
    judge_many_tiles(*problem_tensors(60, seqlen_q, seqlen_k, heads, kv_heads, head_dim, batch=batch), **options)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("seqlen, heads, mask", [
    (1024, 60, "full"), (2048, 19, "full"), (2048, 44, "causal"), (3072, 30, "causal"), (3072, 32, "causal"),
])  # fmt: skip
def test_a_last_group_of_heads_that_is_larger_than_the_others(seqlen, heads, mask, head_dim):
    tensors = problem_tensors(61, seqlen, seqlen, heads, heads, head_dim, batch=1)
    judge_many_tiles(*tensors, runs=[{"sm_margin": 0}, {"sm_margin": 100}], **MASKS[mask])


def test_many_tiles_beside_another_kernel():
    """Blocks wait for zeros while others have no processor yet: another stream's kernel has most of them."""
    q, k, v, dout = problem_tensors(62, 500, 500, 8, 8, 128, batch=24)
    rows, expected = solve_by_heads(q, k, v, dout)
    side, busy = torch.cuda.Stream(), torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(20):
        grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            busy @ busy
        ops.backward(dout, q, k, v, *rows, *grads)  # NOTE: nothing in between that waits for the device
        assert_close_by_heads(grads, expected)


def test_many_tiles_on_many_streams_at_once():
    q, k, v, dout = problem_tensors(63, 500, 500, 8, 8, 128, batch=24)
    rows, expected = solve_by_heads(q, k, v, dout)
    streams = [torch.cuda.Stream() for _ in range(4)]
    grads = [[torch.full_like(x, torch.nan) for x in (q, k, v)] for _ in streams]
    torch.cuda.synchronize()
    for _ in range(5):
        for stream, mine in zip(streams, grads, strict=True):
            with torch.cuda.stream(stream):
                ops.backward(dout, q, k, v, *rows, *mine)
        torch.cuda.synchronize()
        for mine in grads:
            assert_close_by_heads(mine, expected)
            for x in mine:
                x.fill_(torch.nan)
        torch.cuda.synchronize()


def test_many_tiles_in_a_cuda_graph():
    q, k, v, dout = problem_tensors(64, 500, 500, 8, 8, 128, batch=24)
    rows, expected = solve_by_heads(q, k, v, dout)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    ops.backward(dout, q, k, v, *rows, *grads)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.backward(dout, q, k, v, *rows, *grads)
    for _ in range(3):
        for x in grads:
            x.fill_(torch.nan)
        graph.replay()
        assert_close_by_heads(grads, expected)


# ---- query heads of a KV head in parts (csrc/backward/backward.h) ----------------------------------------------------

# Lengths of queries and of keys, heads, KV heads, batch and the mask: of few tiles.
PARTS = {
    "causal, two parts": (2000, 2048, 8, 4, 1, {"window_right": 0}),
    "causal, a head each": (1500, 1500, 8, 1, 2, {"window_right": 0}),
    "causal, parts of two heads": (2300, 8192, 8, 1, 1, {"window_right": 0}),
    "causal, three heads": (1100, 1300, 6, 2, 2, {"window_right": 0}),
    "full": (700, 2000, 8, 2, 1, {}),
    "window": (3000, 3100, 4, 1, 1, {"window_left": 400, "window_right": 0}),
    "keys that no query sees": (600, 1900, 4, 1, 1, {"window_right": 0, "offset": 0}),
    "queries that see no key": (1900, 600, 4, 1, 1, {"window_right": 0}),
    "softcap": (900, 700, 4, 2, 1, {"softcap": 5.0}),
}


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("case", PARTS)
def test_heads_are_taken_in_parts(case, head_dim):
    """So that what the next test finds is said of them; of many tiles they are not."""
    seqlen_q, seqlen_k, heads, kv_heads, batch, mask = PARTS[case]

    def has_parts(batch: int) -> bool:
        names = kernels_of(seqlen_q, seqlen_k, heads, kv_heads, mask, head_dim=head_dim, batch=batch)
        return any("sum_parts_kernel" in name for name in names)

    assert has_parts(batch)
    assert head_dim != 128 or not has_parts(64)


@pytest.mark.parametrize("head_dims", [(64, 64), (128, 128), (104, 40), (256, 256)], ids=str)
@pytest.mark.parametrize("case", PARTS)
def test_parts(case, head_dims):
    seqlen_q, seqlen_k, heads, kv_heads, batch, mask = PARTS[case]
    q, *others = problem_tensors(44, seqlen_q, seqlen_k, heads, kv_heads, *head_dims, batch=batch)
    tensors = (q * (8 if "softcap" in mask else 1), *others)
    judge_many_tiles(*tensors, runs=({}, {"deterministic": True}, {"sm_margin": 120}), **mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head_dims", [(128, 128), (192, 128)], ids=str)
def test_parts_of_other_dtypes(head_dims, dtype):
    """Gradients in fp32, and of fp16 inputs."""
    inputs = torch.bfloat16 if dtype == torch.float32 else dtype
    tensors = problem_tensors(45, 1100, 1300, 8, 2, *head_dims, dtype=inputs, batch=1)
    judge(gradients(*tensors, dtype=dtype, window_right=0), *tensors, window_right=0)


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("accumulate, accumulate_kv", [(False, False), (True, True), (True, False)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("ranges", [
    ([0], [2000], [0], [2000]), ([37], [1700], [11], [1500]), ([0, 1000], [1000, 1000], [0, 1000], [1000, 1000]),
    ([3, 700, 1900], [600, 1150, 90], [5, 640, 1880], [600, 1240, 100]),
], ids=["one", "one, rows left over", "two", "three, rows left over"])  # fmt: skip
def test_parts_of_packed_ranges(ranges, head_dim, accumulate, accumulate_kv, deterministic):
    """Range by range beside fp64; rows in no range get 0, or keep what they hold where dq is added to."""
    q, k, v, dout = (x[0] for x in problem_tensors(46, 2000, 2000, 8, 1, head_dim, batch=1))
    lse, delta = torch.full((8, 2000), torch.nan, device="cuda"), torch.full((8, 2000), torch.nan, device="cuda")
    expected = [torch.zeros_like(x, dtype=torch.float64) for x in (q, k, v)]
    outside = torch.ones(3, 2000, dtype=torch.bool, device="cuda")
    for q_start, q_len, k_start, k_len in zip(*ranges, strict=True):
        queries, keys = slice(q_start, q_start + q_len), slice(k_start, k_start + k_len)
        rows, grads = solve_by_heads(*(x[None] for x in (q[queries], k[keys], v[keys], dout[queries])), window_right=0)
        lse[:, queries], delta[:, queries] = (x[0] for x in rows)
        for total, left, at, grad in zip(expected, outside, (queries, keys, keys), grads, strict=True):
            total[at], left[at] = grad[0], False
    grads, before = [], []
    for x, left, adds in zip((q, k, v), outside, (accumulate, accumulate_kv, accumulate_kv), strict=True):
        held = torch.randn_like(x, dtype=torch.float32 if accumulate else x.dtype)
        kept = (left & accumulate)[:, None, None]
        grads.append(held.clone() if adds else held.masked_fill(~kept, torch.nan))
        before.append(held if adds else held * kept)
    torch.cuda.empty_cache()
    poison_memory()
    ops.backward(
        dout, q, k, v, lse, delta, *grads, **dict(zip(ops.RANGES, map(column, ranges))), window_right=0,
        accumulate=accumulate, accumulate_kv=accumulate_kv, deterministic=deterministic,
    )  # fmt: skip
    assert all(torch.equal(x[left], held[left]) for x, held, left in zip(grads, before, outside, strict=True))
    added = [x.double() - held for x, held in zip(grads, before, strict=True)]
    assert_close_by_heads([x[None].to(q.dtype) for x in added], [x[None] for x in expected])


@pytest.mark.parametrize("case", PARTS)
def test_parts_that_accumulate_add_to_the_same_rows(case):
    """A dense batch: of what is written, only rows that some query sees need be."""
    seqlen_q, seqlen_k, heads, kv_heads, batch, mask = PARTS[case]
    q, k, v, dout = tensors = problem_tensors(47, seqlen_q, seqlen_k, heads, kv_heads, 128, batch=batch)
    rows = rows_of(*tensors, **mask)
    seen = seen_keys(seqlen_q, seqlen_k, **{name: value for name, value in mask.items() if name != "softcap"})
    for accumulate_kv, held in ((True, 1.0), (False, torch.nan)):
        grads = [torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v)]
        for x in grads[1:]:
            x[:, seen] = held
        poison_memory()
        ops.backward(dout, q, k, v, *rows, *grads, accumulate=True, accumulate_kv=accumulate_kv, **mask)
        for x in grads[1:]:
            x[:, seen] -= held if accumulate_kv else 0.0
        judge([x.to(q.dtype) for x in grads], *tensors, **mask)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_work_that_is_told_decides_about_parts(head_dim):
    """Where dk and dv are written, parts that accumulate find them cleared."""
    q, k, v, dout = (x[0] for x in problem_tensors(48, 2000, 2000, 8, 1, head_dim, batch=1))
    rows, ranges = torch.zeros(2, 8, 2000, device="cuda"), dict(zip(ops.RANGES, map(column, ([0], [2000]) * 2)))

    def has_parts(dtype=torch.float32, **options) -> bool:
        grads = [torch.zeros_like(x, dtype=x_dtype) for x, x_dtype in ((q, torch.float32), (k, dtype), (v, dtype))]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            ops.backward(dout, q, k, v, *rows, *grads, **ranges, accumulate=True, accumulate_kv=False, **options)
            torch.cuda.synchronize()
        return any("clear_keys_kernel" in event.name for event in profile.events())

    assert has_parts() and has_parts(most_queries=2000, mean_queries=2000)
    assert not has_parts(most_queries=10, mean_queries=10)
    assert not has_parts(deterministic=True) and not has_parts(torch.bfloat16)


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


@pytest.mark.parametrize("head_dims", [(192, 128), (256, 256)], ids=str)
def test_gradients_of_wide_heads_are_bitwise_equal_unasked(head_dims):
    q, k, v, dout = tensors = problem_tensors(17, 1500, 1500, 8, 2, *head_dims)
    rows = rows_of(*tensors, window_right=0)
    wanted = None
    for deterministic in (True, *[False] * 6):
        grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
        ops.backward(dout, q, k, v, *rows, *grads, window_right=0, deterministic=deterministic)
        wanted = wanted or grads
        assert all(map(torch.equal, grads, wanted))


DOCUMENTS = [0, 1, 17, 128, 3000, 64, 0, 5, 777, 1, 129, 5000, 300]
# Lengths of queries and of keys, heads, KV heads, and the mask. Where many tiles meet a block of queries, the order of
# additions shows: of ordinary gradients almost every launch differs at these lengths.
REPEATED = {
    "full": (4096, 4096, 4, 4, {}),
    "causal": (4096, 4096, 4, 4, {"window_right": 0}),
    "causal, GQA": (4096, 4096, 8, 2, {"window_right": 0}),
    "full, MQA": (2048, 3000, 8, 1, {}),
    "window": (4100, 4100, 4, 4, {"window_left": 700, "window_right": 0}),
    "local": (3000, 5000, 4, 2, {"window_left": 300, "window_right": 200, "offset": 900}),
    "few queries": (500, 6000, 4, 4, {"window_right": 0}),
    "few keys": (6000, 500, 4, 4, {"window_right": 0}),
    "one head": (16384, 16384, 1, 1, {}),
}


def assert_every_run_is_equal(dout, q, k, v, accumulate=False, **call) -> None:
    """Twelve launches that get different numbers of SMs, half of them beside other work.

    What lse and delta hold does not matter: nothing has to be right here.
    """
    heads_first = q.movedim(-2, -3)[..., 0]
    rows = [(0.1 * torch.randn_like(heads_first.float()) + mean).contiguous() for mean in (9.0, 0.0)]
    before = [torch.randn_like(x, dtype=torch.float32) for x in (q, k, v)]
    other, work = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    first = None
    for i in range(12):
        grads = [x.clone() if accumulate else torch.full_like(x, torch.nan, dtype=q.dtype) for x in before]
        torch.cuda.synchronize()
        if i % 2:
            with torch.cuda.stream(other):
                for _ in range(4):
                    work @ work
        ops.backward(
            dout, q, k, v, *rows, *grads, accumulate=accumulate, deterministic=True,
            sm_margin=(0, 0, 5, 61, 0, 120)[i % 6], **call,
        )  # fmt: skip
        torch.cuda.synchronize()
        first = first or grads
        for name, wanted, got in zip(("dq", "dk", "dv"), first, grads):
            assert wanted.isfinite().all() and torch.equal(wanted, got), f"{name} of launch {i} is another than before"


@pytest.mark.parametrize("case", REPEATED)
@pytest.mark.parametrize("variant", VARIANTS, ids="_".join)
def test_deterministic_gradients_are_bitwise_equal(variant, case):
    dtype, head_dim, head_dim_v = variant
    seqlen_q, seqlen_k, heads, kv_heads, mask = REPEATED[case]
    q, k, v, dout = problem_tensors(
        20, seqlen_q, seqlen_k, heads, kv_heads, int(head_dim), int(head_dim_v), DTYPES[dtype], batch=1
    )
    assert_every_run_is_equal(dout, q, k, v, **mask)
    assert_every_run_is_equal(dout, q, k, v, **mask, accumulate=True)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("variant", VARIANTS, ids="_".join)
def test_deterministic_gradients_of_documents_are_bitwise_equal(variant, mask):
    dtype, head_dim, head_dim_v = variant
    start, total = pack(DOCUMENTS)
    q, k, v, dout = (
        x[0] for x in problem_tensors(21, total, total, 4, 2, int(head_dim), int(head_dim_v), DTYPES[dtype], batch=1)
    )
    order = random.Random(1).sample(range(len(start)), len(start))
    starts, lengths = (column([x[i] for i in order]) for x in (start, DOCUMENTS))
    for accumulate in (False, True):
        assert_every_run_is_equal(
            dout, q, k, v, accumulate, q_start=starts, q_len=lengths, k_start=starts, k_len=lengths, **MASKS[mask]
        )


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_deterministic_sums_of_ranges_that_share_queries(head_dim):
    """As a ring's visits do: three ranges of keys, whose queries overlap without beginning at the same ones."""
    q, k, v, dout = (x[0] for x in problem_tensors(22, 3000, 4000, 4, 2, head_dim, batch=1))
    assert_every_run_is_equal(
        dout, q, k, v, accumulate=True, q_start=column([0, 0, 500]), q_len=column([3000, 2000, 2500]),
        k_start=column([0, 2000, 3000]), k_len=column([2000, 1000, 1000]), offsets=column([1000, -1000, -1500]),
        window_right=0,
    )  # fmt: skip


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", [(113, 203), (1024, 1023), (300, 2500)], ids=lambda x: f"{x[0]}x{x[1]}")
@pytest.mark.parametrize("variant", VARIANTS, ids="_".join)
def test_deterministic_gradients_are_right(variant, lengths, mask):
    dtype, head_dim, head_dim_v = variant
    heads = random.Random(str((variant, lengths, mask))).choice([(2, 2), (4, 2), (3, 1)])
    tensors = problem_tensors(23, *lengths, *heads, int(head_dim), int(head_dim_v), DTYPES[dtype])
    judge(gradients(*tensors, **MASKS[mask], deterministic=True), *tensors, **MASKS[mask])


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_deterministic_gradients_of_graphs_and_of_many_streams(head_dim, packed):
    """Two launches that share the SMs: a block of one must never wait for a block that the other keeps out."""
    q, k, v, dout = tensors = problem_tensors(24, 4096, 4096, 8, 8, head_dim, batch=1)
    rows = rows_of(*(x[:, :, :1] for x in tensors))
    rows = [x.expand(1, 8, 4096).contiguous() for x in rows]
    ranges = {}
    if packed:
        q, k, v, dout, *rows = (x[0] for x in (*tensors, *rows))
        starts, lengths = column([0, 100, 150, 1000]), column([100, 50, 850, 3096])
        ranges = {"q_start": starts, "q_len": lengths, "k_start": starts, "k_len": lengths}

    def run():
        grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
        ops.backward(dout, q, k, v, *rows, *grads, deterministic=True, **ranges)
        return grads

    wanted = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    for _ in range(5):
        got = []
        graph.replay()
        for stream in streams:
            with torch.cuda.stream(stream):
                got.append(run())
        torch.cuda.synchronize()
        for grads in (*got, captured):
            assert all(torch.equal(one, other) for one, other in zip(grads, wanted))


def test_torch_asks_for_deterministic_gradients():
    q, k, v, dout = problem_tensors(25, 4096, 4096, 4, 4, 64, batch=1)
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(10):
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            results.append(torch.autograd.grad(flash_attn_func(*leaves), leaves, dout))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0]))


@pytest.mark.parametrize("head_dim", [64, 256])
def test_launches_on_many_streams_at_once(head_dim):
    problems = [problem_tensors(30 + i, 1024, 1024, 8, 8, head_dim) for i in range(6)]
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


@pytest.mark.parametrize("head_dim", [128, 256])
def test_cuda_graph(head_dim):
    q, k, v, dout = tensors = problem_tensors(15, 500, 700, 4, 2, head_dim)
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
