"""The gate a ring must pass: what to run on every rank, and how far from the fp64 oracle each tensor may be.

`run_case` is one rank's part and runs in the worker processes; `judge` looks at what all ranks returned. The mutants
of test_ring_faults.py go through the same two functions. Inputs are made from a seed, alike on every rank and in the
judge, and hold values that bf16 can represent, so that one oracle serves all dtypes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fa3_dist.parallel import ring
from fa3_dist.parallel.exchange import Exchange
from fa3_dist.parallel.schedule import Layout, Shard, Span, Step, Visit, contiguous, packed, zigzag
from tests import oracle

NAMES = ("out", "lse", "dq", "dk", "dv")
# relative L2, per rank and tensor
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
LSE_TOLERANCE = dict.fromkeys(TOLERANCE, 1e-5) | {torch.float64: 1e-12}  # lse is never rounded to 16 bits
BLOCK = 512  # queries of one call of the oracle
TIMES_TORCH = 2.0  # bf16: at most this many times the error of PyTorch's own attention on one device


@dataclass(frozen=True)
class Case:
    """One attention problem. H heads and G kv_heads as in the oracle; windows None are unlimited, causal is right=0."""

    name: str
    lengths: tuple[int, ...]
    layout: str = "zigzag"
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 16
    head_dim_v: int = 16
    window_left: int | None = None
    window_right: int | None = 0
    softcap: float = 0.0
    softmax_scale: float | None = None
    dtype: torch.dtype = torch.float32
    dlse: bool = True  # the loss uses lse too
    strided: bool = False  # inputs in every layout but the contiguous one, inside buffers full of NaN
    schedule: str = "shipped"

    def make_layout(self, world: int) -> Layout:
        return {"zigzag": zigzag, "contiguous": contiguous, "packed": packed, "striped": striped}[self.layout](
            self.lengths, world
        )

    @property
    def options(self) -> dict[str, Any]:
        names = ("window_left", "window_right", "softcap", "softmax_scale")
        return {name: getattr(self, name) for name in names}


class Inputs(NamedTuple):
    """Of all documents, one behind the other: q (T, H, D), k (T, G, D), v (T, G, E), dout (T, H, E), dlse (H, T)."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor | None


def make_inputs(case: Case) -> Inputs:
    T, H, G = sum(case.lengths), case.heads, case.kv_heads
    generator = torch.Generator().manual_seed(T + H)
    shapes = (T, H, case.head_dim), (T, G, case.head_dim), (T, G, case.head_dim_v), (T, H, case.head_dim_v), (H, T)
    q, k, v, dout, dlse = (torch.randn(shape, generator=generator).bfloat16().to(case.dtype) for shape in shapes)
    return Inputs(q, k, v, dout, dlse if case.dlse else None)


def local_rows(layout: Layout, rank: int) -> Tensor:
    """Where the local rows of a rank are in the documents, one behind the other."""
    starts = list(accumulate(layout.documents, initial=0))
    pieces = [torch.arange(s.start, s.start + s.length) + starts[s.document] for s in layout.shards[rank]]
    return torch.cat([torch.arange(0), *pieces])


# ---------------------------------------------------------------------------------------------- one rank's part


def run_case(exchange: Exchange, case: Case, deterministic: bool = False, device: str = "cpu",
             attention: Callable[..., tuple[Tensor, Tensor]] | None = None) -> dict[str, Any]:
    """Forward and backward of this rank: its rows of every tensor in NAMES (on the CPU), and its traffic by pass.

    attention: what to call; None: `ring_attention` as it is now, patched or not.
    """
    attention = attention or ring.ring_attention
    layout, inputs = case.make_layout(exchange.world), make_inputs(case)
    rows = local_rows(layout, exchange.rank)
    local = [x[rows].to(device) for x in (inputs.q, inputs.k, inputs.v, inputs.dout)]
    dlse = None if inputs.dlse is None else inputs.dlse[:, rows].to(device)
    if case.strided:
        local = [_strided(x, kind) for kind, x in enumerate(local)]
        dlse = None if dlse is None else dlse.t().contiguous().t()
    q, k, v, dout = local
    leaves = [x.requires_grad_() for x in (q, k, v)]
    exchange.stats.reset()
    with schedule_of(case), poisoned_memory():
        out, lse = attention(*leaves, layout=layout, rank=exchange.rank, exchange=exchange,
                             deterministic=deterministic, **case.options)
        forward = dict(vars(exchange.stats))
        outputs, gradients = ((out, lse), (dout, dlse)) if dlse is not None else ((out,), (dout,))
        dq, dk, dv = torch.autograd.grad(outputs, leaves, gradients)
    both = dict(vars(exchange.stats))
    tensors = {name: x.detach().cpu() for name, x in zip(NAMES, (out, lse, dq, dk, dv), strict=True)}
    return tensors | {"forward": forward, "backward": {key: both[key] - forward[key] for key in both}}


