"""What a run of attention.py comes to: its bars, tables and picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from attention_cases import (
    CONTINUATION_CASE,
    HEAD_DIMS,
    SEQLENS,
    backward_cases,
    dense_cases,
    dense_name,
    deterministic_cases,
    few_kv_heads_cases,
    label,
)

GEMM_NOMINAL, GEMM_LEAST = 800, 760  # TFLOP/s

# ---- bars ------------------------------------------------------------------------------------------------------------

Cells = dict[str, dict[str, Any]]  # by name


class Figure(NamedTuple):
    """A figure to hold against a bar, or None and why; `complete`: all cells that it is about were measured."""

    value: float | None
    note: str = ""
    complete: bool = True


class Bar(NamedTuple):
    """A figure that the run is judged by."""

    what: str
    figure: Callable[[Cells], Figure]
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


NOT_MEASURED = Figure(None, "not measured", complete=False)


def dense_ratios(cells: Cells, head_dims: Sequence[int] = HEAD_DIMS) -> dict[str, float]:
    """Speed of ours over cuDNN's, of those cells of the dense grid that have both."""
    names = [case.name for case in dense_cases() if case.head_dim in head_dims]
    ratios = {name: ratio(cells, name, "ours", "cudnn", "tflops") for name in names}
    return {name: value for name, value in ratios.items() if value is not None}


def geometric_mean(cells: Cells) -> Figure:
    """Of the dense grid's ratios."""
    ratios, size = dense_ratios(cells), len(dense_cases())
    if not ratios:
        return NOT_MEASURED
    mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
    return Figure(mean, f"{len(ratios)} of {size} cells", len(ratios) == size)


def smallest_ratio(cells: Cells, head_dims: Sequence[int] = HEAD_DIMS) -> Figure:
    """Of the dense grid's ratios, with its cell."""
    ratios = dense_ratios(cells, head_dims)
    if not ratios:
        return NOT_MEASURED
    name = min(ratios, key=ratios.__getitem__)
    return Figure(ratios[name], name, len(ratios) == sum(case.head_dim in head_dims for case in dense_cases()))


def _figure(value: float | None, cells: Cells, name: str, *peers: str) -> Figure:
    """A figure of one cell; without a value, why there is none."""
    if value is not None:
        return Figure(value)
    if name not in cells:
        return NOT_MEASURED
    if cells[name]["errors"]:
        return Figure(None, "results disagree")
    missing = [peer for peer in peers if "reason" in cells[name]["peers"].get(peer, {})]
    return Figure(None, f"not available: {', '.join(missing)}") if missing else NOT_MEASURED


def against_cudnn(name: str, bar: float) -> Bar:
    """Speed of ours over cuDNN's in one cell."""
    peers = "ours", "cudnn"
    return Bar(
        f"ours / cudnn, {name}",
        lambda cells: _figure(ratio(cells, name, *peers, "tflops"), cells, name, *peers), bar, "x",
    )


def absolute(name: str, bar: float) -> Bar:
    """Our TFLOP/s in one cell."""
    return Bar(
        name, lambda cells: _figure(median(cells, name, "ours", "tflops"), cells, name, "ours"), bar, "TFLOP/s"
    )


def host_time(name: str, bar: float) -> Bar:
    """Microseconds of the host a call of ours."""
    what = f"host, {name}"
    return Bar(
        what, lambda cells: _figure(median(cells, name, "ours", "us"), cells, name, "ours"), bar, "us", "at most"
    )


def time_ratio(what: str, name: str, of: str, to: str, bar: float) -> Bar:
    """Time of one peer over another's in one cell."""
    return Bar(
        what, lambda cells: _figure(ratio(cells, name, of, to, "ms"), cells, name, of, to), bar, "x", "at most"
    )


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
    "backward": [
        Bar("geometric mean of ours / cudnn, dense", geometric_mean, 1.19, "x"),
        Bar("smallest ours / cudnn, dense", smallest_ratio, 1.00, "x"),
        Bar("smallest ours / cudnn, head_dim 256", lambda cells: smallest_ratio(cells, (256,)), 1.15, "x"),
        against_cudnn("gqa_32_8_16k", 1.18),
        absolute("packed_web_64k", 300),
        absolute("packed_web_16k", 110),
        absolute("packed_code_64k", 560),
        absolute("packed_long_128k", 600),
        absolute("window_1024_32k_mha", 450),
        absolute("window_4096_128k", 575),
        *(
            time_ratio(f"time of {case.name} / ordinary", case.name, "deterministic", "ours", 1.10)
            for case in deterministic_cases()
        ),
    ],
    "few_kv_heads": [against_cudnn(case.name, 1.10) for case in few_kv_heads_cases()],
    "host": [host_time("no_grad", 12), host_time("grad", 25)],
    "continuation": [
        time_ratio("time of continue / plain", CONTINUATION_CASE.name, "continue", "plain", 1.05),
    ],
    "ablation": [],
}


