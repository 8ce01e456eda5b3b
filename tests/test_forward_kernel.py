"""The compiled forward on a Hopper GPU against fp64: every variant, mask and form, and what may go wrong in it.

The operators' own sweep (test_ops.py) runs through the kernel too; here are the sizes and contents that its short
problems do not reach.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from fa3_dist import _build, ops
from fa3_dist.ops import FIRST, LAST
from tests import hopper, oracle
from tests.accuracy import assert_close_to_oracle
from tests.hopper import DTYPES, MASKS, ONLY_THE_COMPILED_KERNEL, column, poison_memory

pytestmark = ONLY_THE_COMPILED_KERNEL

VARIANTS = [row.traits for row in _build.instances() if row.family == "forward"]
# FlashAttention-3's own test sizes: one row, ends inside a tile, ends on a tile, longer than a tile.
LENGTHS = [
    (1, 1), (1, 239), (3, 799), (127, 512), (113, 203), (128, 217), (256, 512), (384, 256), (640, 128), (512, 256),
    (1024, 1024), (1023, 1024), (1024, 1023), (4096, 4096), (4224, 4224),
]  # fmt: skip


def qkv(seed, seqlen_q, seqlen_k, heads, kv_heads, head_dim, head_dim_v=None, dtype=torch.bfloat16, batch=2):
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = (
        (batch, seqlen_q, heads, head_dim), (batch, seqlen_k, kv_heads, head_dim),
        (batch, seqlen_k, kv_heads, head_dim_v or head_dim),
    )  # fmt: skip
    return [torch.randn(*shape, device="cuda", generator=generator).to(dtype) for shape in shapes]


def naive(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, **mask) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Textbook attention with every intermediate in `dtype`: out, lse, and the magnitudes of both (accuracy.py)."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(2, 3)) * (mask.get("softmax_scale") or q.shape[-1] ** -0.5)
    softcap = mask.get("softcap", 0.0)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    offset = mask.get("offset")
    visible = oracle.visible_mask(
        q.shape[2], k.shape[2], mask.get("window_left"), mask.get("window_right"),
        k.shape[2] - q.shape[2] if offset is None else offset,
    ).to("cuda")  # fmt: skip
    blind = ~visible.any(-1, keepdim=True)
    scores = scores.masked_fill(~visible, -torch.inf)
    largest = scores.amax(-1, keepdim=True).masked_fill(blind, 0.0)
    weights = torch.exp(scores - largest)
    total = weights.sum(-1, keepdim=True).masked_fill(blind, 1.0)
    lse = (torch.log(total) + largest).masked_fill(blind, -torch.inf)[..., 0]
    probabilities = weights / total
    error_scale = (1.0 + scores.masked_fill(~visible, 0.0).abs().amax(-1, keepdim=True)).float().masked_fill(blind, 0.0)
    out_magnitude = (probabilities.float() * error_scale) @ v.float().abs()
    return (probabilities @ v).transpose(1, 2), lse, out_magnitude.transpose(1, 2), error_scale[..., 0]


def judge(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, **mask) -> None:
    """out and lse of a dense problem pass the gate of accuracy.py."""
    want_out, want_lse = oracle.attention(q, k, v, device="cuda", **mask)
    naive_out, _, out_magnitude, _ = naive(q, k, v, q.dtype, **mask)
    _, naive_lse, _, lse_magnitude = naive(q, k, v, torch.float32, **mask)
    for name, got, want, simple, magnitude, dtype in (
        ("out", out, want_out, naive_out, out_magnitude, q.dtype),
        ("lse", lse, want_lse, naive_lse, lse_magnitude, torch.float32),
    ):
        magnitude = magnitude.double().cpu()
        assert_close_to_oracle(name, got.cuda(), want.cpu(), simple, dtype, magnitude)


# ---- dense -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: f"{x[0]}x{x[1]}")
@pytest.mark.parametrize("variant", VARIANTS, ids="_".join)
def test_every_variant(variant, lengths, mask):
    dtype, head_dim, head_dim_v = variant
    long = max(lengths) > 2000
    heads, kv_heads = (2, 1) if long else random.Random(str((variant, lengths, mask))).choice([(4, 4), (6, 2), (5, 1)])
    q, k, v = qkv(0, *lengths, heads, kv_heads, int(head_dim), int(head_dim_v), DTYPES[dtype], batch=1 if long else 2)
    poison_memory()
    out, lse = ops.forward(q, k, v, **MASKS[mask])
    judge(out, lse, q, k, v, **MASKS[mask])


WIDE = {"left": {"window_left": 8240, "window_right": 0}, "both sides": {"window_left": 8000, "window_right": 230}}


@pytest.mark.parametrize("mask", {**MASKS, **WIDE}, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_more_keys_than_short_tiles_are_for(dtype, mask):
    mask = {**MASKS, **WIDE}[mask]
    q, k, v = qkv(13, 384, 8300, 2, 1, 256, dtype=DTYPES[dtype], batch=1)
    poison_memory()
    out, lse = ops.forward(q, k, v, **mask)
    judge(out, lse, q, k, v, **mask)


@pytest.mark.parametrize("lengths", [(256, 1), (500, 700), (1024, 65), (1300, 1310)], ids=lambda x: f"{x[0]}x{x[1]}")
@pytest.mark.parametrize("dtype", DTYPES)
def test_enough_work_for_two_teams(dtype, lengths):
    """At head_dim 64 many tiles that see few keys go to two teams of a block of threads."""
    for mask in ({}, {"softcap": 20.0}, {"window_right": 0}, {"window_left": 1100, "window_right": 0}):
        q, k, v = qkv(14, *lengths, 32, 8, 64, dtype=DTYPES[dtype], batch=9 if lengths[0] < 1000 else 3)
        poison_memory()
        out, lse = ops.forward(q, k, v, **mask)
        judge(out, lse, q, k, v, **mask)


@pytest.mark.parametrize(
    "head_dims", [(8, 8), (24, 64), (64, 8), (72, 72), (80, 96), (104, 40), (136, 136), (160, 200)]
)
def test_head_dims_between_the_variants(head_dims):
    q, k, v = qkv(1, 200, 333, 4, 2, *head_dims)
    out, lse = ops.forward(q, k, v, window_right=0)
    judge(out, lse, q, k, v, window_right=0)


@pytest.mark.parametrize("head_dims", [(1, 1), (33, 47), (100, 100), (130, 7)])
def test_head_dims_that_the_operator_pads(head_dims):
    q, k, v = qkv(1, 200, 333, 4, 2, *head_dims)
    out, lse = ops.forward(q, k, v, window_right=0)
    judge(out, lse, q, k, v, window_right=0)


WINDOWS = [(0, 0), (63, 0), (64, 0), (128, 0), (129, 64), (500, 0), (1900, 100), (0, 300)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("lengths", [(700, 700), (191, 2100), (1500, 130), (2500, 2500)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_windows(head_dim, lengths, window):
    """Short ones have tiles of their own at head_dim 128, and warpgroups leave out blocks at either end of a tile."""
    choose = random.Random(str((head_dim, lengths, window)))
    heads, kv_heads = choose.choice([(4, 4), (8, 1), (12, 2)])
    q, k, v = qkv(41, *lengths, heads, kv_heads, head_dim, dtype=choose.choice([*DTYPES.values()]))
    options = {"window_left": window[0], "window_right": window[1]}
    options |= choose.choice([{}, {"offset": -100}, {"offset": 333}, {"softcap": 5.0}])
    poison_memory()
    out, lse = ops.forward(q, k, v, **options)
    judge(out, lse, q, k, v, **options)


@pytest.mark.parametrize("window", [(128, 0), (127, 0), (129, 0), (65, 0), (63, 0), (0, 0), (64, 64)], ids=str)
@pytest.mark.parametrize("lengths", [(1921, 1921), (2000, 2064), (1500, 1500), (900, 1000)], ids=str)
@pytest.mark.parametrize("sm_margin", [0, 125, 131])
def test_windows_along_which_blocks_walk(lengths, window, sm_margin):
    """At head_dim 128 a block of threads takes a head's tiles one after the other, and loads once what two of them see;
    if there are few blocks, they go on from head to head. With a wider window, or another offset, they do not."""
    choose = random.Random(str((lengths, window, sm_margin)))
    heads, kv_heads = choose.choice([(5, 5), (8, 2)])
    q, k, v = qkv(43, *lengths, heads, kv_heads, 128, dtype=choose.choice([*DTYPES.values()]))
    options = {"window_left": window[0], "window_right": window[1]} | choose.choice([{}, {}, {"softcap": 5.0}])
    poison_memory()
    out, lse = ops.forward(q, k, v, sm_margin=sm_margin, **options)
    judge(out, lse, q, k, v, **options)


@pytest.mark.parametrize("window", [(0, 0), (64, 0), (128, 64), (900, 0)], ids=str)
@pytest.mark.parametrize("lengths", [[0, 1, 700, 191, 193, 1000, 17], [60, 100, 1, 32, 3, 64, 2, 128, 190]], ids=str)
def test_windows_of_packed_documents(lengths, window):
    """Long and short ones; of the short ones several share a tile, which each warpgroup sees a part of."""
    start, length, total = pack(lengths)
    q, k, v = (x[0] for x in qkv(42, total, total, 8, 2, 128, batch=1))
    options = {"window_left": window[0], "window_right": window[1]}
    poison_memory()
    out, lse = ops.forward(q, k, v, q_start=start, q_len=length, k_start=start, k_len=length, **options)
    for s, n in zip(start.tolist(), lengths):
        rows = slice(s, s + n)
        if n:
            judge(out[None, rows], lse[None, :, rows], *(x[None, rows] for x in (q, k, v)), **options)


@pytest.mark.parametrize("offset", [-300, -129, -1, 0, 5, 128, 400, 5000])
def test_offsets(offset):
    q, k, v = qkv(2, 300, 400, 4, 2, 64)
    for mask in MASKS.values():
        out, lse = ops.forward(q, k, v, offset=offset, **mask)
        judge(out, lse, q, k, v, offset=offset, **mask)


def test_offset_of_each_sequence():
    q, k, v = qkv(3, 260, 390, 4, 2, 128, batch=3)
    offsets = [-100, 17, 300]
    out, lse = ops.forward(q, k, v, offsets=torch.tensor(offsets, dtype=torch.int32, device="cuda"), window_right=0)
    for i, offset in enumerate(offsets):
        judge(out[i : i + 1], lse[i : i + 1], *(x[i : i + 1] for x in (q, k, v)), offset=offset, window_right=0)


@pytest.mark.parametrize("softcap", [0.7, 15.0, 50.0])
def test_softcap(softcap):
    q, k, v = qkv(4, 300, 500, 4, 4, 128)
    q = q * 8
    for mask in ({}, {"window_right": 0}):
        out, lse = ops.forward(q, k, v, softcap=softcap, **mask)
        judge(out, lse, q, k, v, softcap=softcap, **mask)


@pytest.mark.parametrize("scale", [1e-3, 0.05, 1.0, 7.0])
def test_softmax_scale(scale):
    q, k, v = qkv(5, 300, 500, 4, 4, 64)
    out, lse = ops.forward(q, k, v, softmax_scale=scale, window_right=0)
    judge(out, lse, q, k, v, softmax_scale=scale, window_right=0)


@pytest.mark.parametrize("heads", [(2, 1), (3, 1), (7, 1), (12, 2), (24, 3), (64, 1), (100, 1), (128, 1), (130, 1)])
@pytest.mark.parametrize("seqlen_q", [1, 2, 9, 129])
def test_query_heads_that_share_tiles(heads, seqlen_q):
    q, k, v = qkv(6, seqlen_q, 600, *heads, 64)
    for mask in (MASKS["full"], MASKS["causal"], MASKS["window"]):
        out, lse = ops.forward(q, k, v, **mask)
        judge(out, lse, q, k, v, **mask)


def test_float_output():
    q, k, v = qkv(7, 300, 500, 4, 2, 128)
    out, _ = ops.forward(q, k, v, out_dtype=torch.float32, window_right=0)
    rounded, _ = ops.forward(q, k, v, window_right=0)
    assert out.dtype == torch.float32
    assert torch.equal(out.bfloat16(), rounded)


# ---- contents --------------------------------------------------------------------------------------------------------


ONE_JUMP = [*[0.0] * 5, 1000.0, *[0.0] * 6]


def growing(seed: int, steps: list[float], dtype: torch.dtype, head_dim: int = 64) -> list[Tensor]:
    """q, k, v whose scores jump by `steps` from block to block of 64 keys, from the last to the first."""
    q, k, v = qkv(seed, 384, 64 * len(steps), 2, 2, head_dim, dtype=dtype, batch=1)
    direction = torch.ones(head_dim, device="cuda") / head_dim**0.5
    q = (0.2 * q.float() + direction).to(dtype)
    levels = torch.tensor(list(itertools.accumulate(steps)), device="cuda").flip(0).repeat_interleave(64)
    k = (0.2 * k.float() + levels[None, :, None, None] * direction).to(dtype)
    return [q, k, v]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "steps",
    [[0.0, 4.0] * 8, [5.0] * 12, [60.0] * 10, [100.0] * 10, ONE_JUMP, [300.0, -500.0, 900.0] * 5],
    ids=lambda steps: f"{len(steps)} blocks up to {max(steps):g}",
)
def test_scores_that_grow_along_the_keys(dtype, steps):
    """Maxima that most steps do not look for: small jumps, jumps that rescale, and jumps past what fp32 can hold."""
    q, k, v = growing(8, steps, DTYPES[dtype])
    for mask in ({}, {"window_right": 0, "offset": 64 * len(steps)}):
        out, lse = ops.forward(q, k, v, softmax_scale=1.0, **mask)
        judge(out, lse, q, k, v, softmax_scale=1.0, **mask)


@pytest.mark.parametrize("steps", [[0.0, 4.0], [0.0, 0.0, 60.0], [100.0], [300.0, -500.0, 900.0]], ids=str)
def test_scores_that_grow_in_a_window(steps):
    steps = steps * (24 // len(steps))
    q, k, v = growing(10, steps, torch.bfloat16, head_dim=128)
    options = {"softmax_scale": 1.0, "window_left": 700, "window_right": 0, "offset": 64 * len(steps) - 384}
    out, lse = ops.forward(q, k, v, **options)
    judge(out, lse, q, k, v, **options)


@pytest.mark.parametrize("sm_margin", [0, 131])
@pytest.mark.parametrize("steps", [[0.0, 60.0], [0.0, 0.0, 1000.0], [300.0, -500.0, 900.0]], ids=str)
def test_scores_that_grow_where_blocks_walk(steps, sm_margin):
    """Tiles that are repeated come between those of a walk, which then begins anew."""
    steps = steps * (48 // len(steps))
    _, k, v = growing(11, steps, torch.bfloat16, head_dim=128)
    q = growing(12, [0.0], torch.bfloat16, head_dim=128)[0].repeat(1, 8, 1, 1)
    options = {"softmax_scale": 1.0, "window_left": 128, "window_right": 0}
    out, lse = ops.forward(q, k, v, sm_margin=sm_margin, **options)
    judge(out, lse, q, k, v, **options)


def test_more_overflowing_tiles_than_are_remembered():
    """All tiles of a launch overflow: the list of those to repeat fills up, and known maxima take over."""
    q, k, v = growing(9, ONE_JUMP, torch.bfloat16)
    many = [x.expand(40, -1, -1, -1).repeat(1, 1, 24, 1) for x in (q, k, v)]
    out, lse = ops.forward(*many, softmax_scale=1.0)
    judge(out[:1, :, :2], lse[:1, :2], q, k, v, softmax_scale=1.0)
    assert torch.equal(out, out[:1, :, :2].expand(40, -1, -1, -1).repeat(1, 1, 24, 1))
    assert torch.equal(lse, lse[:1, :2].expand(40, -1, -1).repeat(1, 24, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", [(600, 600), (300, 4400)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_scores_far_from_zero(head_dim, lengths, mask, dtype):
    """Rows whose scores are all far above or below 0, side by side: out does not depend on that, and lse follows."""
    q, k, v = qkv(12, *lengths, 3, 3, head_dim, dtype=DTYPES[dtype], batch=1)
    level_0, k = q / 8, k / 8
    level_0[..., 0], k[..., 0] = 0, 1
    levels = torch.tensor([0, -100, 20, -50, 100, -30, 50, -200, 200], device="cuda")
    rows = torch.arange(lengths[0], device="cuda")[:, None] // 5 + torch.arange(3, device="cuda")
    q = level_0.clone()
    q[0, :, :, 0] = levels[rows % len(levels)].to(q.dtype)
    options = {"softmax_scale": 1.0, **MASKS[mask]}
    poison_memory()
    out, lse = ops.forward(q, k, v, **options)
    judge(out, lse, q, k, v, **options)
    judge(out, ops.forward(level_0, k, v, **options)[1], level_0, k, v, **options)


def test_nan_and_infinity_stay_in_their_rows():
    q, k, v = qkv(10, 300, 700, 2, 2, 64, batch=1)
    clean, clean_lse = ops.forward(q, k, v)
    q[0, 17, 0, 3], q[0, 200, 1, 5] = torch.nan, torch.inf
    out, lse = ops.forward(q, k, v)
    hit = torch.zeros(300, 2, dtype=torch.bool, device="cuda")
    hit[17, 0] = hit[200, 1] = True
    assert out[0][hit].isnan().all() and lse[0].transpose(0, 1)[hit].isnan().all()
    assert torch.equal(out[0][~hit], clean[0][~hit])
    assert torch.equal(lse[0].transpose(0, 1)[~hit], clean_lse[0].transpose(0, 1)[~hit])


def test_fp16_is_closer_than_standard_attention():
    """The paper's comparison (section 4.3): rms error against standard attention's with fp16 intermediates, inputs with
    0.1 % outliers."""
    generator = torch.Generator("cuda").manual_seed(11)
    normal = torch.randn(3, 1, 2048, 8, 128, device="cuda", generator=generator)
    outliers = 10 * torch.randn(normal.shape, device="cuda", generator=generator)
    hit = torch.rand(normal.shape, device="cuda", generator=generator) < 0.001
    q, k, v = (normal + outliers * hit).half()
    want, _ = oracle.attention(q, k, v, device="cuda")
    ours, _ = ops.forward(q, k, v)
    standard, *_ = naive(q, k, v, torch.float16)
    assert (ours - want).pow(2).mean().sqrt() * 1.7 <= (standard - want).pow(2).mean().sqrt()


# ---- packed ----------------------------------------------------------------------------------------------------------


def pack(lengths: list[int], gap: int = 0) -> tuple[Tensor, Tensor, int]:
    """Starts and lengths on the GPU, `gap` rows apart, and how many rows that takes."""
    starts, total = hopper.pack(lengths, gap)
    return column(starts), column(lengths), total


@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("gap", [0, 5])
def test_packed_mixture(heads, head_dim, mask, gap):
    """Empty, one-token, short and long documents; what lies between them is NaN and must not be seen."""
    lengths = [0, 1, 17, 0, 2000, 130, 64, 1, 300, 128]
    start, length, total = pack(lengths, gap)
    tensors = [x[0] for x in qkv(12, total, total, *heads, head_dim, batch=1)]
    inside = torch.zeros(total, dtype=torch.bool, device="cuda")
    for s, n in zip(start.tolist(), lengths):
        inside[s : s + n] = True
    for x in tensors:
        x[~inside] = torch.nan
    poison_memory()
    q, k, v = tensors
    out, lse = ops.forward(q, k, v, q_start=start, q_len=length, k_start=start, k_len=length, **MASKS[mask])
    assert not out[~inside].any() and (lse[:, ~inside] == -torch.inf).all()
    for s, n in zip(start.tolist(), lengths):
        rows = slice(s, s + n)
        if n:
            judge(out[None, rows], lse[None, :, rows], *(x[None, rows] for x in (q, k, v)), **MASKS[mask])


@pytest.mark.parametrize("heads", [(4, 4), (8, 1)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("spans", [(0, 900, 0, 1100), (37, 500, 11, 640), (899, 1, 1000, 100), (100, 0, 0, 5)], ids=str)
def test_one_range(heads, head_dim, mask, spans):
    """No list of tiles is made for a single one; what lies outside of it is NaN and must not be seen."""
    q, k, v = (x[0] for x in qkv(14, 900, 1100, *heads, head_dim, batch=1))
    rows, keys = (slice(start, start + length) for start, length in (spans[:2], spans[2:]))
    for x, inside in ((q, rows), (k, keys), (v, keys)):
        values = x[inside].clone()
        x.fill_(torch.nan)
        x[inside] = values
    ranges = dict(zip(ops.RANGES, (column([x]) for x in spans)))
    poison_memory()
    out, lse = ops.forward(q, k, v, **ranges, **MASKS[mask])
    if spans[1]:
        judge(out[None, rows], lse[None, :, rows], q[None, rows], k[None, keys], v[None, keys], **MASKS[mask])
    out[rows], lse[:, rows] = 0.0, -torch.inf
    assert not out.any() and (lse == -torch.inf).all(), "rows in no range"


def test_one_long_document_among_many_short_ones():
    lengths = [8000, *[1] * 200, *[17] * 900, 0]
    start, length, total = pack(lengths)
    q, k, v = (x[0] for x in qkv(13, total, total, 2, 2, 64, batch=1))
    out, lse = ops.forward(q, k, v, q_start=start, q_len=length, k_start=start, k_len=length, window_right=0)
    for i in (0, 1, 150, 201, 600, 1100):
        rows = slice(int(start[i]), int(start[i]) + lengths[i])
        judge(out[None, rows], lse[None, :, rows], *(x[None, rows] for x in (q, k, v)), window_right=0)


@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("head_dims", [(64, 64), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("mask", [*MASKS, "offsets"])
def test_short_neighbours_share_tiles(heads, head_dims, mask):
    """Runs of short documents, broken by longer ones and by gaps; more ranges than one pass over the list holds."""
    generator = torch.Generator().manual_seed(31)
    lengths = torch.randint(0, 70, (1100,), generator=generator).tolist()
    lengths[40], lengths[41], lengths[200], lengths[1050] = 128, 127, 129, 500
    lengths[1023], lengths[1024] = 30, 31
    start, length, total = pack(lengths)
    start[500:] += 3  # nobody's tokens
    q, k, v = (x[0] for x in qkv(29, total + 3, total + 3, *heads, head_dims[0], batch=1, head_dim_v=head_dims[1]))
    options = {"window_right": 0} if mask == "offsets" else MASKS[mask]
    offsets = torch.arange(len(lengths), device="cuda", dtype=torch.int32) % 41 - 20 if mask == "offsets" else None
    poison_memory()
    out, lse = ops.forward(
        q, k, v, q_start=start, q_len=length, k_start=start, k_len=length, offsets=offsets, **options
    )
    for i in [*range(60), *range(195, 205), *range(495, 505), *range(1015, 1060), 1099]:
        rows = slice(int(start[i]), int(start[i]) + lengths[i])
        offset = {} if offsets is None else {"offset": int(offsets[i])}
        if lengths[i]:
            judge(out[None, rows], lse[None, :, rows], *(x[None, rows] for x in (q, k, v)), **options, **offset)


def test_keys_past_a_range_are_not_read():
    """Ranges that end inside a tile, with NaN right behind them, in the last rows of memory too."""
    lengths_q, lengths_k = [130, 1, 77], [200, 129, 1]
    q_start, q_len, total_q = pack(lengths_q)
    k_start, k_len, total_k = pack(lengths_k, gap=3)
    q = qkv(14, total_q, 1, 4, 2, 128, batch=1)[0][0]
    _, k, v = (x[0] for x in qkv(15, 1, total_k, 4, 2, 128, batch=1))
    keep = torch.zeros(total_k, dtype=torch.bool, device="cuda")
    for s, n in zip(k_start.tolist(), lengths_k):
        keep[s : s + n] = True
    k[~keep], v[~keep] = torch.nan, torch.nan
    out, lse = ops.forward(q, k, v, q_start=q_start, q_len=q_len, k_start=k_start, k_len=k_len)
    for qs, qn, ks, kn in zip(q_start.tolist(), lengths_q, k_start.tolist(), lengths_k):
        judge(
            out[None, qs : qs + qn], lse[None, :, qs : qs + qn], q[None, qs : qs + qn], k[None, ks : ks + kn],
            v[None, ks : ks + kn],
        )  # fmt: skip


def test_ranges_that_lie_are_cut_to_the_tensors():
    """Nobody reads starts and lengths on the host: whatever they say, no access leaves the tensors."""
    q, k, v = (x[0] for x in qkv(16, 500, 400, 4, 2, 64, batch=1))
    wild = torch.tensor([-5, 450, 2**31 - 1, -(2**31), 100], dtype=torch.int32, device="cuda")
    lengths = torch.tensor([100, 2**31 - 1, 7, 2**31 - 1, -3], dtype=torch.int32, device="cuda")
    ops.forward(q, k, v, q_start=wild, q_len=lengths, k_start=wild, k_len=lengths, window_right=0)
    torch.cuda.synchronize()


# ---- continuation ----------------------------------------------------------------------------------------------------


def visit_columns(*rows: tuple[int, ...]) -> dict[str, Tensor]:
    names = ("q_start", "q_len", "k_start", "k_len", "offsets", "flags")
    columns = torch.tensor(rows, dtype=torch.int32, device="cuda").reshape(-1, 6)
    return {name: columns[:, i].contiguous() for i, name in enumerate(names)}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_visits_in_parts_are_the_whole(mask, head_dim, out_dtype):
    """Keys in three launches, in an order that is not theirs, over a state of NaN: as if seen at once."""
    q, k, v = (x[0] for x in qkv(17, 700, 1000, 6, 2, head_dim, batch=1))
    out_acc = torch.full((700, 6, head_dim), torch.nan, device="cuda")
    lse = torch.full((6, 700), torch.nan, device="cuda")
    out = torch.full((700, 6, head_dim), torch.nan, device="cuda", dtype=out_dtype)
    shift = 300  # bottom-right alignment
    parts = [(333, 500, FIRST), (0, 333, 0), (833, 167, LAST)]
    for start, length, flag in parts:
        visits = visit_columns(
            (0, 400, start, length, shift - start, flag), (400, 300, start, length, 400 + shift - start, flag)
        )
        ops.forward_into(q, k, v, out_acc, lse, out, **visits, **MASKS[mask])
    whole = {"offset": shift, **MASKS[mask]}
    if out_dtype is torch.float32:
        out = out.to(q.dtype)
    judge(out[None], lse[None], q[None], k[None], v[None], **whole)


def test_visits_without_a_visible_key():
    q, k, v = (x[0] for x in qkv(18, 256, 256, 2, 2, 64, batch=1))
    before, lse_before = torch.randn(256, 2, 64, device="cuda"), torch.randn(2, 256, device="cuda")
    out_acc, lse = before.clone(), lse_before.clone()
    out = torch.full((256, 2, 64), torch.nan, device="cuda", dtype=q.dtype)
    hidden = -1000  # causal with this offset: nothing is seen
    visits = visit_columns(
        (0, 64, 0, 256, hidden, 0), (64, 64, 0, 256, hidden, FIRST), (128, 64, 0, 256, hidden, LAST),
        (192, 32, 0, 0, 0, FIRST | LAST),
    )  # fmt: skip
    ops.forward_into(q, k, v, out_acc, lse, out, **visits, window_right=0)
    assert torch.equal(out_acc[:64], before[:64]) and torch.equal(lse[:, :64], lse_before[:, :64])
    assert not out_acc[64:128].any() and (lse[:, 64:128] == -torch.inf).all()
    assert torch.equal(out[128:192], before[128:192].to(q.dtype))
    assert torch.equal(lse[:, 128:192], lse_before[:, 128:192])
    assert not out[192:224].any() and (lse[:, 192:224] == -torch.inf).all()
    assert torch.equal(out_acc[224:], before[224:]) and out[224:].isnan().all(), "rows in no visit keep theirs"


def test_visits_to_no_keys_at_all():
    q, _, _ = (x[0] for x in qkv(19, 64, 1, 2, 2, 64, batch=1))
    empty = q.new_empty(0, 2, 64)
    out_acc, lse = torch.full((64, 2, 64), torch.nan, device="cuda"), torch.full((2, 64), torch.nan, device="cuda")
    ops.forward_into(q, empty, empty, out_acc, lse, None, **visit_columns((0, 64, 0, 0, 0, FIRST)))
    assert not out_acc.any() and (lse == -torch.inf).all()


def test_overflow_under_continuation():
    """A tile that is repeated must merge with the state once, not twice."""
    q, k, v = (x[0] for x in growing(20, ONE_JUMP, torch.bfloat16))
    out_acc, lse = torch.full((384, 2, 64), torch.nan, device="cuda"), torch.full((2, 384), torch.nan, device="cuda")
    out = torch.empty(384, 2, 64, device="cuda", dtype=q.dtype)
    for start, length, flag in ((512, 256, FIRST), (0, 512, LAST)):
        visits = visit_columns((0, 384, start, length, 0, flag))
        ops.forward_into(q, k, v, out_acc, lse, out, **visits, softmax_scale=1.0)
    judge(out[None], lse[None], q[None], k[None], v[None], softmax_scale=1.0)


# ---- where and how it runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_bitwise_equal_from_run_to_run(mask):
    start, length, total = pack([700, 3, 1200, 64, 500])
    q, k, v = (x[0] for x in qkv(21, total, total, 8, 2, 128, batch=1))
    ranges = {"q_start": start, "q_len": length, "k_start": start, "k_len": length}
    dense = [x[None, :2048] for x in (q, k, v)]
    first = (*ops.forward(q, k, v, **ranges, **MASKS[mask]), *ops.forward(*dense, **MASKS[mask]))
    for _ in range(20):
        poison_memory()
        again = (*ops.forward(q, k, v, **ranges, **MASKS[mask]), *ops.forward(*dense, **MASKS[mask]))
        assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_launches_on_many_streams_at_once():
    problems = [qkv(30 + i, 1024, 1024, 8, 8, 64) for i in range(8)]
    wanted = [ops.forward(*problem, window_right=0) for problem in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    for _ in range(10):
        got = []
        for problem, stream in zip(problems, streams):
            with torch.cuda.stream(stream):
                got.append(ops.forward(*problem, window_right=0))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for one, other in zip(got, wanted) for a, b in zip(one, other))


def test_cuda_graph():
    start, length, total = pack([300, 1, 700])
    q, k, v = (x[0] for x in qkv(22, total, total, 4, 4, 64, batch=1))
    ranges = {"q_start": start, "q_len": length, "k_start": start, "k_len": length}

    def call() -> tuple[Tensor, ...]:
        dense = ops.forward(q[None], k[None], v[None], window_right=0)
        return (*ops.forward(q, k, v, **ranges, window_right=0), *dense)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for shift in range(3):
        q.copy_(torch.roll(q, 1, 0))
        length.copy_(torch.tensor([300 - 50 * shift, 1, 700], device="cuda"))
        for x in captured:
            x.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, call()))


@pytest.mark.parametrize("sm_margin", [1, 50, 131, 1000])
def test_sm_margin(sm_margin):
    q, k, v = qkv(23, 700, 700, 8, 8, 64)
    wanted, got = ops.forward(q, k, v, window_right=0), ops.forward(q, k, v, window_right=0, sm_margin=sm_margin)
    assert all(torch.equal(a, b) for a, b in zip(wanted, got))


def test_no_host_synchronisation():
    start, length, total = pack([300, 1, 700])
    q, k, v = (x[0] for x in qkv(24, total, total, 4, 4, 64, batch=1))
    ranges = {"q_start": start, "q_len": length, "k_start": start, "k_len": length}
    ops.forward(q, k, v, **ranges)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.forward(q, k, v, **ranges)
        ops.forward(q[None], k[None], v[None], window_right=0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_strides():
    """Layouts that bulk loads take without a copy: heads first, slices of a fused projection, every other row."""
    fused = torch.randn(2, 600, 3 * 4 * 64, device="cuda", dtype=torch.bfloat16)
    q, k, v = (x.unflatten(-1, (4, 64)) for x in fused.split(4 * 64, dim=-1))
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    sparse = [torch.stack([x, torch.full_like(x, torch.nan)], 2).flatten(1, 2)[:, ::2] for x in (q, k, v)]
    wanted = ops.forward(*(x.contiguous() for x in (q, k, v)), window_right=0)
    for tensors in ((q, k, v), heads_first, sparse):
        got = ops.forward(*tensors, window_right=0)
        assert all(torch.equal(a, b) for a, b in zip(wanted, got))


@pytest.mark.parametrize("packed", [False, True])
def test_more_than_2_to_the_31_elements(packed):
    """q and out have 2.2e9 elements; rows at their ends are compared with the same rows alone."""
    tokens, heads = 1_050_000, 16
    q = torch.empty(tokens, heads, 128, device="cuda", dtype=torch.bfloat16)
    generator = torch.Generator("cuda").manual_seed(25)
    for rows in q.split(65536):
        rows.normal_(generator=generator)
    assert q.numel() > 2**31
    k, v = q[-2048:, :1], q[-4096:-2048, :1]
    if packed:
        column = lambda x: torch.tensor([x], dtype=torch.int32, device="cuda")  # noqa: E731
        ranges = {"q_start": column(0), "q_len": column(tokens), "k_start": column(0), "k_len": column(2048)}
        out, lse = ops.forward(q, k, v, **ranges)
    else:
        out, lse = (x[0] for x in ops.forward(q[None], k[None], v[None]))
    for rows in (slice(0, 100), slice(tokens // 2, tokens // 2 + 100), slice(tokens - 100, tokens)):
        judge(out[None, rows], lse[None, :, rows], q[None, rows], k[None], v[None])


@pytest.mark.multi_gpu
def test_second_device():
    q, k, v = (x.to("cuda:1") for x in qkv(26, 500, 500, 4, 2, 128))
    out, lse = ops.forward(q, k, v, window_right=0)
    assert out.device == lse.device == torch.device("cuda:1")
    judge(out.to("cuda:0"), lse.to("cuda:0"), *(x.to("cuda:0") for x in (q, k, v)), window_right=0)