def _strided(x: Tensor, kind: int) -> Tensor:
    """The same values with other strides, between NaN."""
    T, H, D = x.shape
    if kind == 0:  # heads first in memory
        buffer = x.new_full((H, T + 3, D), math.nan)
        view = buffer[:, 1 : T + 1].transpose(0, 1)
    elif kind == 1:  # rows and heads further apart than they are long
        buffer = x.new_full((T + 2, H + 1, D + 8), math.nan)
        view = buffer[2:, :H, 8:]
    elif kind == 2:  # the last dimension not contiguous
        buffer = x.new_full((T, H, 2 * D), math.nan)
        view = buffer[:, :, ::2]
    else:  # the last dimension first in memory
        buffer = x.new_full((D, H, T + 1), math.nan)
        view = buffer[:, :, 1:].permute(2, 1, 0)
    assert not view.is_contiguous() or x.numel() == 0
    return view.copy_(x).detach()


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every torch.empty comes full of NaN: what is read before it is written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # some CUDA operators would raise
    try:
        assert torch.empty(1).isnan(), "torch.utils.deterministic.fill_uninitialized_memory is on by default"
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def schedule_of(case: Case) -> Iterator[None]:
    if case.schedule == "shipped":
        yield
    else:
        with patched(ring, "ring_schedule", simplest_schedule):
            yield


_patches: dict[tuple[Any, str, Any], int] = {}  # in force, and by how many contexts
_unpatched: dict[tuple[Any, str, Any], Any] = {}


@contextlib.contextmanager
def patched(module: Any, name: str, value: Any) -> Iterator[None]:
    """Replaces an attribute of shipped code; the ring's cached plans go with it.

    Ranks of a process may ask for the same at a time, and come and go in any order: the last one puts back what the
    first one found.
    """
    patch = (module, name, value)
    if patch not in _patches:
        _unpatched[patch] = getattr(module, name)
        setattr(module, name, value)
    _patches[patch] = _patches.get(patch, 0) + 1
    ring.ring_plan.cache_clear()
    try:
        yield
    finally:
        _patches[patch] -= 1
        if _patches[patch] == 0:
            del _patches[patch]
            setattr(module, name, _unpatched.pop(patch))
        ring.ring_plan.cache_clear()