def meets(value: float, level: float, sense: str) -> bool:
    """Whether a figure is "at least", or else "at most", so much."""
    return value >= level if sense == "at least" else value <= level


def summarise(suite: str, cells: Cells, gemm_tflops: float) -> list[dict[str, Any]]:
    """Every bar of the suite with the figure beside it; `passed` is None where not all of it was measured."""
    summary = []
    for bar in BARS[suite]:
        scale = gemm_tflops / GEMM_NOMINAL if bar.unit == "TFLOP/s" else 1.0
        level, figure = bar.bar * scale, bar.figure(cells)
        passed = None
        if figure.value is not None and figure.complete:
            passed = meets(figure.value, level, bar.sense)
        summary.append(
            {
                "what": bar.what,
                "value": figure.value,
                "note": figure.note,
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
    return complaints + gemm_complaint(result)


def gemm_complaint(result: dict[str, Any]) -> list[str]:
    """What makes a run invalid, if it is: a GPU that was slow at a plain product. `valid` None: nothing was judged."""
    if result["valid"] is not False:
        return []
    gemm = result["gemm"]["tflops"]["median"]
    return [f"the run is invalid: its GEMM ran at {gemm:.0f} TFLOP/s, {GEMM_LEAST} is the least"]


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


def memory_table(cells: Cells, peers: Sequence[str] = ("ours", "cudnn", "fa2")) -> list[str]:
    """MiB that a backward allocates beside its results, as Markdown; empty for cells that say nothing of it.

    Of the dense grid only the longest sequences: the others have as many tokens.
    """
    longest = {dense_name(head_dim, True, SEQLENS[-1]) for head_dim in HEAD_DIMS}
    names = longest | {case.name for case in backward_cases()} - {case.name for case in dense_cases()}
    lines = []
    for name, cell in cells.items():
        if name not in names or "expected_bytes" not in cell:
            continue
        extra = {peer: cell["peers"].get(peer, {}).get("extra_bytes") for peer in peers}
        expected = list(cell["expected_bytes"].values())
        rest = None if extra["ours"] is None else extra["ours"] - sum(expected)
        row = [extra["ours"], *expected, rest, *(extra[peer] for peer in peers if peer != "ours")]
        lines.append(f"| {name} | {' | '.join('-' if size is None else f'{size / 2**20:.2f}' for size in row)} |")
    if not lines:
        return []
    head = ["MiB at the peak", "ours", "= dq in fp32", "+ delta", "+ the rest", *(p for p in peers if p != "ours")]
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines]


def print_result(result: dict[str, Any]) -> None:
    """The tables for people, at the end of a run."""
    cells = {cell["name"]: cell for cell in result["cells"]}
    if dense_ratios(cells):
        print("\n".join(["", *dense_table(cells)]))
    if table := memory_table(cells):
        print("\n".join(["", *table]))
    for cell in result["cells"]:
        for what, tflops in cell.get("paper", {}).items():
            print(f"    {tflops} TFLOP/s on an H100 in FlashAttention-3's paper: {what}")
    if result["summary"]:
        width = max(len(line["what"]) for line in result["summary"])
        print(f"\n{'':<{width}} {'figure':>8} {'bar':>8}")
    for line in result["summary"]:
        verdict = {True: "pass", False: "FAIL", None: "not judged"}[line["passed"]]
        if line["passed"] and line["stretch"] is not None and line["value"] >= line["stretch"]:
            verdict = f"pass, stretch goal {line['stretch']:.4g} too"
        value = "-" if line["value"] is None else f"{line['value']:.4g}"
        print(f"{line['what']:<{width}} {value:>8} {line['bar']:>8.4g} {line['unit']:<8} {verdict}  {line['note']}")
    gemm = result["gemm"]["tflops"]
    print(f"GEMM of 8192^3: {gemm['median']:.0f} TFLOP/s ({gemm['worst']:.0f} to {gemm['best']:.0f})")


COLORS = {
    "ours": "#d9731a", "deterministic": "#8c4a10", "cudnn": "#2a6fbb", "fa2": "#777777", "fa3": "#3a9a5b",
    "flex": "#8a5fb0",
}


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
    if result["suite"] in ("forward", "backward"):
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
