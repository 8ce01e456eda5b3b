"""Checks what was built: no spills where they cost, and the instructions without which a kernel is on a slow path.

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
from typing import NamedTuple

from build_library import BUILD, MissingTool, find_cuda_tool

_FUNCTION = re.compile(r"^\s*Function : (\S+)", re.MULTILINE)
_INSTRUCTION = re.compile(
    r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<predicate>@!?\w+\s+)?(?P<opcode>[A-Z][A-Z0-9_.]*)"
    r"(?P<operands>[^;]*)",
    re.MULTILINE,
)
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
_SPILLS = ("STL", "LDL")


class Instruction(NamedTuple):
    """One machine instruction; `target` is the address that a branch goes to, `ends` whether nothing follows it."""

    address: int
    opcode: str
    target: int | None = None
    ends: bool = False

    def is_a(self, opcode: str) -> bool:
        """Whether it is this opcode, whatever its modifiers."""
        return self.opcode == opcode or self.opcode.startswith(opcode + ".")


@dataclass(frozen=True)
class Rule:
    """What the kernels of a row must hold.

    `opcodes` by prefix; kernels with a word of `exempt` in their names need not. Where `loops` is an opcode, registers
    may be spilled outside of the innermost loops that hold it; otherwise nowhere. In these loops at least the share
    `hidden_share` of `hidden` stands between two waits for asynchronous products, with no product started in between. A
    compiler that moves the second wait up lets nothing overlap.
    """

    opcodes: tuple[str, ...] = ()
    exempt: tuple[str, ...] = ()
    loops: str | None = None
    hidden: str | None = None
    hidden_share: float = 0.9  # the rest may rescale earlier results, which needs them


RULES = {
    "memory": Rule(opcodes=("LDG.E.128",), exempt=("strided",)),
    "control": Rule(),
    "matrix": Rule(opcodes=("HGMMA", "UTMALDG"), loops="HGMMA", hidden="MUFU.EX2"),
    "halves": Rule(opcodes=("HGMMA", "UTMALDG"), loops="HGMMA", hidden="MUFU.EX2", hidden_share=0.45),
    "gradient": Rule(opcodes=("HGMMA", "UTMALDG"), exempt=("clear", "convert", "round", "sum_parts"), loops="HGMMA"),
    "matrix8": Rule(opcodes=("QGMMA", "UTMALDG"), loops="QGMMA", hidden="MUFU.EX2"),
}
_WAIT = "WARPGROUP.DEPBAR"


def parse_sass(text: str) -> dict[str, list[Instruction]]:
    """The instructions of every function in the output of `cuobjdump --dump-sass`, by mangled name."""
    _, *pieces = _FUNCTION.split(text)
    return {name: _instructions(body) for name, body in zip(pieces[::2], pieces[1::2], strict=True)}


def _instructions(body: str) -> list[Instruction]:
    found = []
    for match in _INSTRUCTION.finditer(body):
        target = _TARGET.search(match["operands"]) if match["opcode"].startswith("BRA") else None
        # A branch with a predicate, or with a condition among its operands, may fall through.
        always = match["predicate"] is None and match["operands"].count(",") == 0
        ends = always and match["opcode"].split(".")[0] in ("BRA", "EXIT", "RET")
        goes_to = int(target[1], 16) if target else None
        found.append(Instruction(int(match["address"], 16), match["opcode"], goes_to, ends))
    return found


def main_loops(code: list[Instruction], opcode: str) -> list[list[Instruction]]:
    """The innermost loops that hold `opcode`."""
    addresses = [i.address for i in code]
    here = set(addresses)
    following = dict(zip(addresses, addresses[1:], strict=False))
    edges = {
        i.address: {
            *({i.target} & here if i.target is not None else ()),
            *({following[i.address]} if not i.ends and i.address in following else ()),
        }
        for i in code
    }
    holders = {i.address for i in code if i.is_a(opcode)}
    return [[i for i in code if i.address in loop] for loop in _innermost(edges, here, holders)]


def _innermost(edges: dict[int, set[int]], nodes: set[int], holders: set[int]) -> list[set[int]]:
    """Loops among `nodes` that hold one of `holders` and no smaller loop that does."""
    found = []
    for component in _components(edges, nodes):
        if len(component) == 1 or not component & holders:
            continue
        # Without the instruction through which it is entered, what is left of a loop are the loops inside of it.
        entries = {n for n in component if any(n in edges[m] for m in edges if m not in component)} or {min(component)}
        found += _innermost(edges, component - {min(entries)}, holders) or [component]
    return found


def _components(edges: dict[int, set[int]], nodes: set[int]) -> list[set[int]]:
    """Strongly connected components of a part of a graph: Kosaraju's two passes of depth-first search."""
    backwards: dict[int, set[int]] = {node: set() for node in nodes}
    for node in nodes:
        for successor in edges[node] & nodes:
            backwards[successor].add(node)
    order: list[int] = []
    seen: set[int] = set()
    for root in nodes:
        stack = [(root, False)]
        while stack:
            node, left = stack.pop()
            if left:
                order.append(node)
            elif node not in seen:
                seen.add(node)
                stack += [(node, True), *((successor, False) for successor in edges[node] & nodes)]
    components = []
    for root in reversed(order):
        component, waiting = set(), [root]
        while waiting:
            node = waiting.pop()
            if node in seen:
                seen.discard(node)
                component.add(node)
                waiting += backwards[node]
        if component:
            components.append(component)
    return components


