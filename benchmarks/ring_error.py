"""Error of context parallelism against fp64, from 2 ranks to 8, on one GPU: `python benchmarks/ring_error.py`.

All ranks run in one process, one after the other (`exchange.run_in_process`), through the very kernels and schedules
that a ring over NCCL runs; only the messages are copies. Each case goes through the ring, the ring with every step of
the backward in halves of the heads, the all-to-all and their products, forward and backward. Errors are relative L2
over all ranks, against attention in fp64 on the same rounded inputs.

Bars: with 4 and 8 ranks no error is more than FLAT times that of the ring of 2 (lse, which is never rounded to 16 bits,
plus a quarter of a unit of fp32), and none is more than twice that of textbook attention in the input's dtype, every
intermediate rounded to it. The exit status is 1 if one is missed.

On the CPU, `--device cpu --scale 32`, it runs small and exact, to try it out; such figures are not judged as kernels'.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import timing
import torch
from torch import Tensor

from fa3_dist.parallel import contiguous, packed, ring, zigzag
from fa3_dist.parallel.all_to_all import all_to_all_attention
from fa3_dist.parallel.exchange import Exchange, run_in_process
from fa3_dist.parallel.schedule import Layout
from fa3_dist.parallel.sharding import shard

FLAT = 1.1  # times the error of the ring of 2
TIMES_TEXTBOOK = 2.0
NAMES = ("out", "lse", "dq", "dk", "dv")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
QUERIES = 512  # of a block of the references


class Case(NamedTuple):
    """An attention problem over packed documents; windows None are unlimited, causal is right = 0."""

    name: str
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int = 128
    left: int | None = None
    right: int | None = 0
    layout: str = "zigzag"

    def make_layout(self, world: int) -> Layout:
        return {"zigzag": zigzag, "contiguous": contiguous, "packed": packed}[self.layout](self.lengths, world)


CASES = (
    Case("causal", (8192,), 16, 16),
    Case("causal, GQA 32:8", (8192,), 32, 8),
    Case("full", (8192,), 16, 16, right=None, layout="contiguous"),
    Case("window 1024, GQA 32:8", (8192,), 32, 8, left=1024),
    Case("packed, GQA 32:8", (1, 137, 2041, 89, 3824, 2100), 32, 8, layout="packed"),
    Case("causal, one KV head, d64", (8192,), 8, 1, 64),
    Case("causal, d256", (4096,), 8, 8, 256),
)


class Mode(NamedTuple):
    """A way to spread attention over ranks. in_halves: of the ring's backward, whatever the messages' sizes."""

    world: int
    head_ranks: int = 1
    in_halves: bool = False

    def __str__(self) -> str:
        rings = self.world // self.head_ranks
        names = [f"ring {rings}"] * (rings > 1) + [f"all_to_all {self.head_ranks}"] * (self.head_ranks > 1)
        return " x ".join(names) + " in halves" * self.in_halves


FIRST = Mode(2)  # what the others' errors are compared with
MODES = (
    FIRST, Mode(4), Mode(8), Mode(2, in_halves=True), Mode(8, in_halves=True),
    Mode(2, 2), Mode(4, 4), Mode(8, 8), Mode(4, 2), Mode(8, 2), Mode(8, 4),
)  # fmt: skip


class Inputs(NamedTuple):
    """Of all documents: q (T, H, D), k and v (T, G, D), dout (T, H, D), dlse (H, T)."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor


Results = dict[str, Tensor]  # by NAMES


