"""Compiles csrc/ into fa3_dist/lib/libfa3_dist.so and reports what the compiler made of every kernel.

One translation unit a row of instances.def, generated into build/ and compiled by nvcc; the bindings are compiled by
g++ against the headers inside the installed torch, a CPU build included. Ninja decides what has to be made again.
Run it as `make kernels`. FA3_DIST_ROWS picks rows: comma-separated patterns ("delta_bf16,*fp16*") or "one-per-family".
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build"
MEMORY_PER_JOB = 5 * 2**30  # bytes; the largest translation unit stays below it

_PTXAS_KERNEL = re.compile(r"Compiling entry function '(\S+)'")
_PTXAS_SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_PTXAS_USED = re.compile(r"Used (\d+) registers")
_PTXAS_SHARED = re.compile(r"(\d+) bytes smem")


class MissingTool(RuntimeError):
    """Something the build needs is not installed; the message says what and how to get it."""


def load_file(path: Path) -> ModuleType:
    """A Python file as a module, without importing the package around it (which needs torch)."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


facts = load_file(ROOT / "fa3_dist" / "_build.py")
version = load_file(ROOT / "fa3_dist" / "_version.py").__version__


# ---------------------------------------------------------------------------------------------------------------------
# Tools
# ---------------------------------------------------------------------------------------------------------------------


def package_folder(name: str) -> Path | None:
    """Where a Python package is installed, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def find_cuda_tool(name: str) -> Path | None:
    """A program of the CUDA toolkit: from CUDA_HOME, the PATH, the usual folder, or the toolkit's PyPI packages."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    folders = [Path(home) / "bin" for home in homes if home]
    folders += [Path(folder) for folder in os.get_exec_path()]
    folders.append(Path("/usr/local/cuda/bin"))
    if nvidia := package_folder("nvidia"):
        folders += sorted(nvidia.glob("*/bin"))
    return next((folder / name for folder in folders if os.access(folder / name, os.X_OK)), None)


@dataclass(frozen=True)
class Toolchain:
    """Everything the build calls or includes, found and existing."""

    ninja: str
    gxx: str
    nvcc: Path
    nvcc_version: str
    cuda_include: Path
    cuda_lib: Path
    torch: Path
    cutlass: Path | None
    cutlass_version: str | None


def find_toolchain() -> Toolchain:
    """Finds the compilers and headers, or raises MissingTool naming the first that is missing."""
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if ninja is None:
        raise MissingTool("ninja is not installed: pip install ninja")
    gxx = os.environ.get("CXX") or shutil.which("g++")
    if gxx is None:
        raise MissingTool("no C++ compiler: install g++ 11 or newer, or set CXX")
    nvcc = find_cuda_tool("nvcc")
    if nvcc is None:
        raise MissingTool(
            "nvcc is not installed: install a CUDA 13.0 toolkit and set CUDA_HOME, or pip install "
            "'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cuda-runtime==13.0.*' "
            "'nvidia-cuda-cccl==13.0.*'"
        )
    torch = package_folder("torch")
    if torch is None:
        raise MissingTool(
            "torch is not installed, whose headers the bindings include: install it and build without isolation "
            "(pip install --no-build-isolation .)"
        )
    toolkit = toolkit_root(nvcc)
    cutlass = find_cutlass()
    return Toolchain(
        ninja=ninja,
        gxx=gxx,
        nvcc=nvcc,
        nvcc_version=nvcc_version(nvcc),
        cuda_include=toolkit / "include",
        cuda_lib=static_runtime(toolkit).parent,
        torch=torch,
        cutlass=cutlass,
        cutlass_version=cutlass_version(cutlass) if cutlass else None,
    )


