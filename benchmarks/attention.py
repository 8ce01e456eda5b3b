"""Speed of attention on a Hopper GPU beside its peers: `python benchmarks/attention.py --suite forward`.

    forward       dense, GQA, packed and windowed batches against cuDNN, FlashAttention-2 and what else is installed
    backward      the same for gradients, the memory that they take, and deterministic ones beside ordinary ones
    host          microseconds that one call keeps the host busy, with and without gradients
    continuation  one step of a ring: continuing from a running (out, lse), against plain attention, against merging
    ablation      our kernel with and without its parts (tune.py build --ablation), as FlashAttention-3's paper has them

All peers get the same N(0, 1) tensors and take turns call by call; a peer whose output differs from ours is an error
and no figure. TFLOP/s are 2 * visible pairs * heads * (head_dim + head_dim_v) over the time on the GPU, 2.5 times that
for a backward, which is timed through autograd; a dense causal batch counts as half its square. Bars in TFLOP/s are for
a GPU whose bf16 GEMM of 8192^3 runs at 800 and scale with the GEMM of the run itself; below 760 the run is invalid. The
exit status is 1 if a bar is missed or an output is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timing
import torch
import torch.nn.functional as F
from attention_cases import (
    ABLATION_CASE,
    CONTINUATION_CASE,
    HOST_CASE,
    Case,
    backward_cases,
    deterministic_cases,
    few_kv_heads_cases,
    forward_cases,
    make_inputs,
)
from attention_peers import (
    CannotRun,
    Peer,
    Work,
    backward_work,
    choose_peers,
    find_peers,
    first_result,
    forward_work,
    ours,
)
from attention_report import GEMM_LEAST, cell_line, complain, draw, print_result, summarise
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fa3_dist
from fa3_dist import ops
from fa3_dist.algebra import merge

REPEATS = 20
OUT, GRADIENTS = ("out",), ("dq", "dk", "dv")
# Relative L2. Two orders of the same bf16 arithmetic are 1e-3 to 3e-3 apart in out; in gradients more, for which P and
# dS are rounded too (2.6e-3 to 6.6e-3 between torch's bf16 kernel on the CPU and fp32). One key too many in a window of
# 4096 is 1e-2 in all of them.
LARGEST_DIFFERENCE: dict[tuple[str, ...], float] = {OUT: 5e-3, GRADIENTS: 8e-3}
HOST_BATCHES, HOST_CALLS = 40, 200
HOST_WARM_UP = 1.0  # seconds; a machine that was idle takes up to 1.5 times as long at first


# ---- measuring -------------------------------------------------------------------------------------------------------


class Setup(NamedTuple):
    """What a suite measures with."""

    peers: dict[str, Peer]
    time: Callable[[timing.Calls], dict[str, list[float]]]  # milliseconds of each call
    device: str = "cuda"
    extra_memory: Callable[[Work], int] = timing.extra_memory  # bytes


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|, in fp32; infinite between different shapes."""
    if actual.shape != expected.shape:
        return math.inf
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


class Cell:
    """A case on its way to figures: the calls that are right, an entry a peer, and what was wrong."""

    def __init__(self, case: Case, flop: int) -> None:
        self.case, self.flop = case, flop
        self.calls: dict[str, Work] = {}
        self.entries: dict[str, Any] = {}
        self.errors: list[str] = []

    def refuse(self, name: str, reason: str, is_error: bool = False) -> None:
        """No figure, and why."""
        self.calls.pop(name, None)
        self.entries[name] = {"ms": None, "tflops": None, "reason": reason}
        if is_error:
            self.errors.append(f"{name} {reason}")

    def accept(
        self, name: str, call: Work, results: tuple[str, ...], actual: Sequence[Tensor], expected: Sequence[Tensor]
    ) -> None:
        """Enters how far results that should agree are apart; where that is too far it is an error and no figure."""
        differences = list(map(relative_l2, actual, expected))
        for result, difference in zip(results, differences):
            if not difference <= (bound := LARGEST_DIFFERENCE[results]):
                reason = f"differs by {difference:.1e} in {result}, relative L2: {bound:.0e} is the bound"
                return self.refuse(name, reason, is_error=True)
        self.entries[name] = {"difference": max(differences)}
        self.calls[name] = call

    def check(self, builders: Mapping[str, Callable[[], Work]], results: tuple[str, ...]) -> None:
        """Builds every peer's call and checks its results against those of the first one that has any."""
        expected: Sequence[Tensor] | None = None
        for name, build in builders.items():
            try:
                call = first_result(build)
                actual = first_result(call)
            except CannotRun as reason:
                self.refuse(name, str(reason))
                continue
            if expected is None:
                expected, self.entries[name], self.calls[name] = actual, {}, call
            else:
                self.accept(name, call, results, actual, expected)
            del actual  # its memory is better free

    def time(self, setup: Setup) -> None:
        """Times the calls that are right, in turn."""
        for name, milliseconds in setup.time(self.calls).items():
            self.entries[name] |= timing.speed(milliseconds, self.flop)

    def described(self, **more: Any) -> dict[str, Any]:
        """The cell as a result file has it."""
        case = self.case
        about = {"name": case.name, **case.describe(), "flop": self.flop}
        return {**about, **more, "peers": self.entries, "errors": self.errors}


def measure_case(case: Case, setup: Setup) -> dict[str, Any]:
    """The forward of every peer."""
    x = make_inputs(case, setup.device)
    cell = Cell(case, case.flop)
    cell.check({name: functools.partial(forward_work, peer.build, case, x) for name, peer in setup.peers.items()}, OUT)
    cell.time(setup)
    return cell.described()


