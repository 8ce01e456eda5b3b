"""The operators against the fp64 oracle: a seeded sweep over dense and packed problems, then what the sweep cannot say.

Every test runs on the CPU, and on a GPU where there is one (`device`): the same operators, another back end.
"""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import Tensor

from fa3_dist import interface, ops
from tests import oracle
from tests.accuracy import Problem, assert_close_to_oracle, assert_solves, flatten, flatten_lse, magnitudes, naive_grads

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
LAYOUTS = ("contiguous", "contiguous", "transposed", "sliced", "strided", "expanded")
GRADIENT_LAYOUTS = (*LAYOUTS, "columns", "scalar")  # what autograd hands down may have any strides
RANGE_NAMES = ("q_start", "q_len", "k_start", "k_len")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


# ---- one random problem ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration of the sweep; its text form is the name of the test."""

    seed: int
    packed: bool
    dtype: str
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    heads: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    layouts: tuple[str, ...]  # of q, k, v, dout
    window_left: int | None = None
    window_right: int | None = None
    offset: int | None = None
    offsets: tuple[int, ...] | None = None
    softmax_scale: float | None = None
    softcap: float = 0.0
    logit_gain: float = 1.0
    sink: bool = False
    dlse: bool = False
    poisoned: bool = False  # packed: rows outside every range are NaN
    deterministic: bool = False

    def __str__(self) -> str:
        lengths = f"q{'+'.join(map(str, self.lengths_q))}-k{'+'.join(map(str, self.lengths_k))}"
        dims = f"h{self.heads}:{self.heads_kv}-d{self.head_dim}" + f":{self.head_dim_v}" * (
            self.head_dim_v != self.head_dim
        )
        parts = [f"{'packed' if self.packed else 'dense'}{self.seed}", self.dtype, lengths, dims]
        for label, value in (
            ("L", self.window_left), ("R", self.window_right), ("off", self.offset), ("offs", self.offsets),
            ("scale", self.softmax_scale), ("cap", self.softcap or None),
            ("gain", self.logit_gain if self.logit_gain != 1 else None),
        ):  # fmt: skip
            if value is not None:
                parts.append(label + ("+".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}"))
        parts += [label for label in ("sink", "dlse", "poisoned") if getattr(self, label)]
        parts += [f"d{self.layouts[3]}"] if self.layouts[3] in ("columns", "scalar") else []
        return "-".join(parts)


def random_case(seed: int, packed: bool) -> Case:
    rng = random.Random(f"{'packed' if packed else 'dense'} {seed}")
    count = rng.choice([0, 1, 2, 3, 5] if packed else [1, 1, 2, 3])
    heads_kv = rng.choice([1, 1, 2, 3])
    long = rng.random() < 0.18  # long enough for several blocks in any implementation

    def length() -> int:
        return rng.choice([130, 257, 300, 520, 777] if long else [0, 1, 1, 2, 7, 17, 33, 64, 65, 100, 129])

    lengths_q, lengths_k = [length() for _ in range(count)], [length() for _ in range(count)]
    if not packed:
        lengths_q, lengths_k = lengths_q[:1] * count, lengths_k[:1] * count
    if rng.random() < 0.35:
        lengths_k = lengths_q
    head_dim = rng.choice([1, 8, 16, 32, 64] if long else [1, 3, 8, 16, 24, 32, 40, 64, 72, 100, 128])
    longest = max([1, *lengths_q, *lengths_k])

    def edge() -> int:
        return rng.choice([0, 0, 1, 3, 16, 50, longest - 1, longest, 10 * longest])

    def shift() -> int:
        return rng.choice([0, 1, -1, 5, -7, rng.randint(-longest, longest), rng.choice([-2, 2]) * longest])

    windows = [(None, None), (None, 0), (None, 0), (edge(), 0), (edge(), edge()), (edge(), None), (None, edge())]
    window = rng.choice(windows)
    aligned = rng.choice(["default", "default", "offset", "offsets"])
    return Case(
        seed=seed,
        packed=packed,
        dtype=rng.choice(["fp32", "fp32", "fp32", "bf16", "bf16", "fp16", "fp64"]),
        lengths_q=tuple(lengths_q),
        lengths_k=tuple(lengths_k),
        heads=heads_kv * rng.choice([1, 1, 2, 4] if heads_kv < 3 else [1, 2]),
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=head_dim if rng.random() < 0.65 else rng.choice([1, 8, 16, 40, 64, 100]),
        layouts=(*(rng.choice(LAYOUTS) for _ in range(3)), rng.choice(GRADIENT_LAYOUTS)),
        window_left=window[0],
        window_right=window[1],
        offset=shift() if aligned == "offset" else None,
        offsets=tuple(shift() for _ in range(count)) if aligned == "offsets" else None,
        softmax_scale=rng.choice([None, None, None, 0.02, 0.9]),
        softcap=rng.choice([0.0, 0.0, 0.0, 0.5, 3.0, 30.0]),
        logit_gain=rng.choice([1.0, 1.0, 1.0, 1.0, 30.0]),
        sink=rng.random() < 0.25,
        dlse=rng.random() < 0.5,
        poisoned=packed and rng.random() < 0.5,
        deterministic=rng.random() < 0.2,
    )


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of x (..., S, H, D) in another memory layout, with NaN in every element of memory that is not x's."""
    if layout == "transposed":  # heads before tokens in memory
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "sliced":  # some heads and an odd slice of the head dim of a larger tensor: not even aligned
        larger = x.new_full((*x.shape[:-2], x.shape[-2] + 2, x.shape[-1] + 8), torch.nan)
        view = larger[..., 1:-1, 3 : 3 + x.shape[-1]]
        return view.copy_(x)
    if layout == "strided":  # every other token
        larger = x.new_full((*x.shape[:-3], 2 * x.shape[-3], *x.shape[-2:]), torch.nan)
        view = larger[..., ::2, :, :]
        return view.copy_(x)
    if layout == "expanded" and x.numel():  # stride 0 over the first dimension that is not tokens
        dim = 0 if x.dim() == 4 else 1
        return x.narrow(dim, 0, 1).expand_as(x)
    if layout == "columns":  # every other element of the head dim
        larger = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
        view = larger[..., ::2]
        return view.copy_(x)
    if layout == "scalar" and x.numel():  # one number, all strides 0: the gradient of a sum
        return x.flatten()[0].expand_as(x)
    return x.clone()


def packed_ranges(rng: random.Random, lengths: tuple[int, ...]) -> tuple[list[int], int]:
    """Starts of disjoint ranges in shuffled order with gaps around them, and the total with the gaps."""
    starts, end = [0] * len(lengths), rng.choice([0, 3])
    for n in rng.sample(range(len(lengths)), len(lengths)):
        starts[n] = end
        end += lengths[n] + rng.choice([0, 0, 1, 5])
    return starts, end + rng.choice([0, 4])


def index_tensors(device: str, *columns, strided: bool = True) -> list[Tensor]:
    """int32 columns of one (n, columns) table, as schedules hold them (stride > 1), or separate tensors."""
    table = torch.tensor(columns, dtype=torch.int32, device=device).reshape(len(columns), -1)
    return list(table.T.contiguous().unbind(1) if strided else table.unbind(0))


@dataclasses.dataclass
class Inputs:
    """A case in tensors: native (dense or packed, in their memory layouts) for us, and packed for the oracle."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor | None
    sink: Tensor | None
    arguments: dict
    problem: Problem


def make_inputs(case: Case, device: str) -> Inputs:
    rng = random.Random(f"tensors {case}")
    generator = torch.Generator().manual_seed(rng.getrandbits(31))
    dtype, count = DTYPES[case.dtype], len(case.lengths_q)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    if case.packed:
        (q_start, total_q), (k_start, total_k) = (packed_ranges(rng, n) for n in (case.lengths_q, case.lengths_k))
        rows, columns = (total_q,), (total_k,)
    else:
        q_start, k_start = ([b * n for b, n in enumerate(lengths)] for lengths in (case.lengths_q, case.lengths_k))
        rows, columns = (count, case.lengths_q[0]), (count, case.lengths_k[0])
    shapes = (
        (*rows, case.heads, case.head_dim),
        (*columns, case.heads_kv, case.head_dim),
        (*columns, case.heads_kv, case.head_dim_v),
        (*rows, case.heads, case.head_dim_v),
    )
    q, k, v, dout = (normal(*shape) for shape in shapes)
    lse_dtype = torch.float64 if case.dtype == "fp64" else torch.float32
    lse_shape = (case.heads, total_q) if case.packed else (count, case.heads, case.lengths_q[0])
    dlse = normal(*lse_shape, dtype=lse_dtype) if case.dlse else None
    sink = normal(case.heads, dtype=lse_dtype) if case.sink else None
    tensors = [lay_out(x, layout) for x, layout in zip((q * case.logit_gain, k, v, dout), case.layouts, strict=True)]
    if case.poisoned:
        tensors = poison_gaps(tensors, case, q_start, k_start)
        if case.sink:  # a gradient of out that is NaN makes the sink's NaN, rightly
            tensors[3] = torch.nan_to_num(tensors[3])
    q, k, v, dout = tensors

    common = {name: getattr(case, name) for name in ("window_left", "window_right", "softmax_scale", "softcap")}
    ranges = dict(zip(RANGE_NAMES, (q_start, list(case.lengths_q), k_start, list(case.lengths_k)), strict=True))
    offsets = list(case.offsets) if case.offsets is not None else None
    arguments = common | {"deterministic": case.deterministic}
    if case.offset is not None:
        arguments["offset"] = case.offset
    if offsets is not None:
        arguments["offsets"] = index_tensors(device, offsets)[0]
    if case.packed:
        columns_of_table = index_tensors(device, *ranges.values(), strided=rng.random() < 0.5)
        arguments |= dict(zip(RANGE_NAMES, columns_of_table, strict=True))
    if case.offset is not None:
        offsets = [case.offset] * count
    problem = Problem(
        *((q, k, v, dout) if case.packed else map(flatten, (q, k, v, dout))),
        dlse=dlse if dlse is None or case.packed else flatten_lse(dlse), sink=sink, offsets=offsets, **ranges, **common,
    )  # fmt: skip
    return Inputs(q, k, v, dout, dlse, sink, arguments, problem)


def poison_gaps(tensors: list[Tensor], case: Case, q_start: list[int], k_start: list[int]) -> list[Tensor]:
    """q, k, v, dout with NaN in the rows outside every range, in the same memory layouts."""
    poisoned = []
    for x, layout, starts, lengths in zip(
        tensors, case.layouts, (q_start, k_start, k_start, q_start),
        (case.lengths_q, case.lengths_k, case.lengths_k, case.lengths_q), strict=True,
    ):  # fmt: skip
        if layout == "scalar":  # holds one number everywhere
            poisoned.append(x)
            continue
        inside = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
        for start, length in zip(starts, lengths, strict=True):
            inside[start : start + length] = True
        poisoned.append(lay_out(torch.where(inside[:, None, None], x, torch.nan), layout))
    return poisoned


def run_forward_backward(inputs: Inputs) -> oracle.Grads:
    """Our out, lse and gradients through autograd, in the oracle's packed form."""
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    sink = inputs.sink.detach().requires_grad_() if inputs.sink is not None else None
    out, lse = ops.forward(*leaves, **inputs.arguments)
    capped = out if sink is None else interface.apply_sink(out, lse, sink)
    outputs, upstream = (capped,), (inputs.dout,)
    if inputs.dlse is not None:
        outputs, upstream = (capped, lse), (inputs.dout, inputs.dlse)
    dq, dk, dv, *dsink = torch.autograd.grad(outputs, leaves + ([sink] if sink is not None else []), upstream)
    for grad, leaf in zip((dq, dk, dv), leaves, strict=True):
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape
    assert out.dtype == leaves[0].dtype
    assert lse.dtype == (torch.float64 if out.dtype == torch.float64 else torch.float32)
    result = oracle.Grads(capped, lse, dq, dk, dv, dsink[0] if dsink else None)
    if inputs.q.dim() == 4:
        dense = (flatten(result.out), flatten_lse(result.lse), *map(flatten, result[2:5]))
        result = oracle.Grads(*dense, result.dsink)
    return result


SWEEP = [random_case(seed, packed) for packed in (False, True) for seed in range(170)]


@pytest.mark.parametrize("case", SWEEP, ids=str)
def test_sweep_against_the_oracle(case, device):
    inputs = make_inputs(case, device)
    assert_solves(inputs.problem, run_forward_backward(inputs))


def test_the_sweep_covers_what_it_should():
    """The random choices above really reach every kind of case, so that a changed generator cannot quietly lose one."""
    visible = [
        [oracle.visible_mask(qn, kn, c.window_left, c.window_right, shift)
         for qn, kn, shift in zip(c.lengths_q, c.lengths_k, c.offsets or [
             kn - qn if c.offset is None else c.offset for qn, kn in zip(c.lengths_q, c.lengths_k, strict=True)
         ], strict=True)]
        for c in SWEEP
    ]  # fmt: skip
    blind = [any(bool((~m.any(1)).any()) for m in masks if m.numel()) for masks in visible]
    partial = [any(bool(m.any() and not m.all()) for m in masks) for masks in visible]
    counts = {
        "configurations": (300, len(SWEEP)),
        "distinct": (300, len({str(c) for c in SWEEP})),
        "rows that see nothing": (40, sum(blind)),
        "partly masked": (100, sum(partial)),
        "seqlen 0": (15, sum(0 in c.lengths_q + c.lengths_k for c in SWEEP)),
        "seqlen 1": (30, sum(1 in c.lengths_q + c.lengths_k for c in SWEEP)),
        "different seqlens": (100, sum(c.lengths_q != c.lengths_k for c in SWEEP)),
        "fp64": (25, sum(c.dtype == "fp64" for c in SWEEP)),
        "fp16": (25, sum(c.dtype == "fp16" for c in SWEEP)),
        "bf16": (50, sum(c.dtype == "bf16" for c in SWEEP)),
        "grouped heads": (80, sum(c.heads != c.heads_kv for c in SWEEP)),
        "head_dim_v": (60, sum(c.head_dim != c.head_dim_v for c in SWEEP)),
        "softcap": (60, sum(c.softcap > 0 for c in SWEEP)),
        "sink": (40, sum(c.sink for c in SWEEP)),
        "dlse": (80, sum(c.dlse for c in SWEEP)),
        "offset": (40, sum(c.offset is not None for c in SWEEP)),
        "per-sequence offsets": (40, sum(c.offsets is not None for c in SWEEP)),
        "left windows": (80, sum(c.window_left is not None for c in SWEEP)),
        "non-contiguous": (150, sum(set(c.layouts) != {"contiguous"} for c in SWEEP)),
        "a dout that is one number": (15, sum(c.layouts[3] == "scalar" for c in SWEEP)),
        "poisoned gaps": (50, sum(c.poisoned for c in SWEEP)),
        "several blocks": (20, sum(max((0, *c.lengths_k)) > 512 for c in SWEEP)),
    }
    missing = {what: (need, got) for what, (need, got) in counts.items() if got < need}
    assert not missing, f"(needed, present): {missing}"


# ---- masks and edges -------------------------------------------------------------------------------------------------


def random_qkv(device, dtype=torch.float32, batch=1, seqlen_q=9, seqlen_k=9, heads=2, heads_kv=2, head_dim=8, seed=0):
    """q, k, v, dout of a small dense problem with head_dim_v = head_dim."""
    rng = torch.Generator().manual_seed(seed)
    shapes = [(batch, seqlen_q, heads, head_dim)] + 2 * [(batch, seqlen_k, heads_kv, head_dim)]
    shapes.append(shapes[0])
    return [torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype).to(device) for shape in shapes]


