"""Which tile shape is fastest: builds the forward kernel with each candidate and times them side by side.

    python benchmarks/tune.py build --head-dim 128 --candidates 128x128,128x160,192x128   where there is nvcc
    python benchmarks/tune.py run                                                         where there is a Hopper GPU
    python benchmarks/tune.py build --ablation                                            where there is nvcc

A candidate QUERIESxKEYS becomes a small library of its own in build/tune/, bf16, its tile shape for every mask, and one
team of consumers (config.cuh). `run` takes whatever it finds there, checks each output against cuDNN's and prints the
fastest for every mask and seqlen of the dense grid of attention.py; what it prints goes by hand into
csrc/forward/config.cuh. `build --ablation` makes the kernel of the ablation's head_dim with and without its parts, in
build/ablation/; attention.py times them.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import attention
import timing
import torch
from attention_cases import ABLATION_CASE, HEAD_DIMS, SEQLENS, Case, Inputs, dense_cases, dense_name, label
from attention_peers import Call, CannotRun, Peer, choose_peers, find_peers
from attention_report import cell_line

from fa3_dist import _build

sys.path.insert(0, str(timing.ROOT / "csrc"))

import build_library as builder  # noqa: E402

FOLDER = timing.ROOT / "build" / "tune"
ABLATION_FOLDER = timing.ROOT / "build" / "ablation"
ABLATION_TILE = 128, 128  # the library's own at that head_dim: csrc/forward/config.cuh
# What the kernel of the ablation may have, by macros of config.cuh, and the kernels with some of it.
PARTS = {"turns": "FA3_FORWARD_TURNS", "overlap": "FA3_FORWARD_OVERLAP"}
ABLATION = {"turns and overlap": ("turns", "overlap"), "overlap": ("overlap",), "turns": ("turns",), "neither": ()}
REPEATS = 12
SCRATCH_BYTES = 2**20  # zeros for what the kernel counts tiles in

# NOTE: every library defines its kernels in a namespace of its own, so that they can live in one process.
PREAMBLE = """\
#define fa3 fa3_{name}
#define FA3_FORWARD_TILE {{{queries}, {keys}}}
#define FA3_TUNE_HEAD_DIM {head_dim}
"""
# A contiguous dense batch as ForwardParams; returns a cudaError_t.
WRAPPER = """\
#include "forward/schedule.cuh"
#undef FA3_INSTANTIATE
#include "forward/forward.cuh"

