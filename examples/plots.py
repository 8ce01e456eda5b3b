"""Metrics as JSON lines, and their picture.

A line is one object: {"step", "loss", "tokens_per_second", "memory_gib", "lr", "grad_norm"} for every step, and
{"step", "held_out_loss"} where the held-out text was scored.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

BLUE, ORANGE, GREY = "#2a6fbb", "#d9731a", "#777777"


class MetricsFile:
    """Appends to a file of JSON lines; after a resume, behind the lines of the steps that the checkpoint had done."""

    def __init__(self, path: Path, steps_done: int = 0) -> None:
        kept = [line for line in read_metrics(path) if line["step"] <= steps_done] if steps_done else []
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept))
        unfinished.replace(path)
        self.path, self.file = path, path.open("a", buffering=1)

    def write(self, **values: Any) -> None:
        self.file.write(json.dumps(values) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, none if there is no file. A last line that a kill cut short is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def plot(path: Path, title: str, runs: dict[str, list[dict[str, Any]]], bigram: float) -> None:
    """Loss, tokens per second and memory against steps, as a PNG; `runs` has up to two labels and their metrics."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(15, 4.6), width_ratios=(2, 1, 1), layout="constrained")
    loss, speed, memory = panels
    highest = bigram
    for color, (label, lines) in zip((BLUE, ORANGE), runs.items()):
        smooth = _curve(loss, lines, "loss", color, f"training, {label}")
        highest = max(highest, smooth[len(smooth) // 20 :].max(initial=0.0))
        steps, held_out = _series(lines, "held_out_loss")
        last = f": {held_out[-1]:.2f}" if len(held_out) else ""
        loss.plot(steps, held_out, "o", color=color, mec="white", ms=8, label=f"held-out, {label}{last}", zorder=3)
        _curve(speed, lines, "tokens_per_second", color, label)
        memory.plot(*_series(lines, "memory_gib"), color=color, linewidth=2.4 if color == BLUE else 1.2, label=label)
    loss.axhline(bigram, color=GREY, linestyle="--", linewidth=1.2, label=f"held-out, bigram table: {bigram:.2f}")
    loss.set_ylim(top=1.1 * highest)
    for axes, name in zip(panels, ("loss (nats a byte)", "tokens per second", "peak memory of a rank (GiB)")):
        axes.set(xlabel="step", title=name)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.02)
    for axes in (speed, memory):
        axes.set_ylim(bottom=0, top=1.25 * axes.get_ylim()[1])
        axes.legend(frameon=False, loc="upper right")
    loss.legend(frameon=False, loc="lower left")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _curve(axes: Any, lines: list[dict[str, Any]], name: str, color: str, label: str) -> np.ndarray:
    """Draws every step's value faintly and their running average on top of them; returns the average."""
    steps, values = _series(lines, name)
    smooth = _smooth(values)
    axes.plot(steps, values, color=color, alpha=0.22, linewidth=0.8)
    axes.plot(steps, smooth, color=color, linewidth=1.8, label=label)
    return smooth


def _series(lines: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(line["step"], line[name]) for line in lines if name in line]
    steps, values = np.array(pairs, dtype=float).reshape(-1, 2).T
    return steps, values


def _smooth(values: np.ndarray, keep: float = 0.9) -> np.ndarray:
    """Running average with weights keep ** age, without the pull of a first value."""
    total, weight, averages = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        averages.append(total / weight)
    return np.array(averages)
