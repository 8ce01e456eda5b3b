"""Facts about the compiled library and the sources it comes from, shared by the build, doctor, tests and benchmarks.

Imports nothing outside the standard library: setup.py loads this file where there is no torch.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
LIBRARY = PACKAGE / "lib" / "libfa3_dist.so"
CSRC = PACKAGE.parent / "csrc"

# What decides the library's machine code: sources, the list of variants, and the compilers' flags.
SOURCE_SUFFIXES = {".cpp", ".cu", ".cuh", ".h", ".def", ".flags"}

_ROW = re.compile(r"^FA3_(?P<family>[A-Z0-9_]+)\((?P<arguments>[^)]*)\)")


@dataclass(frozen=True)
class Row:
    """One compiled kernel variant: a row of csrc/instances.def."""

    family: str
    kind: str
    traits: tuple[str, ...]
    text: str

    @property
    def name(self) -> str:
        """Family and traits joined by '_': the variant's name everywhere ("delta_bf16")."""
        return "_".join((self.family, *self.traits))


def parse_row(line: str) -> Row | None:
    """The row written on a line of instances.def, or None if the line holds none."""
    match = _ROW.match(line)
    if match is None:
        return None
    kind, *traits = (argument.strip() for argument in match["arguments"].split(","))
    return Row(match["family"].lower(), kind, tuple(traits), line.strip())


def instances(csrc: Path = CSRC) -> list[Row]:
    """All rows of csrc/instances.def, in order.

    Raises FileNotFoundError where there is no source tree, ValueError if two rows have one name.
    """
    rows = [row for line in (csrc / "instances.def").read_text().splitlines() if (row := parse_row(line))]
    names = [row.name for row in rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"csrc/instances.def lists {', '.join(twice)} more than once; keep one row of each")
    return rows


def csrc_hash(csrc: Path = CSRC) -> str | None:
    """SHA-256 (first 16 hex digits) over the paths and contents of everything the library is compiled from.

    None where there is no source tree, as in an installed wheel.
    """
    if not (csrc / "instances.def").is_file():
        return None
    digest = hashlib.sha256()
    for path in sorted(path for path in csrc.rglob("*") if path.suffix in SOURCE_SUFFIXES and path.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(csrc).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]