def dense_problem(q, k, v, dout, dlse=None, sink=None, offset=None, **scores) -> Problem:
    """The oracle's form of a dense problem."""
    batch, seqlen_q, seqlen_k = *q.shape[:2], k.shape[1]
    return Problem(
        *map(flatten, (q, k, v, dout)), dlse=None if dlse is None else flatten_lse(dlse), sink=sink,
        q_start=[b * seqlen_q for b in range(batch)], q_len=[seqlen_q] * batch,
        k_start=[b * seqlen_k for b in range(batch)], k_len=[seqlen_k] * batch,
        offsets=None if offset is None else [offset] * batch, **scores,
    )  # fmt: skip


def dense_grads(out, lse, dq, dk, dv) -> oracle.Grads:
    return oracle.Grads(flatten(out), flatten_lse(lse), flatten(dq), flatten(dk), flatten(dv), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (6, 6), (7, 4), (4, 7)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_every_window_edge(shape, dtype, device):
    """All combinations of small windows and offsets, on both sides of every edge of the score matrix."""
    q, k, v, dout = random_qkv(device, dtype, seqlen_q=shape[0], seqlen_k=shape[1], heads=2, heads_kv=1)
    dlse = dout.sum(-1).transpose(1, 2)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    for left in (None, 0, 1, shape[1], 100):
        for right in (None, 0, 2, shape[1] - 1, 100):
            for offset in (None, 0, 1, -2, -shape[0], shape[1] + 1):
                mask = {"window_left": left, "window_right": right, "offset": offset}
                leaves = [x.detach().requires_grad_() for x in (q, k, v)]
                out, lse = ops.forward(*leaves, **mask)
                ours = (out, lse, *torch.autograd.grad((out, lse), leaves, (dout, dlse)))
                expected = oracle.attention_grads(q, k, v, dout, dlse, **mask)
                for name, got, want in zip(oracle.Grads._fields, ours, expected, strict=False):
                    close = torch.allclose(got.detach().cpu().double(), want, **tolerance)
                    assert close, f"{name} with {mask}: {got.detach()}, oracle {want}"


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_empty_sequences(packed, lengths, dtype, device):
    q, k, v, dout = random_qkv(device, dtype, batch=1 if packed else 2, seqlen_q=lengths[0], seqlen_k=lengths[1])
    ranges = {}
    if packed:
        q, k, v, dout = (x[0] for x in (q, k, v, dout))
        ranges = dict(zip(RANGE_NAMES, index_tensors(device, [0], [lengths[0]], [0], [lengths[1]]), strict=True))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = ops.forward(*leaves, window_right=0, **ranges)
    assert out.shape == q.shape and not out.any()
    assert torch.isneginf(lse).all() and lse.numel() == q[..., 0].numel()
    for grad, leaf in zip(torch.autograd.grad((out, lse), leaves, (dout, torch.ones_like(lse))), leaves, strict=True):
        assert grad.shape == leaf.shape and not grad.any()


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_no_sequences_at_all(packed, device):
    q, k, v, dout = random_qkv(device, batch=0, seqlen_q=4, seqlen_k=4)
    ranges = {}
    if packed:  # rows, and no range that holds them
        q, k, v, dout = (x[0] for x in random_qkv(device, seqlen_q=4, seqlen_k=4))
        ranges = dict(zip(RANGE_NAMES, index_tensors(device, [], [], [], []), strict=True))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = ops.forward(*leaves, **ranges)
    assert out.shape == q.shape and not out.any() and torch.isneginf(lse).all()
    assert not any(grad.any() for grad in torch.autograd.grad(out, leaves, dout))


def test_several_query_ranges_may_read_the_same_keys(device):
    """A shared prefix: three query ranges over one key range; its gradients are the sum of the three."""
    q, k, v, dout = (x[0] for x in random_qkv(device, seqlen_q=30, seqlen_k=12, heads=4))
    ranges = {"q_start": [0, 10, 18], "q_len": [10, 8, 12], "k_start": [2, 2, 0], "k_len": [9, 9, 12]}
    problem = Problem(q, k, v, dout, dlse=None, sink=None, window_right=3, **ranges)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    columns = dict(zip(RANGE_NAMES, index_tensors(device, *ranges.values()), strict=True))
    out, lse = ops.forward(*leaves, window_right=3, **columns)
    assert_solves(problem, oracle.Grads(out, lse, *torch.autograd.grad(out, leaves, dout), None))


def test_rows_further_apart_than_32_bits_can_say(device):
    """Token strides of 2**30 elements: the third row starts at 2**31. Only the pages that hold rows are touched."""
    stride = 2**30
    memory = torch.empty(2 * stride + 64, dtype=torch.bfloat16, device=device)
    small = random_qkv(device, torch.bfloat16, seqlen_q=3, seqlen_k=3, heads=1, heads_kv=1, head_dim=16)
    far = []
    for n, x in enumerate(small[:3]):
        far.append(memory.as_strided((1, 3, 1, 16), (3 * stride, stride, 16, 1), 16 * n).copy_(x))
    for grad_of in (small, far):
        for x in grad_of[:3]:
            x.requires_grad_()
    expected, got = (
        (*ops.forward(*x[:3]), *torch.autograd.grad(ops.forward(*x[:3])[0], x[:3], small[3])) for x in (small, far)
    )
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("which", ["q", "k", "v", "qkv"])
@pytest.mark.parametrize("seqlen", [3, 20])
def test_a_last_dimension_with_a_stride_is_read_right_or_refused(which, seqlen, device):
    """The contract asks for a contiguous last dimension: anything but wrong numbers is an answer."""
    q, k, v, dout = random_qkv(device, seqlen_q=seqlen, seqlen_k=seqlen, head_dim=8)
    leaves = {
        name: lay_out(x, "columns" if name in which else "contiguous").detach().requires_grad_()
        for name, x in zip("qkv", (q, k, v), strict=True)
    }
    try:
        out, lse = ops.forward(**leaves, window_right=0)
    except ValueError as error:
        assert any(name in str(error) for name in which) and "contiguous" in str(error)
        return
    grads = torch.autograd.grad(out, leaves.values(), dout)
    assert_solves(dense_problem(q, k, v, dout, window_right=0), dense_grads(out, lse, *grads))


# ---- gradients in special positions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "which", ["out only", "lse only", "rows of dout zero", "dout tiny", "dout subnormal", "dlse large"]
)
def test_upstream_gradients_of_every_size(which, dtype, device):
    """out and lse may be used together or alone, and rows of dout may vanish against the gradient of lse."""
    q, k, v, dout = random_qkv(device, dtype, batch=2, seqlen_q=20, seqlen_k=33, heads=4, heads_kv=2, head_dim=16)
    dlse = torch.randn(2, 4, 20, generator=torch.Generator().manual_seed(1)).to(device)
    if which == "rows of dout zero":
        dout[:, ::3] = 0
    elif which == "dout tiny":
        dout *= 1e-20
    elif which == "dout subnormal":
        dout[:, ::2] *= 1e-39
    elif which == "dlse large":
        dlse *= 1e4
    upstream = (dout, dlse)
    if which == "out only":
        upstream, dlse = (dout, None), None
    elif which == "lse only":
        upstream, dout = (None, dlse), torch.zeros_like(dout)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = ops.forward(*leaves, window_right=0)
    pairs = [(x, g) for x, g in zip((out, lse), upstream, strict=True) if g is not None]
    dq, dk, dv = torch.autograd.grad([x for x, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
    if which == "lse only":  # lse does not depend on v
        assert dv is None or not dv.any()
        dv = torch.zeros_like(v)
    assert_solves(dense_problem(q, k, v, dout, dlse, window_right=0), dense_grads(out, lse, dq, dk, dv))


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "kv"])
def test_gradients_of_some_inputs_only(wanted, device):
    q, k, v, dout = random_qkv(device)
    tensors = {name: x.detach().requires_grad_(name in wanted) for name, x in zip("qkv", (q, k, v), strict=True)}
    out, _ = ops.forward(**tensors, window_right=0)
    grads = torch.autograd.grad(out, [tensors[name] for name in wanted], dout)
    expected = oracle.attention_grads(q, k, v, dout, window_right=0)
    for name, grad in zip(wanted, grads, strict=True):
        torch.testing.assert_close(grad.cpu().double(), getattr(expected, f"d{name}"), rtol=1e-5, atol=1e-6)