def make_inputs(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    """N(0, 1), rounded to the dtype; the gradient of lse is fp32, as lse is."""
    generator = torch.Generator(device).manual_seed(0)
    tokens = sum(case.lengths)
    sizes = case.heads, case.kv_heads, case.kv_heads, case.heads
    q, k, v, dout = (
        torch.randn(tokens, heads, case.head_dim, device=device, generator=generator).to(dtype) for heads in sizes
    )
    return Inputs(q, k, v, dout, torch.randn(case.heads, tokens, device=device, generator=generator))


# ---- what is true ----------------------------------------------------------------------------------------------------


def textbook(case: Case, x: Inputs, dtype: torch.dtype) -> Results:
    """Attention and its gradients by definition, all of it in `dtype`: the truth in fp64, the measure in 16 bits.

    By documents and blocks of queries; gradients of keys are summed over the blocks in fp64.
    """
    q, k, v, dout, dlse = (tensor.to(dtype) for tensor in x)
    result = {"out": torch.zeros_like(q), "lse": torch.zeros_like(dlse), "dq": torch.zeros_like(q)}
    sums = {"dk": torch.zeros_like(k, dtype=torch.float64), "dv": torch.zeros_like(v, dtype=torch.float64)}
    for start, length in zip(accumulate(case.lengths, initial=0), case.lengths):
        for first in range(0, length, QUERIES):
            end = min(first + QUERIES, length)
            keys = slice(start + (0 if case.left is None else max(0, first - case.left)),
                         start + (length if case.right is None else min(length, end + case.right)))
            rows = slice(start + first, start + end)
            leaves = [tensor.detach().requires_grad_() for tensor in (q[rows], k[keys], v[keys])]
            out, lse = _attention(case, leaves[0], leaves[1], leaves[2], rows.start - keys.start)
            gradients = torch.autograd.grad((out, lse), leaves, (dout[rows], dlse[:, rows]))
            result["out"][rows], result["lse"][:, rows], result["dq"][rows] = out.detach(), lse.detach(), gradients[0]
            sums["dk"][keys] += gradients[1]
            sums["dv"][keys] += gradients[2]
    return result | {name: total.to(dtype) for name, total in sums.items()}


def _attention(case: Case, q: Tensor, k: Tensor, v: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """(S, H, D), (L, G, D) twice -> out (S, H, D), lse (H, S). offset: position of the first query minus first key."""
    readers = case.heads // case.kv_heads
    k, v = (tensor.repeat_interleave(readers, dim=1) for tensor in (k, v))
    scores = torch.einsum("shd,lhd->hsl", q, k) * case.head_dim**-0.5
    distance = torch.arange(k.shape[0], device=q.device) - torch.arange(q.shape[0], device=q.device)[:, None] - offset
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if case.left is not None:
        hidden |= distance < -case.left
    if case.right is not None:
        hidden |= distance > case.right
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(dim=-1)
    return torch.einsum("hsl,lhd->shd", (scores - lse[..., None]).exp(), v), lse


# ---- what ranks compute ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def halves(always: bool) -> Iterator[None]:
    """Inside, the ring's backward goes by halves of the heads however small its messages are."""
    shipped = ring.LEAST_HALF
    ring.LEAST_HALF = dict.fromkeys(shipped, 0) if always else shipped
    try:
        yield
    finally:
        ring.LEAST_HALF = shipped


def of_rank(exchange: Exchange, case: Case, x: Inputs, mode: Mode) -> tuple[Tensor, ...]:
    """This rank's rows of the results, tokens first."""
    layout, rank = case.make_layout(mode.world), exchange.rank
    *leaves, dout, dlse_rows = (shard(tensor, layout, rank).detach() for tensor in (*x[:4], x.dlse.t()))
    q, k, v = (tensor.requires_grad_() for tensor in leaves)
    out, lse = all_to_all_attention(
        q, k, v, layout=layout, rank=rank, exchange=exchange, head_ranks=mode.head_ranks, window_left=case.left,
        window_right=case.right,
    )  # fmt: skip
    gradients = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse_rows.t().contiguous()))
    return out.detach(), lse.detach().t(), *gradients


def together(case: Case, x: Inputs, mode: Mode) -> Results:
    """The results of all ranks, in the order of the documents."""
    with halves(mode.in_halves):
        of_ranks = run_in_process(mode.world, of_rank, case, x, mode)
    layout = case.make_layout(mode.world)
    tokens = torch.arange(sum(case.lengths), device=x.q.device)
    order = torch.cat([shard(tokens, layout, rank) for rank in range(mode.world)]).argsort()
    whole = dict(zip(NAMES, (torch.cat(parts)[order] for parts in zip(*of_ranks))))
    return whole | {"lse": whole["lse"].t()}


def errors(found: Results, exact: Results) -> dict[str, float]:
    """Relative L2 of each tensor; not a number counts as infinite."""

    def error(name: str) -> float:
        difference = ((found[name].double() - exact[name]).norm() / exact[name].norm()).item()
        return difference if difference == difference else float("inf")

    return {name: error(name) for name in NAMES}