extern "C" __attribute__((visibility("default"))) int fa3_tune_forward(
    const void* q, const void* k, const void* v, void* out, void* lse, void* scratch, int batch, int seqlen, int heads,
    int kv_heads, int causal, float softmax_scale, void* stream) {
  const auto strides = [&](int of_heads) {
    const int64_t row = int64_t(of_heads) * FA3_TUNE_HEAD_DIM;
    return fa3::Strides{batch > 1 ? row * seqlen : 0, seqlen > 1 ? row : 0, of_heads > 1 ? FA3_TUNE_HEAD_DIM : 0, 1};
  };
  fa3::ForwardParams params{};
  params.q = q;
  params.k = k;
  params.v = v;
  params.out = out;
  params.lse = static_cast<float*>(lse);
  params.tile_counter = static_cast<int32_t*>(scratch);
  params.q_stride = strides(heads);
  params.k_stride = params.v_stride = strides(kv_heads);
  params.batch = batch;
  params.seqlen_q = params.seqlen_k = seqlen;
  params.heads = heads;
  params.kv_heads = kv_heads;
  params.head_dim = params.head_dim_v = FA3_TUNE_HEAD_DIM;
  params.default_offset = true;
  params.window_left = fa3::kNoBound;
  params.window_right = causal ? 0 : fa3::kNoBound;
  params.softmax_scale = softmax_scale;
  params.out_dtype = fa3::DType::bf16;
  return fa3::launch_forward<fa3::DType::bf16, FA3_TUNE_HEAD_DIM, FA3_TUNE_HEAD_DIM>(
      params, static_cast<cudaStream_t>(stream));
}
"""
# of fa3_tune_forward: six pointers, five ints, softmax_scale, stream
ARGUMENTS: list[Any] = [*[ctypes.c_void_p] * 6, *[ctypes.c_int] * 5, ctypes.c_float, ctypes.c_void_p]


class Candidate(NamedTuple):
    """A tile shape for one head_dim; a kernel of ABLATION, or the one that config.cuh describes."""

    head_dim: int
    queries: int
    keys: int
    ablation: str = ""

    @property
    def tile(self) -> str:
        return f"{self.queries}x{self.keys}"

    @property
    def name(self) -> str:
        return f"d{self.head_dim}_{self.tile}" + (f"_{self.ablation.replace(' ', '_')}" if self.ablation else "")

    def unit(self) -> str:
        """The translation unit."""
        has = ABLATION.get(self.ablation)
        parts = {macro: str(part in has).lower() for part, macro in PARTS.items()} if has is not None else {}
        macros = "".join(f"#define {macro} {value}\n" for macro, value in parts.items())
        return PREAMBLE.format(name=self.name, **self._asdict()) + macros + WRAPPER


def parse_candidates(head_dim: int, text: str) -> list[Candidate]:
    """Candidates of a list like "128x128,192x112". Raises ValueError for a shape that no kernel can have."""
    found = []
    for shape in filter(None, map(str.strip, text.split(","))):
        match = re.fullmatch(r"(\d+)x(\d+)", shape)
        queries, keys = (int(match[1]), int(match[2])) if match else (0, 0)
        if queries <= 0 or queries % 64 or keys <= 0 or keys % 16 or keys > 256:
            raise ValueError(
                f"candidate '{shape}': expected QUERIESxKEYS, queries a multiple of 64 (a warpgroup each), keys a "
                "multiple of 16 up to 256 (one instruction each)"
            )
        found.append(Candidate(head_dim, queries, keys))
    if not found:
        raise ValueError("no candidates: expected a list like 128x128,192x112")
    return found


# ---- build -----------------------------------------------------------------------------------------------------------


def build_one(candidate: Candidate, tools: builder.Toolchain, folder: Path) -> dict[str, Any] | None:
    """Compiles one candidate and returns what is known of it, also written beside the library; None if it fails."""
    source, object_file, log, library, facts = (
        folder / f"{candidate.name}.{suffix}" for suffix in ("cu", "o", "log", "so", "json")
    )
    for path in (library, facts):
        path.unlink(missing_ok=True)
    builder.write_if_changed(source, candidate.unit())
    compiling = [
        tools.nvcc, "-optf", builder.CSRC / "nvcc.flags", "-ccbin", tools.gxx, f"-I{builder.CSRC}",
        "-isystem", tools.cutlass, "-c", source, "-o", object_file,
    ]
    linking = [
        tools.gxx, "-shared", "-o", library, object_file, f"-L{tools.cuda_lib}", "-lcudart_static", "-lrt", "-lpthread",
        "-ldl", "-Wl,--exclude-libs,ALL", "-Wl,-z,defs",
    ]
    with log.open("w") as output:
        for command in (compiling, linking):
            if subprocess.run(list(map(str, command)), stdout=output, stderr=subprocess.STDOUT).returncode:
                return None
    report = {
        **candidate._asdict(),
        "csrc_hash": _build.csrc_hash(builder.CSRC),
        "kernels": builder.parse_ptxas(log.read_text()),
    }
    facts.write_text(json.dumps(report, indent=2) + "\n")
    return report


def build(candidates: Sequence[Candidate], folder: Path) -> list[Candidate]:
    """Compiles all candidates, as many at a time as memory holds, and prints registers and spills; returns the failed.

    Raises MissingTool.
    """
    tools = builder.find_toolchain()
    if tools.cutlass is None:
        raise builder.MissingTool("CUTLASS is not installed: pip install --no-deps 'nvidia-cutlass==4.2.*'")
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    with ThreadPoolExecutor(builder.job_count()) as pool:
        for candidate, report in zip(candidates, pool.map(lambda c: build_one(c, tools, folder), candidates)):
            if report is None:
                failed.append(candidate)
                print(f"{candidate.name}: does not compile, see {folder / candidate.name}.log", flush=True)
                continue
            registers = max((kernel["registers"] for kernel in report["kernels"]), default=0)
            spills = sum(kernel["spill_stores"] + kernel["spill_loads"] for kernel in report["kernels"])
            print(f"{candidate.name}: {registers} registers, {spills} bytes of spills", flush=True)
    return failed


# ---- run -------------------------------------------------------------------------------------------------------------


def launch(candidate: Candidate, library: Path, case: Case, x: Inputs) -> Call:
    """A candidate's kernel as a call. Its buffers are allocated once; a failing launch raises RuntimeError."""
    function = ctypes.CDLL(str(library)).fa3_tune_forward
    function.argtypes, function.restype = ARGUMENTS, ctypes.c_int
    batch, seqlen = x.q.shape[:2]
    out = torch.empty_like(x.q)
    lse = torch.empty(batch, case.heads, seqlen, device=x.q.device)
    scratch = torch.zeros(SCRATCH_BYTES, dtype=torch.uint8, device=x.q.device)
    buffers = (x.q, x.k, x.v, out, lse, scratch)
    sizes = [batch, seqlen, case.heads, case.kv_heads, int(case.causal)]
    stream = torch.cuda.current_stream().cuda_stream

    def call() -> torch.Tensor:
        if error := function(*(buffer.data_ptr() for buffer in buffers), *sizes, case.head_dim**-0.5, stream):
            raise RuntimeError(f"launching {candidate.name} failed with cudaError_t {error}")
        return out

    return call