def test_no_graph_is_kept_without_gradients(device):
    q, k, v, _ = random_qkv(device)
    assert not ops.forward(q, k, v)[0].requires_grad
    with torch.no_grad():
        assert not ops.forward(q.requires_grad_(), k, v)[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_out_dtype_fp32_keeps_the_digits_that_16_bits_drop(dtype, device):
    q, k, v, dout = random_qkv(device, dtype, seqlen_q=40, seqlen_k=50, heads=4, heads_kv=2, head_dim=32)
    out, lse = ops.forward(q, k, v, out_dtype=torch.float32, window_right=0)
    assert out.dtype == torch.float32
    expected, _ = oracle.attention(q, k, v, window_right=0)
    if out.is_cuda:  # PyTorch's kernels round there; ours will not
        problem = dense_problem(q, k, v, dout, window_right=0)
        assert_solves(problem, oracle.Grads(flatten(out), flatten_lse(lse), None, None, None, None))
    else:
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ops.forward(q, k, v, window_right=0)[0], out.to(dtype), rtol=0, atol=0)


def test_large_logits_do_not_overflow(device):
    """Scores of tens of thousands: exp of them, or of their differences the wrong way round, is infinite in fp32."""
    q, k, v, dout = random_qkv(device, seqlen_q=50, seqlen_k=60, head_dim=64)
    leaves = [x.detach().requires_grad_() for x in (q * 150, k * 150, v)]
    for softcap in (0.0, 20.0):
        out, lse = ops.forward(*leaves, window_right=0, softcap=softcap)
        grads = torch.autograd.grad((out, lse), leaves, (dout, torch.ones_like(lse)))
        problem = dense_problem(*leaves, dout, torch.ones_like(lse), window_right=0, softcap=softcap)
        assert softcap or float(lse.detach().abs().max()) > 1e4
        assert_solves(problem, dense_grads(out, lse, *grads))


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(
    "arguments", [{}, {"window_right": 0}, {"window_left": 2, "window_right": 1, "softcap": 0.7}], ids=str
)
def test_gradcheck(packed, arguments, device):
    """Finite differences in fp64, through out and lse together. Every row sees a key: -inf has no finite difference."""
    q, k, v, _ = random_qkv(device, torch.float64, batch=2, seqlen_q=4, seqlen_k=5, heads=2, heads_kv=1, head_dim=3)
    v = v[..., :2]
    if packed:
        q, k, v = (flatten(x) for x in (q, k, v))
        ranges = index_tensors(device, [0, 4], [4, 4], [0, 5], [5, 5])
        arguments = arguments | dict(zip(RANGE_NAMES, ranges, strict=True))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda q, k, v: ops.forward(q, k, v, **arguments), leaves)


