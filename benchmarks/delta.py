"""Speed of the delta kernel against a device copy in the same process: `make bench`.

delta = rowsum(dout * out) - dlse reads two tensors once and writes one number a row, so its bar is the bandwidth of a
device copy (bytes read and written); below 80 % of that at any shape the exit status is 1. Each shape is first checked
against fp64. Before each timed call a buffer larger than L2 is written and then another read, so that nothing of the
inputs is cached and no dirty line of ours is written back inside the timed span.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from timing import (
    Flush,
    exit_status,
    measured_on,
    rate,
    spread,
    time_in_turn,
    why_no_hopper,
    why_no_library,
    write_result,
)
from torch import Tensor

from fa3_dist import ops

BAR = 0.80  # of the copy's bandwidth
WARMUPS, TIMINGS = 5, 50
COPY_BYTES = 2**30
# (batch, seqlen, heads, head_dim), dtype of dout, dtype of out, whether dlse is given
CASES = [
    ((1, 16384, 16, 128), torch.bfloat16, torch.bfloat16, False),
    ((1, 65536, 16, 128), torch.bfloat16, torch.bfloat16, False),
    ((1, 65536, 16, 128), torch.bfloat16, torch.bfloat16, True),
    ((4, 16384, 32, 128), torch.bfloat16, torch.bfloat16, False),
    ((1, 65536, 32, 64), torch.bfloat16, torch.bfloat16, False),
    ((1, 65536, 8, 256), torch.bfloat16, torch.bfloat16, False),
    ((1, 65536, 7, 128), torch.bfloat16, torch.bfloat16, False),
    ((1, 65536, 16, 96), torch.float16, torch.float16, False),
    ((1, 65536, 16, 128), torch.bfloat16, torch.float32, False),
    ((1, 32768, 16, 128), torch.float32, torch.float32, False),
]


def time_call(flush: Flush, call: Callable[[], object]) -> dict[str, float]:
    """Minimum, median and maximum of the call's microseconds."""
    milliseconds = time_in_turn({"call": call}, flush.overwrite_and_clean, TIMINGS, WARMUPS)["call"]
    return spread([1000 * value for value in milliseconds])


def terabytes_per_second(moved: int, microseconds: dict[str, float]) -> dict[str, float]:
    """Bandwidth of `moved` bytes: best, median and worst."""
    return rate(moved / 1e6, microseconds)


def error_against_fp64(delta: Tensor, dout: Tensor, out: Tensor, dlse: Tensor | None) -> float:
    """Largest error over the tokens of one batch entry at a time, relative to the sum of the terms' magnitudes."""
    worst = 0.0
    for index in range(dout.shape[0]):
        for start in range(0, dout.shape[1], 8192):
            span = slice(start, start + 8192)
            terms = dout[index, span].double() * out[index, span].double()
            expected, size = terms.sum(-1).T, terms.abs().sum(-1).T
            if dlse is not None:
                expected = expected - dlse[index, :, span].double()
                size = size + dlse[index, :, span].double().abs()
            worst = max(worst, ((delta[index, :, span].double() - expected).abs() / size.clamp_min(1e-30)).max().item())
    return worst


def measure_case(
    flush: Flush, shape: tuple[int, int, int, int], dout_dtype: torch.dtype, out_dtype: torch.dtype, with_dlse: bool
) -> dict:
    """Checks and times one case; dout and out are (B, S, H, Dv), the result (B, H, S)."""
    batch, seqlen, heads, _ = shape
    dout = torch.randn(shape, device="cuda").to(dout_dtype)
    out = torch.randn(shape, device="cuda").to(out_dtype)
    dlse = torch.randn(batch, heads, seqlen, device="cuda") if with_dlse else None
    error = error_against_fp64(ops.delta(dout, out, dlse), dout, out, dlse)
    microseconds = time_call(flush, lambda: ops.delta(dout, out, dlse))
    rows = batch * seqlen * heads
    moved = dout.nbytes + out.nbytes + rows * 4 * (2 if with_dlse else 1)
    return {
        "shape": list(shape),
        "dout": str(dout_dtype).removeprefix("torch."),
        "out": str(out_dtype).removeprefix("torch."),
        "dlse": with_dlse,
        "bytes": moved,
        "error": error,
        "microseconds": microseconds,
        "tb_per_s": terabytes_per_second(moved, microseconds),
    }


def measure_copy(flush: Flush) -> dict:
    """Times a device copy of COPY_BYTES; its bytes are those read plus those written."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    microseconds = time_call(flush, lambda: target.copy_(source))
    return {
        "bytes": 2 * COPY_BYTES,
        "microseconds": microseconds,
        "tb_per_s": terabytes_per_second(2 * COPY_BYTES, microseconds),
    }


def measure() -> dict:
    """The copy and all cases, with what they were measured on."""
    torch.manual_seed(0)
    flush = Flush()
    copy = measure_copy(flush)
    cases = []
    for case in CASES:
        result = measure_case(flush, *case)
        result["of_copy"] = result["tb_per_s"]["median"] / copy["tb_per_s"]["median"]
        cases.append(result)
    return {
        "benchmark": "delta",
        **measured_on(),
        "bar_of_copy": BAR,
        "copy": copy,
        "cases": cases,
    }


def print_table(result: dict) -> None:
    """The figures for people."""
    copy = result["copy"]["tb_per_s"]
    print(f"{result['device']}, torch {result['torch']}, csrc {result['csrc_hash']}")
    print(f"copy of {COPY_BYTES / 2**30:.0f} GiB: {copy['median']:.2f} TB/s (best {copy['best']:.2f})")
    columns = f"{'us min':>8} {'median':>8} {'max':>8} {'TB/s':>6} {'of copy':>8} {'error':>8}"
    print(f"{'shape':<22} {'dout/out':<19} {'dlse':<5} {columns}")
    for case in result["cases"]:
        shape, dtypes, us = "x".join(map(str, case["shape"])), f"{case['dout']}/{case['out']}", case["microseconds"]
        print(
            f"{shape:<22} {dtypes:<19} {'yes' if case['dlse'] else 'no':<5} {us['min']:>8.1f} {us['median']:>8.1f} "
            f"{us['max']:>8.1f} {case['tb_per_s']['median']:>6.2f} {case['of_copy']:>8.1%} {case['error']:>8.1e}"
        )


def complain(result: dict) -> list[str]:
    """What makes the result a failure: cases under the bar or wrong."""
    complaints = []
    for case in result["cases"]:
        name = f"{case['shape']} {case['dout']}/{case['out']}"
        if case["of_copy"] < BAR:
            complaints.append(f"{name}: {case['of_copy']:.1%} of the copy's bandwidth, the bar is {BAR:.0%}")
        if not case["error"] < 1e-5:
            complaints.append(f"{name}: off from fp64 by {case['error']:.1e} of the terms' sum")
    return complaints


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Speed of the delta kernel against a device copy.")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    if trouble := why_no_hopper() or why_no_library():
        print(trouble, file=sys.stderr)
        return 2
    result = measure()
    print_table(result)
    if arguments.output:
        write_result(arguments.output, result)
    return exit_status(complain(result))


if __name__ == "__main__":
    sys.exit(main())