def toolkit_root(nvcc: Path) -> Path:
    """The toolkit nvcc belongs to. nvcc itself may be a link or a wrapper, so it is asked."""
    output = subprocess.run([nvcc, "--dryrun", "-c", "any.cu"], capture_output=True, text=True).stderr
    match = re.search(r"^#\$ TOP=(.+)$", output, re.MULTILINE)
    if match is None:
        raise MissingTool(f"{nvcc} does not say where its toolkit is; set CUDA_HOME to a CUDA 13.0 toolkit")
    return Path(match[1].strip()).resolve()


def static_runtime(toolkit: Path) -> Path:
    """libcudart_static.a of a toolkit."""
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib"):
        library = toolkit / folder / "libcudart_static.a"
        if library.is_file():
            return library
    raise MissingTool(f"no libcudart_static.a below {toolkit}: pip install 'nvidia-cuda-runtime==13.0.*'")


def nvcc_version(nvcc: Path) -> str:
    """nvcc's version, as in "13.0.88"."""
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"V(\d+(?:\.\d+)+)", output)
    return match[1] if match else "unknown"


def find_cutlass() -> Path | None:
    """Folder of CUTLASS headers: $CUTLASS_PATH (a checkout or its include folder), or the nvidia-cutlass package."""
    candidates = []
    if path := os.environ.get("CUTLASS_PATH"):
        candidates += [Path(path), Path(path) / "include"]
    if package := package_folder("cutlass_library"):
        candidates.append(package / "source" / "include")
    return next((folder for folder in candidates if (folder / "cutlass" / "version.h").is_file()), None)


def cutlass_version(include: Path) -> str:
    """Version of the CUTLASS headers, as in "4.2.0"."""
    text = (include / "cutlass" / "version.h").read_text()
    return ".".join(re.findall(r"#define CUTLASS_(?:MAJOR|MINOR|PATCH)\s+(\d+)", text))


# ---------------------------------------------------------------------------------------------------------------------
# Rows and generated files
# ---------------------------------------------------------------------------------------------------------------------


def select_rows(rows: list, selection: str) -> list:
    """The rows that FA3_DIST_ROWS asks for, and those of kind control, which others call; "" is all.

    Raises ValueError for a pattern that no row matches.
    """
    if selection == "one-per-family":
        return list({row.family: row for row in reversed(rows)}.values())[::-1]
    patterns = [pattern.strip() for pattern in selection.split(",") if pattern.strip()]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(row.name, pattern) for row in rows):
            names = ", ".join(row.name for row in rows)
            raise ValueError(f"FA3_DIST_ROWS: '{pattern}' matches no row of instances.def; the rows are {names}")
    wanted = {row for row in rows if not patterns or any(fnmatch.fnmatchcase(row.name, p) for p in patterns)}
    return [row for row in rows if row in wanted or row.kind == "control"]


def kernel_header(row) -> Path:
    """The kernel header of a row's family, relative to csrc/."""
    found = sorted(CSRC.rglob(f"{row.family}.cuh"))
    if len(found) != 1:
        raise ValueError(f"family {row.family} of instances.def needs one {row.family}.cuh below csrc/, found {found}")
    return found[0].relative_to(CSRC)


def write_if_changed(path: Path, text: str) -> None:
    """Writes a file unless it already says so: an unchanged file makes ninja rebuild nothing."""
    if not path.is_file() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def generate(rows: list, info: dict) -> None:
    """Writes what is derived from the selected rows: their list, one translation unit each, and the build's facts."""
    generated = BUILD / "generated"
    selected = {row.text for row in rows}
    lines = (CSRC / "instances.def").read_text().splitlines(keepends=True)
    kept = [line for line in lines if facts.parse_row(line) is None or line.strip() in selected]
    write_if_changed(generated / "instances.def", "".join(kept))
    for row in rows:
        unit = f'#include "{kernel_header(row).as_posix()}"\n\nFA3_INSTANTIATE({", ".join(row.traits)})\n'
        write_if_changed(generated / f"{row.name}.cu", unit)
    literal = json.dumps(json.dumps(info))  # a JSON string literal is a C++ one
    write_if_changed(generated / "build_info.h", f"#pragma once\n\n#define FA3_DIST_BUILD_INFO {literal}\n")


