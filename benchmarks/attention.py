"""Speed of attention on a Hopper GPU beside its peers: `python benchmarks/attention.py --suite forward`.

    forward       dense, GQA, packed and windowed batches against cuDNN, FlashAttention-2 and what else is installed
    host          microseconds that one call keeps the host busy, with and without gradients
    continuation  one step of a ring: continuing from a running (out, lse), against plain attention, against merging
    ablation      variants of our kernel at the size of FlashAttention-3's ablation

All peers get the same N(0, 1) tensors and take turns call by call; a peer whose output differs from ours is an error
and no figure. TFLOP/s are 2 * visible pairs * heads * (head_dim + head_dim_v) over the time on the GPU; a dense causal
batch counts as half its square. Bars in TFLOP/s are for a GPU whose bf16 GEMM of 8192^3 runs at 800 and scale with the
GEMM of the run itself; below 760 the run is invalid. The exit status is 1 if a bar is missed or an output is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib
import importlib.metadata
import inspect
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import timing
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fa3_dist
from fa3_dist import ops
from fa3_dist.algebra import merge

DOCUMENTS = Path(__file__).with_name("packed_documents.json")
REPEATS = 20
# Relative L2. Two orders of the same bf16 arithmetic are 1e-3 apart; one key too many in a window of 4096 is 1e-2.
LARGEST_DIFFERENCE = 5e-3
GEMM_NOMINAL, GEMM_LEAST = 800, 760  # TFLOP/s
HOST_BATCHES, HOST_CALLS = 40, 200
T = TypeVar("T")


# ---- cases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One attention problem: each sequence attends to itself. Dense unless packed; dense sequences are equally long."""

    name: str
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int
    causal: bool
    left: int | None = None  # a window: how many keys before its own a query sees
    packed: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def flop(self) -> int:
        """Operations of the forward that count."""
        return 2 * self.visible_pairs() * self.heads * (self.head_dim + self.head_dim_v)

    def visible_pairs(self) -> int:
        """(query, key) pairs that the mask leaves; of a dense causal batch half the square, as the field counts."""
        if not self.causal:
            return sum(n * n for n in self.lengths)
        if self.left is None and not self.packed:
            return sum(n * n for n in self.lengths) // 2
        return sum(_pairs_in_band(n, n if self.left is None else self.left) for n in self.lengths)

    def describe(self) -> dict[str, Any]:
        """The case as a result file has it."""
        shape: dict[str, Any] = {"batch": len(self.lengths), "seqlen": self.lengths[0]}
        if self.packed:
            shape = {"documents": len(self.lengths), "tokens": sum(self.lengths)}
        shape |= {"heads": self.heads, "kv_heads": self.kv_heads}
        shape |= {"head_dim": self.head_dim, "head_dim_v": self.head_dim_v}
        shape |= {"causal": self.causal, "window_left": self.left, "dtype": str(self.dtype).removeprefix("torch.")}
        return shape


def _pairs_in_band(seqlen: int, left: int) -> int:
    """Pairs with i - left <= j <= i: row i has min(i, left) + 1 of them."""
    left = min(left, seqlen - 1)
    return seqlen * (left + 1) - left * (left + 1) // 2


HEAD_DIMS = (64, 128, 256)
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
TOKENS, HIDDEN = 16384, 2048


def label(tokens: int) -> str:
    """512, 1k, 16k."""
    return str(tokens) if tokens < 1024 else f"{tokens // 1024}k"


def dense_name(head_dim: int, causal: bool, seqlen: int) -> str:
    """Name of a dense case."""
    return f"d{head_dim}_{'causal' if causal else 'full'}_{label(seqlen)}"


