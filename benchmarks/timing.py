"""What the benchmarks of this folder share: timing of GPU calls, and where a result file says that it comes from.

A call is timed by CUDA events round it, with a cold L2 and with the GPU kept busy while the host gets the call ready;
several calls take turns, so that a drift of clocks or temperature meets all of them alike.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fa3_dist import __version__, _build, ops

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FLUSH_BYTES = 256 * 2**20  # L2 holds 50 to 60 MB
SPIN_CYCLES = 200_000  # 0.1 ms at 2 GHz, longer than the host takes to launch a call
BACKWARD_SPIN_CYCLES = 2_000_000  # autograd takes it longer
GEMM_SIZE = 8192
GEMM_FLOP = 2 * GEMM_SIZE**3

Calls = Mapping[str, Callable[[], object]]


class Flush:
    """Ways to push out of L2 what the calls read."""

    def __init__(self) -> None:
        words = FLUSH_BYTES // 4
        self.written = torch.empty(words, dtype=torch.int32, device="cuda")
        self.clean = torch.zeros(words, dtype=torch.int32, device="cuda")

    def overwrite(self) -> None:
        """Fills L2 with dirty lines, as the kernel before attention does in a model."""
        self.written.zero_()

    def overwrite_and_clean(self) -> None:
        """Leaves no dirty line behind that would be written back during the call."""
        self.written.zero_()
        self.clean.max()


def time_in_turn(
    calls: Calls, flush: Callable[[], None], repeats: int, warmups: int = 3, spin_cycles: int = SPIN_CYCLES
) -> dict[str, list[float]]:
    """Milliseconds on the GPU of `repeats` runs of each call, after `warmups` runs that do not count.

    Says of which calls the GPU was through with the spin before the host was through with the call: then the time holds
    some of the host's.
    """
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    late = dict.fromkeys(calls, 0)
    for index in range(warmups + repeats):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush()
            torch.cuda._sleep(spin_cycles)
            start.record()
            call()
            end.record()
            if index >= warmups:
                late[name] += start.query()
                events[name].append((start, end))
    torch.cuda.synchronize()
    for name in filter(late.get, calls):
        print(f"NOTE: the GPU waited for the host in {late[name]} of {repeats} runs of {name}", file=sys.stderr)
    return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}


def extra_memory(call: Callable[[], object]) -> int:
    """Bytes allocated at the peak of a call, beside what was there before it and what it returns."""
    torch.cuda.reset_peak_memory_stats()
    result = call()
    extra = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    del result  # NOTE: it had to live until here, to be counted on both sides
    return extra


def spread(values: list[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def rate(amount: float, times: Mapping[str, float]) -> dict[str, float]:
    """`amount` over a spread of times: best, median and worst."""
    return {"best": amount / times["min"], "median": amount / times["median"], "worst": amount / times["max"]}


def speed(milliseconds: list[float], flop: float) -> dict[str, dict[str, float]]:
    """Times of a call that takes `flop` operations, as milliseconds and as TFLOP/s."""
    ms = spread(milliseconds)
    return {"ms": ms, "tflops": rate(flop / 1e9, ms)}


def gemm() -> Callable[[], object]:
    """A bf16 matrix product, GEMM_SIZE cubed: how fast this GPU is today."""
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return lambda: a @ b


# ---- what was measured on what ---------------------------------------------------------------------------------------


def why_no_hopper() -> str | None:
    """What keeps sm_90a kernels from running here, or None."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return "this benchmark needs a Hopper GPU; `python -m fa3_dist doctor` tells what is here"
    return None


def why_no_library() -> str | None:
    """Why the compiled library is not the one of this source tree, or None."""
    info = ops.library_info()
    if info is None or info["csrc_hash"] != _build.csrc_hash():
        return "the compiled library is missing or from other sources: `make kernels` builds it"
    return None


def commit() -> str | None:
    """FA3_DIST_COMMIT where it is set, for copies of a checkout; else the commit, with "+" if files differ from it."""
    if given := os.environ.get("FA3_DIST_COMMIT"):
        return given
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode:
        return None
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout
    return head.stdout.strip() + ("+" if changed else "")


def cudnn_version() -> str | None:
    """cuDNN's version as in "9.19.0"; None where torch has none."""
    number = torch.backends.cudnn.version()
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}" if number else None


def measured_on(device: str | None = None) -> dict[str, Any]:
    """Device (None: this GPU), versions and sources, as every result file has them."""
    return {
        "device": device or torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": cudnn_version(),
        "fa3_dist": __version__,
        "commit": commit(),
        "csrc_hash": _build.csrc_hash(),
        "library": ops.library_info(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def default_output(benchmark: str, device: str, gpus: int = 1) -> Path:
    """benchmarks/results/attention_forward_h200.json for attention_forward on an "NVIDIA H200"; 2xh200 on two."""
    gpu = device.removeprefix("NVIDIA ").split()[0].lower()
    return RESULTS / f"{benchmark}_{f'{gpus}x' if gpus > 1 else ''}{gpu}.json"


def exit_status(complaints: Sequence[str]) -> int:
    """Prints what makes a run a failure, and returns its exit status."""
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Writes a result file whole or not at all: a reader never sees half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result, indent=2) + "\n")
    unfinished.replace(path)