def ninja_file(rows: list, tools: Toolchain) -> str:
    """The text of build.ninja."""
    cutlass = f"-isystem {tools.cutlass}" if tools.cutlass else ""
    torch_include = f"-isystem {tools.torch}/include"
    unrooted = f"-ffile-prefix-map={ROOT}=fa3_dist -ffile-prefix-map={tools.torch.parent}=."  # no paths of this machine
    objects = [f"objects/{row.name}.o" for row in rows]
    lines = [
        "ninja_required_version = 1.8",
        "rule nvcc",
        f"  command = {tools.nvcc} -optf {CSRC}/nvcc.flags -ccbin {tools.gxx} -I{CSRC} {cutlass} -MD -MF $out.d "
        "-c $in -o $out > $out.log 2>&1 || (cat $out.log; rm -f $out; exit 1)",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $out",
        "rule gxx",
        f"  command = {tools.gxx} @{CSRC}/gxx.flags {unrooted} -Igenerated -I{CSRC} {torch_include} "
        f"-isystem {tools.cuda_include} "
        "-MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = g++ $out",
        "rule link",
        # NOTE: without --no-as-needed the weak symbol of the current stream stays NULL, silently, on a CUDA torch too.
        f"  command = {tools.gxx} -shared -o $out $in -L{tools.torch}/lib -Wl,--no-as-needed -ltorch -ltorch_cpu "
        f"-Wl,--as-needed -L{tools.cuda_lib} -lcudart_static -lrt -lpthread -ldl -Wl,--exclude-libs,ALL -Wl,-z,defs",
        "  description = link $out",
        f"build objects/bindings.o: gxx {CSRC}/bindings.cpp | {CSRC}/gxx.flags generated/instances.def",
        *(f"build objects/{row.name}.o: nvcc generated/{row.name}.cu | {CSRC}/nvcc.flags" for row in rows),
        f"build {facts.LIBRARY}: link objects/bindings.o {' '.join(objects)}",
        f"default {facts.LIBRARY}",
    ]
    return "\n".join(lines) + "\n"


def job_count() -> int:
    """Compilations at a time: one a core, and no more than memory holds. MAX_JOBS lowers it."""
    memory = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    fits = int(memory[1]) * 1024 // MEMORY_PER_JOB if memory else 1
    wanted = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    return max(1, min(wanted, fits))


def check_cutlass(rows: list, tools: Toolchain) -> None:
    """Raises MissingTool if a selected row's folder includes CUTLASS and there is none."""
    if tools.cutlass is not None:
        return
    folders = {CSRC / "common"} | {CSRC / kernel_header(row).parent for row in rows}
    for path in sorted(path for folder in folders for path in folder.rglob("*.cuh")):
        if re.search(r"#include\s+[<\"]cut(e|lass)/", path.read_text()):
            raise MissingTool(
                f"{path.relative_to(ROOT)} includes CUTLASS, which is not installed: pip install --no-deps "
                "'nvidia-cutlass==4.2.*', or set CUTLASS_PATH to a checkout"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------------------


def parse_ptxas(log: str) -> list[dict]:
    """Registers, stack, spills (bytes) and static shared memory (bytes) of every kernel in a log of ptxas -v."""
    kernels: list[dict] = []
    for line in log.splitlines():
        if match := _PTXAS_KERNEL.search(line):
            kernels.append({"symbol": match[1]})
        elif not kernels:
            continue
        elif match := _PTXAS_SPILL.search(line):
            stack, stores, loads = map(int, match.groups())
            # NOTE: the numbers of a kernel's own stack come first; those of called functions may follow.
            kernels[-1].setdefault("stack", stack)
            kernels[-1].setdefault("spill_stores", stores)
            kernels[-1].setdefault("spill_loads", loads)
        elif match := _PTXAS_USED.search(line):
            shared = _PTXAS_SHARED.search(line)
            kernels[-1] |= {"registers": int(match[1]), "shared": int(shared[1]) if shared else 0}
    return kernels


def readable(symbols: list[str]) -> list[str]:
    """Demangled names without their parameter lists, or the symbols as they are where c++filt is missing."""
    if not symbols or shutil.which("c++filt") is None:
        return symbols
    output = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"^void (.*?)\(.*$", r"\1", line) for line in output.splitlines()]


