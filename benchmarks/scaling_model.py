"""What context parallelism should cost on 2 to 512 GPUs: a model, which needs no GPU, beside what was measured.

    python benchmarks/scaling_model.py --seqlen 131072 --heads 32 --kv-heads 8

The times are those of `fa3_dist.parallel.plan.estimate`, by which mode="auto" chooses, with rates in place of its
orders of magnitude: of the kernels from result files of attention.py, of links and memory as they are given. Efficiency
is the time of the whole sequence on one GPU, from the same rates, over GPUs times the time on them. It prints a table
whose foot says what was measured, given or assumed, and writes that as JSON and as a picture.

`--measured FILE` holds the model against efficiencies that were measured, at the bandwidth and latency that the file
tells of; those of copies are a ring's within a host. What is read of it:

    {"device": "NVIDIA H200", "ranks": 2, "bandwidth": {"2": 3.4e11}, "latency": 1.2e-5,
     "copies": {"bandwidth": 3.6e11, "latency": 8e-6}, "cells": [
        {"seqlen": 32768, "batch": 1, "heads": 32, "kv_heads": 8, "head_dim": 128, "head_dim_v": 128, "causal": true,
         "window_left": null, "passes": {"forward": {"entries": {
             "ring": {"efficiency": 0.93, "ms": {"median": 12.3}}}}}}]}

The passes are forward and forward_backward, the entries ring, ring_again, all_to_all and product; what else there is,
packed documents and other head dims among it, is passed over. Without "copies", a ring's messages travel as all others.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import timing
import torch

from fa3_dist.parallel.plan import RATES, Call, Copies, Estimate, Links, Rates, Speed, estimate, mode_name
from fa3_dist.parallel.schedule import zigzag

MODES = ("ring", "all_to_all", "product")
PASSES = ("forward", "forward_backward")
GPUS = tuple(2**i for i in range(1, 10))
FORWARD = timing.RESULTS / "attention_forward_h200.json"
BACKWARD = timing.RESULTS / "attention_backward_h200.json"
LARGEST_DIFFERENCE = 0.05  # of an efficiency from the measured one
BACKWARD_OVER_FORWARD = 0.75  # FLOP/s, where no result file says
# Orders of magnitude for what no result file says: NVLink 4 has 450 GB/s a direction, a 400 Gbit/s adapter 50.
WITHIN, BETWEEN, GPUS_PER_HOST = 400e9, 45e9, 8


# ---- rates -----------------------------------------------------------------------------------------------------------


def read_speed(path: Path, head_dim: int, head_dim_v: int) -> Speed:
    """Our kernel's median FLOP/s over the length of its tiles (`Speed`), from the dense bf16 cells of a result file.

    Cells with as long ones (a causal one and a full one of half the length, say) count by their mean. Raises ValueError
    where there is no such cell.
    """
    found: dict[int, list[float]] = defaultdict(list)
    result = json.loads(path.read_text())
    for cell in result["cells"]:
        speed = cell["peers"].get("ours", {}).get("tflops")
        sizes = cell.get("head_dim"), cell.get("head_dim_v")
        whole = cell.get("seqlen") and cell.get("window_left") is None and cell.get("dtype") == "bfloat16"
        if speed and whole and sizes == (head_dim, head_dim_v) and not cell["errors"]:
            sharing = cell["heads"] // cell["kv_heads"] if result.get("suite") == "backward" else 1
            found[sharing * cell["seqlen"] // (2 if cell["causal"] else 1)].append(speed["median"] * 1e12)
    if not found:
        raise ValueError(f"{path} has no dense bf16 cell of head_dim {head_dim} and {head_dim_v} with a speed of ours")
    return tuple((float(length), statistics.fmean(speeds)) for length, speeds in sorted(found.items()))


def kernel_speeds(forward: str, backward: str | None, head_dim: int, head_dim_v: int) -> tuple[Speed, Speed, list[str]]:
    """Of forward and backward, each a result file or TFLOP/s; and where they come from, a line each."""
    if backward is None and BACKWARD.is_file():
        backward = str(BACKWARD)
    speeds: list[Speed] = []
    origins = []
    lengths = {"forward": "a query sees {:.0f} keys", "backward": "{:.0f} queries of all heads see a key"}
    for name, source in (("forward", forward), ("backward", backward)):
        if source is None:
            speeds.append(tuple((length, BACKWARD_OVER_FORWARD * rate) for length, rate in speeds[0]))
            origins.append(f"{name} kernel, assumed: {BACKWARD_OVER_FORWARD:g} times the forward's FLOP/s")
        elif is_number(source):
            speeds.append(((1.0, float(source) * 1e12),))
            origins.append(f"{name} kernel, given: {source} TFLOP/s")
        else:
            speeds.append(read_speed(Path(source), head_dim, head_dim_v))
            (least, slow), (most, fast) = speeds[-1][0], speeds[-1][-1]
            result = json.loads(Path(source).read_text())
            origins.append(f"{name} kernel, measured on one {result['device']} at commit {result.get('commit')}: "
                           f"{slow / 1e12:.0f} TFLOP/s where {lengths[name].format(least)} to {fast / 1e12:.0f} at "
                           f"{most:.0f} and beyond ({Path(source).name})")
    return speeds[0], speeds[1], origins


def is_number(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False


def make_links(parsed: argparse.Namespace, measured: dict[str, Any]) -> tuple[Links, str]:
    """Bytes/s in groups of so many ranks, as given, but for groups that were measured; and where they come from."""
    most = max(parsed.gpus)
    given = {parsed.gpus_per_host: parsed.within} | ({most: parsed.between} if most > parsed.gpus_per_host else {})
    known = {int(ranks): float(rate) for ranks, rate in measured.get("bandwidth", {}).items()}
    origin = f"those among {', '.join(map(str, known))} GPUs measured, the others given" if known else "given"
    copies = Copies(**measured["copies"]) if measured.get("copies") else None
    return replace(Links.given(given | known), latency=measured.get("latency", parsed.latency), copies=copies), origin


# ---- predictions -----------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """What is attended to: `batch` sequences of `seqlen` tokens."""

    call: Call
    seqlen: int
    batch: int = 1


class Machine(NamedTuple):
    rates: Rates
    links: Links
    gpus_per_host: int = GPUS_PER_HOST  # that copy engines reach


@dataclass(frozen=True)
class Prediction:
    """A mode on so many GPUs, and the same problem on one."""

    gpus: int
    mode: str
    estimate: Estimate
    alone: Estimate

    @property
    def name(self) -> str:
        return mode_name(self.estimate.head_ranks, self.gpus)

    def seconds(self, which: str) -> float:
        return _seconds(self.estimate, which)

    def efficiency(self, which: str) -> float:
        return _seconds(self.alone, which) / (self.gpus * self.seconds(which))

    def described(self) -> dict[str, Any]:
        passes = {which: {"seconds": self.seconds(which), "efficiency": self.efficiency(which)} for which in PASSES}
        return {"gpus": self.gpus, "mode": self.mode, "head_ranks": self.estimate.head_ranks, **passes,
                "attention_seconds": self.estimate.compute, "exposed_seconds": self.estimate.exposed,
                "bytes_moved": self.estimate.moved}


def _seconds(each: Estimate, which: str) -> float:
    return each.forward.seconds if which == "forward" else each.seconds


def predict(problem: Problem, machine: Machine, gpus: int, finds_kv: bool = False) -> dict[str, Prediction]:
    """By mode, those that the heads allow; the product is the fastest of its splits. finds_kv: as in `estimate`."""
    layouts = {world: zigzag((problem.seqlen,) * problem.batch, world) for world in (1, gpus)}
    links = machine.links if gpus <= machine.gpus_per_host else replace(machine.links, copies=None)
    alone = estimate(layouts[1], problem.call, 1, links, machine.rates)
    best: dict[str, Prediction] = {}
    for head_ranks in range(1, gpus + 1):
        if gpus % head_ranks or problem.call.heads % head_ranks:
            continue
        mode = "ring" if head_ranks == 1 else "all_to_all" if head_ranks == gpus else "product"
        each = estimate(layouts[gpus], problem.call, head_ranks, links, machine.rates, finds_kv)
        if mode not in best or each.seconds < best[mode].estimate.seconds:
            best[mode] = Prediction(gpus, mode, each, alone)
    return {mode: best[mode] for mode in MODES if mode in best}


def predict_entries(problem: Problem, machine: Machine, gpus: int) -> dict[str, Prediction]:
    """By the names of a result file, whose ring finds the last K/V in its backward, and whose ring_again does not."""
    return predict(problem, machine, gpus, finds_kv=True) | {"ring_again": predict(problem, machine, gpus)["ring"]}


# ---- measurements beside them ----------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    what: str
    which: str
    predicted: float  # efficiency
    measured: float
    predicted_ms: float
    measured_ms: float | None


def compare(result: dict[str, Any], machine: Machine, head_dims: tuple[int, int]) -> list[Comparison]:
    """The efficiencies of a result file beside those predicted, of cells with the heads that the rates are for."""
    found = []
    for cell in result["cells"]:
        if not cell.get("seqlen") or (cell["head_dim"], cell["head_dim_v"]) != head_dims:
            continue
        call = Call(cell["heads"], cell["kv_heads"], cell["head_dim"], cell["head_dim_v"], torch.bfloat16,
                    cell["window_left"], 0 if cell["causal"] else None)
        problem = Problem(call, cell["seqlen"], cell["batch"])
        predictions = predict_entries(problem, machine, result["ranks"])
        for which, name in itertools.product(PASSES, predictions):
            entry = cell["passes"].get(which, {}).get("entries", {}).get(name, {})
            if entry.get("efficiency") is None:
                continue
            each = predictions[name]
            mode = each.name if name in MODES else name
            what = f"{each.gpus} GPUs, {mode}, {problem.seqlen} tokens, {call.heads}:{call.kv_heads} heads"
            found.append(Comparison(what, which, each.efficiency(which), entry["efficiency"],
                                    1e3 * each.seconds(which), (entry.get("ms") or {}).get("median")))
    return found


# ---- output ----------------------------------------------------------------------------------------------------------


def table(predictions: Sequence[dict[str, Prediction]]) -> list[str]:
    """Efficiency and milliseconds, forward and with the backward, as Markdown."""
    lines = ["| GPUs | ring | all-to-all | product | its split |", "|---" * 5 + "|"]
    for by_mode in predictions:
        cells = []
        for mode in MODES:
            each = by_mode.get(mode)
            cells.append("-" if each is None else "; ".join(
                f"{each.efficiency(which):.2f} in {milliseconds(each.seconds(which))}" for which in PASSES
            ))
        split = by_mode["product"].name if "product" in by_mode else "-"
        gpus = next(iter(by_mode.values())).gpus
        lines.append(f"| {gpus} | {' | '.join(cells)} | {split} |")
    return lines


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def comparison_table(comparisons: Sequence[Comparison]) -> list[str]:
    """Efficiencies and milliseconds, predicted and measured, as Markdown."""
    head = ["", "pass", "predicted", "measured", "difference", "ms predicted", "ms measured"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for what, which, predicted, measured, predicted_ms, measured_ms in comparisons:
        times = f"{predicted_ms:.3g} | {'-' if measured_ms is None else f'{measured_ms:.3g}'}"
        figures = f"{predicted:.2f} | {measured:.2f} | {predicted - measured:+.2f}"
        lines.append(f"| {what} | {which} | {figures} | {times} |")
    if comparisons:
        farthest = max(abs(each.predicted - each.measured) for each in comparisons)
        verdict = "pass" if farthest <= LARGEST_DIFFERENCE else "MISSED"
        lines += ["", f"largest difference {farthest:.3f} (at most {LARGEST_DIFFERENCE:g}): {verdict}"]
    return lines


def assumptions(machine: Machine, origins: Sequence[str], links_origin: str) -> list[str]:
    """What the figures rest on, a line each."""
    rates, links, gpus_per_host = machine
    bandwidth = ", ".join(f"{rate / 1e9:g} GB/s among {ranks} neighbours" for ranks, rate in links.bandwidth)
    latency = rates.latency if links.latency is None else links.latency
    copies = links.copies and (f"a ring's messages, up to {gpus_per_host} GPUs, by copy engines as measured: "
                               f"{links.copies.bandwidth / 1e9:g} GB/s, latency {1e6 * links.copies.latency:g} us")
    return [
        "nothing in this table was measured on more than one GPU: these are predictions",
        *origins,
        f"links, {links_origin}: {bandwidth}, and more of them as the last; a rank sends and receives at full rate, "
        "whoever else does, and its messages slow no kernel down",
        f"latency of a message: {1e6 * latency:g} us; a launch of a further ring step and its last wave: "
        f"{1e6 * rates.step_seconds:g} us; a part of an all-to-all, beside its bytes and arithmetic: "
        f"{1e6 * rates.part_seconds:g} us",
        *([copies] if copies else []),
        f"device memory, given: {rates.memory / 1e12:g} TB/s for packing, for sums carried from step to step, for "
        "dK/dV that come back",
        "a kernel's rate depends on the keys that a query sees, not on the number of queries and heads; messages take "
        "no SMs from it",
        "tokens lie zigzag over the ranks; all ranks start together, and are as fast as each other",
        "an all-to-all hides behind attention to other heads as far as it comes in parts; delta, and the host, cost "
        "nothing more than on one GPU",
    ]


def draw(predictions: Sequence[dict[str, Prediction]], title: str, path: Path) -> bool:
    """Efficiency over GPUs, a line a mode, as a PNG; False, with nothing done, where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = {"ring": "#d9731a", "all_to_all": "#2a6fbb", "product": "#3a9a5b"}
    figure, panels = pyplot.subplots(1, len(PASSES), figsize=(12, 4.6), sharey=True, layout="constrained")
    for axes, which in zip(panels, PASSES):
        for mode in MODES:
            shown = [by_mode[mode] for by_mode in predictions if mode in by_mode]
            if shown:
                efficiencies = [each.efficiency(which) for each in shown]
                axes.plot([each.gpus for each in shown], efficiencies, "o-", color=colors[mode],
                          label=mode.replace("_", "-"))
        gpus = [next(iter(by_mode.values())).gpus for by_mode in predictions]
        axes.set_xscale("log", base=2)
        axes.set_xticks(gpus, list(map(str, gpus)))
        axes.set(title=which.replace("_", " and "), xlabel="GPUs", ylim=(0, 1.1))
        axes.axhline(1, color="#777777", linewidth=0.8)
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0].set_ylabel("predicted efficiency")
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return True


