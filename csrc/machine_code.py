"""Checks what was built: no spills, and the instructions without which a kernel is on a slow path.

Reads build/report.json (written by build_library.py) and disassembles the rows' object files with cuobjdump. What a
row must have follows from its `kind` in instances.def. `make kernels` runs it; the exit status is 1 if a kernel fails.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from build_library import BUILD, MissingTool, find_cuda_tool

_FUNCTION = re.compile(r"^\s*Function : (\S+)", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


@dataclass(frozen=True)
class Rule:
    """What the kernels of a row must hold: opcodes by prefix, and a word in the names of kernels exempt from that."""

    opcodes: tuple[str, ...]
    exempt: str | None = None


RULES = {
    "memory": Rule(opcodes=("LDG.E.128",), exempt="strided"),
    "matrix": Rule(opcodes=("HGMMA", "UTMALDG")),
    "matrix8": Rule(opcodes=("QGMMA", "UTMALDG")),
}


def parse_sass(text: str) -> dict[str, set[str]]:
    """Opcodes of every function in the output of `cuobjdump --dump-sass`, by mangled name."""
    _, *pieces = _FUNCTION.split(text)
    return {name: set(_INSTRUCTION.findall(body)) for name, body in zip(pieces[::2], pieces[1::2], strict=True)}


def is_exempt(kernel: dict) -> bool:
    """Whether a kernel's name frees it from its rule's opcodes."""
    rule = RULES.get(kernel["kind"])
    return rule is not None and rule.exempt is not None and rule.exempt in kernel["kernel"]


def problems_of(kernel: dict, opcodes: set[str] | None) -> list[str]:
    """What is wrong with one kernel of the report, given the opcodes in its machine code."""
    rule = RULES.get(kernel["kind"])
    if rule is None:
        return [f"instances.def gives it the kind '{kernel['kind']}', which is none of {', '.join(RULES)}"]
    if opcodes is None:
        return ["its machine code is not in the object file"]
    problems = []
    if kernel["spill_stores"] or kernel["spill_loads"]:
        problems.append(f"spills registers ({kernel['spill_stores']} bytes stored, {kernel['spill_loads']} loaded)")
    if not is_exempt(kernel):
        for wanted in rule.opcodes:
            if not any(opcode == wanted or opcode.startswith(wanted + ".") for opcode in opcodes):
                problems.append(f"has no {wanted}")
    return problems


def check(report: dict, sass: dict[str, dict[str, set[str]]]) -> list[str]:
    """All problems of a build: `sass` maps each variant to its parsed machine code. An empty list is a good build."""
    problems = []
    for variant in report["variants"]:
        kernels = [kernel for kernel in report["kernels"] if kernel["variant"] == variant]
        if all(is_exempt(kernel) for kernel in kernels):
            problems.append(f"{variant}: has no kernel to check")
        for kernel in kernels:
            found = problems_of(kernel, sass[variant].get(kernel["symbol"]))
            problems += [f"{variant}: {kernel['kernel']} {problem}" for problem in found]
    return problems


def disassemble(path: Path) -> str:
    """The machine code of an object file as text. Raises MissingTool if the toolkit's disassemblers are missing."""
    tools = [find_cuda_tool("cuobjdump"), find_cuda_tool("nvdisasm")]
    if None in tools:
        raise MissingTool("cuobjdump and nvdisasm are needed: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    search = os.pathsep.join([*(str(tool.parent) for tool in tools if tool), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": search}  # cuobjdump calls nvdisasm
    command = [str(tools[0]), "--dump-sass", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def main() -> int:
    """Checks the last build; returns the exit status."""
    try:
        report = json.loads((BUILD / "report.json").read_text())
        sass = {name: parse_sass(disassemble(BUILD / path)) for name, path in report["objects"].items()}
    except (FileNotFoundError, MissingTool) as error:
        print(f"cannot check the machine code: {error}", file=sys.stderr)
        return 1
    problems = check(report, sass)
    for problem in problems:
        print(f"machine code: {problem}", file=sys.stderr)
    if not problems:
        kernels, variants = len(report["kernels"]), len(sass)
        print(f"machine code of {kernels} kernels in {variants} variants: no spills, every wanted instruction there")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
