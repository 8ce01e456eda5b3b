"""Lists committed results that are stale against csrc/, and figures of the README that no result file stands behind.

Part of `make check`; the exit status is 1 if the README names a file that is not there.
A stale result is listed and no error: it was measured, but on kernels that have changed since.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from fa3_dist import _build

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def stale_results() -> list[str]:
    """Result files measured on other sources than these."""
    now = _build.csrc_hash()
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        then = json.loads(path.read_text()).get("csrc_hash")
        if then != now:
            found.append(f"{path.relative_to(ROOT)}: measured on csrc {then}, the tree has {now}")
    return found


def missing_results(readme: str) -> list[str]:
    """Result files that the README names and that do not exist."""
    named = re.findall(r"`(benchmarks/results/[^`]+)`", readme)
    return [f"README.md names {name}, which does not exist" for name in named if not (ROOT / name).is_file()]


def main() -> int:
    """Prints what was found; returns the exit status."""
    missing = missing_results((ROOT / "README.md").read_text())
    for line in stale_results():
        print(f"stale result: {line}")
    for line in missing:
        print(line, file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