def ablation_candidates() -> list[Candidate]:
    """The kernels of ABLATION."""
    return [Candidate(ABLATION_CASE.head_dim, *ABLATION_TILE, ablation) for ablation in ABLATION]


def ablation_peers(folder: Path) -> dict[str, Peer]:
    """What `build --ablation` left in a folder, as peers; one that is missing or not of these sources says so."""

    def build_call(candidate: Candidate, case: Case, x: Inputs) -> Call:
        facts = folder / f"{candidate.name}.json"
        if not facts.exists() or json.loads(facts.read_text())["csrc_hash"] != _build.csrc_hash():
            raise CannotRun("not built from these sources: python benchmarks/tune.py build --ablation")
        return launch(candidate, facts.with_suffix(".so"), case, x)

    return {
        candidate.ablation: Peer(candidate.name, functools.partial(build_call, candidate))
        for candidate in ablation_candidates()
    }


def find_built(folder: Path) -> dict[Candidate, Path]:
    """The libraries of a folder; says which are from other sources than this tree's."""
    found = {}
    for facts in sorted(folder.glob("*.json")):
        report = json.loads(facts.read_text())
        candidate = Candidate(*(report[field] for field in Candidate._fields))
        found[candidate] = facts.with_suffix(".so")
        if report["csrc_hash"] != _build.csrc_hash():
            print(f"NOTE: {candidate.name} was built from csrc {report['csrc_hash']}, not from this tree")
    return found


def winner(cell: dict[str, Any]) -> str | None:
    """The fastest candidate of a cell, by its median; None if none ran."""
    speeds = {name: entry["tflops"]["median"] for name, entry in cell["peers"].items() if entry["tflops"]}
    speeds.pop("cudnn", None)
    return max(speeds, key=speeds.__getitem__) if speeds else None


def winners_table(cells: Sequence[dict[str, Any]], head_dim: int) -> list[str]:
    """The winners of one head_dim, a row a mask and a column a seqlen."""
    by_name = {cell["name"]: cell for cell in cells}
    lines = [f"{f'd{head_dim}':<8}" + "".join(f"{label(seqlen):>10}" for seqlen in SEQLENS)]
    for causal in (False, True):
        names = [dense_name(head_dim, causal, seqlen) for seqlen in SEQLENS]
        best = [(winner(by_name[name]) if name in by_name else None) or "-" for name in names]
        lines.append(f"{'causal' if causal else 'full':<8}" + "".join(f"{tile:>10}" for tile in best))
    return lines