def test_double_backward_raises_clearly(device):
    leaves = [x.requires_grad_() for x in random_qkv(device)[:3]]
    out, _ = ops.forward(*leaves)
    with pytest.raises(RuntimeError, match=r"create_graph|double backward|second"):
        (dq,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
        torch.autograd.grad(dq.sum(), leaves)


# ---- delta -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "strided", "expanded"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("with_dlse", [False, True], ids=["", "dlse"])
def test_delta(layout, dtype, packed, with_dlse, device):
    _, _, out, dout = random_qkv(device, dtype, batch=2, seqlen_q=19, seqlen_k=19, heads=3, heads_kv=3, head_dim=40)
    dlse = torch.randn(2, 3, 19, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(device)
    if packed:
        out, dout, dlse = out[0], dout[0], dlse[0]
    result_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    dlse = dlse.to(result_dtype)
    out, dout = lay_out(out, layout), lay_out(dout, layout)
    result = ops.delta(dout, out, dlse if with_dlse else None)
    expected = (dout.double() * out.double()).sum(-1).transpose(-1, -2)
    if with_dlse:
        expected = expected - dlse.double()
    assert result.dtype == result_dtype
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


def test_delta_of_a_16_bit_dout_and_an_fp32_out(device):
    """The ring's case: out is its fp32 state."""
    _, _, out, dout = random_qkv(device, seqlen_q=9, seqlen_k=9)
    dout = dout.bfloat16()
    expected = (dout.double() * out.double()).sum(-1).transpose(-1, -2)
    torch.testing.assert_close(ops.delta(dout, out).double(), expected, rtol=1e-5, atol=1e-5)


# ---- continuation: forward_into and the accumulating backward -------------------------------------------------------


@dataclasses.dataclass
class Visit:
    """One (query segment, key piece) pair, in rows of the shuffled buffers."""

    q_start: int
    q_len: int
    k_start: int
    k_len: int
    offset: int
    flags: int = 0


@dataclasses.dataclass
class Split:
    """Documents cut into query segments and key pieces that lie shuffled, with gaps, in packed buffers.

    problem holds the documents whole and in order; q_rows, k_rows say where its rows lie in the buffers; launches are
    the visits, every segment at most once a launch, every (segment, piece) pair once in all.
    """

    problem: Problem
    q_rows: Tensor
    k_rows: Tensor
    total_q: int
    total_k: int
    launches: list[list[Visit]]

    def scatter(self, x: Tensor, rows: Tensor, total: int, fill: float = torch.nan) -> Tensor:
        buffer = x.new_full((total, *x.shape[1:]), fill)
        buffer[rows] = x
        return buffer


def cut(rng: random.Random, length: int, pieces: int) -> list[tuple[int, int]]:
    """(start, length) of consecutive pieces, some of which may be empty."""
    edges = [0, *sorted(rng.randint(0, length) for _ in range(pieces - 1)), length]
    return [(a, b - a) for a, b in zip(edges, edges[1:], strict=False)]


def place(rng: random.Random, parts: list[tuple[int, int]]) -> tuple[list[int], Tensor, int]:
    """Starts of the parts (start in order, length) in a shuffled buffer with gaps, the row of each element, the end."""
    starts, total = packed_ranges(rng, tuple(length for _, length in parts))
    rows = [start + i for start, (_, length) in zip(starts, parts, strict=True) for i in range(length)]
    return starts, torch.tensor(rows, dtype=torch.int64), total


def random_split(seed: int, dtype: torch.dtype, device: str) -> Split:
    rng = random.Random(f"split {seed}")
    documents = rng.choice([1, 2, 3])
    lengths_q, lengths_k = ([rng.choice([1, 20, 65, 130]) for _ in range(documents)] for _ in range(2))
    heads_kv, groups, head_dim = rng.choice([1, 2]), rng.choice([1, 2]), rng.choice([8, 32, 40])
    head_dim_v = rng.choice([head_dim, head_dim, 24])
    offsets = [kn - qn + rng.choice([0, 0, -40, 9]) for qn, kn in zip(lengths_q, lengths_k, strict=True)]
    segments = [(d, s, n) for d, length in enumerate(lengths_q) for s, n in cut(rng, length, rng.choice([1, 2, 3]))]
    pieces = [(d, s, n) for d, length in enumerate(lengths_k) for s, n in cut(rng, length, rng.choice([1, 2, 4]))]
    q_starts, q_rows, total_q = place(rng, [(s, n) for _, s, n in segments])
    k_starts, k_rows, total_k = place(rng, [(s, n) for _, s, n in pieces])

    launches: list[list[Visit]] = [[] for _ in range(4)]
    for (d, q_position, q_len), q_start in zip(segments, q_starts, strict=True):
        own = [
            Visit(q_start, q_len, k_start, k_len, offsets[d] + q_position - k_position)
            for (other, k_position, k_len), k_start in zip(pieces, k_starts, strict=True)
            if other == d
        ]
        rng.shuffle(own)
        own[0].flags |= ops.FIRST
        own[-1].flags |= ops.LAST
        for launch, visit in zip(sorted(rng.sample(range(4), len(own))), own, strict=True):
            launches[launch].append(visit)
    for launch in launches:
        rng.shuffle(launch)

    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (sum(lengths_q), heads_kv * groups, head_dim), (sum(lengths_k), heads_kv, head_dim),
        (sum(lengths_k), heads_kv, head_dim_v), (sum(lengths_q), heads_kv * groups, head_dim_v),
    ]  # fmt: skip
    q, k, v, dout = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).to(device) for s in shapes)
    dlse = torch.randn(q.shape[1], q.shape[0], generator=generator).to(device) if rng.random() < 0.5 else None
    window = rng.choice([(None, None), (None, 0), (15, 0), (30, 10)])
    problem = Problem(
        q, k, v, dout, dlse, None,
        [sum(lengths_q[:d]) for d in range(documents)], lengths_q, [sum(lengths_k[:d]) for d in range(documents)],
        lengths_k, offsets, rng.choice([None, 0.4]), *window, rng.choice([0.0, 0.0, 2.0]),
    )  # fmt: skip
    return Split(problem, q_rows.to(device), k_rows.to(device), total_q, total_k, launches)