def hidden_share(loop: list[Instruction], opcode: str, product: str) -> float:
    """The share of a loop's `opcode` that has a wait on either side and, since the first of them, no new product."""
    hidden = since_wait = 0
    waited = False
    for instruction in loop:
        if instruction.is_a(_WAIT):
            hidden += since_wait if waited else 0
            waited, since_wait = True, 0
        elif instruction.is_a(product):
            waited = False
        elif instruction.is_a(opcode):
            since_wait += 1
    total = sum(instruction.is_a(opcode) for instruction in loop)
    return hidden / total if total else 0.0


def is_exempt(kernel: dict) -> bool:
    """Whether a kernel's name frees it from its rule's opcodes."""
    rule = RULES.get(kernel["kind"])
    return rule is not None and any(word in kernel["kernel"] for word in rule.exempt)


def problems_of(kernel: dict, code: list[Instruction] | None) -> list[str]:
    """What is wrong with one kernel of the report, given its machine code."""
    rule = RULES.get(kernel["kind"])
    if rule is None:
        return [f"instances.def gives it the kind '{kernel['kind']}', which is none of {', '.join(RULES)}"]
    if code is None:
        return ["its machine code is not in the object file"]
    problems = []
    if rule.loops is None and (kernel["spill_stores"] or kernel["spill_loads"]):
        problems.append(f"spills registers ({kernel['spill_stores']} bytes stored, {kernel['spill_loads']} loaded)")
    if not is_exempt(kernel):
        problems += [f"has no {wanted}" for wanted in rule.opcodes if not any(i.is_a(wanted) for i in code)]
    if rule.loops is not None and any(i.is_a(rule.loops) for i in code):
        loops = main_loops(code, rule.loops)
        spills = [i for loop in loops for i in loop if any(i.is_a(spill) for spill in _SPILLS)]
        if spills:
            where = f"{len(spills)} instructions, the first at {spills[0].address:#x}"
            problems.append(f"spills registers in a main loop ({where})")
        if not loops:
            problems.append(f"has {rule.loops} in no loop")
        shares = [hidden_share(loop, rule.hidden, rule.loops) for loop in loops if rule.hidden is not None]
        if min(shares, default=1.0) < rule.hidden_share:
            problems.append(f"has a main loop whose {rule.hidden} do not overlap with its {rule.loops}")
    return problems


def check(report: dict, sass: dict[str, dict[str, list[Instruction]]]) -> list[str]:
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
        print(
            f"machine code of {kernels} kernels in {variants} variants: every wanted instruction there, softmax "
            "beside the products, no spills where they cost"
        )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
