"""The shape of the source tree: who may include whom, and what may stand only once."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fa3_dist import __version__, _build

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"

# A part imports only parts of lower rank, and itself. The package's __init__ gathers public names and is free.
PYTHON_RANK = {
    "_version": 0,
    "_build": 0,
    "algebra": 0,
    "torch_kernels": 1,
    "reference": 2,
    "ops": 3,
    "interface": 4,
    "fp8": 4,
    "parallel": 5,
    "layers": 6,
    "integrations": 7,
    "__main__": 7,
}
FORBIDDEN = {("layers", "parallel")}  # of lower rank, but layers get their attention as an argument
# "": params.h. The backward rests on the forward: the same tiles, schedule, loads and products, seen from the keys.
CSRC_RANK = {"": 0, "common": 1, "forward": 2, "quantize": 2, "backward": 3, "bindings.cpp": 4}
TORCH_HEADER = re.compile(r"^(torch|ATen|c10|caffe2|pybind11)/|^Python\.h$")


def tracked_files() -> list[Path]:
    """Files of the checkout that are or will be tracked."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listing.stdout.split("\0") if name]
    return [path for path in files if path.is_file() and not path.is_symlink()]


def texts() -> dict[str, str]:
    """Tracked text files by their path from the root, without what benchmarks recorded."""
    found = {}
    for path in tracked_files():
        if path.is_relative_to(ROOT / "benchmarks" / "results"):
            continue
        try:
            found[path.relative_to(ROOT).as_posix()] = path.read_text()
        except UnicodeDecodeError:
            continue
    return found


def part_of(module: str) -> str:
    """The part of the package that a dotted module name belongs to: fa3_dist.parallel.ring -> parallel."""
    return module.split(".")[1] if "." in module else ""


def imported_modules(source: str, package: str) -> set[str]:
    """Modules of ours that a source imports, at any depth; relative imports are resolved against `package`."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [base])])
            # `from fa3_dist import ops` imports a module, `from fa3_dist.ops import forward` a name of one.
            modules |= {f"{base}.{alias.name}" for alias in node.names} if base == "fa3_dist" else {base}
    return {name for name in modules if name.split(".")[0] == "fa3_dist"}


def wrong_imports(part: str, source: str, package: str) -> list[str]:
    """The parts that `part` imports against the direction."""
    wrong = []
    for module in sorted(imported_modules(source, package)):
        other = part_of(module)
        if other == part or other not in PYTHON_RANK:
            continue
        if PYTHON_RANK[other] >= PYTHON_RANK[part] or (part, other) in FORBIDDEN:
            wrong.append(other)
    return wrong


def package_sources() -> list[tuple[str, str, str]]:
    """(part, package, path) of every module of ours but the package's own __init__."""
    found = []
    for path in sorted((ROOT / "fa3_dist").rglob("*.py")):
        inner = path.relative_to(ROOT / "fa3_dist")
        if inner.as_posix() != "__init__.py":
            package = ".".join(["fa3_dist", *inner.parent.parts])
            found.append((inner.parts[0].removesuffix(".py"), package, str(path)))
    return found


@pytest.mark.parametrize(("part", "package", "path"), package_sources(), ids=lambda value: Path(value).name)
def test_python_imports_point_downwards(part: str, package: str, path: str) -> None:
    assert part in PYTHON_RANK, f"{part} is a new part of the package: give it a rank here and a line in the layout"
    wrong = wrong_imports(part, Path(path).read_text(), package)
    assert not wrong, f"{path} imports {', '.join(wrong)}, which rests on {part} or stands beside it"


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("ops", "from fa3_dist import interface"),
        ("parallel", "from fa3_dist.layers import FA3Attention"),
        ("layers", "import fa3_dist.parallel.ring"),
        ("layers", "def f():\n    from ..parallel import ring"),
        ("reference", "from . import ops"),
    ],
)
def test_a_wrong_import_is_found(part: str, source: str) -> None:
    package = f"fa3_dist.{part}" if part in ("parallel", "layers") else "fa3_dist"
    assert wrong_imports(part, source, package)


def test_oracle_imports_nothing_of_ours() -> None:
    assert not imported_modules((ROOT / "tests" / "oracle.py").read_text(), "tests")