def dense_cases() -> list[Case]:
    """The grid of the FlashAttention papers: 16 k tokens and a hidden size of 2048, whatever head_dim and seqlen."""
    return [
        Case(
            dense_name(head_dim, causal, seqlen), (seqlen,) * (TOKENS // seqlen), HIDDEN // head_dim,
            HIDDEN // head_dim, head_dim, head_dim, causal,
        )
        for head_dim in HEAD_DIMS
        for causal in (False, True)
        for seqlen in SEQLENS
    ]


def packed_cases() -> list[Case]:
    """Batches of documents packed one after the other, causal inside each."""
    batches = json.loads(DOCUMENTS.read_text())["batches"]
    return [
        Case(f"packed_{name}", tuple(lengths), 16, 16, 128, 128, causal=True, packed=True)
        for name, lengths in batches.items()
    ]


def forward_cases() -> list[Case]:
    """All cases of the suite `forward`."""
    k = 1024
    return [
        *dense_cases(),
        Case("gqa_32_8_16k", (16 * k,), 32, 8, 128, 128, causal=True),
        Case("gqa_64_8_32k", (32 * k,), 64, 8, 128, 128, causal=True),
        Case("d192_128_causal_8k", (8 * k,) * 2, 16, 16, 192, 128, causal=True),
        Case("fp16_d128_causal_8k", (8 * k,) * 2, 16, 16, 128, 128, causal=True, dtype=torch.float16),
        *packed_cases(),
        Case("window_1024_32k", (32 * k,), 64, 8, 128, 128, causal=True, left=1024),
        Case("window_128_32k", (32 * k,), 16, 16, 128, 128, causal=True, left=128),
        Case("window_4096_128k", (128 * k,), 16, 16, 128, 128, causal=True, left=4096),
    ]


class Inputs(NamedTuple):
    """q (B, S, H, D), k (B, S, Hkv, D), v (B, S, Hkv, Dv); packed (T, H, D) and so on. cu_seqlens (n + 1,), int32."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor


def make_inputs(case: Case, device: str, requires_grad: bool = False) -> Inputs:
    """N(0, 1) in the case's dtype, the same for every run."""
    rows = (sum(case.lengths),) if case.packed else (len(case.lengths), case.lengths[0])
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(
            *rows, heads, dim, dtype=case.dtype, device=device, generator=generator, requires_grad=requires_grad
        )
        for heads, dim in (
            (case.heads, case.head_dim), (case.kv_heads, case.head_dim), (case.kv_heads, case.head_dim_v),
        )
    )
    ends = torch.tensor((0, *case.lengths)).cumsum(0).to(device, torch.int32)
    return Inputs(q, k, v, ends)


# ---- peers -----------------------------------------------------------------------------------------------------------

Call = Callable[[], Tensor]


class CannotRun(Exception):
    """Why a peer has no figure for a case; the text goes into the result file."""


class Peer(NamedTuple):
    """An implementation: `build` makes of a case and its inputs a call that returns out, in the layout of q."""

    about: str
    build: Callable[[Case, Inputs], Call]


def flash_attention(dense: Callable[..., Any], packed: Callable[..., Any], case: Case, x: Inputs) -> Call:
    """Functions with the interface of FlashAttention, which ours share."""
    window = (-1, -1) if case.left is None else (case.left, 0)
    options: dict[str, Any] = {"causal": case.causal, "window_size": window}
    if case.packed:
        longest = max(case.lengths)
        call = functools.partial(packed, x.q, x.k, x.v, x.cu_seqlens, x.cu_seqlens, longest, longest, **options)
    else:
        call = functools.partial(dense, x.q, x.k, x.v, **options)
    return lambda: _first(call())


def _first(result: Any) -> Tensor:
    """out of what a function returns, which in some versions is (out, lse)."""
    return result[0] if isinstance(result, tuple) else result


def sdpa(backend: SDPBackend, case: Case, x: Inputs) -> Call:
    """torch's scaled_dot_product_attention on one backend, on transposed views: no copies."""
    if case.packed or case.left is not None:
        raise CannotRun("scaled_dot_product_attention takes no packed sequences and no window")
    q, k, v = (t.transpose(1, 2) for t in x[:3])
    gqa = case.heads != case.kv_heads

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=gqa).transpose(1, 2)

    return call


def torch_flash(case: Case, x: Inputs) -> Call:
    """The FlashAttention-2 inside torch: through its varlen_attn where scaled_dot_product_attention cannot say it."""
    if not case.packed and case.left is None:
        return sdpa(SDPBackend.FLASH_ATTENTION, case, x)
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise CannotRun(f"torch {torch.__version__} has no varlen_attn") from None
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {}
    if "window_size" in known:
        options["window_size"] = (-1 if case.left is None else case.left, 0 if case.causal else -1)
    elif case.left is None:
        options["is_causal"] = case.causal
    else:
        raise CannotRun(f"varlen_attn of torch {torch.__version__} has no windows")
    if case.heads != case.kv_heads and "enable_gqa" in known:
        options["enable_gqa"] = True
    q, k, v = (t.flatten(0, -3) for t in x[:3])
    longest = max(case.lengths)
    call = functools.partial(varlen_attn, q, k, v, x.cu_seqlens, x.cu_seqlens, longest, longest, **options)
    return lambda: _first(call()).view(*x.q.shape[:-1], case.head_dim_v)