def measure(case: Case, dtype_name: str, device: str) -> dict[str, Any]:
    """All modes of a case, beside textbook attention in the dtype."""
    dtype = DTYPES[dtype_name]
    x = make_inputs(case, dtype, device)
    exact = textbook(case, x, torch.float64)
    return {
        **case._asdict(), "name": f"{case.name}, {dtype_name}", "dtype": dtype_name,
        "textbook": errors(textbook(case, x, dtype), exact),
        "modes": {str(mode): errors(together(case, x, mode), exact) for mode in MODES},
    }  # fmt: skip


# ---- judging and printing --------------------------------------------------------------------------------------------


def flatness(cell: dict[str, Any], mode: str, name: str) -> float:
    """The error of a mode over that of the ring of 2."""
    first = cell["modes"][str(FIRST)][name]
    floor = torch.finfo(torch.float32).eps / 4 if name == "lse" else 0.0
    return max(cell["modes"][mode][name] - floor, 0.0) / first if first else 1.0


def complain(cells: Sequence[dict[str, Any]]) -> list[str]:
    """Errors that grow with the ranks, or that are large."""
    complaints = []
    for cell in cells:
        for mode, found in cell["modes"].items():
            for name, error in found.items():
                where = f"{cell['name']}, {mode}: {name} is off by {error:.2e}"
                if not flatness(cell, mode, name) <= FLAT:
                    complaints.append(f"{where}, {cell['modes'][str(FIRST)][name]:.2e} with {FIRST}")
                if name != "lse" and not error <= TIMES_TEXTBOOK * cell["textbook"][name]:
                    complaints.append(f"{where}, textbook attention by {cell['textbook'][name]:.2e}")
    return complaints


def summarise(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The worst of all, and what is wrong."""
    worst = max(
        ((flatness(cell, mode, name), f"{name} of {cell['name']}, {mode}") for cell in cells for mode in cell["modes"]
         for name in NAMES), default=(0.0, "nothing"),
    )  # fmt: skip
    return {"largest_growth": worst[0], "of": worst[1], "bar": FLAT, "complaints": complain(cells)}


def print_cell(cell: dict[str, Any]) -> None:
    """Errors of a case, one line a mode."""
    print(f"\n{cell['name']}\n  {'':<28}" + "".join(f"{name:>10}" for name in NAMES))
    for name, found in {"textbook": cell["textbook"], **cell["modes"]}.items():
        print(f"  {name:<28}" + "".join(f"{found[each]:>10.2e}" for each in NAMES))
    sys.stdout.flush()


# ---- command line ----------------------------------------------------------------------------------------------------


def scaled(case: Case, scale: int) -> Case:
    left = None if case.left is None else max(1, case.left // scale)
    return case._replace(lengths=tuple(max(1, length // scale) for length in case.lengths), left=left)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Error of context parallelism against fp64, from 2 ranks to 8.")
    parser.add_argument("--output", type=Path, help="result file (default: benchmarks/results/ring_error_GPU.json for "
                        "all cases on a GPU, else none)")  # fmt: skip
    parser.add_argument("--cells", help="only cases whose name contains this")
    parser.add_argument("--scale", type=int, default=1, help="divide the tokens of all documents by this (default: 1)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parsed = parser.parse_args(arguments)
    is_cuda = parsed.device == "cuda"
    if is_cuda and (trouble := timing.why_no_hopper() or timing.why_no_library()):
        print(trouble, file=sys.stderr)
        return 2
    if is_cuda:
        os.environ["FA3_DIST_STRICT"] = "1"  # our kernels or none
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    wanted = [scaled(case, parsed.scale) for case in CASES if parsed.cells is None or parsed.cells in case.name]
    started = time.monotonic()
    cells: list[dict[str, Any]] = []
    for case in wanted:
        for dtype_name in DTYPES:
            cells.append(measure(case, dtype_name, parsed.device))
            print_cell(cells[-1])
    summary = summarise(cells)
    print(f"\nlargest growth {summary['largest_growth']:.3f} (at most {FLAT}): {summary['of']}; "
          f"{time.monotonic() - started:.0f} s")  # fmt: skip
    output = parsed.output
    if output is None and is_cuda and parsed.scale == 1 and parsed.cells is None:
        output = timing.default_output("ring_error", torch.cuda.get_device_name())
    if output:
        about = {"benchmark": "ring_error", **timing.measured_on(None if is_cuda else "CPU"), "scale": parsed.scale}
        timing.write_result(output, {**about, "cells": cells, "summary": summary})
    return timing.exit_status(summary["complaints"])


if __name__ == "__main__":
    sys.exit(main())