def run(built: dict[Candidate, Path], setup: attention.Setup, patterns: Sequence[str]) -> list[dict[str, Any]]:
    """Times all candidates of each dense case's head_dim, cuDNN beside them, and prints what came of it."""
    cells = []
    for case in dense_cases():
        peers = {
            candidate.tile: Peer(candidate.name, functools.partial(launch, candidate, library))
            for candidate, library in built.items()
            if candidate.head_dim == case.head_dim
        }
        if peers and (not patterns or any(pattern in case.name for pattern in patterns)):
            cells.append(attention.measure_case(case, setup._replace(peers={**setup.peers, **peers})))
            print(f"{cell_line(cells[-1])}  best: {winner(cells[-1]) or 'none'}", flush=True)
    for head_dim in sorted({cell["head_dim"] for cell in cells}):
        print("\n".join(["", *winners_table(cells, head_dim)]))
    return cells


# ---- command line ----------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="Which tile shape of the forward kernel is fastest.")
    steps = parser.add_subparsers(dest="step", required=True)
    building = steps.add_parser("build", help="compile candidates into build/tune/")
    building.add_argument("--head-dim", type=int, choices=HEAD_DIMS)
    building.add_argument("--candidates", default="", help="tile shapes, queries x keys: 128x128,192x112")
    building.add_argument("--ablation", action="store_true", help="instead of these the variants of the ablation")
    running = steps.add_parser("run", help="time all that is in build/tune/")
    running.add_argument("--cells", type=attention.name_list, default=[], help='parts of case names: "causal_16k"')
    running.add_argument("--repeats", type=int, default=REPEATS, help=f"timings of each call (default: {REPEATS})")
    running.add_argument("--output", type=Path, help="write all figures to this JSON file")
    for step in (building, running):
        step.add_argument("--folder", type=Path, help="where the libraries lie (default: build/tune, build/ablation)")
    parsed = parser.parse_args(arguments)
    ablation = parsed.step == "build" and parsed.ablation
    if parsed.step == "build" and ablation == bool(parsed.head_dim and parsed.candidates):
        parser.error("build: give --head-dim and --candidates, or --ablation")
    parsed.folder = parsed.folder or (ABLATION_FOLDER if ablation else FOLDER)
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parsed = parse_arguments(arguments)
    if parsed.step == "build":
        try:
            chosen = ablation_candidates() if parsed.ablation else parse_candidates(parsed.head_dim, parsed.candidates)
            failed = build(chosen, parsed.folder)
        except (builder.MissingTool, ValueError) as error:
            print(error, file=sys.stderr)
            return 2
        return 1 if failed else 0
    if trouble := timing.why_no_hopper():
        print(trouble, file=sys.stderr)
        return 2
    built = find_built(parsed.folder)
    if not built:
        print(f"nothing in {parsed.folder}: `tune.py build` puts candidates there", file=sys.stderr)
        return 2
    cudnn = choose_peers(find_peers(), ["cudnn"])["cudnn"]
    time = functools.partial(timing.time_in_turn, flush=timing.Flush().overwrite, repeats=parsed.repeats)
    product = timing.speed(time({"gemm": timing.gemm()})["gemm"], timing.GEMM_FLOP)
    print(f"GEMM of 8192^3: {product['tflops']['median']:.0f} TFLOP/s")
    cells = run(built, attention.Setup({"cudnn": cudnn}, time), parsed.cells)
    if parsed.output:
        header = {"benchmark": "tune", **timing.measured_on(), "repeats": parsed.repeats, "gemm": product}
        timing.write_result(parsed.output, {**header, "cells": cells})
    return 1 if any(cell["errors"] for cell in cells) else 0


if __name__ == "__main__":
    sys.exit(main())
