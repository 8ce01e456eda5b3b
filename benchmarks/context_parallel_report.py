"""What a run of context_parallel.py comes to: its bars, tables and picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from attention_report import NOT_MEASURED, Cells, Figure, gemm_complaint, meets

from fa3_dist.parallel.observe import COMMUNICATION, COMPUTE, uncovered

PASSES = {"forward": "forward", "forward_backward": "forward + backward"}
MODES = ("ring", "all_to_all")

# ---- bars ------------------------------------------------------------------------------------------------------------


class Bar(NamedTuple):
    """A figure that the run is judged by, as a share."""

    what: str
    figure: Callable[[Cells], Figure]
    bar: float
    sense: str


def of_the_ring(cells: Cells, name: str, which: str, key: str) -> Figure:
    """A figure of the ring in a pass of a cell."""
    if name not in cells or which not in cells[name]["passes"]:
        return NOT_MEASURED
    if cells[name]["errors"]:
        return Figure(None, "results disagree")
    entries = cells[name]["passes"][which]["entries"]
    value = entries.get("ring", {}).get(key)
    if value is not None:
        return Figure(value)
    reasons = [f"{peer}: {entries[peer]['reason']}" for peer in ("ring", "alone") if "reason" in entries.get(peer, {})]
    return Figure(None, "; ".join(reasons)) if reasons else NOT_MEASURED


def efficiency(name: str, which: str, bar: float) -> Bar:
    """Time alone over ranks times the time of the ring."""
    what = f"efficiency of the ring, {name} {PASSES[which]}"
    return Bar(what, lambda cells: of_the_ring(cells, name, which, "efficiency"), bar, "at least")


def exposed_share(name: str, which: str) -> Bar:
    """Time in which messages travel and nothing is computed, of all time."""
    what = f"exposed communication, {name} {PASSES[which]}"
    return Bar(what, lambda cells: of_the_ring(cells, name, which, "exposed_share"), 0.02, "at most")


def compute_imbalance(name: str, which: str) -> Bar:
    """Attention time of the busiest rank over the mean, minus 1."""
    what = f"imbalance of attention time, {name} {PASSES[which]}"
    return Bar(what, lambda cells: of_the_ring(cells, name, which, "compute_imbalance"), 0.03, "at most")


def area_imbalance(name: str) -> Bar:
    """Mask area of the busiest rank over the mean, minus 1."""

    def figure(cells: Cells) -> Figure:
        return Figure(cells[name]["area_imbalance"]) if name in cells else NOT_MEASURED

    return Bar(f"imbalance of mask area, {name}", figure, 0.03, "at most")


def memory(name: str) -> Bar:
    """How far the peak of the rank that is furthest off lies from what is expected."""

    def figure(cells: Cells) -> Figure:
        return of_the_ring(cells, name, "forward_backward", "memory_off")

    return Bar(f"peak memory off the expected one, {name}", figure, 0.10, "at most")


def choice(name: str) -> Bar:
    """Time of the mode that "auto" takes over that of the faster one, forward and backward."""

    def figure(cells: Cells) -> Figure:
        if name not in cells or "chosen" not in cells[name] or "forward_backward" not in cells[name]["passes"]:
            return NOT_MEASURED
        entries = cells[name]["passes"]["forward_backward"]["entries"]
        times = {mode: entries[mode]["ms"]["median"] for mode in MODES if entries.get(mode, {}).get("ms")}
        if len(times) < len(MODES) or cells[name]["chosen"] not in times:
            return NOT_MEASURED
        fastest = min(times, key=lambda mode: times[mode])
        chosen = cells[name]["chosen"]
        note = chosen if chosen == fastest else f"{chosen} is chosen, {fastest} is faster"
        return Figure(times[chosen] / times[fastest], note)

    return Bar(f"mode chosen over the faster one, {name}", figure, 1.15, "at most")


LONG, PACKED = ("mha_32k", "gqa_32k", "mha_128k", "gqa_128k"), ("packed_web_64k", "packed_code_64k")
LEAST_EFFICIENCY = {
    "gqa_8k": 0.80, "mha_32k": 0.95, "gqa_32k": 0.95, "mha_128k": 0.98, "gqa_128k": 0.98, **dict.fromkeys(PACKED, 0.90),
}
BARS = [
    *(efficiency(name, which, least) for name, least in LEAST_EFFICIENCY.items() for which in PASSES),
    *(exposed_share(name, which) for name in LONG for which in PASSES),
    *(area_imbalance(name) for name in PACKED),
    *(compute_imbalance(name, which) for name in PACKED for which in PASSES),
    *(choice(name) for name in LEAST_EFFICIENCY),
    choice("mha_8k"),
    memory("gqa_1m"),
]


def summarise(cells: Cells, judged: bool) -> list[dict[str, Any]]:
    """Every bar with the figure beside it; `passed` is None where it was not measured, or nothing is to be judged."""
    summary = []
    for bar in BARS:
        figure, passed = bar.figure(cells), None
        if figure.value is not None and judged:
            passed = meets(figure.value, bar.bar, bar.sense)
        summary.append({
            "what": bar.what, "value": figure.value, "note": figure.note, "bar": bar.bar, "sense": bar.sense,
            "passed": passed,
        })
    return summary


def complain(result: dict[str, Any]) -> list[str]:
    """What makes the result a failure."""
    complaints = [f"{cell['name']}: {error}" for cell in result["cells"] for error in cell["errors"]]
    for line in result["summary"]:
        if line["passed"] is False:
            complaints.append(f"{line['what']}: {line['value']:.4g}, the bar is {line['sense']} {line['bar']:.4g}")
    return complaints + gemm_complaint(result)


# ---- tables ----------------------------------------------------------------------------------------------------------

COLUMNS = ("ms", "TFLOP/s", "efficiency", "bound", "exposed ms", "of all", "imbalance", "MB sent", "GiB", "expected")


def cell_lines(cell: dict[str, Any]) -> list[str]:
    """A cell as a table a pass: a row a peer; TFLOP/s are a GPU's, bytes those of the rank with most of them."""
    heads = f"{cell['heads']}:{cell['kv_heads']} heads of {cell['head_dim']}"
    tokens = sum(cell["tokens_of_ranks"])
    lines = [f"{cell['name']}: {tokens} tokens on {len(cell['tokens_of_ranks'])} ranks, {heads}, "
             f"imbalance of mask area {cell['area_imbalance']:.1%}"]
    for which, measured in cell["passes"].items():
        lines.append(f"  {PASSES[which]:<22}" + "".join(f"{column:>11}" for column in COLUMNS))
        lines += [f"    {name:<20}{_row(entry)}" for name, entry in measured["entries"].items()]
    return lines + [f"    WRONG: {error}" for error in cell["errors"]]


