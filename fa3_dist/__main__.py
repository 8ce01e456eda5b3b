"""`python -m fa3_dist doctor`: what is installed, what the operators run on, and what to do about what is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
import warnings
from typing import Any

import torch

from fa3_dist import __version__, _build, ops

HOPPER = [9, 0]
OPTIONAL_PACKAGES = {
    "matplotlib": "plots of examples/train.py",
    "tqdm": "progress bars of examples/train.py",
    "transformers": "fa3_dist.integrations.huggingface",
}


def find_gpus() -> list[dict[str, Any]]:
    """Name, compute capability, memory (bytes) and multiprocessor count of every GPU torch sees."""
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": p.name, "capability": [p.major, p.minor], "memory": p.total_memory, "sms": p.multi_processor_count}
        for p in properties
    ]


def find_library() -> dict[str, Any]:
    """The compiled library: where it belongs, whether it is there and loaded, what it holds, whether it fits csrc/."""
    info = ops.library_info()
    source_hash = _build.csrc_hash()
    rows = _build.instances() if source_hash else []
    return {
        "path": str(_build.LIBRARY),
        "exists": _build.LIBRARY.is_file(),
        "loaded": info is not None,
        "info": info,
        "csrc_hash": source_hash,
        "matches_csrc": None if info is None or source_hash is None else info["csrc_hash"] == source_hash,
        "missing_variants": [] if info is None else [row.name for row in rows if row.name not in info["variants"]],
    }


def find_nccl() -> str | None:
    """NCCL's version as text, or None where torch has none."""
    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def find_packages() -> dict[str, str | None]:
    """Versions of the optional packages, None for those that are not installed. Imports none of them."""
    versions: dict[str, str | None] = dict.fromkeys(OPTIONAL_PACKAGES)
    for name in OPTIONAL_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def find_all() -> dict[str, Any]:
    """Everything doctor reports, as plain data."""
    return {
        "fa3_dist": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "gpus": find_gpus(),
        "library": find_library(),
        "nccl": find_nccl(),
        "packages": find_packages(),
    }


def advise(found: dict[str, Any]) -> list[str]:
    """What to do about what is missing: one sentence a finding, the most important first."""
    return [*_advise_gpu(found), *_advise_library(found["library"]), *_advise_packages(found["packages"])]


def _advise_gpu(found: dict[str, Any]) -> list[str]:
    gpus = found["gpus"]
    if not found["torch_cuda"]:
        return [
            "torch is a CPU build: everything runs on the CPU, exactly and slowly. For a GPU install a CUDA build of "
            "torch 2.10 or newer."
        ]
    if not gpus:
        return ["torch has CUDA but sees no GPU: check `nvidia-smi` and CUDA_VISIBLE_DEVICES."]
    advice = []
    other = sorted({gpu["name"] for gpu in gpus if gpu["capability"] != HOPPER})
    if other:
        advice.append(
            f"{', '.join(other)}: not Hopper (compute capability 9.0). The operators run through PyTorch's kernels "
            "there; the compiled kernels need an H100, H200 or GH200."
        )
    if len(gpus) > 1 and found["nccl"] is None:
        advice.append("torch has no NCCL, which context parallelism over GPUs needs: install a CUDA build of torch.")
    return advice


def _advise_library(library: dict[str, Any]) -> list[str]:
    if not library["exists"]:
        return ["no compiled kernels: `make kernels` in a checkout builds them; until then PyTorch's kernels are used."]
    if not library["loaded"]:
        return ["the compiled library is there but does not load under this torch: rebuild it with `make kernels`."]
    if library["matches_csrc"] is False:
        return ["the compiled library is older or newer than csrc/: rebuild it with `make kernels`."]
    if library["missing_variants"]:
        missing = ", ".join(library["missing_variants"])
        return [f"the library was built without {missing}: `make kernels` with FA3_DIST_ROWS unset builds all."]
    return []


def _advise_packages(packages: dict[str, str | None]) -> list[str]:
    missing = [name for name, version in packages.items() if version is None]
    return [f"{name} is not installed ({OPTIONAL_PACKAGES[name]}): pip install {name}" for name in missing]


def _describe(info: dict[str, Any], matches_csrc: bool | None) -> list[str]:
    """What the library says of itself, and what runs on its kernels, one line an operator."""
    matches = {True: "matches csrc/", False: "does NOT match csrc/", None: "no csrc/ to compare with"}[matches_csrc]
    return [
        f"version {info['version']}, sources {info['csrc_hash']} ({matches})",
        f"nvcc {info['nvcc']}, CUTLASS {info['cutlass'] or 'not used'}",
        *_describe_operators(info["variants"]),
    ]


def _describe_operators(variants: list[str]) -> list[str]:
    """A line an operator: the dtypes of its compiled kernels, each with the largest head_dim/head_dim_v of them."""
    lines, compiled = [], ops.compiled_sizes(variants)
    for op in ops.SCHEMAS:
        kernels = []
        for dtype, sizes in compiled.get(op, {}).items():
            kernels.append(" ".join([dtype, *("/".join(map(str, size)) for size in sizes if size)]))
        lines.append(f"{op:<12} {', '.join(kernels) or 'none: it runs through PyTorch'}")
    return lines


def render(found: dict[str, Any]) -> str:
    """The findings and the advice as text for people."""
    library, info = found["library"], found["library"]["info"]
    lines = [
        f"fa3_dist   {found['fa3_dist']}",
        f"python     {found['python']}",
        f"torch      {found['torch']}, CUDA {found['torch_cuda'] or 'none (CPU build)'}",
        f"NCCL       {found['nccl'] or 'none'}",
    ]
    for index, gpu in enumerate(found["gpus"]):
        major, minor = gpu["capability"]
        memory = gpu["memory"] / 2**30
        lines.append(f"GPU {index}      {gpu['name']}, capability {major}.{minor}, {gpu['sms']} SMs, {memory:.0f} GiB")
    if not found["gpus"]:
        lines.append("GPU        none")
    state = "loaded" if library["loaded"] else "does not load" if library["exists"] else "not built"
    lines.append(f"library    {library['path']}: {state}")
    if info is not None:
        lines += [f"           {line}" for line in _describe(info, library["matches_csrc"])]
    installed = [f"{name} {version or '(none)'}" for name, version in found["packages"].items()]
    lines.append(f"optional   {', '.join(installed)}")
    advice = advise(found)
    lines += ["", "To do:" if advice else "Nothing is missing.", *(f"  - {line}" for line in advice)]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line of the package; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fa3_dist", description="fa3_dist from the command line.")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="what is installed here, and what to do about what is missing")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    parsed = parser.parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of GPUs it cannot use; the findings say so themselves
        found = find_all()
    print(json.dumps({**found, "advice": advise(found)}, indent=2) if parsed.json else render(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
