"""Lists committed results that are stale or of unknown origin, and figures of the README that no result stands behind.

Part of `make check`; the exit status is 1 if the README names a file that is not there, or a result lacks its origin.
A stale result is listed and no error: it was measured, but on kernels, or judged by bars, that have changed since.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import attention_report
import context_parallel_report

from fa3_dist import _build

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ORIGIN = ("device", "torch", "cuda", "fa3_dist", "commit", "csrc_hash")


def read_results() -> dict[str, dict[str, Any]]:
    """The committed result files by their names."""
    return {f"benchmarks/results/{path.name}": json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def stale_results(results: dict[str, dict[str, Any]]) -> list[str]:
    """Result files measured on other sources than these, or judged by other bars."""
    now = _build.csrc_hash()
    found = []
    for name, result in results.items():
        then = result.get("csrc_hash")
        if then != now:
            found.append(f"{name}: measured on csrc {then}, the tree has {now}")
        if "summary" in result and not is_alike(result["summary"], judged_today(result)):
            found.append(f"{name}: judged by other bars than the tree's")
    return found


def is_alike(one: Any, other: Any) -> bool:
    """Equality but for the last digits of a sum, which are not every Python's."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-12)
    return bool(one == other)


def judged_today(result: dict[str, Any]) -> Any:
    """What the bars of this tree make of a result's cells; of benchmarks without bars what the result says."""
    cells = {cell["name"]: cell for cell in result.get("cells", [])}
    if result.get("benchmark") == "attention":
        return attention_report.summarise(result["suite"], cells, result["gemm"]["tflops"]["median"])
    if result.get("benchmark") == "context_parallel":
        return context_parallel_report.summarise(cells, result["judged"])
    return result["summary"]


def results_without_origin(results: dict[str, dict[str, Any]]) -> list[str]:
    """Result files that do not say on what they were measured."""
    missing = {name: [key for key in ORIGIN if not result.get(key)] for name, result in results.items()}
    return [f"{name} does not say its {', '.join(keys)}" for name, keys in missing.items() if keys]


def missing_results(readme: str) -> list[str]:
    """Result files that the README names and that do not exist."""
    named = re.findall(r"`(benchmarks/results/[^`]+)`", readme)
    return [f"README.md names {name}, which does not exist" for name in named if not (ROOT / name).is_file()]


def main() -> int:
    """Prints what was found; returns the exit status."""
    results = read_results()
    wrong = missing_results((ROOT / "README.md").read_text()) + results_without_origin(results)
    for line in stale_results(results):
        print(f"stale result: {line}")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