def flex_attention(case: Case, x: Inputs) -> Call:
    """torch's FlexAttention, compiled for this case (which takes it many seconds)."""
    from torch.nn.attention import flex_attention as flex

    torch._dynamo.reset()  # else the limit on recompilations ends in the slow eager form
    q, k, v = ((t.unsqueeze(0) if case.packed else t).transpose(1, 2) for t in x[:3])
    seqlen = q.shape[2]
    left = seqlen if case.left is None else case.left
    tokens = torch.arange(seqlen, dtype=torch.int32, device=q.device)
    document = torch.searchsorted(x.cu_seqlens, tokens, right=True) if case.packed else torch.zeros_like(tokens)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j >= i - left) & (document[i] == document[j])

    mask = None
    if case.causal:
        mask = torch.compile(flex.create_block_mask)(visible, None, None, seqlen, seqlen, device=q.device.type)
    attend = functools.partial(
        torch.compile(flex.flex_attention, dynamic=False), q, k, v, block_mask=mask,
        enable_gqa=case.heads != case.kv_heads,
    )
    return lambda: attend().transpose(1, 2).view(*x.q.shape[:-1], case.head_dim_v)


def find_peers() -> dict[str, Peer | str]:
    """Every peer there could be, ours first: the peer, or why it is not here."""
    found: dict[str, Peer | str] = {
        "ours": Peer(
            f"fa3_dist {fa3_dist.__version__}",
            functools.partial(flash_attention, fa3_dist.flash_attn_func, fa3_dist.flash_attn_varlen_func),
        ),
        "cudnn": Peer(
            f"cuDNN {timing.cudnn_version()} through torch", functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION)
        ),
        "fa2": Peer(f"FlashAttention-2 of torch {torch.__version__}", torch_flash),
    }
    for name, module_name in (("fa3", "flash_attn_interface"), ("flash_attn", "flash_attn")):
        try:
            module = importlib.import_module(module_name)
            functions = module.flash_attn_func, module.flash_attn_varlen_func
        except (ImportError, OSError, AttributeError) as error:
            found[name] = f"{module_name} does not import: {_one_line(error)}"
        else:
            version = getattr(module, "__version__", "of unknown version")
            found[name] = Peer(f"{module_name} {version}", functools.partial(flash_attention, *functions))
    found["flex"] = Peer(f"FlexAttention of torch {torch.__version__}", flex_attention)
    return found


BY_REQUEST = ("flex",)  # peers that run only if --peers names them: they compile for every case


def choose_peers(found: dict[str, Peer | str], wanted: Sequence[str]) -> dict[str, Peer]:
    """Ours and the wanted ones; without a wish all that are here but those BY_REQUEST.

    Raises ValueError for a wanted peer that is unknown or not here.
    """
    for name in wanted:
        if name not in found:
            raise ValueError(f"unknown peer '{name}': the peers are {', '.join(found)}")
        if isinstance(reason := found[name], str):
            raise ValueError(f"peer '{name}' is not here: {reason}")
    names = [name for name in found if name == "ours" or (name in wanted if wanted else name not in BY_REQUEST)]
    return {name: peer for name in names if isinstance(peer := found[name], Peer)}


# ---- measuring -------------------------------------------------------------------------------------------------------


class Setup(NamedTuple):
    """What a suite measures with."""

    peers: dict[str, Peer]
    time: Callable[[timing.Calls], dict[str, list[float]]]  # milliseconds of each call
    device: str = "cuda"