def visit_arguments(visits: list[Visit], problem: Problem) -> dict:
    """The index tensors (columns of one table) and the score arguments of a launch, without flags."""
    rows = [dataclasses.astuple(visit)[:5] for visit in visits]
    names = (*RANGE_NAMES, "offsets")
    columns = index_tensors(problem.q.device, *zip(*rows, strict=True)) if rows else index_tensors(
        problem.q.device, *[[]] * 5
    )  # fmt: skip
    scores = {name: getattr(problem, name) for name in ("softmax_scale", "window_left", "window_right", "softcap")}
    return dict(zip(names, columns, strict=True)) | scores


SPLITS = [(seed, (torch.float32, torch.float32, torch.bfloat16, torch.float16)[seed % 4]) for seed in range(32)]


@pytest.mark.parametrize("seed, dtype", SPLITS, ids=str)
def test_split_keys_equal_one_shot(seed, dtype, device):
    """forward_into and the accumulating backward over visits in random order against the oracle on whole documents."""
    split = random_split(seed, dtype, device)
    problem = split.problem
    q, dout = (split.scatter(x, split.q_rows, split.total_q) for x in (problem.q, problem.dout))
    k, v = (split.scatter(x, split.k_rows, split.total_k) for x in (problem.k, problem.v))
    out_acc = torch.full(dout.shape, torch.nan, dtype=torch.float32, device=device)
    lse = torch.full((q.shape[1], split.total_q), torch.nan, dtype=torch.float32, device=device)
    out = lay_out(torch.full_like(dout, torch.nan), "transposed" if seed % 3 == 0 else "contiguous")
    for visits in split.launches:
        flags = torch.tensor([visit.flags for visit in visits], dtype=torch.int32, device=device)
        ops.forward_into(q, k, v, out_acc, lse, out, flags=flags, **visit_arguments(visits, problem))

    outside = torch.ones(split.total_q, dtype=torch.bool, device=device)
    outside[split.q_rows] = False
    assert torch.isnan(out[outside]).all() and torch.isnan(lse[:, outside]).all()  # rows in no visit keep what they had
    assert torch.isnan(out_acc[outside]).all()
    out = out[split.q_rows]

    delta = torch.full_like(lse, torch.nan)
    delta[:, split.q_rows] = ops.delta(problem.dout, out, problem.dlse)
    # what was there before is added to; powers of two keep the later subtraction exact enough
    before = [torch.full_like(x, value, dtype=torch.float32) for x, value in ((q, 0.25), (k, -0.5), (v, 0.125))]
    dq, dk, dv = (x.clone() for x in before)
    for visits in backward_launches(split.launches):
        ops.backward(dout, q, k, v, lse, delta, dq, dk, dv, accumulate=True, **visit_arguments(visits, problem))
    for x, old, rows in zip((dq, dk, dv), before, (split.q_rows, split.k_rows, split.k_rows), strict=True):
        untouched = torch.ones(x.shape[0], dtype=torch.bool, device=device)
        untouched[rows] = False
        assert torch.equal(x[untouched], old[untouched])
    ours = oracle.Grads(
        out, lse[:, split.q_rows], dq[split.q_rows] - 0.25, dk[split.k_rows] + 0.5, dv[split.k_rows] - 0.125, None
    )
    assert_solves_added_to(problem, ours)


def backward_launches(launches: list[list[Visit]]) -> list[list[Visit]]:
    """All visits again, in launches whose key ranges are disjoint (query ranges need not be)."""
    result: list[list[Visit]] = []
    for visit in (visit for launch in launches for visit in launch):
        for launch in result:
            if all(visit.k_start != other.k_start or not visit.k_len or not other.k_len for other in launch):
                launch.append(visit)
                break
        else:
            result.append([visit])
    return result


