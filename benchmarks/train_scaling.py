"""The training example on one GPU and on all of them: `python benchmarks/train_scaling.py`.

Two runs of examples/train.py, one after the other, that differ in nothing but the ranks: by default its 1.3 G model on
128 k-byte sequences of real text, bf16, FSDP2, activation checkpointing; on N ranks every sequence is shared by all of
them. Either run gets `--seconds`, and is ended then (at 128 k tokens a step takes one GPU tens of seconds); `--steps`
is what the learning rate's schedule is made for. Compared are the steps that both have done: losses, which must be
equal, and tokens per second, whose first step does not count. On GPUs the learning rates are
lower than the example's (RATES).

    make pair                                                       # 100 s a run
    make pair ARGS="--seconds 1200"                                 # all 50 steps
    make pair ARGS="--seconds 250 --folder runs/pair"               # the same in several calls
    make pair ARGS="--seqlen 16384 --seconds 60"                    # shorter ones, for the losses

Bars: losses within LOSS of each other, relative, in every step; SPEED times one GPU's tokens per second on two GPUs
(in proportion on more). The exit status is 1 if one is missed. On CPUs nothing is judged but the losses.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timing
import torch

from fa3_dist import _build

sys.path.insert(0, str(timing.ROOT / "examples"))

from plots import read_metrics  # noqa: E402

LOSS, SPEED = 1e-3, 0.95  # SPEED a GPU: 1.9 on two
# On GPUs, a tenth of the 1.3 G model's: with those, runs that differ by rounding drift 1e-3 apart in six steps (LOG.md,
# context parallelism, 25).
RATES = ("--lr", "1e-4", "--adam-lr", "4e-5")
GRACE = 180.0  # seconds for a run that is ended to finish its step, and to save what it goes on from


def train(
    ranks: int, flags: Sequence[str], seconds: float, folder: Path, go_on: bool = False
) -> list[dict[str, Any]]:
    """The metrics of the steps that a run on so many ranks does in that time. RuntimeError if it fails.

    go_on: it is saved when its time is up, and goes on from where an earlier call in that folder was.
    """
    out = folder / str(ranks)
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
               str(timing.ROOT / "examples" / "train.py"), "--cp", str(ranks), "--out", str(out),
               "--resume" if go_on else "--no-save", "--no-ablation", "--eval-sequences", "1", "--sample", "0",
               *flags]  # fmt: skip
    path = os.pathsep.join(filter(None, (str(timing.ROOT), os.environ.get("PYTHONPATH"))))
    log = folder / f"{ranks}.txt"
    with log.open("w") as file:
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=file, stderr=file)
        try:
            ended_itself = _wait(process, seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    if ended_itself and process.returncode:
        raise RuntimeError(f"the run on {ranks} ranks failed:\n{log.read_text()[-3000:]}")
    steps = steps_in(out)
    print(f"{ranks} ranks: {len(steps)} steps; " + "\n".join(log.read_text().splitlines()[-3:]), flush=True)
    return steps


def steps_in(out: Path) -> list[dict[str, Any]]:
    """The metrics of the steps that the run in this folder has done."""
    metrics = out / "metrics.jsonl"
    return [line for line in read_metrics(metrics) if "loss" in line] if metrics.exists() else []


def belongs(folder: Path, run: dict[str, Any]) -> bool:
    """Whether what is kept in this folder is of this run: its flags and kernels. A folder without a run becomes its."""
    told = folder / "run.json"
    if not told.exists():
        timing.write_result(told, run)
    return bool(json.loads(told.read_text()) == run)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether the process ended by itself in that time; else its ranks are asked to end, and waited for."""
    try:
        process.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        ask_to_end(process)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    return False


def ask_to_end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to what the process has started, or to itself if that is nothing. NOTE: torchrun passes it on, but kills
    its ranks 30 seconds later: a step at 128 k tokens and the saving of a large model take longer."""
    of_threads = [path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/children")]
    children = [int(pid) for text in of_threads for pid in text.split()]
    for pid in children or [process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def tokens_per_second(steps: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Of all steps but the first, which warms up; None if there are none."""
    speeds = [step["tokens_per_second"] for step in steps[1:]]
    return timing.spread(speeds) if speeds else None