def includes(path: Path) -> list[str]:
    """What a C++ source includes."""
    return re.findall(r'^\s*#\s*include\s+[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def csrc_sources() -> list[Path]:
    return sorted(path for path in CSRC.rglob("*") if path.suffix in {".cpp", ".cu", ".cuh", ".h"})


def csrc_part(inner: Path) -> str:
    """The part of csrc/ a file belongs to: its folder, or the file itself for bindings.cpp."""
    return inner.parts[0] if len(inner.parts) > 1 else inner.name if inner.name in CSRC_RANK else ""


@pytest.mark.parametrize("path", csrc_sources(), ids=lambda path: path.name)
def test_csrc_includes_point_downwards(path: Path) -> None:
    part = csrc_part(path.relative_to(CSRC))
    assert part in CSRC_RANK, f"{part}/ is a new part of csrc: give it a rank here and a line in the layout"
    for header in includes(path):
        if path.name != "bindings.cpp":
            assert not TORCH_HEADER.search(header), f"{path} includes {header}: only bindings.cpp includes Torch"
        if (CSRC / header).is_file():
            other = csrc_part(Path(header))
            allowed = other == part or CSRC_RANK[other] < CSRC_RANK[part]
            assert allowed, f"{path} includes {header}, which rests on {part} or stands beside it"


def test_params_are_plain_data() -> None:
    params = CSRC / "params.h"
    assert includes(params) == ["cstdint"]
    assert not re.search(r"__(device|host|global)__|\bvirtual\b|\bcuda", params.read_text())
    if compiler := shutil.which("g++"):
        check = "#include <type_traits>\nstatic_assert(std::is_trivially_copyable_v<fa3::DeltaParams>);\n"
        subprocess.run(
            [compiler, "-std=c++17", "-Wall", "-Werror", "-fsyntax-only", "-include", str(params), "-x", "c++", "-"],
            input=check, text=True, check=True,
        )


def test_instances_def_is_the_only_list_of_variants() -> None:
    rows = _build.instances()
    families = {row.family for row in rows}
    for name, text in texts().items():
        if name == "csrc/instances.def":
            continue
        for family in families:
            names = [row.name for row in rows if row.family == family]
            listed = len(names) > 1 and all(re.search(rf"\b{variant}\b", text) for variant in names)
            assert not listed, f"{name} lists the variants of {family}; read them from csrc/instances.def"
            if name.startswith("csrc/"):
                row = re.search(rf"^FA3_{family.upper()}\(\w+,", text, re.MULTILINE)
                assert not row, f"{name} holds rows of {family}: move them to instances.def"


def test_every_family_has_one_kernel_header_and_is_dispatched() -> None:
    bindings = (CSRC / "bindings.cpp").read_text()
    definitions = (CSRC / "instances.def").read_text()
    for family in {row.family for row in _build.instances()}:
        assert len(list(CSRC.rglob(f"{family}.cuh"))) == 1
        macro = f"FA3_{family.upper()}"
        callers = [path for path in CSRC.rglob("*.cuh") if f" launch_{family}(" in path.read_text()]
        called = any(path.stem != family for path in callers)  # by another family's launcher
        assert called or re.search(rf"#define {macro}\(", bindings), f"nothing dispatches over {macro}"
        assert f"#ifndef {macro}\n" in definitions and f"#undef {macro}\n" in definitions


def test_version_stands_once() -> None:
    version = re.compile(rf"(?<![\d.]){re.escape(__version__)}(?![\d.])")
    places = [name for name, text in texts().items() if version.search(text)]
    assert places == ["fa3_dist/_version.py"]


@pytest.mark.parametrize("name", ["layers", "parallel"])
def test_root_links(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink() and link.readlink() == Path("fa3_dist") / name and link.is_dir()


def test_no_file_names_a_package_registry() -> None:
    # Written in pieces, so that this file does not name them either.
    hosts = ["pypi" + ".org", "python" + "hosted", "download." + "pytorch", "registry." + "npmjs", "deb." + "debian"]
    for name, text in texts().items():
        for host in hosts:
            assert host not in text.lower(), f"{name} names {host}: say which package, not where from"