def assert_solves_added_to(problem: Problem, ours: oracle.Grads) -> None:
    """`assert_solves` for gradients that were added to numbers below 1: the sum's own rounding error comes on top."""
    reference, naive, magnitude = problem.solve(), naive_grads(problem), magnitudes(problem)
    forward_only = ours._replace(dq=None, dk=None, dv=None)
    assert_solves(problem, forward_only)
    for name in ("dq", "dk", "dv"):
        want, scale = getattr(reference, name), getattr(magnitude, name)
        dtype = problem.q.dtype
        assert_close_to_oracle(name, getattr(ours, name), want, getattr(naive, name), dtype, scale + 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_between_launches_is_attention_over_the_keys_so_far(dtype, device):
    """out None, no LAST: after each launch (out_acc, lse) is the attention over all keys visited until then."""
    q, k, v, _ = (x[0] for x in random_qkv(device, dtype, seqlen_q=40, seqlen_k=90, heads=4, heads_kv=2, head_dim=16))
    out_acc, lse = torch.full((40, 4, 16), torch.nan, device=device), torch.full((4, 40), torch.nan, device=device)
    for step, (start, length) in enumerate([(0, 30), (30, 0), (30, 45), (75, 15)]):
        columns = index_tensors(device, [0], [40], [start], [length], [50 - start], [ops.FIRST if step == 0 else 0])
        names = (*RANGE_NAMES, "offsets", "flags")
        ops.forward_into(
            q, k, v, out_acc, lse, None, window_left=70, window_right=0, **dict(zip(names, columns, strict=True))
        )
        seen = start + length
        expected_out, expected_lse = oracle.attention(
            q[None], k[None, :seen], v[None, :seen], offset=50, window_left=70, window_right=0
        )
        tolerance = 1e-5 if not q.is_cuda or dtype == torch.float32 else 1e-2
        torch.testing.assert_close(out_acc.cpu().double(), expected_out[0], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(lse.cpu().double(), expected_lse[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k_len, offset", [(0, 0), (7, -100), (7, 100)], ids=["no keys", "all ahead", "all behind"])
def test_a_visit_without_visible_keys(k_len, offset, device):
    """It leaves the state alone, bit for bit; with FIRST it starts it at 0 and -inf; with LAST it still writes out."""
    q, k, v, state = (x[0] for x in random_qkv(device, seqlen_q=5, seqlen_k=7))
    lse = state.sum(-1).T.contiguous()
    lse[0, 2], state[2, 0] = -torch.inf, 0.0  # a row that has seen nothing yet
    for flags, expected_out, expected_lse in (
        (0, state, lse),
        (ops.LAST, state, lse),
        (ops.FIRST, torch.zeros_like(state), torch.full_like(lse, -torch.inf)),
        (ops.FIRST | ops.LAST, torch.zeros_like(state), torch.full_like(lse, -torch.inf)),
    ):
        fill = torch.nan if flags & ops.FIRST else 0.0
        out_acc, running_lse, out = state + fill, lse + fill, torch.full_like(state, torch.nan)
        names = (*RANGE_NAMES, "offsets", "flags")
        columns = dict(zip(names, index_tensors(device, [0], [5], [0], [k_len], [offset], [flags]), strict=True))
        ops.forward_into(q, k, v, out_acc, running_lse, out, window_left=20, window_right=20, **columns)
        assert torch.equal(out if flags & ops.LAST else out_acc, expected_out)
        assert torch.equal(running_lse, expected_lse)
        assert bool(flags & ops.LAST) or torch.isnan(out).all()


def test_forward_into_without_any_visit_changes_nothing(device):
    q, k, v, state = (x[0] for x in random_qkv(device))
    lse, out = state.sum(-1).T.contiguous(), torch.full_like(state, 7.0)
    before = [x.clone() for x in (state, lse, out)]
    names = (*RANGE_NAMES, "offsets", "flags")
    ops.forward_into(q, k, v, state, lse, out, **dict(zip(names, index_tensors(device, *[[]] * 6), strict=True)))
    for x, old in zip((state, lse, out), before, strict=True):
        assert torch.equal(x, old)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_backward_overwrites_poisoned_memory(grad_dtype, packed, device):
    q, k, v, dout = random_qkv(device, torch.bfloat16, seqlen_q=30, seqlen_k=25, heads=4, heads_kv=2, head_dim=16)
    arguments = {"window_right": 0}
    problem = dense_problem(q, k, v, dout, window_right=0)
    if packed:
        q, k, v, dout = (x[0] for x in (q, k, v, dout))
        ranges = {"q_start": [3], "q_len": [20], "k_start": [0], "k_len": [21]}
        arguments |= dict(zip(RANGE_NAMES, index_tensors(device, *ranges.values()), strict=True))
        problem = Problem(q, k, v, dout, None, None, window_right=0, **ranges)
    out, lse = ops.forward(q, k, v, **arguments)
    grads = [lay_out(torch.full_like(x, torch.nan, dtype=grad_dtype), "transposed") for x in (q, k, v)]
    ops.backward(dout, q, k, v, lse, ops.delta(dout, out), *grads, **arguments)
    flat = grads if packed else [flatten(x) for x in grads]
    assert_solves(problem, oracle.Grads(None, None, *flat, None))
    if packed:
        outside = (grads[0][:3], grads[0][23:], grads[1][21:], grads[2][21:])
        assert not any(x.any() for x in outside)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_backward_adds_to_dq_and_overwrites_dk_and_dv(grad_dtype, packed, device):
    """Keys of a range are overwritten, all others keep what they hold."""
    q, k, v, dout = random_qkv(device, torch.bfloat16, seqlen_q=30, seqlen_k=25, heads=4, heads_kv=2, head_dim=16)
    arguments = {"window_right": 0}
    inside = slice(None)
    problem = dense_problem(q, k, v, dout, window_right=0)
    if packed:
        q, k, v, dout = (x[0] for x in (q, k, v, dout))
        ranges = {"q_start": [3, 23], "q_len": [20, 7], "k_start": [0, 20], "k_len": [15, 3]}
        inside = torch.tensor([*range(15), *range(20, 23)], device=device)
        arguments |= dict(zip(RANGE_NAMES, index_tensors(device, *ranges.values()), strict=True))
        problem = Problem(q, k, v, dout, None, None, window_right=0, **ranges)
    out, lse = ops.forward(q, k, v, **arguments)
    dq = torch.full_like(q, 0.25, dtype=torch.float32)
    dk, dv = (lay_out(torch.full_like(x, torch.nan, dtype=grad_dtype), "transposed") for x in (k, v))
    if packed:
        outside = torch.ones(25, dtype=torch.bool, device=device)
        outside[inside] = False
        dk[outside], dv[outside] = 7.0, 7.0
    delta = ops.delta(dout, out)
    ops.backward(dout, q, k, v, lse, delta, dq, dk, dv, accumulate=True, accumulate_kv=False, **arguments)
    if packed:
        assert torch.equal(dk[outside], torch.full_like(dk[outside], 7.0)) and torch.equal(dk[outside], dv[outside])
        dk[outside], dv[outside] = 0.0, 0.0
        touched = torch.zeros(30, dtype=torch.bool, device=device)
        touched[3:] = True
        assert torch.equal(dq[~touched], torch.full_like(dq[~touched], 0.25))
    grads = [dq - 0.25, dk, dv]
    assert_solves_added_to(problem, oracle.Grads(None, None, *(grads if packed else [flatten(x) for x in grads]), None))


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("head_dim", [20, 64, 80, 128, 192, 256])
def test_dq_summed_up_in_the_order_of_its_kernel(head_dim, deterministic, device):
    """Keys in two launches that share queries, with rows of queries in no range between them."""
    sizes = {"seqlen_q": 300, "seqlen_k": 290, "heads": 4, "heads_kv": 2, "head_dim": head_dim}
    q, k, v, dout = (x[0] for x in random_qkv(device, torch.bfloat16, **sizes))
    whole = {"q_start": [3, 220], "q_len": [190, 77], "k_start": [0, 200], "k_len": [200, 90]}
    arguments = {"softmax_scale": 0.3, "window_right": 0, "deterministic": deterministic}
    out, lse = ops.forward(
        q, k, v, offset=20, **dict(zip(RANGE_NAMES, index_tensors(device, *whole.values()), strict=True)), **arguments
    )
    delta, dq_sum = ops.delta(dout, out), ops.new_dq_sum(q, v)
    sums = [torch.zeros_like(x, dtype=torch.float32) for x in (k, v)]
    for start, length, offset in (([0, 200], [130, 90], [20, 20]), ([130], [70], [-110])):
        count = len(start)
        columns = index_tensors(device, whole["q_start"][:count], whole["q_len"][:count], start, length, offset)
        ops.backward(
            dout, q, k, v, lse, delta, dq_sum, *sums, accumulate=True,
            **dict(zip((*RANGE_NAMES, "offsets"), columns, strict=True)), **arguments,
        )  # fmt: skip
    dq = ops.round_dq(dq_sum, q, v, 0.3)
    assert dq.dtype == q.dtype and dq.is_contiguous()
    assert not any(x.any() for x in (dq[:3], dq[193:220], dq[297:]))
    problem = Problem(q, k, v, dout, None, None, **whole, offsets=[20, 20], softmax_scale=0.3, window_right=0)
    assert_solves(problem, oracle.Grads(None, None, dq, *sums, None))


def test_a_sum_of_dq_goes_with_its_calls(device):
    q, k, v, dout = (x[0] for x in random_qkv(device, seqlen_q=12, seqlen_k=12, head_dim=16))
    whole = dict(zip(RANGE_NAMES, index_tensors(device, [0], [12], [0], [12]), strict=True))
    lse, dq_sum, dk, dv = torch.zeros(q.shape[1], 12, device=device), ops.new_dq_sum(q, v), k.clone(), v.clone()
    for wrong, error in ((dq_sum[1:], ValueError), (dq_sum.double(), TypeError), (dq_sum.repeat(2)[::2], ValueError)):
        with pytest.raises(error, match=r"dq (has|is)"):
            ops.backward(dout, q, k, v, lse, lse, wrong, dk, dv, accumulate=True, **whole)
        with pytest.raises(error, match=r"dq_sum (has|is)"):
            ops.round_dq(wrong, q, v)
    with pytest.raises(ValueError, match="dq has shape"):  # it would be overwritten, in whose order?
        ops.backward(dout, q, k, v, lse, lse, dq_sum, dk, dv, **whole)
    dense = [x[None] for x in (dout, q, k, v, lse, lse)]
    with pytest.raises(ValueError, match="dq has shape"):
        ops.backward(*dense, dq_sum, dk[None], dv[None], accumulate=True)
    with pytest.raises(ValueError, match="accumulate_kv is True"):
        ops.backward(dout, q, k, v, lse, lse, q.clone(), dk, dv, accumulate_kv=True, **whole)


def test_backward_accumulates_on_top_of_dense_gradients(device):
    q, k, v, dout = random_qkv(device, seqlen_q=12, seqlen_k=12)
    out, lse = ops.forward(q, k, v, window_right=0)
    delta = ops.delta(dout, out)
    once = [torch.zeros_like(x) for x in (q, k, v)]
    ops.backward(dout, q, k, v, lse, delta, *once, window_right=0, accumulate=True)
    expected = oracle.attention_grads(q, k, v, dout, window_right=0)
    ops.backward(dout, q, k, v, lse, delta, *once, window_right=0, accumulate=True)
    for grad, want in zip(once, expected[2:5], strict=True):
        torch.testing.assert_close(grad.cpu().double(), 2 * want, rtol=1e-5, atol=1e-5)


# ---- repeatability, precision, autocast ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("globally", [False, True], ids=["argument", "torch.use_deterministic_algorithms"])
def test_two_deterministic_runs_are_bitwise_equal(dtype, globally, device):
    q, k, v, dout = random_qkv(device, dtype, batch=2, seqlen_q=300, seqlen_k=300, heads=4, heads_kv=1, head_dim=32)

    def run():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, lse = ops.forward(*leaves, window_right=0, deterministic=not globally)
        return (out, lse, *torch.autograd.grad((out, lse), leaves, (dout, torch.ones_like(lse))))

    torch.use_deterministic_algorithms(globally)
    try:
        first, second = run(), run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("arguments", [{}, {"window_left": 20}], ids=["fused kernel", "blockwise"])
@pytest.mark.parametrize("how", ["autocast", "precision medium"])
def test_fp32_is_computed_in_fp32(how, arguments, device):
    """An operator computes in what it was given, whatever region or global setting invites its products to use less."""
    q, k, v, dout = random_qkv(device, seqlen_q=100, seqlen_k=100, heads=4, heads_kv=2, head_dim=64)
    dlse = torch.ones(1, 4, 100, device=device)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    precision = torch.get_float32_matmul_precision()
    if how == "precision medium":
        torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=how == "autocast"):
            out, lse = ops.forward(*leaves, **arguments)
            grads = torch.autograd.grad((out, lse), leaves, (dout, dlse))
        assert torch.get_float32_matmul_precision() == ("medium" if how == "precision medium" else precision)
    finally:
        torch.set_float32_matmul_precision(precision)
    assert out.dtype == torch.float32
    assert_solves(dense_problem(q, k, v, dout, dlse, **arguments), dense_grads(out, lse, *grads))


def test_the_running_state_stays_fp32_under_autocast(device):
    q, k, v, _ = (x[0] for x in random_qkv(device, seqlen_q=40, seqlen_k=60, head_dim=32))
    out_acc, lse = torch.empty(40, 2, 32, device=device), torch.empty(2, 40, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        for start, length, flags in ((0, 25, ops.FIRST), (25, 35, 0)):
            columns = index_tensors(device, [0], [40], [start], [length], [20 - start], [flags])
            names = (*RANGE_NAMES, "offsets", "flags")
            ops.forward_into(q, k, v, out_acc, lse, None, window_left=9, **dict(zip(names, columns, strict=True)))
    expected_out, expected_lse = oracle.attention(q[None], k[None], v[None], window_left=9)
    torch.testing.assert_close(out_acc.cpu().double(), expected_out[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.cpu().double(), expected_lse[0], rtol=1e-5, atol=1e-5)


# ---- PyTorch's machinery: fake tensors, compile, export, vmap --------------------------------------------------------


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the arguments of every call of one of our operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fa3_dist":
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def recorded_calls(run) -> list:
    recorder = Recorder()
    with recorder:
        run()
    return recorder.calls


def opcheck_cases() -> dict:
    def dense(device, dtype=torch.float32, grad=True, **arguments):
        tensors = [x.requires_grad_(grad) for x in random_qkv(device, dtype, batch=2, seqlen_q=6, seqlen_k=7)[:3]]
        ops.forward(*tensors, **arguments)

    def packed(device, **arguments):
        q, k, v = (x[0].detach().requires_grad_() for x in random_qkv(device, seqlen_q=9, seqlen_k=8, heads=4)[:3])
        ranges = dict(zip(RANGE_NAMES, index_tensors(device, [0, 5], [4, 4], [0, 3], [3, 5]), strict=True))
        ops.forward(q, k, v, **ranges, **arguments)

    def forward_into(device, with_out=True):
        q, k, v, state = (x[0] for x in random_qkv(device))
        flags = ops.FIRST | ops.LAST if with_out else 0
        columns = index_tensors(device, [0, 5], [4, 3], [0, 3], [3, 5], [1, 0], [flags, flags])
        out = torch.zeros_like(state) if with_out else None
        names = (*RANGE_NAMES, "offsets", "flags")
        ops.forward_into(q, k, v, state, state.sum(-1).T.contiguous(), out, **dict(zip(names, columns, strict=True)))

    def delta(device, with_dlse=False):
        _, _, out, dout = random_qkv(device)
        ops.delta(dout, out, dout.sum(-1).transpose(1, 2).contiguous() if with_dlse else None)

    def backward(device, **arguments):
        q, k, v, dout = random_qkv(device)
        out, lse = ops.forward(q, k, v)
        ops.backward(dout, q, k, v, lse, ops.delta(dout, out), *(torch.zeros_like(x) for x in (q, k, v)), **arguments)

    def offsets(device):
        dense(device, offsets=torch.tensor([1, -2], dtype=torch.int32, device=device), window_left=3, softcap=2.0)

    return {
        "forward": dense,
        "forward-bf16-fp32": lambda device: dense(device, torch.bfloat16, out_dtype=torch.float32, window_right=0),
        "forward-no-grad": lambda device: dense(device, grad=False, window_left=2, window_right=1, offset=-1),
        "forward-fp64": lambda device: dense(device, torch.float64, softmax_scale=0.3),
        "forward-offsets": offsets,
        "forward-packed": packed,
        "forward-packed-causal": lambda device: packed(device, window_right=0, deterministic=True, sm_margin=4),
        "forward_into": forward_into,
        "forward_into-no-out": lambda device: forward_into(device, with_out=False),
        "delta": delta,
        "delta-dlse": lambda device: delta(device, with_dlse=True),
        "backward": backward,
        "backward-accumulate": lambda device: backward(device, accumulate=True, window_right=0),
    }


@pytest.mark.parametrize("name, run", opcheck_cases().items(), ids=list(opcheck_cases()))
def test_opcheck(name, run, device):
    """torch.library's own checks: schema and mutation, fake tensors, autograd registration, AOT with dynamic shapes."""
    function, args, kwargs = [
        call for call in recorded_calls(lambda: run(device)) if str(call[0]).split(".")[1] == name.split("-")[0]
    ][-1]
    torch.library.opcheck(function, args, kwargs)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_meta_tensors_have_the_shapes_and_dtypes_of_real_ones(dtype, device):
    q, k, v, dout = random_qkv(device, dtype, batch=2, seqlen_q=6, seqlen_k=7, heads=4)
    v = v[..., :5]
    dout = dout[..., :5]
    real = (*ops.forward(q, k, v), ops.forward(q, k, v, out_dtype=torch.float32 if dtype != torch.float64 else None)[0])
    q_meta, k_meta, v_meta, dout_meta = (x.to("meta") for x in (q, k, v, dout))
    out, lse = ops.forward(q_meta, k_meta, v_meta)
    wide, _ = ops.forward(q_meta, k_meta, v_meta, out_dtype=torch.float32 if dtype != torch.float64 else None)
    for a, b in zip((*real, ops.delta(dout, real[0])), (out, lse, wide, ops.delta(dout_meta, out)), strict=True):
        assert b.is_meta and a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()
    grads = [torch.empty_like(x) for x in (q_meta, k_meta, v_meta)]
    ops.backward(dout_meta, q_meta, k_meta, v_meta, lse, ops.delta(dout_meta, out), *grads)
    leaves = [x.detach().requires_grad_() for x in (q_meta, k_meta, v_meta)]
    for grad, leaf in zip(torch.autograd.grad(ops.forward(*leaves)[0], leaves, dout_meta), leaves, strict=True):
        assert grad.is_meta and grad.shape == leaf.shape and grad.dtype == leaf.dtype


def test_packed_meta_tensors(device):
    q, k, v = (torch.empty(n, h, 8, device="meta") for n, h in ((9, 4), (7, 2), (7, 2)))
    ranges = {name: torch.empty(2, dtype=torch.int32, device="meta") for name in RANGE_NAMES}
    out, lse = ops.forward(q, k, v, **ranges)
    assert out.shape == (9, 4, 8) and lse.shape == (4, 9) and lse.dtype == torch.float32
    indices = {name: torch.empty(2, dtype=torch.int32, device="meta") for name in ("offsets", "flags")}
    ops.forward_into(q, k, v, torch.empty_like(out), lse, None, **ranges, **indices)


def attention_and_loss(q, k, v, dout, dlse):
    """Something around the operator for a compiler to fuse."""
    out, lse = interface.flash_attn_func(q * 1.5, k, v + 1, causal=True, window_size=(20, 0), return_attn_probs=True)
    return (out * dout).sum() + (lse * dlse).sum()


def varlen_and_loss(q, k, v, dout, dlse):
    tokens = q.shape[1]
    cu_seqlens = torch.tensor([0, 3, 3, tokens], dtype=torch.int32, device=q.device)
    out, lse = interface.flash_attn_varlen_func(
        q[0] * 1.5, k[0], v[0] + 1, cu_seqlens, cu_seqlens, tokens, tokens, causal=True, return_attn_probs=True
    )
    return (out * dout[0]).sum() + (lse * dlse[0]).sum()


def loss_and_grads(function, seqlen, device):
    q, k, v, dout = random_qkv(device, seqlen_q=seqlen, seqlen_k=seqlen, heads=4, heads_kv=2)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    loss = function(*leaves, dout, dout.sum(-1).transpose(1, 2))
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize(
    "function, backend",
    [(attention_and_loss, "aot_eager"), (varlen_and_loss, "aot_eager"), (attention_and_loss, "inductor")],
    ids=["dense-aot_eager", "varlen-aot_eager", "dense-inductor"],
)
def test_compiled_equals_eager(function, backend, device):
    """fullgraph and dynamic: no graph break, and one compilation serves other lengths. Forward and backward."""
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for seqlen in (16, 29):
        expected, got = loss_and_grads(function, seqlen, device), loss_and_grads(compiled, seqlen, device)
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        loss_and_grads(compiled, 41, device)


def test_export_with_dynamic_shapes(device):
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return interface.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)

    q, k, v, _ = random_qkv(device, batch=2, seqlen_q=16, seqlen_k=24, heads=4)
    batch, seqlen_q, seqlen_k = (torch.export.Dim(name, min=2, max=4096) for name in ("batch", "seqlen_q", "seqlen_k"))
    shapes = {"q": {0: batch, 1: seqlen_q}, "k": {0: batch, 1: seqlen_k}, "v": {0: batch, 1: seqlen_k}}
    exported = torch.export.export(Model(), (q, k, v), dynamic_shapes=shapes).module()
    for batch_size, lengths in ((2, (16, 24)), (3, (40, 33))):
        q, k, v, _ = random_qkv(device, batch=batch_size, seqlen_q=lengths[0], seqlen_k=lengths[1], heads=4)
        for a, b in zip(exported(q, k, v), Model()(q, k, v), strict=True):
            assert torch.equal(a, b)


def test_vmap_raises_clearly(device):
    q, k, v, dout = random_qkv(device, batch=3)
    calls = {
        "forward": lambda x: ops.forward(x[None], k[:1], v[:1])[0],
        "delta": lambda x: ops.delta(x[None], dout[:1]),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=rf"fa3_dist::{name}.*vmap.*batch"):
            torch.vmap(call)(q)