def striped(lengths: tuple[int, ...], world: int) -> Layout:
    """Every document in 4 * world stripes dealt out in turn: each rank holds several shards of a document."""
    shards: list[list[Shard]] = [[] for _ in range(world)]
    for document, length in enumerate(lengths):
        cuts = [length * i // (4 * world) for i in range(4 * world + 1)]
        for i, (start, end) in enumerate(zip(cuts, cuts[1:], strict=False)):
            if start < end:
                shards[i % world].append(Shard(document, start, end - start))
    return Layout(tuple(lengths), tuple(map(tuple, shards)))


def simplest_schedule(
    layout: Layout, rank: int, *, window_left: int | None, window_right: int | None
) -> tuple[Step, ...]:
    """A right schedule that knows no mask: all rows go to every rank, and every shard of queries visits every shard of
    keys of its document, last keys first, whether it sees any or not. Rows see nothing for many visits in a row."""
    del window_left, window_right
    world, mine, steps = layout.world, _with_rows(layout, rank), []
    visits_left = {q: sum(k.document == q.document for shards in layout.shards for k in shards) for _, q in mine}
    visited: set[Shard] = set()
    for shift in range(world):
        source, destination = (rank - shift) % world, (rank + shift) % world
        theirs = _with_rows(layout, source)

        def visit(q_row: int, q: Shard, k_row: int, k: Shard, first: bool = False, last: bool = False) -> Visit:
            return Visit(q_row, q.length, k_row, k.length, q.start - k.start, first, last)

        forward = []
        for k_row, k in reversed(theirs):
            launch = []
            for q_row, q in mine:
                if q.document == k.document:
                    visits_left[q] -= 1
                    launch.append(visit(q_row, q, k_row, k, first=q not in visited, last=visits_left[q] == 0))
                    visited.add(q)
            forward.append(tuple(launch))
        backward = [tuple(visit(q_row, q, k_row, k) for k_row, k in theirs if q.document == k.document)
                    for q_row, q in mine]
        receive = (Span(0, layout.tokens(source)),) if shift and layout.tokens(source) else ()
        send = (Span(0, layout.tokens(rank)),) if shift and layout.tokens(rank) else ()
        steps.append(Step(shift, source, receive, destination, send, tuple(forward), tuple(backward)))
    return tuple(steps)


def _with_rows(layout: Layout, rank: int) -> list[tuple[int, Shard]]:
    shards = layout.shards[rank]
    return list(zip(accumulate((s.length for s in shards), initial=0), shards, strict=False))


# ------------------------------------------------------------------------------------------------------ judging


def reference(case: Case) -> dict[str, Tensor]:
    """The oracle's answer for all documents, in fp64."""
    # It depends neither on who computes what nor on the dtype.
    return _reference(replace(case, name="", layout="", strided=False, schedule="", dtype=torch.float64))


@cache
def _reference(case: Case) -> dict[str, Tensor]:
    """The oracle by blocks of queries against the keys they can see, to bound the memory and time of long documents."""
    inputs = make_inputs(case)
    result = {"out": torch.zeros_like(inputs.dout), "lse": inputs.q.new_zeros(case.heads, sum(case.lengths)),
              **{f"d{name}": torch.zeros_like(getattr(inputs, name)) for name in "qkv"}}
    left, right = (BLOCK * 10**6 if w is None else w for w in (case.window_left, case.window_right))
    for start, length in zip(accumulate(case.lengths, initial=0), case.lengths, strict=False):
        for first in range(0, length, BLOCK):
            end = min(first + BLOCK, length)
            first_key, end_key = max(0, first - left), min(length, end + right)
            rows, keys = slice(start + first, start + end), slice(start + first_key, start + end_key)
            part = oracle.attention_grads(
                inputs.q[None, rows], inputs.k[None, keys], inputs.v[None, keys], inputs.dout[None, rows],
                None if inputs.dlse is None else inputs.dlse[None, :, rows], offset=first - first_key, **case.options,
            )
            result["out"][rows], result["lse"][:, rows] = part.out[0], part.lse[0]
            result["dq"][rows] = part.dq[0]
            result["dk"][keys] += part.dk[0]
            result["dv"][keys] += part.dv[0]
    return result


@cache
def torch_bf16(case: Case) -> dict[str, Tensor]:
    """PyTorch's attention over the whole documents in bf16: out, dq, dk, dv. It has no gradient through lse."""
    assert not case.dlse
    inputs = make_inputs(case)
    leaves = [x.bfloat16().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    outs = []
    for start, length in zip(accumulate(case.lengths, initial=0), case.lengths, strict=False):
        q, k, v = (x[start : start + length].transpose(0, 1)[None] for x in leaves)
        windowed = case.window_left is not None or case.window_right not in (0, None)
        mask = oracle.visible_mask(length, length, case.window_left, case.window_right, 0) if windowed else None
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and case.window_right == 0, enable_gqa=True,
            scale=case.softmax_scale,
        )  # fmt: skip
        outs.append(out[0].transpose(0, 1))
    out = torch.cat(outs)
    gradients = torch.autograd.grad(out, leaves, inputs.dout.bfloat16())
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *gradients), strict=True))


def error_norm(ours: Tensor, expected: Tensor) -> float:
    """L2 of the difference; NaN counts as infinite."""
    error = float((ours.double() - expected).norm())
    return math.inf if math.isnan(error) else error


def total_error(case: Case, name: str, results: list[dict[str, Any]]) -> float:
    """Relative L2 of one tensor over all ranks."""
    layout, expected = case.make_layout(len(results)), reference(case)[name]
    dim = 1 if name == "lse" else 0
    errors = [error_norm(result[name], expected.index_select(dim, local_rows(layout, rank)))
              for rank, result in enumerate(results)]
    return math.hypot(*errors) / float(expected.norm())


def judge(case: Case, results: list[dict[str, Any]]) -> list[str]:
    """What is wrong with the results of all ranks; empty if they pass."""
    layout, expected, wrong = case.make_layout(len(results)), reference(case), []
    for rank, result in enumerate(results):
        rows = local_rows(layout, rank)
        for name in NAMES:
            ours, dim = result[name], 1 if name == "lse" else 0
            dtype = (torch.float64 if case.dtype == torch.float64 else torch.float32) if name == "lse" else case.dtype
            exact = expected[name].index_select(dim, rows)
            if ours.shape != exact.shape or ours.dtype != dtype:
                wrong.append(f"{name} of rank {rank} is {tuple(ours.shape)} {ours.dtype}")
                continue
            # A rank may hold only rows whose gradient is zero or next to it (a document's first token has dq = 0).
            size = max(float(exact.norm()), 1e-2 * float(expected[name].norm()))
            error = error_norm(ours, exact)
            tolerance = (LSE_TOLERANCE if name == "lse" else TOLERANCE)[case.dtype]
            if error > tolerance * size:
                wrong.append(f"{name} of rank {rank}: relative L2 {error / size:.2e}, allowed {tolerance:.0e}")
            if case.dtype == torch.bfloat16 and name != "lse" and case.softcap == 0:
                allowed = TIMES_TORCH * error_norm(torch_bf16(case)[name].index_select(0, rows), exact)
                if error > allowed + 1e-4 * size:
                    wrong.append(f"{name} of rank {rank}: error {error:.2e}, PyTorch's allows {allowed:.2e}")
    return wrong