def _one_line(error: BaseException | str, limit: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def first_result(call: Callable[[], T]) -> T:
    """A call's result, waited for. Raises CannotRun where the call fails, with what it said and warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return result
        except CannotRun:
            raise
        except Exception as error:
            if "CUDA error" in str(error):  # the GPU's context is lost: nothing measured after this would mean anything
                raise
            said = [_one_line(error), *(_one_line(warning.message, 150) for warning in caught)]
            raise CannotRun("; ".join(dict.fromkeys(said))) from error


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|, in fp32; infinite between different shapes."""
    if actual.shape != expected.shape:
        return math.inf
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def compare(entries: dict[str, Any], errors: list[str], name: str, actual: Tensor, expected: Tensor) -> bool:
    """Enters how far two outputs that should agree are apart; where that is too far it is an error and no figure."""
    difference = relative_l2(actual, expected)
    if difference <= LARGEST_DIFFERENCE:
        entries[name] = {"difference": difference}
        return True
    reason = f"differs by {difference:.1e} in relative L2: {LARGEST_DIFFERENCE:.0e} is the bound"
    entries[name] = _no_figure(reason)
    errors.append(f"{name} {reason}")
    return False


def _no_figure(reason: str) -> dict[str, Any]:
    return {"ms": None, "tflops": None, "reason": reason}


def measure_case(case: Case, setup: Setup) -> dict[str, Any]:
    """Checks every peer's output against the first one's that has any, then times all in turn."""
    x = make_inputs(case, setup.device)
    calls: dict[str, Call] = {}
    entries: dict[str, Any] = {}
    errors: list[str] = []
    expected = out = None
    for name, peer in setup.peers.items():
        try:
            call = first_result(functools.partial(peer.build, case, x))
            out = first_result(call)
        except CannotRun as reason:
            entries[name] = _no_figure(str(reason))
            continue
        if expected is None:
            expected, entries[name], calls[name] = out, {}, call
        elif compare(entries, errors, name, out, expected):
            calls[name] = call
    del out, expected  # their memory is better free
    for name, milliseconds in setup.time(calls).items():
        entries[name] |= timing.speed(milliseconds, case.flop)
    return {"name": case.name, **case.describe(), "flop": case.flop, "peers": entries, "errors": errors}


HOST_CASE = Case("host", (128,), 2, 2, 128, 128, causal=True)  # over on the GPU before the host has the next one ready


def measure_host(requires_grad: bool, setup: Setup) -> dict[str, Any]:
    """Microseconds of the host a call, ours and cuDNN's."""
    x = make_inputs(HOST_CASE, setup.device, requires_grad)
    q, k, v = (t.transpose(1, 2) for t in x[:3])
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: fa3_dist.flash_attn_func(x.q, x.k, x.v, causal=True),
        "cudnn": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    entries: dict[str, Any] = {}
    with torch.set_grad_enabled(requires_grad), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        for name in list(calls):
            try:
                first_result(calls[name])
                entries[name] = {}
            except CannotRun as reason:
                entries[name] = {"us": None, "reason": str(reason)}
                del calls[name]
        for name, microseconds in host_microseconds(calls).items():
            entries[name]["us"] = timing.spread(microseconds)
    name = "grad" if requires_grad else "no_grad"
    return {"name": name, **HOST_CASE.describe(), "peers": entries, "errors": []}


def host_microseconds(calls: timing.Calls) -> dict[str, list[float]]:
    """Microseconds from call to return, the mean of each of HOST_BATCHES batches; the GPU is idle when one begins."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    with _no_garbage_collection():
        for batch in range(-3, HOST_BATCHES):
            for name, call in calls.items():
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(HOST_CALLS):
                    call()
                microseconds = (time.perf_counter() - start) / HOST_CALLS * 1e6
                if batch >= 0:
                    times[name].append(microseconds)
    torch.cuda.synchronize()
    return times


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


CONTINUATION_CASE = Case("continue_8k", (8192,), 16, 16, 128, 128, causal=False, packed=True)


def measure_continuation(case: Case, setup: Setup) -> dict[str, Any]:
    """One visit of a ring: what it costs to continue from a running state instead of starting anew.

    plain: `forward` over the same ranges. continue: `forward_into`, neither FIRST nor LAST. merge: `forward` with fp32
    output, and torch's merging of the two results.
    """
    x = make_inputs(case, setup.device)
    start = torch.zeros(1, dtype=torch.int32, device=setup.device)
    length = torch.full_like(start, sum(case.lengths))
    ranges: dict[str, Any] = {"q_start": start, "q_len": length, "k_start": start, "k_len": length, "offsets": start}
    out_acc = torch.zeros(*x.q.shape[:-1], case.head_dim_v, device=setup.device)
    lse = torch.zeros(case.heads, x.q.shape[0], device=setup.device)
    plain = functools.partial(ops.forward, x.q, x.k, x.v, **ranges)

    def into(flags: int, k: Tensor, v: Tensor) -> Call:
        flags_of_visit = torch.full_like(start, flags)

        def call() -> Tensor:
            ops.forward_into(x.q, k, v, out_acc, lse, None, **ranges, flags=flags_of_visit)
            return out_acc

        return call

    begin = into(ops.FIRST, x.k.flip(0), x.v)  # keys that meet other values: a state to continue from
    calls: dict[str, Call] = {"plain": lambda: plain()[0]}
    continued: dict[str, Call] = {
        "continue": into(0, x.k, x.v),
        "merge": lambda: merge(out_acc, lse, *plain(out_dtype=torch.float32))[0],
    }
    entries: dict[str, Any] = {"plain": {}}
    errors: list[str] = []
    for name, call in continued.items():
        try:
            first_result(begin)
            expected, _ = merge(out_acc, lse, *first_result(plain))
            out = first_result(call)
        except CannotRun as reason:
            entries[name] = _no_figure(str(reason))
            continue
        if compare(entries, errors, name, out, expected):
            calls[name] = call
    for name, milliseconds in setup.time(calls).items():
        entries[name] |= timing.speed(milliseconds, case.flop)
    return {"name": case.name, **case.describe(), "flop": case.flop, "peers": entries, "errors": errors}


ABLATION_CASE = Case("ablation", (8448,) * 4, 16, 16, 128, 128, causal=False)
# TFLOP/s on an H100 in FlashAttention-3's paper (arXiv:2407.08608, section 3)
PAPER = {"warp-specialised": 570, "... with ping-pong": 620, "... and overlap inside a warpgroup": 661}


def measure_ablation(setup: Setup) -> dict[str, Any]:
    """Variants of our kernel, each a Peer; cuDNN beside them checks their outputs."""
    variants = {name: peer for name, peer in setup.peers.items() if name in ("ours", "cudnn")}
    return {**measure_case(ABLATION_CASE, setup._replace(peers=variants)), "paper": PAPER}


Measure = Callable[[Setup], dict[str, Any]]
SUITES: dict[str, Callable[[], dict[str, Measure]]] = {
    "forward": lambda: {case.name: functools.partial(measure_case, case) for case in forward_cases()},
    "host": lambda: {
        "no_grad": functools.partial(measure_host, False),
        "grad": functools.partial(measure_host, True),
    },
    "continuation": lambda: {CONTINUATION_CASE.name: functools.partial(measure_continuation, CONTINUATION_CASE)},
    "ablation": lambda: {ABLATION_CASE.name: measure_ablation},
}


def choose_cells(suite: str, patterns: Sequence[str]) -> dict[str, Measure]:
    """The suite's cells whose name contains one of the patterns; all without patterns. ValueError for a useless one."""
    cells = SUITES[suite]()
    for pattern in patterns:
        if not any(pattern in name for name in cells):
            raise ValueError(f"no case of suite {suite} contains '{pattern}': they are {', '.join(cells)}")
    return {name: cell for name, cell in cells.items() if not patterns or any(p in name for p in patterns)}


# ---- bars ------------------------------------------------------------------------------------------------------------

Cells = dict[str, dict[str, Any]]  # by name


class Figure(NamedTuple):
    """A figure to hold against a bar; `complete` says whether all cells that it is about were measured."""

    value: float
    note: str = ""
    complete: bool = True


class Bar(NamedTuple):
    """A figure that the run is judged by, None where it was not measured."""

    what: str
    figure: Callable[[Cells], Figure | None]
    bar: float
    unit: str
    sense: str = "at least"
    stretch: float | None = None


def median(cells: Cells, name: str, peer: str, unit: str) -> float | None:
    """A peer's median in a cell; None if there is none, or if outputs in that cell disagree."""
    cell = cells.get(name)
    if cell is None or cell["errors"]:
        return None
    entry = cell["peers"].get(peer, {}).get(unit)
    return entry["median"] if entry else None


def ratio(cells: Cells, name: str, of: str, to: str, unit: str) -> float | None:
    """A peer's median over another's."""
    a, b = median(cells, name, of, unit), median(cells, name, to, unit)
    return None if a is None or b is None else a / b


def dense_ratios(cells: Cells) -> dict[str, float]:
    """Speed of ours over cuDNN's, of those cells of the dense grid that have both."""
    ratios = {case.name: ratio(cells, case.name, "ours", "cudnn", "tflops") for case in dense_cases()}
    return {name: value for name, value in ratios.items() if value is not None}


def geometric_mean(cells: Cells) -> Figure | None:
    """Of the dense grid's ratios."""
    ratios, size = dense_ratios(cells), len(dense_cases())
    if not ratios:
        return None
    mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
    return Figure(mean, f"{len(ratios)} of {size} cells", len(ratios) == size)


def smallest_ratio(cells: Cells) -> Figure | None:
    """Of the dense grid's ratios, with its cell."""
    ratios = dense_ratios(cells)
    if not ratios:
        return None
    name = min(ratios, key=ratios.__getitem__)
    return Figure(ratios[name], name, len(ratios) == len(dense_cases()))


def _figure(value: float | None) -> Figure | None:
    return None if value is None else Figure(value)


def against_cudnn(name: str, bar: float) -> Bar:
    """Speed of ours over cuDNN's in one cell."""
    what = f"ours / cudnn, {name}"
    return Bar(what, lambda cells: _figure(ratio(cells, name, "ours", "cudnn", "tflops")), bar, "x")


def absolute(name: str, bar: float) -> Bar:
    """Our TFLOP/s in one cell."""
    return Bar(name, lambda cells: _figure(median(cells, name, "ours", "tflops")), bar, "TFLOP/s")


def host_time(name: str, bar: float) -> Bar:
    """Microseconds of the host a call of ours."""
    what = f"host, {name}"
    return Bar(what, lambda cells: _figure(median(cells, name, "ours", "us")), bar, "us", "at most")


BARS: dict[str, list[Bar]] = {
    "forward": [
        Bar("geometric mean of ours / cudnn, dense", geometric_mean, 1.11, "x", stretch=1.17),
        Bar("smallest ours / cudnn, dense", smallest_ratio, 1.00, "x"),
        against_cudnn("d128_causal_16k", 1.25),
        against_cudnn("d256_causal_16k", 1.25),
        against_cudnn("gqa_32_8_16k", 1.08),
        against_cudnn("gqa_64_8_32k", 1.15),
        against_cudnn("d192_128_causal_8k", 1.00),
        absolute("packed_web_64k", 400),
        absolute("packed_web_16k", 130),
        absolute("packed_code_64k", 715),
        absolute("packed_long_128k", 650),
        absolute("window_1024_32k", 560),
        absolute("window_128_32k", 220),
        absolute("window_4096_128k", 640),
    ],
    "host": [host_time("no_grad", 12), host_time("grad", 25)],
    "continuation": [
        Bar(
            "time of continue / plain",
            lambda cells: _figure(ratio(cells, CONTINUATION_CASE.name, "continue", "plain", "ms")),
            1.05, "x", "at most",
        )
    ],
    "ablation": [],
}


def summarise(suite: str, cells: Cells, gemm_tflops: float) -> list[dict[str, Any]]:
    """Every bar of the suite with the figure beside it; `passed` is None where not all of it was measured."""
    summary = []
    for bar in BARS[suite]:
        scale = gemm_tflops / GEMM_NOMINAL if bar.unit == "TFLOP/s" else 1.0
        level, figure = bar.bar * scale, bar.figure(cells)
        passed = None
        if figure is not None and figure.complete:
            passed = figure.value >= level if bar.sense == "at least" else figure.value <= level
        summary.append(
            {
                "what": bar.what,
                "value": figure.value if figure else None,
                "note": figure.note if figure else "not measured",
                "unit": bar.unit,
                "bar": level,
                "sense": bar.sense,
                "stretch": bar.stretch,
                "passed": passed,
            }
        )
    return summary


def complain(result: dict[str, Any]) -> list[str]:
    """What makes the result a failure."""
    complaints = [f"{cell['name']}: {error}" for cell in result["cells"] for error in cell["errors"]]
    for line in result["summary"]:
        if line["passed"] is False:
            complaints.append(f"{line['what']}: {line['value']:.4g} {line['unit']}, the bar is {line['bar']:.4g}")
    if not result["valid"]:
        gemm = result["gemm"]["tflops"]["median"]
        complaints.append(f"the run is invalid: its GEMM ran at {gemm:.0f} TFLOP/s, {GEMM_LEAST} is the least")
    return complaints


# ---- output ----------------------------------------------------------------------------------------------------------


def cell_line(cell: dict[str, Any]) -> str:
    """A cell's medians, TFLOP/s or microseconds."""
    parts = []
    for name, entry in cell["peers"].items():
        us, tflops = entry.get("us"), entry.get("tflops")
        figure = f"{tflops['median']:.0f}" if tflops else f"{us['median']:.1f} us" if us else "-"
        parts.append(f"{name} {figure}")
    against = ratio({cell["name"]: cell}, cell["name"], "ours", "cudnn", "tflops")
    lines = [f"{cell['name']:<20} {'  '.join(parts)}" + (f"  ({against:.2f} x cudnn)" if against else "")]
    for name, entry in cell["peers"].items():
        if "reason" in entry and (name == "ours" or len(cell["peers"]) <= 3):
            lines.append(f"    {name}: {entry['reason']}")
    lines += [f"    WRONG: {error}" for error in cell["errors"]]
    if "flop" in cell and not cell["errors"] and not any("difference" in entry for entry in cell["peers"].values()):
        lines.append("    unchecked: no peer could say what the output should be")
    return "\n".join(lines)


def dense_table(cells: Cells, peers: Sequence[str] = ("cudnn", "ours")) -> list[str]:
    """Median TFLOP/s of two peers over the dense grid, as Markdown."""
    lines = [f"| d | mask: {'/'.join(peers)} | {' | '.join(map(label, SEQLENS))} |", "|---" * (2 + len(SEQLENS)) + "|"]
    for head_dim in HEAD_DIMS:
        for causal in (False, True):
            row = []
            for seqlen in SEQLENS:
                speeds = [median(cells, dense_name(head_dim, causal, seqlen), peer, "tflops") for peer in peers]
                row.append("/".join("-" if speed is None else f"{speed:.0f}" for speed in speeds))
            lines.append(f"| {head_dim} | {'causal' if causal else 'full'} | {' | '.join(row)} |")
    return lines


def print_result(result: dict[str, Any]) -> None:
    """The tables for people, at the end of a run."""
    cells = {cell["name"]: cell for cell in result["cells"]}
    if dense_ratios(cells):
        print("\n".join(["", *dense_table(cells)]))
    for cell in result["cells"]:
        for what, tflops in cell.get("paper", {}).items():
            print(f"    {tflops} TFLOP/s on an H100 in FlashAttention-3's paper: {what}")
    if result["summary"]:
        print(f"\n{'':<40} {'figure':>8} {'bar':>8}")
    for line in result["summary"]:
        verdict = {True: "pass", False: "FAIL", None: "not judged"}[line["passed"]]
        if line["passed"] and line["stretch"] is not None and line["value"] >= line["stretch"]:
            verdict = f"pass, stretch goal {line['stretch']:.4g} too"
        value = "-" if line["value"] is None else f"{line['value']:.4g}"
        print(f"{line['what']:<40} {value:>8} {line['bar']:>8.4g} {line['unit']:<8} {verdict}  {line['note']}")
    gemm = result["gemm"]["tflops"]
    print(f"GEMM of 8192^3: {gemm['median']:.0f} TFLOP/s ({gemm['worst']:.0f} to {gemm['best']:.0f})")


COLORS = {"ours": "#d9731a", "cudnn": "#2a6fbb", "fa2": "#777777", "fa3": "#3a9a5b", "flex": "#8a5fb0"}


def draw(result: dict[str, Any], path: Path) -> bool:
    """The result as a PNG; False, with nothing done, where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = {cell["name"]: cell for cell in result["cells"]}
    unit = "us" if result["suite"] == "host" else "tflops"
    grid = {case.name for case in dense_cases()}
    bars = [name for name in cells if name not in grid]
    if result["suite"] == "forward":
        figure = pyplot.figure(figsize=(15, 13), layout="constrained")
        places = figure.add_gridspec(3, len(HEAD_DIMS))
        for column, head_dim in enumerate(HEAD_DIMS):
            for row, causal in enumerate((False, True)):
                _draw_lines(figure.add_subplot(places[row, column]), cells, head_dim, causal)
        _draw_bars(figure.add_subplot(places[2, :]), cells, bars, unit, result["summary"])
    else:
        figure, axes = pyplot.subplots(figsize=(7, 4.6), layout="constrained")
        _draw_bars(axes, cells, bars, unit, result["summary"])
    valid = "" if result["valid"] else ", INVALID: the GPU was slow"
    figure.suptitle(f"attention, {result['suite']}: {result['device']}, cuDNN {result['cudnn']}{valid}")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return True


def _peers_of(cells: Cells) -> list[str]:
    return list(dict.fromkeys(name for cell in cells.values() for name in cell["peers"]))


def _draw_lines(axes: Any, cells: Cells, head_dim: int, causal: bool) -> None:
    """TFLOP/s over seqlen, a line a peer."""
    names = [dense_name(head_dim, causal, seqlen) for seqlen in SEQLENS]
    for peer in _peers_of({name: cells[name] for name in names if name in cells}):
        speeds = [median(cells, name, peer, "tflops") for name in names]
        shown = [math.nan if speed is None else speed for speed in speeds]
        axes.plot(SEQLENS, shown, "o-", label=peer, color=COLORS.get(peer), linewidth=2.4 if peer == "ours" else 1.4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(SEQLENS, list(map(label, SEQLENS)))
    axes.set_ylim(bottom=0)
    axes.set(title=f"head_dim {head_dim}, {'causal' if causal else 'full'}", xlabel="seqlen", ylabel="TFLOP/s")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(loc="lower right")


def _draw_bars(axes: Any, cells: Cells, names: list[str], unit: str, summary: list[dict[str, Any]]) -> None:
    """A group of bars a cell, a bar a peer; a black line across a group is what we are to reach."""
    shown = {name: cells[name] for name in names}
    peers = _peers_of(shown)
    width = 0.8 / max(1, len(peers))
    for index, peer in enumerate(peers):
        heights = [median(shown, name, peer, unit) or 0.0 for name in names]
        places = [place + (index - (len(peers) - 1) / 2) * width for place in range(len(names))]
        bars = axes.bar(places, heights, width, label=peer, color=COLORS.get(peer))
        axes.bar_label(bars, [f"{height:.3g}" if height else "" for height in heights], fontsize=8)
    levels = {line["what"]: line["bar"] for line in summary}
    for place, name in enumerate(names):
        level = levels.get(name, levels.get(f"host, {name}"))
        if level is not None:
            axes.hlines(level, place - 0.45, place + 0.45, color="black", linewidth=1.5)
    axes.set_xticks(range(len(names)), names, rotation=12)
    axes.set_ylabel({"us": "microseconds of the host", "tflops": "TFLOP/s"}[unit])
    axes.margins(y=0.2)  # room for the legend
    if peers:
        axes.legend(loc="upper center", ncols=len(peers))


# ---- command line ----------------------------------------------------------------------------------------------------


def run(
    suite: str, cells: dict[str, Measure], setup: Setup, header: dict[str, Any], save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Measures the cells one after the other, saving the result after each. The GEMM runs before and after them."""
    gemm = timing.gemm()
    gemm_ms = setup.time({"gemm": gemm})["gemm"]
    measured: list[dict[str, Any]] = []

    def result() -> dict[str, Any]:
        product = timing.speed(gemm_ms, timing.GEMM_FLOP)
        tflops = product["tflops"]["median"]
        by_name = {cell["name"]: cell for cell in measured}
        return {
            **header, "gemm": product, "valid": tflops >= GEMM_LEAST, "cells": measured,
            "summary": summarise(suite, by_name, tflops),
        }

    started = time.monotonic()
    for index, measure in enumerate(cells.values()):
        measured.append(measure(setup))
        print(f"[{index + 1}/{len(cells)}, {time.monotonic() - started:.0f} s] {cell_line(measured[-1])}", flush=True)
        save(result())
    gemm_ms += setup.time({"gemm": gemm})["gemm"]
    save(result())
    return result()


def default_output(suite: str, device: str) -> Path:
    """benchmarks/results/attention_forward_h200.json for an "NVIDIA H200"."""
    gpu = device.removeprefix("NVIDIA ").split()[0].lower()
    return timing.RESULTS / f"attention_{suite}_{gpu}.json"


def name_list(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="Speed of attention on a Hopper GPU beside its peers.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--suite", choices=SUITES)
    what.add_argument("--draw", type=Path, metavar="JSON", help="only draw a result file's picture again")
    parser.add_argument(
        "--output", type=Path,
        help="result file, its picture goes beside it (default: benchmarks/results/attention_SUITE_GPU.json for a "
        "whole suite, none for a part of it)",
    )
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"timings of each call (default: {REPEATS})")
    parser.add_argument("--cells", type=name_list, default=[], help='parts of case names: "d128_causal,packed"')
    parser.add_argument(
        "--peers", type=name_list, default=[],
        help='peers beside ours: "cudnn,fa2,fa3,flash_attn,flex" (default: all that are installed, but flex)',
    )
    parsed = parser.parse_args(arguments)
    if parsed.repeats < 1:
        parser.error(f"--repeats is {parsed.repeats}: expected 1 or more")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parsed = parse_arguments(arguments)
    if parsed.draw:
        drawn = draw(json.loads(parsed.draw.read_text()), parsed.draw.with_suffix(".png"))
        print(parsed.draw.with_suffix(".png") if drawn else "matplotlib is not installed: pip install matplotlib")
        return 0 if drawn else 2
    found = find_peers()
    try:
        cells, peers = choose_cells(parsed.suite, parsed.cells), choose_peers(found, parsed.peers)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if trouble := timing.why_no_hopper() or timing.why_no_library():
        print(trouble, file=sys.stderr)
        return 2
    os.environ["FA3_DIST_STRICT"] = "1"  # a case without a kernel of ours is no figure, not PyTorch's figure
    header = {
        "benchmark": "attention",
        "suite": parsed.suite,
        **timing.measured_on(),
        "repeats": parsed.repeats,
        "peers": {name: peer.about if isinstance(peer, Peer) else peer for name, peer in found.items()},
        "selected": {"cells": parsed.cells, "peers": parsed.peers},
    }
    output = parsed.output
    if output is None and not parsed.cells and not parsed.peers:
        output = default_output(parsed.suite, header["device"])
    flush = timing.Flush()
    setup = Setup(peers, functools.partial(timing.time_in_turn, flush=flush.overwrite, repeats=parsed.repeats))
    save = functools.partial(timing.write_result, output) if output else lambda result: None
    result = run(parsed.suite, cells, setup, header, save)
    print_result(result)
    if output:
        print(f"written: {output}")
        if not draw(result, output.with_suffix(".png")):
            print(f"no picture, since matplotlib is not installed; --draw {output} makes it elsewhere")
    complaints = complain(result)
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