def _row(entry: dict[str, Any]) -> str:
    if "reason" in entry:
        return f"{'-':>11}  {entry['reason']}"

    def number(key: str, form: str, scale: float = 1.0) -> str:
        value = entry.get(key)
        if value is None:
            return "-"
        return format(scale * (value["median"] if isinstance(value, dict) else max(value) if isinstance(value, list)
                               else value), form)

    figures = (
        number("ms", ".3f"), number("tflops", ".3g"), number("efficiency", ".3f"), number("bound", ".3f"),
        number("exposed_ms", ".3f"), number("exposed_share", ".1%"), number("compute_imbalance", ".1%"),
        number("bytes_sent", ".2f", 1e-6), number("peak_bytes", ".2f", 2**-30), number("expected_bytes", ".2f", 2**-30),
    )
    notes = [f"unchecked: {entry['unchecked']}"] if "unchecked" in entry else []
    if entry.get("host_was_late"):
        notes.append(f"the host was late {entry['host_was_late']} times")
    return "".join(f"{figure:>11}" for figure in figures) + "".join(f"  ({note})" for note in notes)


def step_lines(cell: dict[str, Any]) -> list[str]:
    """Every span of the ring: milliseconds since the call began on its rank."""
    lines = []
    for which, measured in cell["passes"].items():
        for step in measured["entries"].get("ring", {}).get("steps", []):
            line = f"    {PASSES[which]}, rank {step['rank']}, step {step['step']}: {step['what']:<9}"
            line += f"{step['start']:>10.3f} to {step['end']:>10.3f} ms"
            if step["kind"] == COMMUNICATION:
                line += f", {step['exposed']:.3f} exposed, {step['bytes_sent'] / 1e6:.2f} MB sent"
            lines.append(line)
    return lines


def margin_lines(cells: list[dict[str, Any]]) -> list[str]:
    """For each margin of SMs beside the first one: time of the ring over that with the first, in every pass."""
    ratios: dict[str, dict[str, float]] = {}
    for cell in cells:
        for which, measured in cell["passes"].items():
            entries = measured["entries"]
            for name, entry in entries.items():
                if name.startswith("ring_margin_") and entry.get("ms") and entries.get("ring", {}).get("ms"):
                    ratio = entry["ms"]["median"] / entries["ring"]["ms"]["median"]
                    ratios.setdefault(name, {})[f"{cell['name']} {PASSES[which]}"] = ratio
    return [
        f"{name} over ring: {statistics.geometric_mean(each.values()):.4f} ("
        + ", ".join(f"{where} {ratio:.3f}" for where, ratio in each.items()) + ")"
        for name, each in ratios.items()
    ]  # fmt: skip