# ---- command line ----------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="Predicted efficiency of context parallelism.")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seqlen", type=int, default=131072, help="tokens of the sequence (default: 131072)")
    length.add_argument("--tokens-per-gpu", type=int, help="the sequence grows with the GPUs")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default: 1)")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--head-dim-v", type=int, help="(default: --head-dim)")
    parser.add_argument("--full", action="store_true", help="no causal mask")
    parser.add_argument("--window", type=int, metavar="LEFT", help="a query sees LEFT tokens before it")
    parser.add_argument("--gpus", type=lambda text: [int(part) for part in text.split(",")], default=list(GPUS),
                        help="numbers of GPUs (default: 2,4,...,512)")
    parser.add_argument("--forward", default=str(FORWARD), metavar="FILE|TFLOPS",
                        help=f"the kernel's speed: a number or a result file of attention.py (default: {FORWARD.name})")
    parser.add_argument("--backward", metavar="FILE|TFLOPS",
                        help=f"(default: {BACKWARD.name} if there, else {BACKWARD_OVER_FORWARD:g} of the forward)")
    parser.add_argument("--within", type=float, default=WITHIN,
                        help=f"bytes/s that a GPU sends within its host (default: {WITHIN:g})")
    parser.add_argument("--between", type=float, default=BETWEEN, help=f"and to other hosts (default: {BETWEEN:g})")
    parser.add_argument("--gpus-per-host", type=int, default=GPUS_PER_HOST)
    rates = RATES["cuda"]
    parser.add_argument("--latency", type=float, default=rates.latency, help=f"seconds a message ({rates.latency:g})")
    parser.add_argument("--step-seconds", type=float, default=rates.step_seconds,
                        help=f"of a further ring step, beside its work (default: {rates.step_seconds:g})")
    parser.add_argument("--part-seconds", type=float, default=rates.part_seconds,
                        help=f"of a part of an all-to-all, beside its work (default: {rates.part_seconds:g})")
    parser.add_argument("--memory", type=float, default=rates.memory,
                        help=f"bytes/s of device memory, read and written (default: {rates.memory:g})")
    parser.add_argument("--measured", type=Path, metavar="JSON", help="a result with efficiencies to compare with")
    parser.add_argument("--output", type=Path, default=timing.ROOT / "runs" / "scaling_model.json",
                        help="result; its picture goes beside it (default: runs/scaling_model.json)")
    parsed = parser.parse_args(arguments)
    sizes = [parsed.batch, parsed.heads, parsed.kv_heads, parsed.head_dim, parsed.gpus_per_host, *parsed.gpus,
             parsed.tokens_per_gpu or parsed.seqlen]
    if min(sizes) < 1 or parsed.heads % parsed.kv_heads:
        parser.error("expected sizes above 0, and --heads a multiple of --kv-heads")
    times = parsed.latency, parsed.step_seconds, parsed.part_seconds
    if min(parsed.within, parsed.between, parsed.memory) <= 0 or min(times) < 0:
        parser.error("expected rates above 0, and times of 0 or more")
    if parsed.full and parsed.window is not None:
        parser.error("--window is causal: expected it without --full")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parsed = parse_arguments(arguments)
    head_dim_v = parsed.head_dim_v or parsed.head_dim
    call = Call(parsed.heads, parsed.kv_heads, parsed.head_dim, head_dim_v, torch.bfloat16, parsed.window,
                None if parsed.full else 0)
    try:
        forward, backward, origins = kernel_speeds(parsed.forward, parsed.backward, parsed.head_dim, head_dim_v)
        measured = json.loads(parsed.measured.read_text()) if parsed.measured else {}
        if measured.get("device") == "CPU":
            raise ValueError(f"{parsed.measured} was measured on CPUs: expected GPUs, whose kernels this models")
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    links, links_origin = make_links(parsed, measured)
    rates = RATES["cuda"]._replace(
        forward=forward, backward=backward, memory=parsed.memory, step_seconds=parsed.step_seconds,
        part_seconds=parsed.part_seconds, latency=parsed.latency,
    )  # fmt: skip
    machine = Machine(rates, links, parsed.gpus_per_host)

    problems = {gpus: Problem(call, (parsed.tokens_per_gpu or 0) * gpus or parsed.seqlen, parsed.batch)
                for gpus in sorted(set(parsed.gpus))}
    predictions = [predict(problem, machine, gpus) for gpus, problem in problems.items()]
    comparisons = compare(measured, machine, (parsed.head_dim, head_dim_v)) if measured else []
    length = f"{parsed.tokens_per_gpu} tokens a GPU" if parsed.tokens_per_gpu else f"{parsed.seqlen} tokens"
    title = f"predicted: {length}, batch {parsed.batch}, {call}"
    foot = assumptions(machine, origins, links_origin)

    print("\n".join([title, "efficiency in milliseconds: forward; forward and backward", "", *table(predictions)]))
    print("\n".join(["", "What this rests on:", *(f"- {line}" for line in foot)]))
    if measured:
        print(f"\nBeside {parsed.measured.name}, measured on {measured['ranks']} x {measured['device']}:\n")
        print("\n".join(comparison_table(comparisons)) if comparisons else "it has no efficiency to compare with")
    result = {
        "model": "scaling", "title": title, "call": {**call._asdict(), "dtype": "bfloat16"}, "rates": rates._asdict(),
        "links": {"bandwidth": links.bandwidth, "latency": links.latency,
                  "copies": links.copies and links.copies._asdict()},
        "assumptions": foot,
        "predictions": [{"seqlen": problems[each.gpus].seqlen, **each.described()}
                        for by_mode in predictions for each in by_mode.values()],
        "compared": [comparison._asdict() for comparison in comparisons],
    }
    timing.write_result(parsed.output, result)
    drawn = draw(predictions, title, parsed.output.with_suffix(".png"))
    print(f"\nwritten: {parsed.output}" + (f", {parsed.output.with_suffix('.png').name}" if drawn else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