def compare(alone: Sequence[dict[str, Any]], together: Sequence[dict[str, Any]], ranks: int) -> dict[str, Any]:
    """Losses of the steps that both did, and speeds."""
    both = list(zip(alone, together))
    differences = [abs(b["loss"] / a["loss"] - 1) for a, b in both]
    speeds = tokens_per_second(alone), tokens_per_second(together)
    ratio = speeds[1]["median"] / speeds[0]["median"] if speeds[0] and speeds[1] else None
    return {
        "steps": len(both), "losses": [[a["loss"], b["loss"]] for a, b in both],
        "largest_difference": max(differences, default=None),
        "mean_difference": statistics.mean(differences) if differences else None,
        "tokens_per_second": {"1": speeds[0], str(ranks): speeds[1]}, "speed_over_one": ratio,
        "memory_gib": [max((step["memory_gib"] for step in steps), default=None) for steps in (alone, together)],
    }  # fmt: skip


def complain(figures: dict[str, Any], ranks: int, is_cuda: bool) -> list[str]:
    """Bars that are missed; too few steps to judge are a failure."""
    complaints = []
    if not figures["steps"]:
        complaints.append("no step was done by both runs: give them more --seconds")
    elif not figures["largest_difference"] <= LOSS:
        complaints.append(f"losses differ by {figures['largest_difference']:.1e}, the bar is {LOSS:.0e}")
    if is_cuda and figures["speed_over_one"] is None:
        complaints.append("one of the runs did a single step: give them more --seconds")
    elif is_cuda and figures["speed_over_one"] < SPEED * ranks:
        speed = f"{figures['speed_over_one']:.3f} times one GPU's tokens per second"
        complaints.append(f"{speed}, the bar is {SPEED * ranks:.2f}")
    return complaints


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status. Flags that it does not know go to examples/train.py."""
    parser = argparse.ArgumentParser(
        description="The training example on one GPU and on all of them.", allow_abbrev=False,
        epilog="other flags are those of examples/train.py",
    )  # fmt: skip
    gpus = torch.cuda.device_count()
    parser.add_argument("--ranks", type=int, default=max(2, gpus), help="of the second run (default: all GPUs, or 2)")
    parser.add_argument("--seconds", type=float, default=100.0, help="of either run (default: 100)")
    parser.add_argument("--steps", type=int, default=50, help="that the schedule is made for (default: 50)")
    parser.add_argument("--folder", type=Path, help="keep the runs here; a later call with the same flags goes on with "
                        "those that have steps to do (default: they are not kept)")  # fmt: skip
    parser.add_argument("--output", type=Path, help="result file (default: none)")
    parsed, flags = parser.parse_known_args(arguments)
    if gpus and gpus < parsed.ranks:
        print(f"expected {parsed.ranks} GPUs, here are {gpus}", file=sys.stderr)
        return 2
    if gpus:
        flags = ["--model", "1b3", "--seqlen", "131072", "--checkpoint-activations", *RATES, *flags]
    flags = ["--steps", str(parsed.steps), "--eval-every", str(parsed.steps), *flags]
    run = {"ranks": parsed.ranks, "flags": flags, "csrc_hash": _build.csrc_hash()}
    if parsed.folder and not belongs(parsed.folder, run):
        print(f"{parsed.folder} has a run with other flags or kernels (run.json): expected {run}; name another folder",
              file=sys.stderr)  # fmt: skip
        return 2
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = parsed.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        alone, together = (
            done
            if len(done := steps_in(folder / str(ranks))) == parsed.steps
            else train(ranks, flags, parsed.seconds, folder, go_on=parsed.folder is not None)
            for ranks in (1, parsed.ranks)
        )
    figures = compare(alone, together, parsed.ranks)
    complaints = complain(figures, parsed.ranks, gpus > 0)
    speed = figures["speed_over_one"]
    last = figures["losses"][-1] if figures["losses"] else "-"
    print(f"{figures['steps']} steps, losses {last} at the last, largest difference "
          f"{figures['largest_difference']}; tokens per second of {parsed.ranks} over 1: "
          f"{'-' if speed is None else format(speed, '.3f')}; {time.monotonic() - started:.0f} s")  # fmt: skip
    if parsed.output:
        about = {"benchmark": "train_scaling", **timing.measured_on(None if gpus else "CPU"), "ranks": parsed.ranks,
                 "flags": flags, "seconds": parsed.seconds}  # fmt: skip
        timing.write_result(parsed.output, {**about, **figures, "summary": {"complaints": complaints}})
    return timing.exit_status(complaints)


if __name__ == "__main__":
    sys.exit(main())