def measure_backward(case: Case, setup: Setup) -> dict[str, Any]:
    """The backward of every peer, and the bytes that it allocates beside its results."""
    x = make_inputs(case, setup.device, requires_grad=True)
    cell = Cell(case, case.backward_flop)
    builders = {name: functools.partial(backward_work, peer.build, case, x) for name, peer in setup.peers.items()}
    cell.check(builders, GRADIENTS)
    for name, call in cell.calls.items():
        cell.entries[name]["extra_bytes"] = setup.extra_memory(call)
    cell.time(setup)
    return cell.described(expected_bytes=case.backward_memory())


def measure_deterministic(case: Case, setup: Setup) -> dict[str, Any]:
    """Our deterministic backward beside our ordinary one; gradients that change from run to run are an error."""
    x = make_inputs(case, setup.device, requires_grad=True)
    cell = Cell(case, case.backward_flop)
    name, deterministic = "deterministic", functools.partial(ours, deterministic=True)
    builders = {name: functools.partial(backward_work, deterministic, case, x)}
    cell.check({"ours": functools.partial(backward_work, ours, case, x), **builders}, GRADIENTS)
    if call := cell.calls.get(name):
        expected = first_result(call)
        for result, a, b in zip(GRADIENTS, first_result(call), expected):
            if not torch.equal(a, b):
                cell.refuse(name, f"changes {result} from run to run", is_error=True)
                break
    cell.time(setup)
    return cell.described()


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
    """Microseconds from call to return, the mean of each of HOST_BATCHES batches, after batches that fill HOST_WARM_UP
    seconds; the GPU is idle when one begins."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    warm, measured = time.perf_counter() + HOST_WARM_UP, 0
    with _no_garbage_collection(), _on_one_cpu():
        while measured < HOST_BATCHES:
            is_warm = time.perf_counter() >= warm
            for name, call in calls.items():
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(HOST_CALLS):
                    call()
                microseconds = (time.perf_counter() - start) / HOST_CALLS * 1e6
                if is_warm:
                    times[name].append(microseconds)
            measured += is_warm
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


@contextlib.contextmanager
def _on_one_cpu() -> Iterator[None]:
    """Inside, the thread is on the last CPU that it may use: moved between CPUs, it takes up to 1.5 times as long."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


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

    def into(flags: int, k: Tensor, v: Tensor) -> Work:
        flags_of_visit = torch.full_like(start, flags)

        def call() -> tuple[Tensor]:
            ops.forward_into(x.q, k, v, out_acc, lse, None, **ranges, flags=flags_of_visit)
            return (out_acc,)

        return call

    begin = into(ops.FIRST, x.k.flip(0), x.v)  # keys that meet other values: a state to continue from
    continued: dict[str, Work] = {
        "continue": into(0, x.k, x.v),
        "merge": lambda: merge(out_acc, lse, *plain(out_dtype=torch.float32))[:1],
    }
    cell = Cell(case, case.flop)
    cell.entries["plain"], cell.calls["plain"] = {}, plain
    for name, call in continued.items():
        try:
            first_result(begin)
            expected, _ = merge(out_acc, lse, *first_result(plain))
            actual = first_result(call)
        except CannotRun as reason:
            cell.refuse(name, str(reason))
            continue
        cell.accept(name, call, OUT, actual, [expected])
    cell.time(setup)
    return cell.described()


# TFLOP/s on an H100 in FlashAttention-3's paper (arXiv:2407.08608, section 3)
PAPER = {"warp-specialised": 570, "... with ping-pong": 620, "... and overlap inside a warpgroup": 661}


def measure_ablation(setup: Setup) -> dict[str, Any]:
    """Our kernel with and without its parts, as `tune.py build --ablation` left it; cuDNN checks the outputs."""
    import tune  # NOTE: which imports this module

    variants = {name: peer for name, peer in setup.peers.items() if name in ("ours", "cudnn")}
    variants |= tune.ablation_peers(tune.ABLATION_FOLDER)
    return {**measure_case(ABLATION_CASE, setup._replace(peers=variants)), "paper": PAPER}


Measure = Callable[[Setup], dict[str, Any]]
SUITES: dict[str, Callable[[], dict[str, Measure]]] = {
    "forward": lambda: {case.name: functools.partial(measure_case, case) for case in forward_cases()},
    "backward": lambda: {
        **{case.name: functools.partial(measure_backward, case) for case in backward_cases()},
        **{case.name: functools.partial(measure_deterministic, case) for case in deterministic_cases()},
    },
    "few_kv_heads": lambda: {case.name: functools.partial(measure_backward, case) for case in few_kv_heads_cases()},
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
        output = timing.default_output(f"attention_{parsed.suite}", header["device"])
    has_backwards = parsed.suite in ("backward", "few_kv_heads")
    spin_cycles = timing.BACKWARD_SPIN_CYCLES if has_backwards else timing.SPIN_CYCLES
    flush = timing.Flush().overwrite
    setup = Setup(
        peers, functools.partial(timing.time_in_turn, flush=flush, repeats=parsed.repeats, spin_cycles=spin_cycles)
    )
    save = functools.partial(timing.write_result, output) if output else lambda result: None
    result = run(parsed.suite, cells, setup, header, save)
    print_result(result)
    if output:
        print(f"written: {output}")
        if not draw(result, output.with_suffix(".png")):
            print(f"no picture, since matplotlib is not installed; --draw {output} makes it elsewhere")
    return timing.exit_status(complain(result))


if __name__ == "__main__":
    sys.exit(main())