def compile_seconds() -> dict[str, float]:
    """Seconds each output took to make, from ninja's own log."""
    seconds = {}
    for line in (BUILD / ".ninja_log").read_text().splitlines()[1:]:
        start, end, _, output = line.split("\t")[:4]
        seconds[output] = (int(end) - int(start)) / 1000
    return seconds


def make_report(rows: list, info: dict) -> dict:
    """The build report: what was built from what, and what ptxas says of every kernel."""
    seconds = compile_seconds()
    kernels = []
    for row in rows:
        target = f"objects/{row.name}.o"
        parsed = parse_ptxas((BUILD / f"{target}.log").read_text())
        for kernel, name in zip(parsed, readable([kernel["symbol"] for kernel in parsed]), strict=True):
            kernels.append({"variant": row.name, "kind": row.kind, "kernel": name, **kernel})
    return {
        **info,
        "library_bytes": facts.LIBRARY.stat().st_size,
        "objects": {row.name: f"objects/{row.name}.o" for row in rows},
        "compile_seconds": {row.name: seconds.get(f"objects/{row.name}.o") for row in rows},
        "kernels": kernels,
    }


def print_report(report: dict) -> None:
    """The report as a short table: one line a variant, the largest figure over its kernels."""
    print(f"{'variant':<24} {'kernels':>7} {'registers':>9} {'spill B':>7} {'shared B':>8} {'seconds':>7}")
    for variant in report["variants"]:
        kernels = [kernel for kernel in report["kernels"] if kernel["variant"] == variant]
        registers = max(kernel["registers"] for kernel in kernels)
        spill = max(kernel["spill_stores"] + kernel["spill_loads"] for kernel in kernels)
        shared = max(kernel["shared"] for kernel in kernels)
        seconds = report["compile_seconds"][variant] or 0.0
        print(f"{variant:<24} {len(kernels):>7} {registers:>9} {spill:>7} {shared:>8} {seconds:>7.1f}")
    print(
        f"{facts.LIBRARY.relative_to(ROOT)}: {report['library_bytes'] / 2**20:.2f} MiB, csrc {report['csrc_hash']}, "
        f"nvcc {report['nvcc']}, CUTLASS {report['cutlass'] or 'not installed'}; every kernel: build/report.json"
    )


# ---------------------------------------------------------------------------------------------------------------------


def build(selection: str = "") -> dict:
    """Builds the library from the selected rows and returns the report, also written to build/report.json.

    Raises MissingTool, ValueError for a wrong selection, CalledProcessError if a compilation fails.
    """
    rows = select_rows(facts.instances(CSRC), selection)
    tools = find_toolchain()
    check_cutlass(rows, tools)
    info = {
        "version": version,
        "variants": [row.name for row in rows],
        "csrc_hash": facts.csrc_hash(CSRC),
        "nvcc": tools.nvcc_version,
        "cutlass": tools.cutlass_version,
    }
    generate(rows, info)
    facts.LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    write_if_changed(BUILD / "build.ninja", ninja_file(rows, tools))
    subprocess.run([tools.ninja, "-C", str(BUILD), "-j", str(job_count())], check=True)
    report = make_report(rows, info)
    (BUILD / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Build fa3_dist/lib/libfa3_dist.so.")
    parser.add_argument("--rows", default=os.environ.get("FA3_DIST_ROWS", ""), help="patterns, or one-per-family")
    arguments = parser.parse_args()
    try:
        print_report(build(arguments.rows))
    except (MissingTool, ValueError) as error:
        print(f"cannot build the kernels: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