def print_summary(result: dict[str, Any]) -> None:
    """The bars for people, at the end of a run."""
    width = max(len(line["what"]) for line in result["summary"])
    print(f"\n{'':<{width}} {'figure':>8} {'bar':>8}")
    for line in result["summary"]:
        verdict = {True: "pass", False: "FAIL", None: "not judged"}[line["passed"]]
        value = "-" if line["value"] is None else f"{line['value']:.4g}"
        print(f"{line['what']:<{width}} {value:>8} {line['bar']:>8.4g} {verdict}  {line['note']}")
    bandwidth = ", ".join(f"{rate / 1e9:.3g} GB/s in groups of {ranks}" for ranks, rate in result["bandwidth"].items())
    copies = f"; by copy engines {result['copies']['bandwidth'] / 1e9:.3g} GB/s" if result["copies"] else ""
    print(f"links: {bandwidth}{copies}", *margin_lines(result["cells"]), sep="\n")
    if result["gemm"]:
        gemm = result["gemm"]["tflops"]
        print(f"GEMM of 8192^3 on the slowest GPU: {gemm['median']:.0f} TFLOP/s")


# ---- picture ---------------------------------------------------------------------------------------------------------

COLORS = {"forward": "#2a6fbb", "backward": "#1d4a7a"}  # of attention; messages are orange, their exposed part red
MESSAGES, EXPOSED = "#e8a44c", "#c0392b"


def draw(result: dict[str, Any], path: Path) -> bool:
    """Timelines of all passes as a PNG; False, with nothing done, where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [
        (cell, which, name, measured["entries"][name])
        for cell in result["cells"]
        for name in MODES
        for which, measured in cell["passes"].items()
        if measured["entries"].get(name, {}).get("steps")
    ]
    rows = max(1, -(-len(shown) // 2))
    height = 0.9 + 0.34 * len(result["cells"][0]["tokens_of_ranks"]) * 2 if result["cells"] else 2.0
    figure, axes = pyplot.subplots(rows, 2, figsize=(15, 0.8 + rows * height), layout="constrained", squeeze=False)
    for place in axes.flat:
        place.set_visible(False)
    for place, (cell, which, name, entry) in zip(axes.flat, shown):
        place.set_visible(True)
        _draw_timeline(place, entry, len(cell["tokens_of_ranks"]))
        share = f"efficiency {entry['efficiency']:.3f}, " if "efficiency" in entry else ""
        title = f"{name}, {cell['name']} {PASSES[which]}: {share}exposed {entry['exposed_share']:.1%}"
        place.set_title(title, fontsize=10)
    valid = ", INVALID: a GPU was slow" if result["valid"] is False else ""
    colors = "attention blue (the backward darker), messages orange, exposed red; numbers are steps"
    figure.suptitle(f"context parallelism, {result['ranks']} x {result['device']}: {colors}{valid}", fontsize=11)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    return True


def _draw_timeline(axes: Any, entry: dict[str, Any], ranks: int) -> None:
    """Two rows a rank: attention, and messages with the parts of them that no attention hides."""
    for rank in range(ranks):
        spans = [step for step in entry["steps"] if step["rank"] == rank]
        compute = [(step["start"], step["end"]) for step in spans if step["kind"] == COMPUTE]
        for step in spans:
            is_compute = step["kind"] == COMPUTE
            row, color = 2 * rank + (not is_compute), COLORS[step["what"]] if is_compute else MESSAGES
            length = step["end"] - step["start"]
            axes.barh(row, length, left=step["start"], height=0.8, color=color, edgecolor="white", linewidth=0.6)
            if not is_compute:
                for start, end in uncovered([(step["start"], step["end"])], compute):
                    axes.barh(row, end - start, left=start, height=0.8, color=EXPOSED)
            if length > 0.03 * entry["traced_ms"]:
                axes.text(step["start"] + length / 2, row, str(step["step"]), ha="center", va="center", fontsize=7,
                          color="white" if is_compute else "black")
    names = [f"rank {rank} {what}" for rank in range(ranks) for what in ("attention", "messages")]
    axes.set_yticks(range(2 * ranks), names, fontsize=8)
    axes.set_ylim(2 * ranks - 0.5, -0.5)
    axes.set_xlim(0, entry["traced_ms"])
    axes.set_xlabel("ms", fontsize=8)
